"""Mutation check: one small fault at a time in a copy of the sources, and which tests see it.

`python tests/mutants.py kernels/gpu --jit --each 10 --seed 0` puts ten faults into each file of Triton kernels, one after the
other. Each meets a case of each test of that file (`TESTS`), then, while none sees it, all of their cases, and a case of every
other test (`WIDER`). A fault is caught where a test fails, the process dies, or its time ends. The checkout is not touched.
What was found is appended to `--record FILE`, a line of JSON a fault; what stands there is not run again.

The faults of a file are drawn from all its places with a generator that `--seed` starts, one kind after the other, so that rare
kinds are among them: a dropped mask, another value in masked lanes, a missing conversion, an offset in 32 bits, `<` for `<=`,
`+` for `-`, another number, a maximum for a sum, arguments of a helper in another order, a branch the other way, a statement
(a barrier, a check) left out.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 20 << 30  # bytes: rows 2³¹ elements apart lie in 16 GiB of addresses, which are not filled

CROSS_ENTROPY = "softmax_cross_entropy functional_cross_entropy cross_entropy_extras row_weights reduced_loss"
BATCH_NORM = "batch_norm functional_batch_norm batch_norm_act large_means batch_norm_fused batch_norm_masked"
# A file, by how its path begins (the first that fits): the tests that should see its faults.
TESTS: list[tuple[str, str]] = [
    ("kernels/gpu/softmax", "softmax memory_guard functional_softmax traffic"),
    ("kernels/gpu/moments", "moments memory_guard"),
    ("kernels/gpu/token_log_probs", "token_log_probs memory_guard linear_token_log_probs traffic"),
    ("kernels/gpu/distillation", "distillation memory_guard top_k_distillation traffic"),
    ("kernels/gpu/_distillation", "distillation top_k_distillation"),
    ("kernels/gpu/cross_entropy", f"{CROSS_ENTROPY} memory_guard traffic"),
    ("kernels/gpu/_cross_entropy", f"{CROSS_ENTROPY} memory_guard traffic"),
    ("kernels/gpu/batch_norm", f"{BATCH_NORM} memory_guard traffic"),
    ("kernels/gpu/_batch_norm", f"{BATCH_NORM} memory_guard traffic"),
    ("kernels/gpu/_rows", "softmax softmax_cross_entropy token_log_probs distillation"),
    ("kernels/gpu/_tile", "softmax softmax_cross_entropy batch_norm memory_guard"),
    ("kernels/gpu/channel_plan", "channel_plan launches"),
    ("kernels/gpu/row_plan", "plan launches"),
    ("kernels/gpu", "plan device tuned launches"),
    ("kernels/cpu/softmax", "softmax"),
    ("kernels/cpu/moments", "moments"),
    ("kernels/cpu/eigh", "trace_solvers trace"),
    ("kernels/cpu/token_log_probs", "token_log_probs"),
    ("kernels/cpu/distillation", "distillation"),
    ("kernels/cpu/_distillation", "distillation"),
    ("kernels/cpu/cross_entropy_small", "small"),
    ("kernels/cpu/cross_entropy_step", "cross_entropy_step"),
    ("kernels/cpu/cross_entropy", CROSS_ENTROPY),
    ("kernels/cpu/_cross_entropy", CROSS_ENTROPY),
    ("kernels/cpu/channel_plan", "cpu_channel_plan"),
    ("kernels/cpu/batch_norm_small", "small functional_batch_norm"),
    ("kernels/cpu/batch_norm", BATCH_NORM),
    ("kernels/cpu/_batch_norm/activation", "batch_norm_fused batch_norm_act"),
    ("kernels/cpu/_batch_norm/positions", "batch_norm_masked"),
    ("kernels/cpu/_batch_norm", BATCH_NORM),
    ("kernels/cpu/_rows", "softmax softmax_cross_entropy token_log_probs distillation cross_entropy_extras"),
    ("kernels/cpu/_numba/by_address", "bound_on_host small"),
    ("kernels/cpu/_numba/openmp", "cpu_threads"),
    ("kernels/cpu/_numba/threads", "cpu_threads"),
    ("kernels/cpu/_numba/log", "distillation"),
    ("kernels/cpu/_numba", "softmax cpu_kernels softmax_cross_entropy moments distillation batch_norm"),
    ("kernels/cpu/launch", "bound_on_host softmax"),
    ("kernels/cpu", "cpu_kernels cpu_threads softmax"),
    ("hw3gpu/reference", "reference softmax softmax_cross_entropy batch_norm moments trace cross_entropy_extras"),
    ("hw3gpu/_error_bounds", "errors properties batch_norm_fused"),
    ("hw3gpu/_array_functions/shapes", "shapes"),
    ("hw3gpu/_array_functions/batch_norm", "batch_norm"),
    ("hw3gpu/_array_functions/softmax", "softmax softmax_cross_entropy"),
    ("hw3gpu/_array_functions/points", "points moments kinds"),
    ("hw3gpu/_array_functions/trace", "trace minor_components"),
    ("hw3gpu/_linalg", "trace trace_solvers points minor_components"),
    ("hw3gpu/_core/dlpack", "interchange arrays"),
    ("hw3gpu/_core/outputs", "arrays shapes softmax batch_norm"),
    ("hw3gpu/_core/pool", "pool"),
    ("hw3gpu/_core/record", "explain"),
    ("hw3gpu/_core/torch_internals", "internals functional_softmax trace_autograd"),
    ("hw3gpu/_core", "arrays interchange cupy softmax softmax_cross_entropy explain kinds spoilt_arguments"),
    ("hw3gpu/_cli/arrays", "arrays kinds softmax"),
    ("hw3gpu/_cli/interpreter", "interpreter softmax"),
    ("hw3gpu/_cli/losses", "errors command"),
    ("hw3gpu/_cli/measure", "errors softmax batch_norm"),
    ("hw3gpu/_cli/operations", "command overhead report"),
    ("hw3gpu/_cli/standard_calls", "explain command"),
    ("hw3gpu/_cli", "report command"),
    ("hw3gpu/__", "explain command faults portability"),
    ("hw3gpu/_nn/conversion", "conversion"),
    ("hw3gpu/_nn/frozen", "frozen"),
    ("hw3gpu/_nn/fusion", "fusion"),
    ("hw3gpu/_nn/lazy_logits", "transformers"),
    ("hw3gpu/_nn/losses", "nn losses_are_torchs model_tools"),
    ("hw3gpu/_nn/tools", "model_tools nn"),
    ("hw3gpu/_nn/torch_modules", "frozen conversion model_tools"),
    ("hw3gpu/_nn/transformers", "transformers"),
    ("hw3gpu/_nn", "nn conversion fusion frozen model_tools"),
    ("hw3gpu/nn", "nn conversion frozen model_tools"),
    ("hw3gpu/distributed", "options distributed"),
    ("hw3gpu/_explain", "explain"),
    ("hw3gpu/_torch/activation", "batch_norm_act batch_norm_fused"),
    ("hw3gpu/_torch/autograd", "functional_softmax functional_cross_entropy functional_batch_norm batch_norm_masked"),
    ("hw3gpu/_torch/softmax", "functional_softmax"),
    ("hw3gpu/_torch/cross_entropy", "functional_cross_entropy cross_entropy_extras options reduced_loss row_weights"),
    ("hw3gpu/_torch/differentiable", "token_log_probs linear_token_log_probs"),
    ("hw3gpu/_torch/expected", "cross_entropy_step row_weights"),
    ("hw3gpu/_torch/linear_distillation", "linear_distillation"),
    ("hw3gpu/_torch/linear_token", "linear_token_log_probs"),
    ("hw3gpu/_torch/linear", "linear_cross_entropy linear_distillation"),
    ("hw3gpu/_torch/operators", "model_tools batch_norm_fused"),
    ("hw3gpu/_torch/row_weights", "row_weights"),
    ("hw3gpu/_torch/small", "small"),
    ("hw3gpu/_torch/token", "token_log_probs"),
    ("hw3gpu/_torch/distillation", "distillation"),
    ("hw3gpu/_torch/top_k", "top_k_distillation"),
    ("hw3gpu/_torch/trace", "trace_autograd"),
    ("hw3gpu/_torch/class_range", "functional_cross_entropy cross_entropy_extras distributed"),
    ("hw3gpu/_torch/batch_norm", f"{BATCH_NORM} nn bound"),
    ("hw3gpu/_torch/positions", "batch_norm_masked"),
    ("hw3gpu/_torch/bound", "bound_on_host bound"),
    ("hw3gpu/_torch/float16", "float16_scale"),
    ("hw3gpu/_torch/sync", "distributed"),
    ("hw3gpu/_torch/vocab", "options distributed"),
    ("hw3gpu/_torch/collectives", "distributed"),
    ("hw3gpu/_torch/dtensor", "distributed"),
    ("hw3gpu/_torch/sharding", "distributed"),
    ("hw3gpu", "functional functional_softmax functional_cross_entropy functional_batch_norm options"),
]  # fmt: skip
NOT_WIDER = (
    "batch_norm_graphs benchmarks blas_threads command cross_entropy_graphs examples gpu_benchmark kernels_hub packaging "
)
NOT_WIDER += "pages portability processors safety site supervisor training_page"
# What a fault that its own tests have not seen meets then: a case of every other test of the leg.
STEPS = ("sample", "own", "wider")
WIDER = ["--sample", "1", *(f"--ignore=tests/test_{name}.py" for name in NOT_WIDER.split())]


# ---------------------------------------------------------------------------------------------- places
@dataclass(frozen=True)
class Fault:
    """One edit of one file: the bytes from `start` to `end` become `new`."""

    file: str
    line: int
    kind: str
    start: int
    end: int
    old: str
    new: str

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}:{self.kind}:{self.old}:{self.new}"


COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
REDUCE = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "sum": "max", "exp": "exp2", "log": "log2"}
# decorators of what Numba compiles, and of what writes its code
NUMBA = {"inline", "outline", "exact", "reduction", "kernel", "intrinsic", "overload"}
# arguments whose value decides how a kernel is laid out, and not what it computes
LAYOUT = {"axis", "num_stages", "num_warps", "stacklevel", "key"}


def _with(node: ast.AST, **changes: object) -> ast.AST:
    other = copy.deepcopy(node)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def _expressions(node: ast.AST, jit: bool) -> Iterator[tuple[str, ast.AST]]:
    """(kind, what stands there instead) for each fault of one expression."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield "comparison", _with(node, ops=[COMPARE[type(node.ops[0])]()])
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield "arithmetic", _with(node, op=ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield "logic", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield "logic", node.operand
    elif isinstance(node, ast.IfExp):
        yield "branch", _with(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        yield "number", ast.Constant(not node.value if type(node.value) is bool else node.value + 1)
    elif isinstance(node, ast.Call):
        yield from _calls(node, jit)


def _calls(node: ast.Call, jit: bool) -> Iterator[tuple[str, ast.AST]]:
    name = ast.unparse(node.func)
    plain = len(node.args) >= 2 and not any(isinstance(a, ast.Starred) for a in node.args[:2])
    if not jit:
        return
    if any(k.arg == "mask" for k in node.keywords):
        yield "mask", _with(node, keywords=[k for k in node.keywords if k.arg not in ("mask", "other")])
    if any(k.arg == "other" for k in node.keywords):
        changed = [_with(k, value=ast.Constant(1.0)) if k.arg == "other" else k for k in node.keywords]
        yield "other", _with(node, keywords=changed)
    if name.endswith(".to") or name == "tl.cast":
        to = node.args[-1]
        yield (
            ("32 bits" if "int64" in ast.unparse(to) else "conversion"),
            node.func.value if name != "tl.cast" else node.args[0],
        )
    if name.startswith("tl.") and name[3:] in REDUCE:
        yield "reduction", _with(node, func=ast.parse(f"tl.{REDUCE[name[3:]]}", mode="eval").body)
    if name == "tl.where" and len(node.args) == 3:
        yield "branch", _with(node, args=[node.args[0], node.args[2], node.args[1]])
    if not name.startswith("tl.") and plain and ast.dump(node.args[0]) != ast.dump(node.args[1]):
        yield "order", _with(node, args=[node.args[1], node.args[0], *node.args[2:]])


def _statements(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ("barrier" if "barrier" in ast.unparse(node) else "left out"), ast.Pass()
    elif isinstance(node, ast.Raise):
        yield "left out", ast.Pass()
    elif isinstance(node, ast.AugAssign):
        yield "left out", ast.Pass()
        if type(node.op) in ARITHMETIC:
            yield "arithmetic", _with(node, op=ARITHMETIC[type(node.op)]())


def _compiler(node: ast.AST) -> str:
    """What compiles a function, 'triton' or 'numba'; empty for what runs as Python."""
    names = [ast.unparse(d) for d in node.decorator_list] if isinstance(node, ast.FunctionDef) else []
    if any("jit" in name for name in names):
        return "triton"
    return "numba" if any(name.partition("(")[0] in NUMBA for name in names) else ""


def places(file: str, source: bytes, jit_alone: bool) -> Iterator[Fault]:
    """Every fault that there is for a file; jit_alone: in the functions that Triton or Numba compiles."""
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))

    def fault(node: ast.AST, kind: str, new: str) -> Fault:
        start, end = lines[node.lineno - 1] + node.col_offset, lines[node.end_lineno - 1] + node.end_col_offset
        return Fault(file, node.lineno, kind, start, end, source[start:end].decode(), new)

    def walk(node: ast.AST, compiler: str) -> Iterator[Fault]:
        compiler = compiler or _compiler(node)
        if compiler or not jit_alone:
            for kind, new in _statements(node):
                yield fault(node, kind, ast.unparse(ast.fix_missing_locations(new)))
            if isinstance(node, ast.If | ast.While):
                yield fault(node.test, "branch", f"(not ({ast.unparse(node.test)}))")
            if isinstance(node, ast.expr):
                for kind, new in _expressions(node, compiler == "triton"):
                    text = ast.unparse(ast.fix_missing_locations(new))
                    simple = isinstance(new, ast.Constant | ast.Call | ast.Name | ast.Attribute)
                    yield fault(node, kind, text if simple else f"({text})")
        for name, value in ast.iter_fields(node):
            if name in ("decorator_list", "annotation", "returns", "args") and not isinstance(node, ast.Call):
                continue
            for child in value if isinstance(value, list) else [value]:
                layout = isinstance(child, ast.keyword) and child.arg in LAYOUT
                if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr) and not layout:
                    yield from walk(child, compiler)

    yield from walk(ast.parse(source), "")


