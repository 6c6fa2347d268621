"""The preparation of Open Clip Art, on generated pictures."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from datasets import Preprocessing, build_dataset, evaluation_transform
from experiments.clipart import prepare


def drawing(seed, size=(60, 60), color=(0, 0, 0)):
    """Return spots of a color that differ between seeds, on transparency."""
    spots = np.random.default_rng(seed).integers(0, 2, (6, 6), dtype=np.uint8) * 255
    image = Image.new("RGBA", size, (*color, 0))
    image.putalpha(Image.fromarray(spots).resize(size, Image.Resampling.BICUBIC))
    return image


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def name(number):
    """Return letters, because names that differ in numbers only are near-copies."""
    return "thing_" + "".join(chr(ord("a") + int(digit)) for digit in f"{number:03}")


def fill(source, category, count=50, seed=0):
    for number in range(count):
        save(drawing((seed, number)), source / category / "inner" / f"{category} {name(number)}.png")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Return a folder with two categories of 50 pictures, which are prepared in a small size to be quick."""
    monkeypatch.setattr(prepare, "SIDE", 72)
    monkeypatch.setattr(prepare, "MARGIN", 4)
    fill(tmp_path / "png", "animals")
    fill(tmp_path / "png", "food", seed=1)
    return tmp_path / "png"


def run(source, out):
    prepare.main([str(source), str(out)])
    return {str(file.relative_to(out)): file.read_bytes() for file in out.glob("*/*/*/*.png") if file.is_file()}


def prepared(image, tmp_path, **options):
    """Return the picture without its white margin."""
    pixels = np.asarray(prepare.load(save(image, tmp_path / "picture.png", **options)))
    inner = pixels[16:-16, 16:-16]
    assert inner.sum(dtype=int) + 255 * (pixels.size - inner.size) == pixels.sum(dtype=int)
    return inner


def test_evaluation_cuts_nothing_off(tmp_path):
    """Evaluation at 224 x 224 pixels keeps the pixels inside the margin, and does not scale them."""
    file = save(drawing(0, (300, 300)), tmp_path / "picture.png")
    expected = np.asarray(prepare.load(file))[16:-16, 16:-16]
    tensor = evaluation_transform((224, 224), Preprocessing())(prepare.load(file))
    pixels = (
        tensor * torch.tensor(Preprocessing().std)[:, None, None] + torch.tensor(Preprocessing().mean)[:, None, None]
    )
    np.testing.assert_allclose(pixels.permute(1, 2, 0) * 255, expected, atol=1e-3)


def test_folders_are_read_as_data_set(source, tmp_path, capsys):
    run(source, tmp_path / "out")
    search, final = ({True: 0, False: 0} for _ in range(2))
    for part, sizes in (("search", search), ("final", final)):
        for train in sizes:
            images = build_dataset("IMNET", str(tmp_path / "out" / part), train, (224, 224))
            assert images.classes == ["animals", "food"]
            sizes[train] = len(images)
    assert (search, final) == ({True: 64, False: 12}, {True: 64, False: 24})
    assert "| all | 64 | 12 | 24 |" in capsys.readouterr().out
    assert not (tmp_path / "out.partial").exists()


def test_result_is_deterministic_and_parts_share_no_picture(source, tmp_path):
    files, again = run(source, tmp_path / "out"), run(source, tmp_path / "again")
    assert files == again
    names = [path.rpartition("/")[2] for path in files if not path.startswith("final/train")]
    assert len(names) == len(set(names)) == 100


def test_transparency_is_white_and_picture_is_centered(tmp_path):
    pixels = prepared(Image.new("RGBA", (40, 20), (200, 0, 0, 0)), tmp_path)
    assert pixels.shape == (224, 224, 3)
    assert (pixels == 255).all()
    pixels = prepared(Image.new("RGBA", (40, 20), (0, 0, 0, 128)), tmp_path)
    assert (pixels[56:168] == 127).all()
    assert (pixels[:56] == 255).all()
    assert (pixels[168:] == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "1"])
def test_other_modes_keep_their_colors(mode, tmp_path):
    pixels = prepared(Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode), tmp_path)
    assert (pixels == 255).all()
    pixels = prepared(Image.new("RGB", (8, 8), (0, 0, 0)).convert(mode), tmp_path)
    assert (pixels == 0).all()


def test_palette_with_transparent_color(tmp_path):
    image = Image.new("P", (224, 224), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 112, 224))
    pixels = prepared(image, tmp_path, transparency=0)
    assert (pixels[:, :112] == 255).all()
    assert (pixels[:, 112:] == (0, 0, 255)).all()


