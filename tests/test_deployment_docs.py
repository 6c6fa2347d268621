"""The programs of docs/deployment.md: they predict as PyTorch, from the same pixels as every command."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from test_export_onnx import expected

import export_onnx
from datasets import CROP_MODES, IMAGENET, INTERPOLATIONS, Preprocessing, evaluation_transform, load_image
from training.checkpoints import Checkpoint

DEPLOYMENT = (ROOT / "docs" / "deployment.md").read_text()
WHOLE = Preprocessing(interpolation="bilinear", crop_pct=1.0, crop_mode="squash")
SIZES = [(32, 32), (56, 56), (48, 32)]


def code_of_docs(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", DEPLOYMENT, flags=re.DOTALL)[1]


def metadata(size: tuple[int, int], preprocessing: Preprocessing) -> dict:
    """Return the metadata of an exported graph, as far as preprocessing is concerned."""
    return {"image_size": size, "classes": ["a", "b"], **preprocessing.record()}


def expected_pixels(path: Path, size: tuple[int, int], preprocessing: Preprocessing) -> np.ndarray:
    """Return the pixels that every command passes to the model: [3, H, W]."""
    return evaluation_transform(size, preprocessing)(load_image(path)).numpy()


def pixels_of_python(path: Path, size: tuple[int, int], preprocessing: Preprocessing) -> np.ndarray:
    """Run the page's Python program on an image, with a graph that only records its input: [3, H, W]."""
    inputs = []

    def run(_, feed):
        inputs.append(feed["images"])
        return np.zeros((1, 2)), np.zeros(12)

    properties = {name: json.dumps(value) for name, value in metadata(size, preprocessing).items()}
    session = SimpleNamespace(run=run, get_modelmeta=lambda: SimpleNamespace(custom_metadata_map=properties))
    runtime = ModuleType("onnxruntime")
    runtime.SessionOptions, runtime.InferenceSession = SimpleNamespace, lambda *_: session
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", runtime)
        patch.setattr(sys, "argv", ["classify.py", "graph.onnx", str(path)])
        exec(code_of_docs("python"), {})
    return inputs[0][0]


# Images of many kinds -----------------------------------------------------------------------------


