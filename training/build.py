"""Builds a run from its flags: model, data, losses and optimizer."""

from __future__ import annotations

import argparse
import copy
import math
from functools import partial

import torch
from timm.data.mixup import Mixup
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import Dataset, Subset

import losses
import utils
from datasets import Stream, build_dataset, evaluation_transform
from engine_act import Trainer
from training.arguments import GATE_DEFAULTS
from training.budget import CALIBRATION_IMAGES, CalibrationBatches, min_cost, resolve_budget
from training.budget_table import half_precision
from training.checkpoints import Checkpoint
from training.classes import Head, hub_head
from training.directions import fit_gate, why_no_directions
from training.gate import choose_gate
from training.loaders import ImageLoader, evaluation_loader, training_loader
from training.models import create_model
from training.network import NetworkFlags, NetworkSettings, Purpose, resolve_network
from training.rendezvous import require_same_images
from training.teacher import teaches_itself
from utils import UserError, warn
from zipping.rotations import has_fixed_rotations

MIN_PATIENCE = 50  # updates without progress after which a budget may be out of reach, at least
GATE_IMAGES = 256  # number of images to which a gate is fitted
MIN_EXPLAINED = 0.1  # directions that explain less of the attention's variance say little about the patches
START_BUDGET = 0.85  # fraction of the static model's MACs for the gate search without --target-macs


# Model -------------------------------------------------------------------------------------------


def resolve_settings(args: argparse.Namespace, start: Checkpoint | None) -> NetworkSettings:
    """Resolve the settings of the network, see `resolve_network`, and write model and image size back into `args`.

    start: the checkpoint to load, or None for pretrained or random weights.
    """
    if start is None and args.budget is not None:
        raise UserError("--budget requires a checkpoint with a budget curve; pass --finetune FILE")
    flags = NetworkFlags.from_args(args)._replace(use_ema=_uses_ema(args, start))
    log_gate = not should_search_gate(args, start)
    settings = resolve_network(start, flags, _purpose(args, start), args.pretrained, log_gate)
    height, width = settings.img_size
    args.model, args.input_size = settings.model, [height] if height == width else [height, width]
    return settings


def choose_head(args: argparse.Namespace, classes: list[str], start: Checkpoint | None) -> Head:
    """Match the dataset's classes with the rows of the starting weights' head, see `match_head`.

    In evaluation, the classes that only the checkpoint has are predicted too.
    """
    if start is not None:
        keep_others = _purpose(args, start) is Purpose.EVALUATION
        return start.head_for(classes, _uses_ema(args, start), _may_replace_head(args, start), keep_others)
    return hub_head(args.model, "the --pretrained weights", classes) if args.pretrained else Head(classes)


def build_model(args: argparse.Namespace, settings: NetworkSettings, head: Head, start: Checkpoint | None) -> nn.Module:
    """Build the model with its starting weights, on the CPU.

    head: see `choose_head`. start: the checkpoint to load, or None for pretrained or random weights.
    """
    build = _model_from_hub if start is None else partial(_model_from_checkpoint, start=start)
    model = build(args, settings, head)
    model.set_grad_checkpointing(args.grad_checkpointing)
    if model.cuda_graphs and not model.reads_prefix:
        warn(f"--cuda-graphs has no effect: the head of {settings.model} reads the patches, not the class token")
    elif model.cuda_graphs and not has_fixed_rotations(model):
        warn(f"--cuda-graphs has no effect: the rotary position embedding of {settings.model} is made in every pass")
    return model


def _model_from_checkpoint(
    args: argparse.Namespace, settings: NetworkSettings, head: Head, start: Checkpoint
) -> nn.Module:
    return start.build_network(
        settings,
        head,
        use_ema=_uses_ema(args, start),
        replace_head=_may_replace_head(args, start),
        **_mode_options(args),
        **_dropout_rates(args),
    )


