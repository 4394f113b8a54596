"""The folder for Hugging Face's kernel hub: made, built and loaded as its tools do it, in a process with nothing else.

The numbers are checked by the folder's own tests, in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import hub_builder
import jinja2
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no tomllib")

ROOT = Path(__file__).resolve().parent.parent
MAKE = ROOT / "integrations" / "kernels_hub" / "make_folder.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script makes, with the variant that the builder makes of it."""
    made = tmp_path_factory.mktemp("hub") / "hw3gpu"
    subprocess.run([sys.executable, MAKE, made], check=True)
    hub_builder.build(made, _build_toml(made)["general"]["version"])
    return made


def _build_toml(folder: Path) -> dict:
    return tomllib.loads((folder / "build.toml").read_text())


def _run(code: str, *arguments: str | Path, **environment: str) -> str:
    """The standard output of a process that imports nothing of this checkout, and no `kernels` of an import path."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON", "HW3GPU"))}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=arguments[0], env=clean | environment, capture_output=True, text=True, timeout=500
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


# ---------------------------------------------------------------------------------------------- the folder
# kernels-data/src/config/v5.rs of huggingface/kernels: unknown names are errors there
GENERAL = {"name", "version", "edition", "license", "backends"}
OPTIONAL = {"hub", "upstream", "source", "minver", "cuda", "python-depends", "kernel-depends"}


def test_build_toml_is_of_the_builders_fifth_edition(folder: Path) -> None:
    build = _build_toml(folder)
    assert set(build) == {"general", "torch-noarch"}
    assert set(build["general"]) - OPTIONAL == GENERAL
    assert build["general"]["name"] == "hw3gpu"
    assert build["general"]["edition"] == 5
    assert set(build["general"]["hub"]) <= {"repo-id", "branch"}
    assert set(build["torch-noarch"]) <= {"pyext", "cuda_capabilities", "rocm_archs"}


def test_folder_has_what_the_builder_asks_for(folder: Path) -> None:
    for name in ("flake.nix", "CARD.md", "LICENSE", "torch-ext/hw3gpu/__init__.py", "tests/test_hw3gpu.py"):
        assert (folder / name).is_file(), name
    assert not (folder / "torch-ext" / "hw3gpu" / "hw3gpu").exists()  # the builder refuses a module inside its namesake
    assert not (folder / "torch-ext" / "hw3gpu" / "_ops.py").exists()  # the builder's own


def test_card_is_filled_by_the_builder(folder: Path) -> None:
    """With the variables of kernel-builder/src/pyproject/card.rs, which takes the functions from `__all__`."""
    repo_id = _build_toml(folder)["general"]["hub"]["repo-id"]
    exported = re.search(r"__all__\s*=\s*\[([^\]]*)\]", (folder / "torch-ext/hw3gpu/__init__.py").read_text())[1]
    card = jinja2.Template((folder / "CARD.md").read_text(), trim_blocks=True, undefined=jinja2.StrictUndefined).render(
        repo_id=repo_id, functions=re.findall(r'"(\w+)"', exported), has_benchmark=False, upstream=None, license="MIT"
    )
    assert card.startswith("---\nlibrary_name: kernels\nlicense: mit\n---\n")
    assert f'get_kernel("{repo_id}"' in card
    assert "- `cross_entropy`\n" in card
    assert "{" not in card.replace('{"BatchNorm2d": {"cuda": layer}}', "")


def test_kernels_are_those_of_the_checkout_and_no_more(folder: Path) -> None:
    copied = folder / "torch-ext" / "hw3gpu" / "gpu"
    names = {path.relative_to(copied).as_posix() for path in copied.rglob("*.py")}
    assert {"softmax.py", "cross_entropy.py", "batch_norm.py", "_batch_norm/tiles.py", "__init__.py"} <= names
    assert not names & {"moments.py", "token_log_probs.py"}
    for name in names:
        assert (copied / name).read_bytes() == (ROOT / "kernels" / "gpu" / name).read_bytes()


def test_a_folder_with_something_in_it_is_left_alone(folder: Path) -> None:
    done = subprocess.run([sys.executable, MAKE, folder], capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected no folder, or an empty one" in done.stderr


# ---------------------------------------------------------------------------------------------- the module
ALONE = """
import inspect, json, pathlib, sys
sys.path.insert(0, sys.argv[2])
allowed = set(sys.argv[3].split(","))


class Refused:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = top in allowed or top in sys.stdlib_module_names
        if not known and not top.startswith(("_hw3gpu", "hub_builder", "_sysconfigdata")):
            raise ModuleNotFoundError(f"refused: {name}", name=name)


sys.meta_path.insert(0, Refused())
import hub_builder
kernel = hub_builder.load(pathlib.Path(sys.argv[1]) / "build" / "torch-cuda")
import torch
from torch import nn

found = {"exported": sorted(kernel.__all__), "modules": sorted({name.partition(".")[0] for name in sys.modules})}
found["operators"] = [name for name in dir(getattr(torch.ops, kernel.__name__)) if name.startswith(("soft", "cross", "batch"))]
try:
    kernel.softmax(torch.zeros(3))
except ValueError as error:
    found["refusal"] = str(error)
