"""Copies of image files without their metadata.

Pillow refuses a whole image because of a text that is too long, a bad checksum of a comment or a tag of the wrong type.
The copies keep only what the pixels need, and thus can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator


def copies_without_metadata(content: bytes) -> Iterator[bytes]:
    """Yield copies of a PNG, JPEG, TIFF, WebP or JPEG 2000 file without metadata, none of other formats.

    The first ones keep what may hold the orientation or the range of the pixels: all of it, then each entry alone. The
    last keeps none.
    """
    for start, (copy, useful) in FORMATS.items():
        if content.startswith(start):
            for keep in dict.fromkeys([useful, *((entry,) for entry in useful), ()]):
                yield copy(content, keep)


# PNG ---------------------------------------------------------------------------------------------

PNG_PIXELS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
PNG_USEFUL = (  # type of a chunk and start of its data
    b"eXIf",
    b"sBIT",
    b"zTXtRaw profile type exif\0",
    b"tEXtRaw profile type exif\0",
    b"iTXtXML:com.adobe.xmp\0",
)


def png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the type of each chunk of a PNG file, and the chunk: length, type, data, checksum."""
    start = 8
    while start + 8 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        yield content[start + 4 : start + 8], content[start:end]
        start = end


def _png(content: bytes, keep: tuple[bytes, ...]) -> bytes:
    chunks = [chunk for kind, chunk in png_chunks(content) if kind in PNG_PIXELS or chunk[4:].startswith(keep)]
    return content[:8] + b"".join(chunks)


# JPEG --------------------------------------------------------------------------------------------

START_OF_SCAN, COMMENT = 0xDA, 0xFE
JPEG_COLORS = {0xE0: (b"JFIF\0", 14), 0xEE: (b"Adobe", 12)}  # marker -> start and least length of the data
JPEG_USEFUL = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")


def _jpeg(content: bytes, keep: tuple[bytes, ...]) -> bytes:
    parts, start = [content[:2]], 2
    while content[start : start + 1] == b"\xff" and start + 4 <= len(content):
        marker = content[start + 1]
        if marker == START_OF_SCAN:
            break
        end = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")
        if marker == 0xFF:  # padding
            end = start + 1
        elif _is_needed(marker, content[start + 4 : end], keep):
            parts.append(content[start:end])
        start = end
    return b"".join([*parts, content[start:]])


def _is_needed(marker: int, data: bytes, keep: tuple[bytes, ...]) -> bool:
    """Return whether to keep a segment of a JPEG file: it concerns pixels, or its data begin like one of `keep`."""
    if marker in JPEG_COLORS:
        name, length = JPEG_COLORS[marker]
        return data.startswith(name) and len(data) >= length  # libjpeg ignores shorter ones
    is_metadata = 0xE0 <= marker <= 0xEF or marker == COMMENT
    return not is_metadata or data.startswith(keep)


# TIFF --------------------------------------------------------------------------------------------

TIFF_USEFUL = (274, 281, 341)  # Orientation, MaxSampleValue, SMaxSampleValue
TIFF_PIXELS = {  # tags that decide about pixels: size, compression, color, place of the data, and their formats
    *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325),
    *(332, 334, 338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),
}


def _tiff(content: bytes, keep: tuple[int, ...]) -> bytes:
    order = "little" if content.startswith(b"II") else "big"

    def number(start: int, size: int) -> int:
        return int.from_bytes(content[start : start + size], order)

    directory = number(4, 4)
    starts = [directory + 2 + 12 * entry for entry in range(number(directory, 2))]
    entries = [content[start : start + 12] for start in starts if number(start, 2) in {*TIFF_PIXELS, *keep}]
    shorter = len(entries).to_bytes(2, order) + b"".join(entries) + bytes(4)  # no further images
    return content[:directory] + shorter + content[directory + len(shorter) :]


# WebP --------------------------------------------------------------------------------------------

WEBP_PIXELS = {b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"}
WEBP_USEFUL = (b"EXIF", b"XMP ")
WEBP_FLAGS = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}  # chunk -> its bit in the header


def _webp(content: bytes, keep: tuple[bytes, ...]) -> bytes:
    removed = sum(flag for name, flag in WEBP_FLAGS.items() if name not in keep)
    parts, start = [], 12
    while start + 8 <= len(content):
        kind, length = content[start : start + 4], int.from_bytes(content[start + 4 : start + 8], "little")
        end = start + 8 + length + length % 2
        if kind == b"VP8X":
            flags = content[start + 8] & ~removed
            parts.append(content[start : start + 8] + bytes([flags]) + content[start + 9 : end])
        elif kind in WEBP_PIXELS or kind in keep:
            parts.append(content[start:end])
        start = end
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


# JPEG 2000 ---------------------------------------------------------------------------------------

JP2_START = b"\0\0\0\x0cjP  "
JP2_PIXELS = {b"jP  ", b"ftyp", b"jp2h", b"jp2c"}


def _jp2(content: bytes, keep: tuple[bytes, ...]) -> bytes:
    parts, start = [], 0
    while start + 8 <= len(content):
        length, kind = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8]
        if length == 1:  # a long box
            length = int.from_bytes(content[start + 8 : start + 16], "big")
        end = start + length if length >= 8 else len(content)  # 0: up to the end
        if kind in JP2_PIXELS:
            parts.append(content[start:end])
        start = end
    return b"".join(parts)


FORMATS: dict[bytes, tuple[Callable[[bytes, tuple], bytes], tuple]] = {  # start of a file -> copy, what may be kept
    b"\x89PNG\r\n\x1a\n": (_png, PNG_USEFUL),
    b"\xff\xd8\xff": (_jpeg, JPEG_USEFUL),
    b"II*\0": (_tiff, TIFF_USEFUL),
    b"MM\0*": (_tiff, TIFF_USEFUL),
    b"RIFF": (_webp, WEBP_USEFUL),
    JP2_START: (_jp2, ()),
}
