"""The results in docs/experiments.md, made from committed files: `python -m benchmarks.experiments.page`.

results/scenarios/NAME.json is what `fedkseed compare --json` wrote of the runs of scenario NAME; a Markdown
file of the same name beside it, if it is there, says what is to be said of them; results/traffic.json is from
`benchmarks.traffic`. Text outside of the marks is the page's own. The command also draws the pictures,
docs/experiments/NAME.png.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import pages
from benchmarks.common.places import REPOSITORY, RESULTS_FOLDER
from benchmarks.traffic import RESULT as TRAFFIC
from benchmarks.traffic import saved
from fedkseed.documents import shown
from fedkseed.files import write_atomically
from fedkseed.scenarios.experiments.comparison import Document, read_document
from fedkseed.scenarios.experiments.comparison_picture import can_be_drawn, draw_comparison
from fedkseed.scenarios.experiments.comparison_table import Table, bytes_text, render, rendered
from fedkseed.scenarios.experiments.scenario import Scenario, library

PAGE = REPOSITORY / "docs" / "experiments.md"
PICTURES = REPOSITORY / "docs" / "experiments"
RESULTS = RESULTS_FOLDER / "scenarios"
SCENARIOS_MARK = "<!-- scenarios: made by benchmarks.experiments.page from results/scenarios/ -->"
TRAFFIC_MARK = "<!-- bytes: made by benchmarks.experiments.page from results/traffic.json -->"
#: Settings that a reader of a table asks for first.
_SHOWN_SETTINGS = (
    "num_rounds",
    "clients_per_round",
    "num_local_steps",
    "batch_size",
    "num_seeds",
    "lr",
    "eps",
    "family",
    "weighting",
    "template",
    "dtype",
    "max_length",
)
_METHODS = {"fedkseed": "FedKSeed", "fedit": "FedIT, adapters in float32", "fedavg": "FedAvg, all weights"}


def library_titles() -> dict[str, str]:
    """The scenarios that come with the package, by name, and their titles."""
    return {name: Scenario.read(path).title for name, path in library().items()}


def measured() -> dict[str, Document]:
    """The committed results by the names of their scenarios."""
    return {path.stem: read_document(path) for path in sorted(RESULTS.glob("*.json"))}


def scenarios_part(results: Mapping[str, Document], titles: Mapping[str, str]) -> str:
    """A section of each scenario that has results, and the names of those that have none.

    Args:
        results: by the names of their scenarios.
        titles: of all scenarios.
    """
    parts = [_section(name, document, titles.get(name, "")) for name, document in results.items()]
    left = {name: title for name, title in titles.items() if name not in results}
    if left:
        parts.append(
            "### Not measured yet\n\nThese can be run, and nobody has committed a result:\n\n"
            + "\n".join(f"* `{name}`: {title}" for name, title in left.items())
        )
    return "\n\n".join(parts) or "Nothing has been measured yet."


def _section(name: str, document: Document, title: str) -> str:
    environment, settings = document["environment"], document["settings"]
    shared = [f"`{key}` {_value_text(settings[key])}" for key in _SHOWN_SETTINGS if key in settings]
    parts = [
        f"### {name}",
        f"{title or 'A scenario of its own file'}. Model: {settings.get('model', 'several')}, "
        f"{document['model']['num_parameters']:,} parameters. Written on {environment['date']} by version "
        f"{environment['fedkseed_kernels']}; to run it again: `fedkseed scenarios run {name}`.",
        f"Settings of all variants, beside those in its file: {', '.join(shared)}.",
        "\n".join(map(_variant_line, document["variants"])),
    ]
    parts.append(rendered(document, "markdown"))
    remarks = RESULTS / f"{name}.md"
    if remarks.is_file():
        parts.append(remarks.read_text("utf-8").strip())
    if can_be_drawn(document):
        parts.append(f"![Scores of {name} over rounds, forward passes and bytes](experiments/{name}.png)")
    return "\n\n".join(parts)


def _variant_line(entry: Mapping[str, Any]) -> str:
    """A variant with the settings in which it differs from others."""
    differing = ", ".join(
        f"`{key}` {_value_text(value)}" for key, value in entry["settings"].items() if value != ""
    )
    said = [text for text in (entry["title"], differing) if text]
    return f"* `{entry['name']}`: {'; '.join(said) or 'as above'}"


def _value_text(value: Any) -> str:
    """A setting for a reader: what is rounded to fp32 has no digits beyond it."""
    return shown(float(f"{value:.7g}") if isinstance(value, float) else value)


def traffic_part(traffic: Mapping[str, Any]) -> str:
    """The bytes of a client and round by method.

    Args:
        traffic: the content of results/traffic.json.
    """
    rows = [
        (
            ", ".join(filter(None, (_METHODS[row["method"]], row.get("dtype")))),
            f"{row['num_values']:,}",
            f"{row['bytes_down']:,}",
            f"{row['bytes_up']:,}",
            bytes_text(row["bytes"]),
            f"{100 * share:.3f} %" if share else "-",
        )
        for row, share in zip(traffic["rows"], saved(traffic["rows"]), strict=True)
    ]
    title = (
        f"Bytes of one client in one round, {traffic['model']}, K = {traffic['num_seeds']:,}, "
        f"{traffic['num_local_steps']} local steps"
    )
    head = ("", "numbers", "bytes down", "bytes up", "both ways", "FedKSeed sends less by")
    return render(Table(title, head, tuple(rows)), "markdown")


def with_results(page: str) -> str:
    """The page with its parts made from the committed results."""
    page = pages.with_part(page, SCENARIOS_MARK, scenarios_part(measured(), library_titles()))
    traffic = traffic_part(json.loads(TRAFFIC.read_bytes())) if TRAFFIC.exists() else "Not measured yet."
    return pages.with_part(page, TRAFFIC_MARK, traffic)


def picture_of(name: str) -> Path:
    """The file of a scenario's picture."""
    return PICTURES / f"{name}.png"


def main() -> None:
    """Draws the pictures and writes the results into the page."""
    titles = library_titles()
    for name, document in measured().items():
        if can_be_drawn(document):
            PICTURES.mkdir(exist_ok=True)
            draw_comparison(document, picture_of(name), f"{name}: {titles[name]}" if name in titles else name)
    write_atomically(PAGE, with_results(PAGE.read_text("utf-8")).encode())


if __name__ == "__main__":
    main()
