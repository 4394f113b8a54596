"""aten._log_softmax_backward_data: dz = dy - p Σ dy, p = exp(log p), along `dim`.

That is the gradient of cross entropy, dz = g (p Σ dy - dy), for dy in the place of probabilities and g = -1. Its kernel takes
log p for logits whose maximum is 0 and whose Σ exp is 1.
"""

import math

import torch

from hw3gpu.kernels.gpu import cross_entropy as kernels


def _log_softmax_backward_data__default_kernel_impl(grad_output, output, dim, input_dtype):
    dy, log_p = grad_output.contiguous(), output.contiguous()
    dz = torch.empty_like(log_p)
    if not log_p.numel():
        return dz.to(input_dtype)
    rows = (1, 1, 1) if dy.dim() == 0 else (math.prod(dy.shape[: dim % dy.dim()]), dy.shape[dim], -1)
    dy, log_p = dy.view(rows), log_p.view(rows)
    total = dy.sum(1, dtype=torch.float64 if dy.dtype is torch.float64 else torch.float32)
    stats = torch.stack((torch.zeros_like(total), torch.zeros_like(total), total))  # m, Σ exp(z - m) - 1, Σ dy
    minus = total.new_full((), -1.0).expand(total.shape)
    with torch.cuda.device_of(log_p):
        kernels.backward(log_p, dy, None, stats, minus, None, dz.view(rows), ignore_index=-1, label_smoothing=0.0)
    return dz.to(input_dtype)