def test_animation_gives_first_frame_and_one_pixel_fills_the_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("blue", "red")]
    assert (prepared(frames[0], tmp_path, save_all=True, append_images=frames[1:]) == (0, 0, 255)).all()
    assert (prepared(Image.new("RGB", (1, 1), "red"), tmp_path) == (255, 0, 0)).all()
    assert prepared(Image.new("RGB", (1, 900), "red"), tmp_path).min() == 0


def test_edges_are_smooth(tmp_path):
    image = Image.fromarray(np.tile(np.uint8([[0, 255], [255, 0]]), (560, 560)))  # a checkerboard of single pixels
    assert abs(prepared(image, tmp_path).astype(int) - 127).max() < 10


def test_unreadable_blank_and_huge_pictures_are_counted(source, tmp_path, capsys, monkeypatch):
    (source / "food" / "broken.png").write_bytes(b"no picture")
    whole = save(drawing(0), source / "food" / "cut.png").read_bytes()
    (source / "food" / "cut.png").write_bytes(whole[:-60])
    save(Image.new("RGBA", (9, 9)), source / "food" / "blank.png")
    save(drawing(1, (300, 300)), source / "food" / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 224 * 224)
    assert len(run(source, tmp_path / "out")) >= 100
    assert "1 blank" in (text := capsys.readouterr().out)
    assert "3 unreadable or too large" in text


def test_picture_in_two_categories_is_left_out(source, tmp_path, capsys):
    fill(source, "unsorted")
    kept, dropped = (source / "animals" / f"{word}.png" for word in ("hare", "hen"))
    for seed, file in enumerate((kept, dropped), start=5):
        save(drawing(seed), file)
    (source / "animals" / "inner" / "same.png").symlink_to(kept)
    (source / "unsorted" / "same.png").symlink_to(kept)
    (source / "food" / "hen.png").symlink_to(dropped)
    names = " ".join(run(source, tmp_path / "out"))
    assert "hare" in names
    assert "hen" not in names
    assert "unsorted" not in names
    assert "1 in several categories" in capsys.readouterr().out


def test_small_categories_are_left_out_and_large_ones_cut(source, tmp_path, monkeypatch, capsys):
    fill(source, "plants", 49, seed=2)
    monkeypatch.setattr(prepare, "MAX_PICTURES", 30)
    files = run(source, tmp_path / "out")
    assert {path.split("/")[2] for path in files} == {"animals", "food"}
    assert "| food | 20 | 3 | 7 |" in capsys.readouterr().out


def test_names_with_odd_characters_stay_apart(source, tmp_path):
    for seed, odd in enumerate(("été\n?.png", "a&b.png", "a+b.png", "-x.png"), start=50):
        save(drawing(seed), source / "food" / odd)
    files = {path for path in run(source, tmp_path / "out") if not path.startswith("final/train")}
    assert len(files) == 104
    assert all(path.isascii() and path.isprintable() and " " not in path for path in files)


def pictures(*pairs):
    return [prepare.Picture(path, b"", prepare.outline(prepare.square(image))) for path, image in pairs]


def groups_of(*pairs):
    return sorted(sorted(picture.path for picture in members) for members in prepare.group(pictures(*pairs)))


def disks(seed, side=224, tint=0):
    """Return five disks of random place, size and gray level on transparency; tint: added to the blue channel."""
    random = np.random.default_rng(seed)
    image = Image.new("RGBA", (4 * side, 4 * side))
    for _ in range(5):
        left, top, width, height = random.uniform([0, 0, 0.2, 0.2], [0.6, 0.6, 0.4, 0.4]) * image.width
        gray = random.integers(0, 120)
        place = (left, top, left + width, top + height)
        ImageDraw.Draw(image).ellipse(place, (gray, gray, gray + tint, 255))
    return image.resize((side, side))


@pytest.mark.parametrize("seed", range(5))
def test_recolored_scaled_and_padded_copies_are_a_group(seed):
    padded = Image.new("RGBA", (300, 300))
    padded.paste(disks(seed), (50, 20))
    copies = {"b/tinted.png": disks(seed, tint=100), "a/large.png": disks(seed, 500), "c/padded.png": padded}
    for path, copy in copies.items():
        pairs = [("a/cat.png", disks(seed)), (path, copy), ("a/dog.png", disks(seed + 5))]
        assert groups_of(*pairs) == [sorted(["a/cat.png", path]), ["a/dog.png"]], path


