"""The flags of main_act.py: names, defaults, groups, checks of single values."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable

import timm
import torch

import models_act  # noqa: F401 - registers the models
from datasets import CLASS_INDEX_FILES, DATA_SETS, READERS, _check_name
from training.checkpoints import GATE_DEFAULTS
from utils import UserError, local_rank, nearest
from visualization.records import CRITERIA

DEMO_FOLDER = "token_act_visualization"


class Parser(argparse.ArgumentParser):
    """Every flag with dashes or underscores, no abbreviations, errors in one line with status 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_args([_with_dashes(arg) for arg in args], namespace)

    def error(self, message: str, status: int = 2, everywhere: bool = False):
        """One line on stderr, by the first process of each machine, or by every process that meets it."""
        if local_rank() > 0 and not everywhere:
            self.exit(status)
        printable = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
        self.exit(status, f"{self.prog}: error: {printable}\n")


class _Formatter(argparse.HelpFormatter):
    """Adds the default where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = any(action.default is value for value in (None, argparse.SUPPRESS, False)) or "default" in action.help
        return action.help if silent else f"{action.help} (default: %(default)s)"


def _with_dashes(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def _at_least(lowest: float, kind: type):
    def convert(text: str):
        value = kind(text)
        if not value >= lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse names it in its message
    return convert


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


at_least_one = _at_least(1, int)
_index = _at_least(0, int)
_amount = _at_least(0, float)


def model_name(name: str) -> str:
    known = timm.list_models("avit*")
    if name not in known:
        raise argparse.ArgumentTypeError(f"unknown model {name!r}{nearest(name, known)}")
    return name


def data_set(name: str) -> str:
    try:
        _check_name(name)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def _augment_policy(text: str) -> str | None:
    return None if text.lower() in ("", "none") else text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks; ends the program with status 2 on a mistake."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check_together(args)
    except UserError as error:
        parser.error(str(error))
    return args


def make_parser() -> Parser:
    parser = Parser(
        prog="main_act.py", description="Train, evaluate or look at A-ViT: adaptive tokens for vision transformers."
    )
    for add_group in (_model, _optimizer, _schedule, _augmentation, _distillation, _data, _run, _avit, _demo, _ignored):
        add_group(parser)
    return parser


def borrow(parser: Parser, title: str, names: Iterable[str]) -> None:
    """Adds flags of main_act.py to another command's parser, as they are there."""
    flags = {action.dest: action for action in make_parser()._actions}
    group = parser.add_argument_group(title)
    for name in names:
        group._add_action(flags[name])


def _switch(group, name: str, help: str, default: bool = True) -> None:
    group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=help)


def _model(parser: Parser) -> None:
    add = (group := parser.add_argument_group("model")).add_argument
    add("--model", type=model_name, default="avit_tiny_patch16_224", metavar="NAME", help="registered avit model")
    add(
        "--input-size",
        type=at_least_one,
        nargs="+",
        default=[224],
        metavar="PIXELS",
        help="image size; two numbers: height, width",
    )
    add("--drop", type=_share, default=0.0, metavar="P", help="dropout of positions, attention projection and MLP")
    add("--drop-path", type=_share, default=0.1, metavar="P", help="stochastic depth rate of the last block")
    _switch(group, "model-ema", "keep an exponential moving average of the weights")
    add("--model-ema-decay", type=_share, default=0.99996, metavar="D", help="decay of that average per step")
    add("--model-ema-force-cpu", action="store_true", help="keep that average in CPU memory")
    add("--use-ema", action="store_true", help="load model_ema instead of model from a checkpoint")
    add("--grad-checkpointing", action="store_true", help="compute blocks twice to save memory")


def _optimizer(parser: Parser) -> None:
    add = parser.add_argument_group("optimizer").add_argument
    add("--opt", default="adamw", metavar="NAME", help="timm optimizer")
    add("--opt-eps", type=_amount, default=1e-8, metavar="E", help="its epsilon")
    add("--opt-betas", type=_share, nargs=2, metavar="B", help="its betas")
    add("--clip-grad", type=_amount, metavar="NORM", help="clip the gradient's norm")
    add("--momentum", type=_share, default=0.9, metavar="M", help="its momentum, where it has one")
    add("--weight-decay", type=_amount, default=0.05, metavar="W", help="weight decay")
    add("--accum-steps", type=at_least_one, default=1, metavar="N", help="batches per optimizer step")


