"""Cross entropy over divided classes: checks that every process of a group runs."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_kit import Rank, check, normal, refuses, same

import hw3gpu.functional as HF


def shards(rank: Rank, V: int) -> list[int]:
    """Uneven sizes of the shards of V classes, one of them empty where there are several."""
    cuts = {2: [V // 3, V - V // 3], 4: [V // 2, 0, 1, V - V // 2 - 1]}[rank.size]
    assert sum(cuts) == V
    return cuts


def cross_entropy_of_all(
    rank: Rank, shape, dtype=torch.float64, scale=3.0, weighted=False, start=False, extra=(0.0, None), **options
):
    """Loss and gradient of our shard against `F.cross_entropy` of all classes, in float64."""
    from hw3gpu.distributed import vocab_parallel_cross_entropy

    V = shape[min(1, len(shape) - 1)]
    axis = min(1, len(shape) - 1)
    z = (scale * normal(*shape)).to(dtype)
    generator = torch.Generator().manual_seed(7)
    target = torch.randint(V, [n for i, n in enumerate(shape) if i != axis], generator=generator)
    if target.dim():
        target.view(-1)[:1] = options.get("ignore_index", -100)
    sizes = shards(rank, V)
    first = sum(sizes[: rank.rank])
    mine = slice(first, first + sizes[rank.rank])
    weight = normal(V, seed=5).square() + 0.1 if weighted else None
    part = z.narrow(axis, first, sizes[rank.rank]).detach().clone().requires_grad_()
    z_loss, softcap = extra
    loss, stats = vocab_parallel_cross_entropy(
        part, target, weight=None if weight is None else weight[mine], z_loss=z_loss, softcap=softcap,
        vocab_start=first if start else None, return_stats=True, **options,
    )  # fmt: skip
    assert loss.dtype == dtype
    whole = z.double().requires_grad_()
    logit_scale = options.pop("logit_scale", 1.0)
    capped = logit_scale * whole
    capped = capped if softcap is None else softcap * (capped / softcap).tanh()
    expected = F.cross_entropy(capped, target, weight, **options)
    if z_loss:
        rows = F.cross_entropy(capped, target, weight, **options | {"reduction": "none"})
        more = z_loss * capped.logsumexp(axis).square() * (target != options.get("ignore_index", -100))
        counted = (target != options.get("ignore_index", -100)).sum() if weight is None else None
        expected = {"none": rows + more, "sum": (rows + more).sum(), "mean": (rows + more).sum() / (counted or 1)}[
            options.get("reduction", "mean")
        ]
    of_all = HF.cross_entropy(
        whole.detach(), target, weight, softcap=softcap, logit_scale=logit_scale, return_stats=True, **options
    )[1]
    for name, ours, theirs in zip(stats._fields, stats, of_all, strict=True):
        same(ours.double(), theirs.double(), {torch.bfloat16: 1e-4}.get(dtype, 1e-5), name)
    upstream = normal(*expected.shape, seed=9).abs() + 0.5
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    (dpart,) = torch.autograd.grad(loss, part, upstream.to(dtype))
    (dwhole,) = torch.autograd.grad(expected, whole, upstream.to(dtype).double())
    same(loss.double(), expected, tolerance, "loss")
    same(dpart.double(), dwhole.narrow(axis, first, sizes[rank.rank]), tolerance, "gradient")
    assert torch.equal(z.narrow(axis, first, sizes[rank.rank]), part)


@check
def vocab_parallel_cross_entropy_whose_statistics_have_gradients(rank):
    """And with weights of rows, a normaliser and a dtype of the loss, against the same of all classes in one process."""
    from hw3gpu.distributed import vocab_parallel_cross_entropy

    rows = normal(5, 3, seed=12).square()
    for extra in (
        {"reduction": "none", "softcap": 2.0, "logit_scale": 1.3}, {"normalizer": torch.tensor(3.0), "label_smoothing": 0.1},
        {"token_weight": rows, "z_loss": 0.1}, {"token_weight": rows, "normalizer": 3.0, "loss_dtype": torch.float32},
        {"ignore_index": 3, "reduction": "sum"},
    ):  # fmt: skip
        for differentiable in (False, True):
            z, target = 3 * normal(5, 11, 3), torch.randint(11, (5, 3), generator=torch.Generator().manual_seed(7))
            sizes, given = shards(rank, 11), {**extra, "return_stats": True, "differentiable": differentiable}
            first = sum(sizes[: rank.rank])
            mine = slice(first, first + sizes[rank.rank])
            part, whole = z[:, mine].clone().requires_grad_(), z.clone().requires_grad_()
            found = vocab_parallel_cross_entropy(part, target, **given)
            expected = HF.cross_entropy(whole, target, **given)
            assert found[0].dtype == expected[0].dtype
            for of in (found, expected):
                total = of[0].double().sum()
                if differentiable:
                    total = total + (rows * of[1].entropy + rows.sin() * of[1].log_prob + rows.cos() * of[1].lse).sum()
                total.backward(retain_graph=True)
                if differentiable:
                    of[1].entropy.sum().backward()
            same(found[0].double(), expected[0].double(), 1e-6 if "loss_dtype" in extra else 1e-10, "loss")
            for name, ours, theirs in zip(found[1]._fields, found[1], expected[1], strict=True):
                same(ours.double(), theirs.double(), 1e-10, name)
            same(part.grad, whole.grad[:, mine], 1e-10, str(given))


@check
def vocab_parallel_token_log_probs_of_every_shape(rank):
    """Of logits and of a product: log_prob, entropy and lse, and the gradients of all three, against those of whole classes."""
    from hw3gpu.distributed import vocab_parallel_linear_token_log_probs, vocab_parallel_token_log_probs

    sizes = shards(rank, 11)
    first = sum(sizes[: rank.rank])
    mine = slice(first, first + sizes[rank.rank])
    for shape, temperature in (((), 1.0), ((5,), 0.7), ((3, 4), 2.5)):
        target = torch.randint(11, shape, generator=torch.Generator().manual_seed(7))
        if shape:
            target[0] = -100
        z = 3 * normal(*shape, 11)
        x, W, b = normal(*shape, 3), normal(11, 3, seed=1), normal(11, seed=2)
        leaves = [v.clone().requires_grad_() for v in (z[..., mine], z, x, W[mine], b[mine], x, W, b)]
        part, whole, ours, theirs = leaves[0], leaves[1], leaves[2:5], leaves[5:]
        given = {"temperature": temperature}
        for found, expected in (
            (
                vocab_parallel_token_log_probs(part, target, vocab_start=first, **given),
                HF.token_log_probs(whole, target, **given),
            ),
            (
                vocab_parallel_linear_token_log_probs(*ours[:2], target, linear_bias=ours[2], chunk_rows=4, **given),
                HF.linear_token_log_probs(*theirs[:2], target, linear_bias=theirs[2], **given),
            ),
        ):
            for name, a, b in zip(found._fields, found, expected, strict=True):
                assert a.shape == target.shape
                same(a, b, 1e-10, name)
            for of in (found, expected):
                (of.log_prob.sin() + of.entropy.square() - 0.5 * of.lse.cos()).sum().backward()
        same(part.grad, whole.grad[..., mine], 1e-10, "logits")
        for name, a, b in zip(("input", "weight", "bias"), ours, theirs, strict=True):
            same(a.grad, b.grad if name == "input" else b.grad[mine], 1e-10, name)


@check
def vocab_parallel_cross_entropy_of_an_ignored_batch_is_zero_where_asked(rank):
    from hw3gpu.distributed import vocab_parallel_cross_entropy

    z = normal(2, 3).requires_grad_()
    loss = vocab_parallel_cross_entropy(z, torch.full((2,), -100), all_ignored="zero")
    loss.backward()
    assert loss == 0
    assert not z.grad.any()


@check
def vocab_parallel_losses_predict_classes_that_float32_cannot_count(rank):
    from hw3gpu.distributed import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy

    V = 2**24
    start, best = (0, V + 3)[rank.rank > 0] + 3 * max(rank.rank - 1, 0), V + 3 + 1
    z = torch.zeros(2, 3)
    z[1, best - start if rank.rank == 1 else 0] = 1.0 + (rank.rank == 1)
    target, given = torch.tensor([1, best]), {"vocab_start": start, "return_stats": True}
    for found in (
        vocab_parallel_cross_entropy(z, target, **given),
        vocab_parallel_linear_cross_entropy(torch.eye(2), z.t().contiguous(), target, **given),
    ):
        assert found[1].predicted.tolist() == [0, best]
        assert found[1].correct.all()
    wide = torch.zeros(1, 1).expand(1, V + 1)
    refuses(ValueError, "return_stats: expected at most 16777216 classes",
            lambda: vocab_parallel_cross_entropy(wide, target[:1], **given))  # fmt: skip
    refuses(ValueError, "return_stats: expected at most 16777216 classes",
            lambda: vocab_parallel_linear_cross_entropy(z[:, :1], wide.t(), target, **given))  # fmt: skip


@check
def vocab_parallel_cross_entropy_of_every_shape(rank):
    for shape in ((11,), (5, 11), (3, 11, 4), (2, 11, 2, 3)):
        cross_entropy_of_all(rank, shape)


@check
def vocab_parallel_cross_entropy_with_every_option(rank):
    for reduction in ("none", "sum", "mean"):
        cross_entropy_of_all(rank, (5, 11), reduction=reduction, start=True)
        cross_entropy_of_all(rank, (5, 11), reduction=reduction, weighted=True, ignore_index=3)
    cross_entropy_of_all(rank, (5, 11), label_smoothing=0.2)
    cross_entropy_of_all(rank, (3, 11, 4), label_smoothing=0.3, weighted=True, reduction="sum", start=True)
    cross_entropy_of_all(rank, (3, 11), label_smoothing=1.0)


@check
def vocab_parallel_cross_entropy_with_z_loss(rank):
    for reduction in ("none", "sum", "mean"):
        cross_entropy_of_all(rank, (5, 11), extra=(0.1, None), reduction=reduction)
    cross_entropy_of_all(rank, (5, 11), extra=(0.1, None), label_smoothing=0.1)


@check
def vocab_parallel_cross_entropy_with_a_softcap(rank):
    for reduction in ("none", "mean"):
        cross_entropy_of_all(rank, (5, 11), extra=(0.0, 2.0), reduction=reduction)
    cross_entropy_of_all(rank, (3, 11, 4), scale=30.0, extra=(0.1, 5.0), label_smoothing=0.1, reduction="sum")
    cross_entropy_of_all(rank, (5, 11), extra=(0.1, 2.0), logit_scale=0.3)
    cross_entropy_of_all(rank, (3, 11, 4), extra=(0.0, None), logit_scale=1.7, label_smoothing=0.1)
    cross_entropy_of_all(rank, (5, 11), extra=(0.0, 2.0), weighted=True)


@check
def vocab_parallel_cross_entropy_of_other_dtypes(rank):
    for dtype in (torch.float32, torch.bfloat16):
        cross_entropy_of_all(rank, (5, 40), dtype)
        cross_entropy_of_all(rank, (5, 40), dtype, label_smoothing=0.1)


@check
def vocab_parallel_cross_entropy_keeps_the_digits_where_p_is_near_1(rank):
    """dz at the target is p - 1, of 1e-7 here, and lse near 1e4 has lost the digits of p."""
    from hw3gpu.distributed import vocab_parallel_cross_entropy

    sizes = shards(rank, 11)
    first = sum(sizes[: rank.rank])
    z = torch.full((4, 11), 1e4)
    target = torch.tensor([0, 3, 8, 10])
    z[torch.arange(4), target] += 16
    part = z[:, first : first + sizes[rank.rank]].clone().requires_grad_()
    vocab_parallel_cross_entropy(part, target, reduction="sum").backward()
    whole = z.double().requires_grad_()
    F.cross_entropy(whole, target, reduction="sum").backward()
    same(part.grad.double(), whole.grad[:, first : first + sizes[rank.rank]], 1e-12)
    torch.testing.assert_close(part.grad.double(), whole.grad[:, first : first + sizes[rank.rank]], rtol=1e-5, atol=0)


@check
def vocab_parallel_cross_entropy_of_infinite_logits(rank):
    """A shard of -inf alone, as of padded classes, and rows that begin with -inf."""
    from hw3gpu.distributed import vocab_parallel_cross_entropy

    V = 4 * rank.size
    z = normal(5, V)
    z[:, 4:8] = -torch.inf
    z[1, :4] = -torch.inf
    if rank.size == 2:
        z[1, 0] = 0.5
    target = torch.full((5,), V - 1 if rank.size > 2 else 0)
    part = z[:, 4 * rank.rank : 4 * rank.rank + 4].clone().requires_grad_()
    whole = z.clone().requires_grad_()
    loss, expected = vocab_parallel_cross_entropy(part, target), F.cross_entropy(whole, target)
    same(loss, expected)
    loss.backward()
    expected.backward()
    same(part.grad, whole.grad[:, 4 * rank.rank : 4 * rank.rank + 4])


@check
def vocab_parallel_cross_entropy_is_the_same_everywhere_and_every_time(rank):
    from hw3gpu.distributed import vocab_parallel_cross_entropy

    z, target = normal(33, 7, seed=rank.rank, dtype=torch.float32), torch.arange(33) % (7 * rank.size)
    losses = [vocab_parallel_cross_entropy(z, target, label_smoothing=0.1) for _ in range(2)]
    first = losses[0].clone()
    dist.broadcast(first, 0)
    assert all(torch.equal(loss, first) for loss in losses)


@check
def vocab_parallel_cross_entropy_of_nothing(rank):
    """No row, and no row that counts: PyTorch's NaN for a mean, and no gradient."""
    from hw3gpu.distributed import vocab_parallel_cross_entropy

    empty = torch.zeros(0, 3, requires_grad=True)
    loss = vocab_parallel_cross_entropy(empty, torch.zeros(0, dtype=torch.int64))
    assert loss.isnan()
    loss.backward()
    assert empty.grad.shape == (0, 3)
    z = normal(2, 3).requires_grad_()
    loss = vocab_parallel_cross_entropy(z, torch.full((2,), -100))
    assert loss.isnan()
    vocab_parallel_cross_entropy(z, torch.full((2,), -100), reduction="sum").backward()
    assert not z.grad.any()


