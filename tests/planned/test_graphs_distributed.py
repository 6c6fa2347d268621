"""DistributedDataParallel around a model whose passes are captured."""

import contextlib

import graph_standin as standin
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import halting_model, images
from graphed_models import LOOSE, SIZE
from torch import nn
from torch.testing import assert_close

import zipping
from zipping.planned import capture, dispatch, runner
from zipping.planned.dispatch import graph_report
from zipping.planned.plans import Planner

STEPS = 4


def _step(model, step, rank):
    """Accumulate the gradients of two micro-batches. Processes exchange them after the second one."""
    for number in range(2):
        is_last = number == 1
        with contextlib.nullcontext() if is_last or not hasattr(model, "no_sync") else model.no_sync():
            logits, halting = model(images(3, seed=10 * step + 2 * rank + number), return_halting=True)
            (logits.square().mean() + halting.ponder_cost.mean()).backward()


def _run_process(rank, file, queue):
    torch.set_num_threads(1)
    capture.capture, capture.warm_up, capture.new_pool = standin.capture, standin.warm_up, standin.new_pool
    dispatch.supports_graphs = zipping.uses_device_form = lambda images: True
    runner.Planner = lambda *args, **options: Planner(*args, **options, **LOOSE)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = halting_model(**SIZE, cuda_graphs=True).train()
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    for step in range(STEPS):
        model.zero_grad()
        _step(wrapped, step, rank)
    if rank == 0:
        queue.put((graph_report(model).replayed, [p.grad.numpy().copy() for p in model.parameters()]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_replayed_passes(tmp_path):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_run_process, args=(rank, tmp_path / "file", queue)) for rank in range(2)]
    for process in processes:
        process.start()
    replayed, found = queue.get()
    for process in processes:
        process.join()
    assert replayed == 2 * STEPS - 2
    model = halting_model(**SIZE, zip_tokens=False).train()
    for rank in range(2):
        _step(model, STEPS - 1, rank)
    assert_close([torch.from_numpy(g) for g in found], [p.grad / 2 for p in model.parameters()], rtol=1e-4, atol=5e-5)
