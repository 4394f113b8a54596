"""What both sides of the library stand on: the choice of kernels, arrays, outputs, checks."""
