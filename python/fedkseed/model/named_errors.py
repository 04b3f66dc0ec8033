"""Errors of the kernels for those who gave a model: tensors by name, and advice that can be followed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

#: What to do about two weights in the same memory.
TIE = "tie them as one Parameter object, or give one of them a copy (.clone())"

_POSITION = re.compile(r"\b(tensors|residuals|out)\[(\d+)\]")
_MEMORY_OF_ITS_OWN = "give it memory of its own: nn.Parameter(p.detach().clone().contiguous())"
#: What the kernels say to those who call them: what it comes to for the owner of the model, where {} is the
#: first tensor's name.
_WORDS = {
    "leave it out or convert it": (
        "convert it, or freeze it (requires_grad_(False)) and tune adapters if it is quantised"
    ),
    "like its input": "like w0's",
    "is it sharded away?": "load the model whole; is it sharded, offloaded or freed?",
    "pass a contiguous copy": _MEMORY_OF_ITS_OWN,
    "list a tied parameter once, or pass a copy": TIE,
    "with the negative bit set": f"with the negative bit set; {_MEMORY_OF_ITS_OWN}",
    "as it was prepared, but": "where and what it was, but",
    "call prepare again": "make a new optimizer",
    "wrap the call in torch.no_grad(), the noise kernels are not differentiable": (
        "leave gradients off: is there a torch.set_grad_enabled(True) in the closure?"
    ),
    "expected tensors on one of": "expected {} on one of",
    "move them there": "move the model there",
}


@contextmanager
def errors_named(names: Sequence[str], tensors: str = "{}") -> Iterator[None]:
    """Raises what the kernels raise within, in the words of the model's owner.

    Args:
        names: of the tensors of the call, by their positions; without any the errors go on as they are.
        tensors: what an input is called, with the name in place of the braces; an output has the name itself.
    """
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        words = _in_names(str(error), names, tensors) if names else str(error)
        if words == str(error):
            raise
        raise _plain_type(error)(words) from None  # the kernels' own words would be shown beside these


def _in_names(message: str, names: Sequence[str], tensors: str) -> str:
    forms = {"tensors": tensors, "residuals": "the residual of {}", "out": "{}"}
    message = _POSITION.sub(lambda found: forms[found[1]].format(names[int(found[2])]), message)
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours.replace("{}", names[0]))
    return message


def _plain_type(error: Exception) -> type[Exception]:
    """The built-in one: a subclass might not be made of a message alone."""
    return next(kind for kind in (TypeError, ValueError, RuntimeError) if isinstance(error, kind))
