"""What the tokens do, in pictures.

    python visualize.py IMAGE... --finetune CHECKPOINT           # files, folders, globs: a panel and an animation each
    python visualize.py --summary --data-set NAME --data-path DIR --finetune CHECKPOINT     # charts of a data set
    python visualize.py --curves OUTPUT_DIR...                   # charts of training runs

`--html` adds a gallery to search and sort. `--help` lists the flags. Bad input ends with one line on
stderr and exit status 2; images that cannot be read are named, the rest is done, the status is 1.
"""

from __future__ import annotations

import argparse
import glob
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import timm
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import arguments
import charts
import checkpoints
import pages
import pictures
import utils
from building import StartingPoint, amp_of, build_model, image_size, loader_options, run_command, validation_set
from datasets import IMAGE_SUFFIXES, UnreadableImage, class_names, evaluation_transform, has_image_name, load_image
from engine_act import check_complete
from loaders import ImageLoader, evaluation_loader
from losses import DistributionPriorLoss
from pictures import Style
from specimens import Census, Selection, Specimen, examine, examine_all
from utils import UserError, log, nearest, warn

GALLERY, SUMMARY = "index.html", "summary.html"


# --demo of main_act.py ---------------------------------------------------------------------------


def demo(
    model: nn.Module,
    loader: ImageLoader,
    device: torch.device,
    amp: str,
    folder: Path,
    names: Sequence[str],
    *,
    criterion: str = "std",
    per_class: int = 1,
    html: bool = False,
) -> None:
    """Draws `per_class` images of every class, by one of specimens.CRITERIA; all processes take part.

    names: of the classes. Of an equal measure the first in the data set counts, in any order of the data.
    UserError where the folder cannot be written.
    """
    checkpoints.prepare_output_dir(folder, "--demo-dir")
    selection = Selection(criterion, per_class)
    for batch in examine_all(model, loader, device, amp, "Demo"):
        for specimen in batch.specimens:
            selection.add(specimen)
    chosen = selection.of_all_processes()
    style = Style(model.num_blocks, pictures.PAPERS_COLORMAP)
    for specimens in utils.with_progress(chosen[utils.rank() :: utils.world_size()], "Drawing", dict):
        for number, specimen in enumerate(specimens, start=1):
            stem = f"class{specimen.target}" + (f"_{number}" if number > 1 else "")
            for kind, picture in pictures.demo_pictures(specimen, names, style).items():
                _save(folder / f"{stem}_{kind}.jpg", _jpeg(picture))
    if utils.is_main() and chosen:
        _save(folder / "teaser.png", _png(charts.teaser([first for first, *_ in chosen], style)))
        if html:
            shown = [specimen for specimens in chosen for specimen in specimens]
            pages.write_gallery(folder / GALLERY, "Token depths", _facts(shown), shown, names, style)
    drawn = sum(utils.gather(sum(map(len, chosen[utils.rank() :: utils.world_size()]))))
    log(f"token depths of {drawn} images drawn in {folder}" + (f"; see {GALLERY}" if html and chosen else ""))
    if not drawn:
        warn(f"no image to show by --demo-by {criterion}")


# The command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """SystemExit with status 1 where images could not be read, 2 for other bad input."""
    parser = make_parser()
    defaults = arguments.parse_args(["--eval"])  # what the network and the data are made from
    defaults.model = defaults.input_size = None
    args = parser.parse_args(argv, defaults)
    if sum(map(bool, (args.images, args.summary, args.curves))) != 1:
        parser.error("expected images, --summary or --curves, one of them")
    if not args.curves and not args.finetune:
        parser.error("--finetune CHECKPOINT says which network to look into")
    status = run_command(parser, args, run)
    if status:
        raise SystemExit(status)


def make_parser() -> arguments.Parser:
    parser = arguments.Parser(prog="visualize.py", description="What the tokens of an A-ViT do, in pictures.")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files, folders, or globs")
    parser.add_argument("--summary", action="store_true", help="charts of a whole data set")
    parser.add_argument("--curves", nargs="+", metavar="OUTPUT_DIR", help="charts of training runs, from their log.txt")
    add = parser.add_argument_group("network").add_argument
    add("--finetune", metavar="FILE", help="checkpoint, a path or https URL")
    add("--model", type=arguments.model_name, metavar="NAME", help="registered avit model (default: the checkpoint's)")
    kind = {"type": arguments.at_least_one, "nargs": "+", "metavar": "PIXELS"}
    add("--input-size", **kind, help="image size; two numbers: height, width (default: the checkpoint's)")
    arguments.borrow(parser, "how it runs", ("gate_scale", "gate_center", "use_ema", "device", "amp", "batch_size"))
    arguments.borrow(parser, "data set", ("data_set", "data_path", "val_split", "num_classes", "inat_category"))
    arguments.borrow(parser, "loading", ("num_workers", "class_index"))
    add = parser.add_argument_group("pictures").add_argument
    add("--output-dir", default="visualization", metavar="DIR", help="where to")
    add("--cmap", type=_colormap, default=pictures.COLORMAP, metavar="NAME", help="colour map; the paper's is hot")
    add("--size", type=arguments.at_least_one, default=224, metavar="PIXELS", help="smallest side of each image shown")
    add("--animation", choices=("gif", "webp", "none"), default="gif", help="of the halting, block by block")
    arguments.borrow(parser, "gallery", ("html", "demo_images", "demo_by"))
    return parser


