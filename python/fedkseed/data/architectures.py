"""Classes that model folders are loaded as, by what their config.json says; no code of a folder runs here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fedkseed._extras import require_extra

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: What a model is for; "causal" and "masked" language models are tuned on text, "classifier" on labels.
Family = Literal["causal", "masked", "classifier"]

_FAMILIES: dict[Family, tuple[str, str, str]] = {
    "causal": ("a causal language model", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "masked": ("a masked language model", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "classifier": (
        "a sequence classifier",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "AutoModelForSequenceClassification",
    ),
}


class ModelError(ValueError):
    """A model cannot be loaded from what was named."""


def choose_class(
    source: str | Path,
    local: bool,
    families: Sequence[Family],
    trust_remote_code: bool,
    revision: str = "main",
) -> tuple[Any, PreTrainedConfig]:
    """The auto class of transformers whose ``from_pretrained`` loads the model, and the model's config.

    It gives the class that config.json names under "architectures" if that is of one of the ``families``. A
    bare or unknown one is loaded as the first family's class for its "model_type".

    Args:
        source: a folder, or a hub id.
        local: whether it is a folder.
        families: that are served, the preferred one first.
        trust_remote_code: whether code that lies beside the weights may run.
        revision: of a hub id.

    Raises:
        ModelError: code of its own that is not trusted, a model of another kind, or one that transformers
            does not know. What the library raises about damaged files passes through.
    """
    require_extra("hf", "transformers")
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    entries, _ = PreTrainedConfig.get_config_dict(source, local_files_only=local, revision=revision)
    model_type = entries.get("model_type")
    tokenizer = get_tokenizer_config(source, local_files_only=local, revision=revision)
    files = {"config.json": entries, "tokenizer_config.json": tokenizer}
    own = [name for name, content in files.items() if "auto_map" in content]
    if own and not trust_remote_code:
        known = f"; or take auto_map out to use transformers' own {model_type}" * (
            model_type in CONFIG_MAPPING
        )
        raise ModelError(
            f"expected a model that transformers has the code of, got code of its own ({', '.join(own)}: "
            f"auto_map); read that code, then pass --trust-remote-code (trust_remote_code=True){known}"
        )
    if not own and model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"expected a model type that transformers {transformers.__version__} knows, got {model_type!r} "
            "in config.json; install a release of transformers that has it, or name another model"
        )
    config = AutoConfig.from_pretrained(
        source, local_files_only=local, trust_remote_code=trust_remote_code, revision=revision
    )
    if own and isinstance(entries.get("auto_map"), Mapping):
        for family in families:
            if (auto := _FAMILIES[family][2]) in entries["auto_map"]:
                return getattr(transformers, auto), config
    (named, *_) = entries.get("architectures") or [None]
    is_known = isinstance(named, str) and hasattr(transformers, named)
    return getattr(transformers, _auto_class(named, is_known, config, families, modeling_auto)), config


def is_masked(model: torch.nn.Module) -> bool:
    """Whether a model of transformers is a masked language model: it fills in tokens and does not write."""
    require_extra("hf", "transformers")
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, _FAMILIES["masked"][1]).values()
    generates = getattr(model, "can_generate", None)
    return type(model).__name__ in names and not (generates is not None and generates())


def _auto_class(
    named: Any, is_known: bool, config: PreTrainedConfig, families: Sequence[Family], mappings: Any
) -> str:
    """The auto class of the family that the name is of, or of the first family that has this config.

    Args:
        named: the class in config.json, if it is one.
        is_known: whether transformers has it.
        config: of the model.
        families: that are served.
        mappings: the library's tables of classes by model type.
    """
    names = {family: getattr(mappings, _FAMILIES[family][1]) for family in _FAMILIES}
    family = next((family for family in _FAMILIES if named in names[family].values()), None)
    *firsts, last = (_FAMILIES[wanted][0] for wanted in families)
    served = f"{', '.join(firsts)} or {last}" if firsts else last
    if config.is_encoder_decoder and family != "causal":
        raise ModelError(
            f"expected {served}, got an encoder-decoder ({named or config.model_type}); such models are not "
            "served, name a decoder or an encoder"
        )
    if family is not None and family in families:
        # Of a family, a model type has one class.
        if config.model_type in names[family]:
            return _FAMILIES[family][2]
    elif family is not None:
        head = (
            ", or give this one a head: AutoModelForSequenceClassification"
            ".from_pretrained(MODEL, num_labels=N).save_pretrained(FOLDER)"
        )
        raise ModelError(
            f"expected {served}, got {_FAMILIES[family][0]} ({named}); name one of that kind"
            f"{head if 'classifier' in families else ''}"
        )
    bare = (
        *mappings.MODEL_MAPPING_NAMES.values(),
        *mappings.MODEL_FOR_PRETRAINING_MAPPING_NAMES.values(),
    )
    is_bare = any(named in entry if isinstance(entry, tuple) else named == entry for entry in bare)
    fallback = next((wanted for wanted in families if config.model_type in names[wanted]), None)
    if fallback is None or (is_known and not is_bare):
        raise ModelError(
            f"expected {served}, got a model of another kind ({named or config.model_type}); "
            "name one of that kind"
        )
    return _FAMILIES[fallback][2]
