"""What a ledger says about itself, as text to read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedkseed._extras import MissingExtraError
from fedkseed.ledger.card import CARD
from fedkseed.ledger.format import LEDGER_FORMAT
from fedkseed.ledger.ledger import Ledger
from fedkseed.ledger.origin import FILE
from fedkseed.ledger.published import Published
from fedkseed.ledger.signature import PublicKey
from fedkseed.ledger.sources import open_source

_NUM_LARGEST = 5


def describe(ledger: Ledger | str | os.PathLike[str], *, public_key: PublicKey | None = None) -> str:
    """The fields of a ledger, or of the file of one, a line each; the model is not needed.

    Of a published one (its folder, or a hub id) also what its card says; its files are compared with it.

    The norm is ||c||_2: as z has unit variance, a tuned weight has moved by about as much (root mean square).

    Args:
        public_key: if given, the ledger has to be signed by this key.

    Raises:
        LedgerError, SigningKeyError, MissingExtraError, OSError: as `open_source`.
    """
    opened = open_source(ledger, public_key)
    where = [] if isinstance(ledger, Ledger) else [("file", str(Path(ledger)))]
    if isinstance(opened, Published):
        where, ledger = _card(opened), opened.ledger
    else:
        ledger = opened
    coefficients = ledger.coefficients.astype(np.float64)
    lines = [
        *where,
        ("size", f"{len(ledger.to_bytes()):,} bytes"),
        ("versions", f"ledger format {LEDGER_FORMAT}, noise contract {ledger.contract_version}"),
        ("noise", f"{ledger.family}, base seed {ledger.base_seed}, K = {ledger.num_seeds} candidate seeds"),
        (
            "coefficients",
            f"{np.count_nonzero(coefficients)} not zero, norm {np.linalg.norm(coefficients):.6g}",
        ),
        ("largest", _largest(coefficients)),
        ("base weights", f"{ledger.identity.dtype}, content {ledger.identity.content.hex()}"),
        ("structure", ledger.identity.structure.hex()),
        ("frozen", _ranges(ledger.frozen)),
        *((f"note {name}", text) for name, text in sorted(ledger.notes.items())),
        ("signature", _signature(ledger, public_key is not None)),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _card(published: Published) -> list[tuple[str, str]]:
    """What the card of a published ledger says."""
    origin, hashes = published.origin, published.hashes
    data = [origin.data or "not said", *([f"rows {origin.data_digest}"] if origin.data_digest else [])]
    sizes = {name: (published.folder / name).stat().st_size for name in sorted({CARD, FILE, *hashes.files})}
    facts = ", ".join(f"{name} {value}" for name, value in origin.facts.items())
    lines = [
        ("published", published.name),
        ("files", ", ".join(f"{name} {size:,}" for name, size in sizes.items()) + " bytes, as the card says"),
        ("base", f"{origin.base} ({origin.source}), revision {origin.revision_text}"),
        ("licence", f"of the base: {origin.license or 'not known'}"),
        ("data", ", ".join(data)),
        ("made by", facts or "not said"),
        ("tuned weights", f"content {hashes.tuned}"),
    ]
    if origin.adapter is not None:
        seed = origin.adapter.seed
        start = "stored beside it" if seed is None else f"made of seed {seed}"
        lines.append(("adapter", f"LoRA beside weights in {origin.adapter.base_dtype}, its start {start}"))
    return lines


def _largest(coefficients: NDArray[np.float64]) -> str:
    order = np.argsort(-np.abs(coefficients), kind="stable")[:_NUM_LARGEST]
    texts = [f"c[{index}] = {coefficients[index]:.6g}" for index in order if coefficients[index] != 0]
    return ", ".join(texts) or "none"


def _ranges(indices: Sequence[int]) -> str:
    """The indices with runs drawn together: "parameters 0-3, 7 (5 in all)"."""
    if not indices:
        return "none"
    runs = np.split(np.asarray(indices), np.flatnonzero(np.diff(indices) != 1) + 1)
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"parameters {', '.join(parts)} ({len(indices)} in all)"


def _signature(ledger: Ledger, is_checked: bool) -> str:
    if ledger.signature is None:
        return "none"
    key = ledger.signature.public_key.hex()
    if is_checked:
        return f"by {key}, checked, and the key asked for"
    try:
        state = "checked" if ledger.is_signed_by_its_key() else "BROKEN: not of this ledger"
    except MissingExtraError as error:
        state = f"not checked: {error}"
    return f"by {key} (whose key that is, nothing here says), {state}"
