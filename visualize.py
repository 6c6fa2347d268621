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
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import timm
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import utils
from datasets import IMAGE_SUFFIXES, UnreadableImage, class_names, evaluation_transform, has_image_name, load_image
from losses import DistributionPriorLoss
from training import arguments
from training.build import (
    StartingPoint,
    amp_dtype_name,
    build_model,
    image_size,
    loader_options,
    run_cli,
    validation_set,
)
from training.loaders import ImageLoader, demo_loader
from utils import UserError, log, nearest, warn
from visualization import charts, heatmaps, html_pages, training_curves
from visualization.heatmaps import Style
from visualization.records import (
    DatasetStatistics,
    ImageRecord,
    Selection,
    gather_to_main,
    record_batch,
    record_dataset,
)

GALLERY, SUMMARY = "index.html", "summary.html"
MAX_STEM_BYTES = 200  # bytes, of 255 that a file's name may have


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
) -> int:
    """Draws `per_class` images of every class, by one of records.CRITERIA; all processes take part.

    loader: a `demo_loader`; names: of the classes. Of an equal measure the first in the data set counts, in any
    order of the data. Returns 1 where images cannot be read, else 0. UserError where the folder cannot be written.
    """
    utils.prepare_output_dir(folder, "--demo-dir")
    selection = Selection(criterion, per_class)
    for batch in record_dataset(model, loader, device, amp, "Demo"):
        for record in batch.records:
            selection.add(record)
    chosen = selection.own_chosen()
    style = Style(model.num_blocks, heatmaps.PAPERS_COLORMAP)
    for number, record in utils.with_progress(chosen, "Drawing", dict):
        stem = f"class{record.target}" + (f"_{number}" if number > 1 else "")
        for kind, picture in heatmaps.demo_pictures(record, names, style).items():
            utils.write_bytes(folder / f"{stem}_{kind}.jpg", _jpeg(picture))
    shared = chosen if html else [entry for entry in chosen if entry[0] == 1]
    shown = gather_to_main(shared)
    if shown:
        first = [record for number, record in shown if number == 1]
        utils.write_bytes(folder / "teaser.png", _png(charts.teaser(first, style)))
        if html:
            _write_gallery(folder, "Token depths", [record for _, record in shown], names, style)
    drawn, unreadable = (sum(utils.all_gather_objects(count)) for count in (len(chosen), len(loader.bad_images)))
    if not drawn:
        warn(f"no image to show by --demo-by {criterion}")
    log(f"token depths of {drawn} images drawn in {folder}")
    return int(unreadable > 0)


# The command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """SystemExit with status 1 where images could not be read, 2 for other bad input."""
    parser = make_parser()
    args = arguments.parse_args(["--eval"])  # what network and data are made from, beside the flags of this command
    for flag in ("model", "input_size", "output_dir"):
        delattr(args, flag)
    args = parser.parse_args(argv, args)
    if sum(map(bool, (args.images, args.summary, args.curves))) != 1:
        parser.error("expected images, --summary or --curves, one of them")
    if not args.curves and not args.finetune:
        parser.error("--finetune CHECKPOINT says which network to look into")
    try:
        arguments.check_together(args)
    except UserError as error:
        parser.error(str(error))
    run_cli(parser, args, run)


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
    how = ("gate_scale", "gate_center", "halting", "use_ema", "device", "amp", "batch_size")
    arguments.borrow(parser, "how it runs", how)
    arguments.borrow(parser, "data set", ("data_set", "data_path", "val_split", "num_classes", "inat_category"))
    arguments.borrow(parser, "loading", ("num_workers", "class_index"))
    add = parser.add_argument_group("pictures").add_argument
    add("--output-dir", default=arguments.DEMO_FOLDER, metavar="DIR", help="where to")
    add("--cmap", type=_colormap, default=heatmaps.COLORMAP, metavar="NAME", help="colour map; the paper's is hot")
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
    folder = utils.prepare_output_dir(args.output_dir)
    if utils.world_size() > 1 and not args.summary:
        raise UserError("only --summary is for several processes: start this without torchrun")
    if args.curves:
        draw_curves([Path(run) for run in args.curves], folder)
        return 0
    start = StartingPoint.of(args)
    args.model = args.model or start.model_name()
    size = start.image_size() or timm.models.get_pretrained_cfg(args.model).input_size[1:]
    args.input_size = args.input_size or list(size)
    args.halting = args.halting and not start.is_static()
    return (draw_summary if args.summary else draw_images)(args, start, device, folder)


