"""Stacks of matrices beside torch: BLAS has one thread a call meanwhile, says nothing, and has its threads back afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from matrices import wishart

from hw3gpu import minimize_trace, minor_components
from hw3gpu.kernels.cpu._numba.blas import libraries, one_thread

CHILD = """
import numpy as np, torch, scipy.linalg
from threadpoolctl import threadpool_info
from hw3gpu import minimize_trace, minor_components

torch.set_num_threads(2)
before = threadpool_info()
assert any(library["user_api"] == "blas" and library["num_threads"] > 1 for library in before), before
x = np.random.default_rng(0).standard_normal((40, 80, 64))
sigma = x.swapaxes(1, 2) @ x / 80
assert minimize_trace(sigma, 3).certified.all()
assert minimize_trace(torch.from_numpy(sigma), 30).certified.all()
assert minor_components(x, 3).certified.all()
assert threadpool_info() == before, threadpool_info()
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor: BLAS has one thread whatever is asked for")
def test_a_stack_beside_torch_is_solved_without_a_word_and_restores_the_threads():
    settings = {"OPENBLAS_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD], env={**os.environ, **settings}, capture_output=True, text=True, timeout=300
    )
    assert (child.returncode, child.stderr, child.stdout) == (0, "", "")


def numbers():
    return [library.get() for library in libraries()]


@pytest.fixture
def two_threads():
    before = numbers()
    for library in libraries():
        library.set(2)
    yield numbers()
    for library, threads in zip(libraries(), before, strict=True):
        library.set(threads)


def test_several_users_at_once_restore_what_the_first_found(two_threads):
    inside, leave = threading.Event(), threading.Event()

    def first():
        with one_thread():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(10)
    with one_thread():
        leave.set()
        thread.join()  # who came first goes first
        assert set(numbers()) == {1}
    assert numbers() == two_threads
    with pytest.raises(KeyError), one_thread(), one_thread():
        raise KeyError
    assert numbers() == two_threads


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_the_threads_back(two_threads):
    with one_thread():
        child = os.fork()
        if not child:
            with one_thread():
                alone = set(numbers()) == {1}
            os._exit(0 if alone and numbers() == two_threads else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert set(numbers()) == {1}


def test_one_matrix_keeps_the_threads_of_blas_and_several_have_one(monkeypatch, two_threads):
    seen = []
    honest = np.linalg.eigh, np.linalg.svd
    monkeypatch.setattr(np.linalg, "eigh", lambda s: (seen.append(max(numbers())), honest[0](s))[1])
    monkeypatch.setattr(np.linalg, "svd", lambda s, **options: (seen.append(max(numbers())), honest[1](s, **options))[1])
    for shape in ((8, 8), (1, 8, 8), (2, 8, 8)):
        minimize_trace(np.broadcast_to(wishart(8), shape), 2)
        minor_components(np.broadcast_to(wishart(8), shape), 2)
    assert seen == [max(two_threads)] * 4 + [1] * 2


def test_a_stack_in_threads_has_the_bits_of_its_matrices():
    """NumPy's functions on parts of a stack, in threads of this library, real and complex."""
    x = np.random.default_rng(0).standard_normal((40, 80, 64))
    found = minor_components(x, 3)
    hermitian = x.swapaxes(1, 2) @ x / 80 + 1j * (x[:, :64] - x[:, :64].swapaxes(1, 2))
    solved = minimize_trace(hermitian, 30)
    for i in (0, 17, 39):
        assert np.array_equal(found.phi[i], minor_components(x[i : i + 1], 3).phi[0])
        assert np.array_equal(solved.phi[i], minimize_trace(hermitian[i : i + 1], 30).phi[0])
    with pytest.raises(ValueError, match="expected finite values"):
        minor_components(x * np.inf, 3)
