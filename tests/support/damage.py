"""Files of a run, of settings and of data, damaged in many ways, and the readers that meet them.

As a script, `damage FOLDER KIND ... --first N --count N` reads so many damaged files of each kind, `make
FOLDER KIND ...` writes files that ask for much memory, and `bombs FOLDER KIND ...` reads them; a line of JSON
each says how often each error came, what was accepted, and the most memory above the process before.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import re
import resource
import struct
import sys
import tarfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from fedkseed import Ledger, LedgerError, ModelIdentity, SeedPool, Server, ServerConfig
from fedkseed.cli.plot import read_metrics
from fedkseed.data import instructions, sentiment
from fedkseed.data.asking import FILE, Asking, AskingError
from fedkseed.data.errors import DataError
from fedkseed.data.fetch import FetchError, extract_member
from fedkseed.data.templates import Template
from fedkseed.federation.state import StateError, StateFolder
from fedkseed.ledger.describe import describe
from fedkseed.scenarios.options import checked_values
from fedkseed.scenarios.settings import OPTIONS, RunSettings, SettingsError, values_of_file
from fedkseed.simulation.round_log import RoundLog, check_metrics, check_timings
from fedkseed.simulation.run_folder import (
    CLIENTS,
    METRICS,
    SETTINGS,
    TIMINGS,
    RunFolder,
    RunFolderError,
    check_client_settings,
    kept_storage,
)

IDENTITY = ModelIdentity(bytes(range(32)), bytes(range(32, 64)), "float32")
MEMBER = "m.jsonl"
_CLIENTS = {"storage": "Inplace(chained=False, rounding='nearest')", "batch_size": 3}
_TASK = {"prompt": "plain", "labels": ["a", "b"]}


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: of the file.
        makes: whole ones.
        read: everything that reads one, in a folder.
        errors: what it may raise.
        is_text: whether words are put into it.
        sealed: puts the checksum right after a change, where there is one.
        packed: makes the file of what is damaged, where that is inside.
        bombs: small or large files that ask for as much memory as they can.
    """

    name: str
    makes: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]
    is_text: bool = True
    sealed: Callable[[bytes], bytes] | None = None
    packed: Callable[[bytes], bytes] = bytes
    bombs: Callable[[], list[bytes]] = list


def _rows(number: int) -> list[dict[str, object]]:
    return [
        {
            "round": round,
            "clients": [1, 2, 300 + round],
            "failed": [2],
            "train_loss": 1.5 + round,
            "evaluation": {"held_out_loss": 2.25, "accuracy": None, "rouge_l": 0.5},
            "bytes_down": 700,
            "bytes_up": 80,
            "num_skipped": 0,
        }
        for round in range(number)
    ]


def _lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()


def _read_settings(folder: Path) -> object:
    with RunFolder.reopen(folder) as opened:
        values = checked_values(opened.read_settings(), OPTIONS, SETTINGS)
    return RunSettings.of(values, 16)


def _read_metrics(folder: Path) -> object:
    read_metrics(folder / METRICS)
    return list(RoundLog(folder / METRICS, 3, check_metrics).rows)


def _read_clients(folder: Path) -> object:
    with contextlib.suppress(RunFolderError):
        kept_storage(folder / CLIENTS)
    check_client_settings(folder / CLIENTS, _CLIENTS, _TASK)
    return None


def _read_state(folder: Path) -> object:
    opened = StateFolder(folder)
    try:
        return opened.read()
    finally:
        opened.close()


def _make_states() -> list[bytes]:
    made = []
    for sampling in ("uniform", "pro"):
        numbers = {"clients_per_round": 2, "num_local_steps": 4, "lr": 0.02, "eps": 1e-3}
        config = ServerConfig(5, run_id=bytes(16), sampling=sampling, **numbers)
        made.append(Server(IDENTITY, SeedPool(8, 16), config)._state(3).to_bytes())
    return made


def _seal_state(data: bytes) -> bytes:
    return data[:-32] + sha256(data[:-32]).digest()


def _make_ledgers() -> list[bytes]:
    notes = {"num_rounds": "3", "creator": "a test"}
    return [Ledger(7, np.linspace(-1, 1, 16), IDENTITY, notes=notes, frozen=(1, 5)).to_bytes()]


