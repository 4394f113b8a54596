"""Launches of earlier calls, kept: later ones launch the same with their own memory, and no call gets another's.

Host tensors stand for those on a GPU, under a driver that records what it is asked to launch.
"""

from __future__ import annotations

import sys
import threading

import pytest
import torch

import hw3gpu.functional as HF
from benchmarks.evidence.compile_without_gpu import StandIn
from hw3gpu._core import arrays, dispatch
from hw3gpu._torch import batch_norm, bound_launches
from hw3gpu.kernels.gpu import launch as launching
from hw3gpu.kernels.gpu import softmax

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Calls of host tensors go the way of CUDA tensors; nothing is kept yet."""
    monkeypatch.setattr(arrays, "on_host", lambda x: False)
    monkeypatch.setattr(batch_norm, "by_address", lambda *args: None)
    monkeypatch.setattr(bound_launches, "_kept", {})


@pytest.fixture
def gpu():
    with StandIn(90) as device:
        yield device


def launches(device, call):
    """The launches of a call: kernel, grid and arguments, tensors as addresses."""
    device.launches.clear()
    call()
    return [
        (found.name, found.grid, tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in found.args))
        for found in device.launches
    ]


def place(address, tensors):
    """Which tensor has the address, and where in it; the address itself where it is no tensor's."""
    for i, x in enumerate(tensors):
        if x.data_ptr() <= address < x.data_ptr() + x.untyped_storage().nbytes() and address:
            return i, address - x.data_ptr()
    return address


# ---------------------------------------------------------------------------------------------- the same launches
def softmax_of(make):
    z, dy = make(64, 1000), make(64, 1000)
    return (z, dy), lambda: torch.autograd.grad(HF.softmax(z.requires_grad_(), 1), z, dy)


def norm_of(make, *shape, vectors=None, residual=False, **options):
    C = shape[1]
    x, dy, more = make(*shape), make(*shape), {"residual": make(*shape)} if residual else {}
    weight, bias, mean, var = (make(C, dtype=vectors) for _ in range(4))
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), *(v.requires_grad_() for v in more.values())]

    def call():
        y = HF.batch_norm(x, mean, var, weight, bias, **more, **options)
        return torch.autograd.grad(y, leaves, dy)

    return (*leaves, mean, var, dy), call


def loss_of(make, N, V, weighted=False, soft=False, **options):
    z, target = make(N, V).requires_grad_(), make(N, V) if soft else make(N, dtype=torch.int64)
    weight = make(V) if weighted else None
    upstream = make(N) if options.get("reduction") == "none" else make()

    def call():
        return torch.autograd.grad(HF.cross_entropy(z, target, weight, **options), z, upstream)

    return (z, target, upstream, *(() if weight is None else (weight,))), call


CALLS = {
    "softmax": softmax_of,
    "cross entropy": lambda make: loss_of(make, 64, 1000),
    "cross entropy, every option": lambda make: loss_of(
        make, 64, 1000, weighted=True, label_smoothing=0.1, z_loss=0.1, softcap=30.0, all_ignored="zero"
    ),
    "cross entropy of halves": lambda make: loss_of(
        lambda *shape, dtype=None: make(*shape, dtype=dtype or BF16), 64, 1000, label_smoothing=0.1
    ),
    "cross entropy, at once": lambda make: loss_of(make, 64, 1000, weighted=True, gradient="forward"),
    "cross entropy of probabilities": lambda make: loss_of(make, 64, 1000, soft=True, reduction="sum"),
    "cross entropy of probabilities, at once": lambda make: loss_of(make, 64, 1000, soft=True, gradient="forward"),
    "cross entropy of rows": lambda make: loss_of(make, 64, 1000, reduction="none"),
    "cross entropy of many rows, at once": lambda make: loss_of(make, 10000, 8, weighted=True, gradient="forward"),
    "batch norm, one launch": lambda make: norm_of(make, 32, 8, 14, 14, training=True),
    "batch norm, two launches": lambda make: norm_of(make, 32, 2, 56, 56, training=True),
    "batch norm, evaluation": lambda make: norm_of(make, 32, 8, 14, 14),
    "batch norm, residual and relu": lambda make: norm_of(make, 32, 8, 14, 14, training=True, residual=True, activation="relu"),
    "batch norm, halves beside float32": lambda make: norm_of(
        lambda *shape, dtype=None: make(*shape, dtype=dtype or BF16), 32, 8, 14, 14, vectors=torch.float32, training=True
    ),
}


