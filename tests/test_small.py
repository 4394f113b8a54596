"""Float32 calls by address: to the bit what the general way gives, and taken for what it is made for alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF

import hw3gpu.functional as HF
from hw3gpu._core.dispatch import batch_norm_small, cross_entropy_small
from hw3gpu._torch import small_calls


@pytest.fixture
def taken(monkeypatch):
    """The names of the launches by address."""
    names = []

    def note(module, name):
        launch = getattr(module, name)

        def noted(*args, **options):
            names.append(name)
            return launch(*args, **options)

        monkeypatch.setattr(module, name, noted)

    note(cross_entropy_small, "forward_backward")
    note(batch_norm_small, "forward")
    note(batch_norm_small, "backward")
    note(batch_norm_small, "normalize")
    note(batch_norm_small, "inference_backward")
    return names


def both_ways(monkeypatch, call):
    """The results of `call` by address and in the general way."""
    by_address = call()
    with monkeypatch.context() as patch:
        patch.setattr(small_calls, "MOST_BYTES", 0)
        patch.setattr(small_calls, "_way", lambda *layout: None)
        return by_address, call()


def assert_same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def step_of(z, target, scale=1.0, **options):
    def call():
        leaf = z.clone().requires_grad_()
        loss = HF.cross_entropy(leaf, target, **options)
        (loss * scale).backward()
        return loss.detach(), leaf.grad

    return call


CLASSES = {
    "one row": ((7,), {}),
    "rows": ((32, 10), {}),
    "the sum": ((32, 10), {"reduction": "sum"}),
    "smoothing": ((33, 17), {"label_smoothing": 0.1}),
    "class axis in the middle": ((3, 5, 2, 4), {"ignore_index": 2}),
    "one class": ((4, 1), {}),
    "class weights": ((32, 10), {"weight": torch.linspace(0.5, 2, 10), "ignore_index": 3}),
    "the sum by class weights": ((3, 5, 2, 4), {"weight": torch.linspace(0.5, 2, 5), "reduction": "sum"}),
}


@pytest.mark.parametrize(("shape", "options"), CLASSES.values(), ids=CLASSES)
def test_a_loss_without_a_graph(monkeypatch, taken, shape, options):
    z = 10 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    target = torch.zeros((*shape[:1], *shape[2:]) if len(shape) > 1 else (), dtype=torch.int64)
    found, expected = both_ways(monkeypatch, lambda: [HF.cross_entropy(z, target, **options)])
    assert_same_bits(found, expected)
    assert taken == ["forward_backward"]
    with pytest.raises(IndexError, match=r"target: expected classes in 0…\d+ or ignore_index -?\d+, got 99 in row 0"):
        HF.cross_entropy(z, target + 99, **options)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(("shape", "options"), CLASSES.values(), ids=CLASSES)
def test_cross_entropy(monkeypatch, taken, shape, options, scale):
    random = torch.Generator().manual_seed(0)
    z = 10 * torch.randn(shape, generator=random)
    target = torch.randint(shape[min(len(shape) - 1, 1)], (*shape[:1], *shape[2:]) if len(shape) > 1 else (), generator=random)
    found, expected = both_ways(monkeypatch, step_of(z, target, scale, **options))
    assert taken == ["forward_backward"] * (1 if scale == 1 else 2)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("all_ignored", ["nan", "zero"])
def test_cross_entropy_of_nothing_but_ignored_rows(monkeypatch, taken, all_ignored):
    call = step_of(torch.randn(4, 3), torch.full((4,), -100), all_ignored=all_ignored)
    found, expected = both_ways(monkeypatch, call)
    assert taken
    assert_same_bits(found, expected)
    assert found[0].isnan() if all_ignored == "nan" else found[0] == 0


def test_a_wrong_class_is_refused(taken):
    with pytest.raises(IndexError, match="got 3 in row 1"):
        HF.cross_entropy(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 3]))
    assert taken


def normalization_of(x, dy, *, affine=True, running=True, training=True, residual=None, activation=None):
    C = x.shape[1]

    def call():
        leaf, added = x.clone().requires_grad_(), None if residual is None else residual.clone().requires_grad_()
        weight, bias = (torch.linspace(0.5, 2, C) + i for i in range(2)) if affine else (None, None)
        leaves = [leaf, *(v.requires_grad_() for v in (weight, bias, added) if v is not None)]
        kept = [torch.linspace(-1, 1, C), torch.linspace(0.5, 3, C)] if running else [None, None]
        y = HF.batch_norm(leaf, *kept, weight, bias, training=training, residual=added, activation=activation)
        return y.detach(), *torch.autograd.grad(y, leaves, dy), *(v for v in kept if v is not None)

    return call


# small planes, some of several tiles, parts of one tile, rows of channels, larger planes; more than one thread has a part of
# the largest
SHAPES = [
    (16, 8, 4, 4), (2, 3, 2), (5, 1, 16, 16), (3, 40, 7, 7), (8, 960, 4, 4), (40, 160), (64, 1200, 1, 1), (4, 3), (3000, 37),
    (2, 3, 17, 17), (4, 9, 60, 70),
]  # fmt: skip


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("running", [True, False], ids=["running", "batch alone"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm(monkeypatch, taken, shape, affine, running):
    random = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=random) for _ in range(2))
    x[: len(x) // 2] *= 1e-3
    x[: len(x) // 2] += 1e4
    found, expected = both_ways(monkeypatch, normalization_of(x, dy, affine=affine, running=running))
    assert taken == ["forward", "backward"]
    assert_same_bits(found, expected)


@pytest.mark.parametrize("shape", [(3000, 37, 1), (4, 9, 4200)], ids=["rows", "planes"])
def test_first_values_far_from_the_mean(monkeypatch, taken, shape):
    """The mean of the first 16 values is 10 standard deviations or more from that of all: the sums are taken again."""
    x, dy = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for k in range(16):
        x[k // shape[2], :, k % shape[2]] += 1e4
    found, expected = both_ways(monkeypatch, normalization_of(x, dy))
    assert taken == ["forward", "backward"]
    assert_same_bits(found, expected)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", [*SHAPES, (600, 16, 4, 8), (4, 1), (70, 3), (70000, 5), (2000, 31)], ids=str)
def test_batch_norm_in_evaluation(monkeypatch, taken, shape, affine):
    random = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=random) for _ in range(2))
    found, expected = both_ways(monkeypatch, normalization_of(x, dy, affine=affine, training=False))
    assert taken == ["normalize", "inference_backward"]
    assert_same_bits(found, expected)


FUSED = [(None, True), ("relu", False), ("relu", True), ("silu", True), ("gelu", False)]


# of each family of loops: tiles, planes, rows
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("shape", "activation", "with_residual"),
    [
        pytest.param(shape, *fused, id=f"{shape}-{fused}", marks=[] if fused[0] in (None, "relu") else [pytest.mark.slow])
        for shape in [(3, 40, 7, 7), (4, 9, 20, 20), (600, 37)]
        for fused in FUSED
    ],
)
def test_residual_and_activation(monkeypatch, taken, shape, activation, with_residual, training):
    x, dy, residual = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    added = {"residual": residual if with_residual else None, "activation": activation}
    found, expected = both_ways(monkeypatch, normalization_of(x, dy, training=training, **added))
    back = [] if activation and not training else ["backward" if training else "inference_backward"]
    assert taken == ["forward" if training else "normalize", *back]
    assert_same_bits(found, expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", [(8, 960, 4, 4), (2, 3, 4, 4), (4, 64, 30, 30)], ids=str)
def test_channels_last(monkeypatch, taken, shape, training):
    x, dy = (torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(2))
    found, expected = both_ways(monkeypatch, normalization_of(x, dy, training=training))
    assert taken == (["forward", "backward"] if training else ["normalize", "inference_backward"])
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(found, expected)


def test_a_strided_upstream_gradient_takes_the_general_way_back(monkeypatch, taken):
    x, dy = torch.randn(4, 3, 2, 5), torch.randn(4, 3, 5, 2).transpose(2, 3)
    found, expected = both_ways(monkeypatch, normalization_of(x, dy))
    assert taken == ["forward"]
    assert_same_bits(found, expected)


def test_the_default_dtype_changes_nothing(taken):
    """New tensors have the dtype of the arguments, whatever is set as the default."""
    x, z = torch.randn(4, 3, 2, 5, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    torch.set_default_dtype(torch.float64)
    try:
        y, loss = HF.batch_norm(x, None, None, training=True), HF.cross_entropy(z, torch.arange(4) % 3)
        (y.square().sum() + loss).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert taken == ["forward", "forward_backward", "backward"]
    assert {v.dtype for v in (y, loss, x.grad, z.grad)} == {torch.float32}
    torch.testing.assert_close(y, TF.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(loss, TF.cross_entropy(z, torch.arange(4) % 3))


OTHERS = {
    "another dtype": lambda: HF.cross_entropy(torch.zeros(4, 3, dtype=torch.float64, requires_grad=True), torch.arange(4) % 3),
    "class weights and smoothing": lambda: HF.cross_entropy(
        torch.zeros(4, 3, requires_grad=True), torch.arange(4) % 3, torch.ones(3), label_smoothing=0.1
    ),
    "strided logits": lambda: HF.cross_entropy(torch.zeros(3, 4, requires_grad=True).t(), torch.arange(4) % 3),
    "strided classes": lambda: HF.cross_entropy(torch.zeros(4, 3, requires_grad=True), (torch.arange(8) % 3)[::2]),
    "probabilities": lambda: HF.cross_entropy(torch.zeros(4, 3, requires_grad=True), torch.full((4, 3), 1 / 3)),
    "a softcap": lambda: HF.cross_entropy(torch.zeros(4, 3, requires_grad=True), torch.arange(4) % 3, softcap=3.0),
    "large logits": lambda: HF.cross_entropy(torch.zeros(512, 64, requires_grad=True), torch.arange(512) % 3),
    "few large planes": lambda: HF.batch_norm(torch.randn(2, 1, 400, 400), None, None, training=True),
    "strided planes": lambda: HF.batch_norm(torch.randn(2, 3, 4, 8)[..., ::2], None, None, training=True),
    "a residual of another layout": lambda: HF.batch_norm(
        torch.randn(2, 3, 4, 4), None, None, training=True, residual=torch.randn(2, 3, 4, 4).mT
    ),
}


@pytest.mark.parametrize("call", OTHERS.values(), ids=OTHERS)
def test_others_take_the_general_way(taken, call):
    call()
    assert taken == []


VECTORS = {
    "sparse": lambda v: v.to_sparse(),
    "of oneDNN's layout": lambda v: v.to_mkldnn(),
    "nested": lambda v: torch.nested.nested_tensor(list(v)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("of", VECTORS.values(), ids=VECTORS)
@pytest.mark.parametrize("name", ["running_mean", "weight"])
def test_vectors_without_plain_memory_are_refused(taken, name, of):
    given = {"running_mean": torch.zeros(40), "running_var": torch.ones(40), "weight": torch.ones(40)}
    with pytest.raises(TypeError, match=f"{name}: expected a dense tensor"):
        HF.batch_norm(torch.zeros(4, 40), **(given | {name: of(given[name])}))
    assert taken == []


def test_a_vector_negated_when_it_is_read_takes_the_general_way(taken):
    x, weight = torch.randn(4, 40), torch._neg_view(torch.ones(40))
    y = HF.batch_norm(x, torch.zeros(40), torch.ones(40), weight)
    assert taken == []
    torch.testing.assert_close(y, TF.batch_norm(x, torch.zeros(40), torch.ones(40), weight))


def test_whole_numbers_are_no_other_kernel(taken):
    """Momentum 1 and momentum 1.0 are one compiled function."""
    from hw3gpu.kernels.cpu import batch_norm_small

    x = torch.randn(2, 3, 4)
    y = [HF.batch_norm(x, None, None, training=True, momentum=momentum) for momentum in (1.0, 1)]
    assert taken == ["forward", "forward"]
    # but for activation and residual, which come last
    assert len({signature[:-2] for signature in batch_norm_small._forward.signatures}) == 1
    assert_same_bits(y[:1], y[1:])
