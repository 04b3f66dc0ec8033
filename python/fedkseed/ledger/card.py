"""The model card of a published ledger: README.md, as the hub reads it, with the hashes that are compared.

The text is for people and may be edited; the rows of hashes may not: `check_card` reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from fedkseed.data.built_in_models import published_as
from fedkseed.ledger.format import LEDGER_FORMAT
from fedkseed.ledger.ledger import Ledger
from fedkseed.ledger.origin import FILE, Hashes, Origin, OriginError

CARD = "README.md"
MAX_CARD_BYTES = 1 << 18

_BASE, _TUNED = "content of the base", "content of the tuned model"
_ROW = re.compile(r"^\| ([^|`\n]{1,100}) \| `([^`\n]*)` \|$", re.MULTILINE)
_DATA_SET = "hub:"
#: Words for facts that makers usually give, and in which order they stand.
_WORDS: Mapping[str, str] = {
    "num_rounds": "rounds",
    "num_clients": "clients that took part",
    "bytes_down": "bytes sent to clients, in all",
    "bytes_up": "bytes sent by clients, in all",
    "num_steps": "steps",
    "num_local_steps": "steps of a client in a round",
    "batch_size": "rows of a step",
    "lr": "learning rate",
    "eps": "eps of a step",
}
#: Characters that would end a cell of a table or begin markup in it.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~!&])")


def card_text(origin: Origin, ledger: Ledger) -> str:
    """The card of a published ledger.

    Args:
        origin: with its hashes.
        ledger: that is published.

    Raises:
        OriginError: an origin without hashes.
    """
    hashes = _hashes(origin)
    title = _plain(origin.base)
    kind = "a LoRA adapter" if origin.adapter else "all parameters"
    parts = [
        _front_matter(origin),
        f"# {title}, tuned with FedKSeed",
        f"A ledger: {ledger.num_seeds:,} coefficients along seeded noise that, added to the base model, "
        f"give the tuned one ({kind}), bit for bit. It holds nothing of the weights: the base comes from "
        f"where its owners publish it. {_base_sentence(origin)}",
        "## Use it",
        _use(origin),
        "## What loading compares",
        "| | SHA-256 |\n|---|---|\n" + "\n".join(f"| {name} | `{value}` |" for name, value in _rows(origin)),
        f"`fedkseed.load` refuses a folder whose files differ from this table, a base of other content "
        f"({hashes.base[:16]}...), and a tuned model of other content.",
        "## What it was made of",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in _made_of(origin, ledger)),
        "## Signature",
        _signature(ledger),
        "## Licence",
        _licence(origin),
    ]
    return "\n\n".join(parts) + "\n"


def check_card(text: str, origin: Origin, where: str) -> None:
    """Raises unless the card has the hashes of the origin, each once.

    Args:
        text: of the card.
        origin: read from beside it.
        where: what the error calls the card.

    Raises:
        OriginError: says which hash differs.
    """
    found = _ROW.findall(text)
    for name, value in _rows(origin):
        values = [other for row, other in found if row == name]
        if values != [value]:
            got = values[0][:80] if len(values) == 1 else f"{len(values)} rows"
            raise OriginError(
                f"expected {value[:16]}... for {name} in {where}, as {FILE} says, got {got!r}: the card is "
                "of another ledger, or a file was changed; fetch the folder again"
            )


def _rows(origin: Origin) -> list[tuple[str, str]]:
    hashes = _hashes(origin)
    files = sorted({**hashes.files, FILE: origin.sha256}.items())
    return [(_BASE, hashes.base), (_TUNED, hashes.tuned), *files]


def _hashes(origin: Origin) -> Hashes:
    if origin.hashes is None:
        raise OriginError("expected an origin with hashes, got one of a ledger that is not published")
    return origin.hashes


def _front_matter(origin: Origin) -> str:
    """What the hub indexes; every text in double quotes, as JSON writes it, which YAML reads alike."""
    base, _ = published_as(origin.base) if origin.source == "built-in" else (origin.base, None)
    lines = []
    if origin.source != "folder":
        relation = "adapter" if origin.adapter else "finetune"
        lines += [f"base_model: {json.dumps(base)}", f"base_model_relation: {relation}"]
    if origin.license is not None:
        lines.append(f"license: {json.dumps(origin.license)}")
    if origin.data.startswith(_DATA_SET):
        name = re.split("[:@]", origin.data.removeprefix(_DATA_SET))[0]
        lines += ["datasets:", f"- {json.dumps(name)}"]
    lines += ["library_name: fedkseed", "tags:", "- fedkseed", "- federated-learning", "- zeroth-order"]
    lines += ["- lora"] if origin.adapter else []
    return "\n".join(["---", *lines, "---"])


def _base_sentence(origin: Origin) -> str:
    base = _plain(origin.base)
    if origin.source == "built-in":
        return (
            f"The base is {base} as the package converts it from a compressed archive: other numbers than "
            f"in its makers' repository, {_plain(published_as(origin.base)[0])}."
        )
    if origin.source == "folder":
        return f"The base was a folder called {base}: have its weights, and pass base=."
    revision = f"revision {origin.revision}" if origin.revision else "a revision that is not known"
    return f"The base is {base} of the hub at {revision}."


def _use(origin: Origin) -> str:
    extra = "scenarios" if origin.adapter else "hf"
    base = "" if origin.loaded_by else ', base="FOLDER_OF_THE_BASE"'
    flag = "" if origin.loaded_by else " --base FOLDER_OF_THE_BASE"
    what = "  # a PeftModel" if origin.adapter else ""
    return (
        f"    pip install 'fedkseed-kernels[{extra}]'\n\n"
        "```python\nimport fedkseed\n\n"
        f'model = fedkseed.load("FOLDER_OR_HUB_ID"{base}){what}\n```\n\n'
        f"    fedkseed ask FOLDER TEXT{flag}\n"
        f"    fedkseed apply FOLDER --out tuned{flag}"
    )


def _made_of(origin: Origin, ledger: Ledger) -> list[tuple[str, str]]:
    """Names and values, both safe in a table of Markdown."""
    data = "not said" if not origin.data else _plain(origin.data)
    if origin.data_digest:
        data += f", rows {origin.data_digest[:32]}"
    rows = [
        ("base", f"{_plain(origin.base)} ({origin.source})"),
        ("revision of the base", _plain(origin.revision_text)),
        ("weights of the base", f"{ledger.identity.dtype}"),
        ("data", data),
    ]
    known = [name for name in _WORDS if name in origin.facts]
    others = sorted(set(origin.facts) - set(known))
    for name in (*known, *others):
        value = origin.facts[name]
        text = (
            f"{value:,}"
            if isinstance(value, int)
            else _plain(f"{value:g}" if isinstance(value, float) else value)
        )
        rows.append((_WORDS.get(name, _plain(name)), text))
    rows += [
        ("noise", f"{ledger.family}, K = {ledger.num_seeds} candidate seeds of base seed {ledger.base_seed}"),
        ("versions", f"ledger format {LEDGER_FORMAT}, noise contract {ledger.contract_version}"),
    ]
    if origin.adapter is not None:
        seed = origin.adapter.seed
        rows.append(
            (
                "start of the adapter",
                "stored beside it: random numbers that it began with, none of the tuning"
                if seed is None
                else f"made of seed {seed} by a rule",
            )
        )
    return rows


def _signature(ledger: Ledger) -> str:
    if ledger.signature is None:
        return "None. The hashes find accidents, not intent."
    return (
        f"The ledger is signed (Ed25519) by the key {ledger.signature.public_key.hex()}. Whose key that is, "
        "nothing here says: get it from its owner and pass it as public_key=. Signed are the ledger and the "
        "hashes in it (base, template), not this text."
    )


def _licence(origin: Origin) -> str:
    if origin.license is None:
        return "The licence of the base is not known here: ask its owners. It governs the tuned model, too."
    return f"The base is under {_plain(origin.license)}, which governs the tuned model, too."


def _plain(text: str) -> str:
    """Text without markup."""
    return _MARKUP.sub(r"\\\1", text)
