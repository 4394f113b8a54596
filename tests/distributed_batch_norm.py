"""Batch normalisation among processes: checks that every process of a group runs."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_kit import Rank, check, normal, refuses, same
from torch import nn


def batches(rank: Rank, sizes: list[int], channels_last: bool, dtype: torch.dtype) -> tuple[torch.Tensor, slice]:
    """The batch of all processes, and this one's part of it."""
    x = 3 * normal(sum(sizes), 3, 2, 4, dtype=dtype) + 5
    start = sum(sizes[: rank.rank])
    return x.to(memory_format=torch.channels_last) if channels_last else x, slice(start, start + sizes[rank.rank])


def batch_norm_of_all(rank: Rank, sizes: list[int], dtype: torch.dtype = torch.float64, channels_last: bool = False) -> None:
    """Two training steps and an evaluation of our module, against PyTorch's on the batches of all processes at once."""
    import hw3gpu.nn as HN

    theirs, ours = nn.BatchNorm2d(3, momentum=0.3).double(), HN.SyncBatchNorm(3, momentum=0.3)
    with torch.no_grad():
        theirs.weight.copy_(normal(3, seed=1))
        theirs.bias.copy_(normal(3, seed=2))
    ours = ours.to(torch.float64 if dtype == torch.float64 else torch.float32)
    ours.load_state_dict(theirs.state_dict())
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.05}[dtype]
    for step in range(3):
        if step == 2:
            ours.eval()
            theirs.eval()
        x, mine = batches(rank, sizes, channels_last, dtype)
        dy = normal(*x.shape, seed=3 + step).to(dtype)
        whole, part = x.double().requires_grad_(), x[mine].detach().clone().requires_grad_()
        theirs.zero_grad()
        ours.zero_grad()
        expected, y = theirs(whole), ours(part)
        expected.backward(dy.double())
        y.backward(dy[mine])
        assert y.dtype == dtype
        assert y.stride() == part.stride()
        same(y.double(), expected[mine], tolerance, "y")
        same(part.grad.double(), whole.grad[mine], tolerance, "dx")
        for name in ("weight", "bias"):  # ours are this process's own; their sum is the whole batch's
            total = getattr(ours, name).grad.double()
            dist.all_reduce(total)
            same(total, getattr(theirs, name).grad, tolerance * 20, name)
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            same(a.double(), b.double(), 1e-10 if dtype == torch.float64 else 1e-6 if "num" in name else 1e-5, name)


def uneven(rank: Rank) -> list[int]:
    return [3, 1, 4, 2][: rank.size]


@check
def sync_batch_norm_is_that_of_all_batches(rank):
    batch_norm_of_all(rank, uneven(rank))


@check
def sync_batch_norm_of_channels_last(rank):
    batch_norm_of_all(rank, uneven(rank), channels_last=True)


@check
def sync_batch_norm_with_residual_and_relu(rank):
    from hw3gpu.distributed import sync_batch_norm

    for channels_last, with_residual, x_needed in (
        (False, True, True),
        (True, True, True),
        (False, False, True),
        (False, True, False),
    ):
        x, mine = batches(rank, uneven(rank), channels_last, torch.float64)
        r, dy, weight, bias = normal(*x.shape, seed=8), normal(*x.shape, seed=9), normal(3, seed=1), normal(3, seed=2)
        x, r, weight, bias = (v.requires_grad_() for v in (x, r, weight, bias))
        part, part_r = (v[mine].detach().clone().requires_grad_() for v in (x, r))
        part.requires_grad_(x_needed)
        own, own_bias = (v.detach().clone().requires_grad_() for v in (weight, bias))
        residual = {"residual": part_r} if with_residual else {}
        y = sync_batch_norm(part, None, None, own, own_bias, training=True, activation="relu", **residual)
        y.backward(dy[mine])
        normed = F.batch_norm(x, None, None, weight, bias, training=True)
        expected = (normed + r if with_residual else normed).relu()
        expected.backward(dy)
        same(y, expected[mine], 1e-10, "y")
        if x_needed:
            same(part.grad, x.grad[mine], 1e-10, "dx")
        if with_residual:
            same(part_r.grad, r.grad[mine], 1e-10, "dresidual")
        for ours, theirs in ((own, weight), (own_bias, bias)):
            dist.all_reduce(ours.grad)
            same(ours.grad, theirs.grad, 1e-9, "dgamma, dbeta")


