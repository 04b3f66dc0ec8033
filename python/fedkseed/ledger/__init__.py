"""A fine-tuned model as a file of K coefficients, and how it becomes a model again."""

from __future__ import annotations

from fedkseed.ledger.adapter_start import start_adapter
from fedkseed.ledger.format import (
    LedgerContractError,
    LedgerDamagedError,
    LedgerError,
    LedgerFormatError,
    LedgerSignatureError,
    LedgerTooLargeError,
    LedgerUnsignedError,
)
from fedkseed.ledger.ledger import Ledger, open_ledger
from fedkseed.ledger.origin import AdapterStart, Origin, OriginError
from fedkseed.ledger.published import Published, PublishedError
from fedkseed.ledger.signature import SigningKeyError
from fedkseed.ledger.tuned_model import load, write_tuned_model

__all__ = [
    "AdapterStart",
    "Ledger",
    "LedgerContractError",
    "LedgerDamagedError",
    "LedgerError",
    "LedgerFormatError",
    "LedgerSignatureError",
    "LedgerTooLargeError",
    "LedgerUnsignedError",
    "Origin",
    "OriginError",
    "Published",
    "PublishedError",
    "SigningKeyError",
    "load",
    "open_ledger",
    "start_adapter",
    "write_tuned_model",
]
