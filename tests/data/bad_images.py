"""Files that a folder of images may hold and should not, and odd ones that are images all the same; each written by a function of its path."""

import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from dali_cases import encoded, png16, soft
from PIL import Image

Make = Callable[[Path], object]
OFFSETS = [0.001, 0.01, 0.03, 0.05, *np.linspace(0.08, 0.9, 12).tolist(), 0.93, 0.96, 0.98, 0.995]  # of a file, at which it is cut off


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, data: bytes = b"\0" * 100) -> bytes:
    """A PNG of a header that promises so many pixels, and hardly a byte of them."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + pixels + chunk(b"IEND", b"")


def flipped(data: bytes, seed: int) -> bytes:
    """Some bytes of the pixels other than they were."""
    draw, out = np.random.default_rng(seed), bytearray(data)
    for place in draw.integers(len(data) // 3, len(data) - 16, 6):
        out[place] ^= int(draw.integers(1, 256))
    return bytes(out)


def icon_of(data: bytes) -> bytes:
    """A Windows icon of one picture, 16 x 16 as it says itself, whatever ``data`` is."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(data), 22) + data


def strange_jpeg(data: bytes) -> bytes:
    """With a marker in the middle of its pixels that no JPEG has there."""
    place = data.index(b"\xff\xda") + 80
    return data[:place] + b"\xff\x22" + data[place + 2 :]


def huge_jpeg(data: bytes) -> bytes:
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", 60000, 60000) + data[place + 4 :]


