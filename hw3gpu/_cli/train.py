"""`hw3gpu train`: handwritten digits, learned by a small net of this library's layers and by the same net of PyTorch's.

Both nets start from the same weights and see the same batches. They are trained by turns, an epoch each, so that the
times of an epoch compare under the same load.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from statistics import median
from typing import NoReturn

import torch
from torch import Tensor, nn

from .. import nn as hw3gpu_nn
from .._core import dispatch, pool
from .files import why_not_written

BATCH = 64
LEARNING_RATE = 2e-3


class PyTorchNet(nn.Module):
    """Two convolutions, each with batch norm and ReLU, and a linear layer; images (B, W, H, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(64)
        self.linear = nn.Linear(64 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10)."""
        x = x.permute(0, 3, 2, 1)  # (B, C, H, W), as PyTorch's layers have it
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.linear(x.flatten(1))


class Net(nn.Module):
    """`PyTorchNet` with this library's layers, and the weights of one."""

    def __init__(self, net: PyTorchNet) -> None:
        super().__init__()
        self.conv1 = hw3gpu_nn.Conv2D.from_torch(net.conv1)
        self.norm1 = hw3gpu_nn.BatchNorm2d(32)
        self.conv2 = hw3gpu_nn.Conv2D.from_torch(net.conv2)
        self.norm2 = hw3gpu_nn.BatchNorm2d(64)
        self.linear = nn.Linear(64 * 8 * 8, 10)
        for ours, theirs in ((self.norm1, net.norm1), (self.norm2, net.norm2), (self.linear, net.linear)):
            ours.load_state_dict(theirs.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10)."""
        # batch norm has its channels second: a view of the channels-last images
        x = self.norm1(self.conv1(x).permute(0, 3, 1, 2)).relu().permute(0, 2, 3, 1)
        x = self.norm2(self.conv2(x).permute(0, 3, 1, 2)).relu()
        return self.linear(x.transpose(2, 3).flatten(1))


@dataclass(frozen=True)
class Digits:
    """1797 images in [0, 1], (B, 16, 16, 1), and their classes 0…9; a quarter of them for the test."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    @classmethod
    def load(cls, seed: int, device: torch.device) -> Digits:
        """scikit-learn's handwritten digits, which ship with it, each pixel twice along both axes, split by `seed`."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, classes = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8, 1).transpose(0, 2, 1, 3).repeat(2, axis=1).repeat(2, axis=2) / 16.0
        x, x_test, y, y_test = train_test_split(images, classes, test_size=0.25, random_state=seed, stratify=classes)
        pixels = (torch.tensor(part, dtype=torch.float32, device=device) for part in (x, x_test))
        labels = (torch.tensor(part, device=device) for part in (y, y_test))
        return cls(next(pixels), next(labels), next(pixels), next(labels))


@dataclass
class Run:
    """One net in training, with the loss of each step and the seconds of each epoch."""

    name: str
    net: nn.Module
    criterion: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=LEARNING_RATE)

    def epoch(self, data: Digits, order: Tensor, after_step: Callable[[], None]) -> None:
        """One pass over the training set in the given order."""
        losses = []
        start = time.perf_counter()
        self.net.train()
        for batch in order.split(BATCH):
            loss = self.criterion(self.net(data.x[batch]), data.y[batch])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            after_step()
        self.losses += torch.stack(losses).tolist()  # waits for the device
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def accuracy(self, data: Digits) -> float:
        """The part of the test images that the net puts in the right class, with the running statistics."""
        self.net.eval()
        return (self.net(data.x_test).argmax(1) == data.y_test).float().mean().item()


def train(data: Digits, epochs: int, seed: int, after_step: Callable[[], None]) -> tuple[Run, Run]:
    """Both nets, trained: this library's first."""
    device = data.x.device
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # both nets alike: images of 16 x 16 pixels gain little by a second one
    net = PyTorchNet().to(device)
    ours = Run("hw3gpu", Net(net).to(device), hw3gpu_nn.CrossEntropyLoss())
    theirs = Run("PyTorch", net, nn.CrossEntropyLoss())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(data.x), generator=generator).to(device)
        for run in (ours, theirs):
            run.epoch(data, order, after_step)
    torch.set_num_threads(threads)
    return ours, theirs


def plot(ours: Run, theirs: Run, path: Path) -> None:
    """The two loss curves, and below them their difference, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = range(1, len(ours.losses) + 1)
    above.semilogy(steps, theirs.losses, color="C1", linewidth=3, alpha=0.5, label="PyTorch's layers")
    above.semilogy(steps, ours.losses, color="C0", linewidth=1, label="hw3gpu's layers")
    above.set(ylabel="training loss", title="Handwritten digits: the same net, weights and batches")
    above.legend()
    difference = [abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    below.semilogy(steps, difference, color="C2", linewidth=1)
    below.set(xlabel="step", ylabel="|difference|")
    with path.open("wb") as file:
        figure.savefig(file, dpi=150, format="png")


def _refuse(message: str) -> NoReturn:
    """Status 2, as for every wrong argument."""
    print(f"hw3gpu train: {message}", file=sys.stderr)
    raise SystemExit(2)


def _device(name: str | None) -> torch.device:
    """A device on which the kernels that are asked for run."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        _refuse(f"argument --device: expected cpu, cuda or cuda:N, got {name!r}")
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        _refuse(f"argument --device: {name} is not there: torch finds {found} CUDA devices")
    try:
        pool.limit()
        dispatch.check_threads()
        dispatch.backend(torch.empty(1, device=device))
    except (dispatch.BackendError, ValueError) as error:
        _refuse(str(error))
    return device


def main(epochs: int, seed: int, output: Path, device_name: str | None) -> int:
    """Train both nets, print what they reached, and write the curves."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
    from rich.table import Table

    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"hw3gpu train: {error.name} is not installed; pip install 'hw3gpu[demo]'") from None
    device = _device(device_name)
    if refusal := why_not_written(output):
        _refuse(f"argument --output: {refusal}")

    console = Console(highlight=False)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as progress:
        data = Digits.load(seed, device)
        task = progress.add_task("training both nets", total=2 * epochs * ceil(len(data.x) / BATCH))
        ours, theirs = train(data, epochs, seed, lambda: progress.advance(task))
    largest = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))

    table = Table("layers", "test accuracy", "last loss", "epoch (median)", "first epoch")
    for run in (ours, theirs):
        accuracy = f"{100 * run.accuracy(data):.2f} %"
        table.add_row(run.name, accuracy, f"{run.losses[-1]:.4f}", f"{median(run.seconds):.3f} s", f"{run.seconds[0]:.3f} s")
    console.print(table)
    console.print(f"largest difference between the two loss curves: {largest:.1e}")
    plot(ours, theirs, output)
    console.print(f"curves: {output.resolve()}", soft_wrap=True)
    return 0
