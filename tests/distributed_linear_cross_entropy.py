"""Linear cross entropy over divided classes: checks that every process of a group runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_cross_entropy import shards
from distributed_kit import Rank, check, normal, refuses, same

import hw3gpu.functional as HF
from hw3gpu import reference

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def linear_of_all(
    rank: Rank, rows, V=11, D=5, dtype=torch.float64, bias=True, weighted=False, chunk_rows=3, scale=1.0, start=False,
    tolerance=None, upstream=None, **options,
):  # fmt: skip
    """Loss, statistics and gradients of our classes against `functional.linear_cross_entropy` of all, in one process."""
    from hw3gpu.distributed import vocab_parallel_linear_cross_entropy

    x, W = normal(*rows, D).to(dtype), (scale * normal(V, D, seed=1)).to(dtype)
    b = normal(V, seed=2).to(dtype) if bias else None
    weight = normal(V, seed=5).square() + 0.1 if weighted else None
    target = torch.randint(V, rows, generator=torch.Generator().manual_seed(7))
    if target.dim():
        target.view(-1)[:1] = options.get("ignore_index", -100)
    sizes = shards(rank, V)
    first = sum(sizes[: rank.rank])
    mine = slice(first, first + sizes[rank.rank])

    tokens = options.pop("token_weight", None)
    of_rows = [{} if tokens is None else {"token_weight": tokens.clone().requires_grad_()} for _ in range(2)]
    leaves = [None if v is None else v.clone().requires_grad_() for v in (x, W[mine], None if b is None else b[mine])]
    found = vocab_parallel_linear_cross_entropy(
        *leaves[:2], target, linear_bias=leaves[2], weight=None if weight is None else weight[mine], chunk_rows=chunk_rows,
        vocab_start=first if start else None, return_stats=True, **options, **of_rows[0],
    )  # fmt: skip
    loss, stats = found
    whole = [None if v is None else v.double().requires_grad_() for v in (x, W, b)]
    options.pop("gradient", None)
    expected, of_all = HF.linear_cross_entropy(
        whole[0].reshape(-1, D),
        whole[1],
        target.reshape(-1),
        linear_bias=whole[2],
        weight=weight,
        return_stats=True,
        **options,
        **of_rows[1],
    )
    expected = expected.reshape(loss.shape)
    assert loss.dtype == dtype
    g = normal(*expected.shape, seed=9).abs() + 0.5 if upstream is None else upstream
    if options.get("differentiable"):
        for found in ((loss.double(), stats), (expected, of_all)):
            objective(*found, target, g).backward()
    else:
        loss.backward(torch.as_tensor(g).to(dtype))
        expected.backward(torch.as_tensor(g, dtype=torch.float64))
    tolerance = tolerance or {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}[dtype]
    same(loss.double(), expected, tolerance, "loss")
    for name, ours, theirs in zip(stats._fields, stats, of_all, strict=True):
        assert torch.equal(ours, theirs.view(ours.shape)) if name == "correct" else ours.shape == target.shape, name
        same(ours.double(), theirs.double().view(ours.shape), tolerance, name)
    assert torch.equal(stats.predicted, of_all.predicted.view(target.shape))
    if tokens is not None:
        same(*(of["token_weight"].grad for of in of_rows), tolerance, "token_weight")
    for name, ours, theirs in zip(("input", "weight", "bias"), leaves, whole, strict=True):
        if ours is not None:
            assert ours.grad.dtype == dtype
            theirs = theirs.grad if name == "input" else theirs.grad[mine]
            size = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
            same(ours.grad.double() / size, theirs / size, tolerance, name)


def objective(loss, stats, target, g):
    """Of a loss times g, where that is not 0, and of the statistics that have gradients, each times numbers of its own."""
    weights = normal(3, *target.shape, seed=11).view(3, *stats.lse.shape)
    of_rows = (w * v.double() for w, v in zip(weights, (stats.log_prob, stats.entropy, stats.lse), strict=True))
    g = torch.as_tensor(g, dtype=torch.float64)
    return sum(v.sum() for v in of_rows) + ((g * loss).sum() if g.any() else 0.0)


@check
def vocab_parallel_linear_cross_entropy_whose_statistics_have_gradients(rank):
    """With the loss, and by themselves."""
    tokens = normal(7, seed=8).square()
    for extra in (
        {"weighted": True, "ignore_index": 3, "reduction": "none"}, {"upstream": 0.0, "start": True}, {"token_weight": tokens},
        {"softcap": 2.0, "logit_scale": 1.7, "normalizer": 3.0}, {"logit_scale": 0.3}, {"label_smoothing": 0.2, "z_loss": 0.1},
    ):  # fmt: skip
        linear_of_all(rank, (7,), differentiable=True, **extra)
    linear_of_all(rank, (2, 3), differentiable=True)
    for dtype in (torch.float32, torch.bfloat16):
        linear_of_all(rank, (9,), 40, dtype=dtype, chunk_rows=4, differentiable=True)


@check
def a_transformer_trains_over_divided_classes_to_the_loss_of_pytorchs_formula(rank):
    """The model of `examples/language_model.py`, each process with its rows of the head, with a reward for entropy."""
    from hw3gpu.distributed import vocab_parallel_linear_cross_entropy

    def ours(hidden, head, target):
        loss, stats = vocab_parallel_linear_cross_entropy(
            hidden, head, target, chunk_rows=9, logit_scale=0.7, return_stats=True, differentiable=True
        )
        return loss - 0.1 * stats.entropy.mean()

    def plain(hidden, head, target):
        log_p = (0.7 * hidden @ head.t()).log_softmax(-1)
        return F.nll_loss(log_p.flatten(0, 1), target.flatten()) + 0.1 * (log_p.exp() * log_p).sum(-1).mean()

    sizes, tokens, found = shards(rank, 40), torch.arange(36).view(4, 9) * 7 % 40, []
    first = sum(sizes[: rank.rank])
    for loss_of, rows in ((ours, slice(first, first + sizes[rank.rank])), (plain, slice(None))):
        torch.manual_seed(0)
        net = runpy.run_path(str(EXAMPLES / "language_model.py"))["Model"](40, 8, 16).double()
        net.head.weight = torch.nn.Parameter(net.head.weight.detach()[rows].clone())
        optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.1), []
        for _ in range(5):
            loss = loss_of(net(tokens[:, :-1]), net.head.weight, tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        found.append(torch.stack(losses))
    assert found[0][-1] < found[0][0]
    same(*found)


@check
def vocab_parallel_linear_cross_entropy_of_every_shape(rank):
    for rows, chunk in (((), 1), ((7,), 3), ((7,), None), ((2, 3), 1), ((0,), 2)):
        linear_of_all(rank, rows, chunk_rows=chunk, reduction="sum")
    linear_of_all(rank, (7,), bias=False, start=True)


@check
def vocab_parallel_linear_cross_entropy_with_every_option(rank):
    for reduction in ("none", "sum", "mean"):
        for gradient in ("auto", "backward"):
            linear_of_all(rank, (7,), reduction=reduction, gradient=gradient, weighted=True, ignore_index=3)
        linear_of_all(rank, (7,), reduction=reduction, label_smoothing=0.2, z_loss=0.1, softcap=2.0, weighted=True)
    linear_of_all(rank, (5,), label_smoothing=1.0, scale=20.0, softcap=5.0, start=True)
    linear_of_all(rank, (5,), z_loss=0.1, reduction="sum")


@check
def vocab_parallel_linear_cross_entropy_with_weights_of_rows(rank):
    """A scale of the logits, a normaliser and weights of rows, which have gradients too."""
    tokens = normal(7, seed=8).square()
    tokens[2] = 0
    for reduction in ("none", "sum", "mean"):
        linear_of_all(rank, (7,), reduction=reduction, logit_scale=0.3, softcap=2.0, normalizer=3.0, label_smoothing=0.1)
        for extra in ({}, {"normalizer": torch.tensor(2.0)}, {"weighted": True}):
            linear_of_all(rank, (7,), reduction=reduction, token_weight=tokens, logit_scale=1.7, **extra)


@check
def vocab_parallel_linear_cross_entropy_of_other_dtypes(rank):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        linear_of_all(rank, (9,), 40, dtype=dtype, chunk_rows=4)
        linear_of_all(rank, (9,), 40, dtype=dtype, label_smoothing=0.1, reduction="none")
    # dz of a sum is subnormal in float16, and the loss scale that would save it comes later
    linear_of_all(rank, (9,), 40, dtype=torch.float16, reduction="sum", label_smoothing=0.1, z_loss=1e-3, upstream=1024.0)


@check
def vocab_parallel_linear_cross_entropy_against_the_answer_sheet(rank):
    """By the formula of the derivations, of shards of nothing and of -inf alone among others, with logits near 1e4."""
    from hw3gpu.distributed import vocab_parallel_linear_cross_entropy

    V = 4 * rank.size
    x, W, b = normal(6, 3), normal(V, 3, seed=1), torch.full((V,), 1e4, dtype=torch.float64)
    b[4:8] = -torch.inf
    target = torch.tensor([0, 1, 2, 3, 0, V - 1 if rank.size > 2 else 3])
    mine = slice(4 * rank.rank, 4 * rank.rank + 4)
    leaves = [v.clone().requires_grad_() for v in (x, W[mine], b[mine])]
    loss = vocab_parallel_linear_cross_entropy(
        leaves[0], leaves[1], target, linear_bias=leaves[2], reduction="sum", chunk_rows=2, z_loss=1e-9
    )
    loss.backward()
    expected = reference.vocab_parallel_linear_cross_entropy(
        x,
        [W[4 * r : 4 * r + 4] for r in range(rank.size)],
        target,
        [b[4 * r : 4 * r + 4] for r in range(rank.size)],
        z_loss=1e-9,
    )
    same(loss, torch.tensor(expected.loss.sum()), 1e-9)
    same(leaves[0].grad, torch.from_numpy(expected.dx), 1e-9)
    same(leaves[1].grad, torch.from_numpy(expected.dweights[rank.rank]), 1e-9)
    same(leaves[2].grad, torch.from_numpy(expected.dbiases[rank.rank]), 1e-9)


@check
def vocab_parallel_linear_cross_entropy_is_the_same_everywhere_and_every_time(rank):
    from hw3gpu.distributed import vocab_parallel_linear_cross_entropy

    x, target = normal(33, 6, dtype=torch.float32).requires_grad_(), torch.arange(33) % (7 * rank.size)
    W = normal(7, 6, seed=rank.rank, dtype=torch.float32)
    found = []
    for _ in range(2):
        loss = vocab_parallel_linear_cross_entropy(x, W, target, label_smoothing=0.1, chunk_rows=8)
        found.append((loss.detach(), *torch.autograd.grad(loss, x)))
    for ours in zip(*found, strict=True):
        first = ours[0].clone()
        dist.broadcast(first, 0)
        assert all(torch.equal(v, first) for v in ours)


@check
def vocab_parallel_linear_cross_entropy_sends_one_collective_a_chunk(rank):
    """On its way while the next chunk's logits are made: it is waited for after their product."""
    from hw3gpu._torch import collectives
    from hw3gpu.distributed import vocab_parallel_linear_cross_entropy

    said, gather, product = [], collectives._gather, torch.mm

    class Waited:
        def __init__(self, work):
            self.work = work

        def wait(self):
            said.append("wait")
            self.work.wait()

    def gathering(*args, **options):
        said.append(f"gather {args[1].numel()}")
        return Waited(gather(*args, **options))

    def counted(*args, **options):
        if "out" in options and options["out"].shape[1] == 7:
            said.append("logits")
        return product(*args, **options)

    x, target = normal(6, 3), torch.arange(6)
    collectives._gather, torch.mm = gathering, counted
    try:
        vocab_parallel_linear_cross_entropy(x, normal(7, 3), target, chunk_rows=2, vocab_start=7 * rank.rank)
    finally:
        collectives._gather, torch.mm = gather, product
    assert said == ["logits", "gather 14", "logits", "gather 14", "wait", "logits", "gather 14", "wait", "wait"]


