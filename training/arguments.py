"""The flags of the commands: names, defaults, groups, checks of values.

Nothing here imports torch, so that --help and mistakes are answered at once. Names of models and data sets are checked
where they are first needed.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import shlex
import sys
from collections.abc import Callable

from visualization.image_record import CRITERIA

DEMO_FOLDER = "token_act_visualization"
GATE_DEFAULTS = {"gate_scale": 10.0, "gate_center": 30.0}


class Parser(argparse.ArgumentParser):
    """Every flag with dashes or underscores, no abbreviations, errors in one line with status 2.

    fromfile_prefix_chars="@": @FILE stands for the flags in a file, one or more a line; # begins a comment.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)

    def parse_args(self, args=None, namespace=None):
        keep_streams_from_failing()
        args = sys.argv[1:] if args is None else args
        files = [arg for arg in args if self.fromfile_prefix_chars and arg.startswith("@")]
        missing = [file for file in files if not os.path.isfile(file[1:])]
        if missing:
            self.error(f"{missing[0]}: no such file of flags")
        try:
            return super().parse_args([_with_dashes(arg) for arg in args], namespace)
        except UnicodeDecodeError as error:
            self.error(f"a file of flags is no text: {error}")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """What a line of a file of flags says. Such a file names no other."""
        arg_line = arg_line.removeprefix("\ufeff")  # a byte order mark
        try:
            args = shlex.split(re.sub(r"(^|\s)#.*", "", arg_line))
        except ValueError as error:
            self.error(f"a line of a file of flags: {error}: {arg_line}")
        if any(arg.startswith("@") for arg in args):
            self.error(f"a file of flags names no other: {arg_line}")
        return [_with_dashes(arg) for arg in args]

    def error(self, message: str, status: int = 2, everywhere: bool = False):
        """One line on stderr, by the first process of each machine, or by every process that meets it."""
        is_alone = os.environ.get("WORLD_SIZE", "") in ("", "1")  # whatever else was left in its environment
        if not (is_alone or everywhere or os.environ.get("LOCAL_RANK", "") in ("", "0")):
            self.exit(status)
        printable = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
        self.exit(status, f"{self.prog}: error: {printable}\n")


class UnfailingStream:
    """Standard output or error that never ends a run: where nobody listens any more, or not to such letters."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            return self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def keep_streams_from_failing() -> None:
    """A closed stream, which is None for Python, is one that goes nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, UnfailingStream):
            nowhere = open(os.devnull, "w") if stream is None else None  # noqa: SIM115 - for as long as the process
            setattr(sys, name, UnfailingStream(stream or nowhere))


