"""Batch normalisation in training, (N, C, H, W): the shapes of ResNet-50, contiguous or channels-last."""

import argparse
from collections.abc import Callable, Generator
from typing import ClassVar

import torch
import torch.nn.functional as F
from tritonbench.utils.triton_op import (
    BenchmarkOperator,
    BenchmarkOperatorMetrics,
    Mode,
    register_benchmark,
    register_metric,
    register_x_val,
)

try:
    from hw3gpu import functional as hw3gpu_functional
except ModuleNotFoundError:
    hw3gpu_functional = None

# (C, H) where ResNet-50 normalises images of 224 x 224
RESNET_50 = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]


def parse_op_args(args: list[str]):
    parser = argparse.ArgumentParser()
    parser.add_argument("--N", type=int, default=128, help="Batch size")
    parser.add_argument("--C", type=int, help="Channels; with --H instead of ResNet-50's shapes")
    parser.add_argument("--H", type=int, help="Height and width")
    parser.add_argument("--channels-last", action="store_true", help="Memory format of the input")
    return parser.parse_args(args)


class Operator(BenchmarkOperator):
    DEFAULT_PRECISION = "bf16"
    DEFAULT_METRICS: ClassVar[list[str]] = ["latency", "speedup", "accuracy", "gbps"]
    is_compute_bound = False

    def __init__(self, tb_args: argparse.Namespace, extra_args: list[str] | None = None):
        super().__init__(tb_args, extra_args)
        args = parse_op_args(self.extra_args)
        if (args.C is None) != (args.H is None):
            raise ValueError("--C and --H: expected both or neither")
        self.N = args.N
        self.shapes = RESNET_50 if args.C is None else [(args.C, args.H)]
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format

    def get_input_iter(self) -> Generator:
        requires_grad = self.mode != Mode.FWD_NO_GRAD
        like = {"dtype": self.dtype, "device": self.device}
        for C, H in self.shapes:
            x = torch.randn(self.N, C, H, H, **like).to(memory_format=self.memory_format)
            weight, bias = torch.rand(C, **like) + 0.5, torch.randn(C, **like)
            yield tuple(t.requires_grad_(requires_grad) for t in (x, weight, bias))

    @register_benchmark(baseline=True)
    def torch_batch_norm(self, x, weight, bias) -> Callable:
        return lambda: F.batch_norm(x, None, None, weight, bias, training=True)

    @register_benchmark()
    def torch_compile_batch_norm(self, x, weight, bias) -> Callable:
        compiled = torch.compile(F.batch_norm, mode="max-autotune-no-cudagraphs")
        if self.mode in (Mode.BWD, Mode.FWD_BWD):  # backward runs again and again over one graph
            from torch._functorch import config

            config.donated_buffer = False
        return lambda: compiled(x, None, None, weight, bias, training=True)

    @register_benchmark(enabled=hw3gpu_functional is not None, tags=["triton", "hw3gpu"])
    def hw3gpu_batch_norm(self, x, weight, bias) -> Callable:
        return lambda: hw3gpu_functional.batch_norm(x, None, None, weight, bias, training=True)

    def get_grad_to_none(self, args) -> list[torch.Tensor]:
        return list(args)

    @register_x_val(label="(N, C, H, W)")
    def get_x_val(self, example_inputs) -> tuple[int, int, int, int]:
        return tuple(example_inputs[0].shape)

    @register_metric()
    def gbps(self, fn, example_inputs, metrics: BenchmarkOperatorMetrics) -> float:
        """Of the least there is to move: forward reads x and writes y, backward reads x and dy and writes dx."""
        passes = {Mode.FWD: 2, Mode.FWD_NO_GRAD: 2, Mode.BWD: 3, Mode.FWD_BWD: 5}[self.mode]
        return passes * example_inputs[0].nbytes / metrics.latency * 1e-6
