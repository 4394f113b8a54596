"""aten.native_batch_norm_backward: dx = γ rstd (dy - dβ/m - x̂ dγ/m), dγ = Σ dy x̂, dβ = Σ dy; in evaluation dx = γ rstd dy."""

import torch

from hw3gpu.kernels.gpu import batch_norm as kernels


def native_batch_norm_backward__default_kernel_impl(
    grad_out, input, weight, running_mean, running_var, save_mean, save_invstd, train, eps, output_mask
):
    last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    x, dy = input.contiguous(memory_format=layout), grad_out.contiguous(memory_format=layout)
    dx = torch.empty_like(x)
    acc = torch.float64 if x.dtype is torch.float64 else torch.float32
    stats = torch.zeros((2, x.shape[1]), dtype=acc, device=x.device)  # the mean, and what its rounding left: not saved
    stats[0] = save_mean if train else running_mean
    rstd = (save_invstd if train else (running_var.to(acc) + eps).rsqrt()).to(acc).contiguous()
    dgamma, dbeta = torch.zeros_like(rstd), torch.zeros_like(rstd)
    if x.numel():
        with torch.cuda.device_of(x):
            (kernels.backward if train else kernels.inference_backward)(
                dy.flatten(2) if dy.dim() > 2 else dy[..., None],
                x.flatten(2) if x.dim() > 2 else x[..., None],
                stats, rstd, None if weight is None else weight.contiguous(),
                dx.flatten(2) if dx.dim() > 2 else dx[..., None],
                dgamma, dbeta,
            )  # fmt: skip
    dtype = acc if weight is None else weight.dtype
    found = dx, dgamma.to(dtype), dbeta.to(dtype)
    return tuple(g if wanted else None for g, wanted in zip(found, output_mask, strict=True))
