"""Export a trained A-ViT to ONNX. The graph has only standard operators and drops halted tokens.

    python export_onnx.py CHECKPOINT OUT.onnx                      # one image per call
    python export_onnx.py CHECKPOINT OUT.onnx --batch-mode batch   # any number of images per call
    python export_onnx.py CHECKPOINT OUT.onnx --budget 0.4         # gate for 40% of the static model's MACs
    python export_onnx.py CHECKPOINT OUT.onnx --static             # without halting, as a baseline

Input: `images` [B, 3, H, W] float32; optional inputs: `gate_scale`, `gate_center`. Outputs: `logits` [B, classes] and
`live`, the number of tokens each block computes, int64 [L] for one image, [B, L] for a batch. docs/deployment.md shows
how to run the graph. Requires the packages of requirements-export.txt.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from training import arguments, flag_effects
from training.parser import add_model_flags

if TYPE_CHECKING:  # torch is imported in the functions that use it: --help and flag errors need not wait for it
    from models_act import AdaptiveTokens
    from training.checkpoints import Checkpoint


def main(argv: list[str] | None = None) -> None:
    """Run the command. Raises SystemExit with status 2 for invalid input."""
    parser = make_parser()
    args = parser.parse_args(argv)
    arguments.check_size(parser, args.input_size)
    if args.static and args.budget is not None:
        parser.error("--budget and --static cannot be combined")
    if args.out.is_dir():
        parser.error(f"{args.out} is a directory; expected the name of the file to write")
    if not args.out.parent.is_dir():
        parser.error(f"{args.out}: the directory {args.out.parent} does not exist")
    if importlib.util.find_spec("onnx") is None:
        parser.error("the onnx package is not installed. Run: pip install -r requirements-export.txt")

    from training.command import one_line_errors

    with one_line_errors(parser, args):
        export(args)


def make_parser() -> arguments.Parser:
    parser = arguments.Parser(
        prog="export_onnx.py", description="Export a trained A-ViT to an ONNX graph that drops halted tokens."
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="path or https URL of a checkpoint")
    add("out", type=Path, metavar="OUT.onnx", help="file to write")
    modes = ("single", "batch")
    add("--batch-mode", choices=modes, default="single", help="input of the graph: one image per call, or any number")
    add("--static", action="store_true", help="graph without halting: every token in every block")
    add("--fp16-weights", action="store_true", help="weights in half precision; computation stays in float32")
    arguments.add_budget_flag(add)
    add("--use-ema", action="store_true", help="averaged weights (model_ema) of the checkpoint instead of the raw ones")
    add_model_flags(add)
    # earlier spellings
    add("--form", dest="batch_mode", choices=modes, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add("--half", dest="fp16_weights", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def export(args: argparse.Namespace) -> None:
    """Write the ONNX file. Raises UserError or OSError if that fails."""
    import onnx

    import utils
    from deployment.onnx_graph import write_graph
    from training.checkpoints import Checkpoint

    flag_effects.report(args, flag_effects.EXPORT_ONNX)
    checkpoint = Checkpoint.load(args.checkpoint)
    model = checkpoint.build_model(
        args.model,
        img_size=args.input_size and (args.input_size[0], args.input_size[-1]),
        budget=args.budget,
        use_ema=args.use_ema,
        halting=not args.static,
    ).eval()
    try:
        proto = write_graph(model, args.batch_mode, args.fp16_weights)
    except ValueError as error:
        raise utils.UserError(f"{args.checkpoint}: {error}") from error
    onnx.helper.set_model_props(proto, metadata(checkpoint, model, args.use_ema, args.budget))
    onnx.checker.check_model(proto, full_check=True)
    content = proto.SerializeToString()
    utils.write_bytes(args.out, content, durable=True)
    height, width = model.patch_embed.img_size
    gate = f"gate scale {model.gate_scale:g}, center {model.gate_center:g}" if model.halting else "static"
    images = "one image" if args.batch_mode == "single" else "images"
    size = f"{len(content) / 1e6:.2f} MB"
    utils.log(f"wrote {args.out}: {images} of {height} x {width}, {model.num_classes} classes, {gate}, {size}")


def metadata(
    checkpoint: Checkpoint, model: AdaptiveTokens, use_ema: bool, budget: float | None = None
) -> dict[str, str]:
    """Return the metadata that a program needs to run the graph, each value as JSON.

    The preprocessing has timm's names and values. budget: for which the model was built. The budget curve is omitted
    if it is that of other weights or another image size.
    """
    from datasets import Preprocessing
    from training.gate_settings import safe_budget_curve

    classes, size = list(checkpoint.names_by_class().values()), model.patch_embed.img_size
    preprocessing = Preprocessing.from_model(model).record()
    values = {"classes": classes, "image_size": size, "depth": len(model.blocks), **preprocessing}
    curve = safe_budget_curve(checkpoint, use_ema)
    is_mixed = budget is not None and checkpoint.budget_table(use_ema) is not None
    is_resized = checkpoint.image_size() not in (None, size)
    if curve is not None and model.halting and not (is_mixed or is_resized):
        values["budget_curve"] = curve.record()
    return {name: json.dumps(value) for name, value in values.items()}


if __name__ == "__main__":
    main()
