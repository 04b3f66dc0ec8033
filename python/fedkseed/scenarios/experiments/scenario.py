"""A scenario: settings of runs that belong together, as one TOML file, in the package or of one's own.

title = "one line"                what `fedkseed scenarios` lists
about = "..."                     what is compared, what was tried, what differs from the source; optional
source = "..."                    where the definition is from; optional
needs = "..."                     what --data has to name, and from where it is had; only where it is the
                                  user's to bring
seeds = [0, 1, 2]                 base seeds: each variant runs with each of them; [0] if left out

[settings]                        of every run: keys as of `fedkseed simulate`
[variants.NAME]                   title = "..." and the settings that differ; one table at least
[shape]                           of a model that cannot be had offline, for --dry-run: architecture (a
                                  class of transformers) and the keys of its config; optional
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedkseed.documents import DocumentError, read_toml
from fedkseed.scenarios.launch import FREE, findable
from fedkseed.scenarios.options import SettingsError, checked_values, nearest
from fedkseed.scenarios.settings import OPTIONS, RunSettings
from fedkseed.seeds import MAX_CLIENTS

LIBRARY = Path(__file__).parent.parent / "library"
SUFFIX = ".toml"

_TEXTS = ("title", "about", "source", "needs")
_KEYS = (*_TEXTS, "seeds", "settings", "variants", "shape")
#: Names of variants are names of folders.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ARCHITECTURE = "architecture"
#: Stands for data that are not named yet, while settings are checked.
_ANY_DATA = "rows.jsonl"


@dataclass(frozen=True)
class Variant:
    """Runs of a scenario that differ by their seed alone.

    Attributes:
        name: of their folder.
        title: for people.
        settings: those that differ from the scenario's.
    """

    name: str
    title: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Planned:
    """One run of a scenario.

    Attributes:
        variant: its name.
        seed: the base seed.
        values: the settings by name.
    """

    variant: str
    seed: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model by its config alone.

    Attributes:
        architecture: the name of its class in transformers.
        config: what its config is made of.
    """

    architecture: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Scenario:
    """What a file says; see the module.

    Attributes:
        name: of the file, without its ending.
        title, about, source, needs: texts, empty if left out.
        seeds: base seeds.
        settings: of every run.
        variants: by name, in the file's order.
        shape: of a model that cannot be had offline, or None.

    Raises:
        SettingsError: a key, a name or a value that cannot stand; names it.
    """

    name: str
    title: str
    settings: Mapping[str, Any]
    variants: Mapping[str, Variant]
    seeds: tuple[int, ...] = (0,)
    about: str = ""
    source: str = ""
    needs: str = ""
    shape: Shape | None = None

    def __post_init__(self) -> None:
        for variant in self.variants.values():
            values = {"data": _ANY_DATA, **self.settings, **variant.settings}
            try:
                RunSettings.of(values, MAX_CLIENTS)
            except ValueError as error:
                raise SettingsError(f"scenario {self.name}, variant {variant.name}: {error}") from error

    @classmethod
    def read(cls, path: Path) -> Scenario:
        """The scenario of a file.

        Raises:
            SettingsError: it cannot be read, or see the class.
        """
        try:
            found = read_toml(path)
        except DocumentError as error:
            raise SettingsError(str(error)) from error
        except OSError as error:
            raise SettingsError(
                f"expected a scenario's file at {path}, got: {error.strerror}; a path is looked for from the "
                "current folder"
            ) from error
        where = path.name
        if unknown := [key for key in found if key not in _KEYS]:
            raise SettingsError(
                f"expected only the keys {', '.join(_KEYS)} in {where}, got {unknown[0][:80]!r}; "
                f"settings of runs stand under [settings]{nearest(unknown[0], _KEYS)}"
            )
        texts = {key: _text(found.get(key, ""), key, where) for key in _TEXTS}
        if not texts["title"]:
            raise SettingsError(f'expected a title = "..." in {where}, got none')
        tables = _table(found.get("variants", {}), "variants", where)
        if not tables:
            raise SettingsError(f"expected at least one table [variants.NAME] in {where}, got none")
        return cls(
            name=path.stem,
            settings=_settings(found.get("settings", {}), "settings", where),
            variants={name: _variant(name, table, where) for name, table in tables.items()},
            seeds=_seeds(found.get("seeds", [0]), f"seeds in {where}"),
            shape=_shape(found.get("shape"), where),
            **texts,
        )

    def changed(self, given: Mapping[str, Any]) -> Scenario:
        """The scenario with these settings in every run, whatever its variants say of them.

        Paths among all settings are those that are found from any folder.
        """
        kept = {
            name: replace(variant, settings=_findable(variant.settings, left_out=given))
            for name, variant in self.variants.items()
        }
        return replace(self, settings=_findable({**self.settings, **given}), variants=kept)

    def limited(self, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> Scenario:
        """The scenario with fewer variants, or with other seeds.

        Args:
            only: names of variants; all if empty.
            seeds: in place of the file's, unless empty.

        Raises:
            SettingsError: a variant that is none of the scenario's.
        """
        for name in only:
            if name not in self.variants:
                raise SettingsError(
                    f"expected variants out of {', '.join(self.variants)}, got {name[:80]!r}"
                    f"{nearest(name, self.variants)}"
                )
        kept = {name: variant for name, variant in self.variants.items() if not only or name in only}
        return replace(self, variants=kept, seeds=_seeds(list(seeds), "--seeds") if seeds else self.seeds)

    def runs(self) -> list[Planned]:
        """All runs: every variant with the first seed, then with the second, and so on."""
        return [
            Planned(name, seed, {**self.settings, **variant.settings, "seed": seed})
            for seed in self.seeds
            for name, variant in self.variants.items()
        ]

    def text(self) -> str:
        """A file that `read` gives the scenario of, without what a later call is free to change."""
        lines = [f"{key} = {_literal(getattr(self, key))}" for key in _TEXTS if getattr(self, key)]
        lines += [f"seeds = {_literal(list(self.seeds))}", "", "[settings]", *_lines(self.settings)]
        for name, variant in self.variants.items():
            lines += ["", f'[variants."{name}"]', f"title = {_literal(variant.title)}"]
            lines += _lines(variant.settings)
        if self.shape is not None:
            lines += ["", "[shape]", *_lines({_ARCHITECTURE: self.shape.architecture, **self.shape.config})]
        return "\n".join(lines) + "\n"


def library() -> dict[str, Path]:
    """The scenarios that come with the package: name -> file."""
    return {path.stem: path for path in sorted(LIBRARY.glob(f"*{SUFFIX}"))}


def file_of(name: str) -> Path:
    """The file of a scenario of the package, or the file that is named.

    Raises:
        SettingsError: neither.
    """
    if name.endswith(SUFFIX):
        return Path(name).expanduser()
    known = library()
    if name not in known:
        raise SettingsError(
            f"expected a scenario's name or a {SUFFIX} file, got {name[:80]!r}"
            f"{nearest(name, known) or '; known are ' + ', '.join(known)}"
        )
    return known[name]


def _variant(name: str, table: Any, where: str) -> Variant:
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"expected a variant's name of small letters, digits, '.', '_' and '-' in {where}, "
            f"got {name[:80]!r}"
        )
    found = dict(_table(table, f"variants.{name}", where))
    title = _text(found.pop("title", name), f"variants.{name}.title", where)
    return Variant(name, title, _settings(found, f"variants.{name}", where))