def drawn(file: str, found: list[Fault], number: int, seed: int) -> list[Fault]:
    """`number` of the faults, one of each kind in turn."""
    generator = random.Random(f"{seed} {file}")
    kinds: dict[str, list[Fault]] = defaultdict(list)
    for one in found:
        kinds[one.kind].append(one)
    turns = [generator.sample(of, len(of)) for _, of in sorted(kinds.items())]
    generator.shuffle(turns)
    in_turn = [of[i] for i in range(max(map(len, turns), default=0)) for of in turns if i < len(of)]
    return in_turn[:number]


# ---------------------------------------------------------------------------------------------- runs
def copied(into: Path) -> Path:
    """The files that git keeps, and those of this folder that are new, in an empty folder."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name, follow_symlinks=False)
    return into


def import_what_has_no_fault(leg: str) -> None:
    """What takes two seconds to import, once: the runs are forks of this process."""
    if leg == "gpu":
        os.environ["TRITON_INTERPRET"] = "1"  # counts only before Triton is imported
    for name in ("hypothesis", "numba", "scipy.linalg", "torch", "triton.runtime.interpreter"):
        importlib.import_module(name)


def _pytest(tree: Path, said: int, seconds: int, arguments: list[str]) -> None:
    os.setpgid(0, 0)  # for killpg; the session, and with it its share of the processor, stays
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    sys.path[0] = str(tree)
    status = pytest.main(arguments)
    sys.stdout.flush()
    os._exit(status)


def failing(tree: Path, leg: str, options: list[str], seconds: int) -> str:
    """The first test that fails, or what ended the process; empty where all pass."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        child, end = os.fork(), time.monotonic() + 3 * seconds
        if not child:
            _pytest(tree, said.fileno(), seconds, ["-x", "-q", "-p", "no:cacheprovider", "--kernels", leg, *options])
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "its time ended"
            time.sleep(0.02)
        said.seek(0)
        text = said.read()
    if os.waitstatus_to_exitcode(ended[1]) in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        return ""
    named = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", text, re.MULTILINE)
    return named[1] if named else f"the process ended with {os.waitstatus_to_exitcode(ended[1])}: {text[-200:]!r}"


