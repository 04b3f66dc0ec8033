"""Which room may import which: docs/architecture.md draws it, the tables below hold it, for whole modules.

Read with ast, nothing is imported. Imports for type checkers alone do not count.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedkseed_kernels

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"fedkseed_kernels": "fedkseed_kernels", "fedkseed": "python/fedkseed", "benchmarks": "benchmarks"}

# Rooms from the ground up. A room may import itself and what its line names; "*": all of its package.
KERNELS = {
    "_version": (),
    "contract": (),
    "operands": ("contract",),
    "layout": ("operands",),
    "arguments": ("contract", "operands", "layout"),
    "self_test": ("contract", "operands"),
    "backends": ("contract", "operands", "layout", "self_test"),
    "dispatch": ("_version", "contract", "operands", "self_test", "backends"),
    "ops": ("operands", "arguments", "dispatch"),
    "prepared": ("operands", "arguments", "dispatch"),
    "__init__": ("_version", "contract", "arguments", "self_test", "dispatch", "ops", "prepared"),
    "conformance": ("*",),
}
GROUND = ("_checks", "_documented", "_extras", "_means", "_progress", "documents", "files", "seeds")
FEDKSEED = {
    "_checks": (),
    "_documented": (),
    "_extras": (),
    "_means": (),
    "_progress": (),
    "documents": (),
    "files": (),
    "seeds": ("_checks",),
    "data": GROUND,
    "model": GROUND,
    "storage": (*GROUND, "model"),
    "ledger": (*GROUND, "model", "data"),
    "optim": (*GROUND, "model", "storage", "ledger"),
    "federation": (*GROUND, "model", "storage", "optim", "ledger"),
    "simulation": (*GROUND, "model", "storage", "optim", "ledger", "federation"),
    "scenarios": (*GROUND, "data", "model", "storage", "optim", "ledger", "federation", "simulation"),
    "resident": (*GROUND, "model", "storage", "optim", "ledger", "federation", "simulation"),
    "adapters": (*GROUND, "model", "storage", "optim", "ledger", "federation", "simulation", "resident"),
    "__init__": (*GROUND, "model", "storage", "optim", "ledger", "federation", "simulation"),
    "cli": ("*",),
}
SHARED = ("common", "baselines", "models")
BENCHMARKS = {
    "__init__": (),
    "baselines": (),
    "common": ("baselines",),
    "models": ("common", "baselines"),
    "kernels": SHARED,
    "step": SHARED,
    "drift": SHARED,
    "memory": SHARED,
    "server": SHARED,
    "machine_code": SHARED,
    "gpu": (*SHARED, "step"),
    "experiments": (*SHARED, "traffic"),
    "sentiment_prompts": SHARED,
    "speed_page": (*SHARED, "kernels", "step"),
    "traffic": SHARED,
    "liars": SHARED,
    "resident": SHARED,
    "trainer": SHARED,
    "newest": SHARED,
}
RULES = {"fedkseed_kernels": KERNELS, "fedkseed": FEDKSEED, "benchmarks": BENCHMARKS}
# What a package may take of the others: fedkseed_kernels by its public names alone.
BELOW = {
    "fedkseed_kernels": (),
    "fedkseed": ("fedkseed_kernels",),
    "benchmarks": ("fedkseed_kernels", "fedkseed"),
}
# Rooms that look inside the kernels, because that is their question.
INSIDE = {
    ("benchmarks", "machine_code"): ("fedkseed_kernels.backends.triton",),
    ("benchmarks", "kernels"): ("fedkseed_kernels.contract",),
}
MOST_MODULES = {"fedkseed_kernels": 7, "fedkseed": 9, "benchmarks": 4}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name of every module of the three packages, and its file."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def statements(node: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.stmt, bool]]:
    """Import statements, and whether they run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, at_import
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from statements(child, at_import and not inside)


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """What a module imports of the three packages: modules, or package.NAME for other names."""
    for statement, at_import in statements(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        else:
            assert isinstance(statement, ast.ImportFrom)
            assert not statement.level, f"{path}: relative imports hide the room"
            names = [f"{statement.module}.{alias.name}" for alias in statement.names]
            names = [
                name if name in known else f"{statement.module}:{name.rpartition('.')[2]}" for name in names
            ]
        for name in names:
            if name.partition(":")[0].split(".")[0] in PACKAGES:
                yield name, at_import


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def violations(root: Path) -> list[str]:
    """Every import that the tables do not allow, as a line each."""
    known = modules(root)
    found = []
    for module, path in known.items():
        package, room = module.split(".")[0], room_of(module)
        allowed = RULES[package].get(room)
        if allowed is None:
            found.append(f"{module}: the tables have no room {room}")
            continue
        for name, _ in imports(path, known):
            target, _, attribute = name.partition(":")
            other = target.split(".")[0]
            if other == package:
                fine = room_of(target) in (room, *allowed) or "*" in allowed
            elif other not in BELOW[package]:
                fine = False
            elif other == "fedkseed_kernels":
                public = target == other and (not attribute or attribute in fedkseed_kernels.__all__)
                public |= target.count(".") == 1 and target.split(".")[1] in fedkseed_kernels.__all__
                fine = public or target.startswith(INSIDE.get((package, room), ("-",)))
            else:
                fine = True
            if not fine:
                found.append(f"{module} imports {name.replace(':', '.')}")
    return found


def test_rooms_import_what_they_may() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("fedkseed_kernels/arguments/terms.py", "from fedkseed_kernels.backends import native_cpu"),
        ("python/fedkseed/storage/updates.py", "from fedkseed.optim.gradient import ProjectedGradient"),
        ("python/fedkseed/model/identity.py", "from fedkseed_kernels.dispatch import select"),
        ("benchmarks/drift/errors.py", "from benchmarks.kernels.settings import Settings"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    for folder in PACKAGES.values():
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("_lib", "*.json"))
    path = tmp_path / file
    text = path.read_text()
    path.write_text(
        text.replace("from __future__ import annotations\n", f"from __future__ import annotations\n{line}\n")
    )
    (found,) = violations(tmp_path)
    assert line.split()[1] in found


def test_no_circle_of_imports() -> None:
    known = modules(ROOT)
    edges: dict[str, set[str]] = {}
    for module, path in known.items():
        targets = {name.partition(":")[0] for name, at_import in imports(path, known) if at_import}
        # A package's own __init__ is there before its modules: only what they import of it counts.
        edges[module] = {target for target in targets if target in known and target != module}
    state: dict[str, int] = {}

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert state.get(module) != 1, f"a circle: {' -> '.join((*way, module))}"
        if module not in state:
            state[module] = 1
            for target in sorted(edges[module]):
                visit(target, (*way, module))
            state[module] = 2

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize(("package", "most"), MOST_MODULES.items())
def test_few_modules_lie_outside_of_rooms(package: str, most: int) -> None:
    assert len(list((ROOT / PACKAGES[package]).glob("*.py"))) <= most


def test_no_name_of_a_package_hides_a_module_of_it() -> None:
    """`import package.module` would give the function of that name."""
    known = modules(ROOT)
    hidden = [
        name
        for name, path in known.items()
        if path.name == "__init__.py"
        for statement in ast.parse(path.read_text()).body
        if isinstance(statement, (ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
        for bound in (
            [(f"{statement.module}.{a.name}", a.asname or a.name) for a in statement.names]
            if isinstance(statement, ast.ImportFrom)
            else [("", statement.name)]
        )
        if f"{name}.{bound[1]}" in known and bound[0] != f"{name}.{bound[1]}"
    ]
    assert hidden == []
