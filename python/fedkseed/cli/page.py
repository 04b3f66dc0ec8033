"""`python -m fedkseed.cli.page > docs/cli.md`: the page of the command line, made of the parser itself.

Its text is the same in every terminal and every release of Python: argparse's own layout is not used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator

from fedkseed.cli import make_parser

_INTRODUCTION = """# The command `fedkseed`

Made by `python -m fedkseed.cli.page > docs/cli.md`; not edited by hand.
"""


def render(parser: argparse.ArgumentParser) -> str:
    """The page: each command with its usage, arguments, options and defaults."""
    return "\n".join((_INTRODUCTION, *_sections(parser))).rstrip() + "\n"


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """A parser's subcommands by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments and options of a parser that are shown, without its subcommands and help."""
    apart = (argparse._SubParsersAction, argparse._HelpAction)
    return [
        action
        for action in parser._actions
        if not isinstance(action, apart) and action.help is not argparse.SUPPRESS
    ]


def _sections(parser: argparse.ArgumentParser) -> Iterator[str]:
    below = commands(parser)
    yield f"## {parser.prog}\n"
    if parser.description:
        yield f"{_text(parser.description)}\n"
    yield f"    {_usage(parser)}\n"
    if below:
        yield from _table(
            ("command", "what it does"),
            (
                (f"[`{name}`](#{child.prog.replace(' ', '-')})", _text(_summary(parser, name)))
                for name, child in below.items()
            ),
        )
    shown = options(parser)
    for group in parser._action_groups:
        members = [action for action in group._group_actions if action in shown]
        if not members:
            continue
        if group.title not in ("positional arguments", "options"):
            yield f"### {group.title}\n"
            if group.description:
                yield f"{_text(group.description)}\n"
        yield from _table(
            ("argument" if not members[0].option_strings else "option", "meaning"),
            ((_name(action), _meaning(parser, action)) for action in members),
        )
    if parser.epilog:
        yield f"{_text(parser.epilog)}\n"
    for child in below.values():
        yield from _sections(child)


def _summary(parser: argparse.ArgumentParser, name: str) -> str:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return next(choice.help or "" for choice in action._choices_actions if choice.dest == name)
    return ""


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield f"| {head[0]} | {head[1]} |\n|---|---|"
    for first, second in rows:
        yield f"| {first} | {second} |"
    yield ""


def _usage(parser: argparse.ArgumentParser) -> str:
    """The command with what it needs: required options, arguments, a subcommand."""
    shown = options(parser)
    parts = [parser.prog]
    parts += [
        f"{action.option_strings[-1]} {_value(action)}".rstrip()
        for action in shown
        if action.option_strings and action.required
    ]
    if any(action.option_strings and not action.required for action in shown):
        parts.append("[OPTIONS]")
    for action in shown:
        if not action.option_strings:
            value = _value(action)
            parts.append({"?": f"[{value}]", "*": f"[{value} ...]"}.get(str(action.nargs), value))
    if commands(parser):
        parts.append("COMMAND ...")
    return " ".join(parts)


def _name(action: argparse.Action) -> str:
    value = _value(action)
    if not action.option_strings:
        return f"`{value}`"
    return ", ".join(f"`{f'{option} {value}'.rstrip()}`" for option in action.option_strings)


def _value(action: argparse.Action) -> str:
    """What stands for an action's value; empty for a switch."""
    if action.nargs == 0:
        return ""
    if action.metavar is not None:
        name = action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    elif action.choices is not None:
        name = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        name = action.dest.upper()
    return f"{name} [{name} ...]" if action.nargs == "+" else name


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """The help text with its default, which is added where the text does not say it."""
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    silent = action.default in (None, False, "", argparse.SUPPRESS) or action.default == []
    if not silent and "%(default)" not in (action.help or ""):
        text += f" ({action.default})"
    return _text(text) + ("; required" if action.option_strings and action.required else "")


def _text(text: str) -> str:
    """One line for a table of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.stdout.write(render(make_parser()))
