"""The walk through folders: each file is used or counted, through every reader of folders."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import make_image_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets import UnreadableImage, build_dataset, find_image_files, load_image
from readers.folders import ClassFolders, is_hidden, split_folder
from utils import UserError
from visualization.draw import find_images

SIZE = (32, 32)
READERS = ["IMNET", "torch/image_folder", "torch/folder"]


def put(folder: Path, *names: str) -> None:
    """Write small images, or any content under other names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path, "PNG")


def test_broken_links_are_named(tmp_path, capsys):
    root = make_image_folder(tmp_path / "data", classes=2, train=0, val=2)
    (root / "val" / "class_2").symlink_to(tmp_path / "disk")
    assert len(build_dataset("IMNET", str(root), False, SIZE)) == 4
    assert "skipped files that are not images: 1 broken links\n" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipe_with_the_name_of_an_image_is_unreadable(tmp_path):
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(UnreadableImage, match="it is not a regular file"):
        load_image(tmp_path / "0.png")


@pytest.mark.parametrize("name", READERS)
def test_what_is_left_out_is_counted_in_one_warning(name, tmp_path, capsys):
    root = make_image_folder(tmp_path / "data", classes=2, train=0, val=2)
    put(root / "val", ".ipynb_checkpoints/0.png", "@eaDir/0.png", "stray0.png", "stray1.PNG", "list.csv", ".DS_Store")
    put(root / "val" / "class_0", "deep/0.png", "notes.txt", "._0.png")
    images = build_dataset(name, str(root), False, SIZE)
    assert images.classes == ["class_0", "class_1"]
    assert len(images) == 5
    assert capsys.readouterr().err == (
        f"warning: {root / 'val'}: skipped files that are not images: 1 .csv, 1 .txt, 4 hidden; "
        "skipped 2 images next to the class folders. To use them, move each into its class folder\n"
    )


@pytest.mark.parametrize("name", READERS)
def test_clean_folders_do_not_warn(name, image_folder, capsys):
    build_dataset(name, str(image_folder), False, SIZE)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", READERS)
def test_empty_class_and_images_without_class_raise(name, tmp_path):
    put(tmp_path / "val", "0.png", "1.png")
    with pytest.raises(UserError, match=r"Couldn't find any class folder in .*val, but 2 images"):
        build_dataset(name, str(tmp_path), False, SIZE)
    put(tmp_path / "val" / "cat", ".hidden.png", "notes.txt")
    with pytest.raises(UserError, match="Found no image of the class cat"):
        build_dataset(name, str(tmp_path), False, SIZE)


def test_unreadable_folder_raises(tmp_path, monkeypatch):
    put(tmp_path, "val/cat/0.png", "val/cat/locked/1.png")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UserError, match="locked: the folder cannot be read: Permission denied"):
        build_dataset("IMNET", str(tmp_path), False, SIZE)


@pytest.mark.parametrize(
    ("folders", "split", "found"),
    [
        (["train", "validation"], "validation", "validation"),
        (["training", "val"], "validation", "val"),
        (["training", "val"], "train", "training"),
        (["train", "test"], "test", "test"),
        (["cat", "dog"], "train", "."),
    ],
)
def test_split_is_found_as_in_timm(tmp_path, folders, split, found):
    for folder in folders:
        (tmp_path / folder).mkdir()
    assert split_folder(tmp_path, split) == tmp_path / found


def test_missing_split_raises(image_folder):
    with pytest.raises(UserError, match="no folder for the split 'tset'; found train, val"):
        build_dataset("torch/image_folder", str(image_folder), False, SIZE, split="tset")


def test_imagenet_of_torchvision_uses_the_same_walk(image_folder, capsys):
    names = {f"class_{number}": (f"name {number}", "synonym") for number in range(3)}
    torch.save((names, []), image_folder / "meta.bin")
    put(image_folder / "val", ".ipynb_checkpoints/0.png", "stray.png")
    images = build_dataset("torch/imagenet", str(image_folder), False, SIZE)
    assert (images.classes, len(images)) == (["class_0", "class_1", "class_2"], 9)
    assert "1 hidden; skipped 1 image next to the class folders" in capsys.readouterr().err


# Any tree ----------------------------------------------------------------------------------------

NAMES = [
    "a.png",
    "b.JPG",
    ".hidden.png",
    "._a.jpg",
    "notes.txt",
    "Thumbs.db",
    "list",
    "e.webp",
    ".dir",
    "@eaDir",
    "x",
    "y",
]
TREES = st.recursive(st.none(), lambda below: st.dictionaries(st.sampled_from(NAMES), below, max_size=5), max_leaves=20)


def write(folder: Path, tree: dict, links: list) -> None:
    """Write a tree: a folder for each dictionary, else an empty file; folders for `links` go into the list."""
    folder.mkdir()
    links.append(folder)
    for name, below in tree.items():
        if isinstance(below, dict):
            write(folder / name, below, links)
        else:
            (folder / name).touch()


def expected(folder: Path) -> tuple[set[Path], int]:
    """Return the image files of a folder, and the number of other files, hidden folders included."""
    images, others = set(), 0
    for path in folder.iterdir():
        if is_hidden(path.name):
            others += 1
        elif path.is_dir() and not path.is_symlink():
            below, more = expected(path)
            images, others = images | below, others + more
        elif not path.is_dir():
            is_image = path.suffix.lower() in {".png", ".jpg", ".webp"}
            images |= {path} if is_image else set()
            others += not is_image
    return images, others


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), TREES, max_size=6), st.booleans())
def test_each_file_is_used_or_counted(tree, with_loop):
    with TemporaryDirectory() as folder:
        root, folders = Path(folder, "root"), []
        write(root, tree, folders)
        if with_loop:
            (folders[-1] / "loop").symlink_to(root)
        images, others = expected(root)
        files, skipped = find_image_files(root)
        assert (set(files), sum(skipped.values())) == (images, others)
        assert len(files) == len(set(files))
        assert set(find_images([str(root)])[0]) == images
        classes = [path for path in root.iterdir() if path.is_dir() and not is_hidden(path.name)]
        if not classes or not all(find_image_files(path)[0] for path in classes):
            with pytest.raises(UserError, match=r"any class folder|no image of the class"):
                ClassFolders(root)
        else:
            dataset = ClassFolders(root)
            assert {Path(path) for path, _ in dataset.samples} | {root / name for name in dataset.beside} == images
            assert dataset.skipped == skipped
