"""Checkpoints: their content, and reading and writing them without executing anything."""

from __future__ import annotations

import argparse
import hashlib
import http.client
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load_file
from timm.models._hub import download_cached_file
from torch import Tensor, nn

import utils
from datasets import MAX_UNCROPPED_SIDE, Preprocessing, normal_name
from engine_act import MAX_START_SHARE
from training.budget import BudgetCurve
from training.budget_table import BudgetTable, fits_weights, half_precision, mixed_weights
from training.classes import Head, default_names, is_of_head, match_head
from training.gate_settings import gate_in_name, gate_numbers
from training.models import avit_names, create_model, run_preprocessing, unsupported_reason
from training.network import NetworkFlags, NetworkSettings, Purpose, resolve_network
from training.rendezvous import checksum, require_same
from training.sources import FILE_NAME, FOREIGN_RECORD, RECORD
from training.weights import MAX_SIDE, fits, fitting_models, load_weights
from training.wrappers import EMA_WEIGHTS, WEIGHTS, named_tensors, unwrapped, vit_under_any_key, weights_under
from utils import UserError, did_you_mean, log, warn

MAX_CLASSES = 100_000  # a larger head is refused


class Checkpoint:
    """A checkpoint of this repository, of the original, timm or DeiT, or a file of weights alone.

    location: path or https URL. flag: the command-line flag that named it, e.g. "resume"; None for other callers.

    Entries of a checkpoint saved by this repository (only the first two and `args` are read from others):
    model, model_ema: the weights, and their moving average or None;
    gate: gate_scale, gate_center, halt_eps and, if the gate reads them, gate_directions, or None for a static model;
    ema_start_share: share of the starting weights in model_ema, or None without it;
    budget_curves, budget_tables: `BudgetCurve` and `BudgetTable` records by name of the weights, if measured;
    start: the weights of the static model that training to a budget started from, in half precision;
    gate_ema: like `gate`, for the averaged weights, if it differs;
    classes: class names; args: the flags of the run, by name;
    preprocessing: `Preprocessing.record` of the images in evaluation.

    Entries for resuming, each written and read by `state_dict` and `load_state_dict` of one part of a run:
    model, model_ema, scaler, skipped_steps: `engine_act.Trainer`;
    optimizer: `training.optimizer_state.OptimizerState`;
    budget_controller: `losses.BudgetController`, if the run has a MACs budget;
    epoch, batches, images, seconds, data_wait, averages: `engine_act.EpochState`;
    bad_images: `training.loaders.ImageLoader`; plateau: `training.schedule.Schedule`;
    best_acc1, previous_test, processes: `training.loop.TrainingRun`; data: `training.resume.data_record`.
    """

    def __init__(self, content: dict, location: str, flag: str | None = None):
        self.content, self.location, self.flag = content, location, flag
        self._printed: set[str] = set()  # lines that are printed only once

    @classmethod
    def load(cls, location: str, flag: str | None = None) -> Checkpoint:
        """Read a checkpoint. Raises UserError, see `load_checkpoint`."""
        return cls(load_checkpoint(location), location, flag)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Checkpoint | None:
        """Load the first given of --resume, --finetune and --pretrained-path; None if there is no checkpoint."""
        for flag in ("resume", "finetune", "pretrained_path"):
            location = getattr(args, flag)
            if flag == "resume" and location == "auto":
                location = _checkpoint_to_resume(args)
            if location:
                return cls.load(location, flag)
        return None

    @property
    def is_native(self) -> bool:
        """Return whether a training run of this repository saved it."""
        return "gate" in self.content

    @property
    def is_static(self) -> bool:
        """Return whether it is a native checkpoint of a model that was trained without halting."""
        return self.is_native and self.content["gate"] is None

    def state_dict(self, use_ema: bool = False) -> dict[str, Tensor]:
        """Return the weights (with `use_ema`, the averaged weights), without the name prefixes of wrappers.

        Raises UserError if the checkpoint holds no such named tensors.
        """
        ema, raw = (weights_under(self.content, keys) for keys in (EMA_WEIGHTS, WEIGHTS))
        if use_ema and ema is None:
            raise UserError(f"{self.location} has no averaged weights (model_ema); omit --use-ema")
        raw = raw or named_tensors(self.content) or vit_under_any_key(self.content, self.location)
        weights = ema if use_ema else raw
        if weights is None and ema is not None:
            raise UserError(f"{self.location} has only averaged weights; pass --use-ema")
        if weights is None:
            raise UserError(
                f"{self.location} has no weights; expected named tensors, at the top level or under 'model'"
            )
        weights, others = unwrapped(weights, self.location)
        if others and others not in self._printed:
            self._printed.add(others)
            warn(others)
        return weights

    def warn_about_average(self) -> None:
        """Warn if the averaged weights are mostly those that training started from."""
        share = self.content.get("ema_start_share")
        if isinstance(share, float) and MAX_START_SHARE < share <= 1:
            warn(
                f"--use-ema: {share:.0%} of the averaged weights of {self.location} are the weights that its training "
                "started from; omit --use-ema, or train longer or with a lower --model-ema-decay"
            )

    def recorded_flag(self, name: str) -> object:
        """Return a flag of the run that saved it, of any type, or None if it is not recorded."""
        flags = self.content.get("args")
        return flags.get(name) if isinstance(flags, dict) else getattr(flags, name, None)

    def image_size(self) -> tuple[int, int] | None:
        """Return the height and width that a checkpoint records for its images, or None."""
        return next(filter(None, (_as_size(self.recorded_flag(name)) for name in ("input_size", "img_size"))), None)

    def model_name(self, use_ema: bool = False) -> str:
        """Return the name of the model these weights fit.

        This is the recorded name, else the first registered model with matching shapes.
        Raises UserError if none fits.
        """
        recorded, weights = self.recorded_model(), self.state_dict(use_ema)
        if recorded is not None and fits(recorded, weights):
            return recorded
        fitting = fitting_models(weights)
        if not fitting:
            raise UserError(f"{self.location} fits no registered model ({', '.join(avit_names())}); pass --model")
        return fitting[0]

    def recorded_model(self) -> str | None:
        """Return the model name of the run, or None if it is missing or not supported."""
        recorded = self.recorded_flag("model") or self.content.get("arch")  # timm's scripts write both
        return recorded if isinstance(recorded, str) and unsupported_reason(recorded) is None else None

    def recorded_preprocessing(self) -> Preprocessing | None:
        """Return how a native checkpoint's images are preprocessed in evaluation, or None if it is not recorded.

        Without an entry of its own, it follows from the recorded model, image size and dataset.
        """
        if not self.is_native:  # DeiT's checkpoints name timm's model, but fit the registered ones
            return None
        recorded = Preprocessing.from_record(self.content.get("preprocessing"))
        name, size = self.recorded_model(), self.image_size()
        if recorded is not None or name is None or size is None:
            return recorded
        return run_preprocessing(name, size, str(self.recorded_flag("data_set")))

    def preprocessing_for(
        self, name: str, img_size: tuple[int, int], data_set: str | None = None, is_new_task: bool = False
    ) -> Preprocessing:
        """Return the preprocessing of a run with these weights, in evaluation.

        The recorded one is used, with a warning if this model or dataset would have another. Training of a new task
        uses that of the run's own model, size and dataset, and logs a difference.
        name, img_size: of the run's model; data_set: name of the run's dataset, or None for image files
        """
        trained = self.recorded_model(), str(self.recorded_flag("data_set"))
        run = f"{name} on {data_set}" if data_set else name
        data_set = data_set or trained[1]
        own = run_preprocessing(name, img_size, data_set)
        recorded = self.recorded_preprocessing() if self.is_native else self._with_foreign_preprocessing(own, img_size)
        if recorded is None or recorded == own:
            return own
        if is_new_task:
            difference = own.difference(recorded)
            log(f"{self.location}: this run preprocesses images in another way than the checkpoint: {difference}")
            return own
        usual = run_preprocessing(name, self.image_size() or img_size, data_set)
        if recorded != usual and ((name, data_set) != trained or not self.is_native):
            warn(
                f"{self.location}: images are preprocessed as the checkpoint records, which differs from "
                f"{run}: {recorded.difference(usual)}"
            )
        return recorded

    def _with_foreign_preprocessing(self, own: Preprocessing, img_size: tuple[int, int]) -> Preprocessing:
        """Return the run's own preprocessing with the usable values in another program's args.

        Small images are never cropped, so only their mean and std count.
        """
        names = [(name, name) for name in Preprocessing._fields]
        is_cropped = max(img_size) > MAX_UNCROPPED_SIDE
        for flag, name in [("eval_crop_ratio", "crop_pct"), *names] if is_cropped else names[:2]:
            own = Preprocessing.from_record(own.record() | {name: self.recorded_flag(flag)}) or own
        return own

    def recorded_classes(self) -> list[str] | None:
        """Return the class names in order and normal form, or None if they are missing, not text or not unique."""
        recorded = self.content.get("classes")
        if not isinstance(recorded, list) or not all(isinstance(name, str) for name in recorded):
            return None
        names = [normal_name(name) for name in recorded]
        return names if names and len(set(names)) == len(names) else None

    def _names_of_rows(self, num_rows: int) -> list[str] | None:
        """Return the recorded class names if there is one for each row of the head, else None."""
        recorded = self.recorded_classes()
        return recorded if recorded is not None and len(recorded) == num_rows else None

    def warn_about_class_names(self, use_ema: bool = False) -> None:
        """Warn if class names are recorded that cannot be those of the head's rows."""
        head, names = self.state_dict(use_ema).get("head.weight"), self.content.get("classes")
        is_missing = names is None or (isinstance(names, list) and not names)
        if is_missing or head is None or head.ndim != 2 or self._names_of_rows(len(head)):
            return
        recorded = self.recorded_classes()
        problem = f"{len(recorded)} class names" if recorded else "class names that are not distinct texts"
        warn(f"{self.location} records {problem}, but its head has {len(head)} classes; the names are not used")

    def head_for(
        self, classes: Sequence[str], use_ema: bool = False, replace_head: bool = False, keep_others: bool = False
    ) -> Head:
        """Match the classes of a dataset with the rows of the head, see `match_head`."""
        heads = [value for name, value in self.state_dict(use_ema).items() if is_of_head(name)]
        counts = {len(value) if value.ndim else 0 for value in heads}
        num_rows = counts.pop() if len(counts) == 1 else 0
        if not 1 <= num_rows <= MAX_CLASSES:  # there is no head, or `load_weights` refuses it
            return Head(list(classes))
        recorded = self._names_of_rows(num_rows)
        options = {"replace_head": replace_head, "keep_others": keep_others}
        same_order = self.flag == "resume" and not keep_others
        return match_head(self.location, classes, recorded, num_rows, same_order=same_order, **options)

    def weights_for(
        self, classes: Sequence[str], use_ema: bool = False, replace_head: bool = False
    ) -> dict[str, Tensor]:
        """Return the weights with a head for these classes of a dataset, see `match_head`."""
        return self.head_for(classes, use_ema, replace_head).select(self.state_dict(use_ema))

    def names_by_class(self) -> dict[str, str]:
        """Return the classes in order, each with a name to show: the recorded name, ImageNet's, or "class N".

        Raises UserError if the weights have no head.
        """
        head = self.state_dict().get("head.weight")
        if head is None or head.ndim != 2 or not 1 <= len(head) <= MAX_CLASSES:
            raise UserError(f"{self.location} has no head: expected head.weight of shape [classes, channels]")
        recorded = self._names_of_rows(len(head))
        return default_names(len(head)) if recorded is None else {name: name for name in recorded}

    def budget_curve(self, use_ema: bool = False) -> BudgetCurve | None:
        """Return the budget curve of the weights, or None if there is none."""
        return BudgetCurve.from_record(self._measured("budget_curves", use_ema))

    def budget_table(self, use_ema: bool = False) -> BudgetTable | None:
        """Return the budget table of the weights, or None if there is none, or no starting weights to mix with."""
        table = BudgetTable.from_record(self._measured("budget_tables", use_ema))
        return table if table and fits_weights(self.content.get("start"), self.state_dict(use_ema)) else None

    def records_table(self, use_ema: bool = False) -> bool:
        """Return whether a budget table is recorded, even if it is damaged and `budget_table` returns None."""
        return self._measured("budget_tables", use_ema) is not None

    def _measured(self, entry: str, use_ema: bool) -> object:
        records = self.content.get(entry)
        return records.get("model_ema" if use_ema else "model") if isinstance(records, dict) else None

    def mixed_state_dict(self, mixing: float, use_ema: bool = False) -> dict[str, Tensor]:
        """Return weights between the starting weights (mixing 0) and the trained ones (1), see `BudgetTable`."""
        return mixed_weights(self.content.get("start"), self.state_dict(use_ema), mixing)

    def gate_sources(self, use_ema: bool = False) -> list[tuple[str, dict[str, float]]]:
        """Return (source, gate values), most trusted first: its record, its file name, a foreign checkpoint's flags.

        A native checkpoint of a static model has no gate, whatever its file name.
        """
        args = self.content.get("args")
        flags = args if isinstance(args, dict) else getattr(args, "__dict__", {})
        own, of_ema = self.content.get("gate"), self.content.get("gate_ema")
        own = of_ema if use_ema and isinstance(of_ema, dict) and of_ema else own
        return [
            (RECORD, gate_numbers(own)),
            (FILE_NAME, {} if self.is_static else gate_in_name(self.location)),
            (FOREIGN_RECORD, {} if self.is_native else gate_numbers(flags)),
        ]

    def build_model(
        self,
        name: str | None = None,
        *,
        classes: Sequence[str] | Head | None = None,
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
        """Build the model with these weights, on the CPU. Raises UserError if something does not fit.

        None stands for the checkpoint's own model, classes, gate and image size, see `resolve_network`.
        classes: names of the dataset's classes, or a `Head` from `head_for`; replace_head: see `load_weights`.
        budget: fraction of the static model's MACs that sets gate center and weights, see `budget_settings`.
        as_trained: disable halting, with a warning, if the weights were not trained to halt and no gate is given.
        options: of timm.create_model.
        """
        flags = NetworkFlags(name, img_size, gate_scale, gate_center, budget, halting, use_ema)
        is_evaluation = as_trained and not replace_head
        purpose = Purpose.EVALUATION if is_evaluation else Purpose.NEW_TASK if replace_head else Purpose.RESUME
        settings = resolve_network(self, flags, purpose)
        return self.build_network(settings, classes, use_ema, replace_head, **options)

    def build_network(
        self,
        settings: NetworkSettings,
        classes: Sequence[str] | Head | None = None,
        use_ema: bool = False,
        replace_head: bool = False,
        **options,
    ) -> nn.Module:
        """Build the model of these settings with these weights, on the CPU. See `build_model`."""
        if classes is None:
            head = Head([*self.names_by_class()])
        else:
            head = classes if isinstance(classes, Head) else self.head_for(classes, use_ema, replace_head)
        weights = head.select(self.mixed_state_dict(settings.mixing, use_ema))
        model = create_model(
            settings.model,
            settings.img_size,
            settings.preprocessing,
            num_classes=len(head.names),
            halting=settings.halting,
            **settings.gate,
            **options,
        )
        load_weights(model, weights, self.location, replace_head, self.image_size())
        self._set_gate_directions(model)
        return model

    def _set_gate_directions(self, model: nn.Module) -> None:
        """Let the gate read the recorded directions, if there are any. Raises UserError if they do not fit."""
        gate = self.content.get("gate")
        try:
            model.set_gate_directions(gate.get("gate_directions") if isinstance(gate, dict) else None)
        except ValueError as error:
            raise UserError(f"{self.location}: {error}") from error

    def without_training_state(self, private_flags: Iterable[str] = ()) -> dict:
        """Return what evaluation and fine-tuning need, the weights in half precision.

        private_flags: names of flags to omit.
        """
        args = {name: value for name, value in self.content["args"].items() if name not in private_flags}
        weights = half_precision(self.state_dict())
        kept = {name: self.content[name] for name in ("gate", "classes")}
        if (curve := self.budget_curve()) is not None:
            kept["budget_curves"] = {"model": curve.record()}
        if (table := self.budget_table()) is not None:
            kept |= {"budget_tables": {"model": table.record()}, "start": self.content["start"]}
        if (preprocessing := self.recorded_preprocessing()) is not None:
            kept["preprocessing"] = preprocessing.record()
        return {"model": weights, **kept, "args": args}


def _as_size(recorded: object) -> tuple[int, int] | None:
    """Return height and width of a recorded image size: a number, one or two numbers, or timm's [3, height, width]."""
    sides = list(recorded) if isinstance(recorded, list | tuple) else [recorded]
    sides = sides[1:] if len(sides) == 3 and sides[0] == 3 else sides
    is_size = 1 <= len(sides) <= 2 and all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides)
    return (sides[0], sides[-1]) if is_size else None


