"""PyTorch functions with the signatures, defaults and semantics of `torch.nn.functional`, on this library's kernels.

Tensors on the CPU run the Numba kernels, CUDA tensors the Triton kernels (see `hw3gpu.use_backend`). Half precision
accumulates in float32 and is rounded once. Formulas: docs/derivations.md, sections 2 and 3.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ._core import arrays, check
from ._core.torch_internals import legacy_reduction
from ._torch import arguments, bound_launches, differentiable_statistics, distillation_arguments, dtensor
from ._torch import batch_norm as _batch_norm
from ._torch import cross_entropy as _cross_entropy
from ._torch import distillation as _distillation
from ._torch import linear_cross_entropy as _linear_cross_entropy
from ._torch import linear_distillation as _linear_distillation
from ._torch import linear_token_log_probs as _linear_token_log_probs
from ._torch import softmax as _softmax
from ._torch import token_log_probs as _token_log_probs
from ._torch import top_k_distillation as _top_k_distillation
from ._torch.autograd import as_dtype
from ._torch.class_range import check_targets
from ._torch.cross_entropy_formula import CrossEntropyStatistics, Options, loss_shape
from ._torch.token_log_probs import TokenLogProbs
from ._torch.trace import minimize_trace

__all__ = [
    "CrossEntropyStatistics",
    "TokenLogProbs",
    "batch_norm",
    "check_targets",
    "cross_entropy",
    "distillation_loss",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_token_log_probs",
    "minimize_trace",
    "softmax",
    "token_log_probs",
]


# ---------------------------------------------------------------------------------------------- batch normalisation
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.batch_norm`: (N, C, …) normalised per channel, over the batch or by the running statistics.

    input: (N, C, …) of float16, bfloat16, float32 or float64, of any strides; the result has its layout. weight, bias,
    running_mean, running_var: (C,) of input's dtype, or float32 for half precision, or None. In training the running
    statistics are updated in place: r <- (1 - momentum) r + momentum · new, the new variance with m/(m - 1). As in PyTorch, an
    input without an element may have one axis, vectors of other floating dtypes, and no running statistics in evaluation.

    residual: of input's shape and dtype, added to the result. activation: "relu", "silu", "hardswish" or "gelu" (the one with
    erf), applied after that; at infinities and NaN it is PyTorch's. Both cost no further pass over the result. Backward
    computes what went into the activation again, from input and residual, which it reads (and which must not be changed
    until then). For "relu" a GPU keeps one bit an element instead, and the CPU the result.

    mask: bool, (N, …) as input without its channels, or a shape that broadcasts to it: True where a value counts. lengths: for
    (N, C, L), integers (N,): how many of the first positions of each sample count. Give one of the two. The statistics are
    those of the n values of a channel that count, and the running variance takes n/(n - 1). Elsewhere the result, after
    residual and activation, and the gradients of input and residual are 0, whatever the values are (docs/derivations.md,
    section 2.6). The same holds in evaluation, with the running statistics. If one value counts, the variance is 0; if none
    does, the running statistics do not change. One bit a position is kept for the backward pass. On a GPU nothing waits for the
    device, so lengths are not checked there: those below 0 or above L count as 0 or L.

    Gradients of gradients, `torch.func` transforms and forward-mode derivatives are computed by the formula in PyTorch's
    operations, without kernels. `torch.export` writes PyTorch's own batch normalisation into its graph: tools that move an
    exported model between training and evaluation know no other.

    Raises TypeError for kinds, dtypes and layouts; ValueError for shapes, for a single value per channel in training, and for
    missing running statistics in evaluation; RuntimeError for tensors on several devices. Where PyTorch refuses an argument
    too, the exception is also of the type that PyTorch raises.
    """
    fused = residual is not None or activation is not None
    masked = mask is not None or lengths is not None
    if not masked:
        y = _batch_norm.by_address(
            input, weight, bias, running_mean, running_var, training, momentum, eps, residual, activation
        )  # fmt: skip
        if y is not None:
            return y
    arguments.tensor(input, "input")
    call = counted = None
    if not masked:
        call = _batch_norm.call_of(
            input, weight, bias, running_mean, running_var, training, momentum, eps, residual, activation
        )  # fmt: skip
    if call is None or call.launches is None:
        beyond, momentum, eps = arguments.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if fused:
            residual = arguments.fused(input, residual, activation)
        if masked:
            counted = arguments.counted(input, mask, lengths)
        if beyond:
            return _of_no_elements(input, weight, bias, residual)
    rest = _batch_norm.Rest(running_mean, running_var, momentum, eps, activation, training, call, counted=counted)
    return _batch_norm.batch_norm(input, weight, bias, residual, rest)