def _schedule(parser: Parser) -> None:
    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=at_least_one, default=300, metavar="N", help="epochs to train")
    add("--batch-size", type=at_least_one, default=64, metavar="N", help="images per process and batch")
    add("--lr", type=_amount, default=5e-4, metavar="LR", help="learning rate per 512 images of a joint batch")
    add("--sched", default="cosine", metavar="NAME", help="timm schedule")
    add("--lr-noise", type=_share, nargs="+", metavar="T", help="share of training at which noise starts (and ends)")
    add("--lr-noise-pct", type=_positive, default=0.67, metavar="P", help="limit of that noise")
    add("--lr-noise-std", type=_amount, default=1.0, metavar="S", help="standard deviation of that noise")
    add("--warmup-lr", type=_amount, default=1e-6, metavar="LR", help="learning rate at the start of warm-up")
    add("--min-lr", type=_amount, default=1e-5, metavar="LR", help="lowest learning rate")
    add("--decay-epochs", type=_positive, default=30, metavar="N", help="step schedules: epochs between decays")
    add("--warmup-epochs", type=_index, default=5, metavar="N", help="epochs of linear warm-up")
    add("--cooldown-epochs", type=_index, default=10, metavar="N", help="accepted; --epochs says how many are trained")
    add("--patience-epochs", type=_index, default=10, metavar="N", help="plateau schedule: epochs without progress")
    add("--decay-rate", "--dr", type=_amount, default=0.1, metavar="R", help="step schedules: factor of a decay")


def _augmentation(parser: Parser) -> None:
    add = (group := parser.add_argument_group("augmentation")).add_argument
    add("--no-aug", action="store_true", help="train on images as in evaluation: none of crop, flip, --aa, --reprob")
    add("--color-jitter", type=_amount, default=0.4, metavar="C", help="colour jitter, where --aa is none")
    add(
        "--aa",
        type=_augment_policy,
        default="rand-m9-mstd0.5-inc1",
        metavar="POLICY",
        help="timm auto-augment policy, or none",
    )
    add("--smoothing", type=_share, default=0.1, metavar="S", help="label smoothing")
    add("--train-interpolation", choices=("bilinear", "bicubic", "random"), default="bicubic", help="of random crops")
    _switch(group, "repeated-aug", "three views of an image in one epoch")
    add("--reprob", type=_share, default=0.25, metavar="P", help="random erasing: probability")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel", help="random erasing: what is filled in")
    add("--recount", type=at_least_one, default=1, metavar="N", help="random erasing: regions")
    add("--resplit", action="store_true", help="accepted; there are no augmentation splits")
    add("--mixup", type=_amount, default=0.8, metavar="A", help="mixup alpha, 0 for none")
    add("--cutmix", type=_amount, default=1.0, metavar="A", help="cutmix alpha, 0 for none")
    add("--cutmix-minmax", type=_share, nargs=2, metavar="R", help="cutmix: smallest and largest share of the side")
    add("--mixup-prob", type=_share, default=1.0, metavar="P", help="probability of mixing a batch")
    add("--mixup-switch-prob", type=_share, default=0.5, metavar="P", help="probability of cutmix where both are on")
    add("--mixup-mode", choices=("batch", "pair", "elem"), default="batch", help="mix per batch, pair or element")


def _distillation(parser: Parser) -> None:
    add = parser.add_argument_group("distillation").add_argument
    add("--teacher-model", default="regnety_160", metavar="NAME", help="any timm model")
    add("--teacher-path", metavar="FILE", help="its weights, a path or https URL; timm's own by default")
    add("--distillation-type", choices=("none", "soft", "hard"), default="none", help="what to learn from the teacher")
    add("--distillation-alpha", type=_share, default=0.5, metavar="A", help="weight of the teacher's part")
    add("--distillation-tau", type=_positive, default=1.0, metavar="T", help="temperature of soft distillation")


def _data(parser: Parser) -> None:
    add = (group := parser.add_argument_group("data")).add_argument
    add("--data-path", metavar="DIR", help="folder of the data set")
    names = f"{', '.join(DATA_SETS)}, or timm's name with its prefix ({', '.join(f'{name}/' for name in READERS)})"
    add("--data-set", type=data_set, default="IMNET", metavar="NAME", help=names)
    add("--train-split", metavar="NAME", help="timm's data sets: the split for training (default: train)")
    add("--val-split", metavar="NAME", help="timm's data sets: the split for evaluation (default: validation)")
    add("--num-classes", type=at_least_one, metavar="N", help="timm's data sets: for those that do not know it")
    add(
        "--inat-category", default="name", metavar="KEY", help="iNaturalist: what a class is (name, genus, family, ...)"
    )
    add(
        "--num-workers",
        type=_index,
        default=10,
        metavar="N",
        help="loader processes, never more than the machine has cores",
    )
    _switch(group, "pin-mem", "page-locked memory for batches, on CUDA")


