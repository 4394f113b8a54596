"""The direction of imports, read from the source, and what `import hw3gpu` costs.

    nn -> _nn -> functional -> _torch -> {_linalg, _core} -> kernels    _array_functions -> {_linalg, _core} -> kernels

`_core.dispatch` is the one module that imports kernels. Neither side, PyTorch's functions and those of arrays, imports the
other.
"""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pytest

import hw3gpu
from benchmarks.architecture import Import, imports_of

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted(path for path in (ROOT / "hw3gpu").rglob("*.py") if "kernels" not in path.parts)
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))

EXPECTED = [
    *("pyproject.toml", "README.md", "Makefile", "constraints.txt", "CHANGELOG.md", "LICENSE", "docs/derivations.md"),
    "docs/errors.md",
    *(f"kernels/{name}" for name in ("README.md", "gpu/plan.py", "gpu/device.py")),
    *(
        f"kernels/{engine}/{name}.py"
        for engine in ("gpu", "cpu")
        for name in ("batch_norm", "cross_entropy", "softmax", "moments")
    ),
    *(f"kernels/{engine}/{name}/__init__.py" for engine in ("gpu", "cpu") for name in ("_batch_norm", "_cross_entropy")),
    *(f"kernels/cpu/_numba/{name}.py" for name in ("compile", "threads", "openmp", "simd", "exp", "views")),
    *(f"hw3gpu/{name}.py" for name in ("__init__", "__main__", "functional", "nn", "distributed", "reference")),
    *(f"hw3gpu/_array_functions/{name}.py" for name in ("shapes", "batch_norm", "softmax", "points", "trace")),
    *(f"hw3gpu/_core/{name}.py" for name in ("dispatch", "arrays", "outputs", "check", "dlpack")),
    *(f"hw3gpu/_linalg/{name}.py" for name in ("numerics", "solvers", "certificate", "cusolver")),
    *(
        f"hw3gpu/_torch/{name}.py"
        for name in ("arguments", "operators", "autograd", "batch_norm", "cross_entropy", "softmax", "trace")
    ),
]

# What a part of hw3gpu may import of it: a part is a module or a folder, and a module of a folder may have a line of its own.
PUBLIC = {"_array_functions", "distributed", "functional", "nn", "reference"}
MAY_IMPORT = {
    "_array_functions.shapes": set(),
    "_core.check": set(),
    "_core": {"_core"},
    "_linalg": {"_core", "_linalg"},
    "_torch": {"_core", "_linalg", "_torch"},
    "_array_functions": {"_core", "_linalg"},
    "reference": set(),
    "_error_bounds": {"_error_bounds", "reference"},
    "_explain": {"_core"},
    "functional": {"_core", "_torch"},
    "distributed": {"_core", "_torch", "functional"},
    "_nn": {"_core", "_torch", "_nn", "functional", "distributed"},
    "nn": {"_nn", "functional", "_array_functions.shapes"},
    "__init__": {"_core", "_explain", "_nn.transformers", *PUBLIC},
    "__main__": {"__init__", "_cli"},
    "_cli": {"__init__", "_cli", "_core", "_error_bounds", *PUBLIC},
}

# where fewer third-party packages may be imported, at any depth, than the project depends on
MAY_IMPORT_PACKAGES = {
    "_array_functions/shapes": set(), "_core/check": {"numpy"}, "reference": {"numpy"},
    **{f"_error_bounds/{name}": {"numpy"} for name in ("__init__", "channels", "points", "rounding", "rows")},
}  # fmt: skip


