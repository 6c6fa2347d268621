from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import AUGMENTATION, make_image_folder, make_shards
from PIL import Image

from datasets import UnreadableImage, build_dataset, load_image
from training.loaders import demo_loader, evaluation_loader, training_loader
from utils import RankError

SIZE = (32, 32)


def loader_of(images, workers=0, limit=100, seed=0, batch_size=4, repeated_aug=False):
    options = {"num_workers": workers, "pin_memory": False, "max_bad_images": limit}
    return training_loader(images, batch_size, seed=seed, repeated_aug=repeated_aug, **options)


def training_batches(folder, workers=0, epoch=0, batch=0, **options):
    loader = loader_of(build_dataset("IMNET", str(folder), True, SIZE, AUGMENTATION), workers, **options)
    loader.start_at(epoch, batch * loader.images_per_batch)
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches, loader


def same(some, others):
    return len(some) == len(others) and all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and a[2:] == b[2:]
        for a, b in zip(some, others)
    )


@pytest.mark.parametrize("repeated_aug", [False, True])
def test_batches_depend_only_on_their_position(image_folder, repeated_aug):
    """The number of workers and the first batch of an iteration change nothing."""
    whole, _ = training_batches(image_folder, repeated_aug=repeated_aug)
    assert len(whole) == 3
    for workers in (0, 1, 2):
        torch.manual_seed(workers)
        again, _ = training_batches(image_folder, workers, repeated_aug=repeated_aug)
        rest, _ = training_batches(image_folder, workers, batch=1, repeated_aug=repeated_aug)
        assert same(again, whole)
        assert same(rest, whole[1:])
    assert training_batches(image_folder, batch=3)[0] == []
    assert not same(training_batches(image_folder, epoch=1, repeated_aug=repeated_aug)[0], whole)
    assert not same(training_batches(image_folder, seed=1, repeated_aug=repeated_aug)[0], whole)


