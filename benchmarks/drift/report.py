"""The Markdown table and the plot of a result of `benchmarks.drift`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import pages
from fedkseed._extras import require_extra
from fedkseed.files import write_atomically

Document = Mapping[str, Any]

#: What a page has before the part that is made from a result.
MARK = "<!-- made by benchmarks.drift.report from results/drift.json -->"
_CAPTION = "Distance from exact arithmetic against local steps, a panel for each dtype"


def table(document: Document) -> str:
    """One row for each dtype and algorithm; the columns are defined in docs/numerics.md."""
    lines = [
        "| weights | algorithm | distance | kept | error of g | walked - ledger |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(document["rows"], key=lambda row: document["settings"]["dtypes"].index(row["dtype"])):
        losses = row["held_out_loss"]
        cells = [
            row["dtype"],
            row["algorithm"],
            _number(row["distance"][-1]),
            f"{row['kept']:.1%}",
            f"{row['g']['relative_error']:.2g}",
            f"{losses['walked'] - losses['ledger']:+.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def facts(document: Document) -> str:
    """What was run, where, and the losses that the table's last column compares."""
    settings = document["settings"]
    lines = [
        "| | |",
        "| --- | --- |",
        f"| model | {settings['model']}, weights of {' and '.join(settings['dtypes'])} |",
        f"| local steps | {settings['num_steps']}, lr {settings['lr']:g}, eps {settings['eps']:g}, "
        f"batches of 1 x {settings['num_tokens']} tokens |",
        f"| error of g | over the first {settings['num_g_steps']} steps |",
        f"| held-out loss | on {settings['num_held_out']} x {settings['num_tokens']} tokens |",
    ]
    lines += [
        f"| run | {run['cpu']}, torch {run['torch']}, fedkseed-kernels {run['fedkseed_kernels']}, "
        f"commit {run['commit']}, {run['date']} |"
        for run in document["runs"]
    ]
    for dtype in settings["dtypes"]:
        losses = {
            (row["algorithm"] == "official"): row["held_out_loss"]
            for row in document["rows"]
            if row["dtype"] == dtype
        }
        lines.append(
            f"| {dtype}: loss at w0; ledger; official ledger | {losses[False]['start']:.5f}; "
            f"{losses[False]['ledger']:.5f}; {losses[True]['ledger']:.5f} |"
        )
    return "\n".join(lines)


def with_result(page: str, document: Document) -> str:
    """The page with everything between its marks made from the document.

    Raises:
        ValueError: a page without the marks.
    """
    shown = (table(document), f"![{_CAPTION}](numerics.png)", facts(document))
    return pages.with_part(page, MARK, "\n\n".join(shown))


def draw(document: Document, path: Path) -> None:
    """Distance against steps as a PNG, a panel for each dtype.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_extra("plot", "matplotlib")
    from matplotlib.figure import Figure

    settings = document["settings"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, len(settings["dtypes"]), sharey=True, squeeze=False)[0]
    for axes, dtype in zip(panels, settings["dtypes"], strict=True):
        for row in document["rows"]:
            if row["dtype"] == dtype:
                axes.plot(
                    settings["points"], row["distance"], marker="o", markersize=3, label=row["algorithm"]
                )
        axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=f"{dtype} weights", xlabel="local steps", yscale="log")
    panels[0].set_ylabel("||w - w_exact|| / ||w_exact - w0||")
    panels[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=100)


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Prints the table of a result file, puts it into the page, draws the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, help="JSON written by benchmarks.drift")
    parser.add_argument("--page", type=Path, help="docs/numerics.md: its part between the marks is made anew")
    parser.add_argument("--plot", type=Path, help="the PNG")
    options = parser.parse_args()
    document = json.loads(options.result.read_text())
    print(table(document))
    if options.page is not None:
        write_atomically(options.page, with_result(options.page.read_text(), document).encode())
    if options.plot is not None:
        draw(document, options.plot)


if __name__ == "__main__":
    main()
