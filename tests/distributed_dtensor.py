"""DTensors and FSDP2: checks that every process of a group runs, against whole tensors in one process."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_kit import Rank, check, normal, refuses, same
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import hw3gpu.functional as HF


def mesh_of(rank: Rank):
    return dist.init_device_mesh("cpu", (rank.size,))


def divided(x, mesh, placement, grad=True):
    """x as a DTensor; PyTorch divides it as torch.chunk does, unevenly and with nothing for the last processes."""
    return distribute_tensor(x, mesh, placement if isinstance(placement, list) else [placement]).requires_grad_(grad)


def alike(function, whole, theirs, tolerance=1e-10):
    """The results and the gradients of `function` for DTensors and for whole tensors; the results of DTensors."""
    leaves = [v.detach().clone().requires_grad_(v.requires_grad) for v in whole]
    ours, expected = function(*theirs), function(*leaves)
    ours, expected = (v if isinstance(v, tuple) else (v,) for v in (ours, expected))
    for found, of_whole in zip(ours, expected, strict=True):
        assert isinstance(found, DTensor)
        same(found.full_tensor().double(), of_whole.double(), tolerance, "result")
    for sums in (ours, expected):
        sum((v * (k + 1.5)).sum() for k, v in enumerate(sums) if v.is_floating_point() and v.requires_grad).backward()
    for found, of_whole in zip(theirs, leaves, strict=True):
        if of_whole.requires_grad:
            same(found.grad.full_tensor(), of_whole.grad, tolerance, "gradient")
    return ours


@check
def rows_of_dtensors_stay_where_they_are(rank):
    """Softmax, log-probabilities, distillation and cross entropy of divided rows: no collective but those of the reduction."""
    mesh, z, t = mesh_of(rank), normal(5, 4, 7), torch.arange(20).view(5, 4) % 7
    teacher = normal(5, 4, 7, seed=1)
    for d in (0, 1)[: 4 // rank.size]:
        of_rows = Shard(d)
        logits, target = divided(z, mesh, of_rows), divided(t, mesh, of_rows, False)
        whole = z.clone().requires_grad_()
        (y,) = alike(lambda z: HF.softmax(z, -1), [whole], [logits])
        assert y.placements == (of_rows,)
        log_probs = alike(
            lambda z, t: tuple(HF.token_log_probs(z, t, temperature=0.7)), [whole, t], [divided(z, mesh, of_rows), target]
        )
        assert {v.placements for v in log_probs} == {(of_rows,)}
        (rows,) = alike(
            lambda s, u: HF.distillation_loss(s, u, kind="jensen_shannon", reduction="none"),
            [whole, teacher], [divided(z, mesh, of_rows), divided(teacher, mesh, of_rows, False)],
        )  # fmt: skip
        assert rows.placements == (of_rows,)


@check
def cross_entropy_of_dtensors_whose_rows_are_divided(rank):
    mesh, z, t = mesh_of(rank), normal(6, 7, 3), torch.arange(18).view(6, 3) % 7
    t[0, 0] = -100
    weight, tokens = normal(7, seed=2).square() + 0.1, normal(6, 3, seed=4).square()
    for reduction in ("none", "sum", "mean"):
        for extra in ({}, {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0}):
            (loss,) = alike(
                lambda z, t, reduction=reduction, extra=extra: HF.cross_entropy(z, t, weight, reduction=reduction, **extra),
                [z.clone().requires_grad_(), t], [divided(z, mesh, Shard(0)), divided(t, mesh, Shard(0), False)],
            )  # fmt: skip
            if reduction == "none":
                assert loss.placements == (Shard(0),)
    logits, target = divided(z, mesh, Shard(0)), divided(t, mesh, Shard(0), False)
    ones = divided(torch.ones(6, 3).double(), mesh, Shard(0), False)
    from torch.distributed.tensor.debug import CommDebugMode  # imports Triton

    with CommDebugMode() as collectives:
        rows = HF.cross_entropy(logits, target, reduction="none")
        rows.backward(ones)
    assert collectives.get_total_counts() == 0
    y = normal(6, 7, 3, seed=3).softmax(1)
    alike(
        lambda z, y: HF.cross_entropy(z, y), [z.clone().requires_grad_(), y],
        [divided(z, mesh, Shard(2)), divided(y, mesh, Shard(2), False)],
    )  # fmt: skip
    loss = HF.cross_entropy(
        divided(z, mesh, Shard(0)), t, token_weight=tokens, normalizer=3.0
    )  # a plain target is the whole one
    same(loss.full_tensor(), HF.cross_entropy(z, t, token_weight=tokens, normalizer=3.0))
    loss, stats = HF.cross_entropy(divided(z, mesh, Shard(0)), t, return_stats=True)
    expected = HF.cross_entropy(z, t, return_stats=True)[1]
    for ours, theirs in zip(stats, expected, strict=True):
        assert ours.placements == (Shard(0),)
        assert torch.equal(ours.full_tensor(), theirs)
    refuses(RuntimeError, "statistics of cross entropy", lambda: stats.entropy.sum().backward())


@check
def cross_entropy_of_dtensors_whose_classes_are_divided(rank):
    """And, in a mesh of two axes, rows along the other one."""
    shapes = [((rank.size,), [Shard(1)])]
    if rank.size == 4:
        shapes += [((2, 2), [Shard(0), Shard(1)]), ((2, 2), [Shard(1), Shard(2)]), ((2, 2), [Replicate(), Shard(1)])]
    z, t = normal(5, 7, 2), torch.arange(10).view(5, 2) % 7
    t[0, 0] = -100
    weight = normal(7, seed=2).square() + 0.1
    for shape, placements in shapes:
        mesh = dist.init_device_mesh("cpu", shape)
        for reduction in ("none", "mean"):
            options = {"label_smoothing": 0.1, "z_loss": 0.1, "reduction": reduction}
            alike(
                lambda z, t, options=options: HF.cross_entropy(z, t, weight, **options), [z.clone().requires_grad_(), t],
                [divided(z, mesh, placements), divided(t, mesh, [Replicate()] * len(shape), False)],
            )  # fmt: skip
        stats = HF.cross_entropy(divided(z, mesh, placements), t, return_stats=True)[1]
        for ours, theirs in zip(stats, HF.cross_entropy(z, t, return_stats=True)[1], strict=True):
            same(ours.full_tensor().double(), theirs.double())
        given = divided(z, mesh, placements), divided(t, mesh, [Replicate()] * len(shape), False)
        whole = [z.clone().requires_grad_(), t]
        alike(lambda z, t: _with_statistics(HF.cross_entropy(z, t, softcap=2.0, **WITH_STATISTICS)), whole, given)
        given = divided(z, mesh, placements), divided(t, mesh, [Replicate()] * len(shape), False)
        alike(lambda z, t: tuple(HF.token_log_probs(z, t, temperature=0.7, dim=1)), [z.clone().requires_grad_(), t], given)
    last = divided(z.movedim(1, 2).contiguous(), mesh_of(rank), Shard(2))  # (N, T, V), as language models have them
    alike(
        lambda z: tuple(HF.token_log_probs(z, t)), [z.movedim(1, 2).clone().requires_grad_()], [last]
    )  # a plain target is the whole one
    refuses(IndexError, "got 7 in row", lambda: HF.cross_entropy(divided(z, mesh, placements), t.clone().fill_(7)))
    refuses(TypeError, "target: expected integer classes", lambda: HF.cross_entropy(divided(z, mesh, placements), z.softmax(1)))


WITH_STATISTICS = {"return_stats": True, "differentiable": True}


def _with_statistics(found):
    """The loss, and those statistics that have gradients."""
    loss, stats = found
    return loss, stats.log_prob, stats.entropy, stats.lse


@check
def linear_losses_of_dtensors(rank):
    mesh, x, W, b = mesh_of(rank), normal(6, 3), normal(7, 3, seed=1), normal(7, seed=2)
    t, weight = torch.tensor([0, 6, -100, 3, 1, 2]), normal(7, seed=5).square() + 0.1
    cases = [(mesh, [Shard(0)], [Replicate()])]
    if rank.size == 2:
        cases += [(mesh, [Replicate()], [Shard(0)]), (mesh, [Shard(0)], [Shard(0)])]
    else:
        cases += [(dist.init_device_mesh("cpu", (2, 2)), [Shard(0), Replicate()], [Replicate(), Shard(0)])]
    for mesh, of_x, of_W in cases:
        for reduction in ("none", "mean"):
            options = {"label_smoothing": 0.1, "softcap": 3.0, "chunk_rows": 2, "reduction": reduction}
            alike(
                lambda x, W, b, t, o=options: HF.linear_cross_entropy(x, W, t, linear_bias=b, weight=weight, **o),
                [x.clone().requires_grad_(), W.clone().requires_grad_(), b.clone().requires_grad_(), t],
                [divided(x, mesh, of_x), divided(W, mesh, of_W), divided(b, mesh, of_W), divided(t, mesh, of_x, False)],
            )  # fmt: skip
        stats = HF.linear_cross_entropy(divided(x, mesh, of_x), divided(W, mesh, of_W), t, return_stats=True)[1]
        for ours, theirs in zip(stats, HF.linear_cross_entropy(x, W, t, return_stats=True)[1], strict=True):
            same(ours.full_tensor().double(), theirs.double())
        leaves = [v.clone().requires_grad_() for v in (x, W)]
        given = [divided(x, mesh, of_x), divided(W, mesh, of_W)]
        alike(lambda x, W: tuple(HF.linear_token_log_probs(x, W, t, temperature=0.7, chunk_rows=4)), leaves, given)
        given = [divided(x, mesh, of_x), divided(W, mesh, of_W)]
        alike(lambda x, W: _with_statistics(HF.linear_cross_entropy(x, W, t, **WITH_STATISTICS)), leaves, given)
    mesh, of_x, of_W = cases[0]
    leaves = [v.clone().requires_grad_() for v in (x, W)]
    given = [divided(x, mesh, of_x), divided(W, mesh, of_W)]
    alike(lambda x, W: HF.linear_distillation_loss(x, W, *((x.detach() * 2, W.detach()))), leaves, given)


@check
def a_dtensor_that_cannot_be_handled_has_one_message(rank):
    """What FSDP2 holds between forward passes, divided classes where there is no parallel function, and other functions."""
    from hw3gpu import distributed

    mesh, t = mesh_of(rank), torch.arange(4)
    x, W = normal(4, 3), normal(8, 3, seed=1)
    head, logits = divided(W, mesh, Shard(0)), divided(normal(4, 8), mesh, Shard(1))
    batch = divided(normal(4, 3), mesh, Shard(0))
    two = dist.init_device_mesh("cpu", (2, rank.size // 2))  # both axes divide the classes
    ways_out = "full_tensor()", "fully_shard", "vocab_parallel_cross_entropy"
    calls = {
        "linear_weight": [
            lambda: HF.linear_cross_entropy(x, head, t),
            lambda: HF.linear_token_log_probs(x, head, t),
            lambda: distributed.vocab_parallel_linear_cross_entropy(x, head, t),
        ],
        "logits": [lambda: HF.token_log_probs(divided(normal(4, 8), two, [Shard(1), Shard(1)]), t)],
        "student": [lambda: HF.distillation_loss(logits, normal(4, 8))],
        "student_weight": [lambda: HF.linear_distillation_loss(divided(x, mesh, Replicate()), head, x, W)],
        "target": [lambda: HF.cross_entropy(x, divided(t, mesh, Shard(0), False))],
        "weight": [lambda: HF.batch_norm(x, None, None, divided(torch.ones(3).double(), mesh, Shard(0)), training=True)],
        "logits_shard": [lambda: distributed.vocab_parallel_cross_entropy(logits, t)],
        "input": [
            lambda: HF.batch_norm(batch, None, None, training=True),
            lambda: distributed.sync_batch_norm(batch, None, None, training=True),
            lambda: HF.cross_entropy(divided(normal(4, 8), two, [Shard(1), Shard(1)]), t),
        ],
        "covariance": [lambda: HF.minimize_trace(divided(torch.eye(4), mesh, Shard(0)), 2)],
    }
    for name, functions in calls.items():
        for function in functions:
            for says in (f"{name}: expected a tensor of this process, got a DTensor of shape", *ways_out):
                refuses(TypeError, says, function)


class Head(nn.Module):
    """Every module of ours that has parameters or makes a loss of them, as a model would have them."""

    def __init__(self) -> None:
        import hw3gpu.nn as HN

        super().__init__()
        self.line = nn.Linear(4, 6)
        self.norm = HN.BatchNorm1d(6)
        self.loss = HN.LinearCrossEntropyLoss(6, 10, label_smoothing=0.1)
        self.classes = HN.CrossEntropyLoss()

    def forward(self, x, target):
        x = self.norm(self.line(x)).relu()
        return self.loss(x, target) + 0.5 * self.classes(x, target % 6)


@check
def fully_shard_trains_modules_and_losses_as_one_process(rank):
    """Each process sees the same batch, so that its statistics and the mean of gradients are those of one process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    torch.manual_seed(0)
    single = Head().double()
    ours = copy.deepcopy(single)
    mesh = mesh_of(rank)
    for module in (ours.line, ours.norm, ours.loss):
        fully_shard(module, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    x, target = normal(8, 4), torch.arange(8)
    for model in (ours, single):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x, target).backward()
            optimizer.step()
    assert isinstance(ours.loss.linear.weight, DTensor)
    found = get_model_state_dict(ours, options=StateDictOptions(full_state_dict=True))
    for name, expected in single.state_dict().items():
        same(found[name], expected, 1e-10, name)
    refuses(TypeError, "linear_weight: expected a tensor of this process", lambda: HF.linear_cross_entropy(
        normal(8, 6), ours.loss.linear.weight, target
    ))  # fmt: skip


@check
def a_dtensor_compiles_as_it_runs(rank):
    mesh, z, t = mesh_of(rank), normal(4, 7), torch.arange(4)
    results = []
    for decorate in (torch.compile(fullgraph=True, backend="aot_eager"), lambda f: f):
        logits = divided(z, mesh, Shard(0))
        loss = decorate(lambda z, t: HF.cross_entropy(z, t, reduction="sum"))(logits, divided(t, mesh, Shard(0), False))
        loss.backward()
        results.append((loss.full_tensor(), logits.grad.full_tensor()))
    for a, b in zip(*results, strict=True):
        same(a, b)
    same(results[0][0], F.cross_entropy(z, t, reduction="sum"))