def _package(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def _name(path: Path) -> str:
    """The module of a file, without the package: `_core.arrays`."""
    return ".".join(path.relative_to(ROOT / "hw3gpu").with_suffix("").parts)


def _allowed(path: Path) -> set[str]:
    name = _name(path)
    of = MAY_IMPORT.get(name, MAY_IMPORT[name.partition(".")[0]])
    return of | {"kernels"} if name == "_core.dispatch" else of


def _is_allowed(module: str, allowed: set[str]) -> bool:
    """True for 'hw3gpu._core.arrays.kind' where '_core' or '_core.arrays' is; a name that is no part is `__init__`'s."""
    parts = [*module.split("."), ""][1:]
    if parts[0] not in {*(part.partition(".")[0] for part in MAY_IMPORT), "kernels"}:
        return "__init__" in allowed
    return not {".".join(parts[:k]) for k in range(1, len(parts) + 1)}.isdisjoint(allowed)


def _wrong(path: Path, imports: list[Import]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line} imports {module}" for module, line in imports]


def test_every_file_of_the_layout_is_there() -> None:
    assert [name for name in EXPECTED if not (ROOT / name).is_file()] == []


def test_no_module_bears_the_name_of_a_public_function() -> None:
    """`import hw3gpu.softmax as m` would give the function."""
    functions = [name for name in hw3gpu.__all__ if not isinstance(getattr(hw3gpu, name), ModuleType)]
    assert len(functions) > 15
    assert [name for name in functions if PathFinder.find_spec(f"hw3gpu.{name}", [str(ROOT / "hw3gpu")])] == []


def _cycle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty where there are none."""
    left = dict(imports)
    while free := [name for name, of in left.items() if not of & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_modules_import_each_other() -> None:
    """When they are loaded: what a function imports when it runs may be one that imports its module."""
    files = {f"hw3gpu.{_name(path)}": path for path in LIBRARY}
    files |= {f"hw3gpu.{_package(path)}.{path.stem}": path for path in KERNELS}
    imports = {}
    for name, path in files.items():
        found = {i.module for i in imports_of(path, name.rpartition(".")[0], at_load=True)}
        imports[name] = {module for module in files if any(f"{one}.".startswith(f"{module}.") for one in found)} - {name}
    assert sum(map(len, imports.values())) > 200
    assert _cycle(imports) == []
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "d"]


def _against_the_direction(path: Path) -> list[str]:
    own = [found for found in imports_of(path, _package(path)) if found.module.partition(".")[0] == "hw3gpu"]
    return _wrong(path, [found for found in own if not _is_allowed(found.module, _allowed(path))])


def test_library_imports_follow_the_direction() -> None:
    assert {_name(path).partition(".")[0] for path in LIBRARY} <= MAY_IMPORT.keys()
    assert [wrong for path in LIBRARY for wrong in _against_the_direction(path)] == []


def test_modules_are_named_at_run_time_in_two_places_alone() -> None:
    """`import_module` hides an import from this file: kernels in `_core.dispatch`, modules on first use in `__init__`."""
    users = {path for path in LIBRARY + KERNELS if "import_module(" in path.read_text()}
    assert users <= {ROOT / "hw3gpu" / "_core" / "dispatch.py", ROOT / "hw3gpu" / "__init__.py"}


def _out_of_the_engine(path: Path) -> list[str]:
    # the folder's own package name, as installed, is hw3gpu.kernels: a relative import may not leave gpu/ or cpu/
    package = f"hw3gpu.{_package(path)}"
    engine = ".".join(package.split(".")[:3])
    inside = [found for found in imports_of(path, package) if found.module.partition(".")[0] in {"hw3gpu", "kernels"}]
    return _wrong(path, [found for found in inside if not found.module.startswith(f"{engine}.")])


def test_kernels_import_no_hw3gpu_and_no_other_engine() -> None:
    assert [wrong for path in KERNELS for wrong in _out_of_the_engine(path)] == []


def _of_packages(path: Path, packages: set[str]) -> list[str]:
    return _wrong(path, [i for i in imports_of(path, _package(path)) if i.module.partition(".")[0] in packages])


def test_nothing_imports_tests_or_benchmarks() -> None:
    outside = {"tests", "benchmarks", "pytest", "hypothesis"}
    assert [wrong for path in LIBRARY + KERNELS for wrong in _of_packages(path, outside)] == []


@pytest.mark.parametrize("module", MAY_IMPORT_PACKAGES)
def test_module_imports_few_packages(module: str) -> None:
    path = ROOT / "hw3gpu" / f"{module}.py"
    allowed = MAY_IMPORT_PACKAGES[module] | sys.stdlib_module_names | {"hw3gpu"}
    assert not _wrong(path, [i for i in imports_of(path, _package(path)) if i.module.partition(".")[0] not in allowed])


@pytest.mark.parametrize("name", ["plan", "channel_plan", "row_plan"])
def test_plans_are_plain_functions(name: str) -> None:
    path = ROOT / "kernels" / "gpu" / f"{name}.py"
    allowed = sys.stdlib_module_names | {"kernels.gpu.device", "kernels.gpu.plan", "kernels.gpu.tuned"}
    third_party = [
        i for i in imports_of(path, "kernels.gpu") if not {i.module.partition(".")[0], i.module.rpartition(".")[0]} & allowed
    ]
    assert not _wrong(path, third_party)


# ---------------------------------------------------------------------------------------------- both engines alike
def _signatures(nodes: list[ast.stmt]) -> dict[str, str]:
    """The public functions among them that have no decorator, each with its arguments and defaults."""
    public = [n for n in nodes if isinstance(n, ast.FunctionDef) and not n.name.startswith("_") and not n.decorator_list]
    for node in public:
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
    return {node.name: ast.unparse(node.args).removeprefix("self, ") for node in public}


def _launchers(path: Path) -> dict[str, str]:
    """Those of a kernel file; its kernels have decorators."""
    return _signatures(ast.parse(path.read_text()).body)


def _methods(protocol: str) -> dict[str, str]:
    tree = ast.parse((ROOT / "hw3gpu" / "_core" / "protocols.py").read_text())
    (of,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == protocol)
    return _signatures(of.body)


# Launchers that the GPU does not have: their docstrings say why.
ON_THE_CPU_ALONE = {"cross_entropy": ["forward_backward_reduced"]}


@pytest.mark.parametrize(
    ("module", "protocol"),
    [
        ("softmax", "SoftmaxKernels"),
        ("cross_entropy", "CrossEntropyKernels"),
        ("token_log_probs", "TokenLogProbsKernels"),
        ("batch_norm", "BatchNormKernels"),
        ("moments", "MomentsKernels"),
    ],
)
def test_both_engines_have_the_launchers_of_the_protocol_and_no_other(module: str, protocol: str) -> None:
    """mypy checks kinds and types of arguments, but not their names and defaults, nor that there is no other launcher."""
    gpu, cpu = (_launchers(ROOT / "kernels" / engine / f"{module}.py") for engine in ("gpu", "cpu"))
    for name in ON_THE_CPU_ALONE.get(module, ()):
        del cpu[name]
    assert gpu == cpu == _methods(protocol)


# ---------------------------------------------------------------------------------------------- import hygiene
def _fresh(code: str) -> str:
    """The output of `code` in a fresh interpreter of this checkout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_import_loads_no_heavy_package() -> None:
    heavy = {"torch", "triton", "cupy", "numba", "scipy", "rich"}
    assert _fresh(f"import sys, hw3gpu; print(*{heavy} & {{*sys.modules}})").split() == []


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hw3gpu' has no attribute 'softmin'"):
        hw3gpu.softmin  # noqa: B018


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
