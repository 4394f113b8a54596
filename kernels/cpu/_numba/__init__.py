"""What the CPU kernels stand on: how they are compiled, run in threads, and read and write elements."""