def contents() -> dict[str, bytes]:
    """Name -> content of a file that has one."""
    picture, exif = soft(3), Image.Exif()
    exif[0x112] = 6
    alpha = np.asarray(picture.convert("RGBA")).copy()
    alpha[..., 3] = np.arange(96) * 2
    see_through = Image.fromarray(alpha)
    whole, jpeg = encoded(picture), encoded(picture, "JPEG", quality=92)
    progressive = encoded(picture, "JPEG", progressive=True)
    many = {"save_all": True, "append_images": [soft(4), soft(5)]}
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * (3 << 20)))
    out = {
        "empty.png": b"",
        "empty.jpg": b"",
        "page.png": b"<!DOCTYPE html><html><title>404</title>",
        "page.jpg": b"\n <html><body>Forbidden</body></html>",
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "text.png": b"the images are on the other disk\n",
        "table.png": b'{"error": "not found"}',
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        "archive.png": b"PK\x03\x04" + bytes(60),
        "zeros.png": bytes(4096),
        "ones.jpg": b"\xff" * 4096,
        "noise.png": np.random.default_rng(1).bytes(4096),
        "signature.png": whole[:8],
        "header.png": whole[:33],
        "no pixels.png": whole[:33] + whole[-12:],
        "no end.png": whole[:-12],
        "wrong sum.png": whole[:29] + b"\0\0\0\0" + whole[33:],
        "pixels cut.png": png(64, 64),
        "long text.png": png(4, 4, text, data=bytes(4 * 13)),
        "soi.jpg": jpeg[:2],
        "head.jpg": jpeg[: jpeg.index(b"\xff\xda")],
        "strange marker.jpg": strange_jpeg(jpeg),
        "strange marker, progressive.jpg": strange_jpeg(progressive),
        "half with an end.jpg": jpeg[: len(jpeg) // 2] + b"\xff\xd9",
        "more behind.jpg": jpeg + b"more",
        "more behind.png": whole + b"more",
        "a jpeg.png": jpeg,
        "a png.jpg": whole,
        "a gif.png": encoded(picture, "GIF"),
        "a webp.jpg": encoded(picture, "WEBP"),
        "still.gif": encoded(picture, "GIF"),
        "moving.gif": encoded(picture, "GIF", **many),
        "moving, cut.gif": encoded(picture, "GIF", **many)[:300],
        "moving.png": encoded(picture, "PNG", **many),
        "picture.webp": encoded(picture, "WEBP"),
        "cut.webp": encoded(picture, "WEBP")[:200],
        "picture.bmp": encoded(picture, "BMP"),
        "cut.bmp": encoded(picture, "BMP")[:900],
        "picture.tif": encoded(picture, "TIFF"),
        "cut.tif": encoded(picture, "TIFF")[:500],
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "cmyk.tif": encoded(picture.convert("CMYK"), "TIFF"),
        "grey.jpg": encoded(picture.convert("L"), "JPEG"),
        "grey.png": encoded(picture.convert("L")),
        "16 bits.png": png16(3),
        "16 bits, alpha.png": png16(4),
        "16 bits, grey.png": png16(1),
        "float.tif": encoded(picture.convert("F"), "TIFF"),
        "palette.png": encoded(picture.quantize(64)),
        "palette with alpha.png": encoded(see_through.quantize(64)),
        "palette with a hole.png": encoded(picture.quantize(64), transparency=3),
        "alpha.png": encoded(see_through),
        "grey with alpha.png": encoded(see_through.convert("LA")),
        "one bit.png": encoded(picture.convert("1")),
        "four bits.png": encoded(picture.quantize(12), bits=4),
        "turned.jpg": encoded(picture, "JPEG", exif=exif),
        "turned.png": encoded(picture, exif=exif),
        "progressive.jpg": progressive,
        "1x1.png": encoded(soft(0, 1, 1)),
        "1x1.jpg": encoded(soft(0, 1, 1), "JPEG"),
        "1x300.png": encoded(soft(0, 1, 300)),
        "300x1.png": encoded(soft(0, 300, 1)),
        "2x3000.png": encoded(soft(0, 2, 3000)),
        "bomb.png": png(30000, 30000),
        "bomb, whole.png": png(30000, 30000, data=bytes(10 << 20)),
        "bomb.jpg": huge_jpeg(jpeg),
        "bomb.gif": encoded(picture, "GIF")[:6] + struct.pack("<HH", 30000, 30000) + encoded(picture, "GIF")[10:],
        "bomb.bmp": encoded(picture, "BMP")[:18] + struct.pack("<ii", 30000, 30000) + encoded(picture, "BMP")[26:],
        "bomb.ico": icon_of(png(30000, 30000)),
        "no bytes.png": png(0, 0),
        "warned of.png": png(10000, 10000),  # beyond what Pillow warns of
    }
    for number, share in enumerate(OFFSETS):
        out[f"cut {number}.png"], out[f"cut {number}.jpg"] = whole[: int(share * len(whole))], jpeg[: int(share * len(jpeg))]
    for seed in range(6):
        out[f"flipped {seed}.png"], out[f"flipped {seed}.jpg"] = flipped(whole, seed), flipped(jpeg, seed)
        out[f"flipped {seed}, progressive.jpg"] = flipped(progressive, seed)
    return out


def _long(path: Path) -> None:
    """A good picture, and zeros behind it that the disk need not keep: 257 MiB."""
    path.write_bytes(encoded(soft(3)))
    os.truncate(path, 257 << 20)


def _linked(path: Path) -> None:
    path.with_name("behind the link").write_bytes(encoded(soft(6)))
    path.symlink_to("behind the link")


THINGS: dict[str, Make] = {
    "missing.png": lambda path: None,
    "dangling.png": lambda path: path.symlink_to("nowhere.png"),
    "loop.png": lambda path: path.symlink_to(path.name),
    "linked.png": _linked,
    "folder.png": lambda path: path.mkdir(),
    "pipe.png": os.mkfifo,
    "device.png": lambda path: path.symlink_to("/dev/zero"),
    "unreadable.png": lambda path: path.symlink_to("/proc/self/mem"),  # a file to look at; to read it is an error of the disk, for root too
    "long.png": _long,
    "not utf-8 \udcff\udcfe.png": lambda path: path.write_bytes(encoded(soft(7))),
    "not utf-8, missing \udcff.png": lambda path: None,
    "not utf-8, bad \udcff.png": lambda path: path.write_bytes(b"<html>"),
    "line\nbreak.png": lambda path: path.write_bytes(encoded(soft(8))),
    "n" * 300 + ".png": lambda path: None,
    "zero\0.png": lambda path: None,
}
"""What has no content of its own, or not only."""
GOOD = {
    "half with an end.jpg", "more behind.jpg", "a jpeg.png", "a png.jpg", "a gif.png", "a webp.jpg", "still.gif", "moving.gif", "moving.png",
    "picture.webp", "picture.bmp", "picture.tif", "cmyk.jpg", "cmyk.tif", "grey.jpg", "grey.png", "16 bits.png", "16 bits, alpha.png",
    "16 bits, grey.png", "float.tif", "palette.png", "palette with alpha.png", "palette with a hole.png", "alpha.png", "grey with alpha.png",
    "one bit.png", "four bits.png", "turned.jpg", "turned.png", "progressive.jpg", "2x3000.png", "linked.png", "not utf-8 \udcff\udcfe.png",
    "line\nbreak.png",
}  # fmt: skip
"""Images all the same."""
TINY = {"1x1.png", "1x1.jpg", "1x300.png", "300x1.png"}
"""Pixels to a loader; to `fastidc check` they show nothing."""
EITHER = ("flipped", "cut 19.jpg", "cut 18.jpg")
"""How these begin: whether Pillow minds depends on its JPEG library. Whatever it says, all say it."""


def make(folder: Path) -> dict[str, Path]:
    """Name -> path of every file, of more than a hundred, written into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, data in contents().items():
        paths[name] = folder / name
        paths[name].write_bytes(data)
    for name, write in THINGS.items():
        paths[name] = folder / name
        write(paths[name])
    return paths


def picture(seed: int) -> bytes:
    """A good PNG."""
    file = BytesIO()
    soft(seed).save(file, "PNG")
    return file.getvalue()
