"""Training components with Triton kernels on the GPU and Numba kernels on the CPU, validated against NumPy in float64.

The array functions here take NumPy, CuPy or torch arrays, and through DLPack those of every other array API namespace.
What means more than its elements is refused: masked arrays, matrices, sparse and nested tensors; np.memmap is an array.
`hw3gpu.functional`, `hw3gpu.nn` and `hw3gpu.distributed` are the PyTorch side; they load on first use, and with them torch.
Importing this package loads none of torch, triton, cupy and numba.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._array_functions.batch_norm import BatchNorm, BatchNormGradients, batch_norm, batch_norm_backward
from ._array_functions.points import MomentAccumulator, Moments, moments, points_with_moments
from ._array_functions.shapes import conv2d_output_shape, conv2d_padding_for, conv_transpose2d_output_shape
from ._array_functions.softmax import (
    SoftmaxCrossEntropy,
    cross_entropy,
    softmax,
    softmax_backward,
    softmax_cross_entropy,
    softmax_jacobian,
)
from ._array_functions.trace import TraceMinimum, minimize_trace, minor_components
from ._core.dispatch import BackendError, use_backend
from ._core.pool import empty_cache
from ._explain import Explanation, explain

if TYPE_CHECKING:  # for those who read the source: it is imported on first use
    from ._nn.transformers import patch_transformers

__version__ = "0.2.0"

__all__ = [
    "BackendError",
    "BatchNorm",
    "BatchNormGradients",
    "Explanation",
    "MomentAccumulator",
    "Moments",
    "SoftmaxCrossEntropy",
    "TraceMinimum",
    "batch_norm",
    "batch_norm_backward",
    "conv2d_output_shape",
    "conv2d_padding_for",
    "conv_transpose2d_output_shape",
    "cross_entropy",
    "distributed",
    "empty_cache",
    "explain",
    "functional",
    "minimize_trace",
    "minor_components",
    "moments",
    "nn",
    "patch_transformers",
    "points_with_moments",
    "softmax",
    "softmax_backward",
    "softmax_cross_entropy",
    "softmax_jacobian",
    "use_backend",
]

_ON_FIRST_USE = ("distributed", "functional", "nn")


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "patch_transformers":
        return importlib.import_module(f"{__name__}._nn.transformers").patch_transformers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
