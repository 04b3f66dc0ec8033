"""Which tensors an optimizer tunes, in which groups, and which noise each of them gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedkseed.model.manifest import Manifest, manifest_parameters
from fedkseed.model.tunable import check_buffers, check_tunable
from fedkseed.optim.quantised import warn_if_quantised

#: What an optimizer can be given.
Params = nn.Module | Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]]
#: A tensor, or (name, tensor).
_Member = Any


@dataclass(frozen=True)
class TunedParameters:
    """Parameter groups without what is frozen.

    Attributes:
        groups: as torch.optim.Optimizer takes them; a group may be empty.
        streams: the noise stream of each tensor, group by group.
        names: what errors call each tensor, group by group: by its name in the model, else by the name given,
            else by its place.
        manifest: of the model that numbers them; None if a tensor's stream is its place among those given.
    """

    groups: list[dict[str, Any]]
    streams: list[list[int]]
    names: list[list[str]]
    manifest: Manifest | None


def tuned_parameters(
    params: Params, model: nn.Module | None, check_options: Callable[[dict[str, Any]], None]
) -> TunedParameters:
    """Sorts out what an optimizer is given.

    A parameter with ``requires_grad=False`` is frozen: left out, but counted. Plain tensors are always tuned.
    Warns of a model with quantised layers and no adapters.

    Args:
        params: a model, a list of tensors or of (name, tensor), or a list of groups of these: dicts with
            "params" and options.
        model: numbers the tensors of a list or of groups by its manifest, instead of their place in it.
        check_options: raises for options that a group must not have.

    Raises:
        TypeError: not one of the above; a tensor as `check_tunable`.
        ValueError: nothing to tune, a tensor twice, a tensor that is not of the model; a tensor as
            `check_tunable`, a buffer as `check_buffers`.
    """
    given: list[Any]
    if isinstance(params, torch.Tensor):
        raise TypeError("expected a model or an iterable of tensors, got one tensor; put it into a list")
    if isinstance(params, nn.Module):
        if model is not None:
            raise TypeError("expected model only beside a list or groups of its parameters, got two models")
        model, given = params, list(manifest_parameters(params))
    elif not isinstance(params, Iterable):
        raise TypeError(f"expected a model or an iterable of tensors, got {type(params).__name__}")
    else:
        given = list(params)
    listed: list[tuple[list[_Member], dict[str, Any]]]
    if given and isinstance(given[0], dict):
        listed = [_opened(group, check_options) for group in given]
    else:
        listed = [(given, {})]
    manifest, numbers = (None, None) if model is None else _numbers(model)
    tuned = _without_frozen(listed, manifest, numbers)
    names = [name for group in tuned.names for name in group]
    tensors = [_tensor(member) for group in tuned.groups for member in group["params"]]
    check_tunable(names, tensors)
    if model is not None:
        check_buffers(model)
        warn_if_quantised(model, tensors)
    return tuned


def _without_frozen(
    listed: list[tuple[list[_Member], dict[str, Any]]],
    manifest: Manifest | None,
    numbers: dict[int, int] | None,
) -> TunedParameters:
    groups: list[dict[str, Any]] = []
    streams: list[list[int]] = []
    names: list[list[str]] = []
    seen: set[int] = set()
    for members, options in listed:
        tuned: list[_Member] = []
        group_streams: list[int] = []
        group_names: list[str] = []
        for member in members:
            position = len(seen)
            name, tensor = member if isinstance(member, tuple) else (f"tensor {position}", member)
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"expected tensors or (name, tensor) pairs, got {type(tensor).__name__} as {name}"
                )
            if id(tensor) in seen:
                raise ValueError(f"expected every tensor once, got {name} twice")
            seen.add(id(tensor))
            if numbers is not None and id(tensor) not in numbers:
                raise ValueError(f"expected parameters of the model, got {name}, which is none of them")
            if manifest is not None and numbers is not None:
                name = manifest.names[numbers[id(tensor)]]
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter):
                tuned.append(member)
                group_names.append(name)
                group_streams.append(position if numbers is None else numbers[id(tensor)])
        groups.append({**options, "params": tuned})
        streams.append(group_streams)
        names.append(group_names)
    if not any(streams):
        raise ValueError(
            f"expected at least one tensor to tune, got {len(seen)}, all of them frozen (requires_grad=False)"
            if seen
            else "expected at least one tensor to tune, got none"
        )
    return TunedParameters(groups, streams, names, manifest)


def _opened(
    group: Any, check_options: Callable[[dict[str, Any]], None]
) -> tuple[list[_Member], dict[str, Any]]:
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"expected groups that are all dicts with 'params', got {type(group).__name__}")
    options = {key: value for key, value in group.items() if key != "params"}
    check_options(options)
    members = group["params"]
    return ([members] if isinstance(members, torch.Tensor) else list(members)), options


def _numbers(model: nn.Module) -> tuple[Manifest, dict[int, int]]:
    """The manifest, and the stream of each of the model's parameters by identity."""
    manifest, parameters = Manifest.of(model), manifest_parameters(model)
    for (name, parameter), shape in zip(parameters, manifest.shapes, strict=True):
        if tuple(parameter.shape) != shape:
            raise ValueError(
                f"expected whole parameters, got shape {tuple(parameter.shape)} of {name} {shape}; "
                "sharded models are not supported here"
            )
    return manifest, {id(parameter): stream for stream, (_, parameter) in enumerate(parameters)}


def _tensor(member: _Member) -> torch.Tensor:
    return member[1] if isinstance(member, tuple) else member  # type: ignore[no-any-return]
