"""What each process of a group does in `test_distributed.py`: checks of public operations and of what is below, in one order.

A check takes a `Rank` and raises where it finds something wrong; its single-process answer it computes itself, from the same
random numbers. `python distributed_checks.py BACKEND PLAN FILE` starts the processes, once for groups of every size, and
writes for every check what each of them had to say ('' for nothing).
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import distributed_batch_norm  # noqa: F401  its checks come first in the list
import distributed_cross_entropy  # noqa: F401  and these
import distributed_dtensor  # noqa: F401
import distributed_linear_cross_entropy  # noqa: F401
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed_kit import CHECKS, Rank, check, normal, same
from torch import nn


def checks_of(size: int) -> tuple[str, ...]:
    """The names of the checks among `size` processes: what compiles is dear, and compiles the same for two and for four."""
    return tuple(name for name in CHECKS if size == 2 or "compiles" not in name)


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
def _warm(backend: str) -> None:
    """Imports what the checks import, and loads the kernels, once for all processes: they are forks of this one."""
    torch.set_num_threads(1)
    if backend == "gpu":
        from conftest import find_leg

        find_leg("gpu")
    from torch import _dynamo  # noqa: F401
    from torch.distributed.checkpoint import state_dict  # noqa: F401

    import hw3gpu.nn as HN
    from hw3gpu import use_backend

    x = normal(4, 3, 2, 5).requires_grad_()
    with use_backend(backend):
        y = HN.BatchNorm2d(3).double()(x)
        HN.CrossEntropyLoss()(y.flatten(1), torch.arange(4)).backward()
    if backend == "cpu":  # the compiler imports much on its first call
        layer = nn.Linear(3, 3)
        torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.rand(2, 3)).sum().backward()
        torch.export.export(layer, (torch.rand(2, 3),))


def _work(rank: int, backend: str, plan: dict[int, tuple[str, ...]], folder: str) -> None:
    from hw3gpu import use_backend

    said: dict[str, str] = {}
    with use_backend(backend):
        for size, names in sorted(plan.items(), reverse=True):
            groups = max(plan) // size  # which share the checks of their size
            _run_checks(rank % size, size, backend, names[rank // size :: groups], f"{folder}/{size}-{rank // size}", said)
    torch.save(said, f"{folder}/{rank}.pt")


def _run_checks(rank: int, size: int, backend: str, names: tuple[str, ...], place: str, said: dict[str, str]) -> None:
    # a process whose check fails leaves the others waiting for it: not for ever
    patience = timedelta(minutes=3)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size, timeout=patience)
    for name in names:
        try:
            CHECKS[name](Rank(rank, size, backend))
            said[f"{size} {name}"] = ""
        except Exception:  # reported by the test of this check
            said[f"{size} {name}"] = f"process {rank} of {size}: {traceback.format_exc()}"
        dist.barrier()
    dist.destroy_process_group()


def main(backend: str, plan: dict[int, tuple[str, ...]]) -> dict[str, str]:
    """Runs the checks of `plan`, their names by the number of processes, in one set of as many processes as the most need.

    Returns for each '<processes> <name>' what went wrong in any process.
    """
    _warm(backend)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_work, (backend, plan, folder), nprocs=max(plan), start_method="fork")
        said = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(max(plan))]
    keys = [f"{size} {name}" for size, names in plan.items() for name in names]
    return {
        key: os.linesep.join(filter(None, (s[key] for s in said if key in s))) for key in keys if any(key in s for s in said)
    }


if __name__ == "__main__":
    wanted = {int(size): tuple(names) for size, names in json.loads(sys.argv[2]).items()}
    Path(sys.argv[3]).write_text(json.dumps(main(sys.argv[1], wanted)))
