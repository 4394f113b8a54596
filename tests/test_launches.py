"""Evidence step 4: the library's own host code, on tensors of any size that have no memory, under a stand-in driver.

A `meta` tensor cannot be read, so that a call that asks the device for a value, or waits for it, raises here.
"""

from __future__ import annotations

import mmap

import pytest
import torch

import hw3gpu.functional as HF
from benchmarks.evidence.compile_without_gpu import StandIn
from hw3gpu.kernels.gpu import batch_norm, cross_entropy, softmax
from hw3gpu.kernels.gpu._batch_norm import backward, forward

GRID = (2**31 - 1, 65535, 65535)
BF16 = torch.bfloat16


def meta(*shape, dtype=torch.float32, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(grad)


def losses(N, V, *positions, soft=False, **options):
    def call():
        z = meta(N, V, *positions, dtype=BF16, grad=True)
        target = meta(N, V, *positions, dtype=BF16) if soft else meta(N, *positions, dtype=torch.int64)
        loss = HF.cross_entropy(z, target, ignore_index=-100, label_smoothing=0.1, **options)
        (loss[0] if isinstance(loss, tuple) else loss).backward()

    return call


def linear(N, D, V):
    def call():
        x, W = meta(N, D, dtype=BF16, grad=True), meta(V, D, dtype=BF16, grad=True)
        HF.linear_cross_entropy(x, W, meta(N, dtype=torch.int64)).backward()

    return call


def softmaxes(N, V):
    def call():
        HF.softmax(meta(N, V, dtype=BF16, grad=True), -1).sum().backward()

    return call


def norms(*shape, channels_last=False, training=True):
    def call():
        C = shape[1]
        x = meta(shape[0], *shape[2:], C, dtype=BF16).movedim(-1, 1) if channels_last else meta(*shape, dtype=BF16)
        x.requires_grad_()
        running, weight, bias = (meta(C), meta(C)), meta(C, grad=True), meta(C, grad=True)
        HF.batch_norm(x, *running, weight, bias, training=training).sum().backward()

    return call


CALLS = {
    "cross entropy, one row": losses(1, 10),
    "cross entropy, 2**33 logits, V = 50257": losses(2**33 // 50257, 50257),
    "cross entropy, 2**33 logits, V = 131072": losses(2**16, 2**17),
    "cross entropy, 2**33 logits, V = 2": losses(2**32, 2),
    "cross entropy, 2**33 logits, pixels": losses(2**9, 2**4, 2**10, 2**10),
    "cross entropy, 2**33 soft targets": losses(2**18, 2**15, soft=True),
    "cross entropy in the forward pass": losses(2**10, 50257, gradient="forward", all_ignored="zero"),
    "cross entropy with every extra": losses(2**10, 32000, z_loss=0.1, softcap=30.0, return_stats=True),
    "linear cross entropy": linear(2**8, 2**6, 2**15),
    "softmax, one row": softmaxes(1, 3),
    "softmax, 2**33 numbers": softmaxes(2**20, 2**13),
    "softmax, one row of 2**27": softmaxes(64, 2**27),
    "batch norm, (2, 1)": norms(2, 1),
    "batch norm, 2**33 numbers": norms(2**11, 2**8, 2**7, 2**7),
    "batch norm, 2**33 numbers, one channel": norms(2**9, 1, 2**12, 2**12),
    "batch norm, 2**33 numbers, many channels": norms(2**3, 2**28, 4),
    "batch norm, 2**33 numbers, channels-last": norms(2**11, 2**8, 2**7, 2**7, channels_last=True),
    "batch norm, 2**33 numbers, evaluation": norms(2**11, 2**8, 2**7, 2**7, training=False),
    "batch norm, 7x7 planes": norms(64, 2048, 7, 7),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_every_launch_compiles_and_stays_within_cudas_grid(call):
    with StandIn(90) as device:
        call()
    assert len(device.launches) >= 2
    for launch in device.launches:
        assert all(1 <= n <= most for n, most in zip(launch.grid, GRID, strict=True)), launch.grid


def test_a_grid_beyond_cudas_would_be_seen():
    with StandIn(90) as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax, "cdiv", lambda a, b: a)
        softmax.forward(meta(2**32, 2, 1), meta(2**32, 2, 1))
    assert device.launches[0].grid[0] > GRID[0]


def test_nothing_asks_the_host_to_wait():
    """What would is seen: a value of a meta tensor cannot be had."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        int(meta(1, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------- far rows
@pytest.fixture
def far_rows():
    """(5, 1, 40) float32, each row 2**30 elements after the last: address space, of which five pages are touched.

    The number of a row and the stride fit 32 bits, their product does not.
    """
    unreserved = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's; Python names it from 3.13 on
    memory = mmap.mmap(-1, 2**34 + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved)
    flat = torch.frombuffer(memory, dtype=torch.float32)
    rows = flat.as_strided((5, 1, 40), (2**30, 2**29, 1))
    rows.copy_(torch.randn(5, 1, 40))
    return rows


@pytest.mark.interpreter
def test_rows_beyond_2_to_the_31_are_found(far_rows):
    z, y = far_rows.movedim(2, 1), torch.empty(5, 40, 1)
    softmax.forward(z, y)
    torch.testing.assert_close(y, torch.softmax(z.clone(), 1))
    loss, invalid, dz = torch.empty(5, 1), torch.full((1,), 5), torch.empty(5, 40, 1)
    target = torch.tensor([[3], [39], [0], [7], [20]])
    cross_entropy.forward_backward(z, target, None, loss, dz, invalid, ignore_index=-100, label_smoothing=0.0)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(z.clone(), target, reduction="none"))


@pytest.mark.interpreter
def test_samples_beyond_2_to_the_31_are_found(far_rows):
    y, stats = torch.empty(5, 1, 40), [torch.empty(2, 1), torch.empty(1), torch.empty(1)]
    batch_norm.forward(far_rows, None, None, y, *stats, None, None, eps=1e-5, momentum=0.0)
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(far_rows.clone(), None, None, training=True))


# ---------------------------------------------------------------------------------------------- compilations
def compiled(*kernels):
    """How many specialisations the kernels have been compiled for."""
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def test_a_new_size_compiles_nothing_new():
    """A hundred sizes of one plan and alignment share their kernels."""
    kernels = (cross_entropy._forward_kernel, cross_entropy._backward_kernel, cross_entropy._reduce_kernel)
    with StandIn(90):
        losses(64, 1032)()
        losses(64, 1040)()  # strides that 16 divides are a class
        before = compiled(*kernels)
        for i in range(100):
            losses(64 + 3 * i, 1032 + 8 * i)()
        assert compiled(*kernels) == before
        losses(64, 1001)()  # rows off 16 bytes are another class
        assert compiled(*kernels) > before


def test_a_new_image_size_compiles_nothing_new():
    kernels = (
        forward._statistics_kernel,
        forward._normalize_kernel,
        forward._forward_kernel,
        backward._backward_kernel,
    )
    with StandIn(90):
        for side in (56, 60):
            norms(32, 256, side, side)()
        before = compiled(*kernels)
        for i in range(100):
            norms(32 + i, 256, 56 + 4 * (i % 3), 56)()
        assert compiled(*kernels) == before
