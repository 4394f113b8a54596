"""Threads of the CPU kernels: torch's and our own, forks, many callers at once, and the same bits for all of them."""

from __future__ import annotations

import multiprocessing
import os
import queue
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from cpu_operations import (
    OPERATIONS,
    channels_last,
    run_batch_norm,
    run_cross_entropy,
    run_softmax,
    same_bits,
)

from hw3gpu._core import dispatch
from hw3gpu.kernels.cpu import cross_entropy
from hw3gpu.kernels.cpu._numba import by_address, compile, openmp
from hw3gpu.kernels.cpu._numba import threads as _threads


@pytest.fixture
def threads():
    """`threads(n)` sets the number of threads; it is put back after the test."""
    before = _threads._setting
    yield _threads.set_num_threads
    _threads._setting = before


@pytest.fixture
def eager_threads(monkeypatch):
    """Every call is large enough for several threads."""
    monkeypatch.setattr(_threads, "BYTES_PER_THREAD", 1)


@pytest.fixture(params=["OpenMP", "own"])
def helpers(request, monkeypatch):
    """Whose threads help: those of torch's OpenMP, or of the pool that stands in where there is none."""
    if request.param == "own":
        monkeypatch.setattr(_threads, "openmp", lambda: 0)
    elif not openmp.openmp():
        pytest.skip("torch has brought no OpenMP runtime with GOMP_parallel")


# ---------------------------------------------------------------------------------------------- threads
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_number_of_threads_changes_no_bit(rng, threads, eager_threads, helpers, name):
    call = OPERATIONS[name](rng)
    threads(1)
    expected = call()
    for n in (2, 3, 7):
        threads(n)
        assert same_bits(call(), expected), f"{n} threads"


def test_calls_from_many_python_threads_give_the_serial_bits(rng, threads, eager_threads, helpers):
    """8 threads of 200 calls each, all of them with helpers."""
    makers = [
        lambda: run_softmax(rng, (20, 33, 1)),
        lambda: run_softmax(rng, (9, 100, 1), "bfloat16"),
        lambda: run_cross_entropy(rng, (16, 70, 1)),
        lambda: run_cross_entropy(rng, (5, 40, 3), soft=True),
        lambda: run_batch_norm(rng, (3, 20, 130)),
        lambda: run_batch_norm(rng, (8, 40, 9)),
        lambda: run_batch_norm(rng, (3, 5, 300), layout=channels_last),
    ]
    calls = [make() for make in makers]
    threads(1)
    expected = [call() for call in calls]
    threads(4)
    wrong, done = [], []

    def work(k):
        for i in range(200):
            which = (k + i) % len(calls)
            if not same_bits(calls[which](), expected[which]):
                wrong.append((k, i, which))
        done.append(k)

    workers = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(8)]
    end = time.monotonic() + 120
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
    assert sorted(done) == list(range(8)), "not done within 120 s"
    assert wrong == []


def in_a_child(answers):
    _threads.set_num_threads(3)
    _threads.BYTES_PER_THREAD = 1
    rng = np.random.default_rng(7)
    calls = [run_softmax(rng, (40, 50, 1)), run_cross_entropy(rng, (16, 70, 1)), run_batch_norm(rng, (3, 20, 130))]
    kernel = Recorder()
    _threads.run(kernel, 50, 1 << 27)
    threads = len({thread for *_, thread in kernel.calls})
    answers.put((threads, [[v.tobytes() for v in call()] for call in calls for _ in range(5)]))


@pytest.mark.parametrize(("method", "children"), [("fork", 4), ("spawn", 1)])
def test_child_processes_compute_what_the_parent_does(threads, eager_threads, method, children):
    """With threads of their own: a forked child has none of those that the parent's pool had made."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this platform")
    here = queue.SimpleQueue()
    threads(3)
    in_a_child(here)
    expected = here.get()
    assert expected[0] == 3
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    processes = [context.Process(target=in_a_child, args=(answers,), daemon=True) for _ in range(children)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=120) for _ in processes] == [expected] * children
    for process in processes:
        process.join(30)
        assert process.exitcode == 0


@compile.kernel
def count_blocks(first, last, times, size):
    """Counts the blocks, in no hurry, with `size` bytes of memory."""
    memory = np.zeros(size, np.uint8)
    for block in range(first, last):
        times[block] += 1
        for i in range(200_000):
            memory[i & 7] += i & 1


def test_openmp_does_every_block_once(threads, eager_threads):
    if not openmp.openmp():
        pytest.skip("torch has brought no OpenMP runtime with GOMP_parallel")
    for n in (2, 3, 5):
        threads(n)
        done = np.zeros(50, np.int64)
        _threads.run(count_blocks, 50, 1 << 30, done, 8)
        assert done.tolist() == [1] * 50


def test_a_kernel_that_finds_no_memory_raises_from_any_thread(threads, eager_threads, helpers):
    threads(2)
    done = np.zeros(50, np.int64)
    with pytest.raises(MemoryError):
        _threads.run(count_blocks, 50, 1 << 30, done, 1 << 60)
    _threads.run(count_blocks, 50, 1 << 30, done, 8)
    assert done.min() == 1


def test_a_kernel_at_addresses_that_finds_no_memory_raises():
    done = np.zeros(50, np.int64)
    kernel, address = by_address.at_addresses(count_blocks), done.ctypes.data
    with pytest.raises(MemoryError):
        kernel(0, 50, done, 1 << 60, address)
    kernel(0, 50, done, 8, address)
    assert done.tolist() == [1] * 50


def test_openmp_is_left_alone_without_torch_and_in_a_forked_child():
    code = """
