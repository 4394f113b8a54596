"""The launchers of each operation, which both engines have with the same arguments: one Protocol for an operation.

`dispatch` returns a module of `kernels/gpu` or `kernels/cpu` as the Protocol of its operation; mypy holds both modules to it.
The docstring of a launcher there says what it computes and writes. Operands are torch tensors on the GPU and NumPy arrays on
the CPU (`dispatch.kernel_view`); launchers write into operands that the caller allocated, and return nothing.
"""

from __future__ import annotations

from typing import Protocol

from .arrays import Array


class BatchNormKernels(Protocol):
    """`kernels/<engine>/batch_norm.py`: x, y, dy, dx, residual and dresidual are (N, C, S).

    valid: bytes of a bit for each position, n S + s, set where it counts; count: how many do, int64 (1,). None: all do.
    """

    def mask_size(self, x: Array) -> int: ...

    def statistics(
        self, x: Array, mean: Array, var: Array, rstd: Array, running_mean: Array | None, running_var: Array | None,
        *, eps: float, momentum: float, valid: Array | None = None, count: Array | None = None,
    ) -> None: ...  # fmt: skip

    def normalize(
        self, x: Array, mean: Array, rstd: Array, gamma: Array | None, beta: Array | None, y: Array,
        *, residual: Array | None = None, mask: Array | None = None, valid: Array | None = None,
        activation: str | None = None,
    ) -> None: ...  # fmt: skip

    def forward(
        self, x: Array, gamma: Array | None, beta: Array | None, y: Array, mean: Array, var: Array, rstd: Array,
        running_mean: Array | None, running_var: Array | None,
        *, eps: float, momentum: float, residual: Array | None = None, mask: Array | None = None, valid: Array | None = None,
        count: Array | None = None, activation: str | None = None,
    ) -> None: ...  # fmt: skip

    def backward_reduce(
        self, dy: Array, x: Array, mean: Array, rstd: Array, dgamma: Array, dbeta: Array,
        *, mask: Array | None = None, valid: Array | None = None, activation: str | None = None, gamma: Array | None = None,
        beta: Array | None = None, residual: Array | None = None,
    ) -> None: ...  # fmt: skip

    def backward_apply(
        self, dy: Array, x: Array, mean: Array, rstd: Array, gamma: Array | None, dgamma: Array, dbeta: Array, count: int,
        dx: Array,
        *, mask: Array | None = None, dresidual: Array | None = None, valid: Array | None = None,
        activation: str | None = None, beta: Array | None = None, residual: Array | None = None,
    ) -> None: ...  # fmt: skip

    def backward(
        self, dy: Array, x: Array, mean: Array, rstd: Array, gamma: Array | None, dx: Array, dgamma: Array, dbeta: Array,
        *, mask: Array | None = None, dresidual: Array | None = None, valid: Array | None = None, count: Array | None = None,
        activation: str | None = None, beta: Array | None = None, residual: Array | None = None,
    ) -> None: ...  # fmt: skip

    def inference_backward(
        self, dy: Array, x: Array, mean: Array, rstd: Array, gamma: Array | None, dx: Array, dgamma: Array, dbeta: Array,
        *, mask: Array | None = None, dresidual: Array | None = None, valid: Array | None = None,
        activation: str | None = None, beta: Array | None = None, residual: Array | None = None,
    ) -> None: ...  # fmt: skip


class SoftmaxKernels(Protocol):
    """`kernels/<engine>/softmax.py`: all operands are (N, V, S)."""

    def forward(self, z: Array, y: Array) -> None: ...

    def backward(self, dy: Array, y: Array, dz: Array) -> None: ...


class CrossEntropyKernels(Protocol):
    """`kernels/<engine>/cross_entropy.py`: z and dz are (N, V, S), target (N, S) classes or (N, V, S) probabilities."""

    def forward(
        self, z: Array, target: Array, weight: Array | None, loss: Array, stats: Array, invalid: Array,
        *, total: Array | None = None, denominator: Array | None = None, row_weights: Array | None = None,
        mean: bool = False, zero_if_ignored: bool = False,
        ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> None: ...  # fmt: skip

    def backward(
        self, z: Array, target: Array, weight: Array | None, stats: Array, upstream: Array, denominator: Array | None,
        dz: Array, *, unless_one: bool = False,
        ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> None: ...  # fmt: skip

    def forward_backward(
        self, z: Array, target: Array, weight: Array | None, loss: Array, dz: Array, invalid: Array,
        *, stats: Array | None = None, upstream: Array | None = None, denominator: Array | None = None,
        total: Array | None = None, mean: bool = False, zero_if_ignored: bool = False,
        ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> None: ...  # fmt: skip

    def count(
        self, target: Array, weight: Array | None, denominator: Array, *, ignore_index: int, zero_if_ignored: bool = False
    ) -> None: ...

    def reduce(
        self, loss: Array, target: Array, weight: Array | None, total: Array, denominator: Array, *, ignore_index: int
    ) -> None: ...


class TokenLogProbsKernels(Protocol):
    """`kernels/<engine>/token_log_probs.py`: z and dz are (N, V, S), a number a row (N, S)."""

    def forward(
        self, z: Array, target: Array, log_prob: Array, entropy: Array, lse: Array, stats: Array | None, invalid: Array,
        *, ignore_index: int, temperature: float,
    ) -> None: ...  # fmt: skip

    def backward(
        self, z: Array, target: Array, stats: Array, g_log_prob: Array | None, g_entropy: Array | None, g_lse: Array | None,
        dz: Array, *, ignore_index: int, temperature: float,
    ) -> None: ...  # fmt: skip


class DistillationKernels(Protocol):
    """`kernels/<engine>/distillation.py`: student and teacher are (N, V, S), a number a row (N, S), stats (8, N, S)."""

    def forward(
        self, student: Array, teacher: Array, mask: Array | None, loss: Array, stats: Array | None,
        *, kind: str, beta: float, temperature: float,
    ) -> None: ...  # fmt: skip

    def backward(
        self, student: Array, teacher: Array, mask: Array | None, stats: Array, upstream: Array,
        dstudent: Array | None, dteacher: Array | None, *, kind: str, beta: float, temperature: float,
    ) -> None: ...  # fmt: skip


class MomentsKernels(Protocol):
    """`kernels/<engine>/moments.py`: x is (B, n, m); shift, total, scatter and unit are the state of B sets of points."""

    def update(
        self, x: Array, shift: Array, total: Array, scatter: Array, unit: Array, *, count: int
    ) -> None: ...  # fmt: skip

    def merge(
        self, more_shift: Array, more_total: Array, more_scatter: Array, more_unit: Array,
        shift: Array, total: Array, scatter: Array, unit: Array, *, more: int, count: int,
    ) -> None: ...  # fmt: skip

    def finish(
        self, shift: Array, total: Array, scatter: Array, unit: Array, mean: Array, covariance: Array,
        *, count: int, divisor: int,
    ) -> None: ...  # fmt: skip
