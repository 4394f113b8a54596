"""aten._softmax: y = exp(z - max z) / Σ exp(z - max z) along `dim`."""

import math

import torch

from hw3gpu.kernels.gpu import softmax as kernels


def _softmax__default_kernel_impl(self, dim, half_to_float):
    z = (self.float() if half_to_float else self).contiguous()
    y = torch.empty_like(z)
    rows = (1, 1, 1) if z.dim() == 0 else (math.prod(z.shape[: dim % z.dim()]), z.shape[dim], -1)
    if z.numel():
        with torch.cuda.device_of(z):
            kernels.forward(z.view(rows), y.view(rows))
    return y
