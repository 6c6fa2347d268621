"""Metrics of a batch, as scalars and vectors on its device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from macs import macs_counter
from models_act import Halting
from zipping.planned.runner import graph_report


def halting_metrics(model: nn.Module, halting: Halting | None) -> dict[str, Tensor]:
    """Return the halting metrics of a batch as means over its images, or {} for a static model.

    live_share: [L], the share of tokens that each block processes; macs_saved: a share of the static model's MACs.
    """
    if halting is None:
        return {}
    depth, blocks, prefix = halting.depth, model.num_blocks, model.num_prefix_tokens
    per_block = torch.arange(blocks, device=depth.device)[:, None]
    count_macs = macs_counter(model, depth.shape[1])
    gmacs = count_macs(depth).mean() / 1e9
    gmacs_static = count_macs(torch.full_like(depth[:1], blocks)).mean() / 1e9
    class_token = {"class_token_depth": depth[:, 0].mean()} if model.has_class_token else {}
    return {
        "depth_mean": depth.mean(),
        "depth_max": depth.amax(dim=1).mean(),
        "depth_min": depth.amin(dim=1).mean(),
        "patch_depth_mean": depth[:, prefix:].mean(),
        **class_token,
        "live_share": (depth.flatten() > per_block).double().mean(dim=1),
        "layer_scores": halting.layer_scores,
        "gmacs": gmacs,
        "gmacs_static": gmacs_static,
        "macs_saved": 1 - gmacs / gmacs_static,
    }


@contextlib.contextmanager
def count_graph_hits(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that receives `graph_hits`, the fraction of the model's calls in this context replayed by graphs.

    It stays empty if none of these calls can use CUDA graphs, as on a CPU.
    """
    hits, before = {}, graph_report(model)
    yield hits
    after = graph_report(model)
    if batches := after.batches - before.batches:
        hits["graph_hits"] = torch.tensor((after.replayed - before.replayed) / batches)
