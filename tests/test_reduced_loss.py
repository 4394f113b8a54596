"""The rows' losses as one number, by the last program of the launch that computes them."""

from __future__ import annotations

import pytest
import torch

import hw3gpu.functional as HF
from benchmarks.evidence.compile_without_gpu import StandIn, opcodes
from hw3gpu._torch.cross_entropy import IN_ONE_LAUNCH
from hw3gpu.kernels.gpu import cross_entropy, launch
from hw3gpu.kernels.gpu.row_plan import plan_reduce

CLASSES = 5


def made(rows, soft=False):
    torch.manual_seed(rows)
    z, weight = torch.randn(rows, CLASSES).requires_grad_(), torch.rand(CLASSES) + 0.5
    target = torch.softmax(torch.randn(rows, CLASSES), 1) if soft else torch.randint(CLASSES, (rows,))
    if not soft:
        target[::7] = -100
    return z, target, weight


def expected(z, target, weight, reduction):
    z, weight = z.detach().double(), weight.double()
    target = target.double() if target.is_floating_point() else target
    return torch.nn.functional.cross_entropy(z, target, weight, reduction=reduction)


# 512 rows are added up at once, 8192 in one launch
@pytest.mark.interpreter
@pytest.mark.parametrize(("rows", "soft"), [(2, False), (1025, False), (1025, True), (8193, False)])
@pytest.mark.parametrize("gradient", ["backward", "forward"])
def test_sum_and_mean(rows, soft, gradient):
    z, target, weight = made(rows, soft)
    for reduction in ("sum", "mean"):
        found = HF.cross_entropy(z, target, weight, reduction=reduction, gradient=gradient)
        torch.testing.assert_close(found.double(), expected(z, target, weight, reduction), rtol=4e-7, atol=0)
    assert {int(c) for c in launch._counters.values()} == {0}, "a counter is not ready for the next launch"


@pytest.mark.interpreter
def test_the_gradient_has_the_same_bits_whenever_it_is_computed():
    """So the weights are added up in the same order by the kernel that does nothing else and by the loss's last program."""
    z, target, weight = made(1500)
    losses = [HF.cross_entropy(z, target, weight, gradient=gradient) for gradient in ("backward", "forward")]
    gradients = [torch.autograd.grad(loss, z)[0] for loss in losses]
    assert torch.equal(*losses)
    assert torch.equal(*gradients)


@pytest.mark.interpreter
@pytest.mark.parametrize("gradient", ["backward", "forward"])
def test_a_mean_of_nothing(gradient):
    z, target, weight = made(40)
    target[:] = -100
    for all_ignored, loss in (("nan", torch.nan), ("zero", 0.0)):
        for rows in (40, 0):
            found = HF.cross_entropy(z[:rows], target[:rows], weight, gradient=gradient, all_ignored=all_ignored)
            torch.testing.assert_close(found, torch.tensor(loss), equal_nan=True)


def test_how_many_rows_are_added_up_in_one_launch():
    assert plan_reduce(IN_ONE_LAUNCH).programs == 1 < plan_reduce(IN_ONE_LAUNCH + 1).programs


def test_the_last_program_sees_what_the_others_have_stored():
    """A fence before a program says that it is done, a fence after, and loads past the L1 cache."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    given = meta(64, 1000, 1), meta(64, 1, dtype=torch.int64), None, meta(64, 1), meta(3, 64, 1), meta(1, dtype=torch.int64)
    with StandIn(90) as device:
        cross_entropy.forward(*given, total=meta(), denominator=meta(), mean=True, ignore_index=-100, label_smoothing=0.0)
        cross_entropy.forward(*given, ignore_index=-100, label_smoothing=0.0)
    reducing, apart = (opcodes(launched) for launched in device.launches)
    order = [reducing.index(opcode) for opcode in ("MEMBAR.ALL.GPU", "ATOMG.E.ADD.STRONG.GPU", "CCTL.IVALL", "CALL.REL.NOINC")]
    assert order == sorted(order)
    assert {opcode for opcode in reducing[order[-1] :] if opcode.startswith("LDG")} == {"LDG.E.STRONG.GPU"}
    assert not {"MEMBAR.ALL.GPU", "CCTL.IVALL"} & set(apart)
