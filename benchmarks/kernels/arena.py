"""What the cases of one run share, and the samples they have taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common.measure import Contestant, interleave
from benchmarks.kernels.cases import Case, CopyBuffers, contestants
from benchmarks.kernels.settings import Settings
from benchmarks.kernels.weights import make_weights


class Arena:
    """The parameters that all contestants share, and the samples of the cases run so far."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.weights = make_weights(settings.model, settings.torch_dtype)
        self.buffers = CopyBuffers(settings.copy_bytes)
        self._results: dict[str, dict[str, tuple[Contestant, list[float]]]] = {}

    def result(self, case: Case, name: str) -> tuple[Contestant, list[float]]:
        """A contestant and its samples in seconds; a case's first request measures all its contestants."""
        if case.id not in self._results:
            everyone = contestants(case, self.weights, self.buffers, self.settings)
            samples = interleave(everyone, self.weights.reset_)
            self._results[case.id] = {c.name: (c, samples[c.name]) for c in everyone}
        return self._results[case.id][name]


def row(case: Case, contestant: Contestant, samples: Sequence[float], arena: Arena) -> dict[str, Any]:
    """What a result file holds of one contestant in one case; `samples` in seconds."""
    is_copy = contestant.kind == "copy"
    num_elements = arena.weights.num_elements
    return {
        "case": case.id,
        "title": case.title,
        "operation": case.operation,
        "family": case.family,
        "num_seeds": case.num_seeds,
        "contestant": contestant.name,
        "kind": contestant.kind,
        "isa": contestant.isa,
        "answer_checked": contestant.check_before is not None,
        "samples": list(samples),
        "repeats": contestant.repeats,
        "num_normals": 0 if is_copy else num_elements * case.num_seeds,
        "num_bytes": arena.buffers.num_bytes_moved if is_copy else 2 * arena.weights.num_bytes,
    }
