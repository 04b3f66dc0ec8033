"""Where a run computes: the device of its model, chosen by a text, and one device a worker process."""

from __future__ import annotations

import logging

import torch

import fedkseed_kernels
from fedkseed._checks import check_count

logger = logging.getLogger("fedkseed")

#: Forms of the text that `choose_device` takes, for a flag's help.
DEVICE_FORMS = "auto, cpu, cuda or cuda:N"


class DeviceError(ValueError):
    """A device that is not there, or that the kernels do not serve; says what torch reports."""


def choose_device(text: str) -> torch.device:
    """The device that a text names.

    Args:
        text: "cpu"; "cuda", torch's current GPU; "cuda:N", the GPU with that number; or "auto", torch's
            current GPU where there is one that the kernels serve, else the processor, which is said in one
            line of the log.

    Returns:
        With its number, if a GPU.

    Raises:
        DeviceError: another text, or a GPU that cannot be used; one line.
    """
    if text == "auto":
        return _automatic()
    kind, separator, number = text.partition(":")
    if text == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (separator and not (number.isascii() and number.isdecimal())):
        raise DeviceError(f"expected a device, {DEVICE_FORMS}, got {text!r}")
    if (reason := _no_gpu()) is not None:
        raise DeviceError(f"expected a GPU for {text}, got none: {reason}; use cpu")
    count = torch.cuda.device_count()
    index = int(number) if separator else torch.cuda.current_device()
    if index >= count:
        raise DeviceError(
            f"expected a GPU that torch sees for {text}, got {count} "
            f"({', '.join(f'cuda:{i}' for i in range(count))}); CUDA_VISIBLE_DEVICES decides which those are"
        )
    device = torch.device("cuda", index)
    if (reason := _unserved(device)) is not None:
        raise DeviceError(f"expected kernels that serve {device}, got none: {reason}; use cpu")
    return device


def worker_devices(device: torch.device, num_workers: int) -> list[torch.device]:
    """The device of each worker process, the run's own first: a GPU each, or all on the processor.

    Raises:
        DeviceError: more workers than GPUs.
        TypeError, ValueError: a number of workers below 1.
    """
    check_count("num_workers", num_workers, 1, 2**15)
    if device.type != "cuda":
        return [device] * num_workers
    count = torch.cuda.device_count()
    if num_workers > count:
        raise DeviceError(
            f"expected at most {count} workers, one for each GPU that torch sees, got {num_workers}; two on "
            "one GPU would wait for each other: use fewer workers, or the device cpu"
        )
    first = torch.cuda.current_device() if device.index is None else device.index
    return [torch.device("cuda", (first + number) % count) for number in range(num_workers)]


def device_name(device: torch.device) -> str:
    """The device for a person: "cuda:0 (NVIDIA H200)", "cpu"."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _automatic() -> torch.device:
    if (reason := _no_gpu()) is not None:
        logger.info('device="auto" is cpu: %s', reason)
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := _unserved(device)) is not None:
        logger.warning('device="auto" is cpu and not %s, which the kernels do not serve: %s', device, reason)
        return torch.device("cpu")
    logger.info('device="auto" is %s', device_name(device))
    return device


def _no_gpu() -> str | None:
    """Why torch can use no GPU, in one line; None if it can."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return f"torch reports: {(str(error).splitlines() or [type(error).__name__])[0].rstrip('.')}"
    return "torch sees no GPU"


def _unserved(device: torch.device) -> str | None:
    """Why no backend of the kernels can serve a GPU; None if one can."""
    names = fedkseed_kernels.info()["devices"]["cuda"]
    reasons = {name: fedkseed_kernels.unavailable(name, device) for name in names}
    if None in reasons.values():
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
