"""Softmax, cross entropy and batch normalisation in Triton, with the signatures of `torch.nn.functional`.

Tensors are CUDA tensors of float64, float32, float16 or bfloat16; halves are summed in float32. Gradients are of first order.
"""

from . import layers
from ._batch_norm import batch_norm
from ._cross_entropy import cross_entropy
from ._softmax import softmax

__all__ = ["batch_norm", "cross_entropy", "layers", "softmax"]