def _settings(table: Any, key: str, where: str) -> dict[str, Any]:
    found = _table(table, key, where)
    if "seed" in found:
        raise SettingsError(f"expected seeds = [...] at the top of {where}, got seed in [{key}]")
    return checked_values(found, OPTIONS, f"[{key}] of {where}")


def _seeds(found: Any, name: str) -> tuple[int, ...]:
    got = f"got {str(found)[:80]}"
    if not isinstance(found, list) or not found:
        raise SettingsError(f"expected {name} as a list of one integer or more, {got}")
    is_of_seeds = all(type(seed) is int and 0 <= seed < 2**63 for seed in found)
    if not is_of_seeds or len(set(found)) < len(found):
        raise SettingsError(f"expected {name} as different integers in [0, 2^63), {got}")
    return tuple(found)


def _shape(table: Any, where: str) -> Shape | None:
    if table is None:
        return None
    config = dict(_table(table, "shape", where))
    architecture = _text(config.pop(_ARCHITECTURE, ""), f"shape.{_ARCHITECTURE}", where)
    if not architecture:
        raise SettingsError(f"expected {_ARCHITECTURE} in [shape] of {where}, got none")
    if nested := [key for key, value in config.items() if isinstance(value, Mapping)]:
        raise SettingsError(f"expected plain values in [shape] of {where}, got the table {nested[0][:80]!r}")
    return Shape(architecture, config)


def _table(value: Any, key: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SettingsError(f"expected {key} as a table in {where}, got {str(value)[:80]!r}")
    return value


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise SettingsError(f"expected {key} as text in {where}, got {str(value)[:80]!r}")
    return value


def _findable(settings: Mapping[str, Any], left_out: Iterable[str] = ()) -> dict[str, Any]:
    """The settings but for some, paths as they are found from any folder."""
    return {name: findable(name, value) for name, value in settings.items() if name not in left_out}


def _lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {_literal(value)}" for name, value in values.items() if name not in FREE]


def _literal(value: Any) -> str:
    """A value in TOML: of these types JSON's notation is one of TOML's, but for the delete character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
