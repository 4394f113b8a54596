"""The short form of `make processors`: a weaker processor than this one, in a process of its own.

About 28 s of processor time the first time, while kernels are compiled for x86-64-v2, and 10 s from then on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import processors
from benchmarks.processors import APART, HOST, LEVELS, FeatureSet
from hw3gpu import _error_bounds, reference
from measure import close, max_error

V2, V3, V4 = LEVELS[1:]


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """`played(feature_set)`: (instructions, digests by number of threads, results) of a process that plays it."""
    folder, known = tmp_path_factory.mktemp("processors"), {}

    def play(of):
        if of.missing():
            pytest.skip(f"this processor has no {', '.join(of.missing())}")
        if of.name not in known:
            path = folder / f"{len(known)}.npz"
            known[of.name] = (*processors.bits_of(of, path), dict(np.load(path)))
        return known[of.name]

    return play


def test_every_number_of_threads_gives_the_same_bytes(played):
    _, digests, _ = played(V2)
    assert list(digests) == ["1", "2", "3", "4"]
    assert len(set(digests.values())) == 1


def test_a_weaker_processor_is_played_to_the_instruction(played):
    assert played(V2)[0] == "xmm, not fused"


def expected_results():
    """Of each result of `processors.operations`: the answer sheet's, the bound, and PyTorch's on the same input."""
    rows, images, classes = processors.inputs()
    single, half, images = rows.astype("float32"), rows.astype("float16"), images.astype("float32")
    z, t = torch.from_numpy(single).requires_grad_(), torch.from_numpy(classes)
    loss = F.cross_entropy(z, t, reduction="none")
    x, of_rows = torch.from_numpy(images), torch.from_numpy(rows)
    step = reference.softmax_cross_entropy(single, classes)
    step_bound = _error_bounds.softmax_cross_entropy(single, classes, dtype="float32")
    norm, norm_bound = reference.batch_norm(images), _error_bounds.batch_norm(images, dtype="float32")
    mean, covariance = reference.moments(rows)
    mean_bound, covariance_bound = _error_bounds.moments(rows)
    dz = torch.autograd.grad(loss.sum(), z)[0]
    softmax, softmax_bound = reference.softmax, partial(_error_bounds.softmax, dtype="float32")
    return {
        "softmax float32 0": (softmax(single), softmax_bound(single), F.softmax(z, -1)),
        "softmax float16 0": (softmax(half), softmax_bound(half), F.softmax(torch.from_numpy(half), -1)),
        "cross entropy float32 0": (step.loss, step_bound.loss, loss),
        "cross entropy float32 1": (step.dz, step_bound.dz, dz),
        "batch norm float32 0": (norm.y, norm_bound.y, F.batch_norm(x, None, None, training=True)),
        "batch norm float32 1": (norm.mean, norm_bound.mean, x.mean((0, 2))),
        "batch norm float32 2": (norm.var, norm_bound.var, x.var((0, 2), correction=0)),
        "moments float64 0": (mean, mean_bound, of_rows.mean(0)),
        "moments float64 1": (covariance, covariance_bound, torch.cov(of_rows.T, correction=0)),
    }


def test_its_results_are_within_the_bound(played):
    results, expected = played(V2)[2], expected_results()
    assert results.keys() == expected.keys()
    for name, (sheet, bound, theirs) in expected.items():
        dtype = str(results[name].dtype)
        close(results[name], sheet, max_error(theirs.detach().double().numpy(), sheet, dtype), dtype, bound, name)


KEPT = """
import json, numpy as np
from hw3gpu.kernels.cpu.batch_norm import _copy_vector

_copy_vector(np.ones(2), np.ones(2))
print(json.dumps(sum(_copy_vector.stats.cache_hits.values())))
"""


def test_code_compiled_for_one_processor_is_not_used_on_another(tmp_path):
    """A home folder may be shared by machines: the name and the features of the processor are part of the cache's key."""
    if V2.missing():
        pytest.skip(f"this processor has no {', '.join(V2.missing())}")
    without = FeatureSet("v2, one feature less", {"NUMBA_CPU_NAME": "x86-64-v2", "NUMBA_CPU_FEATURES": "-sse4.2"})
    found = []
    for of in (HOST, V2, without, HOST, V2, without):
        environment = of.environment() | {"NUMBA_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", KEPT]
        done = subprocess.run(command, env=environment, cwd=processors.ROOT, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    assert found == [0, 0, 0, 1, 1, 1]


# ---------------------------------------------------------------------------------------------- the table
def test_what_this_machine_cannot_play_is_said(monkeypatch, tmp_path):
    """Played as on a processor with nothing: each row says so, and no process is started."""
    monkeypatch.setattr(processors, "host_features", dict)
    monkeypatch.setattr(processors, "_run", None)
    rows = [processors.measure(of, (), tmp_path, True) for of in (*LEVELS, *APART) if of.needs]
    assert len(rows) == 10
    assert all("not run: this processor has no" in processors.line(row) for row in rows)


def test_a_wrong_result_fails_its_row(monkeypatch, tmp_path):
    monkeypatch.setattr(processors, "bits_of", lambda of, path: ("xmm", {"1": "a", "2": "a", "3": "b", "4": "a"}))
    monkeypatch.setattr(processors, "_verify", lambda of: ("7 pass", True))
    row = processors.measure(HOST, (), tmp_path, True)
    assert not row.passed
    assert row.bits.startswith("differ")
    checks = json.dumps({"checks": [{"passed": True}, {"passed": False}]})
    monkeypatch.undo()
    monkeypatch.setattr(processors, "_run", lambda of, *command: subprocess.CompletedProcess(command, 1, checks, ""))
    assert processors._verify(HOST) == ("1 of 2 failed", False)
    assert processors._tests(HOST, ["tests/test_softmax.py"]) == ("ended with status 1", False)


def test_a_level_is_chosen_whole(monkeypatch):
    """Nothing of the machine's own features, nor of a variable that is set already, gets in."""
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+avx512f")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512")
    environment = V2.environment()
    assert (environment["NUMBA_CPU_NAME"], environment["NUMBA_CPU_FEATURES"]) == ("x86-64-v2", "")
    assert (environment["ATEN_CPU_CAPABILITY"], environment["OPENBLAS_CORETYPE"]) == ("default", "Nehalem")
    assert not set(processors.VARIABLES) & set(HOST.environment())
    assert set(processors.V2) < set(processors.V3) < set(processors.V4)
    assert os.environ["NUMBA_CPU_FEATURES"] == "+avx512f"
