"""Token-depth heat maps: what each patch of an image cost."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import utils
from datasets import denormalize
from utils import autocast

COLORMAP = "hot"  # the paper's: from black to white, whiter is deeper
PICTURE_SIZE = 256  # smallest height of a picture, in pixels
DEMO_FOLDER = "token_act_visualization"
ROWS_OF = 16  # images in the picture of shrinking rows


class Specimen(NamedTuple):
    """An image and the depths of its patches, with what decides whether it is shown."""

    spread: float
    index: int
    image: np.ndarray  # [H, W, 3] uint8
    depth: np.ndarray  # [grid height, grid width] float


def depth_spread(patch_depth: Tensor) -> Tensor:
    """patch_depth: [B, n] -> [B], standard deviation over the patches."""
    return patch_depth.std(dim=1, correction=0)


@torch.no_grad()
def demo(model: nn.Module, loader: DataLoader, device: torch.device, amp: str, output_dir: Path) -> Path:
    """Draws, for every class, the image whose patch depths vary most; returns the folder.

    One pass over the data, in any order; of equally varied images the first counts.
    """
    model.eval()
    best: dict[int, Specimen] = {}
    indices = itertools.count() if isinstance(loader.dataset, IterableDataset) else iter(loader.sampler)
    for images, targets in utils.with_progress(loader, "Demo", dict):
        with autocast(device, amp):
            _, halting = model(images.to(device), return_halting=True)
        depth = halting.depth[:, model.num_prefix_tokens :].cpu()
        for image, target, patch_depth, spread in zip(images, targets.tolist(), depth, depth_spread(depth).tolist()):
            index = next(indices)
            known = best.get(target)
            if known is None or (spread, -index) > (known.spread, -known.index):
                best[target] = Specimen(spread, index, *_arrays(model, image, patch_depth))
    folder = output_dir / DEMO_FOLDER
    everyone = utils.gather(best)
    if utils.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        shown = []
        for target in sorted({target for own in everyone for target in own}):
            specimens = [own[target] for own in everyone if target in own]
            shown.append(max(specimens, key=lambda s: (s.spread, -s.index)))
            _draw(shown[-1], model.num_blocks, folder / f"class{target}")
        draw_rows([specimen.depth for specimen in shown[:ROWS_OF]], model.num_blocks, folder / "rows.png")
    return folder


def draw_rows(depths: list[np.ndarray], num_blocks: int, path: Path) -> None:
    """How the rows of a zipped batch shrink: the live patches of each image, block by block."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    blocks = np.arange(1, num_blocks + 1)
    bottom = np.zeros(num_blocks)
    for number, depth in enumerate(depths):
        live = (depth.reshape(-1, 1) >= blocks).sum(axis=0)
        axes.bar(blocks, live, bottom=bottom, width=0.9, color=colormaps["tab20"](number % 20), edgecolor="white")
        bottom += live
    total = sum(depth.size for depth in depths)
    axes.axhline(total, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("block")
    axes.set_ylabel("rows that it processes")
    axes.set_title(f"{len(depths)} images (colours), {total} patches; dashed: a static network")
    axes.set_xticks(blocks)
    figure.savefig(path, dpi=120)


def _arrays(model: nn.Module, image: Tensor, patch_depth: Tensor) -> tuple[np.ndarray, np.ndarray]:
    grid = model.patch_embed.dynamic_feat_size(image.shape[-2:])
    return denormalize(image).permute(1, 2, 0).numpy(), patch_depth.view(grid).numpy()


def _draw(specimen: Specimen, num_blocks: int, stem: Path) -> None:
    """Writes {stem}_ref.jpg, {stem}_token_depth.jpg and {stem}_combined.jpg."""
    reference = enlarge(Image.fromarray(specimen.image))
    depth_map = with_legend(heat_map(specimen.depth, num_blocks, reference.size), num_blocks)
    pictures = {"ref": reference, "token_depth": depth_map, "combined": side_by_side(reference, depth_map)}
    for name, picture in pictures.items():
        picture.save(stem.with_name(f"{stem.name}_{name}.jpg"), quality=95, subsampling=0)


def enlarge(image: Image.Image) -> Image.Image:
    """By a whole factor, without smoothing, to at least PICTURE_SIZE pixels."""
    factor = -(-PICTURE_SIZE // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def colors(depth: np.ndarray, num_blocks: int) -> np.ndarray:
    """depth: [...], 0..num_blocks -> [..., 3] uint8; full depth is always white."""
    return (colormaps[COLORMAP](depth / num_blocks)[..., :3] * 255).round().astype(np.uint8)


def heat_map(depth: np.ndarray, num_blocks: int, size: tuple[int, int]) -> Image.Image:
    """depth: [grid height, grid width] -> a picture of `size` (width, height), one flat square per patch."""
    return Image.fromarray(colors(depth, num_blocks)).resize(size, Image.Resampling.NEAREST)


def with_legend(picture: Image.Image, num_blocks: int) -> Image.Image:
    """Adds a scale of depths at the right, from 1 at the bottom to full depth at the top."""
    height = picture.height
    font = ImageFont.load_default(size=height / 20)
    margin, swatch, label = height // 25, height // 14, int(font.getlength(str(num_blocks)))
    canvas = Image.new("RGB", (picture.width + 3 * margin + swatch + label, height), "white")
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    left, step = picture.width + margin, height / num_blocks
    for depth in range(1, num_blocks + 1):
        bottom, top = height - 1 - (depth - 1) * step, height - 1 - depth * step
        color = tuple(colors(np.array([depth]), num_blocks)[0].tolist())
        draw.rectangle([left, max(top, 0), left + swatch, bottom], fill=color, outline="gray")
        draw.text((left + swatch + margin, (top + bottom) / 2), str(depth), fill="black", font=font, anchor="lm")
    return canvas


def side_by_side(*pictures: Image.Image) -> Image.Image:
    """On white, at equal height, a small gap between them."""
    gap = pictures[0].height // 25
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, pictures[0].height), "white")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + gap
    return canvas
