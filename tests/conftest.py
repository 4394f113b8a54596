"""One suite for all back ends.

`--kernels cpu` (the default) runs every test, with the Numba kernels. `--kernels gpu` runs the tests that take `kit` or
`device` again, with the Triton kernels: on CUDA tensors and CuPy arrays where a GPU is found, else on host arrays in
Triton's interpreter (also where TRITON_INTERPRET=1 is set). The assertions are the same.

A test takes its arrays from `kit`, once for each kind that the leg can run, or a torch device from `device`. `dtype`
gives the four floating dtypes; NumPy and CuPy have no bfloat16: those pairs are left out. What is not run is counted
in the summary, with the reason, once.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fake_cupy
import numpy as np
import pytest

from hw3gpu import use_backend
from hw3gpu._cli.arrays import DTYPES, Place, cupy_refusal, to_numpy
from layouts import Tensors

# Until the tests are collected nothing is garbage, and each look for some goes through all of PyTorch.
gc.disable()

BACKEND_FIXTURES = {"kit", "device", "stand_in"}


@dataclass(frozen=True)
class Leg:
    """What one run of the suite works with."""

    backend: str  # 'cpu' or 'gpu'
    device: str  # of the torch tensors: 'cpu' or 'cuda'
    interpreted: bool
    kinds: tuple[str, ...]
    absent: dict[str, str]  # the kinds that this leg could run, were it not for the reason given

    def describe(self) -> str:
        engine = {"cpu": "Numba kernels", "gpu": "Triton kernels"}[self.backend]
        place = "in Triton's interpreter, on host arrays" if self.interpreted else f"on {self.device} arrays"
        return f"{engine} {place}; array kinds: {', '.join(self.kinds)}"


def find_leg(backend: str) -> Leg:
    """The leg for `--kernels backend`; sets TRITON_INTERPRET, which counts only until Triton is imported."""
    if backend == "cpu":
        os.environ.pop("HW3GPU_BACKEND", None)
        return Leg("cpu", "cpu", interpreted=False, kinds=("numpy", "torch"), absent={})

    import torch

    interpreted = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()
    if interpreted:
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            raise pytest.UsageError("Triton was imported before TRITON_INTERPRET=1 could be set")
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ["HW3GPU_BACKEND"] = "gpu"
    if interpreted:
        from memory_guard import guard_the_interpreter

        from hw3gpu._cli.interpreter import mend_the_interpreter

        mend_the_interpreter()
        guard_the_interpreter()
        return Leg("gpu", "cpu", True, ("numpy", "torch"), {"cupy": "CuPy arrays need a CUDA device"})
    missing = cupy_refusal()
    if missing:
        return Leg("gpu", "cuda", False, ("torch",), {"cupy": missing})
    return Leg("gpu", "cuda", False, ("torch", "cupy"), {})


# ---------------------------------------------------------------------------------------------- what a test takes
@dataclass(frozen=True)
class Kit(Place):
    """Arrays of one kind, on the device whose kernels this leg tests: `kit.array(values, dtype)`, `kit.numpy(x)`."""

    backend: str  # 'cpu' or 'gpu'

    def numpy(self, x: Any) -> np.ndarray:
        """`x`, of any kind and dtype, as a new float64 NumPy array."""
        return to_numpy(x)


@pytest.fixture
def kit(request: pytest.FixtureRequest) -> Iterator[Kit]:
    """Arrays and kernels, once for each array kind of the leg."""
    leg = request.config.stash[LEG]
    with use_backend(leg.backend):
        yield Kit(request.param, leg.device, leg.backend)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of torch tensors, 'cpu' or 'cuda', for tests of the PyTorch functions and modules."""
    leg = request.config.stash[LEG]
    with use_backend(leg.backend):
        yield leg.device


@pytest.fixture
def tensors(device: str) -> Tensors:
    """Torch tensors alone, with what `kit` has: for what is dear."""
    return Tensors(device)


