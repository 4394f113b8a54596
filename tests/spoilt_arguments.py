"""Arguments of every public function, most of them spoilt in one to three places: what `test_spoilt_arguments.py` runs.

`python tests/spoilt_arguments.py --inputs 200000 --seed 0` runs that many inputs in child processes, prints how many ended in a
result and in which exceptions, and the inputs that ended in anything else. A child writes the number of an input before it
begins: one that dies, or takes longer than LIMIT seconds, is named by it. `--only SEED:NUMBER` runs one input alone.

An input is right when it ends in a result of the documented shapes, or in TypeError, ValueError, RuntimeError, IndexError or
MemoryError (of what is larger than memory) whose message names a parameter of the function; with at most two warnings, and
with all arrays as they were.
"""

from __future__ import annotations

import argparse
import decimal
import enum
import fractions
import gc
import hashlib
import inspect
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from spoilt_functions import Function, functions

LIMIT = 120  # seconds an input may take, with the compilation of a kernel that no earlier one needed
ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
BATCH = 20_000  # inputs a child
MEMORY = 4 << 30  # bytes a child may have: what asks for more is a MemoryError


# ---------------------------------------------------------------------------------------------- values that are no arrays
class WithIndex:
    def __index__(self) -> int:
        return 1


class IndexThatRaises:
    def __index__(self) -> int:
        raise KeyError("no index")


class WithFloat:
    def __float__(self) -> float:
        return 0.5


class Text(str):
    pass


class One(enum.IntEnum):
    ONE = 1


