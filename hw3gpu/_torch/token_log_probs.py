"""Log-probability of a class, entropy and log Σ exp of every row, with gradients: docs/derivations.md, section 3.8.

A call takes one of three ways. Eager: `_TokenLogProbs`, or `run` alone where no graph is needed. Traced: the operators below,
around the same functions. Inside `torch.func` transforms, in forward mode, and where a gradient is to be differentiated again:
the formula in PyTorch's operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import dispatch, outputs
from .._core.arrays import Array
from . import class_range, operators
from .autograd import accumulate_dtype, gradients_with_a_graph, graph_is_needed
from .class_range import judge_targets
from .cross_entropy_formula import entropy_of


class TokenLogProbs(NamedTuple):
    """Of every row, of target's shape, in float32 (float64 for float64); each has a graph where the logits ask for one.

    Attributes:
        log_prob: log p of the target class, p = softmax(logits / temperature).
        entropy: -Σ p log p.
        lse: log Σ exp(logits / temperature).
    """

    log_prob: Tensor
    entropy: Tensor
    lse: Tensor


def token_log_probs(logits: Tensor, target: Tensor, temperature: float, ignore_index: int, dim: int) -> TokenLogProbs:
    """`TokenLogProbs`; the arguments are checked, `dim` counts from the front."""
    if not operators.traced(logits) and operators.transformed():
        return formula(logits, target, temperature, ignore_index, dim)
    return with_sums(logits, target, temperature, ignore_index, dim, save=False)[0]


def with_sums(
    logits: Tensor, target: Tensor, temperature: float, ignore_index: int, dim: int, save: bool = True
) -> tuple[TokenLogProbs, Tensor | None]:
    """`TokenLogProbs`, and the sums of every row by kernels if `save`; outside of transforms."""
    rest = temperature, ignore_index, dim
    if operators.traced(logits):
        *found, stats = FORWARD(logits, target, *rest)
    elif graph_is_needed(logits):
        *found, stats = _TokenLogProbs.apply(logits, target, (rest, run, run_backward))
    else:
        *found, stats = run(logits, target, *rest, save)
    return TokenLogProbs(*found), stats


# ---------------------------------------------------------------------------------------------- forward and backward
def rows_of(logits: Tensor, target: Tensor, dim: int, which: str) -> tuple[Array, Array]:
    """Logits (N, V, S) and targets (N, S) as operands of the kernels of `which`."""
    z = outputs.folded(logits, dim, which)
    return z, dispatch.kernel_view(which)(target.reshape(z.shape[0], z.shape[2]))


def run(
    logits: Tensor, target: Tensor, temperature: float, ignore_index: int, dim: int, save: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The three numbers of every row, and what the backward pass needs if `save`, else None."""
    which = dispatch.backend(logits)
    view = dispatch.kernel_view(which)
    z, t = rows_of(logits, target, dim, which)
    rows = z.shape[0], z.shape[2]
    acc = accumulate_dtype(logits)
    log_prob, entropy, lse = (logits.new_empty(target.shape, dtype=acc) for _ in range(3))
    stats = lse.new_empty(4, *rows) if save else None
    invalid = class_range.flag(logits, rows[0] * rows[1])
    dispatch.token_log_probs(which).forward(
        z, t, view(log_prob.view(rows)), view(entropy.view(rows)), view(lse.view(rows)), view(stats), view(invalid),
        ignore_index=ignore_index, temperature=temperature,
    )  # fmt: skip
    judge_targets(logits, target, invalid, logits.shape[dim], ignore_index)
    return log_prob, entropy, lse, stats


def run_backward(
    g_log_prob: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None, logits: Tensor, target: Tensor, stats: Tensor,
    temperature: float, ignore_index: int, dim: int,
) -> Tensor:  # fmt: skip
    """∂ℓ/∂logits from the three upstream gradients, None where one is zero."""
    which = dispatch.backend(logits)
    view = dispatch.kernel_view(which)
    z, t = rows_of(logits, target, dim, which)
    dlogits, dz = outputs.output(logits, dim, view)
    g_log_prob, g_entropy, g_lse = (view(g if g is None else g.reshape(t.shape)) for g in (g_log_prob, g_entropy, g_lse))
    dispatch.token_log_probs(which).backward(
        z, t, view(stats), g_log_prob, g_entropy, g_lse, dz, ignore_index=ignore_index, temperature=temperature
    )
    return dlogits


# ---------------------------------------------------------------------------------------------- in PyTorch's operations
def formula(logits: Tensor, target: Tensor, temperature: float, ignore_index: int, dim: int) -> TokenLogProbs:
    """`TokenLogProbs` in PyTorch's operations, which have derivatives of every order and go through every transform."""
    z = logits.to(accumulate_dtype(logits)) / temperature
    log_p = torch.log_softmax(z, dim)
    target = target.long()  # in fewer bits PyTorch wraps the number that it is compared with
    kept = target != ignore_index
    log_prob = log_p.gather(dim, torch.where(kept, target, 0).unsqueeze(dim)).squeeze(dim)
    return TokenLogProbs(*(torch.where(kept, v, 0.0) for v in (log_prob, entropy_of(log_p, dim), torch.logsumexp(z, dim))))


# ---------------------------------------------------------------------------------------------- autograd
class _TokenLogProbs(torch.autograd.Function):
    """Forward reads the logits once and keeps four numbers a row; backward reads them once and writes the gradient.

    `rest` has the functions that run: the kernels, or under a tracer the operators around them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, rest: tuple[tuple[float, int, int], Callable[..., Any], Callable[..., Any]]
    ) -> tuple[Tensor, ...]:
        options, forward, backward = rest
        *found, stats = forward(logits, target, *options)
        ctx.save_for_backward(logits, target, stats)
        ctx.options, ctx.backward = options, backward
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return *found, stats

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, None, None]:
        logits, target, stats = ctx.saved_tensors
        upstream = upstream[:3]
        if all(g is None for g in upstream):
            return None, None, None
        if torch.is_grad_enabled():  # the gradient will be differentiated again
            found = gradients_with_a_graph(lambda: formula(logits, target, *ctx.options), (logits,), upstream, (True,))
            return found[0], None, None
        return ctx.backward(*upstream, logits, target, stats, *ctx.options), None, None


def _fake(logits: Tensor, target: Tensor, temperature: float, ignore_index: int, dim: int) -> tuple[Tensor, ...]:
    log_prob, entropy, lse = (logits.new_empty(target.shape, dtype=accumulate_dtype(logits)) for _ in range(3))
    return log_prob, entropy, lse, lse.new_empty((4, math.prod(logits.shape[:dim]), math.prod(logits.shape[dim + 1 :])))


_OPTIONS = "float temperature, int ignore_index, int dim"
BACKWARD = operators.define(
    "token_log_probs_backward(Tensor? g_log_prob, Tensor? g_entropy, Tensor? g_lse, Tensor logits, Tensor target, "
    f"Tensor stats, {_OPTIONS}) -> Tensor",
    run_backward,
    lambda g_log_prob, g_entropy, g_lse, logits, *rest: operators.fake_output(logits, rest[-1]),
)
FORWARD: Any = operators.define(
    f"token_log_probs(Tensor logits, Tensor target, {_OPTIONS}) -> (Tensor log_prob, Tensor entropy, Tensor lse, Tensor stats)",
    run,
    _fake,
    lambda logits, target, *options: _TokenLogProbs.apply(
        logits, target, (options, partial(operators.below_autograd, FORWARD), BACKWARD)
    ),
)
