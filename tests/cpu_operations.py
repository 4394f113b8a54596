"""Operations of the CPU kernels on random arrays, for the tests of threads, strides and memory to repeat."""

from __future__ import annotations

import numpy as np
import torch

from hw3gpu.kernels.cpu import batch_norm, cross_entropy, softmax
from hw3gpu.kernels.cpu._numba import elements

HALVES = {"bfloat16": (torch.bfloat16, np.uint16), "float16": (torch.float16, np.int16)}


def random_array(rng, shape, dtype="float32"):
    """Random values as the kernels take them: halves as bits."""
    values = rng.standard_normal(shape)
    if dtype in HALVES:
        torch_dtype, bits_dtype = HALVES[dtype]
        return torch.from_numpy(values).to(torch_dtype).view(torch.int16).numpy().view(bits_dtype)
    return values.astype(dtype)


def channels_last(x):
    return np.ascontiguousarray(x.transpose(0, 2, 1)).transpose(0, 2, 1)


def run_softmax(rng, shape, dtype="float32"):
    z, dy = random_array(rng, shape, dtype), random_array(rng, shape, dtype)

    def call():
        y, dz = np.empty_like(z), np.empty_like(z)
        softmax.forward(z, y)
        softmax.backward(dy, y, dz)
        return y, dz

    return call


def run_cross_entropy(rng, shape, dtype="float32", soft=False):
    N, V, S = shape
    z = random_array(rng, shape, dtype)
    acc = elements.accumulate_dtype(z)
    target = random_array(rng, shape, dtype) if soft else rng.integers(0, V, (N, S))
    weight, options = rng.uniform(0.5, 1, V).astype(acc), {"ignore_index": 1, "label_smoothing": 0.1}

    def call():
        loss, stats, invalid = np.empty((N, S), acc), np.empty((3, N, S), acc), np.full(1, N * S)
        dz, dz_at_once, total, count = np.empty_like(z), np.empty_like(z), np.empty(1, acc), np.empty(1, acc)
        cross_entropy.forward(z, target, weight, loss, stats, invalid, **options)
        cross_entropy.reduce(loss, target, weight, total, count, ignore_index=1)
        cross_entropy.backward(z, target, weight, stats, np.broadcast_to(total, (N, S)), count, dz, **options)
        cross_entropy.forward_backward(z, target, weight, loss, dz_at_once, invalid, **options)
        return loss, stats, dz, dz_at_once, total, count

    return call


def run_batch_norm(rng, shape, dtype="float32", layout=np.ascontiguousarray):
    C = shape[1]
    x, dy = layout(random_array(rng, shape, dtype)), layout(random_array(rng, shape, dtype))
    acc = elements.accumulate_dtype(x)
    gamma, beta = rng.standard_normal((2, C)).astype(acc)

    def call():
        y, dx, dx_apart = np.empty_like(x), np.empty_like(x), np.empty_like(x)
        mean, (var, rstd, dgamma, dbeta) = np.empty((2, C), acc), np.empty((4, C), acc)
        running = np.zeros(C, acc), np.ones(C, acc)
        batch_norm.forward(x, gamma, beta, y, mean, var, rstd, *running, eps=1e-5, momentum=0.1)
        batch_norm.backward(dy, x, mean, rstd, gamma, dx, dgamma, dbeta)
        batch_norm.statistics(x, mean, var, rstd, None, None, eps=1e-5, momentum=0.1)
        batch_norm.backward_reduce(dy, x, mean, rstd, dgamma, dbeta)
        batch_norm.backward_apply(dy, x, mean, rstd, gamma, dgamma, dbeta, x.size / C, dx_apart)
        return y, mean, var, rstd, *running, dx, dx_apart, dgamma, dbeta

    return call


OPERATIONS = {
    "softmax": lambda rng: run_softmax(rng, (300, 700, 1)),
    "softmax, bfloat16": lambda rng: run_softmax(rng, (300, 1100, 1), "bfloat16"),
    "softmax, classes in the middle": lambda rng: run_softmax(rng, (4, 21, 2500)),
    "cross entropy": lambda rng: run_cross_entropy(rng, (150, 1500, 1)),
    "cross entropy, float16": lambda rng: run_cross_entropy(rng, (300, 1500, 1), "float16"),
    "cross entropy, soft targets": lambda rng: run_cross_entropy(rng, (90, 2500, 1), soft=True),
    "batch norm, planes": lambda rng: run_batch_norm(rng, (6, 40, 900)),
    "batch norm, few channels": lambda rng: run_batch_norm(rng, (4, 3, 20_000)),
    "batch norm, small planes": lambda rng: run_batch_norm(rng, (37, 150, 49)),
    "batch norm, channels-last": lambda rng: run_batch_norm(rng, (5, 24, 2000), layout=channels_last),
    "batch norm, channels-last, 3 channels": lambda rng: run_batch_norm(rng, (4, 3, 20_000), layout=channels_last),
    "batch norm, float64": lambda rng: run_batch_norm(rng, (4, 20, 1500), "float64"),
}


def same_bits(a, b):
    return len(a) == len(b) and all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))
