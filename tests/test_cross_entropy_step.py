"""Cross entropy of a training step on the CPU, whose gradient is there before the upstream gradient is known."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as TF
from torch.utils.checkpoint import checkpoint

import hw3gpu.functional as HF
import hw3gpu.nn
from hw3gpu._core import dispatch
from hw3gpu._torch import expected_upstream

KINDS = ["classes", "probabilities"]


def problem(kind, dtype=torch.float32, shape=(16, 21)):
    random = torch.Generator().manual_seed(1)
    z = torch.randn(shape, generator=random).to(dtype).requires_grad_()
    if kind == "classes":
        target = torch.randint(shape[1], shape[:1], generator=random)
        target[3] = -100
        return z, target
    return z, torch.randn(shape, generator=random).softmax(1).to(dtype)


@pytest.fixture
def calls(monkeypatch):
    """The launches of the step, each by its upstream gradient, and nothing expected; the two separate passes fail."""
    expected_upstream._of.cache_clear()
    made = []

    def note(step, name):
        launch = getattr(step, name)

        def noted(*operands, upstream, **options):
            made.append(upstream)
            return launch(*operands, upstream=upstream, **options)

        monkeypatch.setattr(step, name, noted)

    note(dispatch.cpu_cross_entropy, "forward_backward_reduced")
    note(dispatch.cross_entropy_small, "forward_backward")
    monkeypatch.delattr(dispatch.cross_entropy("cpu"), "backward")
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_logits_are_read_once(calls, kind, reduction):
    z, target = problem(kind)
    HF.cross_entropy(z, target, reduction=reduction).backward()
    assert calls == [1.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [0.25, 3.0, 0.0, -32768.0])
def test_another_upstream_gradient(calls, kind, dtype, scale):
    z, target = problem(kind, dtype)
    (HF.cross_entropy(z, target) * scale).backward()
    assert calls == [1.0, scale]
    exact = z.detach().double().requires_grad_()
    (TF.cross_entropy(exact, target.double() if kind == "probabilities" else target) * scale).backward()
    tolerance = 2 * torch.finfo(dtype).eps * exact.grad.abs().max().item()
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_every_call_of_backward_gives_the_same_bits_whatever_the_caller_did_to_the_last_ones(kind, upstream):
    z, target = problem(kind)
    loss = HF.cross_entropy(z, target, label_smoothing=0.1)
    gradients = []
    for _ in range(3):
        (gradient,) = torch.autograd.grad(loss, z, torch.tensor(upstream), retain_graph=True)
        gradients.append(gradient.clone())
        gradient.zero_()
    assert gradients[0].abs().max() > 0
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_gradients_add_up_in_a_retained_graph():
    z, target = problem("classes")
    loss = HF.cross_entropy(z, target)
    loss.backward(retain_graph=True)
    once = z.grad.clone()
    loss.backward()
    assert torch.equal(z.grad, 2 * once)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    z, target = problem("classes")
    HF.cross_entropy(z, target).backward()
    expected, z.grad = z.grad, None
    checkpoint(HF.cross_entropy, z, target, use_reentrant=reentrant).backward()
    assert torch.equal(z.grad, expected)


def test_a_gradient_of_the_target_takes_the_two_passes():
    z, target = problem("probabilities", torch.float64)
    assert torch.autograd.gradcheck(HF.cross_entropy, (z, target.requires_grad_()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_has_the_same_bits_with_and_without_a_gradient(kind):
    for shape in ((16, 21), (5, 3000)):
        z, target = problem(kind, shape=shape)
        assert torch.equal(HF.cross_entropy(z, target).detach(), HF.cross_entropy(z.detach(), target))


def test_logits_written_over_before_backward_are_noticed():
    z, target = problem("classes")
    loss = HF.cross_entropy(z * 1.0, target)
    loss.grad_fn.saved_tensors[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------------------------------- what is expected
def steps(upstreams, loss_of=HF.cross_entropy):
    """A loss of 134 kB of logits from one place in the code, for each upstream gradient; its gradients."""
    found = []
    for upstream in upstreams:
        z, target = problem("classes", shape=(16, 2100))
        (loss_of(z, target) * upstream).backward()
        found.append(z.grad)
    return found


@pytest.mark.parametrize("loss_of", [lambda z, t: HF.cross_entropy(z, t), hw3gpu.nn.CrossEntropyLoss()], ids=["call", "module"])
def test_an_upstream_gradient_that_stays_is_computed_once(calls, loss_of):
    """Accumulation over 4 steps, or a loss scale: the first call pays for not knowing it."""
    steps([0.25] * 4, loss_of)
    assert calls == [1.0, 0.25, 0.25, 0.25, 0.25]
    calls.clear()
    steps([65536.0, 65536.0, 32768.0, 32768.0, 32768.0], loss_of)
    assert calls[1:] == [65536.0, 65536.0, 65536.0, 32768.0, 32768.0, 32768.0]


def test_one_that_changes_is_waited_for(calls):
    """After two surprises the gradient is made in the backward pass, until an upstream gradient comes twice."""
    steps([0.5, 0.25, 2.0, 4.0, 4.0, 4.0])
    assert calls == [1.0, 0.5, 0.5, 0.25, 2.0, 4.0, 4.0, 4.0]


def test_places_of_the_code_have_memories_of_their_own(calls):
    z, target = problem("classes", shape=(16, 2100))
    for _ in range(3):
        (HF.cross_entropy(z, target) + 0.3 * HF.cross_entropy(z, target)).backward()
    assert len(calls) == 2 * 3 + 1


def test_the_bits_do_not_hang_on_what_was_expected():
    first, *rest = steps([0.3, 0.3, 0.7, 0.1, 0.2, 0.3, 0.9, 0.3])
    for upstream, gradient in zip([0.3, 0.7, 0.1, 0.2, 0.3, 0.9, 0.3], rest, strict=True):
        assert upstream != 0.3 or torch.equal(gradient, first)


def test_what_is_asked_for_is_not_outguessed(calls):
    steps([0.25] * 2, lambda z, t: HF.cross_entropy(z, t, gradient="forward"))
    assert calls == [1.0, 0.25, 1.0, 0.25]


def test_memories_are_bounded_and_shared_by_threads():
    expected = expected_upstream._of
    before = expected.cache_info()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: expected(None, i).was(float(i)), range(1000)))
    assert expected.cache_info().currsize <= before.maxsize == 256
