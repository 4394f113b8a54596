"""The kernels behind `cross_entropy`."""
