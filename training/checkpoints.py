"""Checkpoints: what is in them, how they are read without executing anything, and fitted to a model."""

from __future__ import annotations

import argparse
import hashlib
import http.client
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from timm.models._hub import download_cached_file
from torch import Tensor, nn

import utils
from datasets import placeholder_names
from training.budget import BudgetCurve
from training.models import create_model, default_image_size, own_names, preprocessing, unsupported_reason
from training.weights import (
    empty_state_dict,
    first_names,
    fitting_models,
    gate_in_name,
    gate_numbers,
    is_of_head,
    load_weights,
    may_be_resized,
    resolve_gate,
    state_dict_mismatches,
)
from utils import UserError, did_you_mean, log, warn

IMAGENET_CLASSES = 1000
MAX_SIDE, MAX_CLASSES = 1024, 100_000  # a checkpoint that says more is not believed


class Checkpoint:
    """A checkpoint of ours, of the original, of timm or DeiT, or weights alone: what it tells of its network.

    location: path or https URL; flag: of the command line that named it, for `--resume` and its like.

    What ours hold (of others, only the first two and `args` are read):
    model, model_ema: the weights, and their average or None;
    gate: gate_scale, gate_center and halt_eps, None of a static network;
    budget_curves: by name of the weights, what they cost by their gate center, where measured, see `BudgetCurve`;
    gate_ema: as `gate`, of the averaged weights, where it is another;
    classes: their names; args: the flags of the run, by name;
    and for going on, what each part of a run keeps up in its own `state_dict` and `load_state_dict`:
    model, model_ema, optimizer, scaler, skipped_steps: `engine_act.Trainer`;
    budget_controller: `losses.BudgetController`, where a cost was asked for;
    epoch, batches, seconds, data_wait, averages: `engine_act.Epoch`;
    bad_images: `training.loaders.ImageLoader`; plateau: `training.build.Schedule`;
    best_acc1, previous_test, processes: `training.loop.TrainingRun`.
    """

    def __init__(self, content: dict, location: str, flag: str | None = None):
        self.content, self.location, self.flag = content, location, flag

    @classmethod
    def load(cls, location: str, flag: str | None = None) -> Checkpoint:
        """UserError, see `load_checkpoint`."""
        return cls(load_checkpoint(location), location, flag)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Checkpoint | None:
        """The first given of --resume, --finetune, --pretrained-path; `--resume auto` may find nothing."""
        for flag in ("resume", "finetune", "pretrained_path"):
            location = getattr(args, flag)
            if flag == "resume" and location == "auto":
                location = find_latest_checkpoint(args.output_dir)
                log(f"going on from {location}" if location else f"{args.output_dir} holds no checkpoint: a new run")
            if location:
                return cls.load(location, flag)
        return None

    @property
    def is_ours(self) -> bool:
        return "gate" in self.content

    @property
    def is_static(self) -> bool:
        """Whether it is a checkpoint of ours that was trained without halting."""
        return self.is_ours and self.content["gate"] is None

    def state_dict(self, use_ema: bool = False) -> dict[str, Tensor]:
        """The weights: `model` (with `use_ema`, `model_ema`), what other programs call so, or the whole dictionary.

        Prefixes that wrappers give to all names are taken off. UserError if they are not named tensors.
        """
        ema, raw = (_weights_in(self.content, names) for names in (EMA_WEIGHTS, WEIGHTS))
        if use_ema and ema is None:
            raise UserError(f"{self.location}: --use-ema: it holds no model_ema")
        weights = ema if use_ema else raw or _named_tensors(self.content)
        if weights is None and ema is not None:
            raise UserError(f"{self.location}: holds averaged weights alone: give --use-ema")
        if weights is None:
            raise UserError(f"{self.location}: holds no weights: expected named tensors, at the top or under 'model'")
        return _without_prefixes(weights)

    def recorded_flag(self, name: str) -> object:
        """A flag of the run that saved it, where it says; else None. Of any type."""
        flags = self.content.get("args")
        return flags.get(name) if isinstance(flags, dict) else getattr(flags, name, None)

    def image_size(self) -> tuple[int, int] | None:
        """Height and width that a checkpoint of ours was trained at."""
        size = self.recorded_flag("input_size") if self.is_ours else None
        is_size = isinstance(size, list) and 1 <= len(size) <= 2 and all(isinstance(side, int) for side in size)
        return (size[0], size[-1]) if is_size and 1 <= min(size) <= max(size) <= MAX_SIDE else None

    def model_name(self) -> str:
        """Of which model it holds the weights, by its record, else of ours by shapes. UserError where of none."""
        recorded = self.recorded_model()
        if recorded is not None and not state_dict_mismatches(
            empty_state_dict(recorded), self.state_dict(), may_be_resized
        ):
            return recorded
        fitting = fitting_models(self.state_dict())
        if not fitting:
            raise UserError(
                f"{self.location}: fits none of our models, which are {', '.join(own_names())}; give --model"
            )
        return fitting[0]

    def recorded_model(self) -> str | None:
        """The name of the run's model, where it says one that we know."""
        recorded = self.recorded_flag("model")
        return recorded if isinstance(recorded, str) and unsupported_reason(recorded) is None else None

    def _check_preprocessing(self, name: str, is_new_task: bool) -> None:
        """UserError where the images of this model are not made as those of the run's; a warning in a new task."""
        recorded = self.recorded_model() if self.is_ours else None  # DeiT's own say its names, and fit ours
        if recorded is None or preprocessing(recorded) == preprocessing(name):
            return
        told = f"{self.location}: was trained on images made for {recorded}, those of {name} are made otherwise"
        if not is_new_task:
            raise UserError(f"{told}: give --model {recorded}")
        warn(told)

    def recorded_classes(self) -> list[str] | None:
        """The names of its classes, in order, where it says them."""
        recorded = self.content.get("classes")
        is_names = isinstance(recorded, list) and all(isinstance(name, str) for name in recorded)
        return recorded if is_names and recorded and len(set(recorded)) == len(recorded) else None

    def weights_for(
        self, classes: Sequence[str], use_ema: bool = False, replace_head: bool = False
    ) -> dict[str, Tensor]:
        """The weights, with a head for data of these classes, in their order: matched by name where they are known.

        replace_head: without a head where some are unknown, for a new one to be trained; else that is a UserError.
        Where none is known, and there are as many, they are taken in order, with a warning.
        """
        weights, recorded = self.state_dict(use_ema), self.recorded_classes()
        heads = [value for name, value in weights.items() if is_of_head(name)]
        fits = recorded is not None and all(value.ndim > 0 and len(value) == len(recorded) for value in heads)
        if not fits or recorded in (list(classes), placeholder_names(len(recorded))):
            return weights
        number = {name: index for index, name in enumerate(recorded)}
        unknown = [name for name in classes if name not in number]
        of_data, own = f"the data's classes ({first_names(classes)})", f"its own ({first_names(recorded)})"
        if not unknown and self.flag == "resume":
            raise UserError(
                f"{self.location}: a run goes on with its own classes: {of_data} are not {own} in their order"
            )
        if not unknown:
            log(f"{self.location}: {of_data} are found by name among {own}")
            rows = torch.tensor([number[name] for name in classes])
            return {name: value[rows] if is_of_head(name) else value for name, value in weights.items()}
        if len(unknown) == len(classes) == len(recorded):
            warn(f"{self.location}: {of_data} are none of {own}: taken to be the same, in order")
        elif replace_head:
            return {name: value for name, value in weights.items() if not is_of_head(name)}
        elif len(unknown) < len(classes):
            raise UserError(f"{self.location}: does not know {first_names(unknown)} of {of_data}, only {own}")
        return weights

    def names_by_class(self) -> dict[str, str]:
        """The classes that it knows, in order, each with a name to show: its own, or ImageNet's, or numbers.

        UserError without a head.
        """
        head = self.state_dict().get("head.weight")
        if head is None or head.ndim != 2 or not 1 <= len(head) <= MAX_CLASSES:
            raise UserError(f"{self.location}: its weights have no head: expected head.weight, [classes, channels]")
        count, recorded = len(head), self.recorded_classes()
        if recorded is not None and len(recorded) == count:
            return {name: name for name in recorded}
        if count == IMAGENET_CLASSES:
            info = ImageNetInfo("imagenet-1k")
            return dict(zip(info.label_names(), info.label_descriptions()))
        return {name: name for name in placeholder_names(count)}

    def budget_curve(self, use_ema: bool = False) -> BudgetCurve | None:
        """Of its weights, where it holds one."""
        curves = self.content.get("budget_curves")
        name = "model_ema" if use_ema else "model"
        return BudgetCurve.of(curves.get(name)) if isinstance(curves, dict) else None

    def center_of_budget(self, budget: float, use_ema: bool = False) -> float:
        """The gate center at which its weights cost that share of the static network's multiply-adds.

        UserError where it holds no curve, or one that does not reach so far.
        """
        curve = self.budget_curve(use_ema)
        if curve is None:
            why = "it does not know what its gate costs; training with --target-macs measures it"
            raise UserError(f"{self.location}: --budget: {why}")
        if not curve.min_cost <= budget <= curve.max_cost:
            known = f"its budgets go from {curve.min_cost:.2f} to {curve.max_cost:.2f}"
            raise UserError(f"{self.location}: --budget {budget:g}: {known}")
        return curve.center(budget)

    def gate_sources(self, use_ema: bool = False) -> list[tuple[str, dict[str, float]]]:
        """Where it says something of its gate, the surest first: its record, its file's name, a foreign one's flags."""
        args = self.content.get("args")
        flags = args if isinstance(args, dict) else getattr(args, "__dict__", {})
        own = (self.content.get("gate_ema") if use_ema else None) or self.content.get("gate")
        return [
            ("the checkpoint", gate_numbers(own)),
            ("the file name", gate_in_name(self.location)),
            ("the checkpoint's args", {} if self.is_ours else gate_numbers(flags)),
        ]

    def build_model(
        self,
        name: str | None = None,
        *,
        classes: Sequence[str] | None = None,
        img_size: tuple[int, int] | None = None,
        gate_scale: float | None = None,
        gate_center: float | None = None,
        budget: float | None = None,
        use_ema: bool = False,
        replace_head: bool = False,
        halting: bool = True,
        as_trained: bool = True,
        **options,
    ) -> nn.Module:
        """The network with these weights, on the CPU.

        What is None is the checkpoint's: its model, classes, gate, and image size (where it says none, the model's).
        classes: names of the data's, see `weights_for`;
        budget: share of the static network's multiply-adds that sets the gate center instead, see `center_of_budget`;
        replace_head: see `load_weights`; as_trained: a network that was trained without halting does not halt, unless
        a gate is given, which is told; options: of timm.create_model. UserError where something does not fit.
        """
        name = name or self.model_name()
        self._check_preprocessing(name, replace_head)
        if halting and as_trained and self.is_static and gate_scale is gate_center is budget is None:
            warn(f"{self.location}: was trained without halting: it is run as a static network")
            halting = False
        gate = resolve_gate({"gate_scale": gate_scale, "gate_center": gate_center}, self.gate_sources(use_ema))
        if budget is not None:
            gate["gate_center"] = self.center_of_budget(budget, use_ema)
            log(f"gate_center {gate['gate_center']:g}, for a budget of {budget:g}")
        img_size = img_size or self.image_size() or default_image_size(name)
        if classes is None:
            classes, weights = [*self.names_by_class()], self.state_dict(use_ema)
        else:
            weights = self.weights_for(classes, use_ema, replace_head)
        model = create_model(name, img_size, num_classes=len(classes), halting=halting, **gate, **options)
        load_weights(model, weights, self.location, replace_head, self.image_size())
        return model

    def without_training_state(self, private_flags: Iterable[str] = ()) -> dict:
        """What evaluation and fine-tuning need, the weights in half precision; private_flags: those to leave out."""
        args = {name: value for name, value in self.content["args"].items() if name not in private_flags}
        weights = {name: value.half() for name, value in self.state_dict().items()}
        curves = {"budget_curves": {"model": curve.record()}} if (curve := self.budget_curve()) else {}
        kept = {name: self.content[name] for name in ("gate", "classes")} | curves
        return {"model": weights, **kept, "args": args}


