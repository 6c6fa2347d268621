"""Visualization commands, end to end in this process."""

import json
import time

import numpy as np
import pytest
import torch
from conftest import halting_model, images, make_image_folder, save_halting_micro
from PIL import Image
from torch.utils.data import TensorDataset

import main_act
import visualize
from datasets import IMAGENET
from training.checkpoints import Checkpoint
from training.loaders import demo_loader
from visualization import heatmaps
from visualization.demo import draw_demo
from visualization.draw import RenderJob

KINDS = ("ref", "token_depth", "combined")
SMALL = ("--model", "avit_micro_patch4_32", "--input-size", "32", "--num_workers", "0", "--batch-size", "4")


def run_main(*argv):
    main_act.main([*SMALL, *map(str, argv)])


def status_of(command, *argv) -> int:
    with pytest.raises(SystemExit) as stopped:
        command(*argv)
    return stopped.value.code


# --demo ------------------------------------------------------------------------------------------


def run_demo(folder, model, dataset, **options):
    names = [f"class {c}" for c in range(model.num_classes)]
    loader = demo_loader(dataset, 5, num_workers=0, pin_memory=False)
    draw_demo(RenderJob(model, "none", folder, names, heatmaps.Style(model.num_blocks, "hot"), **options), loader)


def test_demo_shows_the_image_with_largest_depth_spread(tmp_path):
    model, x, targets = halting_model(), images(12), torch.arange(12) % 3
    run_demo(tmp_path, model, TensorDataset(x, targets))
    names = {f"class{c}_{kind}.jpg" for c in range(3) for kind in KINDS}
    assert {p.name for p in tmp_path.iterdir()} == names | {"teaser.png"}
    with torch.no_grad():
        depth = model.eval()(x, return_halting=True)[1].depth[:, 1:]
    assert len(depth.unique()) >= 4
    for c in range(3):
        members = (targets == c).nonzero()[:, 0]
        shown = members[depth[members].std(dim=1, correction=0).argmax()]
        picture = np.asarray(Image.open(tmp_path / f"class{c}_ref.jpg")).astype(float)
        pixels = IMAGENET.denormalize(x[shown]).permute(1, 2, 0).numpy()
        expected = np.asarray(heatmaps.enlarge(pixels, heatmaps.Style(8))).astype(float)
        assert np.abs(picture - expected).mean() < 10  # JPEG


@pytest.mark.slow
def test_thousand_classes_are_drawn_within_two_minutes(tmp_path):
    class Many(torch.utils.data.Dataset):
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            return torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(index)), index

    start = time.perf_counter()
    run_demo(tmp_path, halting_model(img_size=224, patch_size=16, num_classes=1000), Many())
    seconds = time.perf_counter() - start
    print(f"1,000 classes, inference included: {seconds:.0f} s")
    assert len(list(tmp_path.glob("*.jpg"))) == 3000
    assert seconds < 120


def test_demo_without_matching_image_warns(tmp_path, capsys):
    model = halting_model()
    with torch.no_grad():
        targets = model.eval()(images(4)).argmax(dim=1)
    run_demo(tmp_path, model, TensorDataset(images(4), targets), criterion="wrong", html=True)
    assert "no image meets --demo-by wrong" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_demo_flags_with_unreadable_image_exits_with_one(image_folder, tmp_path, capsys):
    checkpoint = save_halting_micro(tmp_path / "c.pth", 3)
    (image_folder / "val" / "class_1" / "0.png").write_bytes(b"no image")
    (image_folder / "imagenet_class_index.json").write_text(json.dumps({"0": ["class_0", "a <b>fish</b>"]}))
    flags = ("--demo-images", 2, "--demo-by", "random", "--demo-dir", tmp_path / "drawn", "--html")
    assert status_of(run_main, "--data-path", image_folder, "--demo", "--finetune", checkpoint, *flags) == 1
    assert "0.png: cannot be read as an image" in capsys.readouterr().err
    names = {f"class{c}{number}_{kind}.jpg" for c in range(3) for number in ("", "_2") for kind in KINDS}
    assert {p.name for p in (tmp_path / "drawn").iterdir()} == names | {"teaser.png", "index.html"}
    page = (tmp_path / "drawn" / "index.html").read_text()
    assert "fish" in page
    assert "<b>fish" not in page


# visualize.py IMAGE... ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("visualize") / "micro.pth"
    args = {"model": "avit_micro_patch4_32", "input_size": [32]}
    return save_halting_micro(path, 3, args=args, classes=["class_0", "class_1", "class_2"])


def run_visualize(*argv):
    visualize.main([*map(str, argv), "--num_workers", "0", "--batch-size", "4"])


