"""Every optional package that is missing is named where it is used, with the extra that brings it."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fedkseed
from benchmarks.drift import report as drift_report
from benchmarks.kernels import __main__ as kernels
from benchmarks.machine_code import gate, sass
from benchmarks.models import workloads
from fedkseed import MissingExtraError, cli
from fedkseed.adapters import nvflare
from fedkseed.data import architectures, models, paper_rouge, sources, verified
from fedkseed.data.__main__ import main as fetch_all
from fedkseed.ledger import AdapterStart, adapter, signature
from fedkseed.ledger.publish import license_of
from fedkseed.ledger.published import commit_of
from fedkseed.scenarios import round_picture
from fedkseed.scenarios.baselines.lora import PROJECTIONS, add_adapters
from fedkseed.scenarios.baselines.settings import BaselineSettings
from fedkseed.scenarios.baselines.tensor_files import read_into, write_tensors
from fedkseed.scenarios.events import Events
from fedkseed.simulation.run_folder import LEDGER

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Names in the package index of packages that are imported under another one.
INDEX_NAMES = {"pytest_benchmark": "pytest-benchmark", "huggingface_hub": "huggingface-hub"}
#: A run of `fedkseed simulate`, and its model.
RUN, BASE = (Path(__file__).parent / "data" / "written_by_0_1" / name for name in ("simulate", "base"))


@dataclass(frozen=True)
class Use:
    """A call that needs a package of an extra."""

    extra: str
    package: str
    call: Callable[[], object]


def projections() -> torch.nn.Module:
    """A module with a layer of each of the names that adapters go beside."""
    return torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in PROJECTIONS})


def _signature() -> signature.Signature:
    return signature.Signature(bytes(32), bytes(64))


USES = {
    "load_causal_lm": Use("hf", "transformers", lambda: models.load_causal_lm("owner/name")),
    "load_causal_lm without safetensors": Use("hf", "safetensors", lambda: models.load_causal_lm("o/n")),
    "load_causal_lm_weights": Use("hf", "transformers", lambda: models.load_causal_lm_weights("owner/name")),
    "load_classifier": Use("hf", "transformers", lambda: models.load_classifier("owner/name")),
    "load_any": Use("hf", "transformers", lambda: models.load_any("owner/name")),
    "choose_class": Use(
        "hf", "transformers", lambda: architectures.choose_class("owner/name", False, ("causal",), False)
    ),
    "content of weights": Use("hf", "safetensors", lambda: verified.content_of(Path("model"))),
    "load_smollm2": Use("hf", "transformers", models.load_smollm2),
    "smollm2_folder": Use("hf", "gguf", models.smollm2_folder),
    "smollm2_folder without accelerate": Use("hf", "accelerate", models.smollm2_folder),
    "random llama": Use("hf", "transformers", lambda: workloads._random_llama("tiny", torch.float32, "cpu")),
    "sign": Use("sign", "cryptography", lambda: signature.sign(b"", "key.pem")),
    "public key": Use("sign", "cryptography", lambda: signature.public_key_bytes("key.pem")),
    "key pair": Use("sign", "cryptography", lambda: signature.make_key_pair("a.pem", "b.pem")),
    "check a signature": Use("sign", "cryptography", lambda: _signature().is_of(b"")),
    "parquet": Use("data", "pyarrow", lambda: sources.open_parquet(Path("rows.parquet"))),
    "hub": Use("data", "datasets", lambda: sources.open_source("hub:owner/name@main")),
    "plot": Use("plot", "matplotlib", lambda: round_picture.draw_rounds([], Path("plot.png"))),
    "plot of the drift": Use("plot", "matplotlib", lambda: drift_report.draw({}, Path("drift.png"))),
    "weights in a file": Use("hf", "safetensors", lambda: write_tensors(Path("a.safetensors"), {}, {})),
    "weights out of a file": Use("hf", "safetensors", lambda: read_into(Path("a.safetensors"), {})),
    "adapters": Use("scenarios", "peft", lambda: add_adapters(projections(), BaselineSettings(), 1)),
    "a published ledger of the hub": Use("hf", "huggingface_hub", lambda: fedkseed.load("owner/ledger")),
    "a base's card of the hub": Use("hf", "huggingface_hub", lambda: license_of("owner/base", "owner/base")),
    "a base's commit of the hub": Use("hf", "huggingface_hub", lambda: commit_of("owner/base")),
    "settings of an adapter": Use("scenarios", "peft", lambda: adapter.read_config(Path())),
    "files of an adapter": Use(
        "scenarios", "peft", lambda: adapter.write_adapter(projections(), AdapterStart(), Path())
    ),
    "rouge of the paper": Use("scenarios", "rouge", lambda: paper_rouge.paper_rouge_l("a", "b")),
    "rouge of the paper, before it": Use("scenarios", "rouge", paper_rouge.require_paper_rouge),
    "sites of NVIDIA FLARE": Use("nvflare", "nvflare", lambda: nvflare.client_side(lambda number: None)),  # type: ignore[arg-type, return-value]
    "server of NVIDIA FLARE": Use(
        "nvflare",
        "nvflare",
        lambda: nvflare.server_side(lambda: None, 1, timeout=1),  # type: ignore[arg-type, return-value]
    ),
    "event files": Use("tensorboard", "tensorboard", lambda: Events(Path("run"))),
    "kernel suite": Use("bench", "pytest_benchmark", lambda: kernels.run_suite([])),
    "gate": Use("bench", "triton", lambda: gate.count_triton("sm_90")),
    "flower": Use("flower", "flwr", lambda: runpy.run_module("fedkseed.adapters.flower.records")),
    "machine code": Use("bench", "triton", lambda: list(sass.triton_rows(["sm_90"]))),
}


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir()), "nothing is made before the package is missed"


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What makes a package impossible to import, as if it were not installed."""
    return lambda package: monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("name", USES)
