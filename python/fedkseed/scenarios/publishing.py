"""`fedkseed publish`: the ledger of a run, or of a trainer's output folder, as a folder to publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedkseed.documents import DocumentError, shown
from fedkseed.ledger import origin as origin_file
from fedkseed.ledger.ledger import Ledger
from fedkseed.ledger.origin import Origin
from fedkseed.ledger.publish import Publication, write_published
from fedkseed.ledger.published import PublishedError
from fedkseed.ledger.signature import PrivateKey
from fedkseed.ledger.tuned_model import find_asking
from fedkseed.scenarios.report import data_title
from fedkseed.scenarios.run import SUMMARY, read_summary
from fedkseed.simulation.round_log import read_rounds
from fedkseed.simulation.run_folder import (
    BASELINE,
    BEST,
    LEDGER,
    METRICS,
    SETTINGS,
    RunFolderError,
    object_in,
)

#: Settings of a run that its card tells.
_SETTINGS = ("num_local_steps", "batch_size", "lr", "eps", "sampling", "weighting")


def publish(
    run: str | Path,
    folder: str | Path,
    *,
    best: bool = False,
    base: str | Path = "",
    license: str | None = None,
    key: PrivateKey | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Publication:
    """Writes the ledger of a run, with a card, as a new folder that holds nothing of the weights.

    Args:
        run: folder of a run of `fedkseed simulate`, or any folder with a ledger and its origin.json (what a
            trainer wrote, or a published one, to sign it).
        folder: new or empty.
        best: of a run, its round with the least held-out loss, not the last.
        base: built-in name, folder or hub id of the base, if it lies elsewhere than the run's settings or
            the origin say, or under a name that others can load it by.
        license: of the base, an identifier of the hub's; None: what the base's own card says.
        key: signs the ledger.
        trust_remote_code: whether code that lies beside the base's weights may run.
        say: told what is being done, a line each.

    Raises:
        PublishedError: a folder without a ledger, or whose files do not belong together.
        OriginError, RunFolderError, AskingError: a damaged file.
        FolderNotEmptyError, LedgerError, SigningKeyError, IdentityError, ModelError, FetchError,
            MissingExtraError, OSError: as `write_published`.
    """
    run = Path(run)
    is_run = (run / SETTINGS).is_file()
    if not is_run and not (run / origin_file.FILE).is_file():
        found = "nothing there" if not run.exists() else "a file"
        if run.is_dir():
            found = f"a folder with neither {SETTINGS} nor {origin_file.FILE}"
            if (run / LEDGER).is_file():
                found += ": whoever wrote its ledger could not name the base"
        raise PublishedError(
            f"expected a run's folder ({SETTINGS}, {LEDGER}) or one with a ledger and {origin_file.FILE} at "
            f"{run}, got {found}"
        )
    if best and not is_run:
        raise PublishedError(f"expected a run's folder with --best, got {run}, which is none")
    path = run / (BEST if best else LEDGER)
    if not path.is_file():
        reason = "no round of it is complete" if is_run else "its Trainer has not saved: call save_model()"
        if (run / BASELINE).exists():
            reason = "a run of another method than fedkseed has none"
        raise PublishedError(f"expected a ledger to publish, {path.name}, in {run}, got none: {reason}")
    ledger = Ledger.load(path)
    if is_run:
        named, origin, content = _of_run(run, ledger, best, base)
    else:
        origin, content = Origin.read(run), None
        content = None if origin.hashes is None else origin.hashes.tuned
        named = base or origin.loaded_by or ""
        if not named:
            raise PublishedError(
                f"expected --base, got none: {origin_file.FILE} of {run} names a folder {origin.base}, not "
                "where it lies"
            )
        if base:
            of_base = Origin.of(base)
            origin = replace(
                origin, base=of_base.base, source=of_base.source, revision=of_base.revision, license=None
            )
    if license is not None:
        origin = replace(origin, license=license)
    return write_published(
        ledger,
        origin,
        folder,
        named,
        asking=find_asking(ledger, run),
        adapter=run,
        key=key,
        trust_remote_code=trust_remote_code,
        content=content,
        say=say,
    )


def _of_run(run: Path, ledger: Ledger, best: bool, base: str | Path) -> tuple[str | Path, Origin, str | None]:
    """(base, origin, content of the tuned model if it is known) of a run's ledger."""
    settings = object_in(run / SETTINGS, "the settings of a run")
    named = base or _text(settings, "model", run)
    num_rounds = _num_rounds(ledger, run)
    rows = list(read_rounds(run / METRICS, num_rounds=num_rounds))
    facts: dict[str, Any] = {
        "num_rounds": num_rounds,
        "num_clients": len({client for row in rows for client in row["clients"]}),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "bytes_up": sum(row["bytes_up"] for row in rows),
        **{name: settings[name] for name in _SETTINGS if name in settings},
    }
    data = _text(settings, "data", run)
    origin = Origin.of(named, data=data_title(data) if data else "", facts=facts)
    summary = _summary(run)
    digest = summary.get("data")
    if isinstance(digest, dict) and isinstance(digest.get("rows"), str):
        origin = replace(origin, data_digest=digest["rows"])
    rounds_of_summary = summary.get("settings", {}).get("num_rounds")
    content = summary.get("content") if not best and rounds_of_summary == num_rounds else None
    return named, origin, content if isinstance(content, str) else None


def _num_rounds(ledger: Ledger, run: Path) -> int:
    """The rounds that the ledger says it is the sum of."""
    text = ledger.notes.get("num_rounds", "")
    if not text.isdecimal() or len(text) > 9:
        raise PublishedError(f"expected a number of rounds in the ledger of {run}, got {shown(text)!r}")
    return int(text)


def _summary(run: Path) -> dict[str, Any]:
    """What a finished run left; nothing of one that is not."""
    try:
        found = read_summary(run)
    except FileNotFoundError:
        return {}
    except (OSError, DocumentError) as error:
        raise RunFolderError(f"expected what a run came to in {run / SUMMARY}, got: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("settings", {}), dict):
        raise RunFolderError(f"expected what a run came to in {run / SUMMARY}, got something else")
    return found


def _text(settings: Mapping[str, Any], name: str, run: Path) -> str:
    value = settings.get(name, "")
    if not isinstance(value, str):
        raise RunFolderError(f"expected a text as {name} in {run / SETTINGS}, got {shown(value)}")
    return value