def _colormap(name: str) -> str:
    if name not in colormaps:
        raise argparse.ArgumentTypeError(f"unknown colour map {name!r}{nearest(name, colormaps)}")
    return name


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Returns the exit status."""
    folder = checkpoints.prepare_output_dir(args.output_dir)
    if args.curves:
        draw_curves([Path(run) for run in args.curves], folder)
        return 0
    if args.images and utils.world_size() > 1:
        raise UserError("single images are drawn by one process: start it without torchrun")
    start = StartingPoint.of(args)
    args.model = args.model or start.model_name()
    size = start.image_size() or timm.models.get_pretrained_cfg(args.model).input_size[1:]
    args.input_size = args.input_size or list(size)
    if args.summary:
        draw_summary(args, start, device, folder)
        return 0
    return draw_images(args, start, device, folder)


# Single images -----------------------------------------------------------------------------------


def draw_images(args: argparse.Namespace, start: StartingPoint, device: torch.device, folder: Path) -> int:
    """A panel and an animation for each image; returns 1 where some cannot be read."""
    files, problems = find_images(args.images)
    for problem in problems:
        warn(problem)
    if not files:
        raise UserError(f"no image found: {'; '.join(problems)}")
    classes = start.class_names()
    names = class_names(classes, None, args.class_index)
    model = build_model(args, len(classes), start).to(device)
    style = Style(model.num_blocks, args.cmap, args.size)
    stems, shown = list(distinct_stems(files)), []
    for first in utils.with_progress(range(0, len(files), args.batch_size), "Images", dict):
        batch = range(first, min(first + args.batch_size, len(files)))
        specimens = _examine_files(files, batch, model, image_size(args), classes, device, amp_of(args))
        for specimen in specimens:
            stem = stems[specimen.index]
            _save(folder / f"{stem}_panel.png", _png(pictures.panel(specimen, names, style)))
            if args.animation != "none":
                animation = pictures.animation(pictures.frames(specimen, style), args.animation)
                _save(folder / f"{stem}.{args.animation}", animation)
        shown += specimens
    if not shown:
        raise UserError("not one image could be read")
    if args.html:
        pages.write_gallery(folder / GALLERY, "Token depths", _facts(shown), shown, names, style)
    log(f"{len(shown)} images drawn in {folder}")
    return int(bool(problems) or len(shown) < len(files))


def find_images(patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Image files named, in folders (at any depth), or matched by globs, each once; and what was not found."""
    files, problems = [], []
    for pattern in patterns:
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not found:
            problems.append(f"{pattern}: no such file or folder, and no file matches it")
        for path in map(Path, found):
            inside = (
                sorted(p for p in path.rglob("*") if has_image_name(p) and p.is_file()) if path.is_dir() else [path]
            )
            if not inside:
                problems.append(f"{path}: no image in this folder; looked for {' '.join(IMAGE_SUFFIXES)}")
            files += inside
    return list(dict.fromkeys(files)), problems


def distinct_stems(files: Iterable[Path]) -> Iterator[str]:
    """The names of files without their endings, numbered where they would be the same."""
    taken: set[str] = set()
    for file in files:
        numbered = (f"{file.stem}_{number}" for number in itertools.count(2))
        stem = next(stem for stem in itertools.chain([file.stem], numbered) if stem not in taken)
        taken.add(stem)
        yield stem


def _examine_files(
    files: Sequence[Path],
    places: Sequence[int],
    model: nn.Module,
    size: tuple[int, int],
    classes: list[str],
    device: torch.device,
    amp: str,
) -> list[Specimen]:
    """The files at these places that can be read; the others are named. A folder with a class's name is a label."""
    transform, images = evaluation_transform(size), {}
    for place in places:
        try:
            images[place] = transform(load_image(files[place]))
        except UnreadableImage as error:
            warn(f"{error}; it is passed over")
    if not images:
        return []
    numbers = {name: number for number, name in enumerate(classes)}
    targets = [numbers.get(files[place].parent.name, -1) for place in images]
    names = [str(files[place]) for place in images]
    batch = torch.stack(list(images.values()))
    return examine(model, batch, device, amp, targets=targets, names=names, indices=list(images)).specimens


