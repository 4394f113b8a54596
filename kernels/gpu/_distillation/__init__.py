"""The kernels behind `distillation.py`."""
