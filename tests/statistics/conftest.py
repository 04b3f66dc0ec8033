"""The judge of a family of checks, and the table of what was seen.

This folder has no __init__.py on purpose: it must not become a package named like the standard library's
`statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import thresholds
from thresholds import Check, Judge


@dataclass(frozen=True)
class Verdict:
    """What one family came to, in standard errors."""

    num_comparisons: int
    limit: float
    largest: float
    label: str


FAMILIES = pytest.StashKey[dict[str, Verdict]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAMILIES] = {}


@pytest.fixture
def judge(request: pytest.FixtureRequest) -> Judge:
    """Fails a family of checks with a comparison beyond its limit; each family is judged once a run."""
    families = request.config.stash[FAMILIES]

    def judge_family(family: str, checks: Sequence[Check]) -> None:
        assert family not in families, f"family {family!r} is judged twice: Bonferroni counts it once"
        largest = max(checks, key=lambda check: float(np.max(check.sigmas)))
        families[family] = Verdict(
            sum(check.sigmas.size for check in checks),
            thresholds.family_limit(checks),
            float(np.max(largest.sigmas)),
            largest.label,
        )
        assert len(families) <= thresholds.NUM_FAMILIES
        violations = thresholds.violations(checks)
        assert not violations, "\n".join([family, *violations])

    return judge_family


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    families = config.stash[FAMILIES]
    if not families or config.get_verbosity() < 1:
        return
    terminalreporter.section("deviations, in standard errors")
    terminalreporter.write_line(f"{'family':<34} {'comparisons':>11} {'limit':>6} {'largest':>8}  of")
    for family, seen in families.items():
        terminalreporter.write_line(
            f"{family:<34} {seen.num_comparisons:>11,} {seen.limit:>6.2f} {seen.largest:>8.2f}  {seen.label}"
        )
