"""The teacher of distillation: a timm model, or the static model that training starts from."""

from __future__ import annotations

import argparse

import timm
import torch
from torch import nn

import losses
import utils
from datasets import Preprocessing
from macs import static_macs
from training.budget import resolve_budget
from training.checkpoints import Checkpoint
from training.classes import Head, hub_head
from training.models import create_model, is_avit, unsupported_reason
from training.network import NetworkFlags, NetworkSettings, Purpose, differences, resolve_network, size_text
from training.weights import fits, load_teacher_weights
from utils import UserError


def teaches_itself(args: argparse.Namespace) -> bool:
    """Return whether the starting weights become the teacher, so that they must predict the dataset's classes."""
    return args.distillation_type == "self" and not args.teacher_path


def build_teacher(
    args: argparse.Namespace, settings: NetworkSettings, model: nn.Module, head: Head
) -> losses.Teacher | None:
    """Build the teacher of a model, or return None without distillation.

    head: of the model. For soft and hard distillation, also switch the model to distilled training.
    """
    if args.distillation_type == "none":
        return None
    if args.distillation_type == "self":
        teacher = build_self_teacher(args, settings, model, head)
        share = teacher_share(teacher.classifier, model, args.target_macs)
        utils.log(f"the teacher's forward pass takes {share:.0%} of a training step's MACs")
        return teacher
    if not hasattr(model, "set_distilled_training"):
        names = ", ".join(timm.list_models("avit*distilled*"))
        raise UserError(
            f"--distillation-type {args.distillation_type} requires a distilled model, got --model {args.model}; "
            f"use one of {names}, or --distillation-type self"
        )
    model.set_distilled_training(True)
    return _build_timm_teacher(args, settings, model, head.names)


def _build_timm_teacher(
    args: argparse.Namespace, settings: NetworkSettings, model: nn.Module, classes: list[str]
) -> losses.Teacher:
    """Build the teacher for soft and hard distillation: any timm model, with its own weights or --teacher-path."""
    name = args.teacher_model
    if not timm.is_model(name):
        raise UserError(f"--teacher-model {name}: unknown timm model{utils.did_you_mean(name, timm.list_models())}")
    if args.teacher_path:
        classifier = _classifier_of_file(name, Checkpoint.load(args.teacher_path), settings, classes)
    else:
        classifier = _create_classifier(name, settings, pretrained=True)
        if classifier.num_classes != len(classes):
            raise UserError(
                f"--teacher-model {name} predicts {classifier.num_classes} classes but the dataset has {len(classes)}; "
                "pass weights trained on this dataset with --teacher-path"
            )
        hub_head(name, f"--teacher-model {name}", classes).sort_rows(classifier)
    teacher = _as_teacher(classifier, model)
    trained = classifier.pretrained_cfg["input_size"][1:]
    if tuple(trained) != settings.img_size:
        sizes = f"{size_text(trained)}; as a teacher it sees the student's images of {size_text(settings.img_size)}"
        utils.log(f"--teacher-model {name} was made for images of {sizes}")
    try:
        teacher(torch.zeros(1, 3, *settings.img_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"--teacher-model {name} does not accept the student's images: {error}") from error
    return teacher


def _create_classifier(name: str, settings: NetworkSettings, **options) -> nn.Module:
    """Build a timm model for the student's images, without halting. Raises UserError if weights cannot be loaded."""
    has_fixed_size = timm.models.get_pretrained_cfg_value(name, "fixed_input_size")
    options |= {"img_size": settings.img_size} if has_fixed_size else {}
    options |= {"halting": False} if is_avit(name) else {}  # the hub's weights were not trained to halt
    try:
        return timm.create_model(name, **options)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--teacher-model {name}: the weights cannot be loaded ({error}); pass a file with --teacher-path"
        ) from error


def _classifier_of_file(name: str, checkpoint: Checkpoint, settings: NetworkSettings, classes: list[str]) -> nn.Module:
    """Build a timm model with the weights of --teacher-path. A model that was trained to halt does so.

    Raises UserError if the weights do not fit, or were trained as another model of the same parameters.
    """
    recorded, weights = checkpoint.recorded_model(), checkpoint.weights_for(classes)
    comparable = recorded not in (None, name) and unsupported_reason(name) is None and fits(recorded, weights)
    differing = differences(recorded, name, settings.img_size) if comparable and fits(name, weights) else []
    if differing:
        raise UserError(
            f"{checkpoint.location} was trained as {recorded}, which has the parameters of --teacher-model {name} but "
            f"computes other results ({', '.join(differing[:3])}); pass --teacher-model {recorded}"
        )
    if is_avit(name):
        flags = NetworkFlags(name, settings.img_size)
        own = resolve_network(checkpoint, flags, Purpose.EVALUATION, log_gate=False)
        return checkpoint.build_network(own, classes)
    classifier = _create_classifier(name, settings)
    classifier.reset_classifier(len(classes))
    load_teacher_weights(classifier, weights, checkpoint.location)
    return classifier


def _as_teacher(classifier: nn.Module, student: nn.Module) -> losses.Teacher:
    own, students = Preprocessing.from_model(classifier), Preprocessing.from_model(student)
    return losses.Teacher(classifier, own.mean, own.std, students.mean, students.std)


def build_self_teacher(
    args: argparse.Namespace, settings: NetworkSettings, model: nn.Module, head: Head
) -> losses.Teacher:
    """Build the teacher for self-distillation: the static model of --teacher-path, else of the starting weights.

    head: of the model, whose rows are those of the starting weights unless the run is resumed.
    Raises UserError if there are no such weights, or if they do not predict these classes.
    """
    if args.teacher_path:
        checkpoint = Checkpoint.load(args.teacher_path)
        static = checkpoint.build_model(classes=head.names, img_size=settings.img_size, halting=False)
        return _as_teacher(static, model)
    settings = settings._replace(halting=False)
    # A resumed run started from these weights too, so --resume is ignored here.
    start = Checkpoint.from_args(argparse.Namespace(**{**vars(args), "resume": None}))
    if start is not None:
        settings = settings._replace(preprocessing=start.recorded_preprocessing() or settings.preprocessing)
        static = start.build_network(settings, head.names if args.resume else head, use_ema=args.use_ema)
    elif args.pretrained:
        static = create_model(
            settings.model, settings.img_size, pretrained=True, num_classes=len(head.names), halting=False
        )
        head = hub_head(settings.model, "the --pretrained weights", head.names) if args.resume else head
        head.sort_rows(static)
    else:
        raise UserError(
            "--distillation-type self requires starting weights, which become the teacher; "
            "pass --pretrained, --pretrained-path or --finetune, also when resuming"
        )
    return _as_teacher(static, model)


def teacher_share(teacher: nn.Module, model: nn.Module, target_macs: float | None) -> float:
    """Return the teacher's fraction of a training step's MACs.

    A backward pass counts as two forward passes, and the model as if it met its budget.
    """
    budget = resolve_budget(model, target_macs) if target_macs is not None else 1.0
    return static_macs(teacher) / (static_macs(teacher) + 3 * budget * static_macs(model))
