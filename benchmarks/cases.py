"""The models and images that benchmark.py compares.

A case is one model with images of known token depths. Its variants share the weights:

    static (timm)        timm's model of the same size
    floor                the static model on shorter sequences, without any halting
    masked               A-ViT with halted tokens masked
    zipped               A-ViT with halted tokens removed
    zipped, early exit   zipped, and an image is dropped once its prefix tokens have halted (inference only)

graphed.py adds the variants that run by CUDA graphs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from timm.models import VisionTransformer
from timm.models.eva import Eva
from torch import Tensor, nn

import utils
from benchmarks.synthetic import set_synthetic_depths
from datasets import build_dataset, spread_sample
from macs import macs_per_image
from models_act import AdaptiveTokens
from training.checkpoints import Checkpoint
from training.models import create_model, default_image_size
from training.network import DEFAULT_MODEL, NetworkFlags, Purpose, resolve_network
from zipping.blocks import run_block
from zipping.rotations import embed_images, embeddings_of_blocks

STATIC, FLOOR, MASKED, ZIPPED = "static (timm)", "floor", "masked", "zipped"  # rows of the tables
EARLY_EXIT = "zipped, early exit"

MIN_IMAGES = 32  # images of a case, at least: single images differ in depth
MIN_BATCHES = 4  # batches of a case on CUDA, at least: a plan must hold for different batches


class Case(NamedTuple):
    """A model, its images and their token depths: the input of one table. name: of the model."""

    batch_size: int
    depth: Tensor  # [number of images, N], as the model predicts it
    images: Tensor  # [number of images, 3, H, W]
    model: nn.Module
    name: str = ""

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """The images in batches of `batch_size`."""
        return self.images.split(self.batch_size)


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """Yield the cases of the flags of benchmark.py.

    With --finetune: the checkpoint on real images, once per batch size.
    Without: imposed depths on images of Gaussian noise, once per batch size and mean depth.
    Raises UserError if the depths cannot be imposed, and FloatingPointError if the logits are not finite.
    """
    yield from _real_cases(args, device) if args.finetune else _imposed_cases(args, device)


def _num_images(batch_size: int, device: torch.device) -> int:
    return batch_size * max(math.ceil(MIN_IMAGES / batch_size), MIN_BATCHES if device.type == "cuda" else 1)


def _imposed_cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    name = args.model or DEFAULT_MODEL
    size = (args.input_size,) * 2 if args.input_size else default_image_size(name)
    for batch_size, mean_depth in itertools.product(args.batch_size, args.mean_depth):
        model = create_model(name, size)
        _impose_depths(name, model, mean_depth)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(_num_images(batch_size, device), 3, *model.patch_embed.img_size, generator=generator)
        yield make_case(batch_size, model.to(device), images.to(device), name)


def _impose_depths(name: str, model: nn.Module, mean_depth: float) -> None:
    try:
        set_synthetic_depths(model, mean_depth, spread=2.0)
    except ValueError as error:
        raise utils.UserError(f"--model {name}: {error}. Pass a trained checkpoint with --finetune.") from error


def _real_cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """Yield cases of the checkpoint of --finetune, on images spread over the evaluation set of --data-path."""
    checkpoint = Checkpoint.load(args.finetune)
    size = (args.input_size,) * 2 if args.input_size else None
    flags = NetworkFlags(args.model, size, budget=args.budget, data_set=args.data_set)
    settings = resolve_network(checkpoint, flags, Purpose.EVALUATION)
    model = checkpoint.build_network(settings)
    dataset = build_dataset(
        args.data_set,
        args.data_path,
        False,
        settings.img_size,
        num_classes=model.num_classes if "/" in args.data_set else None,  # timm's datasets may not record it
        preprocessing=settings.preprocessing,
    )
    for batch_size in args.batch_size:
        images = spread_sample(dataset, _num_images(batch_size, device))[0]
        yield make_case(batch_size, copy.deepcopy(model).to(device), images.to(device), settings.model)


@torch.no_grad()
def make_case(batch_size: int, model: nn.Module, images: Tensor, name: str = "") -> Case:
    """Run the model on the images and build a case with the token depths that it predicts.

    images: [number of images, 3, H, W]
    Raises FloatingPointError if logits are not finite.
    """
    model.eval()
    outputs = [model(batch, return_halting=True) for batch in images.split(batch_size)]
    for logits, _ in outputs:
        utils.check_finite(logits)
    depth = torch.cat([halting.depth for _, halting in outputs])
    return Case(batch_size, depth, images, model, name)


def static_twin(model: AdaptiveTokens) -> VisionTransformer:
    """Return timm's static model of the same size with a copy of the weights: the inverse of `adapt`."""
    twin = copy.deepcopy(model)
    bases = (base for base in type(model).__mro__ if issubclass(base, (VisionTransformer, Eva)))
    twin.__class__ = next(base for base in bases if not issubclass(base, AdaptiveTokens))
    return twin


class Floor(nn.Module):
    """timm's static model, run on the first tokens of each image only.

    Each block receives as many tokens per image as A-ViT has live there on average over the batch, rounded up. No
    score, sum or index is computed, so the time is that of blocks of these sizes on this machine. Calls must take
    the batches of the case in order, because each batch has its own token counts.
    """

    def __init__(self, static: VisionTransformer, case: Case):
        super().__init__()
        self.static, self.blocks, self.num_classes = static, static.blocks, static.num_classes
        blocks = torch.arange(case.model.num_blocks)[:, None, None]
        live = [(depth.cpu() > blocks).sum(dim=(1, 2)) for depth in case.depth.split(case.batch_size)]  # [L] per batch
        per_image = [-(-tokens // case.batch_size) for tokens in live]  # rounded up
        self.num_tokens = itertools.cycle([tokens.tolist() for tokens in per_image])

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, [B, num_classes], of images [B, 3, H, W]."""
        static = self.static
        x, embedding = embed_images(static, images)
        embeddings = embeddings_of_blocks(static, embedding)
        for block, rotary, num_tokens in zip(static.blocks, embeddings, next(self.num_tokens)):
            if num_tokens:
                num_patches = max(num_tokens - static.num_prefix_tokens, 0)
                rotary = None if rotary is None else rotary[..., :num_patches, :]
                x = run_block(block, x[:, :num_tokens], None, rotary)
        return static.forward_head(static.norm(x))


def variant_macs(model: nn.Module, depth: Tensor) -> dict[str, float]:
    """Return the mean MACs per image of each variant.

    depth: [B, N]
    With early exit, an image is dropped once the tokens that the head reads have halted.
    """
    num_read = model.num_prefix_tokens if model.reads_prefix else depth.shape[1]
    last_needed = depth[:, :num_read].amax(dim=1, keepdim=True)
    static = macs_per_image(model, torch.full_like(depth, model.num_blocks)).mean().item()
    adaptive = macs_per_image(model, depth).mean().item()
    early = macs_per_image(model, depth.minimum(last_needed)).mean().item()
    return {STATIC: static, FLOOR: adaptive, MASKED: static, ZIPPED: adaptive, EARLY_EXIT: early}
