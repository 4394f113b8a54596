"""What each process of a group does in `test_distributed.py`: every check below, in the same order on every process.

A check takes a `Rank` and raises where it finds something wrong; its single-process answer it computes itself, from the same
random numbers. `main` starts the processes and returns, for every check, what each of them had to say ('' for nothing).
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

CHECKS: dict[str, Callable[[Rank], None]] = {}


@dataclass(frozen=True)
class Rank:
    rank: int
    size: int
    backend: str


def check(function: Callable[[Rank], None]) -> Callable[[Rank], None]:
    CHECKS[function.__name__] = function
    return function


def checks_of(size: int) -> tuple[str, ...]:
    """The names of the checks among `size` processes: what compiles is dear, and compiles the same for two and for four."""
    return tuple(name for name in CHECKS if size == 2 or "compiles" not in name)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same(ours: torch.Tensor | None, theirs: torch.Tensor | None, tolerance: float = 1e-10, what: str = "") -> None:
    assert (ours is None) == (theirs is None), what
    if ours is not None:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def refuses(error: type[Exception], message: str, function: Callable[[], object]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        function()


# ---------------------------------------------------------------------------------------------- batch normalisation
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
    from hw3gpu.distributed import sync_batch_norm

    x = normal(3, 3).requires_grad_()
    dx = torch.autograd.grad(sync_batch_norm(x, None, None, training=True).pow(2).sum(), x, create_graph=True)[0]
    refuses(RuntimeError, "sync_batch_norm: a second derivative", lambda: dx.sum().backward())
    refuses(
        RuntimeError, "torch.func", lambda: torch.func.vmap(lambda x: sync_batch_norm(x, None, None, training=True))(x[None])
    )
    refuses(ValueError, "weight: expected shape", lambda: sync_batch_norm(x, None, None, torch.ones(2).double(), training=True))


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


# ---------------------------------------------------------------------------------------------- cross entropy
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
    loss = vocab_parallel_cross_entropy(
        part, target, weight=None if weight is None else weight[mine], z_loss=z_loss, softcap=softcap,
        vocab_start=first if start else None, **options,
    )  # fmt: skip
    assert loss.dtype == dtype
    whole = z.double().requires_grad_()
    capped = whole if softcap is None else softcap * (whole / softcap).tanh()
    expected = F.cross_entropy(capped, target, weight, **options)
    if z_loss:
        rows = F.cross_entropy(capped, target, weight, **options | {"reduction": "none"})
        more = z_loss * capped.logsumexp(axis).square() * (target != options.get("ignore_index", -100))
        counted = (target != options.get("ignore_index", -100)).sum() if weight is None else None
        expected = {"none": rows + more, "sum": (rows + more).sum(), "mean": (rows + more).sum() / (counted or 1)}[
            options.get("reduction", "mean")
        ]
    upstream = normal(*expected.shape, seed=9).abs() + 0.5
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    (dpart,) = torch.autograd.grad(loss, part, upstream.to(dtype))
    (dwhole,) = torch.autograd.grad(expected, whole, upstream.to(dtype).double())
    same(loss.double(), expected, tolerance, "loss")
    same(dpart.double(), dwhole.narrow(axis, first, sizes[rank.rank]), tolerance, "gradient")
    assert torch.equal(z.narrow(axis, first, sizes[rank.rank]), part)


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


# ---------------------------------------------------------------------------------------------- data parallelism
class Model(nn.Module):
    """Every module that has parameters or looks at a batch."""

    def __init__(self) -> None:
        import hw3gpu.nn as HN

        super().__init__()
        self.conv = HN.Conv2D(3, 4, 3)
        self.norm = HN.SyncBatchNorm(4)
        self.plain = HN.BatchNorm2d(4).eval()
        self.line = HN.SyncBatchNorm(6)
        self.head = nn.Linear(4, 6)
        self.loss = HN.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x, target):
        x = self.norm(self.conv(x.permute(0, 3, 2, 1)).permute(0, 3, 1, 2)).relu()
        return self.loss(self.line(self.head(self.plain(x).mean((2, 3)))), target)


def data(rank: Rank):
    x, target = normal(4 * rank.size, 3, 6, 5), torch.arange(4 * rank.size) % 6
    return x, target, slice(4 * rank.rank, 4 * rank.rank + 4)


def after_training(model, steps):
    """The parameters after some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, target in steps:
        optimizer.zero_grad()
        model(x, target).backward()
        optimizer.step()


def trains_as_one(rank, wrapped, model, parameters):
    """Training on parts is training on the whole with one process: equal parts, so that the mean of means is the mean."""
    x, target, mine = data(rank)
    single = copy.deepcopy(model)
    alone = [dist.new_group([r]) for r in range(rank.size)][rank.rank]
    single.norm.process_group = single.line.process_group = alone
    after_training(single, [(x, target)] * 3)
    after_training(wrapped, [(x[mine], target[mine])] * 3)
    for (name, a), b in zip(parameters().items(), single.state_dict().values(), strict=True):
        same(a, b, 1e-8, name)


@check
def distributed_data_parallel_trains_as_one_process(rank):
    torch.manual_seed(0)
    model = Model().double()
    ours = copy.deepcopy(model)
    trains_as_one(rank, nn.parallel.DistributedDataParallel(ours), model, ours.state_dict)


@check
def fully_sharded_data_parallel_trains_as_one_process(rank):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Model().double()
    ours = copy.deepcopy(model)
    mesh = dist.init_device_mesh("cpu", (rank.size,))
    for module in (ours.conv, ours.norm, ours.line):
        fully_shard(module, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    options = StateDictOptions(full_state_dict=True)
    trains_as_one(rank, ours, model, lambda: get_model_state_dict(ours, options=options))


# ---------------------------------------------------------------------------------------------- running them
def _work(rank: int, size: int, backend: str, names: tuple[str, ...], folder: str) -> None:
    torch.set_num_threads(1)
    if backend == "gpu":
        from conftest import find_leg

        find_leg("gpu")
    from hw3gpu._arrays import use_backend

    # a process whose check fails leaves the others waiting for it: not for ever
    patience = timedelta(minutes=3)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=size, timeout=patience)
    said = {}
    with use_backend(backend):
        for name in names:
            try:
                CHECKS[name](Rank(rank, size, backend))
                said[name] = ""
            except Exception:  # reported by the test of this check
                said[name] = f"process {rank}: {traceback.format_exc()}"
            dist.barrier()
    torch.save(said, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def main(size: int, backend: str, names: tuple[str, ...]) -> dict[str, str]:
    """The checks of those names, each with what went wrong in any process."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (size, backend, names, folder), nprocs=size)
        said = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]
    return {name: os.linesep.join(filter(None, (s[name] for s in said))) for name in names}
