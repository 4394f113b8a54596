"""Evidence step 2: what the Triton kernels ask to move, counted in the interpreter and held to kernels/README.md.

A pass is one read or write of the whole tensor. The bounds leave two per cent for what is one number a row.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import hw3gpu.functional as HF
from benchmarks import traffic
from benchmarks.evidence.compile_without_gpu import count_accesses
from benchmarks.harness import COLUMNS, Bench, Results
from benchmarks.ledger import ledger
from hw3gpu import use_backend
from hw3gpu._torch.positions import packed
from hw3gpu.kernels.gpu import batch_norm, cross_entropy, distillation, softmax, token_log_probs

pytestmark = pytest.mark.interpreter

README = Path(__file__).resolve().parent.parent / "kernels" / "README.md"

HARD = {"ignore_index": -100, "label_smoothing": 0.0}
ROWS = [
    pytest.param(1000, torch.float32, 2.02, id="V=1000 float32"),
    pytest.param(1001, torch.bfloat16, 2.02, id="V=1001 bfloat16"),
    pytest.param(32768, torch.float32, 2.02, id="V=32768 float32"),
    pytest.param(32768, torch.bfloat16, 2.02, id="V=32768 bfloat16"),
    pytest.param(65536, torch.float32, 2.52, id="V=65536 float32"),
    pytest.param(32001, torch.float32, 2.02, id="V=32001 float32"),
    pytest.param(50257, torch.float32, 2.36, id="V=50257 float32"),
    pytest.param(50257, torch.bfloat16, 2.36, id="V=50257 bfloat16"),
    pytest.param(65536, torch.bfloat16, 2.52, id="V=65536 bfloat16"),
    pytest.param(131072, torch.bfloat16, 2.77, id="V=131072 bfloat16"),
    pytest.param(128256, torch.float32, 2.77, id="V=128256 float32"),
]


def logits(V: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(3, V, 1).to(dtype)


@pytest.mark.parametrize(("V", "dtype", "bound"), ROWS)
def test_loss_and_gradient_of_hard_targets(V, dtype, bound):
    z = logits(V, dtype)
    dz, loss, invalid = torch.empty_like(z), torch.empty(3, 1), torch.full((1,), 3)
    target = torch.randint(V, (3, 1))
    with ledger(z=z, dz=dz) as book:
        cross_entropy.forward_backward(z, target, None, loss, dz, invalid, **HARD)
    assert book.kernels == ["_forward_kernel"]
    assert 2.0 <= book.passes("z", "dz") <= bound


@pytest.mark.parametrize(("V", "bound"), [(16384, 2.02), (16387, 2.02), (32768, 2.52)])
def test_loss_and_gradient_under_a_softcap(V, bound):
    z = logits(V, torch.float32)
    dz, loss, invalid = torch.empty_like(z), torch.empty(3, 1), torch.full((1,), 3)
    with ledger(z=z, dz=dz) as book:
        cross_entropy.forward_backward(z, torch.randint(V, (3, 1)), None, loss, dz, invalid, softcap=30.0, **HARD)
    assert 2.0 <= book.passes("z", "dz") <= bound


@pytest.mark.parametrize(("V", "bound"), [(1000, 3.02), (1001, 3.02), (16384, 3.02), (40000, 5.02)])
def test_loss_and_gradient_of_soft_targets(V, bound):
    z = logits(V, torch.float32)
    y, dz, loss, invalid = torch.rand_like(z), torch.empty_like(z), torch.empty(3, 1), torch.full((1,), 3)
    with ledger(z=z, y=y, dz=dz) as book:
        cross_entropy.forward_backward(z, y, None, loss, dz, invalid, **HARD)
    assert 3.0 <= book.passes("z", "y", "dz") <= bound


@pytest.mark.parametrize("V", [1000, 32768, 65536])
def test_forward_then_backward_for_any_upstream_gradient(V):
    z = logits(V, torch.float32)
    dz, loss, stats, invalid = torch.empty_like(z), torch.empty(3, 1), torch.empty(3, 3, 1), torch.full((1,), 3)
    target, upstream, denominator = torch.randint(V, (3, 1)), torch.randn(3, 1), torch.full((1,), 3.0)
    with ledger(z=z, dz=dz) as book:
        cross_entropy.forward(z, target, None, loss, stats, invalid, **HARD)
        cross_entropy.backward(z, target, None, stats, upstream, denominator, dz, **HARD)
    assert 3.0 <= book.passes("z", "dz") <= 3.02


def bytes_asked(call):
    """What all launches of a call ask to load and store, of any tensor."""
    asked = []
    with count_accesses(lambda kernel, kind, addresses, itemsize: asked.append(addresses.size * itemsize), lambda kernel: None):
        call()
    return sum(asked)


@pytest.mark.parametrize(
    ("gradient", "upstream", "bound"),
    [("backward", 1.0, 3.02), ("backward", 0.3, 3.02), ("auto", 0.3, 3.02), ("forward", 1.0, 2.02), ("forward", 0.3, 4.04)],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_of_the_public_function(dtype, reduction, gradient, upstream, bound):
    """Classes, one number a row and the reduction's partial sums included."""
    z, target = logits(16384, dtype)[..., 0].requires_grad_(), torch.randint(16384, (3,))

    def step():
        loss = HF.cross_entropy(z, target, reduction=reduction, gradient=gradient)
        loss.backward(torch.full_like(loss, upstream))

    with use_backend("gpu"):
        passes = bytes_asked(step) / (z.numel() * z.element_size())
    assert bound - 0.05 <= passes <= bound
    exact = z.detach().double().requires_grad_()
    loss = F.cross_entropy(exact, target, reduction=reduction)
    loss.backward(torch.full_like(loss, upstream))
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("extra", ["token_weight", "normalizer", "logit_scale", "predicted"])
def test_numbers_of_rows_and_a_scale_cost_no_pass(extra):
    z, target = logits(16384, torch.bfloat16)[..., 0].requires_grad_(), torch.randint(16384, (3,))
    given = {"token_weight": torch.rand(3), "normalizer": torch.tensor(7), "logit_scale": 0.3, "predicted": None}[extra]
    options = {"return_stats": True} if given is None else {extra: given, "loss_dtype": torch.float32}

    def step():
        found = HF.cross_entropy(z, target, **options)
        (found if given is not None else found[0]).backward()

    with use_backend("gpu"):
        passes = bytes_asked(step) / (z.numel() * z.element_size())
    assert 2.95 <= passes <= 3.02


