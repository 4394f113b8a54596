"""The direction of imports, read from the source, and what `import hw3gpu` costs.

    nn -> functional -> ground -> kernels        {batch_norm, softmax, points, trace} -> ground -> kernels

The ground is `_arrays` (the one room that imports kernels), `_check` and the other private rooms. Neither wing imports
the other.
"""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted(path for path in (ROOT / "hw3gpu").rglob("*.py") if "kernels" not in path.parts)
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))

HOUSE = [
    *("pyproject.toml", "README.md", "Makefile", "constraints.txt", "CHANGELOG.md", "LICENSE", "docs/derivations.md"),
    "docs/errors.md",
    *(f"kernels/{name}" for name in ("README.md", "gpu/plan.py")),
    *(f"kernels/{wing}/{room}.py" for wing in ("gpu", "cpu") for room in ("batch_norm", "cross_entropy", "softmax")),
    *(f"hw3gpu/{room}.py" for room in ("shapes", "batch_norm", "softmax", "points", "trace", "reference")),
    *(f"hw3gpu/{room}.py" for room in ("__init__", "__main__", "_arrays", "_check", "functional", "nn")),
]

GROUND = {path.stem for path in LIBRARY if path.parent.name == "hw3gpu" and path.stem.startswith("_")} - {
    "__init__",
    "__main__",
    "_error_bounds",
}
PUBLIC = {"batch_norm", "distributed", "functional", "nn", "points", "reference", "shapes", "softmax", "trace"}

# the rooms of hw3gpu that a room may import; the ground's rooms may import each other and no wing
MAY_IMPORT = {
    "shapes": set(),
    "reference": {"shapes"},
    "_error_bounds": {"reference"},
    "batch_norm": GROUND,
    "softmax": GROUND,
    "points": GROUND,
    "trace": GROUND,
    "functional": GROUND,
    "distributed": GROUND | {"functional"},
    "nn": GROUND | {"functional", "shapes", "distributed"},
    "__init__": GROUND | PUBLIC,
    "__main__": {"__init__", "_cli"},
    "_cli": GROUND | PUBLIC | {"__init__", "_cli", "_error_bounds"},
    "_check": set(),
} | {room: GROUND for room in GROUND - {"_check"}}

# where fewer third-party packages may be imported, at any depth, than the project depends on
MAY_IMPORT_PACKAGES = {"shapes": set(), "_check": {"numpy"}, "reference": {"numpy"}, "_error_bounds": {"numpy"}}


class Import(NamedTuple):
    module: str  # absolute, with the imported names as a last part: 'hw3gpu._arrays.fold'
    line: int


def _imports(path: Path, package: str) -> Iterator[Import]:
    """Every import of a file, inside functions too, as absolute names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            prefix = [*base, *([node.module] if node.module else [])]
            yield from (Import(".".join([*prefix, alias.name]), node.lineno) for alias in node.names)


def _package(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def _room(path: Path) -> str:
    return "_cli" if path.parent.name == "_cli" else path.stem


def _imported_room(module: str) -> str:
    """The room of an absolute import; a name that is no room is one of `__init__`'s."""
    name = [*module.split("."), ""][1]
    return name if name in MAY_IMPORT or name == "kernels" else "__init__"


def _wrong(path: Path, imports: list[Import]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line} imports {module}" for module, line in imports]


def test_house_has_its_rooms() -> None:
    assert [name for name in HOUSE if not (ROOT / name).is_file()] == []


def _against_the_direction(path: Path) -> list[str]:
    allowed = MAY_IMPORT[_room(path)] | ({"kernels"} if path.stem == "_arrays" else set())
    own = [found for found in _imports(path, _package(path)) if found.module.partition(".")[0] == "hw3gpu"]
    return _wrong(path, [found for found in own if _imported_room(found.module) not in allowed])


def test_library_imports_follow_the_direction() -> None:
    assert [wrong for path in LIBRARY for wrong in _against_the_direction(path)] == []


def test_modules_are_named_at_run_time_in_two_rooms_alone() -> None:
    """`import_module` hides an import from this file: kernels in `_arrays`, modules on first use in `__init__`."""
    users = {path.stem for path in LIBRARY + KERNELS if "import_module(" in path.read_text()}
    assert users <= {"_arrays", "__init__"}


