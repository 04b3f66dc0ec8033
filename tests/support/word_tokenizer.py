"""A tokenizer whose tokens are words with the space before them, as those of many language models."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_WORDS = r" ?[A-Za-z]+|."


def make_word_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly ``size`` tokens that knows all words and characters of the texts."""
    found = dict.fromkeys(["<unk>", "<s>", "</s>", *map(chr, range(10, 127))])
    for text in texts:
        found.update(dict.fromkeys(re.findall(_WORDS, text, re.DOTALL)))
    assert len(found) <= size, f"{len(found)} tokens"
    vocabulary = {token: index for index, token in enumerate(found)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
