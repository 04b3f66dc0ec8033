"""Options of a run: fields of dataclasses as flags and as keys of files, checked alike."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedkseed._documented import attributes_of

_METAVARS: Mapping[type, str] = {int: "N", float: "X", str: "TEXT", bool: ""}


class SettingsError(ValueError):
    """A setting that is unknown, of another type or out of range; names it."""


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        name: of the field; the flag has hyphens for its underscores.
        type: int, float, str or bool.
        choices: the only texts; empty if any will do.
        default: of the field; `dataclasses.MISSING` if it has none.
        meaning: what the class says of the field.
        metavar: what stands for a value in usage texts.
        old_names: earlier names, still taken.
    """

    name: str
    type: type
    choices: tuple[str, ...]
    default: Any
    meaning: str
    metavar: str
    old_names: tuple[str, ...] = ()

    def checked(self, value: Any, where: str) -> Any:
        """The value as the field has it; ints are taken for floats.

        Raises:
            SettingsError: of another type, or none of the choices.
        """
        if self.type is float and type(value) is int and abs(value) < 2**1023:
            value = float(value)
        if type(value) is not self.type:
            raise SettingsError(
                f"expected {self.name} in {where} as {self.type.__name__}, got {_shortened(value)}"
            )
        if self.choices and value not in self.choices:
            raise SettingsError(
                f"expected {self.name} in {where} to be one of {', '.join(self.choices)}, got "
                f"{_shortened(value)}{nearest(value, self.choices)}"
            )
        return value


def options_of(
    classes: Iterable[type], *, left_out: Iterable[str] = (), old_names: Mapping[str, str] | None = None
) -> dict[str, Option]:
    """The fields of dataclasses as options, by name; their meaning is what the docstrings say.

    Args:
        classes: dataclasses; those they inherit from count, too.
        left_out: fields that are no options.
        old_names: earlier name -> name.
    """
    found: dict[str, Option] = {}
    for cls in classes:
        meanings, hints = attributes_of(cls), typing.get_type_hints(cls)
        for entry in dataclasses.fields(cls):
            if entry.name in left_out:
                continue
            kind = hints[entry.name]
            choices = tuple(entry.metadata.get("choices", ()))
            if typing.get_origin(kind) is Literal:
                choices = typing.get_args(kind)
            earlier = tuple(old for old, name in (old_names or {}).items() if name == entry.name)
            plain = kind if kind in (int, float, bool) else str
            meaning = meanings[entry.name].replace("`", "")
            metavar = entry.metadata.get("metavar") or _METAVARS[plain]
            found[entry.name] = Option(entry.name, plain, choices, entry.default, meaning, metavar, earlier)
    return found


def checked_values(found: Mapping[str, Any], options: Mapping[str, Option], where: str) -> dict[str, Any]:
    """The settings of a file under their present names.

    Raises:
        SettingsError: a name that is unknown (with the nearest that is) or stands twice, or a value of
            another type.
    """
    names = {name: option for option in options.values() for name in (option.name, *option.old_names)}
    values: dict[str, Any] = {}
    for name, value in found.items():
        option = names.get(name)
        if option is None:
            raise SettingsError(
                f"expected only known keys in {where}, got {_shortened(name)}"
                f"{nearest(name, names) or '; known are ' + ', '.join(options)}"
            )
        if option.name in values:
            raise SettingsError(f"expected {option.name} in {where} once, got it as {name} too")
        values[option.name] = option.checked(value, where)
    return values


def parsed_values(texts: Iterable[str], options: Mapping[str, Option], where: str) -> dict[str, Any]:
    """The settings of texts KEY=VALUE, a value as a flag takes it; of a switch true or false.

    Raises:
        SettingsError: another form, a value that is none of the option's type, or see `checked_values`.
    """
    named = {name: option for option in options.values() for name in (option.name, *option.old_names)}
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise SettingsError(f"expected {where} KEY=VALUE, got {_shortened(text)}")
        if name in found:
            raise SettingsError(f"expected {where} {name} once, got it twice")
        found[name] = _parsed(value, named[name], where) if name in named else value
    return checked_values(found, options, where)


def _parsed(text: str, option: Option, where: str) -> Any:
    if option.type is bool:
        return {"true": True, "false": False}.get(text.lower(), text)  # other texts are refused as such
    try:
        return option.type(text)
    except ValueError:
        raise SettingsError(
            f"expected {option.name} in {where} as {option.type.__name__}, got {_shortened(text)}"
        ) from None


def nearest(name: Any, known: Iterable[str]) -> str:
    """A hint at the nearest known name, "" if none is near."""
    close = difflib.get_close_matches(str(name)[:64], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def add_flags(group: argparse._ArgumentGroup, options: Iterable[Option], defaults: Mapping[str, Any]) -> None:
    """One flag an option, its default in the help; flags that are not given stay None.

    Args:
        group: gets them.
        options: the flags.
        defaults: by name, before those of the fields.
    """
    for option in options:
        default = defaults.get(option.name, option.default)
        is_shown = default not in ("", False, None) and default is not dataclasses.MISSING
        text = option.meaning.rstrip(".") + (f" ({_number(default)})" if is_shown else "")
        text = text.replace("%", "%%")
        flags = ["--" + name.replace("_", "-") for name in (option.name, *option.old_names)]
        if option.type is bool:
            group.add_argument(*flags, dest=option.name, action="store_true", default=None, help=text)
        else:
            group.add_argument(
                *flags,
                dest=option.name,
                type=option.type,
                help=text,
                metavar=None if option.choices else option.metavar,
                choices=option.choices or None,
            )


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
