"""Self-tests: golden cases are the reference's, a first call runs them once, failures are refused aloud."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.self_tests import another_process, first_process
from torch._subclasses.fake_tensor import FakeTensorMode

import fedkseed_kernels as fk
from fedkseed import cli
from fedkseed_kernels import dispatch
from fedkseed_kernels.backends import native_cpu, native_cuda, reference
from fedkseed_kernels.contract import reference as contract
from fedkseed_kernels.operands import Operands, Terms
from fedkseed_kernels.self_test import cases, gate, remembered, run
from fedkseed_kernels.self_test.arena import Arena
from fedkseed_kernels.self_test.cases import Call, Case

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(
    native_cpu.unavailable() is not None, reason="tests/test_native.py says why"
)
DIGESTS: dict[str, dict[str, str]] = json.loads(Path(remembered.DIGESTS_PATH).read_bytes())


@pytest.fixture(autouse=True)
def _no_verdicts(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that knows of no self-test, with an empty cache folder."""
    first_process(monkeypatch)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kind of every self-test that runs from now on."""
    kinds: list[str] = []
    original = run.compare

    def compare(seed_axpy: Any, kind: str, device: torch.device, writes_fp32: bool) -> run.Report:
        kinds.append(kind)
        return original(seed_axpy, kind, device, writes_fp32)

    monkeypatch.setattr(run, "compare", compare)
    return kinds


@pytest.fixture
def other_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A case whose expected digest is another: what computes rightly fails it."""
    case = "rademacher, 2 terms, pair, nearest, bfloat16, strided"
    changed = {kind: dict(digests) for kind, digests in DIGESTS.items()}
    changed["processor"][case] = "0123456789abcdef"
    path = tmp_path / "digests.json"
    path.write_text(json.dumps(changed))
    monkeypatch.setattr(run, "DIGESTS_PATH", str(path))
    return case


# --- the golden cases


def _digests(call: Call, kind: str) -> dict[str, str]:
    return Arena(call, call.cases(kind), kind, CPU).run(reference.seed_axpy)


@pytest.mark.few(16)
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("call", list(cases.calls()), ids=lambda call: "-".join(call).replace(" ", "_"))
def test_digests_are_the_references(call: Call, kind: str) -> None:
    found = _digests(call, kind)
    assert len(found) == len(call.cases(kind))
    assert found == {name: DIGESTS[kind][name] for name in found}


@pytest.mark.parametrize("kind", cases.KINDS)
def test_the_file_holds_the_golden_cases_and_no_others(kind: str) -> None:
    names = [call.name_of(case) for call in cases.calls() for case in call.cases(kind)]
    assert list(DIGESTS[kind]) == names
    assert len(set(names)) == len(names)


@needs_native
@pytest.mark.parametrize("kind", cases.KINDS)
def test_every_instruction_set_passes(kind: str) -> None:
    for isa in native_cpu.usable_isas():
        report = run.compare(lambda o, t, isa=isa: native_cpu.seed_axpy(o, t, isa), kind, CPU, True)
        assert report == (len(DIGESTS[kind]), [])


@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_call_that_writes_nothing_has_other_digests(kind: str) -> None:
    report = run.compare(lambda operands, terms: None, kind, CPU, True)
    assert len(report.mismatches) == report.num_cases == len(DIGESTS[kind])


