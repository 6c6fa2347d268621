"""Checkpoints: written whole, read without executing anything, fitted to a model."""

from __future__ import annotations

import argparse
import hashlib
import http.client
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models._hub import download_cached_file
from torch import Tensor, nn

from utils import UserError, all_gather_objects, atomic_write, is_main, log, main_process_first, nearest, warn


def find_latest_checkpoint(output_dir: str) -> str | None:
    """checkpoint.pth in the folder, if it is there. UserError where processes see different folders."""
    path = Path(output_dir) / "checkpoint.pth"
    found = all_gather_objects(path.exists())
    if len(set(found)) > 1:
        raise UserError(f"{path}: some processes see it, others do not: --output_dir must be on a shared disk")
    return str(path) if found[0] else None


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Whole at any moment: see `atomic_write`. OSError if it cannot be written."""

    def write(file: BinaryIO) -> None:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's writer hides the reason
            raise OSError(f"{str(error).splitlines()[0]} (is the disk full?)") from error

    atomic_write(path, write)


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
            with main_process_first():
                name = f"{hashlib.sha256(location.encode()).hexdigest()[:16]}-{Path(location).name}"
                return Path(download_cached_file((location, name), check_hash=False, progress=is_main()))
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"{location}: cannot be downloaded: {error}") from error
    path = Path(location)
    try:
        if path.is_file():
            return path
        hint = _nearby(path)
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UserError(f"{location}: {error.strerror}") from error
    raise UserError(f"{location}: no such file{hint}")


def _nearby(path: Path) -> str:
    alike = path.parent.glob(f"*{path.suffix}") if path.parent.is_dir() else ()
    return nearest(path.name, (p.name for p in alike))


def state_dict_of(checkpoint: dict, location: str, use_ema: bool = False) -> dict[str, Tensor]:
    """The weights in a checkpoint: `model` (with `use_ema`, `model_ema`), or the whole dictionary.

    UserError if they are not named tensors.
    """
    if use_ema and checkpoint.get("model_ema") is None:
        raise UserError(f"{location}: --use-ema: it holds no model_ema")
    weights = checkpoint["model_ema"] if use_ema else checkpoint.get("model", checkpoint)
    if not isinstance(weights, dict) or not weights or not all(map(_is_weight, weights.values())):
        raise UserError(f"{location}: holds no weights: expected named tensors, at the top or under 'model'")
    return {str(name).removeprefix("module."): value for name, value in weights.items()}


def _is_weight(value: object) -> bool:
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return is_plain and value.device.type == "cpu" and not value.is_complex()


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    location: str,
    replace_head: bool,
    trained_size: tuple[int, int] | None = None,
) -> None:
    """Loads weights into the model, with the position embedding resampled to its size.

    replace_head: where the class count differs, the model keeps its new head, with a warning; else
    that is an error. trained_size: height and width that the weights were trained at, where known;
    else a square, or the model's own size if the embedding fits it. UserError, naming the weights,
    if names or shapes do not fit, and which model of ours they do fit.
    """
    own, weights = model.state_dict(), _with_our_names(weights)
    wrong = _misfits(own, weights, _may_be_resized)
    if wrong:
        raise UserError(f"{location}: does not fit the model: {_first_three(wrong)}{_hint_at_fitting_models(weights)}")
    if "pos_embed" in own:
        weights["pos_embed"] = _resampled(model, weights["pos_embed"], location, trained_size)
    foreign_head = [name for name in own if name.startswith("head") and weights[name].shape != own[name].shape]
    if foreign_head:
        found, expected = len(weights[foreign_head[0]]), len(own[foreign_head[0]])
        if not replace_head:
            raise UserError(f"{location}: its head has {found} classes, the data has {expected}")
        warn(f"{location}: its head of {found} classes is replaced by a new one of {expected}")
        weights |= {name: own[name] for name in foreign_head}
    model.load_state_dict(weights, strict=True)


def _resampled(model: nn.Module, embedding: Tensor, location: str, trained_size: tuple[int, int] | None) -> Tensor:
    """embedding: [1, prefix + old patches, C] -> [1, prefix + the model's patches, C], by timm."""
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    patches, grid = embedding.shape[1] - prefix, model.patch_embed.grid_size
    old_grid = (math.isqrt(max(patches, 0)),) * 2
    if trained_size is not None:
        old_grid = tuple(side // patch for side, patch in zip(trained_size, model.patch_embed.patch_size))
    elif embedding.shape == model.pos_embed.shape:
        old_grid = grid
    if patches < 1 or math.prod(old_grid) != patches:
        raise UserError(
            f"{location}: does not fit the model: pos_embed is of {patches} patches, which is no {old_grid} grid"
        )
    return resample_abs_pos_embed(embedding, list(grid), list(old_grid), num_prefix_tokens=prefix)


OPTIONS_OF_FLAGS = {"params", "initial_lr", "weight_decay", "betas", "eps", "momentum"}  # of a group of parameters


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """The state of each parameter, learning rates and counters; what flags say stays as they say it.

    ValueError where the state does not fit the parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in saved["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor) and not (_is_weight(value) and _is_part(value.shape, parameters[index].shape)):
                raise ValueError(f"{name} of parameter {index} has shape {tuple(value.shape)}")
    own = optimizer.state_dict()["param_groups"]
    groups = [group | _counters(old) for group, old in zip(own, saved["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _is_part(shape: torch.Size, whole: torch.Size) -> bool:
    """Whether these are sizes of the whole, in order: factored optimizers leave some out."""
    sizes = iter(whole)
    return all(size in sizes for size in shape)


def _counters(group: dict) -> dict:
    """Numbers that an optimizer or a schedule keeps in a group of parameters."""
    is_number = {k: isinstance(v, int | float) or (isinstance(v, Tensor) and v.ndim == 0) for k, v in group.items()}
    return {k: v for k, v in group.items() if is_number[k] and k not in OPTIONS_OF_FLAGS}


def restore_plain(scheduler: object, saved: dict) -> None:
    """Numbers of a torch scheduler, where they are of the types that it has."""
    own = scheduler.state_dict()
    scheduler.load_state_dict({k: v for k, v in saved.items() if k in own and type(v) is type(own[k])})


def load_teacher_weights(model: nn.Module, weights: dict[str, Tensor], location: str) -> None:
    """Loads weights into any network. UserError, naming the weights, if names or shapes do not fit."""
    wrong = _misfits(model.state_dict(), weights, resizable=lambda name: False)
    if wrong:
        raise UserError(f"{location}: does not fit the teacher: {_first_three(wrong)}")
    model.load_state_dict(weights, strict=True)


def _may_be_resized(name: str) -> bool:
    return name == "pos_embed" or name.startswith("head")


def _misfits(own: dict, weights: dict, resizable: Callable[[str], bool]) -> list[str]:
    """What does not fit; resizable: names for which one size may differ."""
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is not in this model" for name in weights if name not in own]
    for name in (name for name in own if name in weights):
        found, expected = tuple(weights[name].shape), tuple(own[name].shape)
        if found != expected and not (resizable(name) and _differ_in_one_size(found, expected)):
            wrong.append(f"{name} is {found}, expected {expected}")
    return wrong


def _first_three(wrong: list[str]) -> str:
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return "; ".join(wrong[:3]) + more


def _with_our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """DeiT III's release has other names for layer scale."""
    return {re.sub(r"gamma_([12])$", r"ls\1.gamma", name): value for name, value in weights.items()}


def fitting_models(weights: dict[str, Tensor]) -> list[str]:
    """Our models of which these are the weights, those of the same image size first."""
    weights = _with_our_names(weights)
    own = {name: timm.create_model(name, device="meta").state_dict() for name in timm.list_models("avit*")}
    fitting = [name for name in own if not _misfits(own[name], weights, _may_be_resized)]
    return sorted(fitting, key=lambda name: own[name]["pos_embed"].shape != weights["pos_embed"].shape)


def _hint_at_fitting_models(weights: dict[str, Tensor]) -> str:
    """'; it fits ...', or ''."""
    fitting = fitting_models(weights)
    return f"; it fits {' or '.join(fitting)}" if fitting else ""


def _differ_in_one_size(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """True for the heads [K, C] and [K], and the position embedding [1, N, C], of another K or N."""
    different = [i for i, (a, b) in enumerate(zip(found, expected)) if a != b]
    return len(found) == len(expected) and different == [max(len(expected) - 2, 0)]


# The gate of a checkpoint ------------------------------------------------------------------------

MAX_GATE = 1e6  # a larger one, infinity or NaN is none
GATE_NAMES = ("gate_scale", "gate_center")
GATE_DEFAULTS = {"gate_scale": 10.0, "gate_center": 30.0}
PUBLISHED_GATES = {"visualization-tiny": (5.0, 50.0)}  # not in the file's name


def resolve_gate(flags: dict[str, float | None], checkpoint: dict | None, location: str) -> dict[str, float]:
    """Gate scale and center, from the first source that knows them; says which, warns of conflicts.

    In this order: flags, what a checkpoint of ours records, its file name (NAME-SCALE-CENTER.pth),
    `args` inside a foreign checkpoint, the defaults.
    """
    sources = [("the command line", flags)]
    if checkpoint is not None:
        sources += [
            ("the checkpoint", _numbers(checkpoint.get("gate"))),
            ("the file name", _gate_in_name(location)),
            ("the checkpoint's args", _numbers(checkpoint.get("args")) if "gate" not in checkpoint else {}),
        ]
    chosen = {}
    for name in GATE_NAMES:
        known = [(source, values[name]) for source, values in sources if values.get(name) is not None]
        source, chosen[name] = known[0] if known else ("the defaults", GATE_DEFAULTS[name])
        log(f"{name} {chosen[name]:g}, from {source}")
        for other, value in known[1:]:
            if value != chosen[name]:
                warn(f"{name}: {source} says {chosen[name]:g}, {other} says {value:g}; {source} counts")
    return chosen


def _numbers(record: object) -> dict[str, float]:
    """Gate values in a dictionary or Namespace, where they are finite numbers."""
    values = record if isinstance(record, dict) else getattr(record, "__dict__", {})
    found = {name: values.get(name) for name in GATE_NAMES}
    return {name: float(v) for name, v in found.items() if isinstance(v, (int, float)) and abs(v) < MAX_GATE}


def _gate_in_name(location: str) -> dict[str, float]:
    stem = Path(location).stem
    if stem in PUBLISHED_GATES:
        return dict(zip(GATE_NAMES, PUBLISHED_GATES[stem]))
    match = re.fullmatch(r".+-(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", stem)
    return dict(zip(GATE_NAMES, map(float, match.groups()))) if match else {}
