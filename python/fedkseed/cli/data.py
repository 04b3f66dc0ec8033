"""`fedkseed data`: what a file of one's own makes of a federation."""

from __future__ import annotations

import argparse
import dataclasses
import io
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedkseed._extras import require_extra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedkseed.data.federated import FederatedData
    from fedkseed.data.own import Division

#: What is printed and drawn at most; the rest is counted.
MAX_LINES, MAX_GROUPS, MAX_NAMED_BARS = 50, 8, 60
_WIDTH = 48


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], parents: list[argparse.ArgumentParser]
) -> None:
    """Adds the subcommand."""
    from fedkseed.data.own import DataChoice
    from fedkseed.scenarios.options import add_flags, options_of

    parser = commands.add_parser(
        "data",
        help="what your data makes of a federation",
        description="Shows how simulate would read and divide your own data.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    show = actions.add_parser(
        "show",
        parents=parents,
        help="print (and draw) clients, rows and labels",
        description="Reads your data as simulate does and prints who holds what, what is held out, and what "
        "was guessed, left out or empty. Nothing is trained; no model is needed.",
    )
    add_flags(show.add_argument_group("data"), options_of((DataChoice,)).values(), {})
    show.add_argument(
        "--model",
        help="a folder, hub id or built-in name, whose tokenizer counts tokens and checks --words",
        metavar="MODEL",
    )
    show.add_argument(
        "--max-length",
        type=int,
        default=1024,
        help="tokens of a row, with --model (%(default)s)",
        metavar="N",
    )
    show.add_argument("--seed", type=int, default=0, help="seed of every draw (%(default)s)", metavar="SEED")
    show.add_argument(
        "--out",
        type=Path,
        help="also draw the rows of each client as a PNG; needs matplotlib: pip install "
        "'fedkseed-kernels[plot]'",
        metavar="FILE",
    )
    show.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints and draws it."""
    from fedkseed.data.built_in_models import model_source
    from fedkseed.data.models import load_tokenizer
    from fedkseed.files import write_atomically

    if options.out is not None:
        require_extra("plot", "matplotlib")
    division = _division(options)
    print("\n".join(lines(division)))
    if options.model is not None:
        tokenizer = load_tokenizer(model_source(options.model))
        print("\n".join(token_lines(division.data, tokenizer, options.max_length)))
    if options.out is not None:
        write_atomically(options.out, drawn(division))
        print(f"Written: {options.out}")
    return 0


def _division(options: argparse.Namespace) -> Division:
    from fedkseed.data.errors import DataError
    from fedkseed.data.own import DataChoice, Division, load_division
    from fedkseed.scenarios.built_in import load_data
    from fedkseed.scenarios.presets import BUILT_IN

    names = (entry.name for entry in dataclasses.fields(DataChoice))
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if given.get("data") not in BUILT_IN:
        return load_division(DataChoice(**{"data": "", **given}), options.seed)
    data = load_data(given, options.seed)
    if data is None:
        raise DataError(
            f"expected --data other than {given['data']}: a model's tokens choose the rows of these tasks"
        )
    groups = {
        client.name: Counter(row.response for row in (*client.train, *client.held_out))
        for client in (*data.clients, *data.unseen)
    }
    return Division(data, "label", groups)


def lines(division: Division) -> list[str]:
    """The division as text: notes, a line a client, and a prompt."""
    from fedkseed.data.errors import printable

    data = division.data
    everyone = [*data.clients, *data.unseen]
    train, held_out = (
        sum(len(getattr(client, side)) for client in everyone) for side in ("train", "held_out")
    )
    found = [
        f"{data.kind}: {train:,} rows of {len(data.clients):,} clients to train on, {held_out:,} held out",
        *(f"  {note}" for note in data.notes),
    ]
    if data.labels:
        answers = data.words or data.labels
        pairs = zip(data.labels, answers, strict=True)
        found.append("  labels: " + ", ".join(f"{printable(label)} ({answer!r})" for label, answer in pairs))
    width = min(max(len("client"), *(len(client.name) for client in everyone)), _WIDTH)
    found += ["", f"{'client':{width}}  {'train':>7}  {'held out':>8}  {division.grouped_by}".rstrip()]
    unseen = {client.name for client in data.unseen}
    for client in everyone[:MAX_LINES]:
        name = client.name[:width]
        groups = _summary(division.groups.get(client.name, Counter()))
        alone = "(held out whole) " if client.name in unseen else ""
        found.append(
            f"{name:{width}}  {len(client.train):7,}  {len(client.held_out):8,}  {alone}{groups}".rstrip()
        )
    if len(everyone) > MAX_LINES:
        sizes = sorted(len(client.train) for client in data.clients)
        found.append(
            f"... and {len(everyone) - MAX_LINES:,} more; clients train on {sizes[0]:,} to {sizes[-1]:,} rows"
        )
    return found + _example(data)


def token_lines(data: FederatedData, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """How long the rows are in tokens, and what is cut.

    Raises:
        DataError: a word that is not one token, or a prompt of none.
        ValueError: a length below 2, or a tokenizer without an end-of-text token.
    """
    from fedkseed.data.classification import Verbalizer, encode_labelled
    from fedkseed.data.prompts import encode_rows

    if max_length < 2:
        raise ValueError(f"expected --max-length of at least 2, got {max_length}")
    rows = [row for client in (*data.clients, *data.unseen) for row in (*client.train, *client.held_out)]
    dropped = 0
    if data.labels:
        if data.words:
            Verbalizer.of(tokenizer, dict(zip(data.labels, data.words, strict=True)))
        prompts, shortened = encode_labelled(tokenizer, rows, data.template, data.labels, max_length)
        lengths = [len(prompt.input_ids) for prompt in prompts]
    else:
        encoded, cuts = encode_rows(tokenizer, rows, data.template, max_length)
        lengths = [len(row.input_ids) for row in encoded]
        shortened, dropped = cuts.shortened, cuts.dropped
    found = ["", f"of at most {max_length:,} tokens each: {shortened:,} prompts lose their beginning"]
    if not data.labels:
        found[-1] += f", {dropped:,} rows are left out, since their answer alone does not fit"
    if lengths:
        found.append(f"tokens of a row: {statistics.median(lengths):g} (median), {max(lengths):,} at most")
    return found


def drawn(division: Division) -> bytes:
    """The rows of each client as a PNG: bars of its groups' rows, the largest groups by name."""
    require_extra("plot", "matplotlib")
    from matplotlib.figure import Figure

    from fedkseed.data.errors import printable

    data = division.data
    everyone = [*data.clients, *data.unseen]
    groups: Mapping[str, Counter[str]] = division.groups or {
        client.name: Counter(rows=len(client.train) + len(client.held_out)) for client in everyone
    }
    totals: Counter[str] = Counter()
    for counts in groups.values():
        totals.update(counts)
    named = sorted(
        name for name, _ in sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:MAX_GROUPS]
    )
    layers = {name: [groups[client.name][name] for client in everyone] for name in named}
    rest = [sum(groups[client.name].values()) for client in everyone]
    for layer in layers.values():
        rest = [left - own for left, own in zip(rest, layer, strict=True)]
    if any(rest):
        layers[f"{len(totals) - len(named)} others"] = rest

    figure = Figure(figsize=(min(4 + 0.35 * len(everyone), 16), 4.5), layout="constrained")
    axes = figure.subplots()
    bottom = [0] * len(everyone)
    for name, layer in layers.items():
        # A label that begins with an underscore would be left out of the legend.
        axes.bar(
            range(len(everyone)), layer, bottom=bottom, label=_escaped(f"\u200b{printable(name)[:_WIDTH]}")
        )
        bottom = [below + own for below, own in zip(bottom, layer, strict=True)]
    if data.unseen:
        axes.axvline(len(data.clients) - 0.5, color="black", linestyle=":", label="right: held out whole")
    axes.set_ylabel("rows (training and held out)")
    axes.set_title(
        f"{len(data.clients):,} clients, by {division.grouped_by}" if division.grouped_by else "clients"
    )
    if len(everyone) <= MAX_NAMED_BARS:
        names = [_escaped(client.name[:_WIDTH]) for client in everyone]
        axes.set_xticks(range(len(everyone)), names, rotation=45, ha="right")
    else:
        axes.set_xlabel("client")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    target = io.BytesIO()
    figure.savefig(target, dpi=120, format="png")
    return target.getvalue()


def _summary(groups: Counter[str]) -> str:
    """The largest groups, and how many more there are."""
    from fedkseed.data.errors import printable

    ordered = sorted(groups.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{printable(name)[:_WIDTH]} {number:,}" for name, number in ordered[:MAX_GROUPS]]
    if len(ordered) > MAX_GROUPS:
        shown.append(f"{len(ordered) - MAX_GROUPS:,} more")
    return ", ".join(shown)


def _example(data: FederatedData) -> list[str]:
    """What the model is shown of the first row; of a chat template, which needs a tokenizer, its fields."""
    row = data.clients[0].train[0]
    if data.template.needs_tokenizer:
        prompt = "; ".join(f"{name} {text!r}" for name, text in row.fields.items())
    else:
        prompt = repr(data.template.prompt(None, row.fields))
    answer = row.response
    if data.words:
        answer = data.words[data.labels.index(row.response)]
    return ["", f"first prompt ({data.template.name}): {_cut(prompt)}", f"its answer: {_cut(repr(answer))}"]


def _cut(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def _escaped(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")
