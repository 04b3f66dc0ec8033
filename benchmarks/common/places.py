"""Where things are. Nothing is imported here: processes that need no torch need this."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS_FOLDER = REPOSITORY / "benchmarks" / "results"