# Files -------------------------------------------------------------------------------------------


def find_latest_checkpoint(output_dir: str) -> str | None:
    """Return the path of checkpoint.pth in the folder, or None if it does not exist.

    Raises UserError if the file exists for some processes only, or is another one for some.
    """
    path = Path(output_dir) / "checkpoint.pth"
    exists = utils.all_gather_objects(path.exists())  # in each process
    if len(set(exists)) > 1:
        raise UserError(f"{path} exists for some processes only; --output-dir must be on a disk that all share")
    if not exists[0]:
        return None
    if utils.world_size() > 1:
        require_same({f"the checksum of {path.name} in --output-dir": checksum(path)})
    return str(path)


def _checkpoint_to_resume(args: argparse.Namespace) -> str | None:
    """Return the checkpoint of --resume auto and log what it leads to.

    Raises UserError if there is none in evaluation, whose weights would be others than the run's.
    """
    location = find_latest_checkpoint(args.output_dir)
    if location:
        log(f"resuming from {location}")
    elif args.eval or args.demo:
        raise UserError(
            f"--resume auto: {args.output_dir} has no checkpoint.pth; pass the weights with --finetune instead"
        )
    else:
        log(f"{args.output_dir} has no checkpoint; starting a new run")
    return location


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Write a checkpoint so that a complete file exists at any moment, see `utils.atomic_write`.

    Raises OSError if it cannot be written.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's writer hides the reason
            raise OSError(f"{str(error).splitlines()[0]} (is the disk full?)") from error

    utils.atomic_write(path, write)


