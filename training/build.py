"""From the flags to objects: data, model, losses, optimizer and schedule."""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections.abc import Callable
from functools import partial

import timm
import torch
from timm.data.mixup import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import Dataset

import losses
import utils
from datasets import PLACED, Preprocessing, build_dataset, evaluation_transform
from engine_act import Trainer
from training.budget import CALIBRATION_IMAGES, CalibrationBatches, min_cost, resolve_budget, static_macs
from training.checkpoints import Checkpoint
from training.gate import choose_gate
from training.launch import process_group, single_process
from training.loaders import training_loader
from training.models import create_model, preprocessing
from training.weights import load_teacher_weights, resolve_gate
from utils import RankError, UserError, warn


def run_cli(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace, torch.device], int],
    alone: bool = False,
) -> None:
    """Runs it in its process group, or alone; it returns a status.

    SystemExit with that where it is not 0, with 2 for what the user can mend, with 1 where training fails.
    """
    try:
        group = (args.device,) if alone else (args.device, args.dist_url, args.world_size)
        with (single_process if alone else process_group)(*group) as device:
            args.device = args.device or device.type
            status = run(args, device)
        if status:
            raise SystemExit(status)
        return
    except UserError as error:
        status, message, everywhere = 2, str(error), isinstance(error, RankError)
    except FloatingPointError as error:
        status, message, everywhere = 1, str(error), False
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        status, everywhere = 1, True
        message = "a process that loads images was killed, mostly for want of memory: give fewer --num_workers"
    # out here the error is gone, and with it the loader processes that its frames held
    parser.error(message, status, everywhere)


def build_model(args: argparse.Namespace, classes: list[str], start: Checkpoint | None) -> nn.Module:
    """The model with its starting weights, on the CPU; classes: names of the data's."""
    training = not (args.eval or args.demo)
    is_new_task = training and not (start and start.flag == "resume")
    regularised = not args.finetune
    options = {
        "img_size": image_size(args),
        "pos_drop_rate": args.drop * regularised,
        "proj_drop_rate": args.drop * regularised,
        "drop_path_rate": args.drop_path * regularised,
        "halting": args.halting,
        "zip_tokens": args.zip_tokens,
        "early_exit": args.early_exit,
    }
    gate = {"gate_scale": args.gate_scale, "gate_center": args.gate_center}
    if start is not None:
        use_ema = args.use_ema and (is_new_task or not training)  # a resumed run goes on with both
        options |= {"budget": args.budget, "use_ema": use_ema, "replace_head": is_new_task, "classes": classes}
        options |= {"as_trained": not training}
        model = start.build_model(args.model, **options, **gate)
    else:
        if args.budget is not None:
            raise UserError("--budget needs a checkpoint that knows its gate's cost: give --finetune")
        if not (training or args.pretrained):
            warn("no weights given (--finetune, --resume or --pretrained): the network is random")
        options |= {"pretrained": args.pretrained, "num_classes": len(classes)}
        model = create_model(args.model, **options, **resolve_gate(gate))
        if args.pretrained:
            _check_hub_head(model, may_be_new=training)
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model


def _check_hub_head(model: nn.Module, may_be_new: bool) -> None:
    """Tells of a head that the hub's weights do not have; UserError where it may not be new."""
    hubs, wanted = model.pretrained_cfg["num_classes"], model.num_classes
    if hubs == wanted:
        return
    found = f"--pretrained: a head of {hubs} classes" if hubs else "--pretrained: no head"
    if not may_be_new:
        raise UserError(f"{found}, the data has {wanted} classes")
    warn(f"{found}: a new one of {wanted} classes is trained")


def should_search_gate(args: argparse.Namespace, start: Checkpoint | None) -> bool:
    """Whether training starts from a gate that follows from the static network; not where one is known already."""
    if start is not None and start.flag == "resume":
        return False
    is_given = args.gate_scale is not None or args.gate_center is not None
    is_known = start is not None and any(found for _, found in start.gate_sources())
    return args.gate == "auto" or (args.gate is None and args.target_macs is not None and not (is_given or is_known))


def set_gate(args: argparse.Namespace, model: nn.Module, batches: CalibrationBatches, device: torch.device) -> None:
    """Of a model that is about to be trained, by `choose_gate`."""
    own = max(START_COST, (1 + min_cost(model)) / 2)  # a stem of convolutions may cost more than that
    cost = own if args.target_macs is None else resolve_budget(model, args.target_macs)
    some = itertools.islice(batches, math.ceil(GATE_IMAGES / args.batch_size))
    images = torch.cat([batch[0] for batch in some])[:GATE_IMAGES]
    choose_gate(model, images, device, utils.amp_dtype_name(args.amp, device), cost).apply(model)