def _run(parser: Parser) -> None:
    add = parser.add_argument_group("run").add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--output-dir", metavar="DIR", help="where everything is saved; without it nothing is")
    add("--device", default=device, help="cuda or cpu")
    add("--seed", type=_index, default=0, metavar="N", help="of all random numbers")
    add(
        "--resume",
        metavar="FILE",
        help="go on exactly from a checkpoint of ours, a path or https URL; auto: from checkpoint.pth in --output-dir, "
        "if it is there",
    )
    add("--checkpoint-steps", type=_index, default=0, metavar="N", help="also save every N updates inside an epoch")
    add("--keep", type=_index, default=0, metavar="K", help="keep checkpoints of the last K epochs")
    add(
        "--max-bad-images",
        type=_index,
        default=100,
        metavar="N",
        help="unreadable training images to pass over, per process, before training stops",
    )
    add("--start-epoch", type=_index, metavar="N", help="first epoch (default: 0, or what --resume says)")
    add("--eval", action="store_true", help="evaluate, do not train")
    add("--dist-eval", action="store_true", help="accepted; evaluation is always distributed, and exact")
    add("--finetune", metavar="FILE", help="weights to go on from, without dropout and stochastic depth")
    add("--tensorboard", action="store_true", help="write TensorBoard logs to --output-dir")
    add("--world-size", type=at_least_one, metavar="N", help="processes, where the launcher does not say")
    add("--dist-url", default="env://", metavar="URL", help="how processes meet")
    add("--amp", choices=("none", "fp16", "bf16"), help="mixed precision (default: fp16 on cuda, none on cpu)")


def _avit(parser: Parser) -> None:
    add = (group := parser.add_argument_group("A-ViT")).add_argument
    add("--pretrained", action="store_true", help="start from DeiT's weights")
    add("--pretrained-path", metavar="FILE", help="start from these static weights, a path or https URL")
    add("--no-halting", dest="halting", action="store_false", help="the static network: every token, every block")
    add(
        "--ponder-token-scale",
        "--ponder-scale-token",
        type=_amount,
        default=0.001,
        metavar="S",
        help="weight of the ponder loss",
    )
    gate = "in h = sigmoid(scale * x - center) (default: the checkpoint's, or {:g})"
    add("--gate-scale", type=_finite, metavar="G", help="scale " + gate.format(GATE_DEFAULTS["gate_scale"]))
    add("--gate-center", type=_finite, metavar="G", help="center " + gate.format(GATE_DEFAULTS["gate_center"]))
    add("--distr-prior-alpha", type=_amount, default=0.01, metavar="A", help="weight of the distribution prior")
    _switch(group, "zip-tokens", "halted tokens leave the computation; else they are masked")
    _switch(group, "early-exit", "at inference, images whose prefix tokens have halted leave too")


def _demo(parser: Parser) -> None:
    add = parser.add_argument_group("demo").add_argument
    add("--demo", action="store_true", help="draw token depths of the validation set, do not train")
    add("--demo-images", type=at_least_one, default=1, metavar="K", help="images of each class")
    add(
        "--demo-by",
        choices=tuple(CRITERIA),
        default="std",
        help="which: those whose patch depths vary most, of the largest or smallest mean depth, wrong predictions "
        "(the surest first), or any",
    )
    add("--demo-dir", metavar="DIR", help=f"where to (default: {DEMO_FOLDER} in --output-dir, or here)")
    add("--html", action="store_true", help="also write index.html, a gallery to search and sort")
    add(
        "--class-index",
        metavar="FILE",
        help=f"JSON file with class names (default: {CLASS_INDEX_FILES} in --data-path)",
    )


def _ignored(parser: Parser) -> None:
    add = parser.add_argument_group("accepted and ignored").add_argument
    add("--act-mode", type=int, metavar="N", help="the original's mode; the paper's, 4, is the only one")
    add("--warmup-epoch", type=int, metavar="N", help="the original did not read it; see --warmup-epochs")


def check_together(args: argparse.Namespace) -> None:
    """UserError for values that do not go together."""
    if args.input_size and len(args.input_size) > 2:
        raise UserError("--input-size takes one number, or height and width")
    if args.amp == "fp16" and not args.device.startswith("cuda"):
        raise UserError("--amp fp16 needs CUDA; use --amp bf16")
    if args.eval and args.demo:
        raise UserError("--eval and --demo exclude each other")
    if args.cutmix_minmax and args.cutmix_minmax[0] > args.cutmix_minmax[1]:
        raise UserError("--cutmix-minmax: the smallest share comes first")
    if args.seed >= 2**31:
        raise UserError("--seed must be below 2147483648")
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto needs --output_dir")
    if args.resume == "auto" and args.start_epoch is not None:
        raise UserError("--resume auto knows the epoch: it excludes --start_epoch")
    if args.tensorboard and not args.output_dir and not (args.eval or args.demo):
        raise UserError("--tensorboard needs --output_dir")
