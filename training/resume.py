"""What a resumed run compares with its checkpoint: flags, optimizer, and the data and order of the images."""

from __future__ import annotations

from typing import NamedTuple

import utils
from datasets import dataset_digest
from training.loaders import ImageLoader, StreamLoader
from utils import UserError, warn

# A resumed run may change these flags without changing its result.
HARMLESS_FLAGS = {
    *("resume", "output_dir", "num_workers", "pin_mem", "tensorboard", "dist_url", "world_size"),
    *("checkpoint_steps", "keep", "max_bad_images"),
    "opt",  # another optimizer is an error, see `check_optimizer`
    "gate",  # has no effect
}
GATE_FLAGS = {"gate_scale", "gate_center"}
ORDER_FLAGS = ("seed", "repeated_aug")  # they set the order of the images in an epoch
# What else a changed flag means, by name of the flag and whether it is on now
EFFECTS = {
    ("halting", True): "the averages of the epoch start again",
    ("halting", False): "the averages of the epoch start again",
    ("model_ema", True): "the average starts at the resumed weights",
    ("model_ema", False): "the recorded average is dropped",
    ("target_macs", True): "best.pth starts again",
    ("target_macs", False): "best.pth starts again, and nothing keeps the budget",
}


def check_optimizer(flags: dict, recorded: dict, location: str) -> None:
    """Raise UserError if a checkpoint was saved with another --opt, whose state this optimizer cannot use."""
    before, now = recorded.get("opt"), flags.get("opt")
    if "opt" in recorded and isinstance(now, str) and str(before).lower() != now.lower():
        raise UserError(
            f"--opt {now}: {location} holds the state of --opt {before}, which {now} cannot continue; "
            f"pass --opt {before}, or --finetune {location} to start a new run from its weights"
        )


def warn_changed_flags(flags: dict, recorded: dict, processes: int) -> None:
    """Warn about flags that differ from the resumed run's and may change its result."""
    changes = []
    if processes != utils.world_size():
        changes.append(f"the number of processes was {processes} and is now {utils.world_size()}")
    for name in flags.keys() - HARMLESS_FLAGS:
        is_restored = name in GATE_FLAGS and flags[name] is None  # the gate is the checkpoint's
        if name in recorded and recorded[name] != flags[name] and not is_restored:
            changes.append(_change(name, recorded[name], flags[name]))
    if "gate" in recorded and flags.get("gate") not in (None, recorded["gate"]):
        warn(f"--gate {flags['gate']} has no effect: a resumed run keeps its gate")
    if changes:
        warn(f"the resumed run has other flags, so its result may differ: {'; '.join(sorted(changes))}")


def warn_skipped_images(loader: ImageLoader, epoch: int, images: int) -> None:
    """Warn if an epoch that resumes after `images` images skips more of them than an uninterrupted one.

    Batches of another size may not fill the rest of the epoch, and an incomplete batch is never used.
    """
    skipped, usual = (_incomplete_images(loader, epoch, start) for start in (images, 0))
    if skipped > usual:
        warn(
            f"the last {skipped} images of epoch {epoch} are skipped: they do not fill a batch of "
            f"{loader.images_per_batch} (over all processes)"
        )


def _incomplete_images(loader: ImageLoader, epoch: int, images: int) -> int:
    """Return the number of images over all processes that no batch of the epoch contains."""
    if isinstance(loader, StreamLoader) or not loader.drop_last:
        return 0
    loader.start_at(epoch, images)
    return (len(loader.sampler) - len(loader) * loader.batch_size) * utils.world_size()


def _change(name: str, before: object, now: object) -> str:
    effect = f" ({effect})" if (effect := EFFECTS.get((name, bool(now)))) else ""
    if name == "halting":  # its flag is --no-halting
        name, before, now = "no_halting", not before, not now
    shown = repr(before)[:80] if isinstance(before, str | int | float | None) else "another value"
    return f"--{name.replace('_', '-')} was {shown} and is now {now!r}{effect}"


# Data and order of the images --------------------------------------------------------------------


def data_record(loader: ImageLoader) -> dict:
    """Return a checkpoint's record of the training data: number of images, digest, and a stream's division."""
    record = {"images": loader.num_images, "digest": dataset_digest(loader.images)}
    if isinstance(loader, StreamLoader):
        record["stream"] = [loader.batch_size, loader.num_workers, utils.world_size()]
    return record


class OrderChanges(NamedTuple):
    """The reasons why a run that resumes inside an epoch cannot continue exactly.

    data: how the training data has changed, or "". order: how the order of the same images has changed, or "".
    limit: largest number of images that the change of the order repeats, if it is known.
    """

    data: str = ""
    order: str = ""
    limit: int | None = None

    @classmethod
    def between(cls, recorded: dict, flags: dict, data: object, loader: ImageLoader, images: int) -> OrderChanges:
        """Compare the recorded flags and data with those of the run.

        data: the checkpoint's `data_record`, of any type, or None. images: number of images done in the epoch.
        """
        current = data_record(loader)
        data_change = _data_change(data, current) if isinstance(data, dict) else ""
        changed = [name for name in ORDER_FLAGS if name in recorded and recorded[name] != flags.get(name)]
        if changed and not isinstance(loader, StreamLoader):
            return cls(data_change, " and ".join(f"--{name.replace('_', '-')}" for name in changed) + " changed")
        before, now = (data.get("stream"), current.get("stream")) if isinstance(data, dict) else (None, None)
        if before is None or now is None or before == now:
            return cls(data_change)
        return cls(data_change, *_stream_change(before, now, images))

    def warn(self, epoch: int, done: int, total: int) -> None:
        """Print one warning if something has changed.

        epoch, done, total: the epoch at which the run continues, and its numbers of images: done and over all.
        """
        if not 0 < done < total:
            if self.data:
                first = epoch + (done > 0)
                finished = f"epoch {epoch} ends after the {done} images that are done, and " if done else ""
                warn(f"{self.data}; {finished}the run continues with the present data from epoch {first} on")
            return
        reasons = "; ".join(filter(None, (self.data, self.order)))
        limit = min(done, total - done)
        limit = limit if self.data or self.limit is None else min(limit, self.limit)
        if reasons and limit:
            warn(
                f"{reasons}, so epoch {epoch} cannot continue exactly. It continues after {done} of {total} images in "
                f"another order: it may repeat up to {limit} images and skip as many"
            )


def _data_change(before: dict, now: dict) -> str:
    if before.get("images") != now["images"]:
        return f"the training data had {before.get('images')} images and now has {now['images']}"
    if before.get("digest") != now["digest"]:
        return f"the {now['images']} training images have other names or labels than before"
    return ""


def _stream_change(before: list, now: list, images: int) -> tuple[str, int | None]:
    """Return how the division of a stream has changed, and the largest number of images read twice, if known.

    before, now: batch size, data-loader workers and processes. Each worker makes every n-th batch from its own shards.
    """
    names = ("batch size", "data-loader workers", "processes")
    texts = [f"{name} {old} -> {new}" for name, old, new in zip(names, before, now, strict=True) if old != new]
    limit = None
    if before[1:] == now[1:]:
        batch_size, workers, processes = now
        done, again = (
            _images_by_worker(images // (size * processes), size, workers) for size in (before[0], batch_size)
        )
        limit = processes * sum(abs(old - new) for old, new in zip(done, again))
    return f"a stream is divided by {', '.join(texts)}", limit


def _images_by_worker(batches: int, batch_size: int, workers: int) -> list[int]:
    workers = max(workers, 1)  # 0 stands for the process itself
    return [batch_size * (batches // workers + (worker < batches % workers)) for worker in range(workers)]