@pytest.fixture
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cupy.Log]:
    """The log of two devices that have the stand-in's CuPy, and kernels on the host: Triton's interpreter, or Numba's."""
    from host_launches import launch_on_the_host  # which imports torch

    leg = request.config.stash[LEG]
    log = fake_cupy.install(monkeypatch, devices=2)
    launch_on_the_host(monkeypatch, log, "gpu" if leg.interpreted else "cpu")
    with use_backend("auto"):
        yield log


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    """Each floating dtype by its name, left out where the kind of `kit` does not have it."""
    return request.param


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every test and run."""
    return np.random.default_rng(20240229)


# ---------------------------------------------------------------------------------------------- choosing the tests
LEG = pytest.StashKey[Leg]()
LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", choices=("cpu", "gpu"), default="cpu", help="which kernels the tests of this run use")
    parser.addoption("--slow", action="store_true", help="also the tests marked 'slow', which take long for what they add")
    parser.addoption("--sample", type=int, metavar="N", help="at most N cases of each test, spread evenly over its parameters")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEG] = find_leg(config.getoption("--kernels"))
    config.stash[LEFT_OUT] = {}


def pytest_report_header(config: pytest.Config) -> str:
    return f"hw3gpu: {config.stash[LEG].describe()}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kit" in metafunc.fixturenames:
        metafunc.parametrize("kit", metafunc.config.stash[LEG].kinds, indirect=True)


def why_left_out(item: pytest.Item, leg: Leg) -> str | None:
    """The reason for which `item` does not belong to this run, or None."""
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        return "slow: run by '--slow', as `make test-all` does"
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    uses_kernels = bool(BACKEND_FIXTURES & set(getattr(item, "fixturenames", ())))
    if parameters.get("dtype") == "bfloat16" and parameters.get("kit", "torch") != "torch":
        return f"{parameters['kit']} arrays have no bfloat16"
    if item.get_closest_marker("interpreter"):
        return None if leg.interpreted else "about Triton's interpreter: run by '--kernels gpu' where no GPU is found"
    if item.get_closest_marker("gpu"):
        return None if leg.backend == "gpu" else "needs a CUDA device: belongs to '--kernels gpu'"
    if leg.backend == "gpu" and not uses_kernels:
        return "independent of the kernels: run by '--kernels cpu'"
    return None


def sample(items: list[pytest.Item], most: int) -> set[pytest.Item]:
    """At most `most` cases of each test."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {cases[len(cases) * k // most] for cases in tests.values() for k in range(most) if cases}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leg = config.stash[LEG]
    reasons = {item: why_left_out(item, leg) for item in items}
    if most := config.getoption("--sample"):
        kept = sample([item for item in items if not reasons[item]], most)
        reasons |= {item: "not in the sample" for item in items if not reasons[item] and item not in kept}
    if leg.interpreted and not config.getoption("--slow"):
        graphs = [item for item in items if not reasons[item] and item.get_closest_marker("graphs")]
        reasons |= dict.fromkeys(
            {*graphs} - sample(graphs, 1), "what PyTorch's compiler sees, one case a test here: all by '--slow'"
        )
    left_out = Counter(reason for reason in reasons.values() if reason)
    on_kit = {item.nodeid.partition("[")[0] for item in items if not reasons[item] and "kit" in item.fixturenames}
    for kind, why in leg.absent.items():
        left_out[f"{kind}: {why}"] = len(on_kit)
    config.stash[LEFT_OUT] = {reason: n for reason, n in left_out.items() if n}
    config.hook.pytest_deselected(items=[item for item in items if reasons[item]])
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = long_ones_first([item for item in items if not reasons[item]], workers)
    if leg.device != "cuda":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and none is found"))


# Files whose tests take long: each worker of pytest-xdist begins with some, so that none is left alone with one at the end.
LONG = (
    "guard_pages", "distributed", "batch_norm_graphs", "supervisor", "kernels_hub", "gpu_benchmark", "portability", "packaging",
    "processors", "traffic", "cpu_threads", "interrupts", "examples", "pairs",
)  # fmt: skip


def long_ones_first(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Each worker gets a run of items that follow each other: the long files' go round, and the others follow in order."""
    by_file: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.path.stem.removeprefix("test_"), []).append(item)
    firsts = [[item for name in LONG[k::workers] for item in by_file.pop(name, [])] for k in range(workers)]
    others, size = [item for found in by_file.values() for item in found], -(-len(items) // workers)
    runs = []
    for first in firsts:
        room = max(size - len(first), 0)
        runs += first + others[:room]
        others = others[room:]
    return runs + others


def pytest_collection_finish() -> None:
    gc.freeze()  # what is there stays: the tests' own garbage is looked for beside it
    gc.enable()


# ---------------------------------------------------------------------------------------------- saying what was not run
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    # every worker of pytest-xdist collects the whole suite, so that one worker's figures are the suite's
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    left_out = config.stash[LEFT_OUT]
    if left_out:
        terminalreporter.section(f"not in this leg ({config.stash[LEG].describe()})")
        for reason, count in sorted(left_out.items()):
            terminalreporter.line(f"{count:5d} tests  {reason}")
