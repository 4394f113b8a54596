"""Evidence step 4: the library's own host code, on tensors of any size that have no memory, under a stand-in driver.

A `meta` tensor cannot be read, so that a call that asks the device for a value, or waits for it, raises here.
"""

from __future__ import annotations

import gc
import mmap

import pytest
import torch
import triton
import triton.language as tl
from offsets import too_narrow
from triton.compiler import CompiledKernel

import hw3gpu.functional as HF
from benchmarks.evidence.compile_without_gpu import StandIn
from hw3gpu.kernels.gpu import batch_norm, cross_entropy, distillation, moments, softmax, token_log_probs
from hw3gpu.kernels.gpu._batch_norm import backward, forward, valid

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


def strided(call, S=2**18, V=2**15):
    """Rows whose classes stand S apart: of V classes, so that one row spans 2**33 elements."""

    def run():
        z, dz = (meta(1, V, S, dtype=BF16) for _ in range(2))
        call(z, dz, meta(1, S, dtype=torch.int64), *(meta(n, 1, S) for n in (1, 4, 8)))

    return run


def _softmaxes(z, dz, *_):
    softmax.forward(z, dz)
    softmax.backward(z, z, dz)


def _losses(z, dz, target, loss, stats, _):
    options = {"ignore_index": -100, "label_smoothing": 0.1}
    cross_entropy.forward(z, target, None, loss[0], stats[:3], meta(1, dtype=torch.int64), **options)
    cross_entropy.backward(z, target, None, stats[:3], loss[0], None, dz, **options)
    cross_entropy.forward_backward(z, z, None, loss[0], dz, meta(1, dtype=torch.int64), **options)


def _tokens(z, dz, target, loss, stats, _):
    options = {"ignore_index": -100, "temperature": 0.7}
    of_row = loss[0]
    token_log_probs.forward(z, target, of_row, of_row, of_row, stats, meta(1, dtype=torch.int64), **options)
    token_log_probs.backward(z, target, stats, of_row, of_row, of_row, dz, **options)


def divergences(kind):
    def call(z, dz, target, loss, _, stats):
        options = {"kind": kind, "beta": 0.3, "temperature": 0.7}
        distillation.forward(z, z, None, loss[0], stats, **options)
        distillation.backward(z, z, None, stats, loss[0], dz, dz, **options)

    return call


def points(B, n, m, dtype=torch.float64):
    def call():
        F64 = torch.float64
        state = [meta(*shape, dtype=F64) for shape in ((B, m), (2, B, m), (2, B, m, m), (B, m))]
        moments.update(meta(B, n, m, dtype=dtype), *state, count=0)
        moments.merge(*state, *state, more=n, count=n)
        moments.finish(*state, meta(B, m), meta(B, m, m), count=n, divisor=n)

    return call


def far_gradients(N, C, S):
    """Rows off 16 bytes whose upstream gradient is channels-last: its lanes are C apart."""

    def call():
        x, dx, stats = meta(N, C, S, dtype=BF16), meta(N, C, S, dtype=BF16), [meta(2, C), *(meta(C) for _ in range(4))]
        dy = meta(N, S, C, dtype=BF16).movedim(-1, 1)
        batch_norm.backward(dy, x, stats[0], stats[1], stats[2], dx, stats[3], stats[4])

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
    "batch norm, 2**33 numbers, many channels of 2**5 positions": norms(2, 2**27, 2**5),
    "batch norm, 2**33 numbers, channels-last": norms(2**11, 2**8, 2**7, 2**7, channels_last=True),
    "batch norm, 2**33 numbers, evaluation": norms(2**11, 2**8, 2**7, 2**7, training=False),
    "softmax, a strided row": strided(_softmaxes),
    "cross entropy, a strided row": strided(_losses),
    "log-probabilities, a strided row": strided(_tokens),
    "divergence, a strided row": strided(divergences("forward")),
    "divergence from a mixture, a strided row": strided(divergences("jensen_shannon")),
    "moments, 2**32 numbers of a scatter": points(1, 100, 2**16),
    "moments, 2**33 numbers of points": points(2**5, 2**24, 2**4, torch.float32),
    "moments, 2**33 points": points(1, 2**33, 1, torch.float32),
    "batch norm, another layout upstream": far_gradients(1, 2**6, 2**27 + 1),
    "batch norm, 7x7 planes": norms(64, 2048, 7, 7),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_every_launch_compiles_and_stays_within_cudas_grid(call):
    """And no product or sum of 32 bits that may leave these leads to a global address."""
    with StandIn(90) as device:
        call()
    assert len(device.launches) >= 2
    # also alive: what other tests compiled for AMD, which has no cubin
    kernels = [it for it in gc.get_objects() if type(it) is CompiledKernel and "cubin" in it.asm]
    ptx = {kernel.asm["cubin"]: kernel.asm["ptx"] for kernel in kernels}
    for launch in device.launches:
        assert all(1 <= n <= most for n, most in zip(launch.grid, GRID, strict=True)), launch.grid
        assert too_narrow(ptx[launch.binary], launch) == []


