"""`python -m benchmarks models`: a training step and an evaluation of whole models on the CPU, beside PyTorch eager.

The models have the layers and sizes of ResNet-50 and MobileNetV3-large, from their papers. The contestants, in turn in one
process with one thread: PyTorch's model, `convert_batch_norm` of it, and that with fuse=True; in evaluation also the latter
with its batch normalisations folded into the convolutions, by PyTorch's tool after `to_torch`. A step is forward, cross entropy
and backward. Times are of the processor, which other processes disturb less; a ratio is the median and the quartiles of the
ratios turn by turn. Before anything is timed, losses and gradients are held to those of PyTorch's model in
float64. Where the time goes is
told by the shares that torch.profiler finds in one more call.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as fold
from torch.profiler import ProfilerActivity, profile, record_function

import hw3gpu.functional as HF
import hw3gpu.nn as HN

from .cpu import threads
from .harness import OURS, Aim, Bench, Row, Task, bench

BATCH, SIDE, CLASSES = 8, 128, 1000
AIMS = {"training": 1.1, "evaluation": 1.0}  # of eager's time over that of the fused or folded model
PYTORCH, CONVERTED, FUSED, FOLDED = "eager", OURS, "hw3gpu, fused", "to_torch, folded"
GROUPS = {
    "convolution": ("conv",),
    "normalisation": ("batch_norm", "batchnorm", "byaddress"),
    "activation": ("relu", "threshold", "clamp", "hardswish", "hardsigmoid"),
    "sum": ("aten::add",),
}


# ---------------------------------------------------------------------------------------------- the models
class Bottleneck(nn.Module):
    """ResNet's block of three convolutions; the stride is that of the second (v1.5)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        return self.relu(out)


def resnet50() -> nn.Module:
    """He et al., "Deep residual learning for image recognition", table 1."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int, act: type[nn.Module] | None, groups: int = 1
) -> nn.Module:
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)]
    layers.append(nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01))  # type: ignore[arg-type]
    return nn.Sequential(*layers, *([act()] if act else []))


class SqueezeExcitation(nn.Module):
    """A channel's share of what all channels' means say."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = F.adaptive_avg_pool2d(x, 1)
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(means))))


