"""The Triton kernels read and write inside their arguments alone: every load and store of this leg is held to it.

`memory_guard.py` looks at all tests of the leg. Here are sizes at which a block hangs over an end: rows, channels and classes
that are no multiple of one, and arrays of which the last block is the only one.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import hw3gpu.functional as F
from hw3gpu import moments
from hw3gpu.kernels.gpu import cross_entropy

pytestmark = pytest.mark.interpreter

ROWS = [(3, 5), (1, 5, 3)]


def test_a_load_and_a_store_beside_an_argument_are_seen():
    import triton
    import triton.language as tl
    from triton.runtime.errors import InterpreterError

    @triton.jit
    def copy_kernel(x_ptr, y_ptr, x_size, y_size, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < x_size), mask=at < y_size)

    memory = torch.zeros(16)
    x, y = memory[:7], memory[9:]
    copy_kernel[(1,)](x, y, 7, 7, BLOCK=8)
    for sizes in ((8, 7), (7, 8)):
        with pytest.raises(InterpreterError, match="in none of"):
            copy_kernel[(1,)](x, y, *sizes, BLOCK=8)


def _both_ways(function, *operands, **options):
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in operands]
    results = function(*inputs, **options)
    first = results if isinstance(results, torch.Tensor) else results[0]
    first.backward(torch.ones_like(first))


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows(device, shape):
    """Softmax and the losses of rows."""
    z, rows = torch.randn(shape), (shape[0], *shape[2:])
    target = torch.randint(shape[1], rows)
    for of in (z, torch.randn(shape[0] + 1, shape[1] + 1, *shape[2:])[1:, 1:]):
        _both_ways(F.softmax, of, dim=1)
        _both_ways(F.token_log_probs, of, target, dim=1)
        for reduction, gradient in itertools.product(("none", "mean"), ("forward", "backward")):
            _both_ways(F.cross_entropy, of, target, reduction=reduction, gradient=gradient)
        _both_ways(F.cross_entropy, of, target, torch.rand(shape[1]), label_smoothing=0.1, z_loss=0.1, softcap=3.0)
        _both_ways(F.cross_entropy, of, of.softmax(1), return_stats=True)
        _both_ways(F.distillation_loss, of, torch.randn(shape), dim=1, kind="jensen_shannon", temperature=2.0)


def test_rows_with_an_upstream_gradient_each():
    """The launcher's own promise; the public functions have one position a sample there."""
    z, target, loss = torch.randn(1, 5, 3), torch.randint(5, (1, 3)), torch.empty(1, 3)
    dz, invalid, upstream = torch.empty_like(z), torch.full((1,), 3), torch.rand(1, 3)
    cross_entropy.forward_backward(
        z, target, None, loss, dz, invalid, upstream=upstream, ignore_index=-100, label_smoothing=0.0
    )


@pytest.mark.parametrize("shape", [(3, 5), (1, 3, 5)], ids=str)
def test_channels(device, shape):
    """Batch normalisation."""
    C = shape[1]
    for x in (torch.randn(shape), torch.randn(shape[0], *shape[2:], C).movedim(-1, 1), torch.randn(*shape[:2], 40)[..., 1:8]):
        statistics = torch.zeros(C), torch.ones(C)
        parameters = torch.rand(C), torch.rand(C)
        training = x.numel() > C
        _both_ways(lambda x, w, b, on=training, s=statistics: F.batch_norm(x, *s, w, b, on), x, *parameters)
        _both_ways(lambda x, r, s=statistics: F.batch_norm(x, *s, residual=r, activation="relu"), x, x)
        if training and x.dim() > 2:
            mask = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool)
            _both_ways(lambda x, s=statistics, m=mask: F.batch_norm(x, *s, training=True, mask=m, activation="silu"), x)


@pytest.mark.parametrize(("n", "m"), [(3, 5), (33, 17)])
def test_points(device, n, m):
    """Moments."""
    for dtype in (torch.float32, torch.float64):
        moments(torch.randn(n, m, dtype=dtype))
        moments(torch.randn(2, m, n, dtype=dtype).mT)