@check
def vocab_parallel_linear_cross_entropy_backward_twice(rank):
    """Also with a gradient that the caller has written into, and with none for `input`."""
    from hw3gpu.distributed import vocab_parallel_linear_cross_entropy

    x, W = normal(5, 3).requires_grad_(), normal(4, 3, seed=rank.rank).requires_grad_()
    loss = vocab_parallel_linear_cross_entropy(x, W, torch.arange(5) % 4, chunk_rows=2)
    first = torch.autograd.grad(loss, (x, W), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    for a, b in zip(torch.autograd.grad(2 * loss, (x, W)), kept, strict=True):
        same(a, 2 * b)
    (dW,) = torch.autograd.grad(vocab_parallel_linear_cross_entropy(x.detach(), W, torch.arange(5) % 4), W)
    same(dW, kept[1])


@check
def vocab_parallel_linear_cross_entropy_of_nothing(rank):
    from hw3gpu.distributed import vocab_parallel_linear_cross_entropy as loss

    x, W, none = normal(2, 3).requires_grad_(), normal(4, 3).requires_grad_(), torch.full((2,), -100)
    assert loss(x, W, none).isnan()
    zero = loss(x, W, none, all_ignored="zero")
    zero.backward()
    assert zero == 0
    assert not x.grad.any()
    assert not W.grad.any()


@check
def vocab_parallel_linear_cross_entropy_refuses_bad_input(rank):
    from hw3gpu.distributed import vocab_parallel_linear_cross_entropy as loss

    x, W, t = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1])
    refuses(IndexError, f"got {4 * rank.size} in row 1", lambda: loss(x, W, torch.tensor([0, 4 * rank.size])))
    refuses(TypeError, "target: expected integer classes", lambda: loss(x, W, torch.zeros(2, 4)))
    refuses(TypeError, "linear_weight: expected a torch.Tensor", lambda: loss(x, [1.0], t))
    refuses(TypeError, "linear_weight: expected the dtype of input, float32", lambda: loss(x, W.double(), t))
    refuses(ValueError, "linear_weight: expected (V_r, D)", lambda: loss(x, W[None], t))
    refuses(ValueError, "linear_weight: expected shape (4, 3)", lambda: loss(x, torch.zeros(4, 2), t))
    refuses(ValueError, "linear_bias: expected shape (4,)", lambda: loss(x, W, t, linear_bias=torch.zeros(3)))
    refuses(ValueError, "weight: expected shape (4,)", lambda: loss(x, W, t, weight=torch.ones(3)))
    refuses(ValueError, "target: expected shape (2,)", lambda: loss(x, W, t[:1]))
    refuses(ValueError, "gradient: expected 'auto' or 'backward'", lambda: loss(x, W, t, gradient="forward", reduction="none"))
    refuses(ValueError, "chunk_rows: expected at least 1", lambda: loss(x, W, t, chunk_rows=0))
    refuses(ValueError, "vocab_start", lambda: loss(x, W, t, vocab_start=-1))
    refuses(TypeError, "group: expected None or a process group", lambda: loss(x, W, t, group="all"))
    refuses(TypeError, "return_stats", lambda: loss(x, W, t, return_stats=1))
    x.requires_grad_()
    refuses(TypeError, "differentiable", lambda: loss(x, W, t, return_stats=True, differentiable=1))
    refuses(ValueError, "differentiable: expected return_stats=True", lambda: loss(x, W, t, differentiable=True))
    refuses(RuntimeError, "statistics of cross entropy", lambda: loss(x, W, t, return_stats=True)[1].entropy.sum().backward())
    dx = torch.autograd.grad(loss(x, W, t), x, create_graph=True)[0]
    refuses(RuntimeError, "a second derivative", lambda: dx.sum().backward())
    refuses(RuntimeError, "do not reach the other processes", lambda: torch.func.grad(lambda x: loss(x, W, t))(x.detach()))


@check
def vocab_parallel_linear_cross_entropy_compiles_without_a_break(rank):
    from hw3gpu.distributed import vocab_parallel_linear_cross_entropy

    x, W, target = normal(5, 3), normal(3 + rank.rank, 3, seed=rank.rank), torch.tensor([0, 1, 2, 3, 4])
    results = []
    for decorate in (lambda f: f, torch.compile(fullgraph=True, backend="aot_eager")):
        leaves = [v.clone().requires_grad_() for v in (x, W)]
        loss = decorate(lambda x, W, t: vocab_parallel_linear_cross_entropy(x, W, t, label_smoothing=0.1))(*leaves, target)
        loss.backward()
        found = decorate(lambda x, W, t: vocab_parallel_linear_cross_entropy(x, W, t, return_stats=True, differentiable=True))(
            *leaves, target
        )
        (found[0] + found[1].entropy.sum()).backward()
        results.append((loss, *found[1], *(v.grad for v in leaves)))
    for a, b in zip(*results, strict=True):
        same(a, b)
