"""The kernels behind `batch_norm`."""