@pytest.mark.few(4)
@pytest.mark.parametrize("dtype", contract.COMPENSATED_DTYPES)
@pytest.mark.parametrize("terms", ["1 term", "2 terms", "70 terms"])
@pytest.mark.parametrize("form", ["in place", "pair"])
def test_results_of_16_bits_show_the_last_places_of_the_noise(
    dtype: str, terms: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each kernel has constants of its own; SQRT_TWO matters to half of the noise."""
    call, case = Call("gaussian", terms, form, "nearest"), Case(dtype, "flat")
    monkeypatch.setattr(contract, "SQRT_TWO", np.nextafter(contract.SQRT_TWO, np.float32(2)))
    ((name, digest),) = Arena(call, [case], "gpu", CPU).run(reference.seed_axpy).items()
    assert digest != DIGESTS["gpu"][name]


def test_a_backend_that_writes_no_fp32_is_not_asked_for_it() -> None:
    report = run.compare(lambda operands, terms: None, "gpu", CPU, False)
    assert report.num_cases == sum(", wide, " not in name for name in DIGESTS["gpu"])


def test_a_write_outside_of_the_outputs_is_seen() -> None:
    call = Call("gaussian", "1 term", "pair", "nearest")

    def in_a_gap(operands: Operands, terms: Terms) -> None:
        reference.seed_axpy(operands, terms)
        strided = operands.outs.tensors[-1]  # every second element
        strided.as_strided((1,), (1,), strided.storage_offset() + 1).zero_()

    found = Arena(call, call.cases("processor"), "processor", CPU).run(in_a_gap)
    assert {name for name, digest in found.items() if digest != DIGESTS["processor"][name]} == {
        "gaussian, 1 term, pair, nearest, float64, strided"
    }


def test_nan_of_any_payload_have_one_digest() -> None:
    call = Call("gaussian", "unit term", "noise", "nearest")
    found = []
    for sign_and_payload in (0x7FC00000, 0xFFC00001, 0x7F800001):

        def put(operands: Operands, terms: Terms, bits: int = sign_and_payload) -> None:
            operands.outs.tensors[0].view(torch.int32)[5] = np.uint32(bits).view(np.int32).item()

        found.append(Arena(call, call.cases("processor"), "processor", CPU).run(put))
    assert found[0] == found[1] == found[2]


def _one_place_up_and_down() -> Iterator[Any]:
    """Each fp32 constant of the Gaussian transform, one unit in its last place away on either side."""
    for name, value in vars(contract).items():
        several = isinstance(value, tuple) and all(isinstance(v, np.float32) for v in value)
        numbers = list(value) if several else [value] if isinstance(value, np.float32) else []
        for position, number in enumerate(numbers):
            for towards in (np.float32(np.inf), np.float32(-np.inf)):
                changed = [*numbers]
                changed[position] = np.nextafter(number, towards)
                yield pytest.param(name, tuple(changed) if several else changed[0], id=f"{name}{position}")


@pytest.mark.parametrize(("name", "changed"), list(_one_place_up_and_down()))
def test_the_last_place_of_every_constant_matters(
    name: str, changed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, name, changed)
    call = Call("gaussian", "unit term", "noise", "nearest")
    found = _digests(call, "processor")
    first = next(iter(found))
    assert found[first] != DIGESTS["processor"][first]


# --- when it runs


@needs_native
def test_the_first_call_runs_it_once(runs: list[str]) -> None:
    for _ in range(3):
        fk.perturb_(torch.zeros(4), 1, 0.5)
    assert runs == ["processor"]
    with fk.cpu_isa("baseline"):
        fk.perturb_(torch.zeros(4), 1, 0.5)
    assert runs == ["processor"] * 2
    with fk.backend("reference"):
        fk.perturb_(torch.zeros(4), 1, 0.5)
    assert runs == ["processor"] * 2


@needs_native
def test_questions_and_fake_tensors_run_none(runs: list[str]) -> None:
    assert fk.unavailable("native", "cpu") is None
    assert set(fk.info()["self_tests"].values()) == {gate.NOT_RUN}
    fk.normal(3, 1, device="meta")
    with FakeTensorMode():
        fk.perturb_(torch.zeros(4), torch.tensor(1), torch.tensor(0.5))
    assert runs == []
    assert gate.verdicts == {}


@needs_native
def test_what_passed_is_remembered_by_other_processes(
    runs: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fk.perturb_(torch.zeros(4), 1, 0.5)
    (entry,) = (cache / "self-tests").iterdir()
    best = f"native on cpu ({native_cpu.usable_isas()[-1]})"
    assert fk.info()["self_tests"][best] == gate.PASSED_NOW

    def again() -> int:
        another_process(monkeypatch)
        known = fk.info()["self_tests"][best]
        before = len(runs)
        fk.perturb_(torch.zeros(4), 1, 0.5)
        ran = len(runs) - before
        assert known == (gate.NOT_RUN if ran else gate.PASSED_BEFORE)
        return ran

    assert again() == 0
    for damage in (b"", entry.read_bytes()[:-1], entry.read_bytes() + b" ", b"\xff" * 200):
        entry.write_bytes(damage)
        assert again() == 1
        assert again() == 0
    other = remembered.DIGESTS_PATH + ".copy"
    monkeypatch.setattr(remembered, "DIGESTS_PATH", str(cache / "digests.json"))
    (cache / "digests.json").write_text("other cases")
    assert again() == 1, other
    assert again() == 0


@needs_native
def test_another_build_or_time_of_the_library_is_tested_anew(
    runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "libfedkseed_cpu.so"
    copy.write_bytes(native_cpu.LIBRARY_PATH.read_bytes())
    monkeypatch.setattr(native_cpu, "LIBRARY_PATH", copy)
    for time, num_runs in ((1, 1), (1, 1), (2, 2)):
        os.utime(copy, (time, time))
        another_process(monkeypatch)
        fk.perturb_(torch.zeros(4), 1, 0.5)
        assert len(runs) == num_runs


@needs_native
@pytest.mark.parametrize("what", ["a file", "no home", "read-only"])
def test_without_a_cache_folder_each_process_runs_it(
    what: str, runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "a file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FEDKSEED_CACHE", str(tmp_path / "file" / "cache"))
    elif what == "no home":
        monkeypatch.delenv("FEDKSEED_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        monkeypatch.setattr(Path, "write_bytes", _refuse)
    for num_runs in (1, 2):
        another_process(monkeypatch)
        fk.perturb_(torch.zeros(4), 1, 0.5)
        assert len(runs) == num_runs


def _refuse(path: Path, content: bytes) -> None:
    raise PermissionError(13, "Permission denied")


def test_the_cache_folder_is_named_by_three_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FEDKSEED_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert fk.cache_folder() == tmp_path / ".cache" / "fedkseed"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fk.cache_folder() == tmp_path / "xdg" / "fedkseed"
    monkeypatch.setenv("FEDKSEED_CACHE", str(tmp_path / "own"))
    assert fk.cache_folder() == tmp_path / "own"
    monkeypatch.setenv("FEDKSEED_CACHE", "~/own")
    assert fk.cache_folder() == tmp_path / "own"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(RuntimeError, match="expected a home folder for ~/own, got none; set FEDKSEED_CACHE"):
        fk.cache_folder()


@needs_native
def test_a_variable_switches_it_off(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gate.SELF_TEST_VARIABLE, "yes")
    weights = torch.ones(4)
    with pytest.raises(ValueError, match="expected FEDKSEED_SELF_TEST to be 0 or 1, got 'yes'"):
        fk.perturb_(weights, 1, 0.5)
    assert torch.equal(weights, torch.ones(4))
    monkeypatch.setenv(gate.SELF_TEST_VARIABLE, "0")
    fk.perturb_(weights, 1, 0.5)
    assert runs == []
    assert gate.SWITCHED_OFF in fk.info()["self_tests"].values()
    assert fk.info()["environment"][gate.SELF_TEST_VARIABLE] == "0"


@needs_native
def test_threads_that_come_first_at_once(runs: list[str]) -> None:
    num_threads = 4
    start = threading.Barrier(num_threads)
    results = [torch.zeros(5) for _ in range(num_threads)]

    def first_call(result: torch.Tensor) -> None:
        start.wait()
        fk.perturb_(result, 1, 0.5)

    threads = [threading.Thread(target=first_call, args=(result,)) for result in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, fk.normal(5, 1) * 0.5) for result in results)
    assert 1 <= len(runs) <= num_threads
    assert list(gate.verdicts.values()) == [gate.PASSED_NOW]


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_the_verdicts_of_its_parent(runs: list[str]) -> None:
    fk.perturb_(torch.zeros(4), 1, 0.5)
    if (child := os.fork()) == 0:
        try:
            result = torch.zeros(4)
            fk.perturb_(result, 1, 0.5)
            os._exit(0 if len(runs) == 1 and bool(result.any()) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- what a failure leads to


@needs_native
def test_an_explicit_backend_that_fails_raises_and_names_the_case(other_digest: str) -> None:
    weights = torch.ones(4)
    with fk.backend("native"):
        for _ in range(2):
            with pytest.raises(RuntimeError) as caught:
                fk.perturb_(weights, 1, 0.5)
    assert torch.equal(weights, torch.ones(4))
    got, num_cases = DIGESTS["processor"][other_digest], len(DIGESTS["processor"])
    assert str(caught.value) == (
        "FEDKSEED_BACKEND asks for native, which cannot be used: it fails its self-test on cpu: the case "
        f"'{other_digest}' has digest {got}, expected 0123456789abcdef; 1 of {num_cases} cases differ; "
        "reinstall, and if that does not help report the output of: fedkseed info --verify"
    )
    with fk.cpu_isa("baseline"), pytest.raises(RuntimeError, match=r"needs the native backend: .*cpu \(base"):
        fk.perturb_(weights, 1, 0.5)


@needs_native
def test_the_automatic_choice_goes_on_loudly(
    other_digest: str, runs: list[str], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = torch.zeros(4)
    with caplog.at_level(logging.INFO, logger="fedkseed_kernels"):
        for _ in range(3):
            fk.perturb_(weights, 1, 0.5)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in ("cpu tensors are served by NumPy", "slower", "native: it fails its self-test", other_digest):
        assert part in record.getMessage()
    assert torch.equal(weights, fk.normal(4, 1) * 0.5 * 3)
    assert runs == ["processor"]
    assert not (cache / "self-tests").exists()
    reason = fk.unavailable("native", "cpu")
    assert reason is not None
    assert other_digest in reason
    info = fk.info()
    assert info["cpu_backend"] == "reference"
    assert f"failed: {reason}" in info["self_tests"].values()


@needs_native
def test_verify_runs_all_that_is_usable_and_forgets_what_fails(
    runs: list[str],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):  # whatever is remembered
        assert cli.main(["info", "--verify"]) == 0
        printed = capsys.readouterr().out
        for isa in native_cpu.usable_isas():
            assert f"pass: native on cpu ({isa}): {len(DIGESTS['processor'])} cases equal the" in printed
    assert len(runs) == 2 * len(native_cpu.usable_isas()) == 2 * len(list((cache / "self-tests").iterdir()))

    def damaged(operands: Operands, terms: Terms, isa: str = "auto") -> None:
        if isa != "baseline":
            terms.alpha *= 1 + 2.0**-23
        original(operands, terms, isa)

    original = native_cpu.seed_axpy
    monkeypatch.setattr(native_cpu, "seed_axpy", damaged)
    expected = 1 if native_cpu.usable_isas() != ["baseline"] else 0
    assert cli.main(["info", "--verify", "--json"]) == expected
    results = json.loads(capsys.readouterr().out)["verified"]
    assert [result["status"] for result in results] == [
        "pass" if isa == "baseline" else "fail" for isa in native_cpu.usable_isas()
    ]
    assert len(list((cache / "self-tests").iterdir())) == 1


def test_backends_with_machine_code_have_a_self_test() -> None:
    assert {name for name, found in dispatch.TABLE["cpu"].items() if found.SELF_TEST} == {"native"}
    assert native_cpu.SELF_TEST is not None
    assert native_cuda.SELF_TEST is not None
    assert (native_cpu.SELF_TEST.kind, native_cuda.SELF_TEST.kind) == cases.KINDS
