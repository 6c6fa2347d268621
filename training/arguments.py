"""Command-line flags: names, defaults, groups and checks of values.

This module does not import torch, so that --help and invalid flags are answered immediately. Names of models and
datasets are checked later, where they are first used.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from training.parser import (
    Parser,
    add_budget_flag,
    at_least_one,
    augment_policy,
    count,
    fraction,
    gate_jitter,
    gate_number,
    macs,
    nonnegative,
    positive,
)
from visualization.image_record import CRITERIA

DEMO_FOLDER = "token_act_visualization"
GATE_DEFAULTS = {"gate_scale": 10.0, "gate_center": 30.0}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags of main_act.py. Exits with status 2 if they are invalid."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_together(parser, args)
    return args


def make_parser() -> Parser:
    groups = (_model, _optimizer, _schedule, _augmentation, _mixing, _distillation, data_flags)
    groups += (_training_data, _run, network_flags, _avit, _demo, gallery_flags, _ignored)
    return Parser(
        prog="main_act.py",
        usage="%(prog)s [@FILE] [--FLAG VALUE ...]",
        fromfile_prefix_chars="@",
        description="Train, evaluate or visualize A-ViT: vision transformers whose tokens halt and are then removed. "
        "@FILE reads flags from a file, and every flag also accepts underscores instead of dashes. "
        "MACs are multiply-accumulate operations per image. "
        "The static model runs every token through every block.",
        parents=[group() for group in groups],
    )


# Groups of flags, as parent parsers; argparse merges groups of the same title ---------------------


def _group(title: str) -> tuple[Parser, Callable]:
    """Return a parent parser and the function that adds a flag to its only group."""
    parser = Parser(add_help=False)
    return parser, parser.add_argument_group(title).add_argument


def _switch(add: Callable, name: str, help: str, default: bool = True) -> None:
    add(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=help)


def _model() -> Parser:
    parser, add = _group("model")
    add(
        "--model",
        metavar="NAME",
        help="model name: a registered avit_* model or any plain timm ViT (default: the checkpoint's, else "
        "avit_tiny_patch16_224)",
    )
    add(
        "--input-size",
        type=at_least_one,
        nargs="+",
        metavar="PIXELS",
        help="image size: one number for squares, or height and width (default: the checkpoint's, else 224)",
    )
    add(
        "--drop",
        type=fraction,
        default=0.0,
        metavar="P",
        help="dropout probability of position embedding, attention projection and MLP",
    )
    add(
        "--drop-path",
        type=fraction,
        default=0.1,
        metavar="P",
        help="stochastic-depth probability of the last block; it rises linearly from 0 in the first",
    )
    _switch(add, "model-ema", "exponential moving average (EMA) of the weights, evaluated next to the weights")
    add("--model-ema-decay", type=fraction, default=0.99996, metavar="D", help="EMA decay per optimizer step")
    add("--model-ema-force-cpu", action="store_true", help="EMA weights in CPU memory instead of GPU memory")
    add("--grad-checkpointing", action="store_true", help="activation checkpointing: less memory, more compute")
    return parser


def _optimizer() -> Parser:
    parser, add = _group("optimizer")
    add("--opt", default="adamw", metavar="NAME", help="timm optimizer name")
    add("--opt-eps", type=nonnegative, default=1e-8, metavar="E", help="optimizer epsilon")
    add("--opt-betas", type=fraction, nargs=2, metavar="B", help="optimizer betas (default: the optimizer's own)")
    add("--clip-grad", type=nonnegative, metavar="NORM", help="largest gradient norm (default: no clipping)")
    add("--momentum", type=fraction, default=0.9, metavar="M", help="optimizer momentum, if the optimizer has one")
    add("--weight-decay", type=nonnegative, default=0.05, metavar="W", help="weight decay")
    add("--accum-steps", type=at_least_one, default=1, metavar="N", help="batches accumulated per optimizer step")
    return parser


def _schedule() -> Parser:
    parser, add = _group("schedule")
    add("--epochs", type=at_least_one, default=300, metavar="N", help="number of training epochs")
    add(
        "--lr",
        type=nonnegative,
        default=5e-4,
        metavar="LR",
        help="learning rate per 512 images of a global batch (--batch-size x processes x --accum-steps)",
    )
    add("--sched", default="cosine", metavar="NAME", help="timm schedule name")
    add(
        "--lr-noise",
        type=fraction,
        nargs="+",
        metavar="T",
        help="fractions of training at which learning-rate noise starts and, optionally, ends (default: no noise)",
    )
    add("--lr-noise-pct", type=positive, default=0.67, metavar="P", help="limit of the relative learning-rate noise")
    add(
        "--lr-noise-std",
        type=nonnegative,
        default=1.0,
        metavar="S",
        help="standard deviation of the relative learning-rate noise",
    )
    add("--warmup-lr", type=nonnegative, default=1e-6, metavar="LR", help="learning rate at the start of warm-up")
    add("--min-lr", type=nonnegative, default=1e-5, metavar="LR", help="lowest learning rate")
    add("--decay-epochs", type=positive, default=30, metavar="N", help="epochs between decays of step schedules")
    add("--warmup-epochs", type=count, default=5, metavar="N", help="epochs of linear warm-up")
    add("--patience-epochs", type=count, default=10, metavar="N", help="epochs without progress before a plateau decay")
    add(
        "--decay-rate",
        "--dr",
        type=nonnegative,
        default=0.1,
        metavar="R",
        help="factor of each decay of step and plateau schedules",
    )
    return parser


def _augmentation() -> Parser:
    parser, add = _group("augmentation")
    add("--no-aug", action="store_true", help="training images as in evaluation: no random crop, flip, --aa, --reprob")
    add("--color-jitter", type=nonnegative, default=0.4, metavar="C", help="color jitter, for --aa none and 3a only")
    add(
        "--aa",
        type=augment_policy,
        default="rand-m9-mstd0.5-inc1",
        metavar="POLICY",
        help="timm auto-augment policy, or none",
    )
    add("--smoothing", type=fraction, default=0.1, metavar="S", help="label smoothing")
    add(
        "--train-interpolation",
        choices=("bilinear", "bicubic", "random"),
        default="bicubic",
        help="interpolation of random crops",
    )
    _switch(add, "repeated-aug", "repeated augmentation: three views of a third of the images per epoch")
    add("--reprob", type=fraction, default=0.25, metavar="P", help="random-erasing probability")
    add(
        "--remode",
        choices=("const", "rand", "pixel"),
        default="pixel",
        help="random-erasing fill: zeros, one random color, or a random color per pixel",
    )
    add("--recount", type=at_least_one, default=1, metavar="N", help="largest number of random-erasing regions")
    return parser


def _mixing() -> Parser:
    parser, add = _group("augmentation")
    add("--mixup", type=nonnegative, default=0.8, metavar="A", help="mixup alpha; 0 disables mixup")
    add("--cutmix", type=nonnegative, default=1.0, metavar="A", help="CutMix alpha; 0 disables CutMix")
    add(
        "--cutmix-minmax",
        type=fraction,
        nargs=2,
        metavar="R",
        help="smallest and largest CutMix box as fractions of the image side; replaces --cutmix",
    )
    add("--mixup-prob", type=fraction, default=1.0, metavar="P", help="probability of mixup or CutMix per batch")
    add(
        "--mixup-switch-prob",
        type=fraction,
        default=0.5,
        metavar="P",
        help="probability of CutMix instead of mixup, if both are enabled",
    )
    add(
        "--mixup-mode",
        choices=("batch", "pair", "elem"),
        default="batch",
        help="mixing ratio per batch, per pair of images or per image",
    )
    return parser


def _distillation() -> Parser:
    parser, add = _group("distillation")
    add(
        "--distillation-type",
        choices=("none", "soft", "hard", "self"),
        default="none",
        help="training target from a teacher: its probabilities (soft) or labels (hard), for distilled models; "
        "or the probabilities of the static model that training starts from (self), for any model",
    )
    add("--teacher-model", default="regnety_160", metavar="NAME", help="timm model name of a soft or hard teacher")
    add(
        "--teacher-path",
        metavar="FILE",
        help="teacher weights: path or https URL (default: timm's; for self, the starting weights)",
    )
    add("--distillation-alpha", type=fraction, default=0.5, metavar="A", help="weight of the distillation loss")
    add("--distillation-tau", type=positive, default=1.0, metavar="T", help="temperature of soft and self-distillation")
    return parser


def data_flags() -> Parser:
    """Return the flags that select images and how they are read, for every command that reads a dataset."""
    parser, add = _group("data")
    add("--data-path", metavar="DIR", help="dataset folder")
    add(
        "--data-set",
        default="IMNET",
        metavar="NAME",
        help="dataset name: IMNET, INAT (iNaturalist 2018), INAT19, CIFAR (100 classes), CIFAR10, FMNIST, CLUTTERED, "
        "CLUTTERED_VARIED, DIGITS, or a timm dataset with prefix wds/, tfds/ or torch/",
    )
    add("--val-split", metavar="NAME", help="evaluation split of a timm dataset (default: validation)")
    add(
        "--num-classes",
        type=at_least_one,
        metavar="N",
        help="number of classes of a timm dataset that does not record it",
    )
    add(
        "--inat-category",
        default="name",
        metavar="KEY",
        help="taxonomic rank that makes a class of iNaturalist: name, genus, family, ...",
    )
    add("--batch-size", type=at_least_one, default=64, metavar="N", help="images per batch and process")
    add(
        "--num-workers",
        type=count,
        default=10,
        metavar="N",
        help="data-loader workers per process, limited to the available CPU cores",
    )
    _switch(add, "pin-mem", "page-locked (pinned) memory for batches on CUDA")
    return parser


def _training_data() -> Parser:
    parser, add = _group("data")
    add("--train-split", metavar="NAME", help="training split of a timm dataset (default: train)")
    return parser


def network_flags() -> Parser:
    """Return the flags that set how a trained model runs, for every command that runs one."""
    parser, add = _group("run")
    add("--device", metavar="NAME", help="cuda or cpu (default: cuda if available)")
    add("--amp", choices=("none", "fp16", "bf16"), help="mixed precision (default: fp16 on CUDA, none on CPU)")
    add("--world-size", type=at_least_one, metavar="N", help="number of processes, if no launcher sets it")
    add("--dist-url", default="env://", metavar="URL", help="address at which the processes meet")
    add = parser.add_argument_group("model").add_argument
    add("--use-ema", action="store_true", help="averaged weights (model_ema) of the checkpoint instead of the raw ones")
    add = parser.add_argument_group("A-ViT").add_argument
    for name, default in GATE_DEFAULTS.items():
        term = name.removeprefix("gate_")
        add(
            f"--gate-{term}",
            type=gate_number,
            metavar="G",
            help=f"gate {term} in h = sigmoid(scale * x - center) (default: the checkpoint's, else {default:g})",
        )
    add_budget_flag(add)
    add("--no-halting", dest="halting", action="store_false", help="static model: every token runs through every block")
    return parser


def gallery_flags() -> Parser:
    """Return the flags that select images to draw and their class names."""
    parser, add = _group("demo")
    add("--demo-images", type=at_least_one, default=1, metavar="K", help="number of images per class")
    add(
        "--demo-by",
        choices=tuple(CRITERIA),
        default="std",
        help="images to draw: largest spread of patch depths (std), deepest, shallowest, most confident errors (wrong) "
        "or random",
    )
    add("--html", action="store_true", help="searchable and sortable gallery of the images (index.html)")
    add("--class-index", metavar="FILE", help="JSON file of class names (default: *class_index.json in --data-path)")
    return parser


def _run() -> Parser:
    parser, add = _group("run")
    add(
        "--output-dir",
        metavar="DIR",
        help="folder for checkpoints, logs, results and token-depth images (default: no checkpoints, logs or results)",
    )
    add("--seed", type=count, default=0, metavar="N", help="random seed")
    add(
        "--resume",
        metavar="FILE",
        help="checkpoint of a run to continue exactly: path or https URL; "
        "or auto: checkpoint.pth in --output-dir, or a new run without one",
    )
    add(
        "--checkpoint-steps",
        type=count,
        default=0,
        metavar="N",
        help="optimizer steps between checkpoints inside an epoch; 0 saves after epochs only",
    )
    add("--keep", type=count, default=0, metavar="K", help="number of last epochs kept as checkpoint-EPOCH.pth")
    add(
        "--max-bad-images",
        type=count,
        default=100,
        metavar="N",
        help="number of unreadable training images to skip, per process, before training stops",
    )
    add("--start-epoch", type=count, metavar="N", help="first epoch, from 0 (default: 0, or that of --resume)")
    add("--eval", action="store_true", help="evaluation instead of training")
    add(
        "--finetune",
        metavar="FILE",
        help="weights to evaluate, or to train without dropout and stochastic depth: path or https URL",
    )
    add("--tensorboard", action="store_true", help="TensorBoard logs in --output-dir")
    return parser


def _avit() -> Parser:
    parser, add = _group("A-ViT")
    add("--pretrained", action="store_true", help="starting weights from timm: DeiT's for avit_* models")
    add("--pretrained-path", metavar="FILE", help="static weights to start from: path or https URL")
    add(
        "--ponder-token-scale",
        "--ponder-scale-token",
        type=nonnegative,
        default=0.001,
        metavar="S",
        help="weight of the ponder loss; tokens halt earlier if it is larger",
    )
    add("--distr-prior-alpha", type=nonnegative, default=0.01, metavar="A", help="weight of the distribution prior")
    add(
        "--target-macs",
        type=macs,
        metavar="MACS",
        help="compute target of training: a fraction of the static model's MACs, or a number such as 2.9G; "
        "replaces --ponder-token-scale",
    )
    add(
        "--gate",
        choices=("auto", "channel", "fixed"),
        help="source of the gate at the start of training. auto: directions fitted to the starting weights, or the "
        "best channel without a budget or if they cannot be fitted. channel: the best channel. fixed: flags, "
        "checkpoint or defaults. "
        "(default: auto with --target-macs if flags and checkpoint have no gate, else fixed)",
    )
    add(
        "--gate-jitter",
        type=gate_jitter,
        default=0.0,
        metavar="S",
        help="largest random shift of each training image's gate center, so that one model serves many budgets",
    )
    _switch(add, "zip-tokens", "removal of halted tokens; otherwise they are masked and save no compute")
    _switch(add, "early-exit", "removal of whole images at inference once their prefix tokens have halted")
    _switch(add, "cuda-graphs", "CUDA graphs that replay forward and backward passes (planned mode)", default=False)
    add("--compile", action="store_true", help="torch.compile of the blocks in CUDA graphs, in half precision")
    return parser


def _demo() -> Parser:
    parser, add = _group("demo")
    add("--demo", action="store_true", help="token-depth images of the validation set instead of training")
    add(
        "--demo-dir",
        metavar="DIR",
        help=f"folder for --demo (default: {DEMO_FOLDER} in --output-dir or in the current folder)",
    )
    return parser


def _ignored() -> Parser:
    parser = Parser(add_help=False)
    add = parser.add_argument_group(
        "accepted and ignored", "flags of existing scripts that have no effect"
    ).add_argument
    add("--act-mode", type=int, metavar="N", help="mode of the original; only mode 4, the paper's, exists here")
    add("--warmup-epoch", type=int, metavar="N", help="use --warmup-epochs")
    add("--cooldown-epochs", type=count, default=10, metavar="N", help="--epochs is the exact number of epochs")
    add("--resplit", action="store_true", help="augmentation splits do not exist here")
    add("--dist-eval", action="store_true", help="evaluation is always distributed and exact")
    return parser


# Flags that exclude or require each other ---------------------------------------------------------


def check_together(parser: Parser, args: argparse.Namespace) -> None:
    """Exit with status 2 if flags of main_act.py cannot be combined."""
    check_size(parser, args.input_size)
    if args.eval and args.demo:
        parser.error("--eval and --demo cannot be combined; run one after the other")
    check_budget(parser, args)
    _check_weights(parser, args)
    _check_training_budget(parser, args)
    if args.cutmix_minmax and args.cutmix_minmax[0] > args.cutmix_minmax[1]:
        low, high = args.cutmix_minmax
        parser.error(f"--cutmix-minmax {low:g} {high:g}: the smaller number must come first")
    if args.seed >= 2**31:
        parser.error(f"--seed must be below {2**31}, got {args.seed}")
    if args.resume == "auto" and not args.output_dir:
        parser.error("--resume auto requires --output-dir, the folder of the checkpoint")
    if args.resume == "auto" and args.start_epoch is not None:
        parser.error("--resume auto and --start-epoch cannot be combined: the checkpoint stores the epoch")
    if args.tensorboard and not args.output_dir and not (args.eval or args.demo):
        parser.error("--tensorboard requires --output-dir, the folder of the logs")


def _check_weights(parser: Parser, args: argparse.Namespace) -> None:
    if args.finetune and args.pretrained_path and not (args.eval or args.demo):
        parser.error(
            f"--finetune {args.finetune} and --pretrained-path {args.pretrained_path} both name starting weights; "
            "pass one of them"
        )
    if args.finetune and args.resume and (args.eval or args.demo):
        mode = "evaluate" if args.eval else "draw"
        parser.error(
            f"--finetune {args.finetune} and --resume {args.resume} both name the weights to {mode}; pass one of them"
        )


def _check_training_budget(parser: Parser, args: argparse.Namespace) -> None:
    trains_tokens = args.halting and not (args.eval or args.demo)
    if args.budget is not None and not (args.eval or args.demo):
        parser.error("--budget requires --eval or --demo; use --target-macs to train to a budget")
    if args.target_macs is not None and not trains_tokens:
        parser.error(
            "--target-macs cannot be combined with --eval, --demo or --no-halting; use --budget to evaluate at a budget"
        )
    if args.gate in (None, "fixed"):
        return
    if not trains_tokens:
        parser.error(f"--gate {args.gate} cannot be combined with --eval, --demo or --no-halting")
    if args.gate_scale is not None or args.gate_center is not None:
        parser.error(f"--gate {args.gate} cannot be combined with --gate-scale or --gate-center; use --gate fixed")


def check_budget(parser: Parser, args: argparse.Namespace) -> None:
    """Exit with status 2 if --budget is combined with another flag that sets the gate."""
    for flag in ("gate-scale", "gate-center"):
        if args.budget is not None and getattr(args, flag.replace("-", "_")) is not None:
            parser.error(f"--budget and --{flag} cannot be combined: --budget sets the gate")
    if args.budget is not None and not args.halting:
        parser.error("--budget and --no-halting cannot be combined: a static model has no budget")


def check_size(parser: Parser, size: list[int] | None) -> None:
    """Exit with status 2 if --input-size has more than two numbers."""
    if size and len(size) > 2:
        parser.error(f"--input-size takes one number, or height and width; got {len(size)} numbers")
