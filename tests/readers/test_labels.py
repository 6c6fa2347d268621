"""Images and labels that do not belong together."""

import gzip
import json
import shutil

import numpy as np
import pytest
from conftest import make_fashion
from PIL import Image

from datasets import build_dataset
from utils import UserError

SIZE = (28, 28)


def idx(array: np.ndarray, magic: int | None = None, shape: tuple[int, ...] | None = None) -> bytes:
    """Encode an IDX file, with another magic number or another shape if given."""
    header = [magic or 0x800 + array.ndim, *(shape or array.shape)]
    return gzip.compress(np.array(header, ">u4").tobytes() + array.tobytes())


LABELS = np.arange(20, dtype=np.uint8) % 10
FILES = {
    "other number": (idx(LABELS[:19]), r"images-idx3-ubyte.gz \(20\) and the labels of .*labels-idx1.* \(19\)"),
    "unknown class": (idx(LABELS + 5), r"labels-idx1-ubyte.gz are from 5 to 14, but there are 10 classes"),
    "truncated": (idx(LABELS)[:-9], "labels-idx1-ubyte.gz: not a Fashion-MNIST file"),
    "too short": (idx(LABELS, shape=(30,)), "it declares 30 values and holds 20"),
    "negative": (idx(LABELS, shape=(2**32 - 1,)), "it declares 4294967295 values and holds 20"),
    "magic number": (idx(LABELS, 77), "the magic number is 77, not 2049"),
}


@pytest.mark.parametrize("name", ["FMNIST", "CLUTTERED"])
@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_fashion_mnist_labels_must_fit_the_images(tmp_path, name, content, message):
    (make_fashion(tmp_path) / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(UserError, match=message):
        build_dataset(name, str(tmp_path), False, SIZE)


def test_swapped_fashion_mnist_labels_raise(tmp_path):
    make_fashion(tmp_path)
    shutil.copy(tmp_path / "train-labels-idx1-ubyte.gz", tmp_path / "t10k-labels-idx1-ubyte.gz")
    with pytest.raises(UserError, match=r"\(20\) and .*t10k-labels.* \(120\) differ in number"):
        build_dataset("FMNIST", str(tmp_path), False, SIZE)


@pytest.mark.parametrize("name", ["FMNIST", "torch/fashion_mnist"])
def test_downloaded_labels_must_fit_the_images(tmp_path, name):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.parent.mkdir()
    make_fashion(raw)
    for path in raw.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert len(build_dataset(name, str(tmp_path), False, SIZE)) == 20
    (raw / "t10k-labels-idx1-ubyte").write_bytes(gzip.decompress(idx(LABELS[:9])))
    with pytest.raises(UserError, match=r"\(20\) and .*labels \(9\) differ in number"):
        build_dataset(name, str(tmp_path), False, SIZE)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"nothing")
    with pytest.raises(UserError):
        build_dataset(name, str(tmp_path), False, SIZE)


# iNaturalist -------------------------------------------------------------------------------------


@pytest.fixture
def inat(tmp_path):
    """Write iNaturalist with two classes in training, and return a function that writes annotations of validation."""
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    categories = [{"id": number, "name": f"species {number}"} for number in range(3)]
    (tmp_path / "categories.json").write_text(json.dumps(categories))

    def write(part: str, annotations: dict[int, int], images: int = 3) -> None:
        content = {
            "images": [{"id": number, "file_name": "0.png"} for number in range(images)],
            "annotations": [{"image_id": image, "category_id": category} for image, category in annotations.items()],
        }
        (tmp_path / f"{part}2018.json").write_text(json.dumps(content))
        return build_dataset("INAT", str(tmp_path), part == "train", SIZE)

    write("train", {0: 0, 1: 1, 2: 0})
    return write


def test_inaturalist_image_without_annotation_is_counted(inat, capsys):
    assert len(inat("val", {0: 0, 1: 1, 2: 1})) == 3
    assert not capsys.readouterr().err
    assert len(inat("val", {0: 0})) == 1
    assert "val2018.json: skipped 2 of 3 images, which have no annotation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "annotations", "message"),
    [
        ("val", {0: 0, 7: 1}, "val2018.json: 1 of 2 annotations have an unknown image_id, first 7"),
        ("val", {0: 0, 1: 2}, "val2018.json: 1 of 2 annotations have an unknown category_id, first 2"),
        ("train", {0: 9}, "train2018.json: 1 of 1 annotations have an unknown category_id, first 9"),
    ],
)
def test_inaturalist_annotation_of_an_unknown_image_or_class_raises(inat, part, annotations, message):
    with pytest.raises(UserError, match=message):
        inat(part, annotations)
