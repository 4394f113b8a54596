"""A small transformer on the text of Python's `help()`: linear cross entropy beside PyTorch's, its loss and its peak memory.

    python examples/language_model.py [--steps 300] [--output out/language_model.png]

The same model, weights and batches are trained twice, each time in a process of its own: with
`hw3gpu.functional.linear_cross_entropy`, which never holds all logits, and with `torch.nn.functional.cross_entropy` of the
logits. The plot needs Matplotlib: `pip install 'hw3gpu[demo]'`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hw3gpu.functional

SIDES = ("hw3gpu", "PyTorch")
COLORS = {"hw3gpu": "C0", "PyTorch": "C1"}


class Model(nn.Module):
    """Tokens (B, T) to hidden states (B, T, width) and, by `head`, to logits of the next token."""

    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(T, device=tokens.device)
        x = self.embedding(tokens) + self.position(torch.arange(T, device=tokens.device))
        return self.layers(x, mask=causal, is_causal=True)


def text() -> tuple[Tensor, list[str]]:
    """The pages of Python's `help()`, which ship with it, as numbers of words and punctuation marks; and the words."""
    from pydoc_data.topics import topics

    words = re.findall(r"\w+|[^\w\s]", "\n".join(topics[name] for name in sorted(topics)))
    vocabulary = sorted(set(words))
    number = {word: i for i, word in enumerate(vocabulary)}
    return torch.tensor([number[word] for word in words]), vocabulary


def loss_of(side: str, model: Model, tokens: Tensor) -> Tensor:
    """The mean loss of predicting each token of (B, T + 1) but the first."""
    hidden, target = model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    if side == "hw3gpu":
        return hw3gpu.functional.linear_cross_entropy(hidden, model.head.weight, target)
    return F.cross_entropy(model.head(hidden), target)


class Peak:
    """Bytes that a block of code has in use at most beyond those in use before: the GPU's, else the process's, on Linux."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before = self._reset()

    def _reset(self) -> int | None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        except OSError:
            return None
        return self._highest()

    def _highest(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) << 10

    def megabytes(self) -> float | None:
        return None if self.before is None else (self._highest() - self.before) / 1e6


def train(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Losses, seconds a step, and the peak of memory of one side."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, vocabulary = text()
    torch.manual_seed(options.seed)
    model = Model(len(vocabulary), options.context, options.width).to(device)
    generator = torch.Generator().manual_seed(options.seed)

    def batch(rows: int) -> Tensor:
        starts = torch.randint(len(tokens) - options.context - 1, (rows, 1), generator=generator)
        return tokens[starts + torch.arange(options.context + 1)].to(device)

    # a step of one row first: kernels are compiled, and neither their compiler nor the optimizer's state counts
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    loss_of(side, model, batch(1)).backward()
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    losses, seconds, peak = [], [], Peak(device)
    for _ in range(options.steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(side, model, batch(options.batch))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    logits = 4 * options.batch * options.context * len(vocabulary) / 1e6
    return {"losses": losses, "seconds": sorted(seconds)[len(seconds) // 2], "peak_MB": peak.megabytes(), "logits_MB": logits}


def in_a_process(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """`train` in a process of its own, so that neither side has what the other has left in memory."""
    numbers = [f"--{name}={getattr(options, name)}" for name in ("steps", "batch", "context", "width", "seed")]
    command = [sys.executable, __file__, "--side", side, *numbers]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """The loss curves, and beside them the peaks of memory where they were measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    for (name, of), width in zip(reversed(found.items()), (4, 1.2), strict=True):
        steps = range(1, len(of["losses"]) + 1)
        curves.plot(steps, of["losses"], color=COLORS[name], linewidth=width, alpha=0.5 if width > 2 else 1, label=name)
    curves.set(xlabel="step", ylabel="loss a token (nats)", title="Two trainings from the same weights")
    curves.legend()
    measured = {name: of["peak_MB"] for name, of in found.items() if of["peak_MB"] is not None}
    drawn = bars.bar(list(measured), list(measured.values()), color=[COLORS[name] for name in measured])
    bars.bar_label(drawn, fmt="%.0f MB")
    bars.set(title="Peak memory of the steps", ylabel="MB beyond model and optimizer")
    bars.set_xlabel(f"all logits of a step: {found['hw3gpu']['logits_MB']:.0f} MB")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Trains both sides, prints what they reached, draws the plot, and returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default, what in (
        ("steps", 300, "of training"), ("batch", 64, "rows of text a step"), ("context", 64, "tokens a row"),
        ("width", 64, "of the hidden states, a multiple of 4"), ("seed", 0, "of weights and batches"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/language_model.png"), help="the plot (%(default)s)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # of the process that trains
    options = parser.parse_args(arguments)
    if options.side:
        found = {options.side: train(options.side, options)}
        print(json.dumps(found[options.side]))
        return found

    found = {side: in_a_process(side, options) for side in SIDES}
    for side, of in found.items():
        peak = "not measured on this system" if of["peak_MB"] is None else f"{of['peak_MB']:.0f} MB"
        first, last = of["losses"][0], of["losses"][-1]
        print(f"{side}: loss {first:.3f} to {last:.3f}, {1e3 * of['seconds']:.0f} ms a step, peak memory {peak}")
    print(f"all logits of a step would take {found['hw3gpu']['logits_MB']:.0f} MB")
    largest = max(abs(a - b) for a, b in zip(*(of["losses"] for of in found.values()), strict=True))
    print(f"largest difference between the two loss curves: {largest:.1e}")
    try:
        plot(found, options.output)
        print(f"plot: {options.output}")
    except ImportError as error:
        print(f"no plot: {error.name} is not installed; pip install 'hw3gpu[demo]'")
    return found


if __name__ == "__main__":
    main()
