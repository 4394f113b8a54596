"""The PyTorch side, an operation a module: arguments, eager autograd, operators, formula."""
