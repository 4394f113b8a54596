"""How kernels are launched: the first call goes through Triton, later ones run what it has compiled, with other pointers.

A launcher calls `launch(kernel, programs, …)`. Inside a `Recording` of a call's operands its launches become a `Bound`:
compiled kernels, grids and arguments in the order of their launches, of which only pointers and a few numbers change. The
caller that keeps a `Bound` decides for which later calls it holds: those with the same shapes, strides, dtypes, options, device
and alignment to 16 bytes.
"""

from __future__ import annotations

import contextvars
import types
from typing import Any, NamedTuple

import torch

from . import _triton
from ._triton import BINDS, device
from .plan import float_and_bits

__all__ = ["BINDS", "Bound", "Number", "Recording", "counter", "device", "launch", "numbers", "observer", "scratch"]

_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("hw3gpu_recording", default=None)

# Told of each launch, for `hw3gpu.explain`: observer(kernel, plan, programs, reads, writes), the last two tuples of
# (name, bytes, address); the address is None where a kept launch runs on other memory.
observer: contextvars.ContextVar[Any] = contextvars.ContextVar("hw3gpu_gpu_observer", default=None)


class Number(NamedTuple):
    """An argument that may differ in later calls of the same `Bound`: a number or its bits, the one at `position` among such
    arguments."""

    value: float
    position: int


def numbers(*values: float) -> tuple[Number, ...]:
    """Each value and its bits (`plan.float_and_bits`), as arguments that later calls replace."""
    return tuple(Number(part, i) for i, part in enumerate(part for value in values for part in float_and_bits(value)))


def launch(
    kernel: Any, programs: int, *args: Any,
    plan: Any = None, reads: tuple[str, ...] = (), writes: tuple[str, ...] = (), again: float = 0.0, **constants: Any,
) -> None:  # fmt: skip
    """`kernel[(programs,)](…)`, recorded in the current `Recording` and reported to the `observer`, if there is one.

    For the observer alone: plan, what decided the launch; reads and writes, the whole tensors that the kernel moves, named as
    its arguments are without `_ptr`; again, what it reads beyond once, as a fraction of that.
    """
    compiled = kernel[(programs,)](*(a.value if type(a) is Number else a for a in args), **constants)
    recording, tell = _recording.get(), observer.get()
    if recording is None and tell is None:
        return
    seen = _seen(kernel, plan, programs, args, reads, writes, again)
    if tell is not None:
        tell(*seen)
    if recording is not None:
        recording.note(compiled, programs, (*args, *(constants[name] for name in kernel.arg_names[len(args) :])), seen)


def _seen(
    kernel: Any, plan: Any, programs: int, args: tuple[Any, ...], reads: tuple[str, ...], writes: tuple[str, ...], again: float
) -> tuple[Any, ...]:
    """The arguments with which an observer is called for a launch."""
    of = dict(zip(kernel.arg_names, args, strict=False))

    def moved(names: tuple[str, ...], times: float) -> tuple[tuple[str, int, int | None], ...]:
        tensors = [(name, of[f"{name}_ptr"]) for name in names]
        return tuple((name, round(t.nbytes * times), t.data_ptr()) for name, t in tensors if t is not None)

    module = kernel.fn.__module__.partition("kernels.")[2]
    return f"{module}.{kernel.fn.__name__}", plan, programs, moved(reads, 1.0 + again), moved(writes, 1.0)


def _on_other_memory(seen: tuple[Any, ...]) -> tuple[Any, ...]:
    *rest, reads, writes = seen
    return *rest, *(tuple((name, nbytes, None) for name, nbytes, _ in moved) for moved in (reads, writes))


def scratch(dtype: torch.dtype, device: torch.device, *shape: int) -> torch.Tensor:
    """Memory that the kernels of one launcher share."""
    made = torch.empty(shape, dtype=dtype, device=device)
    recording = _recording.get()
    if recording is not None:
        recording.own(made)
    return made


_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def counter(device: torch.device) -> torch.Tensor:
    """An int32 that is 0 when a kernel of the current stream begins: each stream has one, and each kernel sets it to 0 again.

    A CUDA graph may run at the same time as the stream's kernels and other graphs: it has its own counter, and sets it to 0.
    """
    made = _counter(device)
    recording = _recording.get()
    if recording is not None:
        recording.own(made, counts=True)
    return made


def _counter(device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, _triton.stream() if device.type == "cuda" else 0)
    found = _counters.get(key)
    if found is None:
        if len(_counters) >= 1024:  # of streams that may no longer exist
            _counters.clear()
        found = _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return found


class _Launch(NamedTuple):
    compiled: Any
    programs: int
    args: list[Any]
    places: tuple[tuple[int, int, int], ...]  # (argument, which value, bytes beyond it)


