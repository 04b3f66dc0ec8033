"""Where the model of a run comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedkseed.data.built_in_models import DEFAULT_MODEL, MINILM, model_source
from fedkseed.data.federated import FederatedData
from fedkseed.data.models import load_causal_lm, load_classifier, load_tokenizer
from fedkseed.data.shapes import load_shapes
from fedkseed.scenarios.settings import RunSettings, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelSource:
    """Folder or hub id of a run's model, and how it is loaded from there.

    Attributes:
        settings: of the run.
        is_classifier: whether it has a classifier's head.
    """

    settings: RunSettings
    is_classifier: bool

    @classmethod
    def of(cls, settings: RunSettings, data: FederatedData | None) -> ModelSource:
        """The model that suits the data.

        Raises:
            SettingsError: a classification by a head, and no model that has one.
        """
        is_classifier = data is not None and data.kind == "classification" and not data.words
        if is_classifier and not settings.model:
            raise SettingsError(
                f"expected --model with --classify head, got none: {DEFAULT_MODEL}, the default, has no "
                f"classifier's head; name one that has, {MINILM} for two labels, say"
            )
        return cls(settings, is_classifier)

    @property
    def name(self) -> str | Path:
        """Folder or hub id; a built-in model's folder is made if it is not there."""
        return model_source(self.settings.model)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model with its weights, on the processor."""
        load = load_classifier if self.is_classifier else load_causal_lm
        return load(self.name, self.settings.torch_dtype, trust_remote_code=self.settings.trust_remote_code)

    def load_shapes(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model without its weights."""
        trusted = self.settings.trust_remote_code
        model = load_shapes(
            self.name, self.settings.torch_dtype, is_classifier=self.is_classifier, trust_remote_code=trusted
        )
        return model, load_tokenizer(self.name, trust_remote_code=trusted)