@check
def sync_batch_norm_of_the_positions_that_count(rank):
    """Counts are those of the masks: one process has none, another no mask at all."""
    from hw3gpu.distributed import sync_batch_norm

    x, mine = batches(rank, [3, 2, 4, 2][: rank.size], False, torch.float64)
    counts = torch.rand(x.shape[0], 2, 4, generator=torch.Generator().manual_seed(4)) < 0.6
    counts[3:5] = False  # all of process 1
    counts[5:9] = True  # of process 2
    x = torch.where(counts[:, None], x, torch.nan)
    r, dy, weight, bias = normal(*x.shape, seed=8), normal(*x.shape, seed=9), normal(3, seed=1), normal(3, seed=2)
    x, r, weight, bias = (v.requires_grad_() for v in (x, r, weight, bias))
    part, part_r = (v[mine].detach().clone().requires_grad_() for v in (x, r))
    own, own_bias = (v.detach().clone().requires_grad_() for v in (weight, bias))
    running, expected_running = (
        [torch.zeros(3).double(), torch.ones(3).double()],
        [torch.zeros(3).double(), torch.ones(3).double()],
    )
    mask = None if rank.rank == 2 else counts[mine]
    y = sync_batch_norm(part, *running, own, own_bias, training=True, residual=part_r, activation="relu", mask=mask)
    y.backward(dy[mine])
    values = x.movedim(1, -1)[counts]  # as rows, those that count alone
    expected = (F.batch_norm(values, *expected_running, weight, bias, training=True) + r.movedim(1, -1)[counts]).relu()
    expected.backward(dy.movedim(1, -1)[counts])
    whole = torch.zeros_like(x).movedim(1, -1)
    whole[counts] = expected.detach()
    same(y, whole.movedim(-1, 1)[mine], 1e-10, "y")
    same(part.grad, x.grad[mine], 1e-10, "dx")
    same(part_r.grad, r.grad[mine], 1e-10, "dresidual")
    for ours, theirs in zip(running, expected_running, strict=True):
        same(ours, theirs, 1e-10, "running")
    for ours, theirs in ((own, weight), (own_bias, bias)):
        dist.all_reduce(ours.grad)
        same(ours.grad, theirs.grad, 1e-9, "dgamma, dbeta")


@check
def sync_batch_norm_of_other_dtypes(rank):
    for dtype in (torch.float32, torch.bfloat16):
        batch_norm_of_all(rank, uneven(rank), dtype)


@check
def sync_batch_norm_of_a_process_without_samples(rank):
    batch_norm_of_all(rank, [0, 3, 2, 0][: rank.size])


@check
def sync_batch_norm_of_one_value_a_process(rank):
    """One value per channel is none of a process's own, but several of all processes'."""
    from hw3gpu.distributed import sync_batch_norm

    x = normal(rank.size, 3)
    y = sync_batch_norm(x[rank.rank : rank.rank + 1], None, None, training=True)
    same(y, F.batch_norm(x, None, None, training=True)[rank.rank : rank.rank + 1])


@check
def sync_batch_norm_of_no_samples_at_all(rank):
    from hw3gpu.distributed import sync_batch_norm

    mean, var = torch.ones(3), torch.ones(3)
    assert sync_batch_norm(torch.zeros(0, 3), mean, var, training=True).shape == (0, 3)
    assert (mean == 1).all()
    assert (var == 1).all()


@check
def sync_batch_norm_far_from_zero(rank):
    """A mean of 1e4 with a spread of 1, in float32: squares would lose the variance."""
    from hw3gpu.distributed import sync_batch_norm

    x = (1e4 * (1 + 0.01 * torch.arange(3.0).view(3, 1)) + normal(6 * rank.size, 3, 5)).float()
    mine = slice(6 * rank.rank, 6 * rank.rank + 6)
    y = sync_batch_norm(x[mine], None, None, training=True)
    same(y.double(), F.batch_norm(x.double(), None, None, training=True)[mine], 2e-6)


