"""Measurements behind benchmark.py and cuda_check.py: speed, ops, memory, correctness on a GPU."""
