"""Command-line options of the benchmark suites and the things that they share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.common.constants import DTYPES
from benchmarks.kernels.arena import Arena
from benchmarks.kernels.cases import cases
from benchmarks.kernels.settings import Settings, make_settings


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernel benchmarks")
    group.addoption("--bench-quick", action="store_true", help="tiny shapes and few samples: a smoke test")
    group.addoption("--bench-dtype", choices=sorted(DTYPES), default=Settings.dtype)
    group.addoption("--bench-threads", type=int, default=Settings.num_threads)
    group.addoption("--bench-seeds", default="", help="values of K, separated by commas")


def settings_of(config: pytest.Config) -> Settings:
    """The settings that the options ask for."""
    return make_settings(
        quick=config.getoption("--bench-quick"),
        dtype=config.getoption("--bench-dtype"),
        num_threads=config.getoption("--bench-threads"),
        seeds=config.getoption("--bench-seeds"),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each contestant of each case."""
    if {"case", "name"} <= set(metafunc.fixturenames):
        pairs = [
            (case, name) for case in cases(settings_of(metafunc.config)) for name in case.contestant_names()
        ]
        metafunc.parametrize(("case", "name"), pairs, ids=[f"{case.id}: {name}" for case, name in pairs])


@pytest.fixture(scope="session")
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    """Weights, copy buffers and the samples taken so far, for the whole run."""
    settings = settings_of(request.config)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.num_threads)
    with torch.no_grad():
        yield Arena(settings)
    torch.set_num_threads(threads_before)
