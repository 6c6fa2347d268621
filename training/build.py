"""What a command is made of: data, model, losses, optimizer and schedule, from the flags of arguments.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from timm.data import ImageNetInfo
from timm.data.mixup import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import Dataset

import losses
import utils
from datasets import build_dataset
from engine_act import Trainer
from training import checkpoints
from utils import LocalError, UserError, log, warn

IMAGENET_CLASSES = 1000
MAX_SIDE, MAX_CLASSES = 1024, 100_000  # a checkpoint that says more is not believed


def run_cli(
    parser: argparse.ArgumentParser, args: argparse.Namespace, run: Callable[[argparse.Namespace, torch.device], int]
) -> None:
    """Runs it in its process group; it returns a status.

    SystemExit with that where it is not 0, with 2 for what the user can mend, with 1 where training fails.
    """
    try:
        with utils.process_group(args.device, args.dist_url, args.world_size) as device:
            status = run(args, device)
        if status:
            raise SystemExit(status)
        return
    except UserError as error:
        status, message, everywhere = 2, str(error), isinstance(error, LocalError)
    except FloatingPointError as error:
        status, message, everywhere = 1, str(error), False
    # out here the error is gone, and with it the loader processes that its frames held
    parser.error(message, status, everywhere)


@dataclass(frozen=True)
class StartingPoint:
    """The checkpoint that a run starts from, if any, and what it is for."""

    flag: str | None = None
    location: str = ""
    checkpoint: dict | None = None

    def recorded(self, name: str) -> object:
        """A flag of the run that saved the checkpoint, where it says; else None. Of any type."""
        flags = self.checkpoint.get("args")
        return flags.get(name) if isinstance(flags, dict) else getattr(flags, name, None)

    def image_size(self) -> tuple[int, int] | None:
        """Height and width that a checkpoint of ours was trained at."""
        size = self.recorded("input_size") if "gate" in self.checkpoint else None
        is_size = isinstance(size, list) and 1 <= len(size) <= 2 and all(_is_side(side) for side in size)
        return (size[0], size[-1]) if is_size else None

    def model_name(self) -> str:
        """Of which of our models it holds the weights. UserError where of none."""
        recorded, known = self.recorded("model"), timm.list_models("avit*")
        if isinstance(recorded, str) and recorded in known:
            return recorded
        fitting = checkpoints.fitting_models(self.weights())
        if not fitting:
            raise UserError(f"{self.location}: fits none of our models, which are {', '.join(known)}")
        return fitting[0]

    def weights(self, use_ema: bool = False) -> dict[str, Tensor]:
        """UserError where it holds none."""
        return checkpoints.state_dict_of(self.checkpoint, self.location, use_ema)

    def is_static(self) -> bool:
        """Whether it is a checkpoint of ours that was trained without halting."""
        return "gate" in self.checkpoint and self.checkpoint["gate"] is None

    def classes(self) -> dict[str, str]:
        """The classes that it knows, in order, each with a name to show: its own, or ImageNet's, or numbers.

        UserError without a head.
        """
        head = self.weights().get("head.weight")
        if head is None or head.ndim != 2 or not 1 <= len(head) <= MAX_CLASSES:
            raise UserError(f"{self.location}: its weights have no head: expected head.weight, [classes, channels]")
        count = len(head)
        recorded = self.checkpoint.get("classes")
        is_names = isinstance(recorded, list) and all(isinstance(name, str) for name in recorded)
        if is_names and len(set(recorded)) == len(recorded) == count:
            return {name: name for name in recorded}
        if count == IMAGENET_CLASSES:
            info = ImageNetInfo("imagenet-1k")
            return dict(zip(info.label_names(), info.label_descriptions()))
        return {f"class {number}": f"class {number}" for number in range(count)}

    @classmethod
    def of(cls, args: argparse.Namespace) -> StartingPoint:
        """The first given of --resume, --finetune, --pretrained-path; `--resume auto` may find nothing."""
        for flag in ("resume", "finetune", "pretrained_path"):
            location = getattr(args, flag)
            if flag == "resume" and location == "auto":
                location = checkpoints.find_latest_checkpoint(args.output_dir)
                log(f"going on from {location}" if location else f"{args.output_dir} holds no checkpoint: a new run")
            if location:
                return cls(flag, location, checkpoints.load_checkpoint(location))
        return cls()


def _is_side(value: object) -> bool:
    return isinstance(value, int) and 1 <= value <= MAX_SIDE


def build_model(args: argparse.Namespace, num_classes: int, start: StartingPoint) -> nn.Module:
    """The model with its starting weights, on the CPU."""
    size = image_size(args)
    gate_flags = {"gate_scale": args.gate_scale, "gate_center": args.gate_center}
    from_hub = args.pretrained and start.checkpoint is None
    regularised = not args.finetune
    try:
        model = timm.create_model(
            args.model,
            pretrained=from_hub,
            num_classes=num_classes,
            img_size=size,
            pos_drop_rate=args.drop * regularised,
            proj_drop_rate=args.drop * regularised,
            drop_path_rate=args.drop_path * regularised,
            halting=args.halting,
            zip_tokens=args.zip_tokens,
            early_exit=args.early_exit,
            **checkpoints.resolve_gate(gate_flags, start.checkpoint, start.location),
        )
    except RuntimeError as error:  # no pretrained weights, or out of reach
        raise UserError(str(error)) from error
    patch = model.patch_embed.patch_size
    if any(side % p for side, p in zip(size, patch)):
        raise UserError(f"--input-size {size[0]} x {size[1]}: not a multiple of the patches' {patch[0]} x {patch[1]}")
    hub_classes = model.pretrained_cfg["num_classes"]
    if from_hub and hub_classes != num_classes:
        if args.eval or args.demo:
            raise UserError(f"--pretrained: its head has {hub_classes} classes, the data has {num_classes}")
        warn(f"the head of {hub_classes} classes is replaced by a new one of {num_classes}")
    if start.checkpoint is not None:
        training = not (args.eval or args.demo)
        is_new_task = training and start.flag != "resume"
        use_ema = args.use_ema and (is_new_task or not training)  # a resumed run goes on with both
        checkpoints.load_weights(model, start.weights(use_ema), start.location, is_new_task, start.image_size())
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model


def image_size(args: argparse.Namespace) -> tuple[int, int]:
    """Height and width."""
    return args.input_size[0], args.input_size[-1]


def amp_dtype_name(args: argparse.Namespace) -> str:
    return args.amp or ("fp16" if args.device.startswith("cuda") else "none")


def validation_set(args: argparse.Namespace) -> Dataset:
    return _data_set(args, train=False, split=args.val_split)


def training_set(args: argparse.Namespace) -> Dataset:
    augmentation = {  # in the words of timm.data.create_transform
        "color_jitter": args.color_jitter,
        "auto_augment": args.aa,
        "interpolation": args.train_interpolation,
        "re_prob": args.reprob,
        "re_mode": args.remode,
        "re_count": args.recount,
    }
    return _data_set(args, train=True, split=args.train_split, augmentation=None if args.no_aug else augmentation)


def _data_set(args: argparse.Namespace, train: bool, **options) -> Dataset:
    options |= {"inat_category": args.inat_category, "num_classes": args.num_classes}
    options |= {"batch_size": args.batch_size, "seed": args.seed}
    return build_dataset(args.data_set, args.data_path, train, image_size(args), **options)


def loader_options(args: argparse.Namespace) -> dict:
    return {"num_workers": args.num_workers, "pin_memory": args.pin_mem and args.device.startswith("cuda")}


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    if not (args.mixup or args.cutmix or args.cutmix_minmax):
        return None
    return Mixup(
        args.mixup,
        args.cutmix,
        args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def build_criterion(args: argparse.Namespace, model: nn.Module, mixup: bool) -> losses.AdaptiveLoss:
    classification = losses.classification_loss(mixup, args.smoothing)
    if args.distillation_type != "none":
        kind, alpha, tau = args.distillation_type, args.distillation_alpha, args.distillation_tau
        classification = losses.DistillationLoss(classification, kind, alpha, tau)
    return losses.AdaptiveLoss(classification, model.num_blocks, args.ponder_token_scale, args.distr_prior_alpha)


def build_teacher(args: argparse.Namespace, model: nn.Module, num_classes: int) -> losses.Teacher | None:
    """Also puts the student into distilled training."""
    if args.distillation_type == "none":
        return None
    if not hasattr(model, "set_distilled_training"):
        names = ", ".join(timm.list_models("avit*distilled*"))
        raise UserError(f"--distillation-type needs a distilled model, {args.model} is none; there are {names}")
    model.set_distilled_training(True)
    name = args.teacher_model
    if not timm.is_model(name):
        raise UserError(f"--teacher-model {name}: unknown to timm{utils.nearest(name, timm.list_models())}")
    fixed = timm.models.get_pretrained_cfg_value(name, "fixed_input_size")
    size = {"img_size": image_size(args)} if fixed else {}
    try:
        classifier = timm.create_model(name, pretrained=not args.teacher_path, **size)
        if args.teacher_path:
            classifier.reset_classifier(num_classes)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--teacher-model {name}: no weights ({error}); give them with --teacher-path") from error
    if args.teacher_path:
        weights = checkpoints.state_dict_of(checkpoints.load_checkpoint(args.teacher_path), args.teacher_path)
        checkpoints.load_teacher_weights(classifier, weights, args.teacher_path)
    elif classifier.num_classes != num_classes:
        raise UserError(f"--teacher-model {name}: knows {classifier.num_classes} classes, the data has {num_classes}")
    teacher = losses.Teacher(classifier, classifier.pretrained_cfg["mean"], classifier.pretrained_cfg["std"])
    try:
        teacher(torch.zeros(1, 3, *image_size(args)))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"--teacher-model {name}: does not take the student's images: {error}") from error
    return teacher


def build_trainer(args: argparse.Namespace, model: nn.Module, num_classes: int, device: torch.device) -> Trainer:
    mixup = build_mixup(args, num_classes)
    teacher = build_teacher(args, model, num_classes)
    ema_device = "cpu" if args.model_ema_force_cpu else None
    return Trainer(
        model=nn.parallel.DistributedDataParallel(model) if utils.world_size() > 1 else model,
        criterion=build_criterion(args, model, mixup is not None).to(device),
        optimizer=build_optimizer(args, model),
        device=device,
        amp=amp_dtype_name(args),
        clip_grad=args.clip_grad,
        accum_steps=args.accum_steps,
        mixup=mixup,
        ema=ModelEmaV3(model, args.model_ema_decay, device=ema_device) if args.model_ema else None,
        teacher=teacher.to(device) if teacher is not None else None,
        seed=args.seed,
    )


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """The learning rate is --lr per 512 images of a joint batch."""
    lr = args.lr * args.batch_size * utils.world_size() * args.accum_steps / 512
    options = {"eps": args.opt_eps, "betas": args.opt_betas}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return create_optimizer_v2(model, args.opt, lr, args.weight_decay, args.momentum, **given)
    except (ValueError, TypeError, AssertionError, IndexError) as error:
        raise UserError(f"--opt {args.opt}: {error}") from error


def build_schedule(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Scheduler:
    """timm's schedule, stepped by optimizer steps; plateau by epochs, since it follows the accuracy."""
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            args.sched,
            num_epochs=args.epochs,
            decay_epochs=args.decay_epochs,
            cooldown_epochs=args.cooldown_epochs,
            patience_epochs=args.patience_epochs,
            decay_rate=args.decay_rate,
            min_lr=args.min_lr,
            warmup_lr=args.warmup_lr,
            warmup_epochs=args.warmup_epochs,
            noise=args.lr_noise,
            noise_pct=args.lr_noise_pct,
            noise_std=args.lr_noise_std,
            noise_seed=args.seed,
            step_on_epochs=args.sched == "plateau",
            updates_per_epoch=updates_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"--sched {args.sched}: {error}") from error
    if schedule is None:
        raise UserError("--sched none: use --sched constant")
    return schedule