class _Formatter(argparse.HelpFormatter):
    """Adds the default where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_none = action.default in (None, argparse.SUPPRESS) or (action.nargs == 0 and action.const is not None)
        silent = has_none or "default" in action.help
        return action.help if silent else f"{action.help} (default: %(default)s)"


def _with_dashes(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def _number(kind: type, accepts: Callable[[float], bool], what: str) -> Callable:
    """A converter of text for numbers that are accepted; what: these are, in its message."""

    def convert(text: str) -> float:
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse names it in its message
    return convert


at_least_one = _number(int, lambda value: value >= 1, "at least 1")
_index = _number(int, lambda value: value >= 0, "at least 0")
_amount = _number(float, lambda value: value >= 0, "at least 0")
_positive = _number(float, lambda value: value > 0, "above 0")
_share = _number(float, lambda value: 0 <= value <= 1, "from 0 to 1")
_finite = _number(float, math.isfinite, "a finite number")


def _macs(text: str) -> float:
    """A share, or an amount such as 2.9G or 350M, in multiply-adds."""
    factor = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1:].upper())
    value = float(text[:-1]) * factor if factor else float(text)
    if not (1 < value < math.inf if factor else 0 < value <= 1):
        raise argparse.ArgumentTypeError(f"must be a share above 0 and at most 1, or an amount as 2.9G, got {text}")
    return value


_macs.__name__ = "share or amount"
budget_share = _number(float, lambda value: 0 < value <= 1, "above 0 and at most 1")


def _augment_policy(text: str) -> str | None:
    return None if text.lower() in ("", "none") else text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Of main_act.py. Ends the program with status 2 on a mistake."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_together(parser, args)
    return args


def make_parser() -> Parser:
    groups = (_model, _optimizer, _schedule, _augmentation, _distillation, data_flags, _training_data, _run)
    groups += (network_flags, _avit, gallery_flags, _demo, _ignored)
    return Parser(
        prog="main_act.py",
        fromfile_prefix_chars="@",
        description="Train, evaluate or look at A-ViT: adaptive tokens for vision transformers.",
        parents=[group() for group in groups],
    )


# Groups of flags, as parents of parsers; those of one title are joined ----------------------------


def _group(title: str) -> tuple[Parser, Callable]:
    """A parent, and what adds a flag to its one group."""
    parser = Parser(add_help=False)
    return parser, parser.add_argument_group(title).add_argument


def _switch(add: Callable, name: str, help: str) -> None:
    add(f"--{name}", action=argparse.BooleanOptionalAction, default=True, help=help)


def _model() -> Parser:
    parser, add = _group("model")
    add("--model", default="avit_tiny_patch16_224", metavar="NAME", help="of ours, or of a plain ViT of timm's")
    size = "image size; two numbers: height, width"
    add("--input-size", type=at_least_one, nargs="+", default=[224], metavar="PIXELS", help=size)
    add("--drop", type=_share, default=0.0, metavar="P", help="dropout of positions, attention projection and MLP")
    add("--drop-path", type=_share, default=0.1, metavar="P", help="stochastic depth rate of the last block")
    _switch(add, "model-ema", "keep an exponential moving average of the weights")
    add("--model-ema-decay", type=_share, default=0.99996, metavar="D", help="decay of that average per step")
    add("--model-ema-force-cpu", action="store_true", help="keep that average in CPU memory")
    add("--grad-checkpointing", action="store_true", help="compute blocks twice to save memory")
    return parser


def _optimizer() -> Parser:
    parser, add = _group("optimizer")
    add("--opt", default="adamw", metavar="NAME", help="timm optimizer")
    add("--opt-eps", type=_amount, default=1e-8, metavar="E", help="its epsilon")
    add("--opt-betas", type=_share, nargs=2, metavar="B", help="its betas")
    add("--clip-grad", type=_amount, metavar="NORM", help="clip the gradient's norm")
    add("--momentum", type=_share, default=0.9, metavar="M", help="its momentum, where it has one")
    add("--weight-decay", type=_amount, default=0.05, metavar="W", help="weight decay")
    add("--accum-steps", type=at_least_one, default=1, metavar="N", help="batches per optimizer step")
    return parser


def _schedule() -> Parser:
    parser, add = _group("schedule")
    add("--epochs", type=at_least_one, default=300, metavar="N", help="epochs to train")
    add("--lr", type=_amount, default=5e-4, metavar="LR", help="learning rate per 512 images of a joint batch")
    add("--sched", default="cosine", metavar="NAME", help="timm schedule")
    add("--lr-noise", type=_share, nargs="+", metavar="T", help="share of training at which noise starts (and ends)")
    add("--lr-noise-pct", type=_positive, default=0.67, metavar="P", help="limit of that noise")
    add("--lr-noise-std", type=_amount, default=1.0, metavar="S", help="standard deviation of that noise")
    add("--warmup-lr", type=_amount, default=1e-6, metavar="LR", help="learning rate at the start of warm-up")
    add("--min-lr", type=_amount, default=1e-5, metavar="LR", help="lowest learning rate")
    add("--decay-epochs", type=_positive, default=30, metavar="N", help="step schedules: epochs between decays")
    add("--warmup-epochs", type=_index, default=5, metavar="N", help="epochs of linear warm-up")
    add("--patience-epochs", type=_index, default=10, metavar="N", help="plateau schedule: epochs without progress")
    add("--decay-rate", "--dr", type=_amount, default=0.1, metavar="R", help="step schedules: factor of a decay")
    return parser


def _augmentation() -> Parser:
    parser, add = _group("augmentation")
    add("--no-aug", action="store_true", help="train on images as in evaluation: none of crop, flip, --aa, --reprob")
    add("--color-jitter", type=_amount, default=0.4, metavar="C", help="colour jitter, where --aa is none")
    policy = "timm auto-augment policy, or none"
    add("--aa", type=_augment_policy, default="rand-m9-mstd0.5-inc1", metavar="POLICY", help=policy)
    add("--smoothing", type=_share, default=0.1, metavar="S", help="label smoothing")
    add("--train-interpolation", choices=("bilinear", "bicubic", "random"), default="bicubic", help="of random crops")
    _switch(add, "repeated-aug", "three views of an image in one epoch")
    add("--reprob", type=_share, default=0.25, metavar="P", help="random erasing: probability")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel", help="random erasing: what is filled in")
    add("--recount", type=at_least_one, default=1, metavar="N", help="random erasing: regions")
    add("--mixup", type=_amount, default=0.8, metavar="A", help="mixup alpha, 0 for none")
    add("--cutmix", type=_amount, default=1.0, metavar="A", help="cutmix alpha, 0 for none")
    add("--cutmix-minmax", type=_share, nargs=2, metavar="R", help="cutmix: smallest and largest share of the side")
    add("--mixup-prob", type=_share, default=1.0, metavar="P", help="probability of mixing a batch")
    add("--mixup-switch-prob", type=_share, default=0.5, metavar="P", help="probability of cutmix where both are on")
    add("--mixup-mode", choices=("batch", "pair", "elem"), default="batch", help="mix per batch, pair or element")
    return parser


def _distillation() -> Parser:
    parser, add = _group("distillation")
    add("--teacher-model", default="regnety_160", metavar="NAME", help="any timm model")
    add("--teacher-path", metavar="FILE", help="its weights, a path or https URL; timm's own by default")
    kind = "what to learn from the teacher; self: the static network that training starts from is the teacher"
    add("--distillation-type", choices=("none", "soft", "hard", "self"), default="none", help=kind)
    add("--distillation-alpha", type=_share, default=0.5, metavar="A", help="weight of the teacher's part")
    add("--distillation-tau", type=_positive, default=1.0, metavar="T", help="temperature, but of hard distillation")
    return parser


def data_flags() -> Parser:
    """Which images, and how they are read: of every command that looks at a data set."""
    parser, add = _group("data")
    add("--data-path", metavar="DIR", help="folder of the data set")
    names = "IMNET, INAT, INAT19, CIFAR (100 classes), CIFAR10, FMNIST, CLUTTERED, DIGITS, or timm's with its prefix"
    add("--data-set", default="IMNET", metavar="NAME", help=f"{names} (wds/, tfds/, torch/)")
    add("--val-split", metavar="NAME", help="timm's data sets: the split for evaluation (default: validation)")
    add("--num-classes", type=at_least_one, metavar="N", help="timm's data sets: for those that do not know it")
    add(
        "--inat-category", default="name", metavar="KEY", help="iNaturalist: what a class is (name, genus, family, ...)"
    )
    add("--batch-size", type=at_least_one, default=64, metavar="N", help="images per process and batch")
    workers = "loader processes, never more than the machine has cores"
    add("--num-workers", type=_index, default=10, metavar="N", help=workers)
    _switch(add, "pin-mem", "page-locked memory for batches, on CUDA")
    return parser


def _training_data() -> Parser:
    parser, add = _group("data")
    add("--train-split", metavar="NAME", help="timm's data sets: the split for training (default: train)")
    return parser


def network_flags() -> Parser:
    """How a trained network runs: of every command that runs one."""
    parser, add = _group("run")
    add("--device", help="cuda or cpu (default: cuda where there is one)")
    add("--amp", choices=("none", "fp16", "bf16"), help="mixed precision (default: fp16 on cuda, none on cpu)")
    add("--world-size", type=at_least_one, metavar="N", help="processes, where the launcher does not say")
    add("--dist-url", default="env://", metavar="URL", help="how processes meet")
    add = parser.add_argument_group("model").add_argument
    add("--use-ema", action="store_true", help="load model_ema instead of model from a checkpoint")
    add = parser.add_argument_group("A-ViT").add_argument
    gate = "in h = sigmoid(scale * x - center) (default: the checkpoint's, or {:g})"
    add("--gate-scale", type=_finite, metavar="G", help="scale " + gate.format(GATE_DEFAULTS["gate_scale"]))
    add("--gate-center", type=_finite, metavar="G", help="center " + gate.format(GATE_DEFAULTS["gate_center"]))
    budget = "share of the static network's multiply-adds to use, of a checkpoint that knows its gate's cost"
    add("--budget", type=budget_share, metavar="SHARE", help=budget)
    add("--no-halting", dest="halting", action="store_false", help="the static network: every token, every block")
    return parser


def gallery_flags() -> Parser:
    """Which images are drawn, under which names: of every command that draws some of a data set."""
    parser, add = _group("demo")
    add("--demo-images", type=at_least_one, default=1, metavar="K", help="images of each class")
    which = "which: whose patch depths vary most, deepest, shallowest, wrong predictions (the surest first), or any"
    add("--demo-by", choices=tuple(CRITERIA), default="std", help=which)
    add("--html", action="store_true", help="also write index.html, a gallery to search and sort")
    add("--class-index", metavar="FILE", help="JSON file with class names (default: *class_index.json in --data-path)")
    return parser


def _run() -> Parser:
    parser, add = _group("run")
    add("--output-dir", metavar="DIR", help="where everything is saved; without it nothing is")
    add("--seed", type=_index, default=0, metavar="N", help="of all random numbers")
    resume = "go on exactly from a checkpoint of ours, a path or https URL; auto: from the one in --output-dir, if any"
    add("--resume", metavar="FILE", help=resume)
    add("--checkpoint-steps", type=_index, default=0, metavar="N", help="also save every N updates inside an epoch")
    add("--keep", type=_index, default=0, metavar="K", help="keep checkpoints of the last K epochs")
    bad = "unreadable training images to pass over, per process, before training stops"
    add("--max-bad-images", type=_index, default=100, metavar="N", help=bad)
    add("--start-epoch", type=_index, metavar="N", help="first epoch (default: 0, or what --resume says)")
    add("--eval", action="store_true", help="evaluate, do not train")
    add("--finetune", metavar="FILE", help="weights to go on from, without dropout and stochastic depth")
    add("--tensorboard", action="store_true", help="write TensorBoard logs to --output-dir")
    return parser


def _avit() -> Parser:
    parser, add = _group("A-ViT")
    add("--pretrained", action="store_true", help="start from DeiT's weights")
    add("--pretrained-path", metavar="FILE", help="start from these static weights, a path or https URL")
    ponder = {"type": _amount, "default": 0.001, "metavar": "S", "help": "weight of the ponder loss"}
    add("--ponder-token-scale", "--ponder-scale-token", **ponder)
    add("--distr-prior-alpha", type=_amount, default=0.01, metavar="A", help="weight of the distribution prior")
    target = (
        "share of the static network's multiply-adds to train to, or an amount (2.9G): sets the ponder loss's weight"
    )
    add("--target-macs", type=_macs, metavar="COST", help=target)
    choice = "auto: channel, scale and center follow from the static network; fixed: of flags, checkpoint or the paper"
    add("--gate", choices=("auto", "fixed"), help=f"{choice} (default: auto with --target-macs)")
    jitter = "training: shift each image's gate center by up to this, so that one network serves many budgets"
    add("--gate-jitter", type=_amount, default=0.0, metavar="S", help=jitter)
    _switch(add, "zip-tokens", "halted tokens leave the computation; else they are masked")
    _switch(add, "early-exit", "at inference, images whose prefix tokens have halted leave too")
    return parser


def _demo() -> Parser:
    parser, add = _group("demo")
    add("--demo", action="store_true", help="draw token depths of the validation set, do not train")
    add("--demo-dir", metavar="DIR", help=f"where to (default: {DEMO_FOLDER} in --output-dir, or here)")
    return parser


def _ignored() -> Parser:
    parser = Parser(add_help=False)
    add = parser.add_argument_group("accepted and ignored", "flags of scripts that exist").add_argument
    add("--act-mode", type=int, metavar="N", help="the paper's mode, 4, is the only one")
    add("--warmup-epoch", type=int, metavar="N", help="see --warmup-epochs")
    add("--cooldown-epochs", type=_index, default=10, metavar="N", help="--epochs says how many are trained")
    add("--resplit", action="store_true", help="there are no augmentation splits")
    add("--dist-eval", action="store_true", help="evaluation is always distributed, and exact")
    return parser


def check_together(parser: Parser, args: argparse.Namespace) -> None:
    """Ends the program with status 2 for values of main_act.py that do not go together."""
    check_size(parser, args.input_size)
    if args.eval and args.demo:
        parser.error("--eval and --demo exclude each other")
    check_budget(parser, args)
    trains_tokens = args.halting and not (args.eval or args.demo)
    if args.budget is not None and not (args.eval or args.demo):
        parser.error("--budget is for --eval and --demo; --target-macs says what training is to reach")
    if args.target_macs is not None and not trains_tokens:
        parser.error("--target-macs is for training an adaptive network")
    if args.gate == "auto" and (not trains_tokens or args.gate_scale is not None or args.gate_center is not None):
        parser.error("--gate auto is for training, and excludes --gate_scale, --gate_center and --no-halting")
    if args.cutmix_minmax and args.cutmix_minmax[0] > args.cutmix_minmax[1]:
        parser.error("--cutmix-minmax: the smallest share comes first")
    if args.seed >= 2**31:
        parser.error("--seed must be below 2147483648")
    if args.resume == "auto" and not args.output_dir:
        parser.error("--resume auto needs --output_dir")
    if args.resume == "auto" and args.start_epoch is not None:
        parser.error("--resume auto knows the epoch: it excludes --start_epoch")
    if args.tensorboard and not args.output_dir and not (args.eval or args.demo):
        parser.error("--tensorboard needs --output_dir")


def check_budget(parser: Parser, args: argparse.Namespace) -> None:
    """Ends the program with status 2 where --budget and another flag both set the gate."""
    for flag in ("gate_scale", "gate_center"):
        if args.budget is not None and getattr(args, flag) is not None:
            parser.error(f"--budget and --{flag} exclude each other")
    if args.budget is not None and not args.halting:
        parser.error("--budget and --no-halting exclude each other")


def check_size(parser: Parser, size: list[int] | None) -> None:
    """Ends the program with status 2 for an --input-size of more than two numbers."""
    if size and len(size) > 2:
        parser.error("--input-size takes one number, or height and width")
