"""docs/training.md: its diffs are run, both sides of them, and train alike."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "training.md").read_text()


DIFFS = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)


def side(diff: str, sign: str) -> str:
    """The program before ('-') or after ('+')."""
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in ("", " ", sign))


def trained(program: str) -> dict[str, object]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 10) for _ in range(3)]
    names = {"batches": batches}
    exec(program, names)
    return names


def test_the_diff_of_one_process_trains_alike(caplog):
    """Three steps; then either checkpoint in the other's model."""
    with caplog.at_level(logging.INFO, logger="hw3gpu.nn"):
        before, after = (trained(side(DIFFS[0], sign)) for sign in "-+")
    torch.testing.assert_close(after["loss"], before["loss"], rtol=1e-4, atol=1e-5)
    assert caplog.messages == re.findall(r"^\d+: torch.*$", PAGE, re.MULTILINE)
    ours, theirs = after["model"], before["model"]
    for a, b in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert a[0] == b[0]
        torch.testing.assert_close(a[1], b[1], rtol=1e-3, atol=1e-4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_the_diff_of_a_residual_block_has_the_same_gradients():
    before, after = (trained(side(DIFFS[1], sign)) for sign in "-+")
    torch.testing.assert_close(after["loss"], before["loss"], rtol=1e-5, atol=1e-6)
    for a, b in zip(after["model"].parameters(), before["model"].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_the_diff_of_a_policy_has_the_same_gradients():
    before, after = (trained(side(DIFFS[2], sign)) for sign in "-+")
    torch.testing.assert_close(after["loss"], before["loss"], rtol=1e-5, atol=1e-6)
    for a, b in zip(after["head"].parameters(), before["head"].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_the_diff_of_a_distillation_trains_a_transformer_alike():
    """Five steps of a student that learns."""
    before, after = (trained(side(DIFFS[3], sign)) for sign in "-+")
    first = trained(side(DIFFS[3], "-").replace("range(5)", "range(1)"))
    assert after["loss"] < 0.9 * first["loss"]
    torch.testing.assert_close(after["loss"], before["loss"], rtol=1e-4, atol=1e-6)
    for a, b in zip(after["student"].parameters(), before["student"].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_diff_of_padded_sequences_leaves_the_padding_out():
    """The steps as a batch without padding give the same; PyTorch's side runs, and has the padding in its statistics."""
    after = trained(side(DIFFS[4], "+"))
    norm, conv = torch.nn.BatchNorm1d(32), after["conv"]
    y, steps = norm(conv(after["sequences"]).movedim(1, -1)[after["steps"]]).relu(), after["y"].movedim(1, -1)
    torch.testing.assert_close(steps[after["steps"]], y, rtol=1e-4, atol=1e-5)
    assert not steps[~after["steps"]].any()
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(after["norm"], name), getattr(norm, name), rtol=1e-5, atol=1e-6)
    before = trained(side(DIFFS[4], "-"))
    assert (before["norm"].running_mean - norm.running_mean).abs().max() > 1e-4


def test_the_diffs_of_several_processes_name_what_there_is():
    """They are run, among processes, by test_distributed.py."""
    import hw3gpu.distributed
    import hw3gpu.nn

    for name in re.findall(r"hw3gpu(?:\.\w+)+", PAGE):
        of = hw3gpu
        for part in name.split(".")[1:]:
            of = getattr(of, part)
    converted = hw3gpu.nn.convert_batch_norm(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), sync=True)
    assert type(converted[0]) is hw3gpu.nn.SyncBatchNorm