@pytest.mark.parametrize(
    ("first", "second", "is_copy"),
    [
        ("a/dog_drawn_01.png", "a/dog_drawn_02.png", True),
        ("a/dog_05b.png", "b/inner/Dog12.png", True),
        ("a/arrow-red.png", "a/arrow_green_3.png", True),
        ("a/dog_jim_01.png", "a/dog_eve_01.png", False),
        ("a/reddish.png", "a/greenish.png", False),
        ("a/01.png", "a/02.png", False),
        ("shapes/stars/x.png", "shapes/stars/y.png", True),
        ("shapes/stars/x.png", "shapes/starship/y.png", False),
    ],
)
def test_names_that_differ_in_numbers_and_colors_are_a_group(first, second, is_copy):
    assert len(groups_of((first, drawing(1)), (second, drawing(2)))) == 2 - is_copy


def test_group_is_transitive():
    assert len(groups_of(("a/x1.png", drawing(1)), ("a/y.png", drawing(2)), ("a/x2.png", drawing(2)))) == 1


def part_of(path, parts):
    return {part for part, members in parts.items() for picture in members if picture.path == path}


def test_groups_stay_together_and_large_ones_are_for_training():
    groups = [pictures(*((f"a/{name(n)}_{copy}.png", drawing(n)) for copy in range(1 + n % 6))) for n in range(60)]
    groups += [pictures(*((f"a/series{copy}.png", drawing(99)) for copy in range(30)))]
    parts = prepare.choose(groups)
    assert {part: bool(members) for part, members in parts.items()} == {"train": True, "val": True, "test": True}
    for members in groups[:-1]:
        used = set.union(*(part_of(picture.path, parts) for picture in members))
        assert len(used) == 1
        assert len(members) <= prepare.MAX_HELD_OUT_GROUP or used == {"train"}
    assert sum("series" in picture.path for picture in parts["train"]) == prepare.MAX_GROUP
    sizes = {part: len(members) / sum(map(len, parts.values())) for part, members in parts.items()}
    assert sizes == pytest.approx({"train": 5 / 8, "val": 1 / 8, "test": 1 / 4}, abs=0.02)


def test_training_pictures_that_resemble_held_out_ones_are_left_out():
    pairs = [(f"a/{name(n)}.png", disks(n)) for n in range(40)]
    pairs += [(f"a/{name(n)}_again.png", disks(n, tint=90)) for n in range(40)]
    singles = [[picture] for picture in pictures(*pairs)]  # as if no group had been found
    parts = prepare.choose(singles)
    held_out = parts["val"] + parts["test"]
    assert len(held_out) == 30
    assert 0 < len(parts["train"]) < 50
    assert prepare.num_differing(parts["train"], held_out).min() >= prepare.MIN_DISTANCE


def test_parts_do_not_depend_on_the_order_of_groups():
    groups = [pictures((f"a/{name(n)}.png", drawing(n))) for n in range(60)]
    assert prepare.choose(groups) == prepare.choose(groups[::-1])


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        prepare.main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip()


def test_bad_input_ends_with_one_line(source, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none"):
        error = error_of(capsys, folder, tmp_path / "out")
        assert f"{folder}: no category folder with PNG files" in error
        assert "\n" not in error
    assert f"{tmp_path / 'empty'} exists; remove it" in error_of(capsys, source, tmp_path / "empty")
    few = tmp_path / "few"
    save(drawing(1), few / "food" / "pie.png")
    assert "no category has 50 pictures that are not near-copies" in error_of(capsys, few, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_category_of_near_copies_only_raises(source, tmp_path, capsys):
    for number in range(50):
        save(drawing((3, number)), source / "tools" / f"{'abc'[number % 3] * 9}_{number}.png")
    assert "no picture of tools for" in error_of(capsys, source, tmp_path / "out")


def test_near_copies_in_all_categories_raise(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "SIDE", 72)
    monkeypatch.setattr(prepare, "MARGIN", 4)
    fill(tmp_path / "png", "animals")
    for number, file in enumerate(sorted((tmp_path / "png" / "animals" / "inner").iterdir())):
        file.rename(file.with_name(f"{'abc'[number % 3]}_{number}.png"))
    assert "no picture of animals for val" in error_of(capsys, tmp_path / "png", tmp_path / "out")


def test_interrupted_writing_leaves_no_folder_and_can_be_repeated(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Path, "symlink_to", lambda *_: (_ for _ in ()).throw(RuntimeError))
        with pytest.raises(RuntimeError):
            run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(run(source, tmp_path / "out")) >= 100