@pytest.mark.parametrize("of", CALLS.values(), ids=list(CALLS))
def test_later_calls_launch_the_same_on_their_own_memory(gpu, monkeypatch, of):
    def make(*shape, dtype=None):
        return torch.zeros(shape, dtype=dtype)

    allocated = []
    creates = ((torch, "empty_like"), (torch, "empty"), (torch, "full"), (torch, "stack"), (torch, "zeros"))
    for owner, name in (*creates, (torch.Tensor, "new_empty")):
        made = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, made=made, **k: allocated.append(made(*a, **k)) or allocated[-1])
    monkeypatch.setattr(launching, "_counters", {})
    HF.cross_entropy(make(10, 10), make(10, dtype=torch.int64))  # makes the counter
    bound_launches._kept.clear()
    seen, counters = [], list(launching._counters.values())
    for _ in range(3):
        tensors, call = of(make)
        allocated.clear()
        found = launches(gpu, call)
        known = [*tensors, *counters, *(x for x in allocated if not x.is_meta)]
        seen.append([(name, grid, [place(a, known) if type(a) is int else a for a in args]) for name, grid, args in found])
        assert len(bound_launches._kept) == 2
    assert seen[0] == seen[1] == seen[2]
    bound_launches.forget()
    assert not bound_launches._kept
    assert {type(p) for _, _, args in seen[0] for p in args} >= {tuple, int}


def test_the_momentum_of_a_call_is_its_own(gpu):
    shape, C = (32, 8, 14, 14), 8
    x, mean, var = torch.zeros(shape), torch.zeros(C), torch.ones(C)
    found = [launches(gpu, lambda: HF.batch_norm(x, mean, var, training=True, momentum=m))[0][2] for m in (0.5, 0.25, 0.125)]  # noqa: B023
    assert len(bound_launches._kept) == 1
    for args, momentum in zip(found, (0.5, 0.25, 0.125), strict=True):
        assert momentum in args
        assert int.from_bytes(torch.tensor([momentum], dtype=torch.float64).numpy().tobytes(), sys.byteorder) in args


FORWARD_AND_BACKWARD = {
    "cross entropy": 1 + 1,
    "cross entropy, every option": 1 + 1,
    "cross entropy, at once": 2 + 1,
    "cross entropy of probabilities": 1 + 1,
    "cross entropy of probabilities, at once": 1 + 1,
    "cross entropy of many rows, at once": 3 + 1,
    "softmax": 1 + 1,
    "batch norm, one launch": 1 + 1,
}


@pytest.mark.parametrize(("name", "most"), FORWARD_AND_BACKWARD.items())
def test_how_many_launches_a_call_takes(gpu, name, most):
    _, call = CALLS[name](lambda *shape, dtype=None: torch.zeros(shape, dtype=dtype))
    assert len(launches(gpu, call)) == most


# ---------------------------------------------------------------------------------------------- whose launches
def test_a_pointer_off_16_bytes_takes_launches_of_its_own(gpu):
    memory = torch.zeros(64 * 1000 + 4)
    aligned, off = memory[:-4].view(64, 1000), memory[1:-3].view(64, 1000)
    once, other = (launches(gpu, lambda: HF.softmax(z, 1)) for z in (aligned, off))  # noqa: B023
    assert len(bound_launches._kept) == 2
    again, again_other = (launches(gpu, lambda: HF.softmax(z, 1)) for z in (aligned, off))  # noqa: B023
    assert once[0][2][0] == again[0][2][0] == aligned.data_ptr()
    assert other[0][2][0] == again_other[0][2][0] == off.data_ptr()
    binaries = [launched.binary for z in (aligned, off, memory[4:].view(64, 1000)) for launched in kept_launches(gpu, z)]
    assert binaries[0] == binaries[2] != binaries[1]


def kept_launches(device, z):
    device.launches.clear()
    HF.softmax(z, 1)
    return list(device.launches)


def test_two_devices_share_nothing():
    z, binaries = torch.zeros(64, 1000), {}
    for _ in range(2):
        for arch in (80, 90):
            with StandIn(arch) as device:
                binaries.setdefault(arch, set()).update(launched.binary for launched in kept_launches(device, z))
    assert len(bound_launches._kept) == 2
    assert [len(found) for found in binaries.values()] == [1, 1]
    assert binaries[80] != binaries[90]


def test_shapes_strides_dtypes_and_options_have_launches_of_their_own(gpu):
    z = torch.zeros(32, 48)
    for call in (
        lambda: HF.softmax(z, 1),
        lambda: HF.softmax(z, 0),
        lambda: HF.softmax(z[:16], 1),
        lambda: HF.softmax(z.t(), 1),
        lambda: HF.softmax(z.to(BF16), 1),
        lambda: HF.softmax(z, 1, dtype=torch.float64),
    ):
        before = len(bound_launches._kept)
        for _ in range(2):
            call()
        assert len(bound_launches._kept) == before + 1


