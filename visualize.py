"""Visualize token halting: in images, on a dataset, and over training.

    python visualize.py IMAGE... --finetune CHECKPOINT           # a panel and an animation of each image
    python visualize.py --summary --data-set NAME --data-path DIR --finetune CHECKPOINT     # charts of a dataset
    python visualize.py --curves OUTPUT_DIR...                   # charts of training runs

IMAGE is a file, a directory or a glob. `--html` adds a gallery to search and sort. `--help` lists the flags. Invalid
input ends with one line on stderr and exit status 2. Unreadable images are skipped with a warning, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training import arguments, flag_effects
from training.parser import add_model_flags

if TYPE_CHECKING:  # torch is imported in the functions that use it: --help and flag errors need not wait for it
    import torch

    from training.checkpoints import Checkpoint
    from training.classes import Head
    from training.network import NetworkSettings
    from visualization.budget_curves import Budgets
    from visualization.draw import RenderJob
    from visualization.training_curves import Run


def main(argv: list[str] | None = None) -> None:
    """Run the command. Raises SystemExit with status 1 for unreadable images, 2 for other invalid input."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if sum(map(bool, (args.images, args.summary, args.curves))) != 1:
        parser.error("pass exactly one of: images, --summary, --curves")
    if not args.curves and not args.finetune:
        parser.error("--finetune is required with images and --summary. Pass a checkpoint.")
    arguments.check_size(parser, args.input_size)
    arguments.check_budget(parser, args)

    from training.command import run_cli

    run_cli(parser, args, run, alone=not args.summary)