def _out_of_the_engine(path: Path) -> list[str]:
    # the folder's own package name, as installed, is hw3gpu.kernels: a relative import may not leave gpu/ or cpu/
    package = f"hw3gpu.{_package(path)}"
    inside = [found for found in _imports(path, package) if found.module.partition(".")[0] in {"hw3gpu", "kernels"}]
    return _wrong(path, [found for found in inside if not found.module.startswith(f"{package}.")])


def test_kernels_import_no_hw3gpu_and_no_other_engine() -> None:
    assert [wrong for path in KERNELS for wrong in _out_of_the_engine(path)] == []


def _of_packages(path: Path, packages: set[str]) -> list[str]:
    return _wrong(path, [i for i in _imports(path, _package(path)) if i.module.partition(".")[0] in packages])


def test_nothing_imports_tests_or_benchmarks() -> None:
    outside = {"tests", "benchmarks", "pytest", "hypothesis"}
    assert [wrong for path in LIBRARY + KERNELS for wrong in _of_packages(path, outside)] == []


@pytest.mark.parametrize("room", MAY_IMPORT_PACKAGES)
def test_room_imports_few_packages(room: str) -> None:
    path = ROOT / "hw3gpu" / f"{room}.py"
    allowed = MAY_IMPORT_PACKAGES[room] | sys.stdlib_module_names | {"hw3gpu"}
    assert not _wrong(path, [i for i in _imports(path, "hw3gpu") if i.module.partition(".")[0] not in allowed])


@pytest.mark.parametrize("room", ["plan", "channel_plan", "row_plan"])
def test_plans_are_plain_functions(room: str) -> None:
    path = ROOT / "kernels" / "gpu" / f"{room}.py"
    allowed = sys.stdlib_module_names | {"kernels.gpu.device", "kernels.gpu.plan", "kernels.gpu.tuned"}
    third_party = [
        i for i in _imports(path, "kernels.gpu") if not {i.module.partition(".")[0], i.module.rpartition(".")[0]} & allowed
    ]
    assert not _wrong(path, third_party)


# ---------------------------------------------------------------------------------------------- twins
def _launchers(path: Path) -> dict[str, str]:
    """The public functions of a kernel file that are not themselves kernels, each with its arguments and defaults."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    public = [node for node in functions if not node.name.startswith("_") and not node.decorator_list]
    for node in public:
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
    return {node.name: ast.unparse(node.args) for node in public}


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        ("softmax", {"forward", "backward"}),
        ("cross_entropy", {"forward", "backward", "forward_backward", "reduce"}),
        ("token_log_probs", {"forward", "backward"}),
        ("batch_norm", {"statistics", "normalize", "forward", "backward", "backward_reduce", "backward_apply"}),
        ("moments", {"update", "merge", "finish"}),
    ],
    ids=["softmax", "cross_entropy", "token_log_probs", "batch_norm", "moments"],
)
def test_twins_have_the_same_launchers(room: str, expected: set[str]) -> None:
    gpu, cpu = (_launchers(ROOT / "kernels" / engine / f"{room}.py") for engine in ("gpu", "cpu"))
    assert gpu == cpu
    assert expected <= gpu.keys()


# ---------------------------------------------------------------------------------------------- import hygiene
def _fresh(code: str) -> str:
    """The output of `code` in a fresh interpreter of this checkout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_import_loads_no_heavy_package() -> None:
    heavy = {"torch", "triton", "cupy", "numba", "scipy", "rich"}
    assert _fresh(f"import sys, hw3gpu; print(*{heavy} & {{*sys.modules}})").split() == []


def test_import_costs_little_more_than_numpy() -> None:
    def seconds(package: str) -> float:
        # processor time: on a busy machine the clock measures the others
        before = os.times()
        _fresh(f"import {package}")
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    _fresh("import hw3gpu")  # writes the bytecode
    pairs = [(seconds("hw3gpu"), seconds("numpy")) for _ in range(5)]
    ours, numpys = (statistics.median(column) for column in zip(*pairs, strict=True))
    assert ours < numpys + 0.2, f"import hw3gpu takes {ours:.3f} s, import numpy {numpys:.3f} s"