def test_the_extra_is_named(name: str, hide: Callable[[str], None]) -> None:
    use = USES[name]
    hide(use.package)
    with pytest.raises(MissingExtraError) as error:
        use.call()
    assert f"expected the package {use.package}, " in str(error.value)
    assert f"pip install 'fedkseed-kernels[{use.extra}]'" in str(error.value)


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("transformers", ["apply", str(RUN / LEDGER), "--base", str(BASE), "--out", "out"]),
        ("cryptography", ["apply", str(RUN / LEDGER), "--base", "base", "--out", "out", "--public-key", "k"]),
        ("tensorboard", ["simulate", "--tensorboard", "--out", "run"]),
        ("tensorboard", ["simulate", "--tensorboard", "--resume", str(RUN)]),
        ("matplotlib", ["plot", str(RUN), "--out", "plot.png"]),
    ],
)
def test_the_command_says_it_in_one_line(
    package: str, arguments: list[str], hide: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    hide(package)
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fedkseed {arguments[0]}: expected the package {package}, ")


def test_fetching_says_it_in_one_line(
    hide: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    hide("gguf")
    assert fetch_all() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "fedkseed-kernels[hf]" in line


def packages_of(extra: str) -> set[str]:
    """Names of the packages of an extra, as the package index has them."""
    found = (re.match(r"[\w-]+", line) for line in PROJECT["optional-dependencies"][extra])
    return {match[0] for match in found if match is not None}


def test_every_optional_import_is_in_the_table() -> None:
    """Imports of the extras' packages anywhere in fedkseed and benchmarks, types apart; and their extras."""
    extras = {
        extra: packages_of(extra)
        for extra in ("data", "hf", "sign", "plot", "scenarios", "tensorboard", "flower", "nvflare", "bench")
    }
    for use in USES.values():
        assert INDEX_NAMES.get(use.package, use.package) in extras[use.extra], use
    optional = set().union(*extras.values())
    files = [*(ROOT / "python").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    found = {package for path in files for package in optional_imports(path, optional)}
    assert {"transformers", "triton", "cryptography", "tensorboard"} <= found
    used = {INDEX_NAMES.get(use.package, use.package) for use in USES.values()}
    assert found - {"pytest"} <= used


def optional_imports(path: Path, optional: set[str]) -> set[str]:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.removeprefix("torch.utils."))
    return {name.partition(".")[0] for name in names} & optional


def optional_packages() -> dict[str, str]:
    """The extra of each package that a user installs by one: module name -> extra."""
    extras = set(PROJECT["optional-dependencies"]) - {"bench", "dev", "test"}
    modules = {index: module for module, index in INDEX_NAMES.items()}
    return {modules.get(name, name): extra for extra in extras for name in packages_of(extra)}


def unguarded_imports(source: str, optional: dict[str, str]) -> list[str]:
    """Imports of a module without a ``require_extra`` of their package before them in their function."""
    tree = ast.parse(source)
    constants = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    found: list[str] = []

    def value(node: ast.expr) -> object:
        return constants.get(node.id) if isinstance(node, ast.Name) else getattr(node, "value", None)

    def visit(node: ast.AST, required: set[tuple[object, object]]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                visit(child, set())
                continue
            if isinstance(child, ast.Call) and ast.unparse(child.func) == "require_extra":
                extra, *packages = map(value, child.args)
                required |= {(extra, package) for package in packages}
            names = [alias.name for alias in child.names] if isinstance(child, ast.Import) else []
            if isinstance(child, ast.ImportFrom) and child.module:
                names = [child.module.replace("torch.utils.tensorboard", "tensorboard")]
            for package in {name.partition(".")[0] for name in names}:
                fine = package in REQUIRED or package in sys.stdlib_module_names
                if not fine and (optional.get(package), package) not in required:
                    found.append(f"{child.lineno}: {package}")
            visit(child, required)

    visit(tree, set())
    return found


#: What is there without an extra: the package's own requirements and itself.
REQUIRED = {"fedkseed", "fedkseed_kernels", *(re.split("[<>=]", line)[0] for line in PROJECT["dependencies"])}


def test_every_optional_import_follows_a_check_that_names_its_extra() -> None:
    optional = optional_packages()
    assert {"transformers", "cryptography", "matplotlib", "tensorboard", "gguf"} <= optional.keys()
    files = sorted((ROOT / "python").rglob("*.py"))
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        for line in unguarded_imports(path.read_text("utf-8"), optional)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "fine"),
    [
        ("def f():\n    require_extra('hf', 'gguf', 'transformers')\n    from transformers.x import y", True),
        ("X = 'hf'\ndef f():\n    require_extra(X, 'gguf')\n    if a:\n        import gguf.b", True),
        ("if TYPE_CHECKING:\n    import transformers\nimport json, numpy, torch.nn, tqdm", True),
        ("def f():\n    import transformers", False),
        ("import transformers", False),
        ("try:\n    import transformers\nexcept ImportError:\n    pass", False),
        ("def f():\n    import gguf\n    require_extra('hf', 'gguf')", False),
        ("def f():\n    require_extra('plot', 'gguf')\n    import gguf", False),
        ("def f():\n    require_extra('hf', 'gguf')\ndef g():\n    import gguf", False),
        ("def f():\n    from torch.utils.tensorboard import SummaryWriter", False),
        ("import scipy", False),
    ],
)
def test_an_import_without_its_check_is_found(source: str, fine: bool) -> None:
    assert (unguarded_imports(source, optional_packages()) == []) == fine
