"""A trained network as an ONNX graph of standard operators, in which halted tokens really leave.

    python export_onnx.py CHECKPOINT OUT.onnx                    # one image a call; --form batch for any number
    python export_onnx.py CHECKPOINT OUT.onnx --budget 0.4       # of a checkpoint that knows what its gate costs
    python export_onnx.py CHECKPOINT OUT.onnx --static           # every token, every block: what to compare with

Input `images` [B, 3, H, W] float32; outputs `logits` [B, classes] and `live`, the number of tokens that each block
computes, int64, [L] of one image, [B, L] of a batch. `gate_scale` and `gate_center` may be fed too. docs/deployment.md
shows how a graph is run. Needs requirements-export.txt.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from training import arguments

if TYPE_CHECKING:
    from models_act import AdaptiveTokens  # --help and mistakes do not wait for torch: it is imported where it is used
    from training.checkpoints import Checkpoint


def main(argv: list[str] | None = None) -> None:
    """SystemExit with status 2 for what the user can mend."""
    parser = make_parser()
    args = parser.parse_args(argv)
    arguments.check_size(parser, args.input_size)
    if args.static and args.budget is not None:
        parser.error("--budget and --static exclude each other")
    if args.out.is_dir() or not args.out.parent.is_dir():
        parser.error(f"{args.out}: {'is a folder' if args.out.is_dir() else 'its folder does not exist'}")
    if importlib.util.find_spec("onnx") is None:
        parser.error("onnx is missing: pip install -r requirements-export.txt")

    import utils

    try:
        export(args)
    except (utils.UserError, OSError) as error:
        parser.error(str(error))


def make_parser() -> arguments.Parser:
    parser = arguments.Parser(
        prog="export_onnx.py", description="A trained network as an ONNX graph in which tokens leave."
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a path or https URL")
    add("out", type=Path, metavar="OUT.onnx", help="the file to write")
    add("--form", choices=("single", "batch"), default="single", help="one image a call, or any number")
    add("--static", action="store_true", help="every token goes through every block")
    add("--half", action="store_true", help="weights are stored in half precision, and computed with in single")
    budget = "share of the static network's multiply-adds to use, of a checkpoint that knows its gate's cost"
    add("--budget", type=arguments.budget_share, metavar="SHARE", help=budget)
    add("--use-ema", action="store_true", help="the averaged weights")
    add("--model", metavar="NAME", help="of ours, or of a plain ViT of timm's (default: the checkpoint's)")
    kind = {"type": arguments.at_least_one, "nargs": "+", "metavar": "PIXELS"}
    add("--input-size", **kind, help="image size; two numbers: height, width (default: the checkpoint's)")
    return parser


def export(args: argparse.Namespace) -> None:
    """Writes the file. UserError or OSError where it cannot be."""
    import onnx

    import utils
    from deployment.onnx_graph import write_graph
    from training.checkpoints import Checkpoint

    checkpoint = Checkpoint.load(args.checkpoint)
    size = args.input_size and (args.input_size[0], args.input_size[-1])
    options = {"budget": args.budget, "use_ema": args.use_ema, "halting": not args.static}
    model = checkpoint.build_model(args.model, img_size=size, **options).eval()
    try:
        proto = write_graph(model, args.form, args.half)
    except ValueError as error:
        raise utils.UserError(f"{args.checkpoint}: {error}") from error
    onnx.helper.set_model_props(proto, metadata(checkpoint, model, args.use_ema))
    onnx.checker.check_model(proto, full_check=True)
    content = proto.SerializeToString()
    utils.atomic_write(args.out, lambda file: file.write(content))
    height, width = model.patch_embed.img_size
    gate = f"gate {model.gate_scale:g}, {model.gate_center:g}" if model.halting else "static"
    images = f"{'one image' if args.form == 'single' else 'images'} of {height} x {width}"
    utils.log(f"{args.out}: {images}, {model.num_classes} classes, {gate}, {len(content) / 1e6:.2f} MB")


def metadata(checkpoint: Checkpoint, model: AdaptiveTokens, use_ema: bool) -> dict[str, str]:
    """What a user of the graph has to know, each as JSON; how images are made, in timm's words."""
    from datasets import PLACED, Preprocessing, is_uncropped

    size, preprocessing = model.patch_embed.img_size, Preprocessing.from_model(model)
    if is_uncropped(size, str(checkpoint.recorded_flag("data_set")) in PLACED):
        preprocessing = preprocessing.uncropped()
    classes = list(checkpoint.names_by_class().values())
    values = {"classes": classes, "image_size": size, "depth": len(model.blocks), **preprocessing._asdict()}
    curve = checkpoint.budget_curve(use_ema)
    if curve is not None and model.halting:
        values["budget_curve"] = curve.record()
    return {name: json.dumps(value) for name, value in values.items()}


if __name__ == "__main__":
    main()