def test_a_lazy_sign_takes_no_launches_of_others(gpu):
    numbers = torch.zeros(32, 48, dtype=torch.complex64)
    for call in (lambda: HF.softmax(numbers.imag, 1), lambda: HF.softmax(numbers.conj().imag, 1)):
        call()
        assert len(bound_launches._kept) == 1
    assert bound_launches.of(("softmax",), numbers.conj().imag) is None


def test_operands_that_overlap_are_not_kept(gpu):
    x, weight = torch.zeros(32, 8, 14, 14), torch.zeros(8)
    for _ in range(2):
        HF.batch_norm(x, None, None, weight, weight, training=True)
    assert not bound_launches._kept
    flat = torch.zeros(16)
    for _ in range(2):
        HF.batch_norm(x, None, None, flat[:8], flat[8:], training=True)
    assert len(bound_launches._kept) == 1


def test_a_copy_of_an_argument_is_not_kept(gpu):
    for _ in range(2):
        HF.softmax(torch.zeros(4, 6, 8).transpose(0, 2)[:, ::2].movedim(1, 0), 0)
        HF.batch_norm(torch.zeros(32, 8, 14, 14), None, None, torch.zeros(16)[::2], training=True)
    assert not bound_launches._kept


def test_what_a_first_call_would_refuse_is_refused_later(gpu):
    x, C = torch.zeros(32, 8, 14, 14), 8
    good = (torch.zeros(C), torch.ones(C), torch.zeros(C), torch.zeros(C), True, 0.1, 1e-5)
    for _ in range(2):
        HF.batch_norm(x, *good)
        HF.softmax(x, 1)
        for i, bad in (
            (0, torch.zeros(C + 1)),
            (1, None),
            (2, torch.zeros(C, dtype=torch.float64)),
            (3, [0.0] * C),
            (4, 1),
            (6, -1.0),
        ):
            with pytest.raises((TypeError, ValueError)):
                HF.batch_norm(x, *good[:i], bad, *good[i + 1 :])
        with pytest.raises(RuntimeError, match="gradient"):
            HF.batch_norm(x, good[0].requires_grad_(), *good[1:])
        good[0].requires_grad_(False)
        for bad in (True, 4, "1"):
            with pytest.raises((TypeError, IndexError)):
                HF.softmax(x, bad)
        with pytest.raises(dispatch.BackendError), dispatch.use_backend("cpu"):
            HF.softmax(x, 1)


# ---------------------------------------------------------------------------------------------- how many, hooks, threads
def test_a_hundred_sizes_compile_nothing_and_are_kept_apart(gpu, monkeypatch):
    def compilations():
        return sum(len(cache[0]) for cache in softmax._forward_kernel.device_caches.values())

    for V in (1040, 1056):
        HF.softmax(torch.zeros(8, V), 1)
    before, kept = compilations(), len(bound_launches._kept)
    for _ in range(2):
        for i in range(100):
            HF.softmax(torch.zeros(8 + i, 1040 + 16 * (i % 4)), 1)
    assert compilations() == before
    assert len(bound_launches._kept) == kept + 99  # one of them was there
    monkeypatch.setattr(bound_launches, "MOST", 16)
    for i in range(100):
        HF.softmax(torch.zeros(200 + i, 1032), 1)
    assert 0 < len(bound_launches._kept) <= 16


def test_hooks_see_every_launch(gpu):
    from triton import knobs

    z, chains = torch.zeros(64, 1000), (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    HF.softmax(z, 1)
    assert kept_launches(gpu, z)[0].hooks == (None, None)
    for chain in chains:
        chain.add(print)
        try:
            (found,) = kept_launches(gpu, z)
        finally:
            chain.remove(print)
        assert found.hooks == chains
        assert found.metadata.get()["name"] == "_forward_kernel"


def test_threads_may_share_launches(gpu):
    tensors, wrong = [torch.zeros(64, 1000) for _ in range(4)], []

    def work(z):
        for _ in range(50):
            y = HF.softmax(z, 1)
            if y.shape != z.shape:
                wrong.append(z)

    threads = [threading.Thread(target=work, args=(z,)) for z in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    pointers = {launched.args[0] if type(launched.args[0]) is int else launched.args[0].data_ptr() for launched in gpu.launches}
    assert pointers == {z.data_ptr() for z in tensors}


def test_nothing_is_recorded_outside_of_a_recording(gpu):
    z, y = torch.zeros(64, 1000, 1), torch.zeros(64, 1000, 1)
    recording = launching.Recording((z, y))
    softmax.forward(z, y)
    assert recording.bound() is None
    with recording:
        softmax.forward(z, y)
    assert recording.bound() is not None
    with launching.Recording((z,)) as recording:
        softmax.forward(z, y)
    assert recording.bound() is None  # whose y is, nobody said
