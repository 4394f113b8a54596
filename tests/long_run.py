"""Mixed calls, forward and backward, for as long as asked: how memory and time go.

`python tests/long_run.py --calls 100000` prints, of the second half, bytes of resident memory a call (least squares) and the
time of a call beside the first half's; and how far running statistics lie from the same recursion in float64.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import hw3gpu
import hw3gpu.functional as HF

EVERY = 100  # calls between two readings


class Found(NamedTuple):
    bytes_a_call: float
    slower: float  # time of a call in the second half, over that in the first, by medians
    drift: float  # of running statistics, in units of what rounding explains


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def calls() -> list:
    rng = np.random.default_rng(0)
    x, W = torch.from_numpy(rng.standard_normal((24, 40))).float(), torch.from_numpy(rng.standard_normal((9, 40))).float()
    images, target = torch.from_numpy(rng.standard_normal((4, 6, 5, 5))).float(), torch.from_numpy(rng.integers(0, 9, 24))
    large = torch.from_numpy(rng.standard_normal((600, 500))).float()  # in pooled memory
    sigma = np.cov(rng.standard_normal((30, 8)).T)
    weight = torch.ones(6, requires_grad=True)

    def batch_norm() -> None:
        HF.batch_norm(images.clone().requires_grad_(), None, None, weight, training=True, activation="relu").sum().backward()
        weight.grad = None

    def linear() -> None:
        leaf = W.clone().requires_grad_()
        HF.linear_cross_entropy(x, leaf, target).backward()

    def loss(dtype: torch.dtype = torch.float32, **options: object) -> None:
        leaf = x.to(dtype, copy=True).requires_grad_()
        HF.cross_entropy(leaf, target, **options).backward()  # type: ignore[arg-type]

    def refused() -> None:
        try:
            HF.cross_entropy(x, target + 100)
        except IndexError:
            return
        raise AssertionError("a class out of range was taken")

    return [
        batch_norm, linear, loss, lambda: loss(torch.bfloat16, z_loss=1e-3), lambda: hw3gpu.softmax(large), refused,
        lambda: HF.token_log_probs(x.half(), target), lambda: hw3gpu.softmax(x.numpy()), lambda: hw3gpu.moments(x.numpy()),
        lambda: hw3gpu.minimize_trace(sigma, 2), lambda: hw3gpu.batch_norm(images.numpy()),
    ]  # fmt: skip


def drift(steps: int) -> float:
    """Of running statistics after that many training steps on ever new batches: |float32 - float64| over its bound."""
    rng = np.random.default_rng(1)
    batches = torch.from_numpy(rng.standard_normal((64, 8, 4)) * 3 + rng.standard_normal(4)).float()
    mean, var = torch.zeros(4), torch.ones(4)
    expected = [np.zeros(4), np.ones(4)]
    new = [(b.double().mean(0).numpy(), b.double().var(0).numpy()) for b in batches]
    for i in range(steps):
        k = i * 29 % 64
        HF.batch_norm(batches[k], mean, var, training=True, momentum=0.1)
        for j in (0, 1):
            expected[j] = 0.9 * expected[j] + 0.1 * new[k][j]
    # a step has 4 roundings of what it holds, and the statistics of a batch 20 more of theirs; the past fades by 0.9 a step
    sizes = [max(np.abs(n[j]).max() for n in new) for j in (0, 1)]
    return max(
        float(np.abs(found.numpy() - e).max() / (2.0**-24 * (4 / 0.1 + 20) * size))
        for found, e, size in zip((mean, var), expected, sizes, strict=True)
    )


def run(number: int) -> Found:
    of, memory, times = calls(), [], []
    for call in of * 3:
        call()
    for i in range(number // EVERY):
        start = time.thread_time()
        for k in range(EVERY):
            of[(i * EVERY + k) % len(of)]()
        times.append(time.thread_time() - start)
        gc.collect(0)
        memory.append(resident())
    half = len(memory) // 2
    slope = np.polyfit(EVERY * np.arange(len(memory) - half), memory[half:], 1)[0]
    return Found(float(slope), float(np.median(times[half:]) / np.median(times[:half])), drift(number))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    found = run(parser.parse_args().calls)
    print(
        f"{found.bytes_a_call:.2f} bytes a call, {found.slower:.3f} times the time, {found.drift:.3f} of the bound of the drift"
    )
    sys.exit(found.bytes_a_call > 16 or found.slower > 1.1 or found.drift > 1)
