"""Planned mode: zipping with fixed shapes, so that CUDA graphs can replay a pass for any batch.

The dynamic mode reads the number of live rows after every block, so the host waits for the device before it launches
the next kernels. In the planned mode, a *plan* sets the number of rows of each block, its *capacity*, from the counts
of recent batches. The number of live rows stays on the device, and every batch needs the same kernels on the same
shapes.

* *Surplus rows* fill a block up to its capacity. They hold no token, are zero and stand at the end. *Dummy sequences*
  cover them in attention, so that its kernels write every row.
* A batch with more live rows than a block's capacity *overflows* the plan, and the result of the pass is wrong. The
  host reads the counts after the last decision and runs such a batch again: in inference by the full plan, which
  nothing overflows, and in training in the dynamic mode.
* Passes are captured as CUDA graphs and *replayed*. Loss, optimizer and communication stay outside.

Files: `plans.py` (capacities, and their choice from recent batches), `tokens.py` (the store), `kernels.py` (halting
and norms on rows), `triton_kernels.py` (the Triton kernels behind them), `passes.py` (a pass by plan), `weights.py`
(weights cast together), `capture.py` (CUDA graphs of inference and training), `watch.py` (whether a model has changed
since a capture), `runner.py` (plans, graphs and fallbacks for the calls of a model), `dispatch.py` (which calls run by
graphs).
"""