# A data set --------------------------------------------------------------------------------------


def draw_summary(args: argparse.Namespace, start: StartingPoint, device: torch.device, folder: Path) -> None:
    """Charts of the validation set as PNG files, and a page of them; all processes take part."""
    images = validation_set(args)
    names = class_names(images.classes, args.data_path, args.class_index)
    model = build_model(args, len(names), start).to(device)
    loader = evaluation_loader(images, args.batch_size, **loader_options(args))
    style = Style(model.num_blocks, args.cmap, args.size)
    examples, gallery, parts = Selection(), Selection(args.demo_by, args.demo_images), []
    for batch in examine_all(model, loader, device, amp_of(args), "Summary"):
        parts.append(Census.of_batch(batch))
        for specimen in batch.specimens:
            examples.add(specimen)
            if args.html:
                gallery.add(specimen)
    parts = [part for own in utils.gather(parts) for part in own]
    example_of = {own[0].target: own[0] for own in examples.of_all_processes()}
    shown = [specimen for own in gallery.of_all_processes() for specimen in own]
    if not utils.is_main():
        return
    if not parts:
        raise UserError("not one image could be read")
    census = Census.of(parts)
    check_complete({"images": len(census.target)}, loader)
    prior = DistributionPriorLoss(model.num_blocks).target.numpy()
    drawn = []
    for name, chart in charts.summary_charts(census, prior, names, example_of, style).items():
        drawn.append((chart.title, chart.explanation, _png(chart.figure)))
        _save(folder / f"{name}.png", drawn[-1][2])
    if args.html:
        pages.write_gallery(folder / GALLERY, f"{args.data_set}: token depths", _facts(shown), shown, names, style)
    facts = [("model", args.model), ("checkpoint", Path(args.finetune).name), *_facts_of_census(census)]
    pages.write_summary(folder / SUMMARY, f"{args.data_set}: summary", facts, drawn, GALLERY if args.html else None)
    log(f"summary of {len(census.target)} images in {folder / SUMMARY}")


# Training runs -----------------------------------------------------------------------------------


def draw_curves(folders: Sequence[Path], folder: Path) -> None:
    """Accuracy, losses, depth and multiply-adds over the epochs of runs, and accuracy against multiply-adds."""
    runs = charts.read_runs(folders)
    _save(folder / "curves.png", _png(charts.curves(runs)))
    _save(folder / "accuracy_macs.png", _png(charts.accuracy_against_macs(runs)))
    log(f"curves of {len(runs)} run(s) in {folder}")


# Files -------------------------------------------------------------------------------------------


def _facts(specimens: Sequence[Specimen]) -> list[tuple[str, str]]:
    """Means over the images shown."""
    known = [one for one in specimens if one.target >= 0]
    right = [("top-1", f"{sum(not one.is_wrong for one in known) / len(known):.1%}")] if known else []
    depth = sum(one.mean_depth for one in specimens) / len(specimens)
    saved = 1 - sum(one.macs for one in specimens) / sum(one.static_macs for one in specimens)
    return [("images", f"{len(specimens):,}"), *right, ("mean depth", f"{depth:.2f}"), ("saved", f"{saved:.1%}")]


def _facts_of_census(census: Census) -> list[tuple[str, str]]:
    macs, static_macs = census.macs.mean(), census.static_macs
    return [
        ("images", f"{len(census.target):,}"),
        ("top-1", f"{census.is_right.mean():.2%}"),
        ("patch depth", f"{census.depth.mean():.2f} of {census.num_blocks}"),
        ("class token depth", f"{census.class_token_depth.mean():.2f}"),
        ("multiply-adds", f"{pictures.macs_text(macs)} of {pictures.macs_text(static_macs)}"),
        ("saved", f"{1 - macs / static_macs:.1%}"),
    ]


def _png(picture: Image.Image | Figure) -> bytes:
    file = io.BytesIO()
    save = picture.savefig if isinstance(picture, Figure) else picture.save
    save(file, format="png")
    return file.getvalue()


def _jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def _save(path: Path, content: bytes) -> None:
    with checkpoints.writing(path):
        checkpoints.write_whole(path, lambda file: file.write(content), durable=False)


if __name__ == "__main__":
    main()