@check
def vocab_parallel_cross_entropy_refuses_bad_input(rank):
    from hw3gpu import distributed
    from hw3gpu.distributed import vocab_parallel_cross_entropy as loss

    z, t = torch.zeros(2, 3), torch.tensor([0, 3 * rank.size])
    refuses(IndexError, f"got {3 * rank.size} in row 1", lambda: loss(z, t))
    refuses(IndexError, "got -1 in row 0", lambda: loss(z, torch.tensor([-1, 0])))
    t = torch.tensor([0, 1])
    refuses(TypeError, "target: expected integer classes", lambda: loss(z, z))
    refuses(TypeError, "logits_shard: expected a torch.Tensor", lambda: loss([1.0], t))
    refuses(ValueError, "target: expected shape (2,)", lambda: loss(z, torch.tensor([0])))
    refuses(ValueError, "weight: expected shape (3,)", lambda: loss(z, t, weight=torch.ones(4)))
    refuses(ValueError, "reduction", lambda: loss(z, t, reduction="average"))
    refuses(ValueError, "label_smoothing", lambda: loss(z, t, label_smoothing=2.0))
    refuses(ValueError, "softcap", lambda: loss(z, t, softcap=0.0))
    refuses(ValueError, "vocab_start", lambda: loss(z, t, vocab_start=-1))
    refuses(ValueError, "all_ignored", lambda: loss(z, t, all_ignored="one"))
    refuses(ValueError, "token_weight: expected shape (2,)", lambda: loss(z, t, token_weight=torch.ones(3)))
    refuses(ValueError, "normalizer", lambda: loss(z, t, normalizer=-1.0))
    refuses(TypeError, "loss_dtype", lambda: loss(z, t, loss_dtype=torch.int64))
    refuses(ValueError, "temperature", lambda: distributed.vocab_parallel_token_log_probs(z, t, temperature=0.0))
    assert not distributed.vocab_parallel_token_log_probs(z, t, temperature=1e30).lse.isnan().any()
    refuses(ValueError, "target: expected shape", lambda: distributed.vocab_parallel_token_log_probs(z[None], t))
    refuses(TypeError, "logits_shard", lambda: distributed.vocab_parallel_token_log_probs(None, t))
    of = distributed.vocab_parallel_linear_token_log_probs
    refuses(ValueError, "temperature", lambda: of(z, z, t, temperature=float("nan")))
    refuses(ValueError, "differentiable: expected return_stats=True", lambda: loss(z, t, differentiable=True))
    x = z.requires_grad_()
    dx = torch.autograd.grad(loss(x, t), x, create_graph=True)[0]
    refuses(RuntimeError, "a second derivative", lambda: dx.sum().backward())


@check
def vocab_parallel_cross_entropy_compiles_without_a_break(rank):
    from hw3gpu.distributed import vocab_parallel_cross_entropy

    z, target = normal(5, 3 + rank.rank, seed=rank.rank), torch.tensor([0, 1, 2, 3, 4])
    results = []
    for decorate in (lambda f: f, torch.compile(fullgraph=True, backend="aot_eager")):
        leaf = z.clone().requires_grad_()
        loss = decorate(lambda z, t: vocab_parallel_cross_entropy(z, t, label_smoothing=0.1))(leaf, target)
        loss.backward()
        results.append((loss, leaf.grad))
    for a, b in zip(*results, strict=True):
        same(a, b)