class Bound:
    """The launches of a call, ready to run on other memory."""

    __slots__ = ("_direct", "_launches", "_scratch", "_seen")

    def __init__(
        self, launches: tuple[_Launch, ...], scratch: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...], n: int,
        seen: tuple[tuple[Any, ...], ...],
    ) -> None:  # fmt: skip
        """n: the number of operands. seen: the arguments of an observer for each launch."""
        self._launches, self._scratch, self._seen = launches, scratch, seen
        self._direct = _as_code(launches, scratch, n)

    def __call__(self, *operands: torch.Tensor | None, numbers: tuple[float, ...] = ()) -> None:
        """operands: as in the recording, the first on the current device. numbers: those that the launchers gave to
        `numbers`."""
        tell = observer.get()
        if tell is not None:
            for seen in self._seen:
                tell(*seen)
        if not _triton.hooked():
            self._direct(operands, numbers)
            return
        x = operands[0]
        assert x is not None
        memory = [_counter(x.device) if of is None else x.new_empty(of[0], dtype=of[1]) for of in self._scratch]
        values: list[Any] = [None if t is None else t.data_ptr() for t in (*operands, *memory)]
        for number in numbers:
            values += float_and_bits(number)
        stream = _triton.stream()
        for compiled, programs, args, places in self._launches:
            given = args.copy()
            for i, which, offset in places:
                given[i] = values[which] + offset if offset else values[which]
            _triton.run(compiled, programs, stream, given)


def _as_code(launches: tuple[_Launch, ...], scratch: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...], n: int) -> Any:
    """f(operands, numbers) with each launch written out: half the time of a loop over launches and arguments."""
    names: dict[str, Any] = {"counter": _counter, "bits": float_and_bits, "stream": _triton.stream}
    used = {which for launched in launches for _, which, _ in launched.places}
    lines = [f"{', '.join(f'x{i}' for i in range(n))}, = operands"]
    for i, of in enumerate(scratch, n):
        if of is None:
            lines.append(f"x{i} = counter(x0.device)")
        else:
            names[f"dtype{i}"] = of[1]
            lines.append(f"x{i} = x0.new_empty({of[0]}, dtype=dtype{i})")
    total = n + len(scratch)
    lines += [f"v{i} = x{i}.data_ptr()" for i in sorted(used) if i < total]
    lines += [f"v{i}, v{i + 1} = bits(numbers[{(i - total) // 2}])" for i in range(total, max(used) + 1, 2)]
    lines.append("now = stream()")
    for k, (compiled, programs, args, places) in enumerate(launches):
        names |= {f"run{k}": compiled.run, f"function{k}": compiled.function, f"packed{k}": compiled.packed_metadata}
        names |= {f"c{k}_{i}": arg for i, arg in enumerate(args)}
        given = [repr(arg) if type(arg) in (int, bool, type(None)) else f"c{k}_{i}" for i, arg in enumerate(args)]
        for i, which, offset in places:
            given[i] = f"v{which} + {offset}" if offset else f"v{which}"
        lines.append(f"run{k}({programs}, 1, 1, now, function{k}, packed{k}, None, None, None, {', '.join(given)})")
    exec("def direct(operands, numbers):\n    " + "\n    ".join(lines), names)
    return names["direct"]


class Recording:
    """Notes the launches inside its `with` block, on these tensors (or None) and on scratch memory."""

    def __init__(self, operands: tuple[torch.Tensor | None, ...]) -> None:
        self._given = len(operands)
        self._memory = [None if x is None else _span(x) for x in operands]
        self._scratch: list[tuple[tuple[int, ...], torch.dtype] | None] = []  # None: a counter
        self._launches: list[tuple[Any, int, tuple[Any, ...]]] = []
        self._seen: list[tuple[Any, ...]] = []

    def __enter__(self) -> Recording:
        self._token = _recording.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: types.TracebackType | None) -> None:
        _recording.reset(self._token)

    def note(self, compiled: Any, programs: int, args: tuple[Any, ...], seen: tuple[Any, ...]) -> None:
        """Records one launch. seen: the arguments of an observer for it."""
        self._launches.append((compiled, programs, args))
        self._seen.append(_on_other_memory(seen))

    def own(self, x: torch.Tensor, counts: bool = False) -> None:
        """Notes scratch memory, or a counter, that the next launches use."""
        span = _span(x)
        if not (counts and span in self._memory):  # launches that follow each other share a counter
            self._memory.append(span)
            self._scratch.append(None if counts else (tuple(x.shape), x.dtype))

    def bound(self) -> Bound | None:
        """What was noted; None where it cannot be said of each pointer whose it is: of copies, and of operands that overlap.

        Also None where one of Triton's hooks has kept a kernel from being compiled.
        """
        if any(compiled is None for compiled, *_ in self._launches):
            return None
        found = []
        for compiled, programs, noted in self._launches:
            args, places = list(noted), []
            for i, arg in enumerate(noted):
                if type(arg) is Number:
                    places.append((i, len(self._memory) + arg.position, 0))
                elif isinstance(arg, torch.Tensor):
                    address = self._place(arg)
                    if address is None:
                        return None
                    places.append((i, *address))
            for i, *_ in places:
                args[i] = None
            found.append(_Launch(compiled, programs, args, tuple(places)))
        return Bound(tuple(found), tuple(self._scratch), self._given, tuple(self._seen)) if found else None

    def _place(self, x: torch.Tensor) -> tuple[int, int] | None:
        storage, start, _ = _span(x)
        fits = [
            (which, start - memory[1])
            for which, memory in enumerate(self._memory)
            if memory is not None and memory[0] is storage and memory[1] <= start < memory[2]
        ]
        return fits[0] if len(fits) == 1 else None


def _span(x: torch.Tensor) -> tuple[Any, int, int]:
    """(storage, first byte, byte after the last) of a tensor's memory."""
    size = x.element_size()
    start = int(x.storage_offset()) * size
    last = sum(int(n - 1) * int(stride) for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.untyped_storage(), start, start + (last + 1) * size
