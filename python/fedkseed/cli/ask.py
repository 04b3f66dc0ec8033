"""`fedkseed ask`: a tuned model answers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from fedkseed.cli.apply import add_trust_remote_code, say

if TYPE_CHECKING:
    from fedkseed.data.templates import Template
    from fedkseed.scenarios.answering import Answer

#: Lines of standard input that are answered together; of a terminal, each as it comes.
_BATCH = 16
_MAX_LINE = 1 << 20


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], parents: list[argparse.ArgumentParser]
) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "ask",
        parents=parents,
        help="ask a tuned model",
        description="Answers texts with a tuned model: the folder that `fedkseed apply` wrote, or that of a "
        "run or of a published ledger, which is then applied in memory. Prompts are made as they were for "
        "tuning. A model that was tuned for a classification gives the labels' probabilities, the likeliest "
        "first.",
        epilog="Of a template with several fields the text is the last one (of the package's templates the "
        "instruction) and the context the one named context, or else the first one (the input); --field "
        "names any of them.",
    )
    parser.add_argument(
        "folder", type=Path, help="folder of a model, a run or a published ledger", metavar="FOLDER"
    )
    parser.add_argument(
        "text", nargs="+", help="what to ask; - reads a text a line from standard input", metavar="TEXT"
    )
    parser.add_argument("--context", default="", help="a text beside what is asked", metavar="TEXT")
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        help="a field of the template; may be repeated",
        metavar="NAME=TEXT",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--template",
        help="a template's name, or a text with field names in braces, in place of the one of the tuning",
        metavar="NAME_OR_TEXT",
    )
    prompt.add_argument(
        "--template-file", type=Path, help="text with field names in braces, in its place", metavar="FILE"
    )
    parser.add_argument(
        "--best", action="store_true", help="of a run: its round with the least held-out loss, not the last"
    )
    parser.add_argument(
        "--base",
        default="",
        help="of a run or a published ledger: its base model, if settings or card name another place",
        metavar="MODEL",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="longest answer (%(default)s)", metavar="N"
    )
    parser.add_argument(
        "--device", default="cpu", help="auto, cpu, cuda or cuda:N (%(default)s)", metavar="DEVICE"
    )
    add_trust_remote_code(parser, "model")
    parser.add_argument("--json", action="store_true", help="a JSON object a text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Answers."""
    from fedkseed.data.asking import AskingError
    from fedkseed.scenarios.answering import open_tuned
    from fedkseed.simulation.devices import choose_device

    given = {}
    for entry in options.field:
        name, equals, text = entry.partition("=")
        if not equals or not name or name in given:
            raise AskingError(f"expected --field NAME=TEXT, each name once, got {entry[:80]!r}")
        given[name] = text
    if any(not text.strip() for text in options.text):
        raise AskingError("expected a text to ask, got an empty one")
    if options.text.count("-") > 1:
        raise AskingError("expected standard input (-) once among the texts, got it several times")
    tuned = open_tuned(
        options.folder,
        template=_template(options),
        best=options.best,
        base=options.base,
        device=choose_device(options.device),
        trust_remote_code=options.trust_remote_code,
        say=say,
    )
    texts = _texts(options.text)
    size = 1 if "-" in options.text and sys.stdin.isatty() else _BATCH
    several = len(options.text) > 1 or "-" in options.text
    while chunk := list(islice(texts, size)):
        answers = tuned.answer(chunk, options.context, given, max_new_tokens=options.max_new_tokens)
        for answer in answers:
            print(json.dumps(asdict(answer)) if options.json else _shown(answer, several), flush=True)
    return 0


def _template(options: argparse.Namespace) -> Template | None:
    from fedkseed.data.templates import Template, read_template

    if options.template_file is not None:
        return read_template(options.template_file)
    return Template.of(options.template) if options.template is not None else None


def _texts(arguments: list[str]) -> Iterator[str]:
    """The texts one after the other; lines of standard input without the blank ones."""
    from fedkseed.data.asking import AskingError

    for argument in arguments:
        if argument != "-":
            yield argument
            continue
        number = 0
        while line := sys.stdin.buffer.readline(_MAX_LINE + 1):
            number += 1
            if len(line) > _MAX_LINE:
                raise AskingError(f"expected lines of at most {_MAX_LINE:,} bytes, got more in line {number}")
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise AskingError(f"expected UTF-8, got other bytes in line {number} of the input") from error
            if text:
                yield text


def _shown(answer: Answer, several: bool) -> str:
    """An answer as text; beside what was asked, if that is more than one."""
    if answer.probabilities:
        ranked = "  ".join(
            f"{label} {probability:.3f}" for label, probability in answer.probabilities.items()
        )
        return f"{ranked}  {answer.text}" if several else ranked
    return f"> {answer.text}\n{answer.answer}\n" if several else answer.answer
