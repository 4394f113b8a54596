"""Softmax and cross entropy beside PyTorch's: `kernels benchmark` compares `self.out` with what `verify_…` returns."""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class SoftmaxBenchmark(Benchmark):
    seed = 0
    shape = (8192, 4096)

    def setup(self):
        self.z = torch.randn(self.shape, device=self.device, requires_grad=True)
        self.dy = torch.randn(self.shape, device=self.device)

    def benchmark_forward(self):
        with torch.no_grad():
            self.out = self.kernel.softmax(self.z)

    def verify_forward(self):
        with torch.no_grad():
            return F.softmax(self.z, -1)

    def benchmark_forward_backward(self):
        (self.out,) = torch.autograd.grad(self.kernel.softmax(self.z), self.z, self.dy)

    def verify_forward_backward(self):
        return torch.autograd.grad(F.softmax(self.z, -1), self.z, self.dy)[0]


class CrossEntropyBenchmark(Benchmark):
    seed = 0
    shape = (4096, 32000)

    def setup(self):
        self.z = torch.randn(self.shape, device=self.device, requires_grad=True)
        self.target = torch.randint(self.shape[1], self.shape[:1], device=self.device)

    def benchmark_forward(self):
        with torch.no_grad():
            self.out = self.kernel.cross_entropy(self.z, self.target)

    def verify_forward(self):
        with torch.no_grad():
            return F.cross_entropy(self.z, self.target)

    # the sum: of the mean every gradient would be below what the comparison allows
    def benchmark_forward_backward(self):
        (self.out,) = torch.autograd.grad(self.kernel.cross_entropy(self.z, self.target, reduction="sum"), self.z)

    def verify_forward_backward(self):
        return torch.autograd.grad(F.cross_entropy(self.z, self.target, reduction="sum"), self.z)[0]
