import numpy as np
import pytest
import torch
from conftest import halting_model, images
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import visualize

CPU = torch.device("cpu")


def run_demo(tmp_path, order=range(12), batch_size=5, model=None):
    model = model or halting_model()
    x, targets = images(12), torch.arange(12) % 3
    order = list(order)
    loader = DataLoader(TensorDataset(x[order], targets[order]), batch_size)
    return visualize.demo(model, loader, CPU, "none", tmp_path), model, x, targets


def test_the_image_whose_patch_depths_vary_most_is_shown(tmp_path):
    folder, model, x, targets = run_demo(tmp_path)
    assert folder == tmp_path / "token_act_visualization"
    names = {f"class{c}_{kind}.jpg" for c in range(3) for kind in ("ref", "token_depth", "combined")}
    assert {p.name for p in folder.iterdir()} == names | {"rows.png"}
    with torch.no_grad():
        depth = model.eval()(x, return_halting=True)[1].depth[:, 1:]
    assert len(depth.unique()) >= 4
    for c in range(3):
        members = (targets == c).nonzero()[:, 0]
        shown = members[depth[members].std(dim=1, correction=0).argmax()]
        picture = np.asarray(Image.open(folder / f"class{c}_ref.jpg")).astype(float)
        pixels = visualize.denormalize(x[shown]).permute(1, 2, 0).numpy()
        expected = np.asarray(visualize.enlarge(Image.fromarray(pixels))).astype(float)
        assert np.abs(picture - expected).mean() < 10  # JPEG


def test_order_and_batch_size_do_not_matter(tmp_path):
    first = run_demo(tmp_path / "a")[0]
    second = run_demo(tmp_path / "b", order=reversed(range(12)), batch_size=12)[0]
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_pictures_have_equal_height_and_follow_the_grid(tmp_path):
    depth = np.arange(1, 9, dtype=float).reshape(2, 4)
    specimen = visualize.Specimen(1.0, 0, np.zeros((16, 32, 3), np.uint8), depth)
    visualize._draw(specimen, 8, tmp_path / "class0")
    pictures = {name: Image.open(tmp_path / f"class0_{name}.jpg") for name in ("ref", "token_depth", "combined")}
    assert len({p.height for p in pictures.values()}) == 1
    assert pictures["ref"].size == (512, 256)
    colors = visualize.colors(depth, 8)
    shown = np.asarray(visualize.heat_map(depth, 8, (512, 256)))
    assert (shown[64::128, 64::128] == colors).all()


def test_whiter_is_deeper_and_full_depth_is_white():
    shades = visualize.colors(np.arange(1, 13, dtype=float), 12).astype(int).sum(axis=1)
    assert (np.diff(shades) > 0).all()
    assert (visualize.colors(np.array([12.0]), 12) == 255).all()
    assert (visualize.colors(np.array([24.0]), 24) == 255).all()


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (40, 300)])
def test_enlarging_keeps_the_shape(size):
    picture = visualize.enlarge(Image.new("RGB", size))
    assert min(picture.size) >= visualize.PICTURE_SIZE
    assert picture.width * size[1] == picture.height * size[0]