def _of_no_elements(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Input's shape and dtype, and a graph in which every parameter gets a gradient of 0."""
    y = x.clone() if residual is None else x + residual
    for v in (weight, bias):
        if v is not None and v.requires_grad:
            y = y + (v.sum() * 0).to(x.dtype)
    return y


# ---------------------------------------------------------------------------------------------- softmax
def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.nn.functional.softmax`: exp(z) / Σ exp(z) along `dim`.

    input: float16, bfloat16, float32 or float64, of any shape and strides. dtype: cast to it first; under autocast on a GPU,
    where PyTorch's gives float32 for half precision, so does this.

    Gradients of gradients, `torch.func` transforms and forward-mode derivatives are computed in PyTorch's operations. Raises
    TypeError for kinds and dtypes, IndexError for a `dim` that input does not have; where PyTorch refuses an argument too, the
    exception is also of the type that PyTorch raises.
    """
    arguments.tensor(input, "input")
    dtensor.is_dtensor(input)  # then PyTorch knows how it may be divided
    if dtype is None and input.is_cuda and input.dtype in arguments.HALVES and arguments.autocast(input):
        dtype = torch.float32
    call = None
    if type(dim) is int and (dtype is None or isinstance(dtype, torch.dtype)):
        of = bound_launches.of_host if arrays.on_host(input) else bound_launches.of
        call = of(("softmax", dim, dtype), input)
    if dim is None or call is None or call.launches is None:
        if dim is None:
            warnings.warn("softmax: give `dim`; PyTorch's implicit choice is deprecated", stacklevel=_stacklevel - 1)
            dim = 0 if input.dim() in (0, 1, 3) else 1
        if input.dim() == 0:
            return softmax(input.reshape(1), dim, dtype=dtype).reshape(())
        if type(dim) is not int:
            dim = check.integer_value(dim, "dim")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype: expected None or a torch.dtype, got {dtype!r} ({type(dtype).__name__})")
        if not -input.dim() <= dim < input.dim():
            raise IndexError(f"dim: expected an axis of input with shape {check.shape_of(input)}, got {dim}")
        if dtype not in arguments.FLOATING and (dtype is not None or input.dtype not in arguments.FLOATING):
            check.floating(input if dtype is None else input.to(dtype), "input")
    return _softmax.softmax(input if dtype is None else input.to(dtype), dim, call)


# ---------------------------------------------------------------------------------------------- cross entropy
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    gradient: str = "auto",
    all_ignored: str = "nan",
    return_stats: bool = False,
    differentiable: bool = False,
    loss_dtype: torch.dtype | None = None,
    normalizer: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    logit_scale: float = 1.0,
) -> Any:
    """`torch.nn.functional.cross_entropy`: softmax cross entropy of logits with classes or class probabilities.

    input: logits (C,), (N, C) or (N, C, d1, …) of float16, bfloat16, float32 or float64, of any strides. target: integer
    classes (), (N,) or (N, d1, …), `ignore_index` among them, or probabilities of input's shape. weight: (C,) class weights.
    The loss has input's dtype, float32 for half precision under autocast; it and the gradient are computed in float32 for half
    precision.

    Beyond PyTorch's arguments (docs/derivations.md, section 3.6):

    z_loss: ζ ≥ 0; every row's loss gains ζ (log Σ exp z)². It is reduced with the rest, and no class weight applies to it.
    softcap: τ, from 1e-30 to 1e30; τ tanh(z/τ) takes the place of the logits.
    gradient: when the gradient of input is computed. "backward": in the backward pass, from the logits read again: 3 passes
        over input-sized memory in all, for any upstream gradient. "forward": in the forward pass for an upstream gradient of 1,
        and anew in the backward pass for the rows that have another: 2 passes, or 4; input-sized memory is held in between.
        "auto": for a reduced loss on the CPU in the forward pass, for the upstream gradient that the last call from the same
        line of the caller's code had, so that a loss scale or a division by accumulated steps costs nothing; where it changes
        from call to call, in the backward pass. Else "backward". The bits are the same. A compiled graph takes "backward".
    all_ignored: what the mean over no rows is: "nan", as PyTorch's, or "zero".
    return_stats: return (loss, `CrossEntropyStatistics`): lse, log_prob, entropy, correct and predicted of every row, from the
        same pass.
        To differentiate one of these raises RuntimeError; a compiled graph takes them for constants.
    differentiable: with `return_stats`, statistics that have gradients, and `gradient` does not count. Of classes without
        label_smoothing and softcap they come from the loss's pass (predicted from one more read), and all gradients from one
        more read and one write; of the others by the formula in PyTorch's operations.
    loss_dtype: of the loss; None for PyTorch's. float32 keeps the digits that half precision has not.
    normalizer: a number from 1e-30 to 1e30, or a tensor () of one, such as the count of targets of all micro-batches. The sum
        of the losses is divided by it, whatever `reduction` says ("none": each row's); gradients before they are rounded. A
        tensor's value is not looked at: 0 gives NaN or infinities, or with `all_ignored="zero"` 0.
    token_weight: a weight for each row, of the shape of the loss of every row and any floating dtype: it multiplies the row's
        loss, z-loss included, and what the row counts in the mean's divisor, Σ token_weight · weight[target]. It may ask for a
        gradient. `gradient` "forward" is refused.
    logit_scale: from 1e-30 to 1e30; logit_scale · input takes the place of the logits, before the cap. The product is taken in
        the precision of the sums, and costs no pass.

    Gradients of gradients, `torch.func` transforms and forward-mode derivatives are computed by the formula in PyTorch's
    operations, without kernels. Raises TypeError for kinds and dtypes, ValueError for shapes and values, IndexError for a class
    out of range; where PyTorch refuses an argument too, the exception is also of the type that PyTorch raises. On a GPU nothing
    waits for the device: a row whose class is out of range gives NaN, and a later call, or `check_targets`, raises the
    IndexError.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    arguments.statistics(return_stats, differentiable)
    if type(ignore_index) is not int:
        ignore_index = check.integer_value(ignore_index, "ignore_index")
    if loss_dtype is not None:
        arguments.asked_dtype(loss_dtype)
    if dtensor.any_of(input, target, weight, token_weight):
        target, weight, token_weight = dtensor.beside(input, "input", target=target, weight=weight, token_weight=token_weight)
    call, by = None, None
    if differentiable:
        arguments.differentiable(return_stats)
    elif (
        normalizer is None and token_weight is None and arguments.may_be_known(input, target, reduction, gradient, all_ignored)
    ):
        dtype = loss_dtype or arguments.loss_dtype(input, target)
        options = Options(reduction, ignore_index, label_smoothing, z_loss, softcap, all_ignored == "zero", logit_scale)
        call = _cross_entropy.call_of(input, target, weight, options, gradient, return_stats, dtype)
    if call is None or call.launches is None:
        weight = arguments.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
        z_loss, softcap, logit_scale = arguments.extra(z_loss, softcap, logit_scale, gradient, all_ignored)
        options = Options(reduction, ignore_index, float(label_smoothing), z_loss, softcap, all_ignored == "zero", logit_scale)
        dtype = loss_dtype or arguments.loss_dtype(input, target)
        by = arguments.row_weights(token_weight, normalizer, loss_shape(input), input, options.zero_if_ignored)
    if dtensor.is_dtensor(input):
        from ._torch import dtensor_cross_entropy as losses  # who has a DTensor has imported what this imports

        loss, stats = losses.cross_entropy(input, target, weight, options, return_stats, differentiable, by)
    elif by is not None:
        arguments.gradient_of_rows(gradient, by)
        loss, stats = _cross_entropy.with_row_weights(
            input, target, weight, options, gradient, return_stats, differentiable, by
        )
    elif differentiable:
        loss, stats = differentiable_statistics.loss_and_statistics(input, target, weight, options)
    else:
        loss, stats = _cross_entropy.cross_entropy(input, target, weight, options, gradient, return_stats, dtype, call)
    loss = as_dtype(loss, dtype)
    return (loss, stats) if return_stats else loss


# ---------------------------------------------------------------------------------------------- token log-probabilities
def token_log_probs(
    logits: Tensor, target: Tensor, *, temperature: float = 1.0, ignore_index: int = -100, dim: int = -1
) -> TokenLogProbs:
    """log p of the target class, entropy -Σ p log p and log Σ exp(logits / temperature) of every row, with gradients.

    p = softmax(logits / temperature) along `dim`. All three come from one read of the logits, and have gradients, alone and
    together, from one more read and one write (docs/derivations.md, section 3.8): the loss of a policy with a bonus on its
    entropy costs no more passes than `cross_entropy`. No tensor of the logits' size is held in between.

    logits: (…, V) of float16, bfloat16, float32 or float64, of any strides, the classes along `dim`. target: integer classes,
    logits' shape without `dim`; a row whose target is `ignore_index` is not read: its three numbers, and its gradient, are 0.
    temperature: from 1e-30 to 1e30; logits are subtracted before they are divided by it. The results have target's shape, in
    float32 for half precision, which is not rounded to it.

    Gradients of gradients, `torch.func` transforms and forward-mode derivatives are computed by the formula in PyTorch's
    operations, without kernels. Raises TypeError for kinds and dtypes, ValueError for shapes and values, IndexError for a class
    out of range and for a `dim` that logits does not have. On a GPU nothing waits for the device: a row whose class is out of
    range gives NaN, and a later call, or `check_targets`, raises the IndexError.
    """
    divided = dtensor.any_of(logits, target)
    if divided:
        (target,) = dtensor.beside(logits, "logits", target=target)
    temperature, ignore_index, dim = arguments.token_log_probs(logits, target, temperature, ignore_index, dim)
    axis = dtensor.axis_of_mesh(logits, dim, "logits") if divided else None
    if axis is not None:
        from ._torch import dtensor_cross_entropy as losses

        return losses.token_log_probs(logits, target, temperature, ignore_index, dim, axis)
    return _token_log_probs.token_log_probs(logits, target, temperature, ignore_index, dim)


def linear_token_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> TokenLogProbs:
    """`token_log_probs` of the logits input · linear_weightᵀ + linear_bias, of which there are never more than a chunk of rows.

    The chunks are those of `linear_cross_entropy`, which `chunk_rows` sets. The backward pass makes each chunk's logits again:
    four products in all. Logits of at most 32 MB, or of chunk_rows that are all rows, are held for it instead: three.
    ∂ℓ/∂linear_weight and ∂ℓ/∂linear_bias are summed over chunks in float32 (docs/derivations.md, sections 3.7 and 3.8).

    input: (…, D) of float16, bfloat16, float32 or float64. linear_weight: (V, D), linear_bias: (V,), of input's dtype. target:
    integer classes (…). The results have target's shape. Under autocast the products are in its dtype, as those of PyTorch's
    `linear`. What raises, second derivatives and transforms are as of `token_log_probs`; the latter two hold all logits.
    """
    divided = dtensor.any_of(input, linear_weight, target, linear_bias)
    if divided:
        linear_weight, target, linear_bias = dtensor.beside(
            input, "input", linear_weight=linear_weight, target=target, linear_bias=linear_bias
        )
    temperature, ignore_index = arguments.linear_token_log_probs(
        input, linear_weight, target, linear_bias, temperature, ignore_index
    )
    chunk_rows = arguments.chunk_rows(chunk_rows)
    rows = input.reshape(target.numel(), input.shape[-1])
    problem = arguments.linear_problem(rows, linear_weight, target.reshape(-1), linear_bias, None)
    axis = dtensor.axis_of_mesh(problem.W, 0, "linear_weight") if divided else None
    if axis is not None:
        from ._torch import dtensor_cross_entropy as losses

        found = losses.linear_token_log_probs(problem, temperature, ignore_index, chunk_rows, axis)
    else:
        found = _linear_token_log_probs.linear_token_log_probs(problem, temperature, ignore_index, chunk_rows)
    return TokenLogProbs(*(v.view(target.shape) for v in found))


# ---------------------------------------------------------------------------------------------- distillation
def distillation_loss(
    student: Tensor,
    teacher: Tensor | tuple[Tensor, Tensor],
    *,
    temperature: float = 1.0,
    kind: str = "forward",
    beta: float = 0.5,
    top_k: int | None = None,
    teacher_is: str = "logits",
    mask: Tensor | None = None,
    reduction: str = "mean",
    dim: int = -1,
) -> Tensor:
    """The divergence of a teacher's distribution p and a student's, q = softmax(student / temperature) along `dim`.

    kind: "forward", KL(p‖q) = Σ p log(p/q); "reverse", KL(q‖p); "jensen_shannon", β KL(p‖M) + (1 - β) KL(q‖M) of the
    mixture M = β p + (1 - β) q, 0 < β < 1. The forward pass reads each row once, the backward pass reads it again, and writes
    the gradient of student and, where it asks for one, of teacher. ("jensen_shannon" reads rows of more than 4096 classes twice
    in the forward pass on a GPU.) Of nearly equal rows loss and gradients keep their digits (docs/derivations.md, section 3.9).

    student: logits (…, V) of float16, bfloat16, float32 or float64, of any strides. teacher: of student's shape and any of
    these dtypes, float64 with float64 alone. teacher_is: "logits", with p = softmax(teacher / temperature); "probabilities"
    or "log_probabilities", p itself, of rows that sum to 1: the temperature divides student alone. These cost one more read
    and write, unless they are logarithms at temperature 1. mask: bool of student's shape without `dim`, True for the rows that
    count; the others are not read, and add 0. reduction: "mean" of the rows that count, "sum" or "none". temperature: from
    1e-30 to 1e30. The loss is float32 for half precision.

    top_k: the divergence of the k classes that are the teacher's largest and of the rest as one class. Or teacher is a pair
    (values, indices) of k distinct classes of every row, k along `dim`, with their probabilities or logarithms as `teacher_is`
    says. Neither rest counts as less than the rounding of 1. The forward pass reads student once, the backward pass once more.

    No factor temperature² is in the loss: multiply by it where gradients shall keep their size at every temperature.

    A class that has no probability in q, by a logit of -inf, and has some in p makes KL(p‖q) infinite. Gradients of gradients,
    `torch.func` transforms and forward-mode derivatives are computed by the formula in PyTorch's operations, without kernels.
    Raises TypeError for kinds and dtypes, ValueError for shapes and values, IndexError for a `dim` that student does not have,
    RuntimeError for tensors on several devices.
    """
    divided = dtensor.any_of(student, mask, *(teacher if isinstance(teacher, tuple) else (teacher,)))
    if divided and isinstance(teacher, tuple):
        values, indices, mask = dtensor.beside(student, "student", teacher=teacher[0], indices=teacher[1], mask=mask)
        teacher = values, indices
    elif divided:
        teacher, mask = dtensor.beside(student, "student", teacher=teacher, mask=mask)
    options = distillation_arguments.distillation(
        student, teacher, temperature, kind, beta, top_k, teacher_is, mask, reduction, dim
    )
    if divided:
        dtensor.refuse_divided(student, options.dim, "student")
    if not isinstance(teacher, Tensor):
        log_p = _top_k_distillation.as_logarithms(teacher[0], teacher_is, student)
        rows = _top_k_distillation.divergences(student, log_p, teacher[1], mask, options)
    else:
        teacher = _distillation.as_logits(teacher, teacher_is, options.temperature)
        if top_k is None:
            rows = _distillation.divergences(student, teacher, mask, options)
        else:
            rows = _top_k_distillation.of_largest(student, teacher, top_k, mask, options)
    return _distillation.reduced(rows, mask, reduction)


def linear_distillation_loss(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    kind: str = "forward",
    beta: float = 0.5,
    mask: Tensor | None = None,
    reduction: str = "mean",
    chunk_rows: int | None = None,
) -> Tensor:
    """`distillation_loss` of logits input · weightᵀ + bias on both sides, of which there is never more than a chunk of rows.

    The chunks are half of `linear_cross_entropy`'s, for they hold two sets of logits; `chunk_rows` sets them. The backward pass
    makes each chunk's logits again: six products in all for the student's gradients, and two more for the teacher's, which are
    made where its tensors ask for them; logits of both sides of at most 32 MB, or of chunk_rows that are all rows, are held
    instead. The gradients of weight and bias are summed over chunks in float32 (docs/derivations.md, sections 3.7 and 3.9).

    student_input: (…, D) of float16, bfloat16, float32 or float64; student_weight: (V, D), student_bias: (V,), of its dtype.
    teacher_input: (…, E), of student's rows; teacher_weight: (V, E), teacher_bias: (V,), of teacher_input's dtype: any for half
    precision and float32, float64 for float64. mask: (…) of bool. Under autocast the products are in its dtype, as those of
    PyTorch's `linear`. The other arguments, what raises, second derivatives and transforms are as of `distillation_loss`; the
    latter two hold all logits.
    """
    tensors = {"student_weight": student_weight, "student_bias": student_bias, "teacher_input": teacher_input}
    tensors |= {"teacher_weight": teacher_weight, "teacher_bias": teacher_bias, "mask": mask}
    if dtensor.any_of(student_input, *tensors.values()):
        *of_student, teacher_input, teacher_weight, teacher_bias, mask = dtensor.beside(
            student_input, "student_input", **tensors
        )
        student_weight, student_bias = of_student
        for name, W in (("student_weight", student_weight), ("teacher_weight", teacher_weight)):
            dtensor.refuse_divided(W, 0, name)
    student, teacher = (student_input, student_weight, student_bias), (teacher_input, teacher_weight, teacher_bias)
    options = distillation_arguments.linear_distillation(student, teacher, temperature, kind, beta, mask, reduction)
    chunk_rows = arguments.chunk_rows(chunk_rows)
    rows = student_input.shape[:-1]
    sides = []
    for x, W, b in (arguments.in_autocast(*student), arguments.in_autocast(*teacher)):
        sides.append((x.reshape(rows.numel(), x.shape[-1]), W, b))
    flat = None if mask is None else mask.reshape(-1)
    found = _linear_distillation.divergences(sides[0], sides[1], flat, options, chunk_rows)
    return _distillation.reduced(found.view(rows), mask, reduction)


# ---------------------------------------------------------------------------------------------- linear cross entropy
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    gradient: str = "auto",
    all_ignored: str = "nan",
    return_stats: bool = False,
    differentiable: bool = False,
    chunk_rows: int | None = None,
    loss_dtype: torch.dtype | None = None,
    normalizer: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    logit_scale: float = 1.0,
) -> Any:
    """`torch.nn.functional.linear_cross_entropy`: cross entropy of the logits input · linear_weightᵀ + linear_bias.

    There are never more than `chunk_rows` rows of logits: by default as many as keep the peak, beyond inputs, gradients and one
    float32 ∂ℓ/∂linear_weight, below a tenth of the logits, in chunks of 1 MiB to 512 MiB. (In float32 that one is the gradient
    itself, and a chunk may have its size; in half precision on a GPU it may have the size of the gradient, which is made last.)
    ∂ℓ/∂linear_weight and ∂ℓ/∂linear_bias are summed over chunks in float32. The products are PyTorch's, three a chunk
    (docs/derivations.md, section 3.7; docs/gpu.md).

    input: (D,) or (N, D). linear_weight: (C, D) or (C, d1, …, D), of input's dtype; linear_bias: (C,) or (C, d1, …). target:
    classes (), (N,) or (N, d1, …), or probabilities (C,), (N, C) or (N, C, d1, …). Beyond PyTorch's: input (N, …, D), such as
    hidden states (B, T, D), with linear_weight (C, D) and classes (N, …) or probabilities (N, …, C). ignore_index: -100 for
    None. options: `torch.nn.LinearCrossEntropyOptions`, of which `batch_chunk_size` counts, as `chunk_rows`.

    gradient: "forward" makes the gradients in the forward pass: three products, one of them for the logits; the gradients are
    held until backward, in their dtype (an upstream gradient that is no power of two rounds them once more), but in float16 the
    sums in float32, times powers of two, so that neither class weights nor a loss scale to come cost digits. "backward" makes
    the logits twice, four products, and holds nothing; logits of at most 32 MB, or of chunk_rows that are all rows, it makes
    once and holds. "auto": "forward" for a reduced loss. The other arguments, the loss, what raises, second derivatives,
    transforms and compiled graphs are as of `cross_entropy`, where those that need the formula in PyTorch's operations hold all
    logits.
    """
    if ignore_index is not None and isinstance(target, Tensor) and target.is_floating_point():
        raise check.ShapeError(f"ignore_index: expected None with probabilities as target, got {ignore_index}")
    arguments.statistics(return_stats, differentiable)
    z_loss, softcap, logit_scale = arguments.extra(z_loss, softcap, logit_scale, gradient, all_ignored)
    ignore_index = -100 if ignore_index is None else check.integer_value(ignore_index, "ignore_index")
    asked = Options(reduction, ignore_index, label_smoothing, z_loss, softcap, all_ignored == "zero", logit_scale)
    if dtensor.any_of(input, linear_weight, target, linear_bias, weight, token_weight):
        linear_weight, target, linear_bias, weight, token_weight = dtensor.beside(
            input, "input", linear_weight=linear_weight, target=target, linear_bias=linear_bias, weight=weight,
            token_weight=token_weight,
        )  # fmt: skip
    weight = arguments.linear_cross_entropy(input, linear_weight, target, linear_bias, weight, asked)
    if gradient == "forward" and reduction == "none":
        raise ValueError("gradient: expected 'auto' or 'backward' with reduction 'none', got 'forward'")
    rows = getattr(options, "batch_chunk_size", None) if chunk_rows is None else chunk_rows
    rows = arguments.chunk_rows(rows)
    asked = asked._replace(label_smoothing=float(label_smoothing))
    of_rows = (*input.shape[:-1], *linear_weight.shape[1:-1])
    arguments.asked_dtype(loss_dtype)
    if differentiable:
        arguments.differentiable(return_stats)
    elif return_stats:
        arguments.predictable(len(linear_weight), input, ", or differentiable=True")
    by = arguments.row_weights(token_weight, normalizer, of_rows, input, asked.zero_if_ignored)
    problem = arguments.linear_problem(input, linear_weight, target, linear_bias, weight)
    if dtensor.is_dtensor(input):
        from ._torch import dtensor_cross_entropy as losses

        loss, stats = losses.linear_cross_entropy(problem, asked, gradient, return_stats, differentiable, rows, by)
    elif by is not None:
        arguments.gradient_of_rows(gradient, by, linear=True)
        loss, stats = _linear_cross_entropy.with_row_weights(problem, asked, gradient, return_stats, differentiable, rows, by)
    elif differentiable:
        loss, stats = _linear_cross_entropy.with_differentiable_statistics(problem, asked, rows)
    else:
        loss, stats = _linear_cross_entropy.linear_cross_entropy(problem, asked, gradient, return_stats, rows)
    loss = loss.reshape(of_rows) if reduction == "none" else loss
    loss = as_dtype(loss, loss_dtype or arguments.loss_dtype(input, target))
    if stats is None:
        return loss
    return loss, type(stats)._make(None if v is None else v.reshape(of_rows) for v in stats)