# Single images -----------------------------------------------------------------------------------


def draw_images(args: argparse.Namespace, start: StartingPoint, device: torch.device, folder: Path) -> int:
    """A panel and an animation for each image; returns 1 where some cannot be read."""
    files, problems = find_images(args.images)
    for problem in problems:
        warn(problem)
    if not files:
        raise UserError(f"no image found: {'; '.join(problems)}")
    classes = start.classes()
    names = class_names(list(classes), None, args.class_index) if args.class_index else list(classes.values())
    outputs = [drawn_files(folder / stem, args.animation) for stem in distinct_stems(files)]
    overwritten = {path.resolve() for paths in outputs for path in paths} & {file.resolve() for file in files}
    if overwritten:
        raise UserError(f"{min(overwritten)} would be overwritten: choose another --output-dir")
    model = build_model(args, len(classes), start).to(device)
    style = Style(model.num_blocks, args.cmap, args.size)
    drawn, shown = 0, []
    for first in utils.with_progress(range(0, len(files), args.batch_size), "Images", dict):
        batch = range(first, min(first + args.batch_size, len(files)))
        records = _examine_files(files, batch, model, image_size(args), list(classes), device, amp_dtype_name(args))
        for record in records:
            panel, *movie = outputs[record.index]
            utils.write_bytes(panel, _png(heatmaps.panel(record, names, style)))
            for path in movie:
                utils.write_bytes(path, heatmaps.animation(heatmaps.frames(record, style), args.animation))
        drawn += len(records)
        shown += records if args.html else []
    if not drawn:
        raise UserError("not one image could be read")
    if args.html:
        _write_gallery(folder, "Token depths", shown, names, style)
    log(f"{drawn} images drawn in {folder}")
    return int(bool(problems) or drawn < len(files))


def drawn_files(stem: Path, animation: str) -> list[Path]:
    """Where the panel goes, and the animation if there is to be one: "gif", "webp" or "none"."""
    ends = ["panel.png"] + ([f"halting.{animation}"] if animation != "none" else [])
    return [stem.with_name(f"{stem.name}_{end}") for end in ends]


