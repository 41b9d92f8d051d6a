"""Weights on a grid: the grids, training on them, and the bytes that ship."""
