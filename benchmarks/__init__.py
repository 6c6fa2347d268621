"""Measurements behind two commands: benchmark.py and cuda_check.py.

cases.py         the models and images that are compared
timing.py        their speed and memory, in inference and in training
operations.py    the ops that halting adds to a block
onnx.py          ONNX Runtime and PyTorch on the CPU
synthetic.py     weights that impose token depths
plots.py         the figure of `benchmark.py --plot`
gpu_checks.py    correctness on a GPU
gpu_speed.py     kernel launches, speed and memory on a GPU
"""
