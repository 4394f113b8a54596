"""The functions of NumPy, CuPy and torch arrays, an exercise a module."""
