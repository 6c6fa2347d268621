import gzip
import importlib.util
import json
import pickle

import numpy as np
import pytest
import torch
from conftest import AUGMENTATION, make_fashion, make_shards
from PIL import Image
from torch.utils.data import DataLoader

from datasets import (
    IMAGENET,
    build_dataset,
    evaluation_transform,
    image_name,
    spread_sample,
    training_transform,
)
from training.loaders import evaluation_loader
from utils import UserError, seed_everything

PLAIN = {"color_jitter": 0.0, "auto_augment": None, "re_prob": 0.0}
SIZE = (32, 32)


def train_and_val(name, root, augmentation=PLAIN, **options):
    """Build the training and the validation dataset."""
    return (build_dataset(name, root and str(root), train, SIZE, augmentation, **options) for train in (True, False))


def shard_dataset(root, train, num_classes=16, **options):
    return build_dataset("wds/", str(root), train, SIZE, PLAIN, num_classes=num_classes, **options)


def test_evaluation_crops_the_center_of_a_larger_image():
    """The shorter side is resized to 256/224 of the input size first."""
    pixels = np.zeros((512, 512, 3), np.uint8)
    pixels[:30] = 255  # outside the crop, which removes an eighth (32 of 512 on each side)
    image = evaluation_transform((224, 224))(Image.fromarray(pixels))
    assert image.shape == (3, 224, 224)
    assert IMAGENET.denormalize(image).max() == 0
    assert evaluation_transform((64, 96))(Image.fromarray(pixels)).shape == (3, 64, 96)


def test_small_evaluation_images_are_resized_without_crop():
    pixels = np.full((20, 28), 200, np.uint8)  # gray
    image = evaluation_transform(SIZE)(Image.fromarray(pixels))
    assert image.shape == (3, 32, 32)
    assert (IMAGENET.denormalize(image) == 200).all()


def test_small_training_images_are_shifted_and_flipped():
    pixels = np.arange(32, dtype=np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2) + 100
    transform = training_transform(SIZE, PLAIN)
    torch.manual_seed(0)
    first_rows = {tuple(IMAGENET.denormalize(transform(Image.fromarray(pixels)))[0, 16].tolist()) for _ in range(40)}
    assert len(first_rows) > 9  # nine shifts, both directions


def test_placed_training_images_are_neither_shifted_nor_flipped():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    transform = training_transform(SIZE, PLAIN, placed=True)
    assert torch.equal(
        IMAGENET.denormalize(transform(Image.fromarray(pixels))).permute(1, 2, 0), torch.from_numpy(pixels)
    )


def test_digits_have_a_fixed_split_and_random_places_in_training():
    train, val = train_and_val("DIGITS", None)
    assert (len(train), len(val)) == (1437, 360)
    assert train.classes == [str(d) for d in range(10)]
    assert max(np.bincount(val.targets)) - min(np.bincount(val.targets)) <= 2  # stratified
    assert not {p.tobytes() for p in val.pixels} & {p.tobytes() for p in train.pixels}
    assert val[5][0].shape == (3, 32, 32)
    assert torch.equal(val[5][0], val[5][0])
    torch.manual_seed(0)
    assert len({train[5][0].sum(0).sum(0).argmax().item() for _ in range(30)}) > 1


def test_image_folder(image_folder):
    for name in ("IMNET", "torch/image_folder"):  # the second is read by torchvision, through timm
        train, val = train_and_val(name, image_folder, AUGMENTATION)
        assert (len(train), len(val)) == (15, 9)
        assert train.classes == ["class_0", "class_1", "class_2"]
        assert train[0][0].shape == val[0][0].shape == (3, 32, 32)


def test_fashion_mnist_is_read_from_its_four_files(tmp_path):
    make_fashion(tmp_path, train=6, test=4)
    train, val = (build_dataset("FMNIST", str(tmp_path), part, (28, 28), PLAIN) for part in (True, False))
    assert (len(train), len(val), len(val.classes)) == (6, 4, 10)
    image, target = val[1]
    assert image.shape == (3, 28, 28)
    assert torch.equal(IMAGENET.denormalize(image)[0], val.data[1])
    assert target == val.targets[1]


