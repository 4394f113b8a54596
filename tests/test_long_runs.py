"""Many calls, and large ones: memory and time hold, statistics do not drift, offsets beyond 2³¹ elements are right."""

from __future__ import annotations

import os

import long_run
import numpy as np
import pytest
import torch

import hw3gpu
import hw3gpu.functional as HF
from hw3gpu import _error_bounds, reference
from measure import share_of_bound

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc/self/statm")
def test_memory_and_time_hold_and_statistics_do_not_drift():
    """A short form of `python tests/long_run.py --calls 100000`."""
    found = long_run.run(8000)
    assert found.bytes_a_call < 128  # a float kept of every call is 24 bytes and more; pages come by 4096
    assert found.slower < 1.25
    assert found.drift <= 1


ROWS, COLUMNS = 65_537, 32_768  # 2^31 + 2^15 elements, 4.3 GB
AT = (0, 1, 32_767, 65_535, 65_536)  # the last row starts at element 2^31


def memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(memory() < 14 << 30, reason="needs 14 GB of memory")
def test_more_than_2_31_elements():
    """Softmax, cross entropy with its gradient, and batch normalisation of (65537, 32768) in bfloat16, at both ends."""
    pattern = torch.from_numpy(np.random.default_rng(0).standard_normal(COLUMNS + ROWS)).bfloat16()
    x = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
    x.copy_(pattern.as_strided((ROWS, COLUMNS), (1, 1)))
    target = torch.arange(ROWS) * 7 % COLUMNS

    def held(name, row, actual, sheet, bound):
        share = share_of_bound(actual.double().numpy(), sheet, "bfloat16", bound)
        assert share <= 1, f"{name}, row {row}: {share:.3g} of the bound"

    y = HF.softmax(x, 1)
    for row in AT:
        z = x[row].double().numpy()
        held("softmax", row, y[row], reference.softmax(z), _error_bounds.softmax(z, dtype="float32"))
    del y
    x.requires_grad_()
    losses = HF.cross_entropy(x, target, reduction="none")
    (dx,) = torch.autograd.grad(losses, x, torch.ones_like(losses))
    x.requires_grad_(False)
    for row in AT:
        z, t = x[row].double().numpy(), target[row].numpy()
        sheet, bound = reference.softmax_cross_entropy(z, t), _error_bounds.softmax_cross_entropy(z, t, dtype="float32")
        held("loss", row, losses[row].detach(), sheet.loss, bound.loss)
        held("gradient", row, dx[row], sheet.dz, bound.dz)
    del dx, losses
    hw3gpu.empty_cache()
    y = HF.batch_norm(x, None, None, training=True)
    for column in (0, 1, COLUMNS - 1):
        v = x[:, column : column + 1].double().numpy()
        sheet, bound = reference.batch_norm(v), _error_bounds.batch_norm(v, dtype="float32")
        held("batch norm", column, y[:, column : column + 1], sheet.y, bound.y)