def _zip(members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def _make_rows() -> list[bytes]:
    row = {
        "input": [{"role": "system", "content": "Say."}, {"role": "user", "content": "x ü"}],
        "ideal": ["y"],
    }
    return [_lines([row, {**row, "ideal": "z"}] * 3)]


def _make_archives() -> list[bytes]:
    (content,) = _make_rows()
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)
    return [_zip({MEMBER: content}, method) for method in methods]


def _read_archive(folder: Path) -> object:
    path = folder / "archive.zip"
    target = folder / "member"
    target.unlink(missing_ok=True)
    with contextlib.suppress(FetchError):
        extract_member(path, MEMBER, target)
    return instructions.read_rows(path, MEMBER)


def _archive_bombs() -> list[bytes]:
    row = b'{"input":[],"ideal":""}\n'
    return [
        _zip({MEMBER: content})
        for content in (
            b"\n" * (32 << 20),
            row * (1 << 18),
            b"[" * (32 << 20),
            b'"' + b"\xf0\x9f\x98\x80" * (1 << 20),
        )
    ]


def _tar(files: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _make_sentiment() -> list[bytes]:
    files = {
        name: "".join(f"{n}_1\t{1.5 - n % 2 * 3}\tNumber {n} of {name}.\n" for n in range(60)).encode()
        for name in sentiment.FILES.values()
    }
    return [_tar(files)]


def _pack_sentiment(tar: bytes) -> bytes:
    return _zip({sentiment._TAR: gzip.compress(tar, mtime=0)})


def _sentiment_bombs() -> list[bytes]:
    return [_pack_sentiment(bytes(256 << 20))]


def _json_bombs(size: int = 1 << 20) -> list[bytes]:
    units = ("[" * 30 + "]" * 30, "[]", "{}", '{"":0}', "1e1", '"\\u0100"')
    whole = [("[" + ",".join([unit] * (size // (len(unit) + 1) - 2)) + "]").encode() for unit in units]
    open_ended = [b"[" * size, b'{"":' * (size // 4), b'"' + b'\\"' * (size // 2 - 10), b"1" * size]
    return [*whole, *open_ended, b"[" * (size * 32)]


def _line_bombs() -> list[bytes]:
    whole = _lines(_rows(3))
    found = [whole.replace(b"[1, 2, 300]", bomb) for bomb in _json_bombs((1 << 19) - 1000)]
    return [*found, whole + b"\n" * (16 << 20), b"[],[]," * (1 << 21), _lines(_rows(60_000))]


def _toml_bombs(size: int = 1 << 16) -> list[bytes]:
    texts = [
        "a." * (size // 2 - 8) + "a=1",
        "\n".join(f"k{i}." + ".".join("a" * 29) + "=1" for i in range(size // 70)),
        "\n".join(f"[{i:x}." + ".".join("a" * 29) + "]" for i in range(size // 70)),
        "a=" + "[" * (size - 2),
        "a=[" + ",".join(["[" * 29 + "]" * 29] * (size // 60)) + "]",
        "a=" + "{a=" * (size // 3 - 2),
        "#" * (size * 100),
    ]
    return [text.encode() for text in texts]


_SETTINGS = {
    "lr": 1e-4,
    "batch_size": 3,
    "family": "rademacher",
    "rounds": 3,
    "model": "m",
    "template": "plain",
}
_TOML = b"""# a run
lr = 1e-4
rounds = 3
family = 'rademacher'
model = '''m'''
classify = "words"
held_out = 0.25
"""
_IN_FOLDER = (RunFolderError, StateError)
KINDS = {
    "settings": Kind(
        SETTINGS,
        lambda: [json.dumps(_SETTINGS, indent=2).encode()],
        _read_settings,
        (RunFolderError, SettingsError),
        bombs=_json_bombs,
    ),
    "metrics": Kind(METRICS, lambda: [_lines(_rows(4))], _read_metrics, _IN_FOLDER, bombs=_line_bombs),
    "timings": Kind(
        TIMINGS,
        lambda: [_lines([{"round": round, "seconds": 0.5, "seconds_local": 1} for round in range(4)])],
        lambda folder: RoundLog(folder / TIMINGS, 3, check_timings),
        _IN_FOLDER,
        bombs=_line_bombs,
    ),
    "clients": Kind(
        CLIENTS,
        lambda: [
            json.dumps({**_CLIENTS, "task": {"prompt": "plain", "labels": ["a", "b"]}}, indent=2).encode()
        ],
        _read_clients,
        _IN_FOLDER,
        bombs=_json_bombs,
    ),
    "asking": Kind(
        FILE,
        lambda: [
            Asking(Template.named("fedkseed-dolly")).to_json().encode(),
            Asking(Template.custom("{text}: "), ("no", "yes"), (" a", " b")).to_json().encode(),
        ],
        Asking.read,
        (AskingError,),
        bombs=_json_bombs,
    ),
    "toml": Kind(
        "settings.toml",
        lambda: [_TOML],
        lambda folder: RunSettings.of(values_of_file(folder / "settings.toml"), 16),
        (SettingsError,),
        bombs=_toml_bombs,
    ),
    "state": Kind(
        StateFolder.FILE, _make_states, _read_state, (StateError,), is_text=False, sealed=_seal_state
    ),
    "ledger": Kind(
        "ledger.safetensors",
        _make_ledgers,
        lambda folder: describe(Ledger.load(folder / "ledger.safetensors")),
        (LedgerError,),
        bombs=lambda: [struct.pack("<Q", 1 << 60) + b"[" * (1 << 20), b"\xff" * (64 << 20)],
    ),
    "archive": Kind(
        "archive.zip", _make_archives, _read_archive, (DataError,), is_text=False, bombs=_archive_bombs
    ),
    "rows": Kind(
        "archive.zip", _make_rows, _read_archive, (DataError,), packed=lambda rows: _zip({MEMBER: rows})
    ),
    "sentiment": Kind(
        "archive.zip",
        lambda: [_pack_sentiment(*_make_sentiment())],
        lambda folder: sentiment.read_sentiment(folder / "archive.zip"),
        (DataError,),
        is_text=False,
        bombs=_sentiment_bombs,
    ),
    "tar": Kind(
        "archive.zip",
        _make_sentiment,
        lambda folder: sentiment.read_sentiment(folder / "archive.zip"),
        (DataError,),
        is_text=False,
        packed=_pack_sentiment,
    ),
}

_WORDS = [
    *(b"NaN", b"Infinity", b"-inf", b"1e999", b"null", b"true", b"[", b"]", b"{", b"}", b'"', b"'"),
    *(b'"""', b",", b":", b"=", b".", b"#", b"\n", b"\\", b"\\ud800", b"\xff", b"\xed\xa0\x80", b"\0"),
    *(b"\xef\xbb\xbf", b"-1", b"0", b"2.5", b"1" * 5000, b"0." + b"1" * 5000, b"[" * 2000, b'{"":' * 2000),
    *(b"a." * 2000, b"\n" * 50, b"9" * 19, b"0x" + b"f" * 999),
]
_VALUE = re.compile(rb'"[^"\n]*"|-?[0-9][0-9.e+-]*|null|true|false')
_VALUES = [
    *(
        b"null",
        b"true",
        b"0",
        b"-1",
        b"1",
        b"2",
        b"0.5",
        b"-0.0",
        b"1e308",
        b"1e-320",
        b"9223372036854775808",
    ),
    *(
        b'""',
        b'"x"',
        b'"a\\nb"',
        b'"\\ud800"',
        b'"lr"',
        b'"rademacher"',
        b"[]",
        b"[1]",
        b"{}",
        b'{"a": 1}',
        b"NaN",
    ),
    *(b'"' + b"x" * 3000 + b'"', b"1" * 99, b"18446744073709551615", b'"\xe2\x80\xa8"', b'"\\u0000"'),
]
_NUMBERS = [
    *(b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\xff\xff\xff\x7f", b"\0\0\xf0\x7f", b"\0\0\xf8\x7f"),
    *(b"\1\0\0\0", b"\0\0\0\0\0\0\xf0\x7f", b"\xff" * 8),
]


def damaged(kind: Kind, whole: list[bytes], number: int) -> bytes:
    """The file of this number: one to four changes, the same at every call."""
    generator = np.random.default_rng([number, len(kind.name)])
    data = bytearray(whole[int(generator.integers(len(whole)))])
    for _ in range(int(generator.integers(1, 5))):
        at = int(generator.integers(len(data) + 1))
        to = min(len(data), at + int(generator.integers(1, 40)))
        inserts = _WORDS if kind.is_text else _NUMBERS
        word = inserts[int(generator.integers(len(inserts)))]
        change = int(generator.integers(14 if kind.is_text else 7))
        if change == 0 and at < len(data):
            data[at] ^= 1 << int(generator.integers(8))
        elif change == 1:
            data[at : at + 1] = bytes([int(generator.integers(256))])
        elif change == 2:
            data[at:to] = b""
        elif change == 3:
            data[at : at + (len(word) if not kind.is_text else 0)] = word
        elif change == 4:
            data[at:to] = word
        elif change == 5:
            data[at:at] = data[at:to] * int(generator.integers(1, 4))
        elif change >= 7:  # a value by another: the rest of the document stays one
            values = list(_VALUE.finditer(data))
            found = values[int(generator.integers(len(values)))] if values else None
            if found is not None:
                data[found.start() : found.end()] = _VALUES[int(generator.integers(len(_VALUES)))]
        elif generator.integers(4) == 0:
            del data[at:]
    if kind.sealed is not None and generator.integers(2):
        return kind.sealed(bytes(data))
    return kind.packed(bytes(data))


def _status(name: str) -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024 / 1e6


def _reset_peak() -> Callable[[], float]:
    """A function that says the peak in MB from here on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return lambda: _status("VmHWM")
    except OSError:  # not allowed here: the peak of the whole life, which is that of the imports or more
        return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def meet(kind: Kind, contents: Iterable[bytes | None], folder: Path) -> dict[str, Any]:
    """Reads each file, None for the one that lies there; errors of types that are not stated go through."""
    counts: Counter[str] = Counter()
    peak = _reset_peak()
    before = _status("VmRSS")
    for number, content in enumerate(contents):
        if content is not None:
            (folder / kind.name).write_bytes(content)
        try:
            kind.read(folder)
            counts["accepted"] += 1
        except kind.errors as error:
            counts[type(error).__name__] += 1
            if len(str(error)) > 1000 or "\n" in str(error):
                raise AssertionError(f"an error of {len(str(error))} characters or several lines") from error
        except BaseException:
            print(f"{kind.name}, file {number} of these: {(content or b'')[:400]!r}", file=sys.stderr)
            raise
    return {"counts": dict(counts), "peak_mb": peak() - before}


def meet_damaged(name: str, first: int, count: int, folder: Path) -> dict[str, Any]:
    """Damaged files FIRST to FIRST + COUNT - 1 of a kind, after a whole one of each."""
    kind = KINDS[name]
    whole = kind.makes()
    path = folder / name
    path.mkdir(parents=True)
    assert "accepted" in meet(kind, [kind.packed(content) for content in whole], path)["counts"], name
    return meet(kind, (damaged(kind, whole, number) for number in range(first, first + count)), path)


def make_bombs(name: str, folder: Path) -> None:
    """Writes them, each into a folder of its own."""
    kind = KINDS[name]
    for number, content in enumerate(kind.bombs()):
        path = folder / name / str(number)
        path.mkdir(parents=True)
        (path / kind.name).write_bytes(content)


def meet_bomb(name: str, path: Path, whole: Path) -> dict[str, Any]:
    """One of them, in this process, which has read a whole file before."""
    kind = KINDS[name]
    whole.mkdir(parents=True, exist_ok=True)
    meet(kind, [kind.packed(kind.makes()[0])], whole)
    return meet(kind, [None], path)


def main(job: str, folder: Path, names: list[str], first: int, count: int) -> None:
    for name in names:
        if job == "make":
            make_bombs(name, folder)
        elif job == "damage":
            print(json.dumps({"kind": name, **meet_damaged(name, first, count, folder)}), flush=True)
        else:
            for path in sorted((folder / name).iterdir()):
                child = os.fork()
                if child == 0:
                    try:
                        found = meet_bomb(name, path, folder / "whole" / name)
                        print(json.dumps({"kind": name, "bomb": path.name, **found}), flush=True)
                        os._exit(0)
                    finally:
                        traceback.print_exc()
                        os._exit(1)
                if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
                    sys.exit(f"bomb {path.name} of {name} is no error of the types that are stated")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=("damage", "make", "bombs"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", choices=KINDS)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    chosen = parser.parse_args()
    main(chosen.job, chosen.folder, chosen.names, chosen.first, chosen.count)
