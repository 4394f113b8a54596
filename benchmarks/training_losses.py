"""Rows of `cpu` and `gpu` for the losses of a softmax's numbers: who takes part, and whether the results are right.

Token log-probabilities are those of a policy's loss, -mean(log_prob + 0.01 entropy). Distillation is the mean of a divergence
of two rows of logits; in the linear forms the logits are products. Other projects run PyTorch's operations here, and these are
written as they do: TRL's `selective_log_softmax` and `entropy_from_logits` (trl/trainer/utils.py at 4fc8790), verl's
`logprobs_from_logits_v2` and `entropy_from_logits` (verl/utils/torch_functional.py at 03c8cca).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import hw3gpu.functional as HF
from hw3gpu import _error_bounds, reference
from hw3gpu._cli.arrays import to_numpy
from hw3gpu._cli.operations import Output
from hw3gpu._core import arrays

from .cuda_clock import Step

if TYPE_CHECKING:
    from .rows import Compile, Inputs, Make, Row

ENTROPY = 0.01  # what the entropy counts in the loss
SEQUENCES = 8  # that the rows come from: TRL and verl go through them one by one
KINDS = {"forward": "KL(teacher ‖ student)", "jensen_shannon": "Jensen-Shannon"}

Rows = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


# ---------------------------------------------------------------------------------------------- token log-probabilities
def ours(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log p of the target and the entropy of every row, as each of these functions gives them."""
    found = HF.token_log_probs(z, target)
    return found.log_prob, found.entropy


