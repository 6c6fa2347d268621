"""Flags that were given and do nothing: when each flag of each command acts, and the lines that name the others.

A table maps the flags of a command to the conditions under which they act. The first condition that does not hold is
the reason that is printed. This module does not import torch, see `training.arguments`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple


class Condition(NamedTuple):
    """A need of a flag: without it, the flag has no effect.

    phrase: completes "needs ..."; holds: returns whether the parsed flags fulfill it.
    """

    phrase: str
    holds: Callable[[argparse.Namespace], bool]


Table = dict[str, tuple[Condition, ...]]  # by the flag's name in the namespace


def _by_flag(rows: dict[str, tuple[Condition, ...]]) -> Table:
    """Return a table with an entry for each flag of rows whose keys are names separated by spaces."""
    return {name: conditions for names, conditions in rows.items() for name in names.split()}


# Conditions of main_act.py -------------------------------------------------------------------------

DECAYS_TO_MIN_LR = ("cosine", "tanh", "plateau", "poly", "wsd", "rsqrt")  # timm's schedules with a lowest rate


def _is_training(args: argparse.Namespace) -> bool:
    return not (args.eval or args.demo)


def _scheduled(*names: str) -> Condition:
    return Condition(f"--sched {' or '.join(names)}", lambda args: args.sched in names)


def _optimizer_has(option: str) -> Condition:
    def holds(args: argparse.Namespace) -> bool:
        from timm.optim import get_optimizer_info

        try:
            return getattr(get_optimizer_info(args.opt), f"has_{option}")
        except ValueError:  # an unknown optimizer is an error of its own
            return True

    return Condition(f"an optimizer with {option}", holds)


def _has_folder(args: argparse.Namespace) -> bool:
    from datasets import NEEDS_NO_FOLDER

    return args.data_set not in NEEDS_NO_FOLDER


def _runs_on_cuda(args: argparse.Namespace) -> bool:
    import torch

    return args.device.startswith("cuda") if args.device else torch.cuda.is_available()


def _has_several_processes(args: argparse.Namespace) -> bool:
    import utils

    return utils.world_size() > 1


TRAINING = Condition("training", _is_training)
# Evaluation repeats the flags of the training command and adds --finetune or --resume, whose weights it uses.
START = TRAINING._replace(holds=lambda args: _is_training(args) or not (args.finetune or args.resume))
EVALUATION = Condition("--eval", lambda args: args.eval)
DEMO = Condition("--demo", lambda args: args.demo)
ACCEPTED = Condition("the original program", lambda args: False)
EMA = Condition("--model-ema", lambda args: args.model_ema)
STARTS_FROM_FILE = Condition(
    "weights from --finetune or --pretrained-path",
    lambda args: args.finetune or args.pretrained_path or (args.resume and not _is_training(args)),
)
NO_START_FILE = Condition(
    "no --finetune or --pretrained-path", lambda args: not (args.finetune or args.pretrained_path)
)
NO_FINETUNE = Condition("no --finetune, which disables dropout", lambda args: not args.finetune)
WARMUP = Condition("--warmup-epochs above 0", lambda args: args.warmup_epochs)
NOISE = Condition("--lr-noise", lambda args: args.lr_noise)
AUGMENTATION = Condition("no --no-aug", lambda args: not args.no_aug)
JITTER = Condition("--aa none or 3a", lambda args: not args.aa or "3a" in args.aa)
ERASING = Condition("--reprob above 0", lambda args: args.reprob)
NO_MINMAX = Condition("no --cutmix-minmax", lambda args: not args.cutmix_minmax)
MIXING = Condition("--mixup or --cutmix above 0", lambda args: args.mixup or args.cutmix or args.cutmix_minmax)
BOTH_MIXING = Condition("--mixup and --cutmix above 0", lambda args: args.mixup and (args.cutmix or args.cutmix_minmax))
DISTILLATION = Condition(
    "--distillation-type",  # with an explicit "none", the teacher was switched off on purpose
    lambda args: args.distillation_type != "none" or "distillation_type" in args.given,
)
TEACHER = Condition("--distillation-type soft or hard", lambda args: args.distillation_type in ("soft", "hard"))
TEMPERATURE = Condition("--distillation-type soft or self", lambda args: args.distillation_type in ("soft", "self"))
FOLDER = Condition("a dataset with files", _has_folder)
INATURALIST = Condition("--data-set INAT or INAT19", lambda args: args.data_set.startswith("INAT"))
READ_BY_TIMM = Condition("a dataset with prefix wds/, tfds/ or torch/", lambda args: "/" in args.data_set)
POSITIONS = Condition("a dataset that is not streamed", lambda args: not args.data_set.startswith(("wds/", "tfds/")))
CUDA = Condition("a CUDA device", _runs_on_cuda)
PROCESSES = Condition("several processes", _has_several_processes)
OUTPUT = Condition("--output-dir", lambda args: args.output_dir)
HALTING = Condition("a model that halts", lambda args: args.halting)
ZIPPING = Condition("--zip-tokens", lambda args: args.zip_tokens)
NO_CHECKPOINTING = Condition("no --grad-checkpointing", lambda args: not args.grad_checkpointing)
CUDA_GRAPHS = Condition("--cuda-graphs", lambda args: args.cuda_graphs)
HALF_PRECISION = Condition("--amp fp16 or bf16", lambda args: args.amp != "none")
PLANNED_MODE = (HALTING, ZIPPING, CUDA, NO_CHECKPOINTING)
NO_TARGET = Condition("no --target-macs", lambda args: args.target_macs is None)

MAIN_ACT = _by_flag(
    {
        # model
        "model input_size": (),
        "drop drop_path": (TRAINING, NO_FINETUNE),
        "model_ema grad_checkpointing": (TRAINING,),
        "model_ema_decay": (TRAINING, EMA),
        "model_ema_force_cpu": (TRAINING, EMA, CUDA),
        "use_ema": (STARTS_FROM_FILE,),
        # optimizer and schedule
        "opt clip_grad weight_decay accum_steps epochs lr sched lr_noise warmup_epochs": (TRAINING,),
        "opt_eps": (TRAINING, _optimizer_has("eps")),
        "opt_betas": (TRAINING, _optimizer_has("betas")),
        "momentum": (TRAINING, _optimizer_has("momentum")),
        "lr_noise_pct lr_noise_std": (TRAINING, NOISE),
        "warmup_lr": (TRAINING, WARMUP),
        "min_lr": (TRAINING, _scheduled(*DECAYS_TO_MIN_LR)),
        "decay_epochs": (TRAINING, _scheduled("step", "wsd", "rsqrt")),
        "decay_rate": (TRAINING, _scheduled("step", "multistep", "plateau", "poly")),
        "patience_epochs": (TRAINING, _scheduled("plateau")),
        # augmentation
        "no_aug smoothing mixup cutmix_minmax": (TRAINING,),
        "aa train_interpolation reprob": (TRAINING, AUGMENTATION),
        "color_jitter": (TRAINING, AUGMENTATION, JITTER),
        "remode recount": (TRAINING, AUGMENTATION, ERASING),
        "repeated_aug": (TRAINING, POSITIONS),
        "cutmix": (TRAINING, NO_MINMAX),
        "mixup_prob mixup_mode": (TRAINING, MIXING),
        "mixup_switch_prob": (TRAINING, BOTH_MIXING),
        # distillation
        "distillation_type": (TRAINING,),
        "distillation_alpha teacher_path": (TRAINING, DISTILLATION),
        "teacher_model": (TRAINING, DISTILLATION, TEACHER),
        "distillation_tau": (TRAINING, DISTILLATION, TEMPERATURE),
        # data
        "data_set batch_size num_workers": (),
        "data_path": (FOLDER,),
        "val_split num_classes": (READ_BY_TIMM,),
        "train_split": (TRAINING, READ_BY_TIMM),
        "inat_category": (INATURALIST,),
        "pin_mem": (CUDA,),
        # run
        "device amp world_size output_dir seed resume eval finetune": (),
        "dist_url": (PROCESSES,),
        "checkpoint_steps keep": (TRAINING, OUTPUT),
        "start_epoch tensorboard": (TRAINING,),
        "max_bad_images": (TRAINING, POSITIONS),
        # A-ViT
        "halting budget": (),
        "pretrained": (START, NO_START_FILE),
        "pretrained_path": (START,),
        "gate_scale gate_center zip_tokens": (HALTING,),
        "early_exit": (HALTING, ZIPPING, EVALUATION),
        "cuda_graphs": PLANNED_MODE,
        "compile": (CUDA_GRAPHS, *PLANNED_MODE, HALF_PRECISION),
        "ponder_token_scale": (TRAINING, HALTING, NO_TARGET),
        "distr_prior_alpha target_macs gate gate_jitter": (TRAINING, HALTING),
        # demo
        "demo": (),
        "demo_dir demo_images demo_by html class_index": (DEMO,),
        # accepted for existing scripts
        "act_mode warmup_epoch cooldown_epochs resplit dist_eval": (ACCEPTED,),
    }
)

# The other commands --------------------------------------------------------------------------------

DRAWING = Condition("images or --summary", lambda args: not args.curves)
IMAGES = Condition("images", lambda args: args.images)
SUMMARY = Condition("--summary", lambda args: args.summary)
GALLERY = Condition("--html", lambda args: args.html)
CHECKPOINT = Condition("--finetune", lambda args: args.finetune)
IMPOSED_DEPTHS = Condition("no --finetune, which measures the depths of images", lambda args: not args.finetune)
ONNX = Condition("--onnx", lambda args: args.onnx)
TIMING = Condition("no --count-ops", lambda args: not args.count_ops)
SPEED = Condition("the part speed", lambda args: not args.only or "speed" in args.only)

VISUALIZE = _by_flag(
    {
        "summary curves output_dir": (),
        "finetune model input_size device amp use_ema cmap size html class_index budget halting": (DRAWING,),
        "gate_scale gate_center": (DRAWING, HALTING),
        "batch_size": (DRAWING,),
        "animation": (IMAGES,),
        "data_set num_workers world_size": (SUMMARY,),
        "data_path": (SUMMARY, FOLDER),
        "val_split num_classes": (SUMMARY, READ_BY_TIMM),
        "inat_category": (SUMMARY, INATURALIST),
        "pin_mem": (SUMMARY, CUDA),
        "dist_url": (SUMMARY, PROCESSES),
        "demo_images demo_by": (SUMMARY, GALLERY),
    }
)

BENCHMARK = _by_flag(
    {
        "model input_size batch_size finetune budget train device amp count_ops onnx json plot": (),
        "mean_depth": (IMPOSED_DEPTHS,),
        "data_path": (CHECKPOINT, FOLDER),
        "data_set": (CHECKPOINT,),
        "threads": (ONNX,),
        "rounds": (TIMING,),
    }
)

EXPORT_ONNX = _by_flag({"batch_mode static fp16_weights budget use_ema model input_size": ()})

CUDA_CHECK = _by_flag({"device small only output": (), "seconds": (SPEED,)})


# Lines that name flags without effect --------------------------------------------------------------

ZERO_IS_A_VALUE = {"gate_scale", "gate_center", "start_epoch", "min_lr", "warmup_lr"}  # elsewhere 0 switches off


def unmet_conditions(args: argparse.Namespace, table: Table) -> dict[str, Condition]:
    """Return the first unmet condition of each given flag that does nothing, by the flag as it was given.

    A value that switches something off (0, none, or the no- form of a switch) is never listed.
    """
    unmet = {}
    for name, flag in args.given.items():
        value = getattr(args, name)
        if not value and (value is None or value is False or name not in ZERO_IS_A_VALUE):
            continue
        condition = next((condition for condition in table[name] if not condition.holds(args)), None)
        if condition is not None:
            unmet[flag] = condition
    return unmet


def report(args: argparse.Namespace, table: Table) -> None:
    """Warn of given flags that do nothing.

    Two cases are logged instead, because commands that people use contain them: flags that are accepted for existing
    scripts, and training flags in evaluation, whose command is that of training plus --eval.
    """
    import utils

    unmet = unmet_conditions(args, table)
    accepted = [flag for flag, condition in unmet.items() if condition is ACCEPTED]
    training = [flag for flag, condition in unmet.items() if condition.phrase == TRAINING.phrase]
    others = [
        f"{flag} (needs {condition.phrase})" for flag, condition in unmet.items() if flag not in {*accepted, *training}
    ]
    if accepted:
        utils.log(f"note: accepted for existing scripts, without effect: {', '.join(accepted)}")
    if training:
        utils.log(f"note: {'--eval' if args.eval else '--demo'} does not use {', '.join(training)}")
    if others:
        utils.warn(f"no effect here: {', '.join(others)}")