@pytest.mark.parametrize("V", [1001, 65536])
def test_token_log_probs_of_the_public_function(V):
    """Gradients of all three: no pass more than cross entropy's, forward 1 read, backward 1 read and 1 write."""
    z, target = logits(V, torch.float32)[..., 0].requires_grad_(), torch.randint(V, (3,))
    with use_backend("gpu"):
        forward = bytes_asked(lambda: HF.token_log_probs(z, target)) / (z.numel() * 4)
        both = bytes_asked(lambda: sum(v.sum() for v in HF.token_log_probs(z, target)).backward()) / (z.numel() * 4)
    assert 1.0 <= forward <= 1.02
    assert 3.0 <= both <= 3.06


@pytest.mark.parametrize(
    ("kind", "V", "reads"),
    [
        ("forward", 1001, 2),
        ("forward", 65536, 2),
        ("reverse", 65536, 2),
        ("jensen_shannon", 4096, 2),
        ("jensen_shannon", 16384, 4),
    ],
)
def test_distillation_of_the_public_function(kind, V, reads):
    """Student and teacher are read once forward, once backward, and one gradient is written."""
    student, teacher = logits(V, torch.float32)[..., 0].requires_grad_(), logits(V, torch.float32)[..., 0]
    with use_backend("gpu"):
        forward = bytes_asked(lambda: HF.distillation_loss(student, teacher, kind=kind)) / (student.numel() * 4)
        both = bytes_asked(lambda: HF.distillation_loss(student, teacher, kind=kind).backward()) / (student.numel() * 4)
    assert reads - 0.15 <= forward <= reads + 0.02
    assert reads + 2.85 <= both <= reads + 3.1


@pytest.mark.parametrize(("V", "bound"), [(1000, 3.02), (1001, 3.02), (16383, 3.02), (16384, 3.02), (32768, 4.02)])
def test_softmax(V, bound):
    z = logits(V, torch.float32)
    y, dz = torch.empty_like(z), torch.empty_like(z)
    with ledger(z=z, y=y) as book:
        softmax.forward(z, y)
    assert 2.0 <= book.passes("z", "y") <= 2.02
    with ledger(y=y, z=z, dz=dz) as book:
        softmax.backward(z, y, dz)
    assert 3.0 <= book.passes("y", "z", "dz") <= bound