def _model_from_hub(args: argparse.Namespace, settings: NetworkSettings, head: Head) -> nn.Module:
    """Build the model with the hub's weights for --pretrained, otherwise with random weights."""
    if not args.pretrained and _purpose(args, None) is Purpose.EVALUATION:
        warn("no weights given, so the model is random; pass --finetune, --resume or --pretrained")
    model = create_model(
        settings.model,
        settings.img_size,
        settings.preprocessing,
        pretrained=args.pretrained,
        num_classes=len(head.names),
        halting=settings.halting,
        **settings.gate,
        **_mode_options(args),
        **_dropout_rates(args),
    )
    if args.pretrained:
        _check_hub_head(model, allow_new=_may_replace_head(args, None))
        head.sort_rows(model)
    return model


def _purpose(args: argparse.Namespace, start: Checkpoint | None) -> Purpose:
    if args.eval or args.demo:
        return Purpose.EVALUATION
    return Purpose.RESUME if start is not None and start.flag == "resume" else Purpose.NEW_TASK


def _uses_ema(args: argparse.Namespace, start: Checkpoint | None) -> bool:
    # A resumed run starts from the raw weights; its EMA weights are restored with its training state.
    return args.use_ema and _purpose(args, start) is not Purpose.RESUME


def _may_replace_head(args: argparse.Namespace, start: Checkpoint | None) -> bool:
    return _purpose(args, start) is Purpose.NEW_TASK and not teaches_itself(args)


def _mode_options(args: argparse.Namespace) -> dict[str, bool]:
    """Return the options of `AdaptiveTokens` that select how halting is computed."""
    return {
        "zip_tokens": args.zip_tokens,
        "early_exit": args.early_exit,
        "cuda_graphs": args.cuda_graphs,
        "compile_blocks": args.compile,
    }


def _dropout_rates(args: argparse.Namespace) -> dict[str, float]:
    """Return the rates of dropout and stochastic depth; --finetune disables both, as in the original."""
    drop, drop_path = (0.0, 0.0) if args.finetune else (args.drop, args.drop_path)
    return {"pos_drop_rate": drop, "proj_drop_rate": drop, "drop_path_rate": drop_path}


def _check_hub_head(model: nn.Module, allow_new: bool) -> None:
    """Warn if the hub's weights have no head of this class count. Raises UserError unless a new head is allowed."""
    found, expected = model.pretrained_cfg["num_classes"], model.num_classes
    if found == expected:
        return
    head = f"a head of {found} classes" if found else "no head"
    mismatch = f"the --pretrained weights have {head} but the dataset has {expected} classes"
    if not allow_new:
        raise UserError(f"{mismatch}; pass a checkpoint that was trained on this dataset with --finetune")
    warn(f"{mismatch}; training starts with a new head")


# Gate and budget ---------------------------------------------------------------------------------


def should_search_gate(args: argparse.Namespace, start: Checkpoint | None) -> bool:
    """Return whether to find a gate: with --gate auto or channel, or with --target-macs if there is no gate yet."""
    if start is not None and start.flag == "resume":
        return False
    if args.gate is not None:
        return args.gate != "fixed"
    is_given = args.gate_scale is not None or args.gate_center is not None
    is_recorded = start is not None and any(values for _, values in start.gate_sources())
    return args.target_macs is not None and not (is_given or is_recorded)


def set_gate(
    args: argparse.Namespace,
    model: nn.Module,
    start: Checkpoint | None,
    batches: CalibrationBatches,
    device: torch.device,
) -> None:
    """Find a gate for a model that is about to be trained. All processes get the main one's.

    With --gate auto, trained weights that head for a budget get a gate by direction, see `fit_gate`; others the best
    channel, see `choose_gate`.
    """
    model.set_gate_directions(None)  # of a checkpoint
    find = fit_gate if _can_fit_directions(args, model, start) else choose_gate
    if args.target_macs is None:
        # A convolutional stem may use more MACs than START_BUDGET leaves for the blocks.
        budget = max(START_BUDGET, (1 + min_cost(model)) / 2)
    else:
        budget = resolve_budget(model, args.target_macs, by_direction=find is fit_gate)
    images = torch.cat([batch[0] for batch in batches])[:GATE_IMAGES]
    gate = find(model, images, device, utils.amp_dtype_name(args.amp, device), budget, report=utils.log)
    gate = utils.all_gather_objects(gate)[0]
    if find is fit_gate and max(gate.explained) < MIN_EXPLAINED:
        warn("the class token's attention can hardly be predicted from the patches; consider --gate channel")
    gate.apply(model)