def test_fashion_mnist_validation_needs_no_training_files(tmp_path):
    for file in make_fashion(tmp_path, train=6, test=4).glob("train-*"):
        file.unlink()
    assert len(build_dataset("FMNIST", str(tmp_path), False, (28, 28))) == 4


@pytest.mark.parametrize("name", ["CLUTTERED", "CLUTTERED_VARIED"])
def test_cluttered_images_are_random_in_training_and_fixed_in_validation(tmp_path, name):
    make_fashion(tmp_path, train=6, test=40)
    train, val = (build_dataset(name, str(tmp_path), part, (56, 56)) for part in (True, False))
    assert (len(train), len(val), len(val.classes)) == (6, 40, 10)
    for image, target in (train[1], val[1]):
        assert image.shape == (3, 56, 56)
        assert type(target) is int
    assert torch.equal(val[3][0], val[3][0])
    seed_everything(1)
    first, second = train[1][0], train[1][0]
    assert not torch.equal(first, second)
    seed_everything(1)
    assert torch.equal(train[1][0], first)


def test_cluttered_image_shows_the_full_article_and_eight_crops(tmp_path):
    """The article fits at exactly one place. Outside it, at most eight crops of 8 x 8 are not black."""
    make_fashion(tmp_path, train=6, test=40)
    val = build_dataset("CLUTTERED", str(tmp_path), False, (56, 56))
    places = set()
    for index in range(10):
        canvas, article = IMAGENET.denormalize(val[index][0])[0].long(), torch.from_numpy(val.pixels[index]).long()
        covers = (canvas.unfold(0, 28, 1).unfold(1, 28, 1) >= article).all(dim=(2, 3))
        assert covers.sum() == 1
        places.add(tuple(covers.nonzero()[0].tolist()))
        top, left = covers.nonzero()[0].tolist()
        canvas[top : top + 28, left : left + 28] = 0
        assert 0 < (canvas > 0).sum() <= 8 * 8 * 8
    assert len(places) > 5


def test_varied_images_follow_their_recorded_content(tmp_path):
    """An image is not black in at most the article's square and its crops, and contents span their ranges."""
    make_fashion(tmp_path, train=6, test=40)
    val = build_dataset("CLUTTERED_VARIED", str(tmp_path), False, (56, 56))
    contents = []
    for index in range(40):
        image, content = val.compose(index)
        area = content["side"] ** 2 + content["crops"] * 8 * 8 + content["overlays"] * 16 * 16
        assert image.shape == (56, 56)
        assert 0 < (image > 0).sum() <= area
        contents.append(content)
    sides, crops, overlays = ([content[name] for content in contents] for name in ("side", "crops", "overlays"))
    assert min(sides) >= 14
    assert max(sides) <= 49
    assert max(sides) > 2 * min(sides)
    assert set(crops) <= set(range(17))
    assert max(crops) > min(crops) + 8
    assert set(overlays) == {0, 2}


