"""Decoding: metadata never decide whether an image can be read, 12 bits in 16, transparency."""

import io
import multiprocessing
import re
import struct
import tarfile
import zlib

import numpy as np
import pytest
from conftest import make_image_folder, make_shards
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from datasets import build_dataset
from readers import images
from readers.images import UnreadableImage, load_image
from training.loaders import evaluation_loader

PIXELS = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
UPRIGHT = np.rot90(PIXELS, -1)  # as the orientation 6 of EXIF requires
ORIENTATION = 0x0112


def encoded(kind: str, **options) -> bytes:
    """Encode the pixels without loss, as far as the format allows."""
    options |= {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    content = io.BytesIO()
    Image.fromarray(PIXELS).save(content, kind, **options)
    return content.getvalue()


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = 6
    tags[0x010F] = "maker"
    return tags


def read(content: bytes) -> np.ndarray:
    return np.asarray(load_image(io.BytesIO(content), "x"))


def is_close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether two images are equal up to what JPEG loses."""
    return found.shape == expected.shape and np.abs(found.astype(int) - expected).mean() < 4


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(content: bytes, *chunks: bytes, after: bytes = b"IHDR") -> bytes:
    """Insert chunks into a PNG file after the first chunk of a kind."""
    start = content.index(after) - 4
    end = start + 12 + struct.unpack(">I", content[start : start + 4])[0]
    return content[:end] + b"".join(chunks) + content[end:]


# Metadata ----------------------------------------------------------------------------------------

LONG, BOMB = b"layer " * 500_000, zlib.compress(bytes(200_000_000))
PROFILE = chunk(b"iCCP", b"name\0\0" + zlib.compress(LONG))
CHUNKS = {
    "long zTXt": [chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LONG))],
    "long iTXt": [chunk(b"iTXt", b"Comment\0\x01\0\0\0" + zlib.compress(LONG))],
    "long XMP": [chunk(b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0" + zlib.compress(LONG))],
    "many texts": [chunk(b"tEXt", b"Comment\0" + LONG)] * 30,
    "large profile": [PROFILE],
    "bomb": [chunk(b"zTXt", b"Comment\0\0" + BOMB), chunk(b"iCCP", b"name\0\0" + BOMB)],
    "unknown compression": [chunk(b"zTXt", b"Comment\0\x07abc"), chunk(b"iCCP", b"name\0\x07abc")],
    "too short": [chunk(kind, b"") for kind in (b"iCCP", b"sRGB", b"pHYs", b"gAMA", b"tRNS", b"acTL", b"fcTL")],
    "wrong checksum": [chunk(b"tEXt", b"Comment\0abc")[:-4] + b"abcd"],
}


@pytest.mark.parametrize("after", [b"IHDR", b"IDAT"])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_png_is_read_whatever_its_ancillary_chunks(chunks, after):
    content = with_chunks(encoded("PNG", exif=exif()), *chunks, after=after)
    assert (read(content) == UPRIGHT).all()


def test_pillows_limits_stay():
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    read(with_chunks(encoded("PNG"), *CHUNKS["bomb"]))
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def test_png_that_ends_in_a_text_is_read():
    content = with_chunks(encoded("PNG"), chunk(b"tEXt", b"Comment\0" + LONG), after=b"IDAT")
    assert (read(content[:-1000]) == PIXELS).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_truncated_pixels_raise(kind):
    content = encoded(kind, exif=exif())
    with pytest.raises(UnreadableImage):
        read(content[: len(content) // 2] if kind != "TIFF" else content[:200])


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


SEGMENTS = {
    "JFIF": (0xE0, b"JFIF\0"),
    "profile": (0xE2, b"ICC_PROFILE\0"),
    "Photoshop": (0xED, b"Photoshop 3.0\0" + b"8BIM" + b"\0\0"),
    "Adobe": (0xEE, b"Adobe"),
    "several images": (0xE2, b"MPF\0II*\0" + bytes(40)),
    "padding": (0xFE, b"comment" + b"\xff" * 9),
}


@pytest.mark.parametrize(("marker", "data"), SEGMENTS.values(), ids=SEGMENTS)
def test_jpeg_is_read_whatever_its_segments(marker, data):
    content = encoded("JPEG", exif=exif())
    assert is_close(read(content[:2] + segment(marker, data) + content[2:]), UPRIGHT)


def test_orientation_counts_next_to_other_metadata_that_are_broken():
    """Pillow fails when it writes the tags back that it has read."""
    tags = exif().tobytes().replace(b"maker\0", b"\xff\xff\xff\xff\xff\xff")
    for content in (encoded("PNG", exif=tags), encoded("JPEG", exif=tags), encoded("WEBP", exif=tags)):
        assert is_close(read(content), UPRIGHT)


def test_webp_that_ends_in_its_metadata_is_read():
    content = encoded("WEBP", xmp=b"<x>" + LONG)
    assert (read(content[:-1000]) == PIXELS).all()


@pytest.mark.parametrize("kind", [b"xml ", b"uuid"])
def test_jpeg_2000_is_read_whatever_its_boxes(kind):
    content = encoded("JPEG2000")
    start = content.index(b"jp2c") - 4
    box = struct.pack(">I", 8 + len(LONG)) + kind + LONG
    assert (read(content[:start] + box + content[start:]) == PIXELS).all()


METADATA = {
    "JPEG": [b"Exif\0\0", b"ICC_PROFILE\0", b"http://ns.adobe.com/xap/1.0/\0"],
    "PNG": [b"eXIf", b"iCCP", b"zTXt", b"iTXt"],
    "WEBP": [b"EXIF", b"ICCP", b"XMP "],
    "TIFF": [],
}
TIFF_METADATA = {271, 274, 282, 283, 296, 700, 34665, 34675}


def metadata_places(kind: str, content: bytes) -> list[int]:
    """Return the positions of the bytes of metadata, without their lengths and names."""
    if kind == "TIFF":
        start = struct.unpack("<I", content[4:8])[0]
        count = struct.unpack("<H", content[start : start + 2])[0]
        entries = [start + 2 + 12 * number for number in range(count)]
        entries = [at for at in entries if struct.unpack("<H", content[at : at + 2])[0] in TIFF_METADATA]
        return [place for at in entries for place in range(at + 2, at + 12)]
    starts = [content.index(name) + len(name) + (4 if kind == "WEBP" else 0) for name in METADATA[kind]]
    return [place for start in starts for place in range(start, start + 24)]


def damageable(kind: str) -> tuple[bytes, list[int]]:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options = {"exif": exif(), "icc_profile": profile}
    if kind == "PNG":
        texts = PngImagePlugin.PngInfo()
        texts.add_text("one", "text " * 9, zip=True)
        texts.add_itxt("two", "text " * 9)
        options["pnginfo"] = texts
    if kind in ("JPEG", "WEBP"):
        options["xmp"] = b"<x:xmpmeta>" + b"text " * 9
    content = encoded(kind, **options)
    return content, metadata_places(kind, content)


DAMAGEABLE = {kind: damageable(kind) for kind in METADATA}


@given(st.data(), st.sampled_from(sorted(DAMAGEABLE)))
def test_damaged_metadata_cost_at_most_the_orientation(data, kind):
    content, places = DAMAGEABLE[kind]
    damaged = bytearray(content)
    for place in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.sampled_from([0, 1, 32, 127, 255]))
    found = read(bytes(damaged))
    assert any(is_close(found, np.rot90(PIXELS, -turns)) for turns in range(4)) or any(
        is_close(found, np.rot90(PIXELS.transpose(1, 0, 2), turns)) for turns in range(4)
    )


def write_shard(path, entries: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_every_reader_ignores_metadata_and_applies_the_orientation(tmp_path):
    """Class folders, through their names here and in timm, and shards give the same pixels."""
    content = with_chunks(encoded("PNG", exif=exif()), *CHUNKS["long zTXt"])
    folder = make_image_folder(tmp_path / "folder", classes=1, train=0, val=1)
    (folder / "val" / "class_0" / "0.png").write_bytes(content)
    shards = make_shards(tmp_path / "shards", val_shards=1)
    write_shard(shards / "validation-0000.tar", {"0.png": content, "0.cls": b"0"})
    size = UPRIGHT.shape[:2]
    first = build_dataset("IMNET", str(folder), False, size)[0][0]
    for name, root in (("torch/image_folder", folder), ("torch/folder", folder), ("wds/", shards)):
        images = build_dataset(name, str(root), False, size, num_classes=1)
        (batch,) = evaluation_loader(images, 4, num_workers=0, pin_memory=False)
        assert (batch.images == first).all(), name


def test_unreadable_images_of_a_shard_are_named(tmp_path, capsys):
    shards = make_shards(tmp_path / "shards", val_shards=1)
    entries = {"0.png": b"no image", "0.cls": b"0", "1.png": encoded("PNG"), "1.cls": b"0", "2.bin": b"", "2.cls": b"0"}
    write_shard(shards / "validation-0000.tar", entries)
    images = build_dataset("wds/", str(shards), False, (12, 20), num_classes=1)
    (batch,) = evaluation_loader(images, 4, num_workers=0, pin_memory=False)
    assert len(batch.images) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"warning: .*0000\.tar: 0\.png: cannot be read as an image: .*; the image is skipped", first)
    assert re.fullmatch(r"warning: .*0000\.tar: 2: has no image; expected an entry \.jpg, .*image is skipped", second)


# More than 8 bits --------------------------------------------------------------------------------

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16 + 15  # 12 bits
RAMP_OF_8_BITS = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.fixture(autouse=True)
def _no_warning_yet(monkeypatch):
    monkeypatch.setattr(images, "_has_warned", multiprocessing.RawValue("b"))


def png_of_16_bits(pixels: np.ndarray, bits: int | None = None) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return with_chunks(content.getvalue(), *([chunk(b"sBIT", bytes([bits]))] if bits is not None else []))


def tiff(pixels: np.ndarray, **tags: int) -> bytes:
    content, info = io.BytesIO(), TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in {"MaxSampleValue": 281, "SMaxSampleValue": 341}.items():
        if tag in tags:
            info[value] = tags[tag]
    Image.fromarray(pixels).save(content, "TIFF", tiffinfo=info)
    return content.getvalue()


def tiff_of_12_bits() -> bytes:
    """Write a TIFF file with 12 bits per sample, two samples in three bytes."""
    pairs = RAMP.reshape(-1, 2).astype(int)
    packed = [byte for a, b in pairs for byte in (a >> 4, (a & 15) << 4 | b >> 8, b & 255)]
    tags = {256: 16, 257: 16, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 16, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(122, b"\0") + bytes(packed)


DECLARED = {
    "PNG": png_of_16_bits(RAMP, 12),
    "TIFF SMaxSampleValue": tiff(RAMP, SMaxSampleValue=4095),
    "TIFF MaxSampleValue": tiff(RAMP, MaxSampleValue=4095),
    "TIFF of 32 bits": tiff(RAMP.astype(np.int32), SMaxSampleValue=4095),
    "TIFF of floats": tiff(RAMP.astype(np.float32), SMaxSampleValue=4095),
    "TIFF of 12 bits": tiff_of_12_bits(),
}


@pytest.mark.parametrize("content", DECLARED.values(), ids=DECLARED)
def test_declared_range_is_read(content, capsys):
    assert np.abs(read(content)[..., 0].astype(int) - RAMP_OF_8_BITS).max() <= 1
    assert not capsys.readouterr().err


UNDECLARED = {
    "PNG": png_of_16_bits(RAMP),
    "TIFF": tiff(RAMP),
    "TIFF of 32 bits": tiff(RAMP.astype(np.int32)),
    "TIFF of floats": tiff(RAMP.astype(np.float32)),
    "a statistic": tiff(RAMP, MaxSampleValue=4094),
    "too low a declaration": tiff(RAMP, SMaxSampleValue=1023),
}


@pytest.mark.parametrize("content", UNDECLARED.values(), ids=UNDECLARED)
def test_undeclared_range_warns_once(content, capsys):
    for _ in range(3):
        assert read(content).max() <= 16
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "warning: x: the pixel values use 12 of 16 bits" in warning


def png_in_color(pixels: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    rows = b"".join(b"\0" + pixels[start : start + 24] for start in range(0, len(pixels), 24))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_in_color(pixels: bytes) -> bytes:
    tags = {256: 4, 257: 4, 258: 122, 259: 1, 262: 2, 273: 128, 277: 3, 278: 4, 279: len(pixels)}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items() if tag != 258]
    entries.insert(2, struct.pack("<HHII", 258, 3, 3, 122))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4)
    return head + struct.pack("<3H", 16, 16, 16) + pixels


@pytest.mark.parametrize(("encode", "order"), [(png_in_color, ">"), (tiff_in_color, "<")])
def test_color_of_12_bits_in_16_warns(encode, order, capsys):
    assert read(encode(struct.pack(f"{order}48H", *([4095, 2000, 0] * 16)))).max() == 15
    assert "use 12 of 16 bits" in capsys.readouterr().err


QUIET = {
    "16 bits": png_of_16_bits(RAMP * 16),
    "16 bits scaled from 12, dark": png_of_16_bits(RAMP // 16 * 16 * 8, 12),
    "dark": png_of_16_bits(RAMP * 5),
    "black": png_of_16_bits(RAMP * 0),
    "8 bits in 32": tiff(RAMP_OF_8_BITS.astype(np.int32)),
    "floats up to 1": tiff(RAMP_OF_8_BITS.astype(np.float32) / 256),
    "invalid declaration": png_of_16_bits(RAMP * 16, 200),
}


@pytest.mark.parametrize("content", QUIET.values(), ids=QUIET)
def test_full_range_does_not_warn(content, capsys):
    read(content)
    assert not capsys.readouterr().err


def test_workers_warn_once_together(tmp_path, capfd):
    folder = make_image_folder(tmp_path / "data", classes=2, train=0, val=6)
    for path in folder.glob("val/*/*.png"):
        path.write_bytes(UNDECLARED["PNG"])
    images = build_dataset("IMNET", str(folder), False, (16, 16))
    loader = evaluation_loader(images, 3, num_workers=2, pin_memory=False)
    assert len([*loader, *loader]) == 8
    assert capfd.readouterr().err.count("12 of 16 bits") == 1


# Transparency ------------------------------------------------------------------------------------

COLOR = (200, 10, 20)


def palette() -> Image.Image:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([*COLOR, 1, 2, 3])
    return image


TRANSPARENT = {
    "alpha.png": (Image.new("RGBA", (4, 4), (*COLOR, 0)), {}),
    "alpha.webp": (Image.new("RGBA", (4, 4), (*COLOR, 0)), {"lossless": True, "exact": True}),
    "alpha.tif": (Image.new("RGBA", (4, 4), (*COLOR, 0)), {}),
    "color.png": (Image.new("RGB", (4, 4), COLOR), {"transparency": COLOR}),
    "palette.png": (palette(), {"transparency": 0}),
    "palette_levels.png": (palette(), {"transparency": bytes([0, 128])}),
    "palette.gif": (palette(), {"transparency": 0}),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_is_dropped(tmp_path, name):
    image, options = TRANSPARENT[name]
    image.save(tmp_path / name, **options)
    assert set(load_image(tmp_path / name).get_flattened_data()) == {COLOR}
