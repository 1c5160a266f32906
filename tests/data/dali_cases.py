"""Pictures for the tests of DALI."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def soft(seed: int, width: int = 96, height: int = 64, noise: int = 2) -> Image.Image:
    """Soft shapes and a little noise, as in a rendering or a photograph."""
    draw = np.random.default_rng(seed)
    shapes = Image.fromarray(draw.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(shapes, np.int16) + draw.integers(-noise, noise + 1, (height, width, 1), dtype=np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **more) -> bytes:
    file = BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def png16(channels: int, seed: int = 0) -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads but does not write."""
    rows = np.random.default_rng(seed).integers(0, 65536, (20, 30, channels)).astype(">u2")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30, 20, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def soften(data: Path) -> None:
    """Soft pictures in the place of a data set's noise; those of one kind are JPEG, whatever their names say."""
    for seed, path in enumerate(sorted(data.glob("*images/*.png"))):
        path.write_bytes(encoded(soft(seed), "JPEG", quality=95) if path.parent.name == "sc_images" else encoded(soft(seed)))


def close(found, expected) -> bool:
    """Within what is documented for soft pictures: at most 5 levels, and 0.02% of the values off by more than 1."""
    off = np.abs(np.asarray(found).astype(np.int16) - np.asarray(expected))
    return off.max(initial=0) <= 5 and (off > 1).mean() <= 0.0002


def kinds(size: int) -> dict[str, tuple[bytes, bool]]:
    """Files and whether DALI decodes them; ``size`` is the size that is wanted."""
    picture, exif = soft(3), Image.Exif()
    exif[0x112] = 6
    alpha = np.asarray(picture.convert("RGBA")).copy()
    alpha[..., 3] = np.arange(96) * 2
    see_through, palette = Image.fromarray(alpha), picture.quantize(64)
    return {
        "rgb": (encoded(picture), True),
        "rgba": (encoded(see_through), True),
        "la": (encoded(see_through.convert("LA")), True),
        "l": (encoded(picture.convert("L")), True),
        "rgb with a transparent colour": (encoded(picture, transparency=(1, 2, 3)), True),
        "palette": (encoded(palette), True),
        "turned png": (encoded(picture, exif=exif), True),
        "jpeg": (encoded(picture, "JPEG", quality=90), True),
        "jpeg 4:4:4": (encoded(picture, "JPEG", quality=75, subsampling=0), True),
        "progressive": (encoded(picture, "JPEG", progressive=True), True),
        "grey jpeg": (encoded(picture.convert("L"), "JPEG"), True),
        "odd jpeg": (encoded(soft(4, 97, 63), "JPEG"), True),
        "turned jpeg": (encoded(picture, "JPEG", exif=exif), True),
        "1x1": (encoded(soft(0, 1, 1)), True),
        "wide": (encoded(soft(1, 2000, 40)), True),
        "tall": (encoded(soft(1, 30, 3000), "JPEG"), True),
        "as large as wanted": (encoded(soft(5, size, size)), True),
        "cmyk": (encoded(picture.convert("CMYK"), "JPEG"), False),
        "one bit": (encoded(picture.convert("1")), False),
        "four bits": (encoded(picture.quantize(12), bits=4), False),
        "16 bits": (png16(3), False),
        "16 bits with alpha": (png16(4), False),
        "16 bits of grey": (png16(1), False),
        "gif": (encoded(picture, "GIF"), False),
        "animated png": (encoded(picture, save_all=True, append_images=[soft(9)]), False),
        "webp": (encoded(picture, "WEBP"), False),
        "turned tiff": (encoded(picture, "TIFF", exif=exif), False),
        "bmp": (encoded(picture, "BMP"), False),
        "jpeg with more behind it": (encoded(picture, "JPEG") + b"more", False),
    }


def bad() -> dict[str, bytes]:
    """Files that Pillow refuses."""
    png, jpeg = encoded(soft(1)), encoded(soft(1), "JPEG", quality=95)
    middle = len(png) // 2
    return {
        "empty": b"",
        "html": b"<!doctype html><title>404</title>",
        "truncated png": png[: len(png) // 2],
        "png with damage": png[:middle] + bytes(x ^ 0x55 for x in png[middle : middle + 9]) + png[middle + 9 :],
        "png without pixels": png[:33] + png[-12:],
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "header alone": png[:20],
        "png without its end": png[:-12],
        "gif cut off": encoded(soft(1), "GIF")[:200],
    }