def spoilt_values() -> list[Callable[[], Any]]:
    import torch

    return [
        lambda: None, lambda: True, lambda: False, lambda: 0, lambda: 1, lambda: -1, lambda: 2, lambda: 3, lambda: 5,
        lambda: 2**31, lambda: 2**63, lambda: -(2**63), lambda: 2**63 - 1, lambda: 2**100, lambda: -(2**100),
        lambda: 10**400, lambda: 0.0, lambda: -0.0,
        lambda: 0.5, lambda: 1.0, lambda: 1.5, lambda: -1e-5, lambda: 1e-30, lambda: 1e30, lambda: 1e308, lambda: 5e-324,
        lambda: math.nan, lambda: math.inf, lambda: -math.inf, lambda: 1 + 2j, lambda: "", lambda: "x", lambda: "mean",
        lambda: "\ud800", lambda: b"x", lambda: [], lambda: [1, 2], lambda: (), lambda: (1, 2), lambda: {}, lambda: {"a": 1},
        lambda: {1, 2}, lambda: frozenset(), object, lambda: np.float32(0.5), lambda: np.float64("nan"), lambda: np.int64(3),
        lambda: np.bool_(True), lambda: np.array(1.5), lambda: np.array(2), lambda: np.array([1, 2]), lambda: np.array([]),
        lambda: np.array("x"), lambda: np.array(None), lambda: np.datetime64(1, "s"), lambda: np.ma.masked,
        lambda: torch.tensor(1.0), lambda: torch.tensor(2), lambda: torch.tensor(True), lambda: torch.tensor([]),
        lambda: torch.tensor(0.5, requires_grad=True), lambda: torch.tensor(1.0, device="meta"), lambda: torch.tensor(1 + 1j),
        lambda: fractions.Fraction(1, 3), lambda: decimal.Decimal("0.1"), lambda: int, lambda: math, lambda: len,
        lambda: ..., lambda: slice(2), lambda: range(3), lambda: iter([1, 2]), lambda: (i for i in (1, 2)), WithIndex,
        IndexThatRaises, WithFloat, lambda: Text("mean"), lambda: One.ONE, lambda: torch.float32, lambda: torch.int64,
        lambda: np.dtype("float64"), lambda: "float32", lambda: torch.device("cpu"), lambda: memoryview(b"abcd"),
        lambda: bytearray(3), lambda: torch.Size([1, 2]), lambda: NotImplemented,
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------- arrays spoilt
def spoil_array(rng: random.Random, x: Any) -> Any:
    """`x` with another shape, dtype, layout or kind, or with elements that are no numbers."""
    import torch

    kind = rng.choice(["shape", "dtype", "layout", "elements", "kind"])
    of_torch = isinstance(x, torch.Tensor)
    if kind == "shape":
        shape = list(x.shape)
        how = rng.choice(["more", "less", "none", "axis", "no axis", "scalar", "reversed", "flat", "many"])
        if how in ("more", "less", "none") and shape:
            at = rng.randrange(len(shape))
            shape[at] = {"more": shape[at] + 1, "less": max(shape[at] - 1, 0), "none": 0}[how]
        elif how == "axis":
            shape.insert(rng.randint(0, len(shape)), rng.choice([0, 1, 2]))
        elif how == "no axis" and shape:
            shape.pop(rng.randrange(len(shape)))
        elif how == "reversed":
            shape.reverse()
        elif how == "many":
            shape = [1] * rng.choice([6, 12, 33, 60]) + shape
        else:
            shape = [] if how == "scalar" else [math.prod(shape)]
        return torch.ones(shape, dtype=x.dtype) if of_torch else np.ones(shape, x.dtype)
    if kind == "dtype":
        names = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool", "complex64", "complex128"]
        if of_torch:
            more = ["bfloat16", "float8_e4m3fn", "uint16", "uint64"]
            return x.detach().to(getattr(torch, rng.choice(names + more)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return x.astype(rng.choice([*names, "longdouble", ">f4", ">f8", ">i8", "O", "U3", "datetime64[s]"]))
    if kind == "layout":
        if of_torch:
            makes = [
                lambda: x.detach().to_sparse(), lambda: x.detach().expand(2, *x.shape), lambda: x.detach()[..., None][..., 0],
                lambda: x.detach().clone().requires_grad_(x.is_floating_point()), lambda: x.detach().to("meta"),
                lambda: x.detach().movedim(0, -1) if x.dim() else x, lambda: torch.nested.nested_tensor([x.detach()]),
                lambda: torch.nn.Parameter(x.detach(), requires_grad=False), lambda: torch._neg_view(x.detach()),
                lambda: torch.as_strided(x.detach().flatten(), x.shape, [0] * x.dim()) if x.numel() else x,
                lambda: torch.empty_like(x.detach()).share_memory_().zero_(),
            ]  # fmt: skip
        else:
            makes = [
                lambda: x[..., ::-1] if x.ndim else x, lambda: x.T, lambda: np.broadcast_to(x, (2, *x.shape)),
                lambda: np.ma.masked_array(x), lambda: x.view(np.recarray), lambda: np.frombuffer(x.tobytes(), x.dtype),
                lambda: np.lib.stride_tricks.as_strided(x, x.shape, [0] * x.ndim, writeable=False),
                lambda: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape),
            ]  # fmt: skip
        return rng.choice(makes)()
    if kind == "elements":
        integral = not (x.is_floating_point() if of_torch else x.dtype.kind in "fc")
        value = rng.choice([-1, 100, 2**31 - 1, -100] if integral else [math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0, 6e4])
        copy = x.detach().clone() if of_torch else x.copy()
        if math.prod(copy.shape):
            if rng.random() < 0.5:
                copy[...] = value
            else:
                copy.reshape(-1)[0] = value
        return copy
    makes = [
        lambda: x.tolist(), lambda: (x.detach().numpy() if x.dtype != torch.bfloat16 else x.tolist()) if of_torch
        else torch.from_numpy(np.ascontiguousarray(x)), lambda: bytes(3), lambda: [x], lambda: (x, x), lambda: str(x),
    ]  # fmt: skip
    return rng.choice(makes)()


# ---------------------------------------------------------------------------------------------- an input, and what it ends in
def arguments(rng: random.Random, of: Function, pool: list[Callable[[], Any]]) -> dict[str, Any]:
    import torch

    given = of.good(rng)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        name = rng.choice(list(given))
        value = given[name]
        what = rng.random()
        if isinstance(value, (np.ndarray, torch.Tensor)) and what < 0.75:
            given[name] = spoil_array(rng, value)
        elif what < 0.95:
            given[name] = rng.choice(pool)()
        else:
            del given[name]
            if not given:
                break
    return given


def arrays_in(given: dict[str, Any]) -> Iterator[Any]:
    import torch

    for name, v in given.items():
        if not name.startswith("running") and (type(v) is np.ndarray or type(v) is torch.Tensor):
            yield v


def digest(x: Any) -> bytes | None:
    """A hash of the elements; None of what has none that can be read."""
    import torch

    if isinstance(x, torch.Tensor):
        if x.layout is not torch.strided or x.is_nested or x.device.type != "cpu":
            return None
        x = x.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(x.tobytes() if x.dtype.kind != "O" else repr(x).encode()).digest()


ALLOWED = (TypeError, ValueError, RuntimeError, IndexError, MemoryError)


def run_one(seed: int, number: int, table: dict[str, Function], pool: list[Callable[[], Any]]) -> tuple[str, str, str]:
    """(function, 'result' or the exception's name, what is wrong about it or nothing)."""
    rng = random.Random(f"{seed}:{number}")
    name = rng.choice(list(table))
    of = table[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = arguments(rng, of, pool)
            before = [digest(x) for x in arrays_in(given)]
    except Exception as error:  # NumPy or torch has no such array
        return name, f"no such argument ({type(error).__name__})", ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = of.call(**given)
        except ALLOWED as error:
            end, text = type(error).__name__, str(error)
            names = {*given, *inspect.signature(of.call).parameters, "use_backend", "running_mean", "weight"}
            named = any(parameter in text for parameter in names) or isinstance(error, MemoryError)
            wrong = "" if named else f"no argument is named: {text[:300]}"
        except BaseException as error:
            end, wrong = type(error).__name__, traceback.format_exc(limit=-4)
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
        else:
            end, wrong = "result", ""
            try:
                if not of.shapes(given, found):
                    wrong = f"a result of another shape: {found!r:.300}"
            except Exception:
                wrong = f"the shape cannot be told: {traceback.format_exc(limit=-2)}"
        if not wrong and len(said) > 2:
            wrong = f"{len(said)} warnings, {said[0].message!r}"
    if not wrong and before != [digest(x) for x in arrays_in(given)]:
        wrong = "an argument was written"
    return name, end, wrong and f"{name}({describe(given)})\n    {wrong}"


def describe(given: dict[str, Any]) -> str:
    import torch

    def one(v: Any) -> str:
        if isinstance(v, torch.Tensor):
            return f"tensor{tuple(v.shape) if not v.is_nested else '(nested)'} {v.dtype} {v.layout} {v.device}"
        if isinstance(v, np.ndarray):
            return f"{type(v).__name__}{v.shape} {v.dtype} strides {v.strides}"
        return f"{v!r:.60}"

    return ", ".join(f"{k}={one(v)}" for k, v in given.items())


# ---------------------------------------------------------------------------------------------- children
def child(seed: int, first: int, last: int, note: str) -> None:
    """Runs inputs first…last - 1; prints what is wrong, then a line with the counts."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    table, pool = functions(), spoilt_values()
    ends: Counter[str] = Counter()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # in C code too: the child ends, and the note says where
    with open(note, "w", buffering=1) as at:
        for number in range(first, last):
            at.seek(0)
            at.write(f"{number}\n")
            signal.alarm(LIMIT)
            _, end, wrong = run_one(seed, number, table, pool)
            signal.alarm(0)
            ends[end] += 1
            if wrong:
                print(f"{seed}:{number} {end}: {wrong}", flush=True)
            if number % 100 == 0 or number == last - 1:
                gc.collect(1)
                print("ENDS", json.dumps(ends), flush=True)
                ends.clear()
    os._exit(0)  # without the process group's farewell


def run(seed: int, inputs: int, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Counts of how inputs ended, and those that are wrong; in children, so that one that dies is seen."""
    ends: Counter[str] = Counter()
    wrong: list[str] = []
    last = first + inputs
    with tempfile.TemporaryDirectory() as folder:
        note = str(Path(folder) / "note")
        while first < last:
            stop = min(first + BATCH, last)
            command = [sys.executable, __file__, "--child", f"{seed}:{first}:{stop}:{note}"]
            done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
            for line in done.stdout.splitlines():
                if line.startswith("ENDS "):
                    ends.update(json.loads(line[5:]))
                else:
                    wrong.append(line)
            if done.returncode:
                at = int(Path(note).read_text().split()[0]) if Path(note).exists() else first
                wrong.append(f"{seed}:{at} the process ended with {done.returncode}\n{done.stderr[-1500:]}")
                ends["died"] += 1
                stop = at + 1
            first = stop
    return ends, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--only", help="SEED:NUMBER")
    asked = parser.parse_args()
    if asked.child:
        seed, first, last, note = asked.child.split(":", 3)
        child(int(seed), int(first), int(last), note)
    if asked.only:
        seed, number = map(int, asked.only.split(":"))
        print(*run_one(seed, number, functions(), spoilt_values()))
        return 0
    ends, wrong = run(asked.seed, asked.inputs)
    print(*wrong, sep="\n")
    print(f"{asked.inputs} inputs, seed {asked.seed}: {dict(ends.most_common())}; wrong: {len(wrong)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