CHANNELS = [
    pytest.param((64, 2, 49), 2.05, 3.05, id="7x7 planes fit"),
    pytest.param((16, 2, 1024), 2.05, 3.05, id="16384 values fit"),
    pytest.param((20, 2, 784), 2.05, 3.05, id="20 planes of 28x28 end to end"),
    pytest.param((16, 2, 1023), 2.05, 3.05, id="odd planes, 16368 values"),
    pytest.param((256, 2, 49), 2.05, 3.05, id="7x7 planes, 12544 values"),
    pytest.param((4, 2, 16384), 3.05, 5.05, id="long channels"),
]


@pytest.mark.parametrize(("shape", "forward", "backward"), CHANNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_batch_norm(shape, forward, backward, dtype):
    x = torch.randn(shape).to(dtype)
    y, dy, dx, C = torch.empty_like(x), torch.randn(shape).to(dtype), torch.empty_like(x), shape[1]
    mean, var, rstd, dgamma, dbeta = torch.empty(2, C), *torch.empty(4, C)
    with ledger(x=x, y=y) as book:
        batch_norm.forward(x, None, None, y, mean, var, rstd, None, None, eps=1e-5, momentum=0.0)
    assert 2.0 <= book.passes("x", "y") <= forward
    with ledger(x=x, dy=dy, dx=dx) as book:
        batch_norm.backward(dy, x, mean, rstd, None, dx, dgamma, dbeta)
    assert 3.0 <= book.passes("x", "dy", "dx") <= backward


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [
        pytest.param((64, 2, 49), 3.05, 4.05, id="7x7 planes fit"),
        pytest.param((16, 2, 1024), 3.05, 4.05, id="16384 values fit"),
        pytest.param((4, 2, 16384), 4.05, 6.05, id="long channels"),
    ],
)
def test_batch_norm_with_residual_and_relu(shape, forward, backward):
    """One pass more for the residual or its gradient, and a bit a value for the mask: y and the addend are not saved."""
    x, residual = torch.randn(shape), torch.randn(shape)
    y, dy, dx, dresidual, C = torch.empty_like(x), torch.randn(shape), torch.empty_like(x), torch.empty_like(x), shape[1]
    mean, var, rstd, dgamma, dbeta = torch.empty(2, C), *torch.empty(4, C)
    mask = torch.empty(batch_norm.mask_size(x), dtype=torch.uint8)
    with ledger(x=x, y=y, residual=residual, mask=mask) as book:
        batch_norm.forward(
            x, None, None, y, mean, var, rstd, None, None, eps=1e-5, momentum=0.0, residual=residual, mask=mask
        )  # fmt: skip
    assert 3.0 <= book.passes("x", "y", "residual") <= forward
    bits = book.passes("x", "mask") - book.passes("x")
    assert 1 / 32 <= bits <= 1 / 16, "of the bytes of float32"
    with ledger(x=x, dy=dy, dx=dx, dresidual=dresidual, mask=mask) as book:
        batch_norm.backward(dy, x, mean, rstd, None, dx, dgamma, dbeta, mask=mask, dresidual=dresidual)
    assert 4.0 <= book.passes("x", "dy", "dx", "dresidual") <= backward


@pytest.mark.parametrize(
    ("shape", "dtype", "forward", "backward"),
    [
        pytest.param((64, 4, 49), torch.float32, 2, 3, id="7x7 planes fit, float32"),
        pytest.param((64, 8, 49), torch.bfloat16, 2, 3, id="7x7 planes fit, bfloat16"),
        pytest.param((2, 4, 16384), torch.bfloat16, 3, 5, id="long channels, bfloat16"),
    ],
)
def test_batch_norm_of_the_positions_that_count(shape, dtype, forward, backward):
    """No pass more than without a mask, and at most 1.04 times the bytes: all channels share a bit a position, so that a
    program finds it in the cache where that of another channel has read it. Each asks for it; C of them are counted once."""
    mask = torch.rand(shape[0], shape[2]) < 0.5
    bits, n = packed(mask)
    x, dy, C = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), shape[1]
    y, dx, mean, var, rstd, dgamma, dbeta = torch.empty_like(x), torch.empty_like(x), torch.empty(2, C), *torch.empty(4, C)
    with ledger(x=x, y=y, valid=bits) as book:
        batch_norm.forward(x, None, None, y, mean, var, rstd, None, None, eps=1e-5, momentum=0.0, valid=bits, count=n)
    assert forward <= book.passes("x", "y") <= forward + 0.05
    assert book.passes("x", "y", "valid") - book.passes("x", "y") <= 0.04 * forward * C
    with ledger(x=x, dy=dy, dx=dx, valid=bits) as book:
        batch_norm.backward(dy, x, mean, rstd, None, dx, dgamma, dbeta, valid=bits, count=n)
    assert backward <= book.passes("x", "dy", "dx") <= backward + 0.05
    assert book.passes("x", "dy", "dx", "valid") - book.passes("x", "dy", "dx") <= 0.04 * backward * C


