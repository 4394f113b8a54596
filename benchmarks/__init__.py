"""Measurements: `python -m benchmarks traffic` counts bytes; each command verifies a result before it measures it."""
