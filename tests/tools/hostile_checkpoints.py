"""Load broken and hostile checkpoint files. Each must raise a UserError of one line, without executing code.

python tests/tools/hostile_checkpoints.py --files 600
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import pickle
import random
import struct
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).parents[1:3])

import torch  # noqa: E402
from conftest import halting_model  # noqa: E402
from safetensors.torch import save  # noqa: E402

from training.checkpoints import Checkpoint  # noqa: E402
from training.gate_settings import resolve_gate  # noqa: E402
from training.weights import load_weights  # noqa: E402
from utils import UserError  # noqa: E402


class Command:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path, function: Callable = os.mkdir):
        in_python = f"__import__('os').makedirs({str(path)!r}, exist_ok=True)"
        arguments = {os.system: f"mkdir -p {path}", eval: in_python, exec: in_python}
        self.reduced = function, (arguments.get(function, str(path)),)

    def __reduce__(self):
        return self.reduced


def torch_bytes(content: object, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def with_pickle(archive: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Return the zip archive with a changed data.pkl."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return result.getvalue()


def tar_of(name: str, content: bytes) -> bytes:
    result, member = io.BytesIO(), tarfile.TarInfo(name)
    member.size = len(content)
    with tarfile.open(fileobj=result, mode="w") as tar:
        tar.addfile(member, io.BytesIO(content))
    return result.getvalue()


def nested(depth: int) -> bytes:
    """Return a pickle of nested lists."""
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def bomb(levels: int) -> list:
    """Return a list that prints as 2 ** levels numbers."""
    inner = bomb(levels - 1) if levels > 1 else 0
    return [inner, inner]


class Kinds:
    """Generators of files: each method takes a random generator and returns the content of a file."""

    def __init__(self, trap: Path):
        self.trap = trap
        self.weights = dict(halting_model().state_dict())
        self.valid = torch_bytes({"model": self.weights, "epoch": 3})
        self.safe = save(self.weights)

    def truncated(self, choose):
        return self.valid[: choose.randrange(len(self.valid) - 1)]

    def random_bytes(self, choose):
        return choose.choice((b"", b"PK\x03\x04", b"\x80\x02")) + choose.randbytes(choose.randrange(5000))

    def changed_structure(self, choose):
        data = bytearray(self.valid)
        end = choose.choice((slice(0, 3000), slice(len(data) - 4000, len(data))))
        for _ in range(30):
            data[choose.randrange(*end.indices(len(data)))] ^= 1 << choose.randrange(8)
        return bytes(data[: choose.choice((len(data), len(data) - 50))])

    def pickle_that_runs_a_command(self, choose):
        functions = (os.mkdir, os.makedirs, os.system, exec, eval)
        return pickle.dumps({"model": Command(self.trap, choose.choice(functions))}, protocol=choose.randrange(5))

    def torch_file_that_runs_a_command(self, choose):
        options = {"_use_new_zipfile_serialization": choose.random() < 0.5}
        return torch_bytes({"model": self.weights, "args": Command(self.trap)}, **options)

    def zip_with_a_foreign_pickle(self, choose):
        foreign = pickle.dumps([Command(self.trap)] * choose.randrange(1, 9), protocol=2)
        return with_pickle(self.valid, lambda _: foreign)

    def changed_pickle(self, choose):
        def change(content):
            place = choose.randrange(2, len(content) - 1)
            return content[:place] + choose.randbytes(choose.randrange(1, 20)) + content[place + 5 :]

        return with_pickle(self.valid, change)

    def foreign_objects(self, choose):
        contents = (Path("x"), random.Random(3), random.Random, torch.nn.Linear(2, 2), io.BytesIO, type)
        return torch_bytes({"model": self.weights, "args": choose.choice(contents)})

    def not_a_dictionary(self, choose):
        return torch_bytes(
            choose.choice((3, "text", None, [self.weights], torch.ones(3), (1, 2), True, 2.5, [], set()))
        )

    def no_weights(self, choose):
        return torch_bytes(choose.choice(({}, {3: 4}, *({"model": wrong} for wrong in ({}, 3, {"a": 1}, [1], None)))))

    def tensors_that_are_no_weights(self, choose):
        odd = (
            torch.ones(5, 5).to_sparse(),
            torch.ones(2, 2, dtype=torch.complex64),
            torch.empty(3, device="meta"),
            torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            torch.eye(4).to_sparse_csr(),
        )
        return torch_bytes({"model": self.weights | {choose.choice(list(self.weights)): choose.choice(odd)}})

    def other_shapes(self, choose):
        name = choose.choice([n for n in self.weights if n != "pos_embed" and not n.startswith("head")])
        shape = [choose.randrange(0, 40) for _ in range(choose.randrange(5))]
        changed = torch.zeros(shape if shape != list(self.weights[name].shape) else [41])
        return torch_bytes({"model": self.weights | {name: changed}})

    def enormous_shapes(self, choose):
        shape = [choose.randrange(2**20, 2**31) for _ in range(choose.randrange(1, 3))]
        return torch_bytes({"model": self.weights | {"norm.weight": torch.zeros(1).expand(shape)}})

    def missing_and_foreign_names(self, choose):
        weights = dict(self.weights)
        for name in choose.sample(list(weights), choose.randrange(1, 9)):
            weights[name + choose.choice(("x", "\x1b[31m", "\n", " " * 999, "\0"))] = weights.pop(name)
        return torch_bytes({"model": weights})

    def deep_nesting(self, choose):
        return with_pickle(self.valid, lambda _: nested(choose.randrange(1_000, 200_000)))

    def lists_that_explode(self, choose):
        return torch_bytes({"model": bomb(choose.randrange(40, 90)), "args": bomb(60)})

    def zip_bombs(self, choose):
        result = io.BytesIO()
        with zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", nested(2) + bytes(choose.randrange(1, 30) * 1_000_000))
        return result.getvalue()

    def other_formats(self, choose):
        page = choose.choice((b"<html>404</html>", b'{"model": {}}', b"", b"\x89PNG\r\n", b"version https://git-lfs"))
        pickled = pickle.dumps(Command(self.trap))
        return choose.choice((page, gzip.compress(self.valid), tar_of("pickle", pickled), tar_of("storages", b"x")))

    def broken_safetensors(self, choose):
        data = bytearray(self.safe)
        header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}).encode()
        data[8 + choose.randrange(1, 300)] ^= 255
        enormous_header = struct.pack("<Q", choose.randrange(len(data), 2**63)) + self.safe[8:]
        enormous_shape = struct.pack("<Q", len(header)) + header + bytes(4)
        truncated = self.safe[: choose.randrange(9, len(data) - 1)]
        return choose.choice((bytes(data), enormous_header, enormous_shape, truncated))


KINDS = [name for name in vars(Kinds) if not name.startswith("_")]


def try_file(kinds: Kinds, name: str, choose: random.Random) -> str:
    """Load a file into a model, as every command does. Returns 'refused', or a description of what happened instead."""
    path, result = kinds.trap.with_name("checkpoint.pth"), "accepted"
    path.write_bytes(getattr(kinds, name)(choose))
    try:
        checkpoint = Checkpoint.load(str(path))
        with contextlib.redirect_stdout(io.StringIO()):
            resolve_gate({}, checkpoint.gate_sources())
        load_weights(halting_model(), checkpoint.state_dict(), str(path), replace_head=False)
    except UserError as error:
        result = "refused" if len(str(error)) < 5000 else "refused at length"
    except BaseException as error:
        result = f"{type(error).__name__}: {error}"
    if kinds.trap.exists():
        kinds.trap.rmdir()
        result = "CODE WAS RUN"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=600, help="number of files (default: 600)")
    files, refused, choose = parser.parse_args().files, 0, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        kinds = Kinds(Path(folder) / "trap")
        for number in range(files):
            result = try_file(kinds, KINDS[number % len(KINDS)], choose)
            refused += result == "refused"
            if result != "refused":
                print(f"{number} {KINDS[number % len(KINDS)]}: {result[:200]}", flush=True)
    print(f"{refused} of {files} files of {len(KINDS)} kinds refused")
    sys.exit(refused != files)


if __name__ == "__main__":
    main()
