"""ONNX Runtime next to PyTorch, on the CPU."""

from __future__ import annotations

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn

import utils
from benchmarks.cases import EARLY_EXIT, STATIC, Case, multiply_adds, static_twin

SETTLE = 0.02  # seconds, after which the threads of another library do not spin any more
ONE_BY_ONE = ", one by one"  # a batch, by the graph of one image


def onnx_tables(title: str, case: Case, threads: Sequence[int], rounds: int) -> list[dict]:
    """Prints a table for each number of threads; returns the rows of all."""
    results = []
    before = torch.get_num_threads()
    for number in threads:
        torch.set_num_threads(number)
        try:
            rows = measure_onnx(case, number, rounds)
        except ValueError as error:  # of a network that cannot be written
            raise utils.UserError(str(error)) from error
        finally:
            torch.set_num_threads(before)
        clock = "CPU time" if number == 1 else "wall time"
        print(f"\n{title}, {number} thread{'s' * (number > 1)}, {clock}\n{format_onnx_rows(rows)}", flush=True)
        results += [{"threads": number, **row} for row in rows]
    return results


def measure_onnx(case: Case, threads: int, rounds: int) -> list[dict]:
    """A row for each form: milliseconds an image, speed-up over the faster static form of its library, ideal.

    Forms take turns at every batch, so that a machine that is now fast, now slow is so for all; ratios are of the sums
    of a round, and medians over the rounds. Of one thread the processor's time counts, of several the clock's.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    calls = _onnx_calls(case, threads)
    batches = [batch.numpy() for batch in case.batches]
    rounds_of = {name: [] for name in calls}
    for number in range(rounds + 1):
        seconds = Counter()
        for batch in batches:
            for name, call in calls.items():
                time.sleep(SETTLE * (threads > 1))
                start = clock()
                call(batch)
                seconds[name] += clock() - start
        for name in calls if number else ():  # the first round warms up
            rounds_of[name].append(seconds[name] / len(case.images))
    macs, rows = multiply_adds(case.model, case.depth), []
    ideal = macs[STATIC] / macs[EARLY_EXIT]
    for name, times in rounds_of.items():
        library = name.partition(" ")[0]
        static = zip(*(rounds_of[other] for other in calls if other.startswith(f"{library} static")))
        speed_up = statistics.median(min(statics) / own for statics, own in zip(static, times))
        own_ideal = 1.0 if "static" in name else ideal
        row = {"form": name, "milliseconds": 1e3 * statistics.median(times), "speed_up": speed_up}
        rows.append(row | {"ideal": own_ideal, "speed_up_of_ideal": speed_up / own_ideal})
    return rows


def _onnx_calls(case: Case, threads: int) -> dict[str, Callable]:
    """Each takes a batch, [B, 3, H, W] of NumPy's."""
    from deployment.onnx_graph import write_graph

    networks = {"static": copy.deepcopy(case.model), "zipped": case.model}
    networks["static"].halting = False

    def in_torch(model: nn.Module) -> Callable:
        @torch.inference_mode()
        def run(batch) -> None:
            model(torch.from_numpy(batch))

        return run

    calls = {"PyTorch static": in_torch(static_twin(case.model).eval()), "PyTorch zipped": in_torch(case.model)}
    for name, model in networks.items():
        one = _onnx_call(write_graph(model, "single"), threads)
        if case.batch_size == 1:
            calls[f"ONNX {name}"] = one
            continue
        calls[f"ONNX {name}"] = _onnx_call(write_graph(model, "batch"), threads)
        calls[f"ONNX {name}{ONE_BY_ONE}"] = lambda batch, one=one: [one(batch[i : i + 1]) for i in range(len(batch))]
    return calls


def _onnx_call(graph, threads: int) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads spin in others' time
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(["logits"], {"images": batch})


def format_onnx_rows(rows: list[dict]) -> str:
    lines = [f"{'':24}{'ms/image':>10}{'speed-up':>10}{'ideal':>8}{'of ideal':>10}"]
    for row in rows:
        shares = f"{row['speed_up']:>10.2f}{row['ideal']:>8.2f}{row['speed_up_of_ideal']:>10.2f}"
        lines.append(f"{row['form']:24}{row['milliseconds']:>10.2f}{shares}")
    return "\n".join(lines)
