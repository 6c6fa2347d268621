"""Planned mode: zipping with fixed shapes, so that CUDA graphs can capture a pass.

A *plan* sets the number of rows of each block, its *capacity*, from the counts of recent batches.
The number of live rows stays on the device. Rows beyond it are *surplus rows*: they hold no token,
stand at the end, and *dummy sequences* cover them in attention. A batch with more live rows than a
block's capacity *overflows* the plan. Its result is wrong, and it must run again.

Files: `plans.py` (capacities, and their choice from recent batches), `tokens.py` (the store),
`kernels.py` (halting and norms on rows), `triton_kernels.py` (the Triton kernels behind them).
"""
