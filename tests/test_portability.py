"""Other systems, each played by a process from which the thing is hidden: what macOS and Windows lack of this one."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hw3gpu._core import pool as _pool
from hw3gpu.kernels.cpu._numba import compile, openmp, threads

ROOT = Path(__file__).resolve().parent.parent

ELSEWHERE = """
import contextlib, io, json, os, sys, warnings
import numpy as np

# not in Python on Windows, and the first not on macOS
register_at_fork = os.register_at_fork
for name in ("sched_getaffinity", "register_at_fork", "fork", "sysconf"):
    delattr(os, name)
os.cpu_count = lambda: 5
# not to be had for macOS and Windows
sys.modules["triton"] = None
# 64 bits on Windows and on Apple's processors
np.longdouble = np.float64

import hw3gpu
from hw3gpu.kernels.cpu._numba import threads
found = {"threads before torch": threads.num_threads()}
z = np.random.default_rng(0).standard_normal((300, 700)).astype("float32")
alone = hw3gpu.softmax(z)

os.register_at_fork = register_at_fork  # torch for Linux asks for it
import torch
import hw3gpu.functional as F
import hw3gpu.nn
import hw3gpu.distributed
found["compiler"] = "torch._dynamo" in sys.modules
threads.set_num_threads(2)
t = torch.from_numpy(z).requires_grad_()
loss = F.cross_entropy(t, torch.arange(300))
loss.backward()
found["loss"] = [loss.item(), torch.nn.functional.cross_entropy(t, torch.arange(300)).item()]
found["softmax"] = bool((hw3gpu.softmax(z) == alone).all() and np.allclose(alone, torch.softmax(t.detach(), 1)))
x = torch.from_numpy(z).view(30, 10, 700)
found["batch norm"] = bool(torch.allclose(hw3gpu.nn.BatchNorm1d(10)(x), torch.nn.BatchNorm1d(10)(x), atol=1e-5))
with hw3gpu.use_backend("gpu"):
    try:
        hw3gpu.softmax(z)
    except hw3gpu.BackendError as error:
        found["gpu"] = str(error)

from hw3gpu.__main__ import main
for command in ("info", "verify --only S4", "verify --only S4 --kernels gpu"):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        status = main(command.split())
    found[command] = [status, " ".join(out.getvalue().split()), err.getvalue()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def elsewhere():
    """What a process found from which all of that is hidden."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "HW3GPU_NUM_THREADS", "HW3GPU_BACKEND")}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_module_imports_the_compiler(elsewhere):
    """More than a second that an eager program has no use for."""
    assert not elsewhere["compiler"]


def test_the_threads_are_those_of_the_machine_where_the_system_does_not_tell_more(elsewhere):
    assert elsewhere["threads before torch"] == 5


@pytest.mark.parametrize("what", ["softmax", "batch norm"])
def test_the_cpu_kernels_run_elsewhere(elsewhere, what):
    assert elsewhere[what]


def test_a_loss_and_its_gradient_run_elsewhere(elsewhere):
    ours, theirs = elsewhere["loss"]
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_triton_kernels_say_why_they_cannot_run(elsewhere):
    assert "backend 'gpu' was asked for, but Triton cannot be imported" in elsewhere["gpu"]


def test_the_command_runs_without_triton_and_without_80_bit_numbers(elsewhere):
    assert elsewhere["info"][0] == 0
    status, output, _ = elsewhere["verify --only S4"]
    assert (status, "outputs pass" in output) == (0, True), output
    assert "The Triton kernels did not run: Triton cannot be imported" in output
    status, output, error = elsewhere["verify --only S4 --kernels gpu"]
    assert (status, output) == (2, "")
    assert "the Triton kernels cannot run: Triton cannot be imported" in error


# ---------------------------------------------------------------------------------------------- in this process
class NoSymbol:
    def __init__(self, name):
        pass


def no_program(name):
    raise TypeError("argument of type NoneType")  # as Windows says


@pytest.mark.parametrize("library", [NoSymbol, no_program], ids=["no GOMP_parallel", "no handle of the program"])
def test_without_the_entry_to_openmp_our_own_threads_help(monkeypatch, library):
    monkeypatch.setattr(ctypes, "CDLL", library)
    monkeypatch.setattr(openmp, "_entry", openmp._entry.__wrapped__)
    assert openmp.openmp() == 0
    helped = set()
    monkeypatch.setattr(threads._Pool, "submit", lambda pool, jobs: helped.add(len(jobs)))
    monkeypatch.setattr(threads, "_setting", 3)
    done = []
    threads.run(lambda first, last: done.extend(range(first, last)), 50, 1 << 30)
    assert (sorted(done), helped) == (list(range(50)), {2})


def test_memory_of_unknown_size_leaves_the_pool_on(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    assert _pool._default_limit() == _pool.DEFAULT_MB << 20


def test_a_user_without_a_home_folder_compiles_anew(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compile.config, "CACHE_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(compile.Path, "home", no_home)
    assert compile.cache_folder.__wrapped__() is None
