"""How batch normalisation on the CPU is cut: `kernels/cpu/channel_plan.py`, plain functions that need no array."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hw3gpu.kernels.cpu import channel_plan
from hw3gpu.kernels.cpu.channel_plan import BatchNormPlan, Layout, Pass


def layout(N: int, C: int, S: int, itemsize: int = 4, channels_last: bool = False, arrays: int = 2) -> Layout:
    strides = (S * C, 1, C) if channels_last else (C * S, S, 1)
    return Layout((N, C, S), itemsize, (tuple(itemsize * s for s in strides),) * arrays)


CASES = [
    # small planes: tiles of 16 channels, whole lines of the cache, done whole over all samples
    ("small planes", layout(8, 64, 49), BatchNormPlan(Pass("tiles", 4, (16,)))),
    # larger planes, enough channels for every thread: some channels whole at a time
    ("planes", layout(32, 64, 3136), BatchNormPlan(Pass("planes", 64, (1,)))),
    # few channels of long planes: split, the sums of 32 blocks are merged
    ("long planes", layout(2, 3, 40000), BatchNormPlan(None, Pass("planes", 32, (), 32), Pass("planes", 32, (32,)))),
    # channels-last, long rows: strips of 128 channels of all rows
    ("rows", layout(8, 512, 16, channels_last=True), BatchNormPlan(Pass("tiles", 4, (128,), joined=True))),
    # channels-last, too many rows for that: whole rows, several a line where they are short
    ("many rows", layout(32, 64, 3136, channels_last=True),
     BatchNormPlan(None, Pass("lines", 32, (4,), 32), Pass("lines", 32, (32, 8)))),
    # few samples of many channels: longer runs, and a loop of their own for smaller planes
    ("long runs", layout(8, 512, 256), BatchNormPlan(Pass("planes", 32, (16,)))),
    ("longer runs", layout(8, 256, 1024), BatchNormPlan(Pass("planes", 32, (8,)))),
    ("runs for all threads", layout(8, 128, 1024), BatchNormPlan(Pass("planes", 32, (4,)))),
    ("small planes of more samples", layout(16, 512, 256), BatchNormPlan(Pass("tiles", 256, (2,)))),
]  # fmt: skip


@pytest.mark.parametrize(("of", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_plan_of_a_layout(of, expected):
    assert channel_plan.plan_forward(of) == expected


def test_a_plan_is_frozen_and_decided_once():
    of = layout(8, 64, 49)
    plan = channel_plan.plan_forward(of)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.whole = None
    assert channel_plan.plan_forward(layout(8, 64, 49)) is plan


def test_a_channel_that_is_not_done_whole_has_sums_and_a_result():
    for of in (case[1] for case in CASES):
        three = of._replace(strides=of.strides[:1] * 3)
        for plan in (channel_plan.plan_forward(of), channel_plan.plan_backward(three)):
            assert (plan.whole is None) == (plan.sums is not None) == (plan.result is not None)
            assert all(of_pass.blocks >= 1 for of_pass in (plan.whole, plan.sums, plan.result) if of_pass)


def test_a_result_of_another_dtype_is_planned_as_one_of_the_same_strides():
    x = np.empty((2, 9, 6), np.float16).transpose(0, 2, 1)
    wide = np.empty((2, 9, 6), np.float32).transpose(0, 2, 1)
    assert channel_plan.layout_of(x, wide) == channel_plan.layout_of(x, x)


def test_arrays_of_two_layouts_are_walked_by_planes():
    of = layout(8, 64, 49)
    mixed = of._replace(strides=(of.strides[0], layout(8, 64, 49, channels_last=True).strides[0]))
    assert channel_plan.plan_forward(mixed).whole.loops == "planes"


def test_without_elements_there_is_nothing_to_do():
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        of = layout(*shape)
        assert channel_plan.plan_forward(of) == BatchNormPlan(None, Pass("planes", 0), Pass("planes", 0))


def test_tiles_take_no_mask():
    """Small planes are walked plane by plane then, long rows of channels row by row; what planes and lines do is the same."""
    masked = [channel_plan.plan_forward(of, True) for _, of, _ in CASES]
    small, planes, long, rows, many = masked[:5]
    assert (small.whole.loops, rows.sums.loops, rows.result.loops) == ("planes", "lines", "lines")
    assert (planes, long, many) == tuple(CASES[k][2] for k in (1, 2, 4))