def make_parser() -> arguments.Parser:
    parser = arguments.Parser(
        prog="visualize.py",
        description="Visualize token halting in images, on a dataset, and over training.",
        parents=[arguments.network_flags(), arguments.data_flags(), arguments.gallery_flags()],
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files, directories, or globs")
    parser.add_argument(
        "--summary",
        action="store_true",
        help="charts of depths, halting scores and accuracy on a dataset (--data-path)",
    )
    parser.add_argument("--curves", nargs="+", metavar="OUTPUT_DIR", help="output directories of training runs to plot")
    add = parser.add_argument_group("checkpoint").add_argument
    add("--finetune", metavar="FILE", help="path or https URL of a checkpoint")
    add_model_flags(add)
    add = parser.add_argument_group("images").add_argument
    add("--output-dir", default=arguments.DEMO_FOLDER, metavar="DIR", help="directory for the output")
    add("--cmap", default="viridis", metavar="NAME", help="matplotlib colormap of the depths; the paper uses hot")
    add(
        "--size",
        type=arguments.at_least_one,
        default=224,
        metavar="PIXELS",
        help="smallest side of each image shown, in pixels",
    )
    add("--animation", choices=("gif", "webp", "none"), default="gif", help="format of the block-by-block animation")
    return parser


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Draw what the flags ask for, and return the exit status."""
    from matplotlib import colormaps

    import utils
    from datasets import check_name
    from training.checkpoints import Checkpoint
    from training.network import NetworkFlags, Purpose, resolve_network

    if args.cmap not in colormaps:
        raise utils.UserError(f"--cmap: unknown colormap {args.cmap!r}{utils.did_you_mean(args.cmap, colormaps)}")
    flag_effects.report(args, flag_effects.VISUALIZE)
    args.amp = utils.amp_dtype_name(args.amp, device)
    if args.curves:
        utils.prepare_output_dir(args.output_dir)
        return draw_curves([Path(run) for run in args.curves], Path(args.output_dir))
    check_name(args.data_set)
    checkpoint = Checkpoint.load(args.finetune)
    flags = NetworkFlags.from_args(args)
    flags = flags if args.summary else flags._replace(data_set=None)
    settings = resolve_network(checkpoint, flags, Purpose.EVALUATION)
    utils.prepare_output_dir(args.output_dir)
    return (draw_summary if args.summary else draw_images)(args, settings, checkpoint, device)


def draw_images(
    args: argparse.Namespace, settings: NetworkSettings, checkpoint: Checkpoint, device: torch.device
) -> int:
    """Draw panels and animations of image files, and return the exit status: 1 if some cannot be read."""
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
    job = make_job(args, settings, checkpoint, names, device)
    num_drawn = draw_files(job, files, list(classes), args.batch_size, args.animation)
    return int(bool(problems) or num_drawn < len(files))


def draw_summary(
    args: argparse.Namespace, settings: NetworkSettings, checkpoint: Checkpoint, device: torch.device
) -> int:
    """Draw the charts of a dataset, and return the exit status: 1 if some images cannot be read."""
    import visualization.draw
    from datasets import build_dataset, class_names
    from training.build import loader_options
    from training.loaders import demo_loader
    from training.rendezvous import require_same_images

    images = build_dataset(
        args.data_set,
        args.data_path,
        False,
        settings.img_size,
        inat_category=args.inat_category,
        split=args.val_split,
        num_classes=args.num_classes,
        preprocessing=settings.preprocessing,
    )
    require_same_images(images)
    head = checkpoint.head_for(images.classes, args.use_ema, keep_others=True)
    numbered = (images.classes, head.in_order_of_network())
    names = class_names(head.names, args.data_path, args.class_index, numbered)
    job = make_job(args, settings, checkpoint, names, device, head)
    loader = demo_loader(images, args.batch_size, **loader_options(args, device))
    facts = [("model", settings.model), ("checkpoint", Path(args.finetune).name)]
    num_drawn = visualization.draw.draw_summary(job, loader, args.data_set, facts)
    return int(num_drawn < loader.num_images)


def make_job(
    args: argparse.Namespace,
    settings: NetworkSettings,
    checkpoint: Checkpoint,
    names: list[str],
    device: torch.device,
    head: Head | None = None,
) -> RenderJob:
    """Build the checkpoint's model and the drawing job.

    names: class names to show; head: classes that the model predicts, None for all in the checkpoint's order
    """
    from visualization.draw import RenderJob
    from visualization.heatmaps import Style

    model = checkpoint.build_network(settings, head, args.use_ema).to(device)
    style = Style(model.num_blocks, args.cmap, args.size)
    return RenderJob(model, args.amp, Path(args.output_dir), names, style, args.demo_by, args.demo_images, args.html)


def draw_curves(run_folders: list[Path], folder: Path) -> int:
    """Draw the metrics of training runs over the epochs, and accuracy against MACs, and return the exit status.

    For runs that were trained to a budget, draw top-1, or the agreement with the static model, against MACs too.
    """
    from utils import log
    from visualization.budget_curves import quality_against_macs
    from visualization.heatmaps import write_image
    from visualization.training_curves import accuracy_against_macs, curves, read_runs

    runs = read_runs(run_folders)
    budgets = read_budgets(runs)
    write_image(folder / "curves.png", curves(runs))
    write_image(folder / "accuracy_macs.png", accuracy_against_macs(runs))
    if budgets:
        write_image(folder / "budgets.png", quality_against_macs(budgets))
    log(f"wrote curves of {len(runs)} run(s) to {folder}")
    return 0


def read_budgets(runs: Sequence[Run]) -> list[Budgets]:
    """Read the budget tables of the runs whose folder has a checkpoint.pth with one.

    Raises UserError for a file that is no checkpoint.
    """
    from training.checkpoints import Checkpoint
    from training.gate_settings import gate_numbers
    from visualization.budget_curves import Budgets

    found = []
    for run in runs:
        path = run.folder / "checkpoint.pth"
        checkpoint = Checkpoint.load(str(path)) if path.is_file() else None
        table = checkpoint and checkpoint.budget_table()
        if table:
            center = gate_numbers(checkpoint.content.get("gate")).get("gate_center")
            costs, _, centers, agreements, accuracies, *_ = map(list, zip(*table.points))
            trained = [place for place, value in enumerate(centers) if value == center]
            found.append(Budgets(run.name, costs, agreements, None if None in accuracies else accuracies, trained))
    return found


if __name__ == "__main__":
    main()
