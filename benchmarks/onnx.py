"""Speed of the graphs that export_onnx.py writes, in ONNX Runtime, compared with PyTorch on the CPU."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

import utils
from benchmarks.cases import EARLY_EXIT, STATIC, Case, static_twin, variant_macs

if TYPE_CHECKING:
    import numpy as np
    import onnx  # optional, like onnxruntime

Call = Callable[["np.ndarray"], object]  # runs a model on a batch of images, [B, 3, H, W] float32

SETTLE = 0.02  # seconds until the idle threads of the other library stop spinning
ONE_BY_ONE = ", one by one"  # the images of a batch, each in a call of the graph for one image


def measure_onnx(case: Case, threads: int, rounds: int) -> list[dict]:
    """Measure the static and the zipped model in PyTorch and in ONNX Runtime.

    Returns one row per implementation: milliseconds per image, speedup over the fastest static implementation in the
    same library, and the ratio of MACs (`ideal`). Speedups are ratios of the times of a round, and medians over the
    rounds. One thread is measured in CPU time, several in wall time.
    Raises UserError if the model cannot be exported.
    """
    with _torch_threads(threads):
        try:
            calls = _build_calls(case, threads)
        except ValueError as error:
            raise utils.UserError(str(error)) from error
        seconds = _time_by_batch(calls, case, threads, rounds)
    macs, rows = variant_macs(case.model, case.depth), []
    for name, times in seconds.items():
        library = name.partition(" ")[0]
        static = zip(*(seconds[other] for other in calls if other.startswith(f"{library} static")))
        speedup = statistics.median(min(statics) / own for statics, own in zip(static, times))
        ideal = 1.0 if "static" in name else macs[STATIC] / macs[EARLY_EXIT]
        rows.append(
            {
                "threads": threads,
                "form": name,
                "milliseconds": 1e3 * statistics.median(times),
                "speed_up": speedup,
                "ideal": ideal,
                "speed_up_of_ideal": speedup / ideal,
            }
        )
    return rows


@contextlib.contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time_by_batch(calls: dict[str, Call], case: Case, threads: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds per image of each call, one value per round, after a round to warm up.

    The calls take turns at every batch, so that a change of the machine's speed affects all of them alike.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    batches = [batch.numpy() for batch in case.batches]
    per_image = {name: [] for name in calls}
    for number in range(rounds + 1):
        seconds = Counter()
        for batch in batches:
            for name, call in calls.items():
                time.sleep(SETTLE * (threads > 1))
                start = clock()
                call(batch)
                seconds[name] += clock() - start
        for name in calls if number else ():
            per_image[name].append(seconds[name] / len(case.images))
    return per_image


def _build_calls(case: Case, threads: int) -> dict[str, Call]:
    """Build one call per row. Raises ValueError if the model cannot be exported."""
    from deployment.onnx_graph import write_graph

    calls = {"PyTorch static": _torch_call(static_twin(case.model)), "PyTorch zipped": _torch_call(case.model)}
    static = copy.deepcopy(case.model)
    static.halting = False
    for name, model in {"ONNX static": static, "ONNX zipped": case.model}.items():
        single = _onnx_call(write_graph(model, "single"), threads)
        if case.batch_size == 1:
            calls[name] = single
        else:
            calls[name] = _onnx_call(write_graph(model, "batch"), threads)
            calls[name + ONE_BY_ONE] = _one_by_one(single)
    return calls


def _torch_call(model: nn.Module) -> Call:
    model.eval()

    @torch.inference_mode()
    def call(batch: np.ndarray) -> None:
        model(torch.from_numpy(batch))

    return call


def _onnx_call(graph: onnx.ModelProto, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # otherwise its idle threads slow PyTorch down
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(["logits"], {"images": batch})


def _one_by_one(single: Call) -> Call:
    return lambda batch: [single(batch[i : i + 1]) for i in range(len(batch))]


def format_onnx_rows(rows: list[dict]) -> str:
    """Format the rows of `measure_onnx` as a table."""
    lines = [f"{'':24}{'ms/image':>10}{'speedup':>10}{'ideal':>8}{'of ideal':>10}"]
    for row in rows:
        ratios = f"{row['speed_up']:>10.2f}{row['ideal']:>8.2f}{row['speed_up_of_ideal']:>10.2f}"
        lines.append(f"{row['form']:24}{row['milliseconds']:>10.2f}{ratios}")
    return "\n".join(lines)