# ---------------------------------------------------------------------------------------------- kernels/README.md
def stated(launcher, fits):
    """Passes by tensor, as the table's last column has them: "x + y where a channel fits one tile, else 2x + y"."""
    row = re.search(rf"^\| `{re.escape(launcher)}` .*\| ([^|]*) \|$", README.read_text(), re.MULTILINE)
    short, _, long = re.sub(r"\(.*?\)", "", row[1]).partition(" where a channel fits one tile, else ")
    return {
        name: int(times or 1)
        for times, name in re.findall(r"\b(\d?)(d?[xyz]|loss|targets)\b", short if fits else long or short)
    }


def rows():
    """The arguments of launchers of rows, by name."""
    z = logits(1000, torch.float32)
    tensors = {name: torch.rand_like(z) for name in ("y", "dy", "dz")} | {"z": z, "loss": torch.rand(3, 1)}
    others = {
        "weight": torch.ones(1000),
        "stats": torch.empty(3, 3, 1),
        "sums": torch.empty(4, 3, 1),
        "pair_sums": torch.empty(8, 3, 1),
        "invalid": torch.full((1,), 3),
        "one": torch.ones(1),
    }
    return tensors | {"targets": torch.randint(1000, (3, 1)), "upstream": torch.ones(3, 1)} | others


def channels(shape):
    """The arguments of launchers of channels, by name."""
    tensors = {name: torch.randn(shape) for name in ("x", "y", "dy", "dx")}
    vectors = {name: torch.ones(shape[1]) for name in ("var", "rstd", "dgamma", "dbeta")}
    return tensors | vectors | {"mean": torch.zeros(2, shape[1])}


SET = {"eps": 1e-5, "momentum": 0.0}
TOKENS = {"ignore_index": -100, "temperature": 0.7}
DIVERGENCE = {"kind": "forward", "beta": 0.5, "temperature": 0.7}
LAUNCHERS = {
    "softmax.forward": lambda t: softmax.forward(t.z, t.y),
    "softmax.backward": lambda t: softmax.backward(t.dy, t.y, t.dz),
    "cross_entropy.forward": lambda t: cross_entropy.forward(t.z, t.targets, None, t.loss, t.stats, t.invalid, **HARD),
    "cross_entropy.backward": lambda t: cross_entropy.backward(t.z, t.targets, None, t.stats, t.upstream, None, t.dz, **HARD),
    "cross_entropy.forward_backward": lambda t: cross_entropy.forward_backward(
        t.z, t.targets, None, t.loss, t.dz, t.invalid, **HARD
    ),
    "cross_entropy.count": lambda t: cross_entropy.count(t.targets, t.weight, t.one, ignore_index=-100),
    "cross_entropy.reduce": lambda t: cross_entropy.reduce(t.loss, t.targets, t.weight, t.one, t.one, ignore_index=-100),
    "token_log_probs.forward": lambda t: token_log_probs.forward(
        t.z, t.targets, t.loss, t.loss, t.loss, t.sums, t.invalid, **TOKENS
    ),
    "token_log_probs.backward": lambda t: token_log_probs.backward(
        t.z, t.targets, t.sums, t.upstream, t.upstream, t.upstream, t.dz, **TOKENS
    ),
    "distillation.forward": lambda t: distillation.forward(t.z, t.y, None, t.loss, t.pair_sums, **DIVERGENCE),
    "distillation.backward": lambda t: distillation.backward(t.z, t.y, None, t.pair_sums, t.upstream, t.dz, None, **DIVERGENCE),
    "batch_norm.statistics": lambda t: batch_norm.statistics(t.x, t.mean, t.var, t.rstd, None, None, **SET),
    "batch_norm.normalize": lambda t: batch_norm.normalize(t.x, t.mean, t.rstd, None, None, t.y),
    "batch_norm.forward": lambda t: batch_norm.forward(t.x, None, None, t.y, t.mean, t.var, t.rstd, None, None, **SET),
    "batch_norm.backward_reduce": lambda t: batch_norm.backward_reduce(t.dy, t.x, t.mean, t.rstd, t.dgamma, t.dbeta),
    "batch_norm.backward_apply": lambda t: batch_norm.backward_apply(
        t.dy, t.x, t.mean, t.rstd, None, t.dgamma, t.dbeta, 16384, t.dx
    ),
    "batch_norm.backward": lambda t: batch_norm.backward(t.dy, t.x, t.mean, t.rstd, None, t.dx, t.dgamma, t.dbeta),
    "batch_norm.inference_backward": lambda t: batch_norm.inference_backward(
        t.dy, t.x, t.mean, t.rstd, None, t.dx, t.dgamma, t.dbeta
    ),
}
SIZES = [("channels that fit one tile", (16, 2, 1024)), ("long channels", (4, 2, 16384))]