GATE_IMAGES = 256
START_COST = 0.85  # of the static network's, where no other is asked for


def image_size(args: argparse.Namespace) -> tuple[int, int]:
    """Height and width."""
    return args.input_size[0], args.input_size[-1]


def validation_set(args: argparse.Namespace) -> Dataset:
    return _data_set(args, train=False, split=args.val_split)


def training_and_validation_set(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """UserError where their classes differ."""
    augmentation = {  # in the words of timm.data.create_transform
        "color_jitter": args.color_jitter,
        "auto_augment": args.aa,
        "interpolation": args.train_interpolation,
        "re_prob": args.reprob,
        "re_mode": args.remode,
        "re_count": args.recount,
    }
    training = _data_set(args, True, split=args.train_split, augmentation=None if args.no_aug else augmentation)
    validation = validation_set(args)
    if training.classes != validation.classes:
        differing = sorted(set(training.classes) ^ set(validation.classes))[:3] or ["their order"]
        raise UserError(f"--data-path {args.data_path}: training and validation differ in {', '.join(differing)}")
    return training, validation


def _data_set(args: argparse.Namespace, train: bool, **options) -> Dataset:
    options |= {"inat_category": args.inat_category, "num_classes": args.num_classes}
    options |= {"batch_size": args.batch_size, "seed": args.seed, "preprocessing": preprocessing(args.model)}
    return build_dataset(args.data_set, args.data_path, train, image_size(args), **options)


def calibration_batches(args: argparse.Namespace, images: Dataset, device: torch.device) -> CalibrationBatches:
    """Some of the training images, treated as in evaluation: to measure gates on."""
    images = copy.copy(images)
    images.transform = evaluation_transform(image_size(args), args.data_set in PLACED, preprocessing(args.model))
    order = {"seed": args.seed, "repeated_aug": False, "max_bad_images": args.max_bad_images}
    loader = training_loader(images, args.batch_size, **order, **loader_options(args, device))
    return CalibrationBatches(loader, CALIBRATION_IMAGES)


def loader_options(args: argparse.Namespace, device: torch.device) -> dict:
    return {"num_workers": args.num_workers, "pin_memory": args.pin_mem and device.type == "cuda"}


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
    if args.distillation_type == "self":
        classification = losses.SelfDistillationLoss(classification, args.distillation_alpha, args.distillation_tau)
    elif args.distillation_type != "none":
        kind, alpha, tau = args.distillation_type, args.distillation_alpha, args.distillation_tau
        classification = losses.DistillationLoss(classification, kind, alpha, tau)
    return losses.AdaptiveLoss(classification, model.num_blocks, args.ponder_token_scale, args.distr_prior_alpha)


def build_teacher(args: argparse.Namespace, model: nn.Module, classes: list[str]) -> losses.Teacher | None:
    """Puts the student into distilled training too, where a distillation token learns from the teacher."""
    if args.distillation_type == "none":
        return None
    if args.distillation_type == "self":
        teacher = build_self_teacher(args, model, classes)
        share = teacher_share(teacher.classifier, model, args.target_macs)
        utils.log(f"the teacher's forward pass is {share:.0%} of a training step's multiply-adds")
        return teacher
    if not hasattr(model, "set_distilled_training"):
        names = ", ".join(timm.list_models("avit*distilled*"))
        raise UserError(f"--distillation-type needs a distilled model, {args.model} is none; there are {names}")
    model.set_distilled_training(True)
    name = args.teacher_model
    if not timm.is_model(name):
        raise UserError(f"--teacher-model {name}: unknown to timm{utils.did_you_mean(name, timm.list_models())}")
    fixed = timm.models.get_pretrained_cfg_value(name, "fixed_input_size")
    size = {"img_size": image_size(args)} if fixed else {}
    try:
        classifier = timm.create_model(name, pretrained=not args.teacher_path, **size)
        if args.teacher_path:
            classifier.reset_classifier(len(classes))
    except (OSError, RuntimeError) as error:
        raise UserError(f"--teacher-model {name}: no weights ({error}); give them with --teacher-path") from error
    if args.teacher_path:
        load_teacher_weights(classifier, Checkpoint.load(args.teacher_path).weights_for(classes), args.teacher_path)
    elif classifier.num_classes != len(classes):
        raise UserError(f"--teacher-model {name}: knows {classifier.num_classes} classes, the data has {len(classes)}")
    teacher = _teacher_of(model, classifier)
    try:
        teacher(torch.zeros(1, 3, *image_size(args)))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"--teacher-model {name}: does not take the student's images: {error}") from error
    return teacher


def _teacher_of(student: nn.Module, classifier: nn.Module) -> losses.Teacher:
    own, students = Preprocessing.from_model(classifier), Preprocessing.from_model(student)
    return losses.Teacher(classifier, own.mean, own.std, students.mean, students.std)