def test_a_grid_beyond_cudas_would_be_seen():
    with StandIn(90) as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax, "cdiv", lambda a, b: a)
        softmax.forward(meta(2**32, 2, 1), meta(2**32, 2, 1))
    assert device.launches[0].grid[0] > GRID[0]


@triton.jit
def _far(x_ptr, stride, WIDE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    tl.store(x_ptr + i * stride, 0.0)


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
def test_an_offset_in_32_bits_would_be_seen(wide):
    with StandIn(90) as device:
        kernel = _far[(2**16,)](meta(1), 2**16, WIDE=wide)
        found = too_narrow(kernel.asm["ptx"], device.launches[0])
    assert len(found) == (not wide)
    assert wide or "mul.lo.s32" in found[0] or "shl.b32" in found[0]


def test_nothing_asks_the_host_to_wait():
    """What would is seen: a value of a meta tensor cannot be had."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        int(meta(1, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------- far rows
def far(*shape, strides, fill=True):
    """float32 numbers in address space of which the pages that are written are there; zeros unless `fill`."""
    unreserved = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's; Python names it from 3.13 on
    elements = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    memory = mmap.mmap(-1, 4 * elements + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved)
    x = torch.frombuffer(memory, dtype=torch.float32).as_strided(shape, strides)
    return x.copy_(torch.randn(shape)) if fill else x


@pytest.fixture
def far_rows():
    """(5, 1, 40), each row 2**30 elements after the last: the number of a row and the stride fit 32 bits, their product does
    not."""
    return far(5, 1, 40, strides=(2**30, 2**29, 1))


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


@pytest.mark.interpreter
def test_classes_beyond_2_to_the_31_are_found():
    """Those that a loop over the classes reaches, 2**19 elements apart."""
    z, target = far(1, 8193, 1, strides=(1, 2**19, 1)), torch.tensor([[8192]])
    expected, y = torch.softmax(z.contiguous(), 1), torch.empty(1, 8193, 1)
    softmax.forward(z, y)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-9)
    stats, loss, invalid, options = (
        torch.empty(3, 1, 1),
        torch.empty(1, 1),
        torch.ones(1, dtype=torch.int64),
        {"ignore_index": -100},
    )
    cross_entropy.forward(z, target, None, loss, stats, invalid, label_smoothing=0.0, **options)
    cross_entropy.backward(z, target, None, stats, torch.ones(1, 1), None, y, label_smoothing=0.0, **options)
    expected[0, 8192] -= 1
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.interpreter
def test_another_layout_beyond_2_to_the_31_is_found():
    """At the edges of rows off 16 bytes, where the upstream gradient or the soft targets have a large stride."""
    x, dy = torch.randn(2 * 41 + 1)[1:].view(2, 1, 41), far(2, 1, 41, strides=(1, 1, 2**26))
    dx, mean, rstd = torch.empty(2, 1, 41), torch.stack([x.mean().view(1), torch.zeros(1)]), torch.ones(1)
    dgamma, dbeta = torch.empty(1), torch.empty(1)
    batch_norm.backward(dy, x, mean, rstd, None, dx, dgamma, dbeta)
    torch.testing.assert_close(dbeta[0], dy.double().sum().float())
    z, y = torch.randn(2 * 41 + 1)[1:].view(2, 41, 1), far(2, 41, 1, strides=(1, 2**26, 1)).abs_()
    loss, dz, invalid = torch.empty(2, 1), torch.empty(2 * 41 + 1)[1:].view(2, 41, 1), torch.ones(1, dtype=torch.int64)
    cross_entropy.forward_backward(z, y, None, loss, dz, invalid, ignore_index=-100, label_smoothing=0.0)
    expected = torch.softmax(z, 1) * y.contiguous().sum(1, keepdim=True) - y
    torch.testing.assert_close(dz, expected, rtol=1e-5, atol=1e-4)


@triton.jit
def _first_is_valid(valid_ptr, found_ptr, block, S, LANES: tl.constexpr):
    tile, layout = (tl.cast(0, tl.int64), tl.cast(block, tl.int32)), (1, 1, tl.cast(S, tl.int64))
    tl.store(found_ptr, valid.first_is_valid(valid_ptr, tile, layout, LANES).to(tl.int32))


@pytest.mark.interpreter
def test_masked_positions_beyond_2_to_the_31_are_found():
    """By the bit of the first lane of a tile, in whose bytes there are no others."""
    bits, found = far(2**27, strides=(1,), fill=False).view(torch.uint8), torch.zeros(1, dtype=torch.int32)
    position = 3 * 2**30
    for expected in (0, 1):
        bits[position // 8] = expected
        _first_is_valid[(1,)](bits, found, position // 1024, 2**32, LANES=1024)
        assert int(found) == expected


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