@pytest.mark.parametrize(
    ("launcher", "shape"),
    [
        pytest.param(launcher, shape, id=f"{launcher}-{size}" if shape else launcher)
        for launcher in LAUNCHERS
        for size, shape in (SIZES if launcher.startswith("batch_norm") else [("", None)])
    ],
)
def test_the_readme_says_what_is_moved(launcher, shape):
    arguments = rows() if shape is None else channels(shape)
    of_a_row = {"loss", "targets"} if launcher in ("cross_entropy.count", "cross_entropy.reduce") else set()
    with ledger(**arguments) as book:
        LAUNCHERS[launcher](SimpleNamespace(**arguments))
    moved = {name: book.passes(name) for name in {"x", "y", "z", "dx", "dy", "dz"} & {*arguments} | of_a_row}
    says = stated(launcher, shape != (4, 2, 16384))
    assert moved == pytest.approx({name: says.get(name, 0) for name in moved}, abs=0.02)
    assert {*says} <= {*moved}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_off_16_bytes_touch_few_sectors_too_many(dtype):
    z = logits(50257, dtype)
    loss, stats, invalid = torch.empty(3, 1), torch.empty(3, 3, 1), torch.full((1,), 3)
    with ledger(z=z) as book:
        cross_entropy.forward(z, torch.zeros(3, 1, dtype=torch.int64), None, loss, stats, invalid, **HARD)
    assert book.sector_ratio("z") <= 1.06


def test_liger_stands_in_the_same_table():
    """Any Triton kernel can be counted: Liger's reads twice, and twice more where the upstream gradient is not 1."""
    pytest.importorskip("liger_kernel", reason="the `bench` extra is not installed")
    assert traffic._liger(1000, torch.float32, upstream=1.0) == pytest.approx(3.0, abs=0.02)
    assert traffic._liger(1000, torch.float32, upstream=2.0) == pytest.approx(5.0, abs=0.02)
    assert traffic._at_once(1000, torch.float32, soft=False) == pytest.approx(2.0, abs=0.02)


def test_log_probabilities_stand_in_the_same_table():
    assert traffic._token_log_probs(1000, torch.float32) == pytest.approx(3.0, abs=0.02)


def test_divergences_stand_in_the_same_table():
    assert traffic._distillation(1000, torch.float32) == pytest.approx(5.0, abs=0.04)


def test_what_is_counted_is_written_and_what_is_wrong_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(
        traffic, "COUNTS", {what: of for what, of in traffic.COUNTS.items() if what == "loss and gradient at once"}
    )
    run = Bench(Results.new(tmp_path, COLUMNS, {}), 1)
    traffic.measure(1000, torch.float32, run)
    monkeypatch.setattr(traffic.reference, "cross_entropy_with_options", _twice(traffic.reference.cross_entropy_with_options))
    traffic.measure(1000, torch.float32, run)
    right, wrong = run.results.measurements
    assert (right["passes"], right["least_passes"], right["bytes"], right["right"]) == (2.0, 2, 2 * 3 * 1000 * 4, "yes")
    assert (wrong["right"], wrong.get("passes"), run.wrong) == ("no", None, 1)


def _twice(sheet):
    def twice(*args, **options):
        found = sheet(*args, **options)
        return found._replace(loss=2 * found.loss)

    return twice


def test_the_ledger_counts_what_is_read_twice():
    z = logits(65536, torch.float32)
    with ledger(z=z) as book:
        softmax.forward(z, torch.empty_like(z))
    assert book.asked["z", "load"] == z.nbytes * (2 - 32768 / 65536)