found["layers"] = {}
for name, replaced in (("Softmax", nn.Softmax), ("CrossEntropyLoss", nn.CrossEntropyLoss), ("BatchNorm", nn.BatchNorm2d)):
    layer = getattr(kernel.layers, name)
    kinds = [[str(p.kind) for p in inspect.signature(c.forward).parameters.values()] for c in (layer, replaced)]
    found["layers"][name] = {
        "own": sorted({n for n, _ in inspect.getmembers(layer)} - {n for n, _ in inspect.getmembers(nn.Module)}),
        "constructor": layer.__init__ is not nn.Module.__init__,
        "as_replaced": kinds[0] == kinds[1],
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict:
    """What a process finds in which nothing but the standard library, PyTorch, Triton and what PyTorch needs is to be had."""
    needed = {re.match(r"[\w.-]+", text)[0].lower() for text in requires("torch") or [] if "extra" not in text}
    names = {name.replace("-", "_") for name in needed} | {"markupsafe", "mpmath", "torch", "torchgen", "functorch", "triton"}
    assert not names & {"numpy", "numba", "cupy", "scipy", "hw3gpu"}
    return json.loads(_run(ALONE, folder, ROOT / "tests", ",".join(names)).splitlines()[-1])


def test_module_is_imported_where_there_is_torch_and_triton_alone(alone: dict) -> None:
    assert alone["exported"] == ["batch_norm", "cross_entropy", "layers", "softmax"]
    assert not set(alone["modules"]) & {"numpy", "numba", "cupy", "scipy", "hw3gpu", "kernels"}


def test_operators_are_in_the_builders_namespace(alone: dict) -> None:
    assert {"softmax", "softmax_backward", "cross_entropy", "cross_entropy_backward"} <= set(alone["operators"])
    assert {"batch_norm_training", "batch_norm_evaluation", "batch_norm_backward"} <= set(alone["operators"])


def test_a_tensor_on_no_gpu_is_refused(alone: dict) -> None:
    assert alone["refusal"] == "z: expected a tensor on a GPU, got one on cpu"


@pytest.mark.parametrize("name", ["Softmax", "CrossEntropyLoss", "BatchNorm"])
def test_layers_are_pure(alone: dict, name: str) -> None:
    """What `kernels` checks before it gives a layer's `forward` to a module (kernels/layer/layer.py, _validate_layer)."""
    assert alone["layers"][name] == {"own": ["can_torch_compile", "has_backward"], "constructor": False, "as_replaced": True}


# ---------------------------------------------------------------------------------------------- numbers
OWN_TESTS = """
import importlib.util, pathlib, sys, types
sys.path.insert(0, sys.argv[2])
import hub_builder
spec = importlib.util.spec_from_file_location("interpreter", sys.argv[3])
interpreter = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interpreter)
interpreter.mend_the_interpreter()  # rounds as a GPU, in half the time
for name in ("numba", "cupy", "scipy", "hw3gpu"):
    sys.modules[name] = None  # an import of it fails
kernels = sys.modules["kernels"] = types.ModuleType("kernels")
kernels.get_kernel = lambda repository, version, trust_remote_code: hub_builder.load(
    pathlib.Path(sys.argv[1]) / "build" / "torch-cuda"
)
import pytest
few = "float32 or autocast or layers or errors or operators or last or transposed or one_row"
own = [str(pathlib.Path(sys.argv[1]) / "tests"), "-q", "-k", few, "--rootdir", sys.argv[1], "-o", "markers=kernels_ci"]
sys.exit(pytest.main([*own, "-p", "no:cacheprovider", "-p", "no:warnings"]))
"""


def test_folders_own_tests_pass_in_the_interpreter(folder: Path) -> None:
    """Softmax, cross entropy, batch normalisation, forward and backward, against the formulas in float64."""
    mended = ROOT / "hw3gpu" / "_cli" / "interpreter.py"
    out = _run(OWN_TESTS, folder, ROOT / "tests", mended, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert int(out.rpartition(" passed")[0].rpartition("\n")[2].strip()) > 25


BENCHMARKS = """
import importlib.util, json, pathlib, sys, types
sys.path.insert(0, sys.argv[2])
import hub_builder, torch


class Benchmark:
    seed, device = None, "cpu"


benchmark = sys.modules["kernels.benchmark"] = types.ModuleType("kernels.benchmark")
benchmark.Benchmark = Benchmark
sys.modules["kernels"] = types.ModuleType("kernels")
kernel = hub_builder.load(pathlib.Path(sys.argv[1]) / "build" / "torch-cuda")
small = {"SoftmaxBenchmark": (3, 40), "CrossEntropyBenchmark": (3, 33), "BatchNormBenchmark": (2, 3, 4, 4)}
ran = []
for path in sorted((pathlib.Path(sys.argv[1]) / "benchmarks").glob("benchmark*.py")):
    spec = importlib.util.spec_from_file_location("benchmark_module", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, cls in vars(module).items():
        if isinstance(cls, type) and issubclass(cls, Benchmark) and cls is not Benchmark:
            for workload in (n.removeprefix("benchmark_") for n in dir(cls) if n.startswith("benchmark_")):
                torch.manual_seed(cls.seed)
                one = cls()
                one.kernel, one.out, one.shape = kernel, None, small[name]
                one.setup()
                getattr(one, f"benchmark_{workload}")()
                wanted = getattr(one, f"verify_{workload}")()
                torch.testing.assert_close(one.out, wanted, rtol=1e-4, atol=1e-5)
                assert wanted.abs().max() > 0.1, workload  # else `kernels benchmark`, with its 0.01, would see nothing
                ran.append(f"{name}.{workload}")
print(json.dumps(ran))
"""


def test_benchmarks_run_and_agree_with_pytorch(folder: Path) -> None:
    ran = json.loads(_run(BENCHMARKS, folder, ROOT / "tests", TRITON_INTERPRET="1").splitlines()[-1])
    assert len(ran) == 6
