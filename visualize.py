"""What the tokens do, in pictures.

    python visualize.py IMAGE... --finetune CHECKPOINT           # files, folders, globs: a panel and an animation each
    python visualize.py --summary --data-set NAME --data-path DIR --finetune CHECKPOINT     # charts of a data set
    python visualize.py --curves OUTPUT_DIR...                   # charts of training runs

`--html` adds a gallery to search and sort. `--help` lists the flags. Bad input ends with one line on
stderr and exit status 2; images that cannot be read are named, the rest is done, the status is 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from training import arguments

if TYPE_CHECKING:
    import torch  # --help and mistakes do not wait for it: what needs it is imported where it is used

    from training.checkpoints import Checkpoint
    from visualization.draw import RenderJob


def main(argv: list[str] | None = None) -> None:
    """SystemExit with status 1 where images could not be read, 2 for other bad input."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if sum(map(bool, (args.images, args.summary, args.curves))) != 1:
        parser.error("expected images, --summary or --curves, one of them")
    if not args.curves and not args.finetune:
        parser.error("--finetune CHECKPOINT says which network to look into")
    arguments.check_size(parser, args.input_size)
    arguments.check_budget(parser, args)

    from training.build import run_cli

    run_cli(parser, args, run, alone=not args.summary)


def make_parser() -> arguments.Parser:
    parser = arguments.Parser(
        prog="visualize.py",
        description="What the tokens of an A-ViT do, in pictures.",
        parents=[arguments.network_flags(), arguments.data_flags(), arguments.gallery_flags()],
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files, folders, or globs")
    parser.add_argument("--summary", action="store_true", help="charts of a whole data set")
    parser.add_argument("--curves", nargs="+", metavar="OUTPUT_DIR", help="charts of training runs, from their log.txt")
    add = parser.add_argument_group("network").add_argument
    add("--finetune", metavar="FILE", help="checkpoint, a path or https URL")
    add("--model", metavar="NAME", help="of ours, or of a plain ViT of timm's (default: the checkpoint's)")
    kind = {"type": arguments.at_least_one, "nargs": "+", "metavar": "PIXELS"}
    add("--input-size", **kind, help="image size; two numbers: height, width (default: the checkpoint's)")
    add = parser.add_argument_group("pictures").add_argument
    add("--output-dir", default=arguments.DEMO_FOLDER, metavar="DIR", help="where to")
    add("--cmap", default="viridis", metavar="NAME", help="matplotlib's colour map; the paper's is hot")
    add("--size", type=arguments.at_least_one, default=224, metavar="PIXELS", help="smallest side of each image shown")
    add("--animation", choices=("gif", "webp", "none"), default="gif", help="of the halting, block by block")
    return parser


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Returns the exit status."""
    from matplotlib import colormaps

    import utils
    from datasets import check_name
    from training.checkpoints import Checkpoint
    from training.models import check_model_name

    if args.cmap not in colormaps:
        raise utils.UserError(f"--cmap: unknown colour map {args.cmap!r}{utils.did_you_mean(args.cmap, colormaps)}")
    args.amp = utils.amp_dtype_name(args.amp, device)
    args.input_size = args.input_size and (args.input_size[0], args.input_size[-1])  # height, width
    if args.curves:
        utils.prepare_output_dir(args.output_dir)
        return draw_curves([Path(run) for run in args.curves], Path(args.output_dir))
    check_name(args.data_set)
    checkpoint = Checkpoint.load(args.finetune)
    args.model = args.model or checkpoint.model_name()
    check_model_name(args.model)
    utils.prepare_output_dir(args.output_dir)
    return (draw_summary if args.summary else draw_images)(args, checkpoint, device)


def draw_images(args: argparse.Namespace, checkpoint: Checkpoint, device: torch.device) -> int:
    """Returns 1 where some images cannot be read."""
    import utils
    from datasets import class_names
    from visualization.draw import draw_files, find_images

    files, problems = find_images(args.images)
    for problem in problems:
        utils.warn(problem)
    if not files:
        raise utils.UserError(f"no image found: {'; '.join(problems)}")
    classes = checkpoint.names_by_class()
    names = class_names(list(classes), None, args.class_index) if args.class_index else list(classes.values())
    drawing = make_drawing(args, checkpoint, names, device)
    drawn = draw_files(drawing, files, list(classes), args.batch_size, args.animation)
    return int(bool(problems) or drawn < len(files))


def draw_summary(args: argparse.Namespace, checkpoint: Checkpoint, device: torch.device) -> int:
    """Returns 1 where some images cannot be read."""
    import visualization.draw
    from datasets import build_dataset, class_names
    from training.build import loader_options
    from training.loaders import demo_loader
    from training.models import default_image_size, preprocessing

    size = args.input_size or checkpoint.image_size() or default_image_size(args.model)
    options = {"inat_category": args.inat_category, "split": args.val_split, "num_classes": args.num_classes}
    options |= {"preprocessing": preprocessing(args.model)}
    images = build_dataset(args.data_set, args.data_path, False, size, **options)
    names = class_names(images.classes, args.data_path, args.class_index)
    drawing = make_drawing(args, checkpoint, names, device, images.classes)
    loader = demo_loader(images, args.batch_size, **loader_options(args, device))
    facts = [("model", args.model), ("checkpoint", Path(args.finetune).name)]
    return int(visualization.draw.draw_summary(drawing, loader, args.data_set, facts) < loader.num_images)


def make_drawing(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    names: list[str],
    device: torch.device,
    classes: list[str] | None = None,
) -> RenderJob:
    """The checkpoint's network, where flags say nothing else; names: of its classes, to show; classes: the data's."""
    from visualization.draw import RenderJob
    from visualization.heatmaps import Style

    model = checkpoint.build_model(
        args.model,
        classes=classes,
        img_size=args.input_size,
        gate_scale=args.gate_scale,
        gate_center=args.gate_center,
        budget=args.budget,
        use_ema=args.use_ema,
        halting=args.halting,
    ).to(device)
    style = Style(model.num_blocks, args.cmap, args.size)
    return RenderJob(model, args.amp, Path(args.output_dir), names, style, args.demo_by, args.demo_images, args.html)


def draw_curves(folders: list[Path], folder: Path) -> int:
    """Accuracy, losses, depth and multiply-adds over the epochs of runs, and accuracy against multiply-adds."""
    from utils import log
    from visualization.heatmaps import write_picture
    from visualization.training_curves import accuracy_against_macs, curves, read_runs

    runs = read_runs(folders)
    write_picture(folder / "curves.png", curves(runs))
    write_picture(folder / "accuracy_macs.png", accuracy_against_macs(runs))
    log(f"curves of {len(runs)} run(s) in {folder}")
    return 0


if __name__ == "__main__":
    main()