def load_checkpoint(location: str) -> dict:
    """Read a checkpoint (PyTorch or safetensors) from a path or https URL without executing its content.

    argparse.Namespace is the only Python class allowed, because published checkpoints store their flags in one.
    Raises UserError if the file cannot be read as a dictionary.
    """
    path = _local_path(location)
    try:
        checkpoint = _read(path)
    except Exception as error:  # the unpickler may raise anything on a hostile file
        if "unsupported global" in str(error).lower():
            reason = "it contains Python objects other than tensors and plain types, which are never executed"
        else:
            reason = "it is truncated or not a checkpoint"
        raise UserError(f"{location} cannot be loaded: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{location} is not a checkpoint: expected a dictionary, found {type(checkpoint).__name__}")
    return checkpoint


def _read(path: Path) -> object:
    with path.open("rb") as file:
        if file.read(9)[8:] == b"{":  # safetensors: the header's length, then JSON
            return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever torch warns about is either refused later or harmless
        return torch.load(path, map_location="cpu", weights_only=True)


def _local_path(location: str) -> Path:
    """Return the path of the file, or of its local copy if `location` is an https URL."""
    if location.startswith("https://"):
        try:
            with utils.main_process_first():
                name, start = f"{hashlib.sha256(location.encode()).hexdigest()[:16]}-{Path(location).name}", time.time()
                path = Path(download_cached_file((location, name), check_hash=False, progress=utils.is_main()))
                if (saved := path.stat().st_mtime) < start:
                    day = time.strftime("%Y-%m-%d", time.localtime(saved))
                    log(f"{location}: using the copy of {day} in {path}; delete it to download the file again")
                return path
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"{location} cannot be downloaded: {error}") from error
    path = Path(location)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            hint = " (did you mean its checkpoint.pth?)" if (path / "checkpoint.pth").exists() else ""
            raise UserError(f"{location} is a folder, not a checkpoint{hint}")
        siblings = path.parent.glob(f"*{path.suffix}") if path.parent.is_dir() else ()
        hint = did_you_mean(path.name, (p.name for p in siblings))
    except OSError as error:  # e.g. the name is too long or the folder is not readable
        raise UserError(f"{location}: {error.strerror}") from error
    raise UserError(f"{location}: no such file{hint}")