def steps_of(file: str) -> Iterator[tuple[str, list[str]]]:
    """(name, options of pytest) of the runs that a fault of this file meets in turn."""
    names = next(names for start, names in TESTS if file.startswith(start))
    own = [f"tests/test_{name}.py" for name in names.split()]
    yield "sample", ["--sample", "1", *(name for name in own if "traffic" not in name)]
    yield "own", own
    yield "wider", WIDER


def caught(tree: Path, leg: str, fault: Fault, steps: set[str], seconds: int) -> tuple[str, list[str]]:
    """The test that sees the fault, or an empty string; and pytest's options that run it."""
    path = tree / fault.file
    source = path.read_bytes()
    path.write_bytes(source[: fault.start] + fault.new.encode() + source[fault.end :])
    try:
        for step, options in steps_of(fault.file):
            if step in steps and (by := failing(tree, leg, options, seconds)):
                return f"{step}: {by}", [by] if by.startswith("tests/") else options
    finally:
        path.write_bytes(source)
    return "", []


def files_under(tree: Path, asked: list[str]) -> list[str]:
    found = []
    for name in asked:
        path = tree / name
        found += [path] if path.is_file() else sorted(path.rglob("*.py"))  # does not follow the link hw3gpu/kernels
    return [p.relative_to(tree).as_posix() for p in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="files or folders, from the root of the checkout")
    parser.add_argument("--each", type=int, default=10, metavar="N", help="faults a file (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--leg", choices=("cpu", "gpu"), help="whose tests run (gpu for kernels/gpu, else cpu)")
    parser.add_argument("--jit", action="store_true", help="only in functions that Triton or Numba compiles")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="the runs that a fault meets (all)")
    parser.add_argument("--record", type=Path, default=ROOT / "out" / "mutants.jsonl", metavar="FILE")
    parser.add_argument("--seconds", type=int, default=600, help="of processor time that a run may take (%(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no fault after these")
    asked = parser.parse_args()
    leg = asked.leg or ("gpu" if asked.files[0].startswith("kernels/gpu") else "cpu")
    import_what_has_no_fault(leg)
    asked.record.parent.mkdir(parents=True, exist_ok=True)
    lines = asked.record.read_text().splitlines() if asked.record.exists() else []
    known = {line["key"]: line for line in map(json.loads, lines)}
    end = time.monotonic() + 60 * asked.minutes
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder))
        of_files = [
            drawn(file, list(places(file, (tree / file).read_bytes(), asked.jit)), asked.each, asked.seed)
            for file in files_under(tree, asked.files)
        ]
        todo = [faults[i] for i in range(asked.each) for faults in of_files if i < len(faults)]
        sound: set[str] = set()
        for fault in todo:
            line = known.get(fault.key, asdict(fault) | {"key": fault.key, "by": "", "met": [], "seconds": 0.0})
            steps = {step for step in asked.steps if f"{leg} {step}" not in line["met"]}
            if line["by"] or not steps or time.monotonic() > end:
                continue
            began = time.monotonic()
            line["by"], options = caught(tree, leg, fault, steps, asked.seconds)
            if line["by"] and repr(options) not in sound:  # without the fault it passes
                if by := failing(tree, leg, options, asked.seconds):
                    raise SystemExit(f"without a fault fails {by}")
                sound.add(repr(options))
            met = [f"{leg} {step}" for step in sorted(steps)]
            line |= {"met": [*line["met"], *met], "seconds": line["seconds"] + round(time.monotonic() - began, 1)}
            known[fault.key] = line
            with asked.record.open("a") as out:
                out.write(json.dumps(line) + "\n")
            if not line["by"]:
                print(f"SURVIVED {fault.file}:{fault.line} {fault.kind}: {fault.old!r} -> {fault.new!r}", flush=True)
    report([known[fault.key] for fault in todo if fault.key in known])
    return 0


def report(found: list[dict]) -> None:
    """Counts by file and by kind."""
    for by in ("file", "kind"):
        of = Counter(line[by] for line in found)
        seen = Counter(line[by] for line in found if line["by"])
        for name in sorted(of):
            print(f"{seen[name]:4d} of {of[name]:4d} caught  {name}")
    everything = sum(1 for line in found if line["by"])
    print(f"{everything} of {len(found)} caught, {100 * everything / max(len(found), 1):.1f} %")


if __name__ == "__main__":
    sys.exit(main())