@check
def sync_batch_norm_gives_every_process_the_same_bits(rank):
    from hw3gpu.distributed import sync_batch_norm

    mean, var = torch.zeros(3), torch.ones(3)
    sync_batch_norm(normal(2 + rank.rank, 3, 5, seed=rank.rank, dtype=torch.float32), mean, var, training=True)
    mine = torch.cat([mean, var])
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first)


@check
def sync_batch_norm_in_a_smaller_group(rank):
    import hw3gpu.nn as HN

    group = dist.new_group([0, 1])
    if rank.rank < 2:
        module = HN.SyncBatchNorm(3, process_group=group).double()
        x = normal(6, 3)
        same(module(x[3 * rank.rank : 3 * rank.rank + 3]), F.batch_norm(x, None, None, training=True)[3 * rank.rank :][:3])
    dist.barrier()
    alone = [dist.new_group([r]) for r in range(rank.size)][rank.rank]
    x = normal(4, 3, seed=rank.rank)
    same(HN.SyncBatchNorm(3, process_group=alone).double()(x), F.batch_norm(x, None, None, training=True))
    refuses(ValueError, "more than 1 value per channel", lambda: HN.SyncBatchNorm(3, process_group=alone)(torch.ones(1, 3)))


@check
def sync_batch_norm_takes_cumulative_averages(rank):
    import hw3gpu.nn as HN

    ours, theirs = HN.SyncBatchNorm(3, momentum=None).double(), nn.BatchNorm1d(3, momentum=None).double()
    for seed in range(3):
        x = normal(3 * rank.size, 3, seed=seed)
        ours(x[rank.rank :: rank.size])
        theirs(x)
    same(ours.running_mean, theirs.running_mean)
    same(ours.running_var, theirs.running_var)


@check
def sync_batch_norm_refuses_what_it_cannot_do(rank):
    import hw3gpu.nn as HN
    from hw3gpu.distributed import sync_batch_norm

    x = normal(3, 3).requires_grad_()
    dx = torch.autograd.grad(sync_batch_norm(x, None, None, training=True).pow(2).sum(), x, create_graph=True)[0]
    refuses(RuntimeError, "sync_batch_norm: a second derivative", lambda: dx.sum().backward())
    refuses(
        RuntimeError, "torch.func", lambda: torch.func.vmap(lambda x: sync_batch_norm(x, None, None, training=True))(x[None])
    )
    refuses(ValueError, "weight: expected shape", lambda: sync_batch_norm(x, None, None, torch.ones(2).double(), training=True))
    module = HN.SyncBatchNormAct(3).double()
    refuses(RuntimeError, "export the model in evaluation", lambda: torch.export.export(module, (x.detach(),)))
    torch.export.export(module.eval(), (x.detach(),))


@check
def sync_batch_norm_of_infinities_is_torchs(rank):
    """One channel with an infinity, one with both; and the modules with a ReLU."""
    import hw3gpu.nn as HN

    ours, theirs = HN.SyncBatchNormAct(3), nn.BatchNorm1d(3).double()
    x = normal(2 * rank.size, 3).float()
    same(ours(x[2 * rank.rank :][:2]).double(), theirs(x.double()).relu()[2 * rank.rank :][:2], 1e-5)
    x[0, 0] = x[1, 1] = torch.inf
    x[-1, 1] = -torch.inf
    y, expected = ours(x[2 * rank.rank :][:2]), theirs(x.double()).relu()[2 * rank.rank :][:2]
    for a, b in ((y, expected), (ours.running_mean, theirs.running_mean), (ours.running_var, theirs.running_var)):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5, equal_nan=True)


@check
def sync_batch_norm_compiles_without_a_break(rank):
    import hw3gpu.nn as HN

    torch.manual_seed(0)
    eager = nn.Sequential(nn.Conv2d(3, 4, 3), HN.SyncBatchNorm(4), nn.ReLU(), HN.SyncBatchNorm(4, momentum=None)).double()
    compiled = copy.deepcopy(eager)
    runs = [eager, torch.compile(compiled, fullgraph=True, backend="aot_eager")]
    results = []
    for run, module in zip(runs, (eager, compiled), strict=True):
        x = normal(2 + rank.rank, 3, 5, 5, seed=rank.rank).requires_grad_()
        y = run(x)
        y.pow(3).sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for a, b in zip(*results, strict=True):
        same(a, b, 1e-9)