@pytest.mark.parametrize(
    "content", [b"", b"no gzip", gzip.compress(b"\0\0\x08\x01" + bytes(100))], ids=["empty", "no gzip", "labels"]
)
def test_broken_fashion_mnist_file_raises(tmp_path, content):
    (make_fashion(tmp_path, train=6, test=4) / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(UserError, match="not a Fashion-MNIST file"):
        build_dataset("FMNIST", str(tmp_path), False, (28, 28))


def make_inat(root, year):
    categories = [{"id": i, "name": f"species {i}", "genus": f"genus {i // 2}"} for i in range(4)]
    (root / "categories.json").write_text(json.dumps(categories))
    (root / "images").mkdir()
    for part, order in {"train": [2, 0, 3, 1], "val": [0, 1]}.items():
        images = [{"id": i, "file_name": f"images/{part}{i}.jpg"} for i in range(len(order))]
        annotations = [{"image_id": i, "category_id": c} for i, c in enumerate(order)]
        (root / f"{part}{year}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
        for image in images:
            Image.new("RGB", (40, 40), (10, 20, 30)).save(root / image["file_name"])
    return root


@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist_is_read_from_its_layout(tmp_path, name, year):
    make_inat(tmp_path, year)
    val = build_dataset(name, str(tmp_path), False, SIZE)
    assert val.classes == ["species 2", "species 0", "species 3", "species 1"]
    assert [target for _, target in val] == [1, 3]
    by_genus = build_dataset(name, str(tmp_path), True, SIZE, inat_category="genus")
    assert by_genus.classes == ["genus 1", "genus 0"]
    assert [target for _, target in by_genus] == [0, 1, 0, 1]


def test_invalid_inaturalist_raises(tmp_path):
    with pytest.raises(UserError, match=r"categories\.json"):
        build_dataset("INAT", str(tmp_path), False, SIZE)
    make_inat(tmp_path, 2018)
    with pytest.raises(UserError, match="has genus, name"):
        build_dataset("INAT", str(tmp_path), False, SIZE, inat_category="family")
    (tmp_path / "val2018.json").write_text("{}")
    with pytest.raises(UserError, match="not in iNaturalist's format"):
        build_dataset("INAT", str(tmp_path), False, SIZE)


@pytest.mark.parametrize("name", ["CIFAR", "CIFAR10", "FMNIST"])
def test_failed_download_raises(tmp_path, name, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("offline")

    for module in ("cifar", "mnist"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", offline)
    with pytest.raises(UserError, match="is missing and cannot be downloaded: offline"):
        build_dataset(name, str(tmp_path), False, SIZE)


def test_cifar_is_read_from_its_files(tmp_path, monkeypatch):
    content = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1], "label_names": list("abcdefghij")}
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    train, val = train_and_val("CIFAR10", tmp_path)
    assert (len(train), len(val), val.classes, val[0][0].shape) == (10, 2, list("abcdefghij"), (3, 32, 32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "missing", "no such folder"),
        (lambda root: root, "train is missing; expected"),
        (lambda root: (root / "train").mkdir() or root, "Couldn't find any class folder"),
        (lambda root: (root / "train" / "a").mkdir(parents=True) or root, "Found no image of the class a"),
        (lambda root: None, "needs --data-path"),
    ],
)
def test_invalid_image_folder_raises(tmp_path, make, message):
    folder = make(tmp_path)
    with pytest.raises(UserError, match=message):
        build_dataset("IMNET", folder and str(folder), True, SIZE, PLAIN)


# Through timm ------------------------------------------------------------------------------------


def labels(stream, workers, batch_size=4):
    stream.prepare_workers(workers)
    return [label for _, batch in DataLoader(stream, batch_size, num_workers=workers) for label in batch.tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_yields_each_image_once_per_epoch_in_a_new_order(tmp_path, workers):
    root = make_shards(tmp_path / "wds")
    train, val = shard_dataset(root, True, batch_size=4), shard_dataset(root, False)
    orders = []
    for epoch in range(2):
        train.set_epoch(epoch)
        orders.append(labels(train, workers))
    assert len(train) == 16
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert orders[0] != orders[1]
    assert labels(val, workers) == labels(val, workers)
    assert sorted(labels(val, workers)) == list(range(15))
    sample, targets = spread_sample(val, 3)
    assert sample.shape == (3, 3, 32, 32)
    assert targets.tolist() == labels(val, 0)[:3]


def test_number_of_workers_divides_the_shards(tmp_path, monkeypatch, capsys):
    root = make_shards(tmp_path / "wds", shards=9, images=1)
    assert [shard_dataset(root, True).prepare_workers(wanted) for wanted in (0, 1, 2, 3, 8, 10)] == [0, 1, 1, 3, 3, 9]
    assert shard_dataset(root, False).prepare_workers(8) == 8
    assert not capsys.readouterr().err
    monkeypatch.setattr("utils.world_size", lambda: 5)
    assert shard_dataset(root, True).prepare_workers(4) == 1
    assert "do not divide evenly" in capsys.readouterr().err
    monkeypatch.setattr("utils.world_size", lambda: 10)
    with pytest.raises(UserError, match="9 training shards are too few for 10 processes"):
        shard_dataset(root, True).prepare_workers(4)


def test_split_in_timms_notation(tmp_path):
    train = shard_dataset(make_shards(tmp_path / "wds"), True, split="train-{0000..0001}.tar|8", batch_size=4)
    assert sorted(labels(train, 1)) == list(range(8))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wds/", {}, "pass --num-classes"),
        ("wds/", {"num_classes": 16, "split": "test"}, "split test not found"),
        ("hfds/cifar10", {}, r"has the same name as datasets\.py"),
        ("mnist/x", {}, "unknown prefix; expected torch/, wds/, tfds/"),
        ("tfds/cifar10", {}, "needs the package tensorflow_datasets: pip install"),
        ("torch/nothing", {}, "Unknown torchvision dataset"),
    ],
)
def test_unreadable_timm_dataset_raises(tmp_path, name, options, message, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if "tensorflow" in name else find_spec(name))
    with pytest.raises(UserError, match=message):
        build_dataset(name, str(make_shards(tmp_path / "wds")), True, SIZE, PLAIN, **options)


