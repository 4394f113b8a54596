"""Functions over the processes of a `torch.distributed` group: gloo on the CPU, NCCL on GPUs.

Each is called by every process of the group, in the same order. Nothing here waits for the device, and results are the same
bits on every process that shares them: what processes send is merged in order of rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import functional
from ._core import check
from ._torch import arguments, cross_entropy_formula, operators, vocab_parallel_arguments, vocab_parallel_rows
from ._torch import sync_batch_norm as _sync_batch_norm
from ._torch import vocab_parallel_cross_entropy as _vocab_parallel_cross_entropy
from ._torch import vocab_parallel_linear_cross_entropy as _vocab_parallel_linear_cross_entropy
from ._torch.autograd import as_dtype, graph_is_needed
from ._torch.cross_entropy_formula import CrossEntropyStatistics, Options
from ._torch.positions import packed
from ._torch.row_weights import RowWeights, weighed
from ._torch.token_log_probs import TokenLogProbs

__all__ = [
    "sync_batch_norm",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_linear_token_log_probs",
    "vocab_parallel_token_log_probs",
]


def _or_all(group: Any) -> Any:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected None or a process group, got {group!r} ({type(group).__name__})")
    if group is None and dist.group.WORLD is None:
        raise RuntimeError("group: expected a process group, or torch.distributed.init_process_group called before")
    return dist.group.WORLD if group is None else group


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: Any = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """`functional.batch_norm` by the mean and variance over the batches of all processes of `group` (None: all).

    In training each process sends 2 C + 1 numbers forward and, where `input` needs a gradient, 2 C backward. Batches may differ
    in size; one may be empty, and its process takes part (its loss must depend on the result, if only by a sum of nothing, for
    backward to be called). With mask or lengths a process sends the number of its values that count, which may be 0. Gradients
    of weight and bias are this process's own, as everywhere in data parallelism. In evaluation, and in a group of one, it is
    `functional.batch_norm`.

    Raises what `functional.batch_norm` raises; RuntimeError under `torch.func` transforms, for a second derivative, and in
    `torch.export` of a model in training.
    """
    group = _or_all(group)
    if type(training) is not bool:
        raise TypeError(f"training: expected a bool, got {training!r}")
    if not training or dist.get_world_size(group) == 1:
        return functional.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps,
            residual=residual, activation=activation, mask=mask, lengths=lengths,
        )  # fmt: skip
    _, momentum, eps = arguments.batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, alone=False
    )
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "sync_batch_norm: export the model in evaluation: what moves an exported model from training to evaluation would "
            "pass this over, and leave it in training"
        )
    residual = arguments.fused(input, residual, activation)
    counted = arguments.counted(input, mask, lengths)
    positions = None if counted is None else packed(counted)
    rest = _sync_batch_norm.Rest(
        running_mean, running_var, momentum, eps, activation, group.group_name, positions=positions
    )  # fmt: skip
    return _sync_batch_norm.sync_batch_norm(input, weight, bias, residual, rest)


def vocab_parallel_cross_entropy(
    logits_shard: Tensor,
    target: Tensor,
    group: Any = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    all_ignored: str = "nan",
    return_stats: bool = False,
    differentiable: bool = False,
    loss_dtype: torch.dtype | None = None,
    normalizer: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    vocab_start: int | None = None,
) -> Any:
    """`functional.cross_entropy` of logits that are divided over `group` (None: all processes) along their classes.

    logits_shard: this process's classes of all rows, (V_r,), (N, V_r) or (N, V_r, d1, …), in order of rank; V_r may differ
    from process to process, and be 0. target: the classes (), (N,) or (N, d1, …) of the whole vocabulary, the same on every
    process. weight: (V_r,), the weights of this process's classes. vocab_start: the number of the shard's first class; left
    out, processes exchange their sizes first, in a collective of one number each. Give it on every process or on none.

    return_stats: also `CrossEntropyStatistics` of every row, the same on every process, without a gradient; differentiable:
    log_prob, entropy and lse with one. all_ignored, logit_scale, loss_dtype, normalizer and token_weight, of target's shape, as
    of `functional.cross_entropy`, the same on every process.

    One collective forward, of six numbers a row (eight with statistics), and none backward: the loss is the same on every
    process, and each has the gradient of its own shard. Do not divide it, or sum it, over the group.

    Raises TypeError for kinds and dtypes (probabilities as target among them), ValueError for shapes and values, IndexError for
    a class that no process has, on the CPU; on a GPU nothing waits for the device, and such a row gives NaN. RuntimeError for a
    second derivative.
    """
    arguments.statistics(return_stats, differentiable)
    weight = vocab_parallel_arguments.cross_entropy(logits_shard, target, weight, ignore_index, reduction, label_smoothing)
    vocab_parallel_arguments.first_class(vocab_start)
    z_loss, softcap, logit_scale = arguments.extra(z_loss, softcap, logit_scale, "auto", all_ignored)
    arguments.asked_dtype(loss_dtype)
    if differentiable:
        arguments.differentiable(return_stats)
    if return_stats:
        arguments.predictable(logits_shard.shape[min(logits_shard.dim() - 1, 1)], logits_shard, " a process")
    shape, zero = tuple(target.shape), all_ignored == "zero"
    by = arguments.row_weights(token_weight, normalizer, shape, logits_shard, zero, "logits_shard") or RowWeights(None, None)
    ignore_index = index(ignore_index)
    asked = Options(reduction, ignore_index, float(label_smoothing), z_loss, softcap, zero, logit_scale)
    start, name = -1 if vocab_start is None else index(vocab_start), _or_all(group).group_name
    rest = _vocab_parallel_cross_entropy.Rest(asked, start, name, return_stats, differentiable)
    loss, w_t, taken, *numbers = _vocab_parallel_cross_entropy.vocab_parallel_cross_entropy(logits_shard, target, weight, rest)
    if logits_shard.device.type == "cpu" and not operators.traced(logits_shard):
        vocab_parallel_rows.every_class_exists(taken, target, ignore_index)
    if by.normalizer is not None and reduction != "none":
        asked = asked._replace(reduction="sum")
    loss, w_t = loss.reshape(shape), w_t.reshape(shape)
    loss = cross_entropy_formula.reduced(loss, w_t != 0, w_t, None, asked, by.token_weight, counted=w_t)
    loss = loss if by.normalizer is None else loss / by.normalizer
    loss = as_dtype(loss, loss_dtype or arguments.loss_dtype(logits_shard, target))
    return (loss, _statistics(numbers, target, ignore_index, logits_shard)) if return_stats else loss


def _statistics(
    numbers: Sequence[Tensor], target: Tensor, ignore_index: int, *depends_on: Tensor | None
) -> CrossEntropyStatistics:
    """depends_on: what the statistics would have the gradients of, if they have none."""
    stats = vocab_parallel_rows.statistics(numbers, target, ignore_index)
    has_gradients = len(numbers[1]) or not graph_is_needed(*depends_on)
    return stats if has_gradients else cross_entropy_formula.without_derivatives(stats, *depends_on)


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    group: Any = None,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    gradient: str = "auto",
    all_ignored: str = "nan",
    return_stats: bool = False,
    differentiable: bool = False,
    loss_dtype: torch.dtype | None = None,
    normalizer: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    chunk_rows: int | None = None,
    vocab_start: int | None = None,
) -> Any:
    """`functional.linear_cross_entropy` where the rows of the weight, its classes, are divided over `group` (None: all).

    There are never more than two chunks of `chunk_rows` rows of this process's logits, by default some eleventh of all rows.
    One collective a chunk in the forward pass, of six numbers a row (eight with statistics), which is on its way while the next
    chunk's logits are made; one in the backward pass, which adds up the gradient of `input` in float32 (float64 for float64).
    The loss is the same on every process. Each has the gradient of its own rows of the weight, and all have that of `input`:
    do not divide these, or sum them, over the group. (docs/derivations.md, section 3.10)

    input: (…, D), the same on every process. linear_weight: (V_r, D), this process's classes, in order of rank, of input's
    dtype; V_r may differ from process to process, and be 0. linear_bias: (V_r,). target: classes (…) of the whole vocabulary,
    the same on every process. weight: (V_r,), the weights of this process's classes. vocab_start: the number of the first
    class here; left out, processes exchange their sizes first, in a collective of one number each. Every other argument,
    `chunk_rows` and whether `input` needs a gradient has to be the same on every process; backward is called on every process,
    or on none.

    gradient: "forward", what "auto" is for a reduced loss, makes the gradients in the forward pass: three products. "backward"
    makes the logits twice. all_ignored: the mean over no rows is "nan" or "zero". return_stats: also `CrossEntropyStatistics`
    of every row, the same on every process, without a gradient; differentiable: log_prob, entropy and lse with one, and
    `gradient` is "backward". logit_scale, loss_dtype, normalizer and token_weight, of target's shape, as of
    `functional.cross_entropy`. Under autocast the products are in its dtype.

    Raises TypeError for kinds and dtypes (probabilities as target among them), ValueError for shapes and values, IndexError for
    a class that no process has, on the CPU; on a GPU nothing waits for the device, and such a row gives NaN. RuntimeError for a
    second derivative and under `torch.func` transforms.
    """
    arguments.statistics(return_stats, differentiable)
    z_loss, softcap, logit_scale = arguments.extra(z_loss, softcap, logit_scale, gradient, all_ignored)
    arguments.asked_dtype(loss_dtype)
    ignore_index = check.integer_value(ignore_index, "ignore_index")
    asked = Options(reduction, ignore_index, label_smoothing, z_loss, softcap, all_ignored == "zero", logit_scale)
    problem = vocab_parallel_arguments.linear_cross_entropy(
        input, linear_weight, target, linear_bias, weight, asked, vocab_start
    )
    if gradient == "forward" and reduction == "none":
        raise ValueError("gradient: expected 'auto' or 'backward' with reduction 'none', got 'forward'")
    rows = arguments.chunk_rows(chunk_rows)
    if differentiable:
        arguments.differentiable(return_stats)
    if return_stats:
        arguments.predictable(len(linear_weight), input, " a process")
    by = arguments.row_weights(token_weight, normalizer, tuple(target.shape), input, asked.zero_if_ignored)
    if by is not None:
        arguments.gradient_of_rows(gradient, by)
        reduction = "none" if by.token_weight is not None else reduction if reduction == "none" else "sum"
    of_rows = asked._replace(label_smoothing=float(label_smoothing), reduction=reduction)
    start, name = -1 if vocab_start is None else index(vocab_start), _or_all(group).group_name
    rest = _vocab_parallel_linear_cross_entropy.Rest(of_rows, start, name, rows or 0, return_stats, differentiable)
    found = _vocab_parallel_linear_cross_entropy.vocab_parallel_linear_cross_entropy(problem, rest, gradient)
    loss, taken, w_t, *numbers = found
    if input.device.type == "cpu" and not operators.traced(input):
        vocab_parallel_rows.every_class_exists(taken, target, ignore_index)
    loss = loss.reshape(target.shape) if reduction == "none" else loss
    if by is not None:
        loss = weighed(loss, w_t.reshape(target.shape), asked, by)
    loss = as_dtype(loss, loss_dtype or arguments.loss_dtype(input, target))
    return (loss, _statistics(numbers, target, ignore_index, input, linear_weight, linear_bias)) if return_stats else loss


def vocab_parallel_token_log_probs(
    logits_shard: Tensor,
    target: Tensor,
    group: Any = None,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_start: int | None = None,
) -> TokenLogProbs:
    """`functional.token_log_probs` of logits that are divided over `group` (None: all processes) along their last axis.

    logits_shard: this process's classes of all rows, (…, V_r), in order of rank; V_r may differ from process to process, and be
    0. target: classes (…) of the whole vocabulary, the same on every process. group and vocab_start: as of
    `vocab_parallel_cross_entropy`. The three results have target's shape and are the same on every process. One collective
    forward, of eight numbers a row, and none backward: each process has the gradient of its own shard
    (docs/derivations.md, section 3.12). A temperature other than 1 costs the backward pass a copy of the shard in float32.

    Raises what `vocab_parallel_cross_entropy` raises, and ValueError for a temperature beyond 1e-30 … 1e30.
    """
    logit_scale = _one_over(temperature)
    vocab_parallel_arguments.token_log_probs(logits_shard, target)
    _, stats = vocab_parallel_cross_entropy(
        logits_shard.reshape(target.numel(), logits_shard.shape[-1]), target.reshape(-1), group, ignore_index=ignore_index,
        reduction="none", logit_scale=logit_scale, return_stats=True, differentiable=True, vocab_start=vocab_start,
    )  # fmt: skip
    return TokenLogProbs(*(v.reshape(target.shape) for v in (stats.log_prob, stats.entropy, stats.lse)))


def vocab_parallel_linear_token_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    group: Any = None,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    vocab_start: int | None = None,
) -> TokenLogProbs:
    """`functional.linear_token_log_probs` where the rows of the weight, its classes, are divided over `group` (None: all).

    Arguments, memory, collectives and gradients are those of `vocab_parallel_linear_cross_entropy`, with gradient "backward".
    The three results have target's shape and are the same on every process.

    Raises what that raises, and ValueError for a temperature beyond 1e-30 … 1e30.
    """
    logit_scale = _one_over(temperature)
    _, stats = vocab_parallel_linear_cross_entropy(
        input, linear_weight, target, group, linear_bias=linear_bias, ignore_index=ignore_index, reduction="none",
        logit_scale=logit_scale, return_stats=True, differentiable=True, chunk_rows=chunk_rows, vocab_start=vocab_start,
    )  # fmt: skip
    return TokenLogProbs(stats.log_prob, stats.entropy, stats.lse)


def _one_over(temperature: float) -> float:
    """The scale of the logits: 1/1e30 rounds to less than the least."""
    return max(1.0 / arguments.scale(temperature, "temperature"), arguments.LEAST_SCALE)
