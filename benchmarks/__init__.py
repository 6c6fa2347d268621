"""Measurements behind two commands: benchmark.py and cuda_check.py.

cases.py         the models and images that are compared
graphed.py       the variants that run by plans and CUDA graphs
planned.py       the variant by plans, without CUDA graphs
timing.py        their speed and memory, in inference and in training
operations.py    the ops that halting adds to a block
onnx.py          ONNX Runtime and PyTorch on the CPU
synthetic.py     weights that impose token depths
plots.py         the figure of `benchmark.py --plot`
gpu_checks.py    correctness on a GPU
gpu_graphs.py    correctness and costs of CUDA graphs
gpu_speed.py     kernel launches, speed and memory on a GPU
aims.py          aims for the speed, and what was measured
"""