@pytest.fixture
def photos(tmp_path):
    """A directory of five images in three formats, two with equal names, one in a directory named after a class."""
    folder = tmp_path / "photos"
    (folder / "class_1").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.webp", "d e.png", "class_1/a.png"):
        Image.fromarray(rng.integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_files_directories_and_globs_get_distinct_names(photos, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "token_act_visualization"
    (photos / f"{'é' * 120}.png").write_bytes((photos / "a.png").read_bytes())
    (photos / f"{'é' * 121}.png").write_bytes((photos / "a.png").read_bytes())
    run_visualize("photos/b.jpg", "photos", "photos/*.webp", "--finetune", checkpoint, "--html")
    stems = ("a", "a_2", "b", "c", "d e", "é" * 100, f"{'é' * 100}_2")
    expected = {f"{stem}_{end}" for stem in stems for end in ("panel.png", "halting.gif")}
    assert {p.name for p in out.iterdir()} == expected | {"index.html"}
    assert Image.open(out / "a_halting.gif").n_frames == 12
    assert "class_1" in (out / "index.html").read_text()


def test_size_and_animation_flags_change_the_output(photos, checkpoint, tmp_path):
    for folder, *options in (("64", "--size", 64), ("128", "--size", 128, "--cmap", "hot", "--input-size", 16, 40)):
        options += ["--animation", "webp" if folder == "64" else "none", "--output-dir", tmp_path / folder]
        run_visualize(photos / "a.png", "--finetune", checkpoint, *options)
    assert {p.name for p in (tmp_path / "64").iterdir()} == {"a_panel.png", "a_halting.webp"}
    assert {p.name for p in (tmp_path / "128").iterdir()} == {"a_panel.png"}
    small, large = (Image.open(tmp_path / folder / "a_panel.png").width for folder in ("64", "128"))
    assert large > 1.7 * 40 / 16 * small


def test_unreadable_images_are_skipped_with_a_warning(photos, checkpoint, tmp_path, capsys):
    (photos / "b.jpg").write_bytes((photos / "b.jpg").read_bytes()[:200])
    argv = (photos, photos / "gone.png", "--finetune", checkpoint, "--output-dir", tmp_path / "out")
    assert status_of(run_visualize, *argv) == 1
    err = capsys.readouterr().err
    assert "b.jpg: cannot be read as an image" in err
    assert "gone.png: no such file or directory" in err
    assert len(list((tmp_path / "out").glob("*.gif"))) == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "pass exactly one of: images, --summary, --curves"),
        ("a.png --summary --finetune c.pth", "pass exactly one of"),
        ("a.png", "--finetune is required"),
        ("gone.png --finetune {c}", "gone.png: no such file or directory"),
        ("{empty} --finetune {c}", "this directory contains no image"),
        ("{empty}/*.png --finetune {c}", "no file matches this pattern"),
        ("a.png --finetune {c} --cmap hott", "did you mean hot"),
        ("{photos} --finetune {c} --model avit_tiny_patch16_224", "use --model avit_micro_patch4_32"),
        ("{photos}/notes.txt --finetune {c}", "no image could be read"),
        ("--curves {empty}", "log.txt"),
        ("{photos} --finetune {c} --input-size 32 32 99", "--input-size takes one number"),
        ("a.png --finetune {c} --amp fp16", "--amp fp16 needs CUDA"),
        (
            "{photos}/a.png a_panel.png --finetune {c} --output-dir .",
            "a_panel.png is an input and would be overwritten",
        ),
        ("--summary --data-path data --finetune {c}", "cannot predict class_3: the dataset has "),
        (f"{'x' * 300}.png --finetune {{c}}", "no such file or directory"),
    ],
)
def test_invalid_input_fails_with_one_line(argv, message, photos, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_panel.png").touch()
    make_image_folder(tmp_path / "data", classes=4, train=0, val=1)
    argv = argv.format(c=checkpoint, photos=photos, empty=tmp_path / "empty")
    assert status_of(run_visualize, *argv.split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("visualize.py: error: ")
    assert message in last


def test_static_model_has_full_depth_everywhere(image_folder, tmp_path):
    static = save_halting_micro(tmp_path / "c.pth", 3, gate=None)
    run_visualize("--summary", "--data-path", image_folder, "--finetune", static, "--output-dir", tmp_path / "out")
    assert "12.00 of 12" in (tmp_path / "out" / "summary.html").read_text()


# visualize.py --summary, --curves ----------------------------------------------------------------


def test_summary_with_unreadable_image_exits_with_one(image_folder, checkpoint, tmp_path, capsys):
    (image_folder / "val" / "class_1" / "0.png").write_bytes(b"no image")
    out = tmp_path / "out"
    argv = ("--summary", "--data-path", image_folder, "--finetune", checkpoint, "--output-dir", out, "--html")
    assert status_of(run_visualize, *argv) == 1
    charts = ("depth_histogram", "live_tokens", "class_token_depth", "class_depths", "accuracy_against_depth")
    expected = {f"{name}.png" for name in (*charts, "halting_scores")} | {"summary.html", "index.html"}
    assert {p.name for p in out.iterdir()} == expected
    page = (out / "summary.html").read_text()
    assert page.count("data:image/png;base64,") >= 6
    assert "avit_micro_patch4_32" in page
    captured = capsys.readouterr()
    assert "0.png: cannot be read as an image" in captured.err
    assert "wrote the summary of 8 images" in captured.out


def test_training_run_gives_curves_and_tensorboard_images(image_folder, tmp_path):
    out = tmp_path / "run"
    gate = ("--gate_scale", 10, "--gate_center", 5)
    run_main("--data-path", image_folder, "--output_dir", out, "--epochs", 2, *gate, "--tensorboard")
    run_visualize("--curves", out, "--output-dir", tmp_path / "curves")
    assert {p.name for p in (tmp_path / "curves").iterdir()} == {"curves.png", "accuracy_macs.png"}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out), size_guidance={"histograms": 0}).Reload()
    assert [event.step for event in events.Images("test/token_depth")] == [0, 1]
    last = json.loads((out / "log.txt").read_text().splitlines()[-1])
    histogram = events.Histograms("test/depth")[-1].histogram_value
    assert histogram.sum == pytest.approx(last["test_depth_mean"])
    assert sum(histogram.bucket) == pytest.approx(1)
    assert list(Checkpoint.load(str(out / "checkpoint.pth")).names_by_class()) == ["class_0", "class_1", "class_2"]
