"""Support for tests of refusals: models with one tensor that cannot be tuned, and what it should be told.

Each model is the `base` below but for the tensor that its name says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accelerate
import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.utils._pytree import tree_map


def base() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))


def with_weight(tensor: Tensor) -> nn.Sequential:
    """The base with this tensor as the parameter 2.weight."""
    model = base()
    model[2].weight = nn.Parameter(tensor)
    return model


class Wrapper(Tensor):
    """A tensor that keeps its values in another, as torchao's quantised ones do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Wrapper:
        return Wrapper(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(value: Any) -> Any:
            return value.inner if isinstance(value, Wrapper) else value

        result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return Wrapper(result) if isinstance(result, Tensor) else result


class Named(Tensor):
    """A subclass that adds nothing."""


def offloaded() -> nn.Module:
    model = base()
    accelerate.cpu_offload(model[2])
    return model


def fake() -> nn.Module:
    with FakeTensorMode():
        return base()


def sharded() -> nn.Module:
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    return with_weight(distribute_tensor(torch.eye(4), mesh, [Replicate()]))


def freed() -> nn.Module:
    model = base()
    model[2].weight.untyped_storage().resize_(0)
    return model


def lazy() -> nn.Module:
    model = base()
    model[2] = nn.LazyLinear(4)
    return model


def lazy_buffers() -> nn.Module:
    model = base()
    model[1] = nn.LazyBatchNorm1d(affine=False)
    return model


def shared(view: Callable[[Tensor], Tensor], place: str, kind: str) -> nn.Module:
    """The base with a view of 0.weight at a place: tuned, frozen, or as a buffer."""
    model = base()
    module, name = model[int(place[0])], place[2:]
    tensor = view(model[0].weight.data)
    if kind == "buffer":
        module.register_buffer(name, tensor)
    else:
        setattr(module, name, nn.Parameter(tensor, requires_grad=kind == "tuned"))
    return model


def beside(tensor: Tensor, kind: str = "frozen") -> nn.Module:
    """The base with one parameter or buffer more, `odd`."""
    model = base()
    if kind == "buffer":
        model.register_buffer("odd", tensor)
    else:
        model.register_parameter("odd", nn.Parameter(tensor, requires_grad=kind == "tuned"))
    return model


@dataclass(frozen=True)
class Refused:
    """A model and its refusal.

    Attributes:
        make: the model.
        error: its type.
        message: a pattern.
        names: what has to stand in the message.
    """

    make: Callable[[], nn.Module]
    error: type[Exception]
    message: str
    names: tuple[str, ...] = ("2.weight",)


def _shares(view: Callable[[Tensor], Tensor], place: str, kind: str = "tuned") -> Refused:
    message = "memory of their own, but .* and .* share memory; tie them as one Parameter object, or give one"
    said = {"tuned": "", "frozen": " (not tuned)", "buffer": " (a buffer)"}[kind]
    return Refused(lambda: shared(view, place, kind), ValueError, message, ("0.weight", place + said))


_ITSELF = "each element to have memory of its own, got .* with elements that share memory .* nn.Parameter"

REFUSED = {
    "meta": Refused(
        lambda: with_weight(torch.empty(4, 4, device="meta")),
        ValueError,
        "in memory, got 2.weight on the meta device; if accelerate has offloaded it .* load the model whole",
    ),
    "offloaded": Refused(
        offloaded, ValueError, "got 2.(weight|bias) on the meta device; if accelerate", ("2.",)
    ),
    "freed": Refused(freed, ValueError, "with memory, got 2.weight without; load the model whole; is it"),
    "lazy": Refused(lazy, ValueError, "have a shape, got 2.weight uninitialized; run one forward pass first"),
    "lazy buffers": Refused(
        lazy_buffers,
        ValueError,
        "have a shape, got 1.running_mean uninitialized; run one forward pass",
        ("1.",),
    ),
    "fake": Refused(fake, TypeError, r"got \d\.\w+ of type FakeTensor; make the model outside", ()),
    "sharded": Refused(sharded, TypeError, "got 2.weight of type DTensor; .* load the model whole"),
    "wrapper": Refused(
        lambda: with_weight(Wrapper(torch.eye(4))),
        TypeError,
        "got 2.weight of type Wrapper; .* freeze it .* and tune adapters if it is quantised",
    ),
    "subclass": Refused(
        lambda: with_weight(torch.eye(4).as_subclass(Named)), TypeError, "got 2.weight of type Named; wrapped"
    ),
    "float8": Refused(
        lambda: with_weight(torch.eye(4).to(torch.float8_e4m3fn)),
        TypeError,
        "2.weight in one of float32, bfloat16, float16, float64, got float8_e4m3fn; .* freeze it .* adapters",
    ),
    "complex": Refused(
        lambda: with_weight(torch.eye(4, dtype=torch.complex64)),
        TypeError,
        "got 2.weight of torch.complex64; leave it out, or freeze it",
    ),
    "coo": Refused(
        lambda: with_weight(torch.eye(4).to_sparse()),
        TypeError,
        r"got 2.weight of layout torch.sparse_coo; make it dense \(.to_dense\(\)\), or freeze it",
    ),
    "csr": Refused(
        lambda: with_weight(torch.eye(4).to_sparse_csr()), TypeError, "2.weight of layout torch.sparse_csr"
    ),
    "mkldnn": Refused(
        lambda: with_weight(torch.eye(4).to_mkldnn()), TypeError, "2.weight of layout torch._mkldnn; make it"
    ),
    "negative": Refused(
        lambda: with_weight(torch.eye(4, dtype=torch.complex64).conj().imag),
        ValueError,
        "got 2.weight with the negative bit set; give it memory of its own",
    ),
    "dimensions": Refused(
        lambda: beside(torch.zeros(2**18).view((2,) * 18).permute(*range(17, -1, -1)), "tuned"),
        ValueError,
        "at most 16 dimensions that cannot be merged, got 18 in odd .* give it memory of its own",
        ("odd",),
    ),
    "expanded": Refused(lambda: with_weight(torch.ones(4, 1).expand(4, 4)), ValueError, _ITSELF),
    "overlaps itself": Refused(
        lambda: with_weight(torch.ones(8).as_strided((4, 4), (1, 1))), ValueError, _ITSELF
    ),
    "irregular": Refused(
        lambda: beside(torch.zeros(6000).as_strided((9,) * 6, (100, 101, 103, 107, 109, 113)), "tuned"),
        ValueError,
        _ITSELF,
        ("odd",),
    ),
    "tied by memory": _shares(lambda weight: weight, "2.weight"),
    "tied by a view": _shares(lambda weight: weight[:2], "3.weight"),
    "tied, transposed": _shares(torch.t, "2.weight"),
    "frozen view": _shares(lambda weight: weight[2:], "3.weight", "frozen"),
    "frozen column": _shares(lambda weight: weight[:, 3], "2.bias", "frozen"),
    "frozen, half of each element": _shares(
        lambda weight: weight.view(torch.bfloat16)[:, ::2], "1.half_of_it", "frozen"
    ),
    "frozen, wrapped": _shares(lambda weight: Wrapper(weight[:2]), "3.weight", "frozen"),
    "buffer": _shares(lambda weight: weight[1], "3.kept", "buffer"),
}


def accepted() -> dict[str, Callable[[], nn.Module]]:
    """Models that look like some of those above, and are fine."""

    def tied() -> nn.Module:
        model = base()
        model[2].weight = model[0].weight
        model.register_buffer("itself", model[0].weight)
        return model

    def interleaved() -> nn.Module:
        memory = torch.randn(4, 8)
        model = with_weight(memory[:, ::2])
        model[0].weight = nn.Parameter(memory[:, 1::2], requires_grad=False)
        return model

    def frozen_alone() -> nn.Module:
        model = shared(lambda weight: weight[:2], "3.weight", "frozen")
        model[0].weight.requires_grad_(False)
        model.register_buffer("more", model[0].weight.data.expand(3, 4, 4))
        return model

    odd = {
        "frozen sparse": torch.eye(4).to_sparse(),
        "frozen mkldnn": torch.eye(4).to_mkldnn(),
        "frozen meta": torch.empty(4, device="meta"),
        "frozen wrapper": Wrapper(torch.eye(4)),
        "frozen and empty": torch.empty(0),
    }
    models: dict[str, Callable[[], nn.Module]] = {
        name: lambda tensor=tensor: beside(tensor) for name, tensor in odd.items()
    }
    return models | {
        "tied as one object": tied,
        "interleaved": interleaved,
        "frozen alone": frozen_alone,
    }