def plain(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(z, -1)
    return log_p.gather(-1, target[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def trl(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    entropy = [-(torch.exp(of) * of).sum(-1) for of in (F.log_softmax(rows, -1) for rows in z.split(128))]
    return _selective_log_softmax(z, target), torch.cat(entropy)


def verl(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return _selective_log_softmax(z, target), torch.logsumexp(z, -1) - torch.sum(F.softmax(z, -1) * z, -1)


def _selective_log_softmax(z: Tensor, target: Tensor) -> Tensor:
    sequences, targets = z.unflatten(0, (SEQUENCES, -1)), target.unflatten(0, (SEQUENCES, -1))
    if z.dtype in (torch.float32, torch.float64):
        selected = sequences.gather(-1, targets[..., None])[..., 0]
        return (selected - torch.stack([torch.logsumexp(of, -1) for of in sequences])).flatten()
    log_p = [F.log_softmax(of, -1).gather(-1, t[:, None])[:, 0] for of, t in zip(sequences, targets, strict=True)]
    return torch.stack(log_p).flatten()


def policy_loss(rows: Rows, z: Tensor, target: Tensor) -> Tensor:
    log_prob, entropy = rows(z, target)
    return -(log_prob + ENTROPY * entropy).mean()


def token_log_probs(row: Row, given: Inputs, compiled: Compile) -> dict[str, Make]:
    assert given.target is not None
    target = given.target

    def step(loss: Callable[..., Tensor]) -> Step:
        return Step(partial(loss, given.x, target), given.leaves, given.upstream)

    return {
        "hw3gpu": lambda: step(partial(policy_loss, ours)),
        "eager": lambda: step(partial(policy_loss, plain)),
        "compiled": lambda: step(compiled(partial(policy_loss, plain))),
        "TRL": lambda: step(partial(policy_loss, trl)),
        "verl": lambda: step(partial(policy_loss, verl)),
    }


def linear_token_log_probs(row: Row, given: Inputs, compiled: Compile) -> dict[str, Make]:
    assert given.target is not None
    target = given.target

    def fused(x: Tensor, W: Tensor) -> Tensor:
        found = HF.linear_token_log_probs(x, W, target)
        return -(found.log_prob + ENTROPY * found.entropy).mean()

    def of(rows: Rows) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, W: policy_loss(rows, F.linear(x, W), target)

    def step(loss: Callable[..., Tensor]) -> Step:
        return Step(partial(loss, *given.leaves), given.leaves, given.upstream)

    return {
        "hw3gpu": lambda: step(fused),
        "eager": lambda: step(of(plain)),
        "compiled": lambda: step(compiled(of(plain))),
        "TRL": lambda: step(of(trl)),
        "verl": lambda: step(of(verl)),
    }


# ---------------------------------------------------------------------------------------------- distillation
def divergence(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """In PyTorch's operations; the mean over rows."""
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    of = partial(F.kl_div, reduction="batchmean", log_target=True)
    if kind == "forward":
        return of(log_q, log_p)
    mixture = torch.logsumexp(torch.stack([log_q, log_p]), 0) - np.log(2.0)
    return (of(mixture, log_p) + of(mixture, log_q)) / 2


def distillation(row: Row, given: Inputs, compiled: Compile) -> dict[str, Make]:
    (teacher,) = given.teacher

    def step(loss: Callable[..., Tensor]) -> Step:
        return Step(partial(loss, given.x, teacher), given.leaves, given.upstream)

    def liger() -> Step:
        from liger_kernel.transformers.functional import liger_jsd

        beta = {"forward": 0.0, "jensen_shannon": 0.5}[row.kind]
        return step(lambda z, t: liger_jsd(F.log_softmax(z, -1), F.log_softmax(t, -1), beta=beta))

    return {
        "hw3gpu": lambda: step(partial(HF.distillation_loss, kind=row.kind)),
        "eager": lambda: step(partial(divergence, row.kind)),
        "compiled": lambda: step(compiled(partial(divergence, row.kind))),
        "Liger": liger,
    }


def linear_distillation(row: Row, given: Inputs, compiled: Compile) -> dict[str, Make]:
    def step(loss: Callable[..., Tensor]) -> Step:
        return Step(partial(loss, *given.leaves, *given.teacher), given.leaves, given.upstream)

    def unfused(x: Tensor, W: Tensor, xt: Tensor, Wt: Tensor) -> Tensor:
        return divergence(row.kind, F.linear(x, W), F.linear(xt, Wt))

    def liger() -> Step:
        from liger_kernel.transformers.functional import liger_fused_linear_jsd

        beta = {"forward": 0.0, "jensen_shannon": 0.5}[row.kind]
        return step(partial(liger_fused_linear_jsd, jsd_beta=beta))

    return {
        "hw3gpu": lambda: step(partial(HF.linear_distillation_loss, kind=row.kind)),
        "eager": lambda: step(unfused),
        "compiled": lambda: step(compiled(unfused)),
        "Liger": liger,
    }


# ---------------------------------------------------------------------------------------------- right or wrong
def outputs_of_logits(row: Row, given: Inputs, found: Any, eager: Any, index: list[int]) -> Iterator[Output]:
    """The gradients of some rows by the answer sheet, and the loss by PyTorch's float64, a piece at a time."""
    (loss, (dz,)), (their_loss, (their_dz,)) = found, eager
    N, acc = row.shape[0], arrays.accumulate_dtype(given.x)
    few = torch.tensor(index, device=given.x.device)
    z = to_numpy(given.x.detach()[few])
    if row.operation == "distillation":
        teacher = to_numpy(given.teacher[0][few])
        options: dict[str, Any] = {"kind": row.kind, "reduction": "none", "upstream": np.full(len(index), 1.0 / N)}
        sheet = reference.distillation_loss(z, teacher, **options)
        bound = _error_bounds.distillation_loss(z, teacher, **options, dtype=acc)
        exact_dz, bound_dz, of_loss = sheet.dstudent, bound.dstudent, bound.loss
    else:
        assert given.target is not None
        target = to_numpy(given.target[few]).astype(np.int64)
        upstream = (-1.0 / N, -ENTROPY / N, 0.0)
        exact_dz = reference.token_log_probs(z, target, upstream=upstream).dlogits
        bounds = _error_bounds.token_log_probs(z, target, upstream=upstream, dtype=acc)
        bound_dz, of_loss = bounds.dlogits, bounds.log_prob + bounds.entropy
    yield Output("dz", dz.detach()[few], exact_dz, their_dz.detach()[few], bound_dz)
    exact = to_numpy(_loss_in_float64(row, given))
    # rows are alike: twice the sampled rows' bound is that of all
    bound_of_mean = 2.0 * of_loss.max() + _error_bounds.sum_of_products(abs(exact), N, dtype=acc)
    yield Output("loss", loss.detach(), exact, their_loss.detach(), bound_of_mean)


def _loss_in_float64(row: Row, given: Inputs) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=given.x.device)
    for first in range(0, row.shape[0], 256):
        piece = slice(first, first + 256)
        z = given.x.detach()[piece].double()
        if row.operation == "distillation":
            total += divergence(row.kind, z, given.teacher[0][piece].double()) * len(z)
        else:
            assert given.target is not None
            total += policy_loss(plain, z, given.target[piece]) * len(z)
    return total / row.shape[0]


def outputs_of_products(row: Row, given: Inputs, found: Any, eager: Any, index: list[int]) -> Iterator[Output]:
    """Of all rows, by PyTorch's float64: the answer sheet has no product."""
    leaves = tuple(t.detach().double().requires_grad_() for t in given.leaves)
    logits = F.linear(*leaves)
    if row.operation == "linear distillation":
        loss = divergence(row.kind, logits, F.linear(*(t.double() for t in given.teacher)))
    else:
        assert given.target is not None
        loss = policy_loss(plain, logits, given.target)
    exact = torch.autograd.grad(loss, leaves)
    yield Output("loss", found[0].detach(), to_numpy(loss), eager[0].detach(), 0.0)
    for name, mine, sheet, theirs in zip(("dx", "dW"), found[1], exact, eager[1], strict=True):
        few = torch.tensor([i for i in index if i < len(sheet)], device=sheet.device)
        yield Output(name, mine[few], to_numpy(sheet[few]), theirs[few], 0.0)
