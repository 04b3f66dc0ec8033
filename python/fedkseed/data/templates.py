"""Templates: texts with placeholders, which make the prompt of a row's fields.

``fedkseed-ni`` and ``fedkseed-dolly`` are the texts of the paper's experiments, character for character, from
github.com/zhenqincn/FedKSeed at commit ebf8216 (Apache-2.0): utils_data/natural_instruction_loader and
utils_data/llm_dataset.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fedkseed.data.errors import DataError, choose_from

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUSTOM = "custom"
CHAT = "chat"
PLAIN = "plain"
ALPACA = "alpaca"
NATURAL_INSTRUCTIONS = "fedkseed-ni"
DOLLY = "fedkseed-dolly"

#: Placeholders of the templates that come with the package: what is asked, and a context that may be empty.
INSTRUCTION, INPUT = "instruction", "input"

#: In the text of a template of one's own: the mask token of the tokenizer, however that spells it.
MASK = "[MASK]"

MAX_TEMPLATE_BYTES = 1 << 16

_WITH_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
)
_WITHOUT_CONTEXT = "Below is an instruction that describes a task. "
_COMPLETE = "Write a response that appropriately completes the request.\n\n"
_RESPOND = "Write a response for the task request.\n\n"
_PARTS_WITH = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
_PARTS_WITHOUT = "### Instruction:\n{instruction}\n\n### Response:"

_TEXTS = {
    PLAIN: "{instruction}\n{input}\n",
    ALPACA: f"{_WITH_CONTEXT}{_COMPLETE}{_PARTS_WITH}\n",
    CHAT: "",
    NATURAL_INSTRUCTIONS: f"{_WITH_CONTEXT}{_COMPLETE}{_PARTS_WITH}",
    DOLLY: f"{_WITH_CONTEXT}{_RESPOND}{_PARTS_WITH}",
}
#: What stands in a text's place for a row without a context.
_TEXTS_WITHOUT = {
    ALPACA: f"{_WITHOUT_CONTEXT}{_COMPLETE}{_PARTS_WITHOUT}\n",
    DOLLY: f"{_WITHOUT_CONTEXT}{_RESPOND}{_PARTS_WITHOUT}",
}
TEMPLATE_NAMES = tuple(_TEXTS)


@dataclass(frozen=True)
class Template:
    """A text with placeholders such as ``{text}``, or the chat template of the model's tokenizer.

    A placeholder is the name of a field and nothing else: no attribute, index, conversion or format. ``{{``
    and ``}}`` stand for braces.

    Attributes:
        name: of a template that comes with the package, or "custom".
        text: with placeholders; of "chat", empty.

    Raises:
        DataError: an unknown name, another text under a name of the package, a text without a placeholder, a
            brace without its other one, or a placeholder that is more than a name.
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        if self.name == CUSTOM:
            if not self.placeholders():
                raise DataError(
                    f"expected a template with a placeholder such as {{text}}, got {self.text[:80]!r}; "
                    "without one every row has the same prompt"
                )
        elif self.name not in _TEXTS:
            raise DataError(choose_from("a template's name", self.name, (*TEMPLATE_NAMES, CUSTOM)))
        elif self.text != _TEXTS[self.name]:
            raise DataError(
                f"expected the package's own text of the template {self.name}, got {self.text[:80]!r}; "
                f"name it {CUSTOM}"
            )

    @classmethod
    def named(cls, name: str) -> Template:
        """A template that comes with the package.

        Raises:
            DataError: none of that name.
        """
        if name not in _TEXTS:
            raise DataError(choose_from("a template", name, TEMPLATE_NAMES))
        return cls(name, _TEXTS[name])

    @classmethod
    def of(cls, setting: str) -> Template:
        """The template that a setting names, or writes out: a text with braces, ``\\n`` in it a newline.

        Raises:
            DataError: see `named` and the class.
        """
        if "{" in setting or "}" in setting:
            return cls.custom(setting.replace("\\n", "\n"))
        return cls.named(setting)

    @classmethod
    def custom(cls, text: str) -> Template:
        """A template of one's own.

        Raises:
            DataError: see the class.
        """
        return cls(CUSTOM, text)

    def placeholders(self) -> tuple[str, ...]:
        """The fields that a prompt is made of, each once, in their order in the text."""
        if self.name == CHAT:
            return (INSTRUCTION, INPUT)
        return tuple(dict.fromkeys(name for _, name in self._parts if name is not None))

    def check_fields(self, fields: Collection[str]) -> None:
        """Checks that every placeholder is one of ``fields``.

        Raises:
            DataError: one is not; names it and the nearest field.
        """
        for name in self.placeholders():
            if name not in fields:
                raise DataError(f"template {self.name}: {choose_from('a placeholder', name, fields)}")

    def prompt(self, tokenizer: PreTrainedTokenizerBase | None, fields: Mapping[str, str]) -> str:
        """The text that the model continues.

        "plain" is the instruction and the input, a line each, and nothing else: the fewest tokens. "alpaca"
        is the field's template. "chat" is the tokenizer's own (instruction as system message and input as
        user message, or the instruction as user message if the input is empty).

        Args:
            tokenizer: asked by "chat", and by `MASK` for its mask token; others take None.
            fields: at least those of `placeholders`; ``input`` of the package's templates may be missing or
                empty.

        Raises:
            DataError: a field is missing, or "chat" with a tokenizer that has no chat template.
        """
        if self.name != CUSTOM:
            fields = {INPUT: "", **fields}
        self.check_fields(fields)
        if self.name == CHAT:
            return _chat(tokenizer, fields)
        if self.name == PLAIN:
            return "".join(f"{fields[name]}\n" for name in (INSTRUCTION, INPUT) if fields[name])
        without = _TEXTS_WITHOUT.get(self.name)
        parts = _split(without) if without is not None and not fields[INPUT] else self._parts
        mask = getattr(tokenizer, "mask_token", None) or MASK
        return "".join(
            text.replace(MASK, mask) + ("" if name is None else fields[name]) for text, name in parts
        )

    @property
    def needs_tokenizer(self) -> bool:
        """Whether `prompt` cannot do without a tokenizer."""
        return self.name == CHAT

    @property
    def num_masks(self) -> int:
        """How often `MASK` stands in the text."""
        return sum(text.count(MASK) for text, _ in self._parts)

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer puts its own special tokens (a leading BOS, say) around the prompt."""
        return self.name != CHAT

    @cached_property
    def literals(self) -> str:
        """The text without its placeholders and `MASK`, a space in the place of each."""
        return "".join(text + ("" if name is None else " ") for text, name in self._parts).replace(MASK, " ")

    @cached_property
    def _parts(self) -> tuple[tuple[str, str | None], ...]:
        return _split(self.text)


def read_template(path: Path) -> Template:
    """The template of a text file: UTF-8, one newline at its end (editors add it) left out.

    Raises:
        DataError: the file cannot be read, is longer than `MAX_TEMPLATE_BYTES`, is not UTF-8, or see
            `Template`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise DataError(f"expected a template file, got: {error}") from error
    if len(data) > MAX_TEMPLATE_BYTES:
        raise DataError(f"{path.name}: expected a template of at most {MAX_TEMPLATE_BYTES} bytes, got more")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: expected UTF-8, got other bytes at offset {error.start}") from error
    try:
        return Template.custom(text.removesuffix("\n"))
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from error


def _split(text: str) -> tuple[tuple[str, str | None], ...]:
    """Pieces of literal text, each with the name of the placeholder behind it (None behind the last)."""
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise DataError(
            f"expected a template whose braces stand in pairs, got {text[:80]!r} ({error}); "
            "a brace of the text itself is written twice: {{ or }}"
        ) from error
    for _, name, form, conversion in pieces:
        if name is not None and (not name or form or conversion or set(name) & set(".[]{}")):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise DataError(
                f"expected the name of a field alone in a placeholder, got {{{shown[:80]}}}; "
                "attributes, indices, conversions and formats are not taken"
            )
    return tuple((literal, name) for literal, name, _, _ in pieces)


def _chat(tokenizer: PreTrainedTokenizerBase | None, fields: Mapping[str, str]) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        raise DataError("expected a tokenizer with a chat template, got one without; use the template alpaca")
    if fields[INPUT]:
        messages = [
            {"role": "system", "content": fields[INSTRUCTION]},
            {"role": "user", "content": fields[INPUT]},
        ]
    else:
        messages = [{"role": "user", "content": fields[INSTRUCTION]}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
