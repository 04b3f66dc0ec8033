"""A tuned model that is asked: a model's folder, or a run's or a published ledger, applied in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedkseed.data.asking import Asking, AskingError
from fedkseed.data.built_in_models import model_source
from fedkseed.data.classification import (
    Classifier,
    LabelledTokens,
    Verbalizer,
    check_mask,
    mask_token_id,
    score_rows,
)
from fedkseed.data.models import ModelError, load_any, num_embeddings
from fedkseed.data.prompts import pad_token_id
from fedkseed.data.scores import generate_greedy
from fedkseed.data.shapes import num_positions
from fedkseed.data.templates import PLAIN, Template
from fedkseed.documents import DocumentError, read_json
from fedkseed.ledger import origin as origin_file
from fedkseed.ledger.ledger import Ledger
from fedkseed.ledger.published import Published, dtype_of
from fedkseed.ledger.sources import is_hub_id, open_source
from fedkseed.ledger.tuned_model import find_asking
from fedkseed.scenarios.classification import check_speaks
from fedkseed.simulation.run_folder import BASELINE, BEST, LEDGER, SETTINGS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The config of a model's folder.
_CONFIG = "config.json"


@dataclass(frozen=True)
class Answer:
    """What a model says to one text.

    Attributes:
        text: what was asked.
        answer: the continuation, or the likeliest label.
        probabilities: of the labels, the likeliest first; empty if it is no classification.
    """

    text: str
    answer: str
    probabilities: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TunedModel:
    """A model ready to be asked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    asking: Asking

    def answer(
        self,
        texts: Sequence[str],
        context: str = "",
        given: Mapping[str, str] | None = None,
        *,
        max_new_tokens: int = 64,
    ) -> list[Answer]:
        """Answers in the order of the texts: greedy, or the labels' probabilities.

        Args:
            texts: at least one.
            context: beside each of them; may be empty.
            given: other fields of the template by name.
            max_new_tokens: of an answer that is no label.

        Raises:
            AskingError: a text that does not fit the template or the model, or a model that writes nothing.
            DataError: no chat template where one is asked for, or words that are not one token each.
        """
        labels = self._labels()
        room = 0 if labels else max_new_tokens
        if max_new_tokens < 1:
            raise AskingError(f"expected --max-new-tokens of at least 1, got {max_new_tokens}")
        prompts = [self._encode(self.asking.fields(text, context, given), room) for text in texts]
        if labels:
            return self._classified(texts, prompts, labels)
        if not self.model.can_generate():
            raise AskingError(
                f"expected a model that writes text, got {type(self.model).__name__}; ask one that was tuned "
                "for a classification, or a causal language model"
            )
        answers = generate_greedy(self.model, self.tokenizer, prompts, max_new_tokens=max_new_tokens)
        return [Answer(text, answer) for text, answer in zip(texts, answers, strict=True)]

    def _has_head(self) -> bool:
        return type(self.model).__name__.endswith("ForSequenceClassification")

    def _labels(self) -> tuple[str, ...]:
        """Labels of a classifier without any are those of its config."""
        if self.asking.labels or not self._has_head():
            return self.asking.labels
        names: Any = self.model.config.id2label or {}
        return tuple(str(names[index]) for index in sorted(names))

    def _encode(self, fields: Mapping[str, str], room: int) -> list[int]:
        try:
            prompt = self.asking.template.prompt(self.tokenizer, fields)
            ids = self.tokenizer(
                prompt, add_special_tokens=self.asking.template.adds_special_tokens
            ).input_ids
        except UnicodeError as error:
            raise AskingError(f"expected text in UTF-8, got other bytes: {error}") from error
        size, positions = num_embeddings(self.model), num_positions(self.model)
        if not ids:
            raise AskingError("expected a text of at least one token, got none")
        if max(ids) >= size:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise AskingError(
                f"expected tokens that the model knows, got {token!r}; leave it out of the text"
            )
        if positions is not None and len(ids) + room > positions:
            answer = f" and {room} of --max-new-tokens" if room else ""
            raise AskingError(
                f"expected at most {positions:,} tokens, the model's positions, got {len(ids):,} of the "
                f"prompt{answer}; ask a shorter text"
            )
        return [int(index) for index in ids]

    def _classified(
        self, texts: Sequence[str], prompts: Sequence[Sequence[int]], labels: Sequence[str]
    ) -> list[Answer]:
        words = self.asking.words
        if bool(words) == self._has_head():
            wanted = "a language model for words" if words else "a classifier for labels without words"
            raise AskingError(
                f"expected {wanted}, got {type(self.model).__name__}; the file beside it is of another model"
            )
        verbalizer = None
        if words:
            check_speaks(self.model, self.asking.template)
            verbalizer = Verbalizer.of(self.tokenizer, dict(zip(labels, words, strict=True)))
        pad_id = pad_token_id(self.tokenizer)
        mask_id = mask_token_id(self.tokenizer, self.asking.template)
        for text, prompt in zip(texts, prompts, strict=True):
            check_mask(prompt, mask_id, text)
        logits = score_rows(
            Classifier(len(labels), verbalizer, pad_id, mask_id),
            self.model,
            [LabelledTokens(tuple(prompt), 0) for prompt in prompts],
            pad_id,
            device=next(self.model.parameters()).device,
        )
        answers = []
        for text, row in zip(texts, logits.double().softmax(dim=1).tolist(), strict=True):
            ranked = dict(sorted(zip(labels, row, strict=True), key=lambda pair: -pair[1]))
            answers.append(Answer(text, next(iter(ranked)), ranked))
        return answers


