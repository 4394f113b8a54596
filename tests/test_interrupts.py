"""Threads, processes and signals: whole calls of the library at once, in workers, cut short, and at the interpreter's end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_values import bits

import hw3gpu
import hw3gpu.functional as HF

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def child(code: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=ENVIRONMENT | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# ---------------------------------------------------------------------------------------------- threads
def operations(rng):
    x = torch.from_numpy(rng.standard_normal((33, 70)))
    target, sigma = torch.from_numpy(rng.integers(0, 70, 33)), np.cov(rng.standard_normal((20, 9)).T)

    def step():
        z = x.float().requires_grad_()
        loss = HF.cross_entropy(HF.batch_norm(z, None, None, training=True, activation="relu"), target)
        return loss, *torch.autograd.grad(loss, z)

    def tokens():
        z = x.bfloat16().requires_grad_()
        found = HF.token_log_probs(z, target)
        return *found, *torch.autograd.grad(sum(v.sum() for v in found), z)

    def linear():
        W = x.float()[:7].requires_grad_()
        loss = HF.linear_cross_entropy(x.float(), W, target % 7, chunk_rows=5)
        return loss, *torch.autograd.grad(loss, W)

    return [
        step, tokens, linear, lambda: (hw3gpu.softmax(x.half()),), lambda: tuple(hw3gpu.moments(x.numpy())),
        lambda: (hw3gpu.minimize_trace(sigma, 3).phi,), lambda: (hw3gpu.points_with_moments(sigma[0], sigma, rng=3),),
    ]  # fmt: skip


def test_mixed_operations_from_many_threads_give_the_serial_bits_and_leave_no_thread(rng):
    calls = operations(rng)
    expected = [[bits(v) for v in call()] for call in calls]
    before, wrong = set(threading.enumerate()), []

    def work(k):
        for i in range(40):
            which = (k + i) % len(calls)
            try:
                if [bits(v) for v in calls[which]()] != expected[which]:
                    wrong.append((k, i, which))
            except Exception as error:
                wrong.append((k, i, which, repr(error)))

    workers = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert wrong == []
    assert {thread for thread in threading.enumerate() if not thread.name.startswith("hw3gpu-")} <= before


# ---------------------------------------------------------------------------------------------- processes
def share(x, out, answers, received):
    """Reads a tensor of the parent's, writes one, and sends a large result, which is pooled memory, through a queue."""
    torch.set_num_threads(1)  # a forked child waits for ever for OpenMP's threads, which its parent has
    out.copy_(hw3gpu.softmax(x))
    large = HF.softmax(x.repeat(40, 1), 1)
    answers.put((large, float(HF.cross_entropy(x, torch.zeros(len(x), dtype=torch.int64)))))
    received.wait(60)  # as PyTorch asks of whoever sends a tensor


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_tensors_shared_with_another_process(rng, method):
    import torch.multiprocessing as mp

    x = torch.from_numpy(rng.standard_normal((64, 300))).float().share_memory_()
    out = torch.zeros_like(x).share_memory_()
    context = mp.get_context(method)
    answers, received = context.Queue(), context.Event()
    process = context.Process(target=share, args=(x, out, answers, received), daemon=True)
    process.start()
    large, loss = answers.get(timeout=120)
    received.set()
    expected = hw3gpu.softmax(x)
    assert torch.equal(large, expected.repeat(40, 1))
    assert loss == float(HF.cross_entropy(x, torch.zeros(64, dtype=torch.int64)))
    del large
    process.join(60)
    assert process.exitcode == 0
    assert torch.equal(out, expected)


# ---------------------------------------------------------------------------------------------- signals and the end
LONG = """
import os, signal, sys, threading, time
import numpy as np
import hw3gpu
from hw3gpu.kernels.cpu._numba import compile, threads
if sys.argv[1:] == ["openmp"]:
    import torch

@compile.kernel
def busy(first, last, done):
    for block in range(first, last):
        for i in range(20_000_000):
            done[block] = done[block] * 1.0000001 + i

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job has not
threads.set_num_threads(int(os.environ["THREADS"]))
done = np.zeros(4000)
threads.run(busy, 8, 1 << 22, done)  # compiles it
sent = []
threading.Timer(0.3, lambda: (sent.append(time.monotonic()), os.kill(os.getpid(), signal.SIGINT))).start()
try:
    threads.run(busy, 4000, 1 << 36, done)  # a minute and more
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - sent[0])
z = np.random.default_rng(0).standard_normal((300, 700)).astype("float32")
y = hw3gpu.softmax(z)
print("usable", abs(y.sum(1) - 1).max() < 1e-5, (hw3gpu.softmax(z) == y).all())
"""


@pytest.mark.parametrize(("threads", "which"), [("1", "own"), ("2", "own"), ("2", "openmp")])
def test_ctrl_c_in_a_long_kernel_returns_within_a_second_and_leaves_the_library_usable(threads, which):
    process = child(LONG.replace("sys.argv[1:] == [", f"[{which!r}] == ["), THREADS=threads)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    told, usable = out.splitlines()
    assert usable == "usable True True"
    # a stretch of these is two blocks a thread, 0.1 s here where nothing else runs
    assert float(told.removeprefix("interrupted ")) < 1.0 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


AT_THE_END = """
import threading
import numpy as np
import torch
import hw3gpu
from hw3gpu.kernels.cpu._numba import threads
threads.BYTES_PER_THREAD = 1
threads.set_num_threads(3)
z = np.random.default_rng(0).standard_normal((400, 900))
hw3gpu.softmax(z)

def for_ever():
    while True:
        hw3gpu.softmax(z)
        hw3gpu.batch_norm(z)

for _ in range(3):
    threading.Thread(target=for_ever, daemon=True).start()
print("ends")
"""


def test_the_interpreter_ends_with_work_in_flight():
    """Of arrays: daemon threads inside PyTorch's own operations abort a process at its end, without this library too."""
    process = child(AT_THE_END)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip(), err) == (0, "ends", "")


def test_a_signal_that_ends_the_process_leaves_no_file_behind(tmp_path):
    """Nothing but compiled kernels, in the one folder that is for them."""
    code = "import hw3gpu, numpy as np, time; hw3gpu.softmax(np.ones((3, 4))); print('ready', flush=True); time.sleep(60)"
    process = child(code, TMPDIR=str(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


SUBINTERPRETER = """
import _interpreters
import hw3gpu, numpy as np
other = _interpreters.create()
told = _interpreters.exec(other, "import hw3gpu, numpy as np; hw3gpu.softmax(np.ones((2, 3)))")
print(told.formatted if told is not None else "ran", hw3gpu.softmax(np.ones((1, 2))).tolist())
"""


def test_a_subinterpreter_is_refused_in_a_sentence():
    if sys.version_info < (3, 13):
        pytest.skip("sub-interpreters have had a module since Python 3.13")
    out, err = child(SUBINTERPRETER).communicate(timeout=60)
    assert "ImportError" in out, err
    assert "[[0.5, 0.5]]" in out


def test_time_between_signals_is_bounded_by_what_a_stretch_moves():
    from hw3gpu.kernels.cpu._numba import threads

    calls = []
    before, threads._setting = threads._setting, 1
    try:
        threads.run(lambda first, last: calls.append((first, last)), 1000, 10 * threads.BYTES_AT_ONCE)
    finally:
        threads._setting = before
    assert len(calls) == 10
    assert [b for first, last in calls for b in range(first, last)] == list(range(1000))