def test_views_of_an_image_differ_between_epochs(tmp_path):
    root = make_image_folder(tmp_path / "data", classes=1, train=1, val=1)
    loader = loader_of(build_dataset("IMNET", str(root), True, SIZE, AUGMENTATION), batch_size=1)
    views = []
    for epoch in range(3):
        loader.start_at(epoch)
        views += [batch.images for batch in loader]
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[1], views[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_batches_depend_only_on_their_position(tmp_path, workers):
    root = make_shards(tmp_path / "wds")

    def batches(epoch, batch=0):
        images = build_dataset("wds/", str(root), True, SIZE, AUGMENTATION, num_classes=16, batch_size=2)
        loader = loader_of(images, workers, batch_size=2)
        loader.start_at(epoch, batch * loader.images_per_batch)
        return list(loader)

    whole = batches(1)
    assert len(whole) == 8
    assert same(batches(1), whole)
    assert same(batches(1, batch=5), whole[5:])
    assert not same(batches(2), whole)


def test_stream_continues_after_whole_batches_of_another_size(tmp_path):
    images = build_dataset("wds/", str(make_shards(tmp_path / "wds")), True, SIZE, AUGMENTATION, num_classes=16)
    loader = loader_of(images, batch_size=3)
    assert (len(loader), loader.batches_per_epoch) == (5, 5)
    loader.start_at(0)
    whole = [batch.targets.tolist() for batch in loader]
    loader.start_at(0, images=8)
    assert len(loader) == 3
    assert [batch.targets.tolist() for batch in loader] == whole[2:]


def test_unreadable_images_are_counted_by_another_number_of_processes(image_folder, monkeypatch):
    _, loader = training_batches(image_folder)
    state = {"bad_images": [["a", "b"], [], ["c", "a"]]}
    loader.load_state_dict(state)
    assert loader.bad_images == ["a", "b", "c"]
    monkeypatch.setattr("utils.world_size", lambda: 2)
    monkeypatch.setattr("utils.rank", lambda: 1)
    loader.load_state_dict(state)
    assert loader.bad_images == []


# Unreadable images -------------------------------------------------------------------------------


def break_images(root, part, count=1):
    paths = sorted((root / part).rglob("*.png"))[:count]
    for path in paths:
        path.write_bytes(path.read_bytes()[:200])
    return paths


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_training_images_are_skipped_with_one_warning_each(image_folder, workers, capsys):
    broken = break_images(image_folder, "train", 2)
    batches, loader = training_batches(image_folder, workers)
    loader.start_at(1)
    batches += list(loader)
    assert [len(batch.images) for batch in batches] == [4] * 6
    warnings = capsys.readouterr().err
    seen = [path for path in broken if str(path) in warnings]
    assert len(loader.bad_images) == len(seen) >= 1
    assert all(warnings.count(f"{path}: cannot be read as an image") == 1 for path in seen)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_training_images_raise(image_folder, workers):
    break_images(image_folder, "train", 6)
    with pytest.raises(
        RankError, match=r"^/.*\.png: cannot be read as an image: .*; more than 2 images are unreadable"
    ):
        training_batches(image_folder, workers, limit=2)
    break_images(image_folder, "train", 15)
    with pytest.raises(RankError, match=r"^no image of a batch can be read: /.*\.png: cannot be read as an image"):
        training_batches(image_folder, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_validation_image_raises(image_folder, workers):
    (broken,) = break_images(image_folder, "val")
    images = build_dataset("IMNET", str(image_folder), False, SIZE)
    loader = evaluation_loader(images, 4, num_workers=workers, pin_memory=False)
    with pytest.raises(RankError, match=f"^{broken}: cannot be read as an image"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_label_out_of_range_raises(tmp_path, workers):
    root = make_shards(tmp_path / "wds")
    images = build_dataset("wds/", str(root), False, SIZE, num_classes=5)
    message = r"^a batch has labels from \d+ to \d+ but there are 5 classes; check --num-classes$"
    with pytest.raises(RankError, match=message):
        list(evaluation_loader(images, 4, num_workers=workers, pin_memory=False))


def save_palette(path):
    Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20) % 7 * 30).convert("P").save(path, transparency=0)


def save_upright_by_exif(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (30, 20), "red").save(path, exif=exif)


def save_animation(path):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


UNUSUAL = {
    "palette.png": save_palette,
    "cmyk.jpg": lambda path: Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(path),
    "sixteen.png": lambda path: Image.fromarray(np.full((20, 20), 200 * 256, np.uint16)).save(path),
    "sixteen.tiff": lambda path: Image.fromarray(np.full((20, 20), 200 * 256, np.uint16)).save(path),
    "bits.png": lambda path: Image.new("1", (20, 20), 1).save(path),
    "alpha.webp": lambda path: Image.new("RGBA", (20, 20), (200, 0, 0, 9)).save(path),
    "grey.jpg": lambda path: Image.new("L", (20, 20), 200).save(path),
    "turned.jpg": save_upright_by_exif,
    "thin.png": lambda path: Image.new("RGB", (1, 3000), "red").save(path),
    "flat.png": lambda path: Image.new("RGB", (3000, 1), "red").save(path),
    "dot.png": lambda path: Image.new("RGB", (1, 1), "red").save(path),
    "moving.gif": save_animation,
    "moving.webp": save_animation,
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_image_formats_load(tmp_path, name):
    for part in ("train", "val"):
        folder = tmp_path / part / "class"
        folder.mkdir(parents=True)
        UNUSUAL[name](folder / name)
    for train in (True, False):
        for size in (SIZE, (224, 224)):
            images = build_dataset("IMNET", str(tmp_path), train, size, AUGMENTATION)
            assert images[0][0].shape == (3, *size)
            assert torch.isfinite(images[0][0]).all()
    image = load_image(tmp_path / "train" / "class" / name)
    assert image.mode == "RGB"
    brightest = max(image.getpixel((0, 0)))
    assert brightest >= 200 or name == "palette.png"
    if name == "turned.jpg":
        assert image.size == (20, 30)
    if name.startswith("sixteen"):
        assert set(np.asarray(image).flatten()) == {200}


@pytest.mark.parametrize("pixels", [10_000, 14_000])
def test_decompression_bomb_raises(tmp_path, pixels):
    path = tmp_path / "bomb.png"
    Image.new("1", (pixels, 10_000)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        load_image(path)


def test_demo_loader_skips_unreadable_images_and_keeps_positions(image_folder, capsys):
    for name in ("class_0/0.png", "class_1/1.png", "class_1/2.png"):  # 3 of 9 images; the last two form a batch
        (image_folder / "val" / name).write_bytes(b"no image")
    data = build_dataset("IMNET", str(image_folder), False, (32, 32))
    seen = {}
    loader = demo_loader(data, 2, num_workers=0, pin_memory=False)
    for images, targets, places, names in loader:
        for image, target, place, name in zip(images, targets.tolist(), places, names):
            seen[place] = target
            assert torch.equal(image, data[place][0])
            assert image_folder / "val" / name == Path(data.samples[place][0])
    assert seen == {1: 0, 2: 0, 3: 1, 6: 2, 7: 2, 8: 2}
    assert len(loader.bad_images) == 3
    assert capsys.readouterr().err.count("the image is skipped") == 3
