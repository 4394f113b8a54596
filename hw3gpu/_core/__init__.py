"""What array functions and PyTorch functions share: the choice of kernels, arrays, outputs, checks."""
