"""Collectives of float64 or float32 vectors. The results are merged in order of rank, so that all processes get the same bits.

A group is given by its name, which a graph can hold. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .._core.torch_internals import process_group

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


def gathered(sent: torch.Tensor, group: Any) -> torch.Tensor:
    """(processes, n): what every process has sent, (n,) each, in order of rank."""
    return Gathering(sent, group).result()


class Gathering:
    """What every process has sent, on its way: the device computes meanwhile."""

    def __init__(self, sent: torch.Tensor, group: Any) -> None:
        of = process_group(group)
        self.sent, self.received = sent, sent.new_empty(dist.get_world_size(of) * sent.numel())
        self.work = _gather(self.received, sent, group=of, async_op=True)

    def result(self) -> torch.Tensor:
        """(processes, n), once it is there: on a GPU the stream waits for it, not the host."""
        self.work.wait()
        return self.received.view(-1, self.sent.numel())


def summed(own: torch.Tensor, group: Any) -> torch.Tensor:
    """`own`, overwritten by its sum over all processes."""
    dist.all_reduce(own, group=process_group(group))
    return own


def before(own: int, group: Any, device: torch.device) -> torch.Tensor:
    """The sum of what processes of lower rank have given as `own`: a number on the device."""
    numbers = gathered(torch.full((1,), own, dtype=torch.int64, device=device), group)
    return numbers[: dist.get_rank(process_group(group))].sum()