def _squeezed(wide: int) -> int:
    """A quarter, as a multiple of 8 that is not below nine tenths of it."""
    near = (wide // 4 + 4) // 8 * 8
    return near if near >= 0.9 * (wide // 4) else near + 8


class Inverted(nn.Module):
    """MobileNetV3's block: wider, depthwise, squeezed, narrower; with the input where the shapes are alike."""

    def __init__(self, inputs: int, wide: int, outputs: int, kernel: int, stride: int, squeeze: bool, act: type) -> None:
        super().__init__()
        layers = [_convolution(inputs, wide, 1, 1, act)] if wide != inputs else []
        layers.append(_convolution(wide, wide, kernel, stride, act, wide))
        if squeeze:
            layers.append(SqueezeExcitation(wide, _squeezed(wide)))
        self.block = nn.Sequential(*layers, _convolution(wide, outputs, 1, 1, None))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + x if self.residual else self.block(x)


# of each block: channels inside, channels out, kernel, stride, squeeze and excitation, Hardswish
_MOBILENET = (
    (16, 16, 3, 1, 0, 0), (64, 24, 3, 2, 0, 0), (72, 24, 3, 1, 0, 0), (72, 40, 5, 2, 1, 0), (120, 40, 5, 1, 1, 0),
    (120, 40, 5, 1, 1, 0), (240, 80, 3, 2, 0, 1), (200, 80, 3, 1, 0, 1), (184, 80, 3, 1, 0, 1), (184, 80, 3, 1, 0, 1),
    (480, 112, 3, 1, 1, 1), (672, 112, 3, 1, 1, 1), (672, 160, 5, 2, 1, 1), (960, 160, 5, 1, 1, 1), (960, 160, 5, 1, 1, 1),
)  # fmt: skip


def mobilenet_v3_large() -> nn.Module:
    """Howard et al., "Searching for MobileNetV3", table 1."""
    layers, inputs = [_convolution(3, 16, 3, 2, nn.Hardswish)], 16
    for wide, outputs, kernel, stride, squeeze, hard in _MOBILENET:
        layers.append(Inverted(inputs, wide, outputs, kernel, stride, bool(squeeze), nn.Hardswish if hard else nn.ReLU))
        inputs = outputs
    layers.append(_convolution(160, 960, 1, 1, nn.Hardswish))
    head = nn.Sequential(nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, CLASSES))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


MODELS: dict[str, tuple[Callable[[], nn.Module], torch.memory_format]] = {
    "resnet50": (resnet50, torch.contiguous_format),
    "resnet50, channels-last": (resnet50, torch.channels_last),
    "mobilenet_v3_large": (mobilenet_v3_large, torch.contiguous_format),
}


# ---------------------------------------------------------------------------------------------- measuring
def contestants(name: str) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    """The models of the same numbers, images and classes."""
    make, layout = MODELS[name]
    torch.manual_seed(0)
    theirs = make().to(memory_format=layout)  # type: ignore[call-overload]
    images = torch.randn(BATCH, 3, SIDE, SIDE).contiguous(memory_format=layout)
    models = {
        CONVERTED: HN.convert_batch_norm(copy.deepcopy(theirs)),
        PYTORCH: theirs,
        FUSED: HN.convert_batch_norm(copy.deepcopy(theirs), fuse=True),
    }
    return models, images, torch.arange(BATCH) * 97 % CLASSES


def step(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """A training step, without the optimizer's."""
    model.zero_grad()
    loss = F.cross_entropy(model(images), classes)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(model(images), classes)


def verify(models: dict[str, nn.Module], images: Tensor, classes: Tensor) -> str:
    """'' if losses and the classifier's gradients are those of PyTorch's model in float64, to what float32 leaves after so many
    layers; else what is not."""

    def found(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        loss = step(model, x, classes)
        return loss.double(), next(p.grad for p in reversed(list(model.parameters())) if p.grad is not None).double()

    sheet = found(copy.deepcopy(models[PYTORCH]).double(), images.double())
    for name, model in models.items():
        try:
            torch.testing.assert_close(found(copy.deepcopy(model), images), sheet, rtol=1e-3, atol=1e-4)
        except AssertionError as error:
            return f"{name}: {' '.join(str(error).split())}"
    return ""


def shares(call: Callable[[], object], milliseconds: float) -> dict[str, float]:
    """What of so many milliseconds each group of operations takes, by the shares of one call under the profiler."""
    plain = HF.batch_norm

    def named(*args: Any, **options: Any) -> Tensor:
        with record_function("batch_norm"):
            return plain(*args, **options)

    HF.batch_norm = named
    try:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            call()
    finally:
        HF.batch_norm = plain
    found = dict.fromkeys([*GROUPS, "rest"], 0.0)
    for event in profiler.key_averages():
        of = next((group for group, words in GROUPS.items() if any(word in event.key.lower() for word in words)), "rest")
        found[of] += event.self_cpu_time_total
    return {of: time * milliseconds / sum(found.values()) for of, time in found.items()}


def measure(name: str, what: str, run: Bench) -> None:
    """A model in 'training' or in 'evaluation': times of the processor, and where they go."""
    models, images, classes = contestants(name)
    for model in models.values():
        model.train(what == "training")
    if what == "evaluation":
        models[FOLDED] = fold(HN.to_torch(copy.deepcopy(models[FUSED])))
    call = step if what == "training" else evaluate
    calls: dict[str, Callable[[], object]] = {of: partial(call, model, images, classes) for of, model in models.items()}
    best = FOLDED if what == "evaluation" else FUSED
    aims = [Aim(PYTORCH, AIMS[what], over=best)]
    check = partial(verify, models, images, classes)
    row = Row(f"{name}, {what}", name, images.shape, "float32", what, calls, check, aims=aims)
    seconds = run.measure(row, clock=time.process_time, warm=0)
    for of, turns in seconds.items():
        parts = {group: 1e3 * ms for group, ms in shares(calls[of], 1e3 * statistics.median(turns)).items()}
        run.results.parts.setdefault("layers_us", {})[f"{row.name}, {of}"] = {"all": sum(parts.values()), **parts}


def tasks() -> list[Task]:
    modes = ("training", "evaluation")
    return [(f"{name}, {what}", partial(measure, name, what)) for name in MODELS for what in modes]


def run(args: argparse.Namespace) -> int:
    with threads(1):
        return bench(args, tasks(), threads=1, clock="processor time", batch=BATCH, side=SIDE)
