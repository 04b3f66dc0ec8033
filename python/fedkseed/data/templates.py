"""Templates: texts with placeholders, which make the prompt of a row's fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Template:
    """A text with placeholders such as ``{text}``, or the chat template of the model's tokenizer.

    Attributes:
        name: of a template that comes with the package, or "custom".
        text: with placeholders; of "chat", empty.
    """

    name: str
    text: str

    def prompt(self, tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, str]) -> str:
        """The text that the model continues."""
        raise NotImplementedError

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer puts its own special tokens (a leading BOS, say) around the prompt."""
        return self.name != "chat"