def _can_fit_directions(args: argparse.Namespace, model: nn.Module, start: Checkpoint | None) -> bool:
    """Return whether --gate auto fits a gate by direction. Print the reason if the model is what prevents it.

    Without a budget, the ponder loss needs scores with a gradient. The attention of random weights means nothing.
    """
    if args.gate == "channel" or args.target_macs is None or (start is None and not args.pretrained):
        return False
    reason = why_no_directions(model)
    if reason:
        utils.log(f"the gate reads a channel, not directions: {reason}")
    return reason is None


def static_start(
    args: argparse.Namespace, model: nn.Module, head: Head, start: Checkpoint | None
) -> dict[str, torch.Tensor] | None:
    """Return the weights from which a model is about to be trained to a budget, in half precision.

    head: see `choose_head`. None without a budget, for a resumed run, which has recorded them, and for weights that
    are not those of a trained static model.
    """
    if args.target_macs is None or _purpose(args, start) is not Purpose.NEW_TASK or head.is_new:
        return None
    if start is None:
        is_static = args.pretrained and model.pretrained_cfg["num_classes"] == model.num_classes
    else:
        uses_ema = _uses_ema(args, start)
        has_gate = any(values.keys() & GATE_DEFAULTS for _, values in start.gate_sources(uses_ema))
        rows = head.select(start.state_dict(uses_ema)).get("head.weight")
        is_static = not has_gate and rows is not None and len(rows) == model.num_classes
    return half_precision(model.state_dict()) if is_static else None


def build_budget(args: argparse.Namespace, model: nn.Module, updates_per_epoch: int) -> losses.BudgetController | None:
    """Build the controller that keeps the budget, or return None without --target-macs.

    It sets the weight of the ponder loss. If the gate reads directions, it moves the center instead.
    """
    if args.target_macs is None:
        return None
    controller = losses.BudgetController if model.gate_directions is None else losses.CenterController
    return controller(resolve_budget(model, args.target_macs), max(updates_per_epoch, MIN_PATIENCE))


# Data --------------------------------------------------------------------------------------------


def validation_set(args: argparse.Namespace, settings: NetworkSettings) -> Dataset:
    return _dataset(args, settings, train=False, split=args.val_split)


def training_and_validation_set(args: argparse.Namespace, settings: NetworkSettings) -> tuple[Dataset, Dataset]:
    """Build both datasets. Raises UserError if their classes differ."""
    augmentation = {  # named like the arguments of timm.data.create_transform
        "color_jitter": args.color_jitter,
        "auto_augment": args.aa,
        "interpolation": args.train_interpolation,
        "re_prob": args.reprob,
        "re_mode": args.remode,
        "re_count": args.recount,
    }
    augmentation = None if args.no_aug else augmentation
    training = _dataset(args, settings, train=True, split=args.train_split, augmentation=augmentation)
    validation = validation_set(args, settings)
    if training.classes != validation.classes:
        differing = sorted(set(training.classes) ^ set(validation.classes))[:3] or ["their order"]
        raise UserError(
            f"--data-path {args.data_path}: the training and validation classes differ in {', '.join(differing)}"
        )
    return training, validation


def _dataset(
    args: argparse.Namespace,
    settings: NetworkSettings,
    train: bool,
    split: str | None,
    augmentation: dict | None = None,
) -> Dataset:
    images = build_dataset(
        args.data_set,
        args.data_path,
        train,
        settings.img_size,
        augmentation,
        split=split,
        inat_category=args.inat_category,
        num_classes=args.num_classes,
        batch_size=args.batch_size,
        seed=args.seed,
        preprocessing=settings.preprocessing,
    )
    return require_same_images(images)


