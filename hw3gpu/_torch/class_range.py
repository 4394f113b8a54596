"""Classes out of range on a GPU, reported without waiting for it.

The kernels write the number of the first wrong row to a flag on the device. Each call starts a copy of the flag to the host,
and reads the copy that an earlier call has started, if it has arrived. So a later call reports a wrong class, or
`check_targets`, which waits. During the capture of a CUDA graph nothing is read; its replays write to the same flag.
"""

from __future__ import annotations

import functools

import torch

from .._core import arrays

NONE = 2**62  # no row has this number


class Watch:
    """The flag of one device, and its last copy on the host."""

    def __init__(self, device: torch.device) -> None:
        self.flag = torch.full((1,), NONE, dtype=torch.int64, device=device)
        self.seen = torch.full((1,), NONE, dtype=torch.int64, pin_memory=True)
        self.arrived = torch.cuda.Event()
        self.on_its_way = False

    def look(self) -> None:
        """Raises IndexError for a wrong row whose number has arrived; never waits."""
        if self.on_its_way and self.arrived.query():
            self.on_its_way = False
            self._judge(int(self.seen))

    def send(self) -> None:
        """Starts a copy of the flag, unless one is on its way."""
        if not self.on_its_way:
            self.seen.copy_(self.flag, non_blocking=True)
            self.arrived.record()
            self.on_its_way = True

    def wait(self) -> None:
        """As `look`, for everything launched so far."""
        self.on_its_way = False
        self._judge(int(self.flag))

    def _judge(self, row: int) -> None:
        if row != NONE:
            self.flag.fill_(NONE)
            raise IndexError(
                f"target: expected classes of input or ignore_index, got another in row {row} of an earlier call on "
                f"{self.flag.device}, whose loss and gradient there are NaN"
            )


@functools.cache
def watch(device: torch.device) -> Watch:
    """The one watch of a device."""
    return Watch(device)


def looks(device: torch.device) -> bool:
    """True where a wrong class is reported later: on a GPU, while no graph is captured."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def flag(x: torch.Tensor, rows: int) -> torch.Tensor:
    """The int64 (1,) to which kernels write the number of a wrong row of `x`: it is below `rows` if there is one."""
    if x.device.type != "cuda":
        return torch.full((1,), rows, dtype=torch.int64, device=x.device)
    if looks(x.device):
        watch(x.device).look()
    return watch(x.device).flag


def check_targets(device: torch.device | str | int | None = None) -> None:
    """Waits for a GPU, and raises IndexError if a class was out of range in a call since the last such error.

    device: the CUDA device; None for the current one. On the CPU a wrong class is refused by the call itself.
    """
    if not (device is None or isinstance(device, (torch.device, str, int))) or isinstance(device, bool):
        raise TypeError(f"device: expected None, a torch.device, its name or its number, got {device!r}")
    try:
        index = torch.device(f"cuda:{device}" if isinstance(device, int) else device or "cuda")
    except RuntimeError as error:
        raise ValueError(f"device: expected a CUDA device, got {device!r} ({error})") from None
    if index.type == "cuda" and torch.cuda.is_available():
        watch(torch.device("cuda", torch.cuda.current_device() if index.index is None else index.index)).wait()


def judge_targets(logits: torch.Tensor, target: torch.Tensor, invalid: torch.Tensor, V: int, ignore_index: int) -> None:
    """Raises for a class out of range on the host; on a GPU starts the copy of the flag, which a later call reads."""
    if arrays.on_host(logits):
        row = int(invalid)
        if row < target.numel():
            refuse_class(target, row, V, ignore_index)
    elif looks(logits.device):
        watch(logits.device).send()


def out_of_range(target: torch.Tensor, V: int, ignore_index: int) -> torch.Tensor:
    """Where `target` holds neither a class nor `ignore_index`."""
    target = target.long()  # in fewer bits PyTorch wraps the numbers that it is compared with
    return ((target < 0) | (target >= V)) & (target != ignore_index)


def check_classes(target: torch.Tensor, V: int, ignore_index: int) -> None:
    """Raises IndexError for a class out of range in `target` on the host, where no kernel looks for it."""
    if target.is_floating_point() or not arrays.on_host(target) or not target.numel():
        return
    bad = out_of_range(target, V, ignore_index)
    if bad.any():
        refuse_class(target, int(bad.reshape(-1).to(torch.uint8).argmax()), V, ignore_index)


def refuse_class(target: torch.Tensor, row: int, V: int, ignore_index: int) -> None:
    """Raises IndexError for the value in a row of `target`."""
    raise IndexError(
        f"target: expected classes in 0…{V - 1} or ignore_index {ignore_index}, got {int(target.reshape(-1)[row])} in row {row}"
    )
