"""A process that runs jobs of one part: a name a line comes in, a line of JSON for each goes out."""

from __future__ import annotations

import json
import sys
import time
import traceback
from typing import Any

from ptx.calls import Verdict
from ptx.jobs import Job, Part, jobs_of, open_driver
from ptx.log import as_ranges


def run_job(driver: Any, job: Job) -> dict[str, Any]:
    """The outcome of one job, with the kernels that it launched and the blocks of them that never ran."""
    began, launches, instructions = time.perf_counter(), len(driver.launches), driver.num_instructions
    for kernel in driver.kernels().values():
        kernel.covered[:] = bytes(len(kernel.covered))
    try:
        verdict = job.run(driver)
    except Exception:
        verdict = Verdict("error", traceback.format_exc())
    launched = dict.fromkeys(name for name, _, _ in driver.launches[launches:])
    kernels = {}
    for name, kernel in driver.kernels().items():
        if name in launched:
            missed = as_ranges(i for i, ran in enumerate(kernel.covered) if not ran)
            kernels[name] = [kernel.source.digest, len(kernel.covered), missed, dict(kernel.notes)]
    return {
        "verdict": verdict.word,
        "detail": verdict.detail,
        "seconds": round(time.perf_counter() - began, 1),
        "instructions": driver.num_instructions - instructions,
        "kernels": kernels,
    }


def main(part: Part) -> None:
    jobs = jobs_of(part)
    out, sys.stdout = sys.stdout, sys.stderr
    with open_driver(part) as driver:
        for line in sys.stdin:
            outcome = run_job(driver, jobs[line.rstrip("\n")])
            print(json.dumps(outcome), file=out, flush=True)


if __name__ == "__main__":
    main(Part(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