def open_tuned(
    folder: Path,
    *,
    template: Template | None = None,
    best: bool = False,
    base: str = "",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> TunedModel:
    """The model of a folder, on a device.

    Args:
        folder: of a model (what `fedkseed apply` or ``save_pretrained`` wrote), of a run, or of a published
            ledger; of such a one the hub id will do.
        template: in place of the one that the model was tuned with; without either it is the tokenizer's own
            chat template, or none.
        best: of a run, the round with the least held-out loss, not the last one.
        base: of a run, its base model; else the one that its settings name. Of a published ledger likewise,
            and its card.
        device: where it answers.
        trust_remote_code: whether code that lies beside the weights may run; never asked.
        say: told what is being done, a line each.

    Raises:
        AskingError: a folder that is none of them, or a damaged file of templates.
        PublishedError, OriginError: a published ledger whose files do not belong together.
        ModelError, LedgerError, IdentityError, FetchError, MissingExtraError, OSError: no model can be had.
    """
    is_model = (folder / _CONFIG).is_file()  # a Trainer's run has its ledger beside it
    is_run = (folder / SETTINGS).is_file() and not is_model
    is_published = not (is_run or is_model) and (
        (folder / origin_file.FILE).is_file() or is_hub_id(str(folder))
    )
    if not is_run and (best or (base and not is_published)):
        raise AskingError(f"expected a run's folder with --best or --base, got {folder}, which is none")
    if is_run:
        model, tokenizer, asking = _of_run(folder, best, base, trust_remote_code, say)
    elif is_published:
        published = open_source(str(folder))
        assert isinstance(published, Published)
        asking = published.asking
        say("Loading and verifying the base model, adding the ledger")
        model, tokenizer = published.load_with_tokenizer(base or None, trust_remote_code=trust_remote_code)
    elif is_model:
        say("Loading the model")
        asking = Asking.read(folder)
        model, tokenizer = load_any(folder, _saved_dtype(folder), trust_remote_code=trust_remote_code)
    else:
        found = "nothing there" if not folder.exists() else "another folder" if folder.is_dir() else "a file"
        raise AskingError(
            f"expected a model's folder ({_CONFIG}), a run's ({SETTINGS}, {LEDGER}) or that of a published "
            f"ledger ({origin_file.FILE}) at {folder}, got {found}"
        )
    if asking is None:
        asking = Asking.of_tokenizer(tokenizer)
        if type(model).__name__.endswith("ForSequenceClassification"):
            asking = Asking(Template.named(PLAIN))
    if template is not None:
        asking = Asking(template, asking.labels, asking.words)
    model.to(torch.device(device))  # type: ignore[arg-type]
    return TunedModel(model, tokenizer, asking)


def _of_run(
    folder: Path, best: bool, base: str, trust_remote_code: bool, say: Callable[[str], None]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Asking | None]:
    path = folder / (BEST if best else LEDGER)
    if not path.is_file():
        is_other = (folder / BASELINE).exists()
        reason = (
            f"a run of another method has none; {BASELINE} has its tuned tensors by name, for load_state_dict"
            if is_other
            else "no round of it is complete"
        )
        raise AskingError(f"expected a run with {path.name}, got none in {folder}: {reason}")
    ledger = Ledger.load(path)
    asking = find_asking(ledger, folder)
    say("Loading and verifying the base model, adding the ledger")
    named = base or _base(folder / SETTINGS)
    try:
        source = model_source(named)
        model, tokenizer = load_any(source, dtype_of(ledger), trust_remote_code=trust_remote_code)
    except ModelError as error:
        if base:
            raise
        raise ModelError(f"{error}; the run's settings name this base, --base names another place") from error
    ledger.apply_(model)
    return model, tokenizer, asking


def _base(settings: Path) -> str:
    """The base model that a run's settings name; "" if they name none."""
    try:
        found = read_json(settings)
    except DocumentError as error:
        raise AskingError(str(error)) from error
    name = found.get("model", "") if isinstance(found, dict) else None
    if not isinstance(name, str):
        raise AskingError(f'expected the base model under "model" in {settings}, got {str(name)[:80]}')
    return name


def _saved_dtype(folder: Path) -> torch.dtype:
    """The dtype that a folder's weights were saved in, as its config says; fp32 if it says nothing."""
    try:
        found = read_json(folder / _CONFIG)
    except DocumentError as error:
        raise AskingError(str(error)) from error
    name = found.get("dtype", found.get("torch_dtype")) if isinstance(found, dict) else None
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return dtypes.get(name, torch.float32) if isinstance(name, str) else torch.float32