# What others wrap weights in -----------------------------------------------------------------------

WEIGHTS = ("model", "state_dict", "model_state_dict", "module", "network", "net", "weights")
EMA_WEIGHTS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.")
MAX_WRAPPERS = 5  # one in the other


def _named_tensors(content: object) -> dict | None:
    is_weights = isinstance(content, dict) and bool(content) and all(map(utils.is_plain_tensor, content.values()))
    return content if is_weights else None


def _weights_in(content: object, names: Sequence[str], depth: int = MAX_WRAPPERS) -> dict | None:
    """Named tensors under the first of these names that has some, at any depth."""
    for name in names if isinstance(content, dict) and depth else ():
        inside = content.get(name)
        found = _named_tensors(inside) or _weights_in(inside, WEIGHTS, depth - 1)
        if found:
            return found
    return None


def _without_prefixes(weights: dict) -> dict[str, Tensor]:
    weights = {str(name): value for name, value in weights.items()}
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


# Files -------------------------------------------------------------------------------------------


def find_latest_checkpoint(output_dir: str) -> str | None:
    """checkpoint.pth in the folder, if it is there. UserError where processes see different folders."""
    path = Path(output_dir) / "checkpoint.pth"
    found = utils.all_gather_objects(path.exists())
    if len(set(found)) > 1:
        raise UserError(f"{path}: some processes see it, others do not: --output_dir must be on a shared disk")
    return str(path) if found[0] else None


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Whole at any moment: see `utils.atomic_write`. OSError if it cannot be written."""

    def write(file: BinaryIO) -> None:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's writer hides the reason
            raise OSError(f"{str(error).splitlines()[0]} (is the disk full?)") from error

    utils.atomic_write(path, write)


def load_checkpoint(location: str) -> dict:
    """Reads a checkpoint from a path or an https URL, executing nothing that is in it.

    PyTorch's format, or safetensors. Of Python's classes only
    argparse.Namespace is let in: published checkpoints carry their flags in one. UserError for
    anything that cannot be read as a dictionary.
    """
    path = _local_path(location)
    try:
        checkpoint = _read(path)
    except Exception as error:  # the unpickler of a hostile file may raise anything
        if "unsupported global" in str(error).lower():
            reason = "it holds more than tensors and plain types, and running its code is refused"
        else:
            reason = "it is truncated or not a checkpoint"
        raise UserError(f"{location}: cannot be loaded: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{location}: not a checkpoint: expected a dictionary, found {type(checkpoint).__name__}")
    return checkpoint


def _read(path: Path) -> object:
    with path.open("rb") as file:
        if file.read(9)[8:] == b"{":  # a length, then JSON: safetensors
            return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of in odd files is refused, or harmless
        return torch.load(path, map_location="cpu", weights_only=True)


def _local_path(location: str) -> Path:
    """The file itself, or its local copy where `location` is an https URL."""
    if location.startswith("https://"):
        try:
            with utils.main_process_first():
                name = f"{hashlib.sha256(location.encode()).hexdigest()[:16]}-{Path(location).name}"
                return Path(download_cached_file((location, name), check_hash=False, progress=utils.is_main()))
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"{location}: cannot be downloaded: {error}") from error
    path = Path(location)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            inside = " (did you mean its checkpoint.pth?)" if (path / "checkpoint.pth").exists() else ""
            raise UserError(f"{location}: is a folder, not a checkpoint{inside}")
        alike = path.parent.glob(f"*{path.suffix}") if path.parent.is_dir() else ()
        hint = did_you_mean(path.name, (p.name for p in alike))
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UserError(f"{location}: {error.strerror}") from error
    raise UserError(f"{location}: no such file{hint}")
