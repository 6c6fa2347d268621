"""Training and evaluation of adaptive models.

The modules, in the order in which main_act.py uses them:

* Flags: `arguments`, `parser` (its base class), `flag_effects` (flags that do nothing).
* Process: `command` (errors of every command), `signals`, `launch` (devices and processes), `rendezvous` (processes of
  one run).
* Network: `checkpoints` (files), `wrappers` (weights in files of other programs), `network` (which source decides),
  `gate_settings` (gate and budget), `sources` (their names), `classes` (rows of the head), `weights` (names, shapes),
  `models` (construction), `teacher`.
* Run: `build` (all parts by the flags), `schedule`, `loaders`, `directions` (fit of a gate), `gate` (search of a
  channel), `run_warnings`, `loop`, `budget` and `budget_table` (calibration), `resume` (changes since a checkpoint),
  `optimizer_state`, `evaluation`, `tensorboard`.
"""