import os, sys, numpy
from hw3gpu.kernels.cpu._numba import compile, elements, openmp, threads
from hw3gpu.kernels.cpu import batch_norm, cross_entropy, softmax
assert openmp.openmp() == 0 and "torch" not in sys.modules
import torch
assert openmp.openmp() != 0 or sys.platform != "linux"
child = os.fork()
if child == 0:
    os._exit(openmp.openmp() != 0)
sys.exit(os.waitpid(child, 0)[1])
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_thread_that_outlives_the_main_one_computes():
    """concurrent.futures refuses work by then."""
    code = """
import threading
from hw3gpu.kernels.cpu._numba import threads

def last():
    threading.main_thread().join()
    done = []
    threads.run(lambda first, last: done.extend(range(first, last)), 50, 1 << 30)
    print(sorted(done) == list(range(50)))

threads.set_num_threads(3)
threads.run(lambda first, last: None, 50, 1 << 30)
threading.Thread(target=last).start()
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert (output.stdout, output.stderr) == ("True\n", "")


class Softmaxes(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        _threads.BYTES_PER_THREAD = 1
        call = run_softmax(np.random.default_rng(i), (50, 40, 1))
        return torch.from_numpy(call()[0])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(threads, eager_threads, method):
    threads(2)
    expected = [Softmaxes()[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(
        Softmaxes(), batch_size=None, num_workers=2 if method == "fork" else 1, multiprocessing_context=method, timeout=120
    )
    for y, y_expected in zip(loader, expected, strict=True):
        assert torch.equal(y, y_expected)


class Recorder:
    """A stand-in for a kernel, which notes the blocks and the thread of each call."""

    def __init__(self, error_at=None):
        self.calls, self.error_at = [], error_at

    def __call__(self, first, last, *args):
        self.calls.append((first, last, threading.get_ident()))
        if self.error_at is not None and first <= self.error_at < last:
            raise ArithmeticError(f"block {self.error_at}")
        time.sleep(0.005)

    def blocks(self):
        return sorted(b for first, last, _ in self.calls for b in range(first, last))


def test_every_block_is_done_once_by_several_threads(threads):
    threads(3)
    kernel = Recorder()
    _threads.run(kernel, 50, 1 << 27)  # one stretch: of several, each may have others of the pool's threads
    assert kernel.blocks() == list(range(50))
    assert len({thread for *_, thread in kernel.calls}) == 3


@pytest.mark.parametrize(("n", "cost"), [(4, 1000), (1, 1 << 28)], ids=["small work", "one thread"])
def test_what_stays_on_the_calling_thread(threads, n, cost):
    threads(n)
    kernel = Recorder()
    _threads.run(kernel, 50, cost)
    assert kernel.calls == [(0, 50, threading.get_ident())]


@pytest.mark.parametrize("block", [0, 25, 49])
def test_an_error_in_any_thread_reaches_the_caller(threads, block):
    threads(3)
    with pytest.raises(ArithmeticError, match=f"block {block}"):
        _threads.run(Recorder(error_at=block), 50, 1 << 30)
    kernel = Recorder()
    _threads.run(kernel, 50, 1 << 30)
    assert kernel.blocks() == list(range(50))


def test_the_number_of_threads_is_torchs_unless_it_is_set(threads):
    before = torch.get_num_threads()
    try:
        threads(None)
        torch.set_num_threads(5)
        assert _threads.num_threads() == 5
        threads(3)
        assert _threads.num_threads() == 3
        with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
            threads(0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"OMP_NUM_THREADS": "3"}, "3"),
        ({"OMP_NUM_THREADS": "6,2"}, "6"),
        ({"OMP_NUM_THREADS": "3", "HW3GPU_NUM_THREADS": "2"}, "2"),
        ({"OMP_NUM_THREADS": "many"}, "every"),
        ({}, "every"),
    ],
    ids=str,
)
def test_the_number_of_threads_from_the_environment(variables, expected):
    code = "import os; from hw3gpu.kernels.cpu._numba import threads as t; print(t.num_threads(), len(os.sched_getaffinity(0)))"
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "HW3GPU_NUM_THREADS")}
    output = subprocess.run([sys.executable, "-c", code], env=clean | variables, capture_output=True, text=True, check=True)
    threads, cpus = output.stdout.split()
    assert threads == (cpus if expected == "every" else expected)


@pytest.mark.parametrize("text", ["foo", "0", "-2", "1.5", "²"])
def test_a_number_of_threads_that_is_none_is_refused_before_the_kernels_are_imported(text, monkeypatch):
    monkeypatch.setenv("HW3GPU_NUM_THREADS", text)
    with pytest.raises(ValueError, match=f"HW3GPU_NUM_THREADS: expected a number of threads of at least 1, got '{text}'"):
        dispatch.softmax.__wrapped__("cpu")
    monkeypatch.setenv("HW3GPU_NUM_THREADS", "3,2")
    assert dispatch.softmax.__wrapped__("cpu")


def test_the_first_row_without_a_class_is_noted_by_whichever_thread(rng, threads, eager_threads):
    threads(4)
    z, target = rng.standard_normal((500, 8, 1)).astype(np.float32), rng.integers(0, 8, (500, 1))
    target[[77, 130, 444], 0] = 8, -1, 2**40
    loss, dz, invalid = np.empty((500, 1), np.float32), np.empty_like(z), np.full(1, 500)
    cross_entropy.forward_backward(z, target, None, loss, dz, invalid, ignore_index=-100, label_smoothing=0.0)
    assert invalid[0] == 77
    assert np.flatnonzero(np.isnan(loss)).tolist() == [77, 130, 444]
    assert np.flatnonzero(np.isnan(dz).all((1, 2))).tolist() == [77, 130, 444]
