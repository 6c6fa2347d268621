"""The models and images that the benchmark compares: A-ViT, timm's static model and the floor."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

import utils
from benchmarks.synthetic import set_synthetic_depths
from datasets import Preprocessing, build_dataset, spread_sample
from models_act import AdaptiveTokens, macs_per_image
from training.checkpoints import Checkpoint
from training.models import create_model, default_image_size

STATIC, FLOOR, EARLY_EXIT = "static (timm)", "floor", "zipped, early exit"  # rows of a table

MIN_IMAGES = 32  # that one timing sees at least, in batches: single images differ in depth


class Case(NamedTuple):
    """What one table is about."""

    batch_size: int
    depth: Tensor  # [number of images, N], measured
    images: Tensor  # [number of images, 3, H, W]
    model: nn.Module

    @property
    def batches(self) -> tuple[Tensor, ...]:
        return self.images.split(self.batch_size)


def cases(args, device: torch.device) -> Iterator[Case]:
    """Imposed depths on normal noise, or a checkpoint's on real images."""
    for batch_size in args.batch_size:
        count = batch_size * math.ceil(MIN_IMAGES / batch_size)
        if args.finetune:
            yield make_case(batch_size, *_real(args, count, device))
            continue
        for mean_depth in args.mean_depth:
            size = (args.input_size,) * 2 if args.input_size else default_image_size(args.model)
            model = create_model(args.model, size)
            _impose(args.model, model, mean_depth)
            images = torch.randn(count, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
            yield make_case(batch_size, model.to(device), images.to(device))


def _impose(name: str, model: nn.Module, mean_depth: float) -> None:
    try:
        set_synthetic_depths(model, mean_depth, spread=2.0)
    except ValueError as error:
        raise utils.UserError(f"--model {name}: {error}; give a trained network with --finetune") from error


def _real(args, count: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    checkpoint = Checkpoint.load(args.finetune)
    model = checkpoint.build_model(args.model, img_size=args.input_size and (args.input_size,) * 2, budget=args.budget)
    known = {"num_classes": model.num_classes} if "/" in args.data_set else {}  # timm's data sets may not know it
    known |= {"preprocessing": Preprocessing.from_model(model)}
    data = build_dataset(args.data_set, args.data_path, False, model.patch_embed.img_size, **known)
    return model.to(device), spread_sample(data, count)[0].to(device)


@torch.no_grad()
def make_case(batch_size: int, model: nn.Module, images: Tensor) -> Case:
    model.eval()
    answers = [model(batch, return_halting=True) for batch in images.split(batch_size)]
    for logits, _ in answers:
        utils.check_finite(logits)
    depth = torch.cat([halting.depth for _, halting in answers])
    return Case(batch_size, depth, images, model)


def static_twin(model: AdaptiveTokens) -> VisionTransformer:
    """timm's own network of the same size, with the same weights: what `adapt` was given."""
    twin = copy.deepcopy(model)
    bases = type(model).__mro__
    twin.__class__ = next(b for b in bases if issubclass(b, VisionTransformer) and not issubclass(b, AdaptiveTokens))
    return twin


class Floor(nn.Module):
    """A static network that runs each block on the first tokens alone: as many, on average, as live in the case."""

    def __init__(self, network: VisionTransformer, case: Case):
        super().__init__()
        self.network, self.blocks, self.num_classes = network, network.blocks, network.num_classes
        blocks = torch.arange(case.model.num_blocks)[:, None, None]
        live = [(depth.cpu() > blocks).sum(dim=(1, 2)) for depth in case.depth.split(case.batch_size)]  # [L] per batch
        counts = [-(-live_rows // case.batch_size) for live_rows in torch.stack(live)]
        self.num_tokens = itertools.cycle([c.tolist() for c in counts])

    def forward(self, images: Tensor) -> Tensor:
        network = self.network
        x = network.norm_pre(network._pos_embed(network.patch_embed(images)))
        for block, count in zip(network.blocks, next(self.num_tokens)):
            if count:
                x = block(x[:, :count])
        return network.forward_head(network.norm(x))


def multiply_adds(model: nn.Module, depth: Tensor) -> dict[str, float]:
    """depth: [B, N] -> per image, of each form, as computed.

    With early exit no token goes on after those of its image that the head reads.
    """
    prefix = model.num_prefix_tokens if model.reads_prefix else depth.shape[1]
    last_needed = depth[:, :prefix].amax(dim=1, keepdim=True)
    static = macs_per_image(model, torch.full_like(depth, model.num_blocks)).mean().item()
    adaptive = macs_per_image(model, depth).mean().item()
    early = macs_per_image(model, depth.minimum(last_needed)).mean().item()
    return {STATIC: static, FLOOR: adaptive, "masked": static, "zipped": adaptive, EARLY_EXIT: early}
