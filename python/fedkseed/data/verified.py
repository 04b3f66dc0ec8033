"""Model folders of the cache, verified: weights against a pinned hash, other files against hashes noted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from pathlib import Path

import torch

from fedkseed._extras import require_extra
from fedkseed.data.fetch import sha256_of
from fedkseed.files import read_bounded, write_atomically

#: In such a folder: SHA-256 of each other file, by name.
NOTED = "sha256.json"
_WEIGHTS = "model.safetensors"
_MAX_NOTED = 1 << 16


def content_of(folder: Path) -> str:
    """SHA-256 (hex) over a folder's weights: for each its name, dtype, shape and elements, by name.

    Raises:
        SafetensorError, OSError: the file of the weights is damaged, or is not there.
        MissingExtraError: safetensors is not installed.
    """
    require_extra("hf", "safetensors")
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(folder / _WEIGHTS, framework="pt") as weights:
        for name in sorted(weights.keys()):
            weight = weights.get_tensor(name)
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_whole(folder: Path, content: str) -> bool:
    """Whether the folder is there as it was made; one that was changed is named on stderr and moved aside.

    Raises:
        MissingExtraError: safetensors is not installed.
        OSError: it cannot be moved.
    """
    if not folder.is_dir():
        return False
    change = find_change(folder, content)
    if change is None:
        return True
    moved = move_aside(folder)
    kept = f"; it is kept as {moved.name}, delete it if it is not yours" if moved else ""
    print(f"{folder} is not the model as it was converted: {change}{kept}", file=sys.stderr)
    return False


def note_hashes(folder: Path) -> None:
    """Writes `NOTED`: the hashes of all files but the weights.

    Raises:
        OSError: the folder cannot be written.
    """
    write_atomically(folder / NOTED, (json.dumps(_hashes(folder), indent=2) + "\n").encode())


def find_change(folder: Path, content: str) -> str | None:
    """What is not as it was, in words; None if the weights have this content and all else is as noted.

    A folder without `NOTED`, as earlier versions made it, gets it if it can be written.

    Raises:
        MissingExtraError: safetensors is not installed.
    """
    require_extra("hf", "safetensors")
    from safetensors import SafetensorError

    try:
        found = content_of(folder)
    except (OSError, SafetensorError) as error:
        return f"{_WEIGHTS} cannot be read ({str(error).splitlines()[0]})"
    if found != content:
        return f"the weights have content {found[:16]}, expected {content[:16]}"
    if not (folder / NOTED).exists():
        with contextlib.suppress(OSError):  # a cache that may only be read
            note_hashes(folder)
        return None
    try:
        noted = json.loads(read_bounded(folder / NOTED, _MAX_NOTED))
        present = _hashes(folder)
    except (OSError, ValueError, RecursionError) as error:
        return f"{NOTED} cannot be read ({error})"
    if not isinstance(noted, dict):
        return f"{NOTED} holds no table of hashes"
    changed = sorted(name for name in noted.keys() | present if noted.get(name) != present.get(name))
    return f"changed since it was made: {', '.join(changed)}" if changed else None


def move_aside(folder: Path) -> Path | None:
    """The folder's new name beside the old one; None if another process has moved it."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.changed-{number}")).exists():
        number += 1
    try:
        return folder.rename(target)
    except FileNotFoundError:
        return None


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by name; of the weights the content is known, and what is hidden is not ours."""
    apart = (_WEIGHTS, NOTED)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in apart)
    return {name: sha256_of(folder / name) for name in names if not name.startswith(".")}
