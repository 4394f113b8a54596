"""Batch normalisation beside PyTorch's: `kernels benchmark` compares `self.out` with what `verify_…` returns."""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class BatchNormBenchmark(Benchmark):
    seed = 0
    shape = (32, 256, 56, 56)

    def setup(self):
        self.x = torch.randn(self.shape, device=self.device, requires_grad=True)
        self.dy = torch.randn(self.shape, device=self.device)
        self.weight, self.bias = (torch.randn(self.shape[1], device=self.device) for _ in range(2))

    def benchmark_training(self):
        with torch.no_grad():
            self.out = self.kernel.batch_norm(self.x, None, None, self.weight, self.bias, training=True)

    def verify_training(self):
        with torch.no_grad():
            return F.batch_norm(self.x, None, None, self.weight, self.bias, training=True)

    def benchmark_training_forward_backward(self):
        y = self.kernel.batch_norm(self.x, None, None, self.weight, self.bias, training=True)
        (self.out,) = torch.autograd.grad(y, self.x, self.dy)

    def verify_training_forward_backward(self):
        y = F.batch_norm(self.x, None, None, self.weight, self.bias, training=True)
        return torch.autograd.grad(y, self.x, self.dy)[0]