def test_missing_or_broken_shards_raise(tmp_path):
    root = make_shards(tmp_path / "wds")
    for shard in root.glob("validation*.tar"):
        shard.write_bytes(b"nothing")
    with pytest.raises(UserError, match="no image can be read"):
        spread_sample(shard_dataset(root, False), 4)
    (root / "train-0002.tar").unlink()
    with pytest.raises(UserError, match=r"1 of 4 shards are missing, first train-0002\.tar"):
        shard_dataset(root, True)


@pytest.mark.parametrize("processes", [1, 2, 4, 7])
def test_validation_shards_are_split_across_any_number_of_processes(tmp_path, monkeypatch, processes):
    root = make_shards(tmp_path / "wds")
    monkeypatch.setattr("utils.world_size", lambda: processes)
    seen = []
    for rank in range(processes):
        monkeypatch.setattr("utils.rank", lambda rank=rank: rank)
        seen += labels(shard_dataset(root, False), 0)
    assert sorted(seen) == list(range(15))


def test_timm_options_for_another_dataset_raise():
    for option in ({"split": "test"}, {"num_classes": 10}):
        with pytest.raises(UserError, match="got DIGITS"):
            build_dataset("DIGITS", None, True, SIZE, PLAIN, **option)


def test_missing_package_of_a_reader_raises(tmp_path, monkeypatch):
    def create(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr("readers.streams.create_dataset", create)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "found")
    with pytest.raises(UserError, match="needs the package tensorflow: pip install tensorflow"):
        build_dataset("tfds/mnist", str(tmp_path), True, SIZE, PLAIN)


def test_sample_of_a_stream_does_not_change_its_loader(tmp_path):
    val = shard_dataset(make_shards(tmp_path / "wds", val_shards=4), False)
    loader = evaluation_loader(val, 2, num_workers=2, pin_memory=False)
    assert spread_sample(val, 3)[0].shape == (3, 3, 32, 32)
    assert sorted(label for batch in loader for label in batch.targets.tolist()) == sorted(i % 16 for i in range(20))


# Names -------------------------------------------------------------------------------------------


def test_image_names_are_paths_or_numbers(image_folder):
    data = build_dataset("IMNET", str(image_folder), False, SIZE)
    assert image_name(data, 4).endswith("class_1/1.png")
    assert image_name(build_dataset("DIGITS", None, False, SIZE), 4) == "image 4"
