"""aten.native_batch_norm, as PyTorch has it on CUDA: (y, mean, 1/√(σ² + ε)); in evaluation those of the running statistics."""

import torch

from hw3gpu.kernels.gpu import batch_norm as kernels


def native_batch_norm__default_kernel_impl(input, weight, bias, running_mean, running_var, training, momentum, eps):
    last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
    x = input if last else input.contiguous()
    y = torch.empty_like(x)
    acc = torch.float64 if x.dtype is torch.float64 else torch.float32
    stats = torch.zeros((4, x.shape[1]), dtype=acc, device=x.device)  # mean, what its rounding left, 1/√(σ² + ε), σ²
    weight, bias = (None if v is None else v.contiguous() for v in (weight, bias))
    if not training:
        stats[0], stats[2] = running_mean, (running_var.to(acc) + eps).rsqrt()
    if x.numel():
        flat, out = (t.flatten(2) if t.dim() > 2 else t[..., None] for t in (x, y))  # views of (N, C, S)
        with torch.cuda.device_of(x):
            if training:
                kernels.forward(
                    flat, weight, bias, out, stats, stats[3], stats[2], running_mean, running_var, eps=eps, momentum=momentum
                )
            else:
                kernels.normalize(flat, stats, stats[2], weight, bias, out)
    return y, stats[0].clone(), stats[2].clone()