def find_images(patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Image files named, in folders (at any depth), or matched by globs, each once; and what was not found."""
    files, problems = [], []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
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
    """The names of files without their endings, cut where they are long, numbered where they would be the same."""
    taken: set[str] = set()
    for file in files:
        own = os.fsdecode(os.fsencode(file.stem)[:MAX_STEM_BYTES])
        numbered = (f"{own}_{number}" for number in itertools.count(2))
        stem = next(stem for stem in itertools.chain([own], numbered) if stem not in taken)
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
) -> list[ImageRecord]:
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
    return record_batch(model, batch, device, amp, targets=targets, names=names, indices=list(images)).records


# A data set --------------------------------------------------------------------------------------


def draw_summary(args: argparse.Namespace, start: StartingPoint, device: torch.device, folder: Path) -> int:
    """Charts of the validation set as PNG files, and a page of them; all processes take part.

    Returns 1 where images cannot be read.
    """
    images = validation_set(args)
    names = class_names(images.classes, args.data_path, args.class_index)
    model = build_model(args, len(names), start).to(device)
    loader = demo_loader(images, args.batch_size, **loader_options(args))
    style = Style(model.num_blocks, args.cmap, args.size)
    examples, gallery, parts = Selection(), Selection(args.demo_by, args.demo_images), []
    for batch in record_dataset(model, loader, device, amp_dtype_name(args), "Summary"):
        parts.append(DatasetStatistics.of_batch(batch))
        for record in batch.records:
            examples.add(record)
            if args.html:
                gallery.add(record)
    parts = [part for own in utils.all_gather_objects(parts) for part in own]
    if not parts:
        raise UserError("not one image could be read")
    statistics = DatasetStatistics.of(parts)
    status = int(len(statistics.target) < loader.num_images)
    example_of = {record.target: record for _, record in gather_to_main(examples.own_chosen())}
    shown = [record for _, record in gather_to_main(gallery.own_chosen())]
    if utils.is_main():
        _draw_charts(args, statistics, names, example_of, shown, style, folder)
    utils.all_gather_objects(status)  # whoever ends first with a status that is not 0 would end the others
    return status


def _draw_charts(
    args: argparse.Namespace,
    statistics: DatasetStatistics,
    names: Sequence[str],
    example_of: dict[int, ImageRecord],
    shown: list[ImageRecord],
    style: Style,
    folder: Path,
) -> None:
    prior = DistributionPriorLoss(style.num_blocks).target.numpy()
    drawn = []
    for name, chart in charts.summary_charts(statistics, prior, names, example_of, style).items():
        drawn.append((chart.title, chart.explanation, _png(chart.figure)))
        utils.write_bytes(folder / f"{name}.png", drawn[-1][2])
    if args.html:
        _write_gallery(folder, f"{args.data_set}: token depths", shown, names, style)
    facts = [("model", args.model), ("checkpoint", Path(args.finetune).name), *_facts_of_statistics(statistics)]
    html_pages.write_summary(
        folder / SUMMARY, f"{args.data_set}: summary", facts, drawn, GALLERY if args.html else None
    )
    log(f"summary of {len(statistics.target)} images in {folder / SUMMARY}")


# Training runs -----------------------------------------------------------------------------------


def draw_curves(folders: Sequence[Path], folder: Path) -> None:
    """Accuracy, losses, depth and multiply-adds over the epochs of runs, and accuracy against multiply-adds."""
    runs = training_curves.read_runs(folders)
    utils.write_bytes(folder / "curves.png", _png(training_curves.curves(runs)))
    utils.write_bytes(folder / "accuracy_macs.png", _png(training_curves.accuracy_against_macs(runs)))
    log(f"curves of {len(runs)} run(s) in {folder}")


# Files -------------------------------------------------------------------------------------------


def _write_gallery(folder: Path, title: str, records: list[ImageRecord], names: Sequence[str], style: Style) -> None:
    html_pages.write_gallery(folder / GALLERY, title, _facts(records), records, names, style)


def _facts(records: Sequence[ImageRecord]) -> list[tuple[str, str]]:
    """Means over the images shown."""
    if not records:
        return [("images", "0")]
    known = [one for one in records if one.target >= 0]
    right = [("top-1", f"{sum(not one.is_wrong for one in known) / len(known):.1%}")] if known else []
    depth = sum(one.mean_depth for one in records) / len(records)
    saved = 1 - sum(one.macs for one in records) / sum(one.static_macs for one in records)
    return [("images", f"{len(records):,}"), *right, ("patch depth", f"{depth:.2f}"), ("saved", f"{saved:.1%}")]


def _facts_of_statistics(statistics: DatasetStatistics) -> list[tuple[str, str]]:
    macs, static_macs = statistics.macs.mean(), statistics.static_macs
    return [
        ("images", f"{len(statistics.target):,}"),
        ("top-1", f"{statistics.is_right.mean():.2%}"),
        ("patch depth", f"{statistics.depth.mean():.2f} of {statistics.num_blocks}"),
        ("class token depth", f"{statistics.class_token_depth.mean():.2f}"),
        ("multiply-adds", f"{heatmaps.macs_text(macs)} of {heatmaps.macs_text(static_macs)}"),
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


if __name__ == "__main__":
    main()