def shapes(width: int = 45, height: int = 30) -> Image.Image:
    """Return an image without symmetry: [height, width, 3] in color."""
    image = Image.new("RGB", (width, height), "navy")
    draw = ImageDraw.Draw(image)
    draw.ellipse((2, 3, width // 2, height // 2), "orange")
    draw.polygon([(width // 2, height - 2), (width - 2, height - 4), (width - 5, 1)], "white")
    return image


def write_images(folder: Path) -> list[Path]:
    """Write images of many modes, bit depths, orientations and shapes, and return their paths."""
    image, rng = shapes(), np.random.default_rng(0)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        image.save(folder / f"orientation_{orientation}.jpg", exif=exif, quality=95)
    transparent = image.copy()
    transparent.putalpha(image.convert("L").point(lambda level: 255 - level))
    converted = {mode: image.convert(mode) for mode in ("L", "LA", "P", "1")}
    for name, one in {**converted, "RGBA": transparent, "tall": shapes(10, 500), "wide": shapes(500, 12)}.items():
        one.save(folder / f"{name}.png")
    image.quantize(8).save(folder / "animation.gif", save_all=True, append_images=[Image.new("P", image.size)])
    for bits in (8, 12, 16):
        Image.fromarray(rng.integers(0, 2**bits, (30, 45), dtype=np.uint16)).save(folder / f"{bits}_of_16_bits.png")
    return sorted(folder.iterdir())


def write_images_of_pillow(folder: Path) -> list[Path]:
    """Write images that only Pillow reads as intended: CMYK, 32 bits and floating point."""
    shapes().convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    for white in (1.0, 255.0, 65535.0):
        levels = np.random.default_rng(0).random((30, 45), dtype=np.float32) * white
        Image.fromarray(levels).save(folder / f"float_{white:g}.tif")
    Image.fromarray(np.arange(0, 1350, dtype=np.int32).reshape(30, 45)).save(folder / "32_bits.tif")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("preprocessing", [IMAGENET, WHOLE], ids=["center", "whole"])
def test_python_program_sees_the_pixels_of_every_command(tmp_path, size, preprocessing):
    write_images(tmp_path)
    for path in write_images_of_pillow(tmp_path):
        found, pixels = (see(path, size, preprocessing) for see in (pixels_of_python, expected_pixels))
        np.testing.assert_allclose(found, pixels, rtol=0, atol=1e-5, err_msg=path.name)


def test_orientation_and_bit_depth_matter(tmp_path):
    """The images of the other tests differ if a program ignores what they differ in."""
    write_images(tmp_path)
    upright, *turned = (load_image(tmp_path / f"orientation_{number}.jpg") for number in range(1, 9))
    resized = [np.asarray(image.resize((32, 32)), float) for image in (upright, *turned)]
    assert min(np.abs(resized[0] - image).max() for image in resized[1:]) > 50
    assert np.asarray(load_image(tmp_path / "16_of_16_bits.png")).std() > 50


@given(
    st.integers(5, 80),
    st.integers(5, 80),
    st.sampled_from(SIZES),
    st.sampled_from(INTERPOLATIONS),
    st.floats(0.5, 1),
    st.sampled_from(CROP_MODES),
)
def test_python_program_follows_the_metadata(tmp_path, width, height, size, interpolation, crop_pct, crop_mode):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    preprocessing = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), interpolation, crop_pct, crop_mode)
    found, pixels = (see(path, size, preprocessing) for see in (pixels_of_python, expected_pixels))
    np.testing.assert_allclose(found, pixels, rtol=0, atol=1e-5)


# With ONNX Runtime and Node.js --------------------------------------------------------------------


def test_example_of_the_docs_prints_the_line_of_the_page(tmp_path):
    checkpoint = re.search(r"python export_onnx.py (\S+) graph.onnx", DEPLOYMENT)[1]
    image, line = re.search(r"python classify.py graph.onnx (\S+)\n# (.*)", DEPLOYMENT).groups()
    export_onnx.main([str(ROOT / checkpoint), str(tmp_path / "graph.onnx")])
    script = [sys.executable, "-c", code_of_docs("python"), "graph.onnx", str(ROOT / image)]
    result = subprocess.run(script, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert result.stdout.strip() == line


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """A folder with the quickstart's model after a few epochs as graph.onnx, image.png, and PyTorch's prediction."""
    folder = tmp_path_factory.mktemp("quickstart")
    recipe = [f"@{ROOT}/recipes/digits_adaptive.args", "--epochs", "2", "--output_dir", str(folder / "run")]
    subprocess.run([sys.executable, "main_act.py", *recipe], cwd=ROOT, check=True, capture_output=True)
    export_onnx.main([str(folder / "run" / "checkpoint.pth"), str(folder / "graph.onnx")])
    Image.fromarray(digit()).save(folder / "image.png")
    model = Checkpoint.load(str(folder / "run" / "checkpoint.pth")).build_model()
    x = evaluation_transform((32, 32))(Image.open(folder / "image.png")).unsqueeze(0)
    logits, live = expected(model, x)
    classes = list(Checkpoint.load(str(folder / "run" / "checkpoint.pth")).names_by_class().values())
    print_metadata = shlex.split(re.search(r"python (-c .*) > graph.json", DEPLOYMENT)[1])
    printed = subprocess.run([sys.executable, *print_metadata], cwd=folder, check=True, capture_output=True, text=True)
    (folder / "graph.json").write_text(printed.stdout)
    (folder / "expected.json").write_text(json.dumps([classes[logits.argmax()], live[0].tolist()]))
    return folder


def digit() -> np.ndarray:
    """Return an image of a three: [32, 32, 3] uint8."""
    from sklearn.datasets import load_digits

    return np.kron(load_digits().images[3], np.ones((4, 4))).clip(0, 15).astype(np.uint8)[..., None].repeat(3, 2) * 16


def assert_predicted(output: str, folder: Path) -> None:
    name, live = json.loads((folder / "expected.json").read_text())
    assert json.loads(output) == {"class": name, "live": live}


@pytest.mark.slow
def test_python_example_of_the_docs_predicts_as_pytorch(quickstart):
    script = [sys.executable, "-c", code_of_docs("python"), "graph.onnx", "image.png"]
    result = subprocess.run(script, cwd=quickstart, check=True, capture_output=True, text=True)
    assert_predicted(result.stdout, quickstart)


@pytest.fixture(scope="module")
def node_folder(quickstart) -> Path:
    """The folder of the quickstart's model, with the packages of the page's JavaScript program."""
    if shutil.which("npm") is None:
        pytest.skip("needs Node.js")
    install = ["npm", "install", "--no-audit", "--no-fund", "onnxruntime-web", "sharp"]
    installed = subprocess.run(install, cwd=quickstart, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"onnxruntime-web does not install: {installed.stderr[-200:]}")
    return quickstart


@pytest.mark.slow
def test_javascript_example_of_the_docs_predicts_as_pytorch(node_folder):
    (node_folder / "classify.mjs").write_text(code_of_docs("javascript"))
    script = ["node", "classify.mjs", "graph.onnx", "image.png"]
    result = subprocess.run(script, cwd=node_folder, check=True, capture_output=True, text=True)
    assert_predicted(result.stdout, node_folder)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("preprocessing", [IMAGENET, WHOLE], ids=["center", "whole"])
def test_javascript_program_sees_the_pixels_of_every_command(node_folder, tmp_path, size, preprocessing):
    """They differ by rounding: by 2 of 255 levels at most, and in few pixels."""
    program, _, _ = code_of_docs("javascript").partition("const session")
    (node_folder / "pixels.mjs").write_text(f"{program}console.log(JSON.stringify([...images]))")
    (tmp_path / "graph.json").write_text(json.dumps(metadata(size, preprocessing)))
    (tmp_path / "images").mkdir()
    for path in write_images(tmp_path / "images"):
        script = ["node", str(node_folder / "pixels.mjs"), str(tmp_path / "graph.onnx"), str(path)]
        result = subprocess.run(script, check=True, capture_output=True, text=True)
        pixels = expected_pixels(path, size, preprocessing)
        difference = np.abs(np.array(json.loads(result.stdout)) - pixels.ravel()) * min(IMAGENET.std) * 255
        assert difference.max() < 2.5, path.name
        assert difference.mean() < 0.2, path.name


@pytest.mark.slow
def test_javascript_program_refuses_cmyk(node_folder, tmp_path):
    shapes().convert("CMYK").save(tmp_path / "cmyk.jpg")
    (node_folder / "classify.mjs").write_text(code_of_docs("javascript"))
    script = ["node", "classify.mjs", "graph.onnx", str(tmp_path / "cmyk.jpg")]
    result = subprocess.run(script, cwd=node_folder, check=False, capture_output=True, text=True)
    assert result.returncode != 0
    assert "cmyk.jpg is CMYK; convert it to RGB" in result.stderr
