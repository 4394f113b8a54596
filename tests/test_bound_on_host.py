"""Small calls on the host that run what an earlier call like theirs launched, on memory of their own."""

from __future__ import annotations

import threading

import pytest
import torch
from twins import layout_of

import hw3gpu
import hw3gpu.functional as HF
from hw3gpu._torch import bound_launches
from hw3gpu.kernels.cpu import launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    if hw3gpu._core.dispatch.requested_backend() == "gpu":
        pytest.skip("launches of the CPU kernels")
    monkeypatch.setattr(bound_launches, "_kept", {})


@pytest.fixture
def ran(monkeypatch):
    """Counts the calls that ran what was kept."""
    runs, call = [], launch.Bound.__call__
    monkeypatch.setattr(launch.Bound, "__call__", lambda self, *operands: runs.append(1) or call(self, *operands))
    return runs


def step(z, dy, dim):
    z = z.detach().requires_grad_()
    y = HF.softmax(z, dim)
    return y.detach(), torch.autograd.grad(y, z, dy)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
def test_later_calls_are_the_first_to_the_bit(ran, dtype, layout):
    """On memory of their own: the first call's is written over in between."""
    given = [layout_of(torch.randn(3, 5, 4, dtype=torch.float64).to(dtype), layout) for _ in range(4)]
    first = [step(*given[:2], 1), step(*given[2:], 1)]
    assert len(ran) == 2  # the second call, each way
    again = [layout_of(v.clone(), layout) for v in given]
    for v in given:
        v.fill_(torch.nan)
    later = [step(*again[:2], 1), step(*again[2:], 1)]
    assert len(ran) == 6
    bound_launches._kept.clear()
    anew = [step(*again[:2], 1), step(*again[2:], 1)][0]
    for a, b in zip(first, later, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)
            assert x.stride() == y.stride()
    assert all(torch.equal(x, y) for x, y in zip(first[0], anew, strict=True))


def losses(z, target, weight, **options):
    z = z.detach().requires_grad_()
    loss = HF.cross_entropy(z, target, weight, reduction="none", **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["classes", "class weights", "probabilities", "positions"])
def test_losses_of_rows_are_the_first_calls_to_the_bit(ran, dtype, kind):
    random = torch.Generator().manual_seed(0)
    shape = (6, 7, 3) if kind == "positions" else (6, 7)
    z = torch.randn(2, *shape, generator=random).to(dtype)
    target = torch.randint(7, (2, *shape[:1], *shape[2:]), generator=random)
    if kind == "probabilities":
        target = z.flip(0).softmax(2)
    weight = torch.rand(7, generator=random).to(torch.promote_types(dtype, torch.float32)) if kind == "class weights" else None
    first = [losses(z[i], target[i], weight) for i in range(2)]
    assert len(ran) == 2  # the second call, each way
    bound_launches._kept.clear()
    anew = losses(z[1], target[1], weight)
    assert len(ran) == 2
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(first[1], anew, strict=True))


def test_a_class_is_checked_in_a_kept_call_too(ran):
    z, target = torch.randn(5, 4), torch.arange(5) % 4
    expected = losses(z, target, None, ignore_index=2)
    losses(z, target, None)  # kept apart by its ignore_index
    assert all(map(torch.equal, expected, losses(z, target, None, ignore_index=2)))
    assert len(ran) == 2
    with pytest.raises(IndexError, match=r"expected classes in 0…3 or ignore_index 2, got 9 in row 1"):
        losses(z, torch.tensor([0, 9, 0, 0, 0]), None, ignore_index=2)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"softcap": 3.0}, {"gradient": "backward"}], ids=str)
def test_the_loss_follows_the_weights_of_a_later_call(ran, options):
    """The sum of the weights is an argument of the launch where there is smoothing: such a forward pass is not kept."""
    z, target, weight = torch.randn(5, 4), torch.arange(5) % 4, torch.rand(4)
    first, later = losses(z, target, weight, **options), losses(z, target, 2 * weight, **options)
    for a, b in zip(first, later, strict=True):
        assert torch.equal(2 * a, b)


def test_what_differs_is_kept_apart(ran):
    z = torch.randn(6, 6)
    for call in (
        lambda: HF.softmax(z, 0), lambda: HF.softmax(z, 1), lambda: HF.softmax(z.T, 1), lambda: HF.softmax(z[:, :5], 1),
        lambda: HF.softmax(z.double(), 1), lambda: HF.softmax(z, 1, dtype=torch.float64),
        lambda: HF.softmax(z[:1].expand(6, 6), 1),
    ):  # fmt: skip
        expected = call()
        torch.testing.assert_close(call(), expected, rtol=0, atol=0)


def test_what_is_not_kept(ran):
    z, large = torch.randn(4, 6, dtype=torch.complex64), torch.randn(200, 200)
    lazy, unaligned = z.conj().imag, torch.frombuffer(bytearray(97), dtype=torch.uint8)[1:].numpy().view("f4").reshape(4, 6)
    unaligned = torch.from_numpy(unaligned)
    for x in (lazy, unaligned, large):
        for _ in range(2):
            HF.softmax(x, 1)
    for _ in range(2):
        torch.func.vmap(lambda v: HF.softmax(v, 0))(torch.randn(4, 6))
    assert not ran
    assert not [k for k, v in bound_launches._kept.items() if v is None]
    x = torch.randn(4, 6)
    HF.softmax(x, 1)
    with hw3gpu.use_backend("gpu"):
        assert bound_launches.of_host(("softmax", 1, None), x) is None
    with hw3gpu.use_backend("cpu"):
        HF.softmax(x, 1)
    assert len(ran) == 1


def test_they_are_bounded(monkeypatch):
    monkeypatch.setattr(bound_launches, "MOST", 8)
    for n in range(1, 30):
        HF.softmax(torch.randn(n, 3), 1)
        assert 0 < len(bound_launches._kept) <= 8


def test_threads_share_them(monkeypatch):
    """Eight threads, each with values of its own, while what is kept is forgotten again and again."""
    monkeypatch.setattr(bound_launches, "MOST", 3)
    wrong = []

    def work(seed):
        random = torch.Generator().manual_seed(seed)
        for n in range(200):
            z = torch.randn(4 + n % 5, 7, generator=random)
            if not torch.allclose(HF.softmax(z, 1), torch.softmax(z, 1), atol=1e-6):
                wrong.append((seed, n))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