def gate_batches(
    args: argparse.Namespace, settings: NetworkSettings, images: Dataset, device: torch.device
) -> CalibrationBatches:
    """Return training images, preprocessed as in evaluation, on which each process can search a gate."""
    images = copy.copy(images)
    images.transform = evaluation_transform(settings.img_size, settings.preprocessing)
    loader = training_loader(
        images,
        args.batch_size,
        seed=args.seed,
        repeated_aug=False,
        max_bad_images=args.max_bad_images,
        **loader_options(args, device),
    )
    return CalibrationBatches(loader, GATE_IMAGES * utils.world_size())


def calibration_batches(args: argparse.Namespace, images: Dataset, device: torch.device) -> CalibrationBatches:
    """Return validation images on which budgets are measured, spread over the dataset: a stream's first ones.

    Training images would not do: a model that knows them well halts them at other depths. Except for a stream, the
    order is random, so that the first images are of many classes. Labels are used only to report accuracies.
    """
    if not isinstance(images, Stream):
        step = max(1, math.ceil(len(images) / CALIBRATION_IMAGES))
        chosen = range(0, len(images), step)
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
        images = Subset(images, [chosen[number] for number in order.tolist()])
    loader = evaluation_loader(images, args.batch_size, **loader_options(args, device))
    return CalibrationBatches(loader, CALIBRATION_IMAGES)


def training_and_validation_loader(
    args: argparse.Namespace, training: Dataset, validation: Dataset, device: torch.device
) -> tuple[ImageLoader, ImageLoader]:
    """Build the loaders of both datasets."""
    options = loader_options(args, device)
    train_loader = training_loader(
        training,
        args.batch_size,
        seed=args.seed,
        repeated_aug=args.repeated_aug,
        max_bad_images=args.max_bad_images,
        **options,
    )
    return train_loader, evaluation_loader(validation, args.batch_size, **options)


def loader_options(args: argparse.Namespace, device: torch.device) -> dict:
    return {"num_workers": args.num_workers, "pin_memory": args.pin_mem and device.type == "cuda"}


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """Build mixup and CutMix, or return None if both are disabled."""
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


# Losses and optimizer -----------------------------------------------------------------------------


def build_trainer(
    args: argparse.Namespace,
    model: nn.Module,
    classes: list[str],
    device: torch.device,
    teacher: losses.Teacher | None = None,
) -> Trainer:
    mixup = build_mixup(args, len(classes))
    ema_device = "cpu" if args.model_ema_force_cpu else None
    # gradient_as_bucket_view avoids a second copy of the gradients. The directions of the gate never change.
    ddp = partial(nn.parallel.DistributedDataParallel, gradient_as_bucket_view=True)
    ddp_ignored = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ddp_ignored(model, ["gate_directions"])
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


def build_criterion(args: argparse.Namespace, model: nn.Module, mixup: bool) -> losses.AdaptiveLoss:
    classification = losses.classification_loss(mixup, args.smoothing)
    if args.distillation_type == "self":
        classification = losses.SelfDistillationLoss(classification, args.distillation_alpha, args.distillation_tau)
    elif args.distillation_type != "none":
        classification = losses.DistillationLoss(
            classification, args.distillation_type, args.distillation_alpha, args.distillation_tau
        )
    return losses.AdaptiveLoss(classification, model.num_blocks, args.ponder_token_scale, args.distr_prior_alpha)


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Build a timm optimizer; --lr is the learning rate per 512 images of a global batch."""
    lr = args.lr * args.batch_size * utils.world_size() * args.accum_steps / 512
    options = {"eps": args.opt_eps, "betas": args.opt_betas}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return create_optimizer_v2(model, args.opt, lr, args.weight_decay, args.momentum, **given)
    except (ValueError, TypeError, AssertionError, IndexError) as error:
        raise UserError(f"--opt {args.opt}: {error}") from error
