"""The launches that evidence step 3 compiles: between them they take every plan, dtype and option of the Triton kernels.

Each runs the library's own host code on `meta` tensors, under a stand-in driver. `heavy` ones are their plan's heaviest set of
options: the tests compile these, `make evidence` all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hw3gpu.kernels.gpu import batch_norm, cross_entropy, distillation, moments, softmax, token_log_probs

from .. import call_cases
from .case import (
    Case,
    batch_norm_moves,
    bytes_of,
    cross_entropy_moves,
    distillation_moves,
    softmax_moves,
    token_log_probs_moves,
)

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(shape: tuple[int, int, int], dtype: torch.dtype, strided: bool) -> torch.Tensor:
    """(N, V, S), every second number along V where strided."""
    N, V, S = shape
    return _meta((N, 2 * V, S), dtype)[:, ::2] if strided else _meta(shape, dtype)


def _softmax_case(shape: tuple[int, int, int], dtype: torch.dtype, strided: bool = False) -> Callable[[], None]:
    def run() -> None:
        z, y = _rows(shape, dtype, strided), _rows(shape, dtype, strided)
        softmax.forward(z, y)
        softmax.backward(z, z, y)

    return run


@dataclass(frozen=True)
class Loss:
    """Options of cross entropy that change what a thread keeps."""

    soft: bool = False
    smoothing: float = 0.0
    softcap: float | None = None
    more: bool = False  # class weights, z-loss, a scale, upstream gradients, a denominator and all statistics of the rows


def _cross_entropy_case(
    shape: tuple[int, int, int], dtype: torch.dtype, loss: Loss, at_once: bool, strided: bool = False
) -> Callable[[], None]:  # fmt: skip
    def run() -> None:
        N, V, S = shape
        acc = _acc(dtype)
        z, dz = _rows(shape, dtype, strided), _rows(shape, dtype, strided)
        target = _rows(shape, dtype, strided) if loss.soft else _meta((N, S), torch.int64)
        weight = _meta((V,), acc) if loss.more else None
        losses, stats = _meta((N, S), acc), _meta((6 if loss.more else 3, N, S), acc)
        one, invalid = _meta((1,), acc), _meta((1,), torch.int64)
        reduced: dict[str, Any] = {"total": one, "denominator": one, "mean": True}
        options: dict[str, Any] = {
            "ignore_index": -100, "label_smoothing": loss.smoothing, "z_loss": 1e-4 * loss.more, "softcap": loss.softcap,
            "logit_scale": 0.7 if loss.more else 1.0,
        }  # fmt: skip
        if at_once:
            extras: dict[str, Any] = {"stats": stats, "upstream": losses, **reduced} if loss.more else {}
            cross_entropy.forward_backward(z, target, weight, losses, dz, invalid, **extras, **options)
        else:
            cross_entropy.forward(z, target, weight, losses, stats, invalid, **reduced, **options)
            cross_entropy.backward(z, target, weight, stats, one.expand(N, S), one, dz, **options)

    return run


def _reduce_case(rows: int, dtype: torch.dtype, soft: bool) -> Callable[[], None]:
    def run() -> None:
        acc = _acc(dtype)
        target = _meta((rows, 10, 1), dtype) if soft else _meta((rows, 1), torch.int64)
        one = _meta((1,), acc)
        cross_entropy.reduce(_meta((rows, 1), acc), target, _meta((10,), acc), one, one, ignore_index=-100)

    return run


def _token_log_probs_case(shape: tuple[int, int, int], dtype: torch.dtype, strided: bool = False) -> Callable[[], None]:
    def run() -> None:
        N, _, S = shape
        z, dz, target = _rows(shape, dtype, strided), _rows(shape, dtype, strided), _meta((N, S), torch.int64)
        log_prob, entropy, lse = (_meta((N, S), _acc(dtype)) for _ in range(3))
        stats, invalid = _meta((4, N, S), _acc(dtype)), _meta((1,), torch.int64)
        options: dict[str, Any] = {"ignore_index": -100, "temperature": 0.7}
        token_log_probs.forward(z, target, log_prob, entropy, lse, stats, invalid, **options)
        token_log_probs.backward(z, target, stats, log_prob, entropy, lse, dz, **options)

    return run


def _distillation_case(
    shape: tuple[int, int, int], dtype: torch.dtype, kind: str, strided: bool, both: bool
) -> Callable[[], None]:
    """`both`: a mask, and gradients of student and teacher."""

    def run() -> None:
        N, _, S = shape
        student, teacher, dstudent, dteacher = (_rows(shape, dtype, strided) for _ in range(4))
        loss, stats, mask = _meta((N, S), _acc(dtype)), _meta((8, N, S), _acc(dtype)), _meta((N, S), torch.uint8)
        options: dict[str, Any] = {"kind": kind, "beta": 0.3, "temperature": 0.7}
        given = student, teacher, mask if both else None
        distillation.forward(*given, loss, stats, **options)
        distillation.backward(*given, stats, loss, dstudent, dteacher if both else None, **options)

    return run


def _batch_norm_case(
    shape: tuple[int, int, int], dtype: torch.dtype, channels_last: bool, fused: bool, training: bool, masked: bool = False,
    activation: str | None = None,
) -> Callable[[], None]:  # fmt: skip
    """`fused`: with a residual, and where no activation is named with ReLU and its mask."""

    def run() -> None:
        N, C, S = shape
        acc = _acc(dtype)
        x = _meta((N, S, C), dtype).transpose(1, 2) if channels_last else _meta(shape, dtype)
        y, dx = torch.empty_like(x), torch.empty_like(x)
        residual = torch.empty_like(x) if fused else None
        mask = _meta((batch_norm.mask_size(x),), torch.uint8) if fused and not activation else None
        mean = _meta((2, C), acc)
        var, rstd, gamma, beta, running_mean, running_var, dgamma, dbeta = (_meta((C,), acc) for _ in range(8))
        ahead: dict[str, Any] = {"residual": residual, "mask": mask, "activation": activation}
        back: dict[str, Any] = {"mask": mask, "dresidual": residual, "activation": activation}
        count: dict[str, Any] = {}
        if masked:
            ahead["valid"] = back["valid"] = _meta((N * S // 8 + 2,), torch.uint8)
            count = {"count": _meta((1,), torch.int64)} if training else {}
        if activation:  # what went into it is computed again
            back |= {"beta": beta, "residual": residual}
        if training:
            running = running_mean, running_var
            batch_norm.forward(x, gamma, beta, y, mean, var, rstd, *running, eps=1e-5, momentum=0.1, **(ahead | count))
            batch_norm.backward(x, x, mean, rstd, gamma, dx, dgamma, dbeta, **(back | count))
        else:
            batch_norm.normalize(x, mean, rstd, gamma, beta, y, **ahead)
            batch_norm.inference_backward(x, x, mean, rstd, gamma, dx, dgamma, dbeta, **back)

    return run


def _moments_case(shape: tuple[int, int, int]) -> Callable[[], None]:
    def run() -> None:
        B, _, m = shape
        state = (_meta(size, F64) for size in ((B, m), (2, B, m), (2, B, m, m), (B, m)))
        moments.update(_meta(shape, F64), *state, count=0)

    return run


ROWS = (
    (4096, 10, 1),
    (4096, 1000, 1),
    (4096, 1001, 1),
    (512, 8195, 1),
    (512, 16384, 1),
    (512, 16387, 1),
    (512, 16391, 1),
    (512, 32768, 1),
    (512, 32771, 1),
    (512, 32775, 1),
    (512, 50257, 1),
    (256, 65536, 1),
    (8, 128, 512),
    (8, 1000, 512),
)
LOSSES = {
    "hard": Loss(),
    "hard, more": Loss(more=True),
    "hard, smoothing": Loss(smoothing=0.1),
    "hard, softcap": Loss(softcap=30.0),
    "hard, all": Loss(smoothing=0.1, softcap=30.0, more=True),
    "soft": Loss(soft=True),
    "soft, all": Loss(soft=True, smoothing=0.1, softcap=30.0, more=True),
}
# the longest rows that each plan takes are its heaviest, with the most that its threads keep
HEAVY_ROWS = {
    ("softmax", 16387, F32),
    ("softmax", 16391, BF16),
    ("softmax", 32771, F32),
    ("softmax", 50257, BF16),
    ("hard, more", 32768, F32),
    ("hard, more", 32771, F32),
    ("hard, more", 32775, BF16),
    ("hard, more", 50257, F32),
    ("hard, more", 50257, BF16),
    ("hard, more", 65536, BF16),
    ("hard, softcap", 16387, F32),
    ("hard, smoothing", 16391, BF16),
    ("hard, smoothing", 50257, F32),
    ("soft", 16384, BF16),
    ("soft", 16387, F32),
    ("soft", 50257, F32),
    ("hard, all", 8195, F32),
    ("soft, all", 8195, F32),
    ("soft, all", 50257, F32),
}
HEAVY_STEPS = {("hard, all", 1001, F32), ("soft, all", 1001, BF16), ("hard, more", 32771, F32)}
# (loss or softmax, V, dtype) of rows with a stride between their numbers
STRIDED = [
    (name, V, dtype)
    for dtype in (F32, BF16, F64)
    for name in ("softmax", "hard, more", "soft, all")
    for V in (4096, 8192, 50257)
]
# (shape, dtypes, strided, heavy ones): of log-probabilities, each plan of rows of which nothing stays
TOKENS: tuple[tuple[tuple[int, int, int], tuple[torch.dtype, ...], bool, tuple[torch.dtype, ...]], ...] = (
    ((4096, 10, 1), (F32,), False, ()),
    ((4096, 1000, 1), (F32, BF16), False, ()),
    ((4096, 1001, 1), (F32, BF16, F16, F64), False, ()),
    ((512, 32768, 1), (F32, BF16), False, ()),
    ((512, 50257, 1), (F32, BF16, F16, F64), False, (F32, BF16)),
    ((8192, 128256, 1), (BF16,), False, ()),
    ((8, 1000, 512), (F32, BF16, F64), False, ()),
    ((512, 4096, 1), (F32, BF16, F64), True, ()),
    ((512, 50257, 1), (F32, BF16, F64), True, ()),
)
# Divergences of logits, as `TOKENS`; the heaviest have a mask and both gradients
DISTILLATIONS: tuple[tuple[tuple[int, int, int], tuple[torch.dtype, ...], bool, tuple[torch.dtype, ...]], ...] = (
    ((4096, 1000, 1), (F32, BF16), False, ()),
    ((4096, 1001, 1), (F32, BF16, F64), False, ()),
    ((512, 8192, 1), (F32, BF16), False, ()),
    ((512, 32768, 1), (F32, BF16), False, ()),
    ((512, 50257, 1), (F32, BF16, F16, F64), False, (F32, BF16)),
    ((8192, 128256, 1), (BF16,), False, ()),
    ((8, 1000, 512), (F32, BF16, F64), False, ()),
    ((512, 50257, 1), (F32, BF16, F64), True, ()),
)
# (shape, channels-last)
CHANNELS = (
    ((16, 3000, 4), False),
    ((64, 2048, 49), False),
    ((128, 2048, 49), False),
    ((256, 2048, 49), False),
    ((300, 256, 49), False),
    ((512, 256, 25), False),
    ((1024, 256, 9), False),
    ((64, 512, 196), False),
    ((16, 256, 1023), False),
    ((16, 256, 1024), False),
    ((20, 256, 783), False),
    ((20, 256, 784), False),
    ((32, 256, 3136), False),
    ((32, 64, 3136), False),
    ((8, 3, 262144), False),
    ((4096, 512, 1), False),
    ((64, 2048, 49), True),
    ((32, 64, 3136), True),
    ((8, 3, 262144), True),
)
# in evaluation, and in float16 and float64, these alone
FEW_CHANNELS = {((64, 2048, 49), False), ((20, 256, 784), False), ((32, 256, 3136), False), ((32, 64, 3136), True)}
# of these, (shape, channels-last, dtype, fused): the largest tiles that a program owns, and a split channel
HEAVY_CHANNELS = {
    ((128, 2048, 49), False, BF16, True),
    ((256, 2048, 49), False, F32, False),
    ((16, 256, 1023), False, F32, False),
    ((16, 256, 1024), False, F32, True),
    ((20, 256, 784), False, F32, False),
    ((32, 256, 3136), False, F32, True),
    ((32, 64, 3136), True, F32, True),
}
# where some positions do not count: rows that fit, on 16 bytes and off them, split channels, and channels-last
MASKED_CHANNELS = (
    ((256, 2048, 49), False),
    ((16, 256, 1023), False),
    ((16, 256, 1024), False),
    ((32, 256, 3136), False),
    ((32, 64, 3136), True),
)
# (activation, shape, dtype, what else there is): each activation, forward and backward, and each kind of plan of those two
ACTIVATIONS: tuple[tuple[str, tuple[int, int, int], torch.dtype, str], ...] = (
    ("silu", (16, 3000, 4), F32, ""),
    ("gelu", (64, 2048, 49), F32, "residual"),
    ("gelu", (128, 2048, 49), BF16, ""),
    ("gelu", (16, 1024, 512), F32, "masked residual"),
    ("gelu", (16, 256, 1024), F32, ""),
    ("gelu", (16, 256, 1024), BF16, "masked residual"),
    ("silu", (16, 256, 1023), BF16, "masked"),
    ("silu", (32, 256, 3136), F32, ""),
    ("hardswish", (128, 256, 3136), BF16, ""),
    ("hardswish", (16, 512, 49), F32, "channels-last"),
    ("gelu", (16, 512, 49), F32, "channels-last masked residual"),
    ("silu", (32, 64, 3136), F32, "channels-last residual"),
    ("gelu", (32, 64, 3136), F32, "channels-last residual"),
    ("gelu", (32, 64, 3136), BF16, "channels-last"),
    ("gelu", (8, 256, 1024), F64, ""),
    ("gelu", (20, 256, 784), F16, "evaluation"),
)
HEAVY_ACTIVATIONS = {("gelu", (16, 256, 1024), F32), ("gelu", (16, 1024, 512), F32), ("gelu", (32, 64, 3136), BF16)}
POINTS = ((1, 100_000, 4), (1, 10_000, 64), (1, 10_000, 256), (256, 1000, 16))
# the longest rows off 16 bytes are not the same for 4 bytes and for 2; a smaller list for dtypes that differ from float32 and
# bfloat16 in their conversions, or in how many lanes fit
LEFT_OUT = {F32: {16391, 32775}, BF16: {8195, 16387, 32771}}
FEW_ROWS = {1001, 16391, 50257, 65536}
# the backward kernel keeps nothing of a row: one plan for rows on 16 bytes, one for rows off them, one for neighbours along S
STEP_ROWS = {(4096, 10, 1), (4096, 1000, 1), (4096, 1001, 1), (512, 16391, 1), (512, 32771, 1), (512, 50257, 1), (8, 1000, 512)}
FEW_LOSSES = {"hard", "hard, more", "soft, all"}


def cases() -> Iterator[Case]:
    """Of the rows, each set of options, loss and gradient at once and in two steps; of the channels, plain and fused.

    The calls come first: docs/time_model.md has a row for each.
    """
    yield from call_cases.cases()
    for dtype in (F32, BF16, F16, F64):
        few = dtype in (F16, F64)
        for shape in ROWS:
            if shape[1] not in FEW_ROWS if few else shape[1] in LEFT_OUT[dtype]:
                continue
            at = "x".join(map(str, shape))
            size = bytes_of(shape, dtype)
            heavy = ("softmax", shape[1], dtype) in HEAVY_ROWS
            yield Case(f"softmax {at}", dtype, heavy, _softmax_case(shape, dtype), softmax_moves(size))
            for name, loss in LOSSES.items():
                if few and name not in FEW_LOSSES:
                    continue
                for at_once, how, heaviest in ((True, "at once", HEAVY_ROWS), (False, "in two steps", HEAVY_STEPS)):
                    if not at_once and (shape not in STEP_ROWS or name in ("hard, smoothing", "hard, softcap")):
                        continue
                    heavy = (name, shape[1], dtype) in heaviest
                    label = f"cross entropy {how}, {name} {at}"
                    run = _cross_entropy_case(shape, dtype, loss, at_once)
                    yield Case(label, dtype, heavy, run, cross_entropy_moves(size, loss.soft, at_once))
        for soft in (False, True):
            name = f"cross entropy, {'soft' if soft else 'hard'}, reduction"
            yield Case(name, dtype, dtype == F32 and not soft, _reduce_case(100_000, dtype, soft))
        for shape, channels_last in CHANNELS:
            at = "x".join(map(str, shape)) + (" channels-last" if channels_last else "")
            for fused in (False, True):
                heavy = (shape, channels_last, dtype, fused) in HEAVY_CHANNELS
                for training in (True, False):
                    how = ("training" if training else "evaluation") + (", fused" if fused else "")
                    run = _batch_norm_case(shape, dtype, channels_last, fused, training)
                    if (training and not few) or ((training or not few) and (shape, channels_last) in FEW_CHANNELS):
                        moves = batch_norm_moves(bytes_of(shape, dtype), math.prod(shape), fused, training)
                        yield Case(f"batch norm {how} {at}", dtype, heavy and training, run, moves)
    for shape, channels_last in MASKED_CHANNELS:
        at = "x".join(map(str, shape)) + (" channels-last" if channels_last else "")
        for dtype in (F32, BF16):
            for fused in (False, True):
                run = _batch_norm_case(shape, dtype, channels_last, fused, training=True, masked=True)
                moves = batch_norm_moves(bytes_of(shape, dtype), math.prod(shape), fused, training=True)
                name = f"batch norm training, masked{', fused' if fused else ''} {at}"
                yield Case(name, dtype, fused and dtype == F32 and shape[2] == 1024, run, moves)
    for activation, shape, dtype, more in ACTIVATIONS:
        training, channels_last = "evaluation" not in more, "channels-last" in more
        masked, fused = "masked" in more, "residual" in more
        run = _batch_norm_case(shape, dtype, channels_last, fused, training, masked, activation)
        moves = batch_norm_moves(bytes_of(shape, dtype), math.prod(shape), fused, training, activation)
        at = "x".join(map(str, shape)) + (" channels-last" if channels_last else "")
        name = f"{'training' if training else 'evaluation'}{', masked' * masked}{', residual' * fused}, {activation}"
        yield Case(f"batch norm {name} {at}", dtype, (activation, shape, dtype) in HEAVY_ACTIVATIONS, run, moves)
    for name, V, dtype in STRIDED:
        shape, at, heavy = (512, V, 1), f"512x{V}x1", V == 50257 and name == "hard, more"
        size = bytes_of(shape, dtype, strided=True)
        if name == "softmax":
            yield Case(f"softmax, strided {at}", dtype, heavy, _softmax_case(shape, dtype, strided=True), softmax_moves(size))
        else:
            run = _cross_entropy_case(shape, dtype, LOSSES[name], at_once=True, strided=True)
            moves = cross_entropy_moves(size, LOSSES[name].soft, at_once=True)
            yield Case(f"cross entropy at once, {name}, strided {at}", dtype, heavy, run, moves)
    for shape, dtypes, strided, heavies in TOKENS:
        name = f"token log probs{', strided' if strided else ''} {'x'.join(map(str, shape))}"
        for dtype in dtypes:
            run, moves = _token_log_probs_case(shape, dtype, strided), token_log_probs_moves(bytes_of(shape, dtype, strided))
            yield Case(name, dtype, dtype in heavies, run, moves)
    for kind in ("forward", "jensen shannon"):
        for shape, dtypes, strided, heavies in DISTILLATIONS:
            name = f"distillation {kind}{', strided' if strided else ''} {'x'.join(map(str, shape))}"
            for dtype in dtypes:
                both = dtype in heavies
                run = _distillation_case(shape, dtype, kind.replace(" ", "_"), strided, both)
                yield Case(name, dtype, both, run, distillation_moves(bytes_of(shape, dtype, strided), 1 + both))
    for shape in POINTS:
        moves = {"_add_runs_kernel": (bytes_of(shape, F64), 0)}
        yield Case(f"moments {'x'.join(map(str, shape))}", F64, False, _moments_case(shape), moves)