def build_self_teacher(args: argparse.Namespace, model: nn.Module, classes: list[str]) -> losses.Teacher:
    """The static network that training starts, or has started, from, or another of ours. UserError without weights."""
    options = {"img_size": image_size(args), "halting": False}
    if args.teacher_path:
        network = Checkpoint.load(args.teacher_path).build_model(classes=classes, **options)
        return _teacher_of(model, network)
    start = Checkpoint.from_args(argparse.Namespace(**{**vars(args), "resume": None}))
    if start is None and not args.pretrained:
        raise UserError(
            "--distillation-type self: the teacher is what training starts from: "
            "give --pretrained, --pretrained-path or --finetune, also where a run is resumed"
        )
    if start is None:
        network = create_model(args.model, pretrained=True, num_classes=len(classes), **options)
    else:
        network = start.build_model(args.model, classes=classes, use_ema=args.use_ema, **options)
    return _teacher_of(model, network)


def teacher_share(teacher: nn.Module, model: nn.Module, target_macs: float | None) -> float:
    """Of a training step's multiply-adds, where a backward pass is two forward passes and the model at its budget."""
    budget = resolve_budget(model, target_macs) if target_macs is not None else 1.0
    return static_macs(teacher) / (static_macs(teacher) + 3 * budget * static_macs(model))


def build_budget(args: argparse.Namespace, model: nn.Module, updates_per_epoch: int) -> losses.BudgetController | None:
    if args.target_macs is None:
        return None
    return losses.BudgetController(resolve_budget(model, args.target_macs), updates_per_epoch)


def build_trainer(args: argparse.Namespace, model: nn.Module, classes: list[str], device: torch.device) -> Trainer:
    mixup = build_mixup(args, len(classes))
    teacher = build_teacher(args, model, classes)
    ema_device = "cpu" if args.model_ema_force_cpu else None
    ddp = partial(nn.parallel.DistributedDataParallel, gradient_as_bucket_view=True)  # no second copy of the gradients
    return Trainer(
        model=ddp(model) if utils.world_size() > 1 else model,
        criterion=build_criterion(args, model, mixup is not None).to(device),
        optimizer=build_optimizer(args, model),
        device=device,
        amp=utils.amp_dtype_name(args.amp, device),
        clip_grad=args.clip_grad,
        accum_steps=args.accum_steps,
        mixup=mixup,
        ema=ModelEmaV3(model, args.model_ema_decay, device=ema_device) if args.model_ema else None,
        teacher=teacher.to(device) if teacher is not None else None,
        gate_jitter=args.gate_jitter,
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


class Schedule:
    """A schedule of timm's, stepped by optimizer steps; plateau by epochs, since it follows the accuracy."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler

    def step_update(self, updates: int) -> None:
        """updates: done so far, over all epochs."""
        self.scheduler.step_update(updates)

    def step_epoch(self, epochs: int, acc1: float) -> None:
        """epochs: done so far; acc1: of the last, in per cent."""
        if self.scheduler.t_in_epochs:
            self.scheduler.step(epochs, acc1)

    def state_dict(self) -> dict:
        """The entry of a checkpoint that this keeps up; all but plateau follow from the number of updates."""
        plateau = getattr(self.scheduler, "lr_scheduler", None)  # timm leaves it out of the schedule's state
        return {"plateau": plateau.state_dict() if plateau is not None else None}

    def load_state_dict(self, checkpoint: dict) -> None:
        """KeyError, ValueError or the like where it does not fit."""
        plateau, saved = getattr(self.scheduler, "lr_scheduler", None), checkpoint["plateau"]
        if plateau is not None and saved is not None:
            own = plateau.state_dict()
            plateau.load_state_dict({k: v for k, v in saved.items() if k in own and type(v) is type(own[k])})


def _warn_of_rates(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> None:
    """Of settings that cannot do what they say."""
    lr = max(group["lr"] for group in optimizer.param_groups)
    if args.sched not in ("constant", "none") and args.min_lr > lr:
        warn(f"--min-lr {args.min_lr:g} is above --lr for this batch, {lr:g}: the rate rises to it")
    if args.warmup_epochs >= args.epochs > 0:
        told = f"--warmup-epochs {args.warmup_epochs:g} of --epochs {args.epochs}"
        warn(f"{told}: the run ends before the rate of --lr is reached, {lr:g}")
    elif args.warmup_epochs and args.warmup_lr > lr:
        warn(f"--warmup-lr {args.warmup_lr:g} is above --lr for this batch, {lr:g}: the rate falls to it")


def build_schedule(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Schedule:
    _warn_of_rates(args, optimizer)
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
    return Schedule(schedule)
