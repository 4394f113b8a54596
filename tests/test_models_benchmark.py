"""`python -m benchmarks models`: the models are those of the papers, and what is timed is right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import models
from benchmarks.__main__ import parser
from benchmarks.harness import COLUMNS, Bench, Results


def test_the_models_have_the_parameters_of_the_published_ones():
    """As many as the papers' models have in torchvision."""
    with torch.device("meta"):
        found = {make: sum(p.numel() for p in make().parameters()) for make in (models.resnet50, models.mobilenet_v3_large)}
    assert found == {models.resnet50: 25_557_032, models.mobilenet_v3_large: 5_483_032}


def test_a_model_is_measured(monkeypatch, tmp_path):
    """Small: every contestant in both modes, the parts add up to the whole; a wrong contestant is refused."""
    monkeypatch.setattr(models, "BATCH", 2)
    monkeypatch.setattr(models, "SIDE", 32)
    net = lambda: nn.Sequential(models.Bottleneck(3, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1000))  # noqa: E731
    monkeypatch.setattr(models, "MODELS", {"small": (net, torch.contiguous_format)})
    run = Bench(Results.new(tmp_path, COLUMNS, {}), 2)
    for what in ("training", "evaluation"):
        models.measure("small", what, run)
        lines = {line["contestant"]: line for line in run.results.measurements if line["pass"] == what}
        assert list(lines) == [models.CONVERTED, models.PYTORCH, models.FUSED] + [models.FOLDED] * (what == "evaluation")
        for name, line in lines.items():
            parts = dict(run.results.parts["layers_us"][f"small, {what}, {name}"])
            assert sum(parts.values()) - parts["all"] == pytest.approx(parts["all"]) == pytest.approx(line["called_us"])
            assert parts["convolution"] > 0
    contestants, images, classes = models.contestants("small")
    assert models.verify(contestants, images, classes) == ""
    assert type(contestants[models.FUSED][0]).__name__ == "FusedBottleneck"
    with torch.no_grad():
        contestants[models.FUSED][0].bn3.weight.mul_(1.5)
    assert "not close" in models.verify(contestants, images, classes)


def test_its_arguments():
    assert parser().parse_args(["models", "--turns", "3", "--only", "resnet"]).only == ["resnet"]
