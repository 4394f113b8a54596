"""Eigenvectors of symmetric matrices, and how close they are."""
