"""`examples/`: each program runs in a short mode and finds what it says; the notebooks' cells run and their assertions hold."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hw3gpu.functional as HF

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
PLOTS = re.compile(r"\bplt\b")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_digits_are_learned(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert load("digits").main(["--epochs", "1"]) > 0.85
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_shapes_of_resnet_are_pytorchs() -> None:
    """In a picture that is wider than high; the last shape is that of the paper's table for 224 pixels."""
    resnet = load("resnet_shapes")
    assert resnet.main(["--batch", "2", "--input", "320", "224"])[-1] == ("layer4.2.conv3", (2, 10, 7, 2048))
    found = resnet.main([])
    assert len(found) == 54
    assert found[-1] == ("layer4.2.conv3", (32, 7, 7, 2048))


def test_the_language_model_learns_alike_in_less_memory(tmp_path: Path) -> None:
    png = tmp_path / "curves" / "model.png"
    short = ["--steps=3", "--batch=16", "--context=32", "--width=16", f"--output={png}"]
    found = load("language_model").main(short)
    ours, theirs = found["hw3gpu"], found["PyTorch"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["losses"][-1] < ours["losses"][0]
    if ours["peak_MB"] is not None:
        assert ours["peak_MB"] < theirs["peak_MB"] - ours["logits_MB"]
    if importlib.util.find_spec("matplotlib"):
        assert png.read_bytes().startswith(b"\x89PNG")


def policy(rows: Any) -> Any:
    """Of some tokens, as if they had been drawn: advantages times log-probabilities, and a reward for entropy."""

    def loss(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
        log_prob, entropy = rows(hidden, head, target)
        advantage = torch.linspace(-0.5, 1.0, len(target))
        return -(advantage * log_prob).mean() - 0.01 * entropy.mean()

    return loss


def plain_rows(hidden: Tensor, head: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(hidden @ head.t(), -1)
    return log_p.gather(-1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def of_hidden_states(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    """The loss of (B, T, D) with weights of tokens and a scale; the arg max comes with it."""
    options = {"token_weight": WEIGHTS.view(4, 8), "logit_scale": 0.7, "return_stats": True}
    loss, stats = HF.linear_cross_entropy(x.view(4, 8, -1), W, t.view(4, 8), **options)
    assert torch.equal(stats.predicted.flatten(), (x @ W.t()).argmax(-1))
    return loss


def weighed_rows(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    return (WEIGHTS * F.cross_entropy(0.7 * (x @ W.t()), t, reduction="none")).sum() / WEIGHTS.sum()


def in_halves(loss: Any) -> Any:
    return lambda x, W, t: loss(x.bfloat16(), W.bfloat16(), t)


WEIGHTS = torch.linspace(0.0, 2.0, 32)
TEACHER = torch.randn(32, 40, generator=torch.Generator().manual_seed(1))
TEACHERS = torch.randn(32, 12, generator=torch.Generator().manual_seed(2)), torch.linspace(-1, 1, 480).reshape(40, 12)
ITEMS = 37.0  # of all micro-batches
LOSSES: dict[str, tuple[Any, Any]] = {
    "token log-probabilities": (policy(lambda x, W, t: HF.token_log_probs(x @ W.t(), t)[:2]), policy(plain_rows)),
    "linear token log-probabilities": (policy(lambda x, W, t: HF.linear_token_log_probs(x, W, t)[:2]), policy(plain_rows)),
    "distillation": (
        lambda x, W, t: HF.distillation_loss(x @ W.t(), TEACHER, temperature=2.0),
        lambda x, W, t: F.kl_div(
            F.log_softmax(x @ W.t() / 2, -1), F.log_softmax(TEACHER / 2, -1), reduction="batchmean", log_target=True
        ),
    ),
    "linear distillation": (
        lambda x, W, t: HF.linear_distillation_loss(x, W, *TEACHERS),
        lambda x, W, t: F.kl_div(
            F.log_softmax(x @ W.t(), -1), F.log_softmax(F.linear(*TEACHERS), -1), reduction="batchmean", log_target=True
        ),
    ),
    "normalizer": (
        lambda x, W, t: HF.cross_entropy(x @ W.t(), t, normalizer=ITEMS),
        lambda x, W, t: F.cross_entropy(x @ W.t(), t, reduction="sum") / ITEMS,
    ),
    "linear normalizer, loss_dtype": (
        lambda x, W, t: HF.linear_cross_entropy(x, W, t, normalizer=ITEMS, loss_dtype=torch.float32),
        lambda x, W, t: F.cross_entropy(x @ W.t(), t, reduction="sum") / ITEMS,
    ),
    "token_weight, logit_scale": (
        lambda x, W, t: HF.cross_entropy(x @ W.t(), t, token_weight=WEIGHTS, logit_scale=0.7), weighed_rows,
    ),
    "linear token_weight, logit_scale, predicted": (of_hidden_states, weighed_rows),
    "loss_dtype of bfloat16": (
        in_halves(lambda x, W, t: HF.cross_entropy(x @ W.t(), t, loss_dtype=torch.float32)),
        in_halves(lambda x, W, t: F.cross_entropy((x @ W.t()).float(), t)),
    ),
    "linear loss_dtype of bfloat16": (
        in_halves(lambda x, W, t: HF.linear_cross_entropy(x, W, t, loss_dtype=torch.float32)),
        in_halves(lambda x, W, t: F.cross_entropy((x @ W.t()).float(), t)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", LOSSES)
def test_a_transformer_trains_to_the_loss_of_pytorchs_formula(which: str) -> None:
    """Step by step: a gradient that is off would lead elsewhere."""
    model = load("language_model").Model
    found = []
    for loss_of in LOSSES[which]:
        torch.manual_seed(0)
        net = model(40, 8, 16)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        tokens = torch.arange(36).reshape(4, 9) * 7 % 40
        losses = []
        for _ in range(5):
            loss = loss_of(net(tokens[:, :-1]).flatten(0, 1), net.head.weight, tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        found.append(losses)
    ours, theirs = found
    assert ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, rel=1e-5)


def code_of(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run(notebook: Path) -> None:
    cells = code_of(notebook)
    if "sklearn" in "".join(cells):
        pytest.importorskip("sklearn")
    computed = [cell for cell in cells if not PLOTS.search(cell)]
    plots = importlib.util.find_spec("matplotlib") is not None
    names: dict[str, Any] = {}
    with without_windows() if plots else contextlib.nullcontext([]) as drawn:
        for cell in cells if plots else computed:
            exec(cell, names)
    assert 0 < len(computed) < len(cells)
    assert "assert" in "".join(computed)
    if not plots:
        pytest.skip("no Matplotlib: the plots were left out")
    assert len(drawn) == len(cells) - len(computed)
    assert all(figure.axes for figure in drawn)


@contextlib.contextmanager
def without_windows() -> Any:
    """Matplotlib draws to nothing; the figures that were shown, each rendered once."""
    import matplotlib
    from matplotlib import pyplot as plt

    drawn: list[Any] = []

    def show() -> None:
        for number in plt.get_fignums():
            figure = plt.figure(number)
            figure.canvas.draw()
            drawn.append(figure)
        plt.close("all")

    with matplotlib.rc_context(), pytest.MonkeyPatch.context() as patch:
        plt.switch_backend("agg")
        patch.setattr(plt, "show", show)
        yield drawn


def test_every_notebook_was_run_before_it_was_saved() -> None:
    """With its plots, so that a page that shows it has them."""
    assert [notebook.stem for notebook in NOTEBOOKS] == ["minor_components", "whitening"]
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text())["cells"]
        for cell in cells:
            if PLOTS.search("".join(cell["source"])):
                assert "image/png" in cell["outputs"][0]["data"]


def test_every_example_is_named_in_its_page() -> None:
    page = (EXAMPLES / "README.md").read_text()
    assert [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb") and f"({path.name})" not in page] == []
