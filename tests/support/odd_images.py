"""A folder of everything that turns up in real image folders."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
    """A smooth colour picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_text(data: bytes) -> str:
    """An encoded image as a request to a model server holds it."""
    return base64.b64encode(data).decode()


def damaged_jpeg() -> bytes:
    """Whole by its size, its header and its end, but its Huffman tables are zeros: only decoding it tells."""
    whole = encode(picture(), "JPEG", quality=95)
    tables = whole.index(b"\xff\xc4") + 4
    return whole[:tables] + bytes(64) + whole[tables + 64 :]


def write_odd_folder(root: Path) -> tuple[set[str], dict[str, str]]:
    """Write class folders "good", "odd" and "void".

    Returns:
        The relative paths that can be trained on; and those that cannot, with a word of the reason.
    """
    sixteen_bit = Image.fromarray((np.asarray(picture().convert("L")).astype(np.uint16)) * 257)
    usable = {
        "good/plain.jpg": encode(picture(), "JPEG"),
        "good/nested/deep/plain.png": encode(picture(), "PNG"),
        "good/UPPER.JPEG": encode(picture(), "JPEG"),
        "odd/cmyk.jpg": encode(picture().convert("CMYK"), "JPEG"),
        "odd/sixteen_bit.png": encode(sixteen_bit, "PNG"),
        "odd/grey.png": encode(picture().convert("L"), "PNG"),
        "odd/alpha.png": encode(picture().convert("RGBA"), "PNG"),
        "odd/palette.png": encode(picture().convert("P"), "PNG"),
        "odd/one_pixel.png": encode(picture(1, 1), "PNG"),
        "odd/one_pixel.jpg": encode(picture(1, 1), "JPEG"),
        "odd/progressive.jpg": encode(picture(), "JPEG", progressive=True),
        "odd/really_a_png.jpg": encode(picture(), "PNG"),
        "odd/trailing_bytes.jpg": encode(picture(), "JPEG") + bytes(10_000),
        "odd/web.webp": encode(picture(), "WEBP"),
        "odd/bitmap.bmp": encode(picture(), "BMP"),
    }
    unusable = {
        "odd/empty.jpg": (b"", "empty file"),
        "odd/text.jpg": (b"this is not an image\n", "not an image in a known format"),
        "odd/truncated.jpg": (encode(picture(), "JPEG", quality=95)[:1000], "truncated"),
        "odd/truncated.png": (encode(picture(), "PNG")[:2000], "truncated"),
        "odd/animation.png": (encode(picture().convert("P"), "GIF"), "format GIF is not decoded by DALI"),
        "void": (None, "a class without a usable image"),
    }
    ignored = {"odd/notes.txt": b"hello", "odd/.hidden.jpg": b"x", ".git/objects/x.jpg": b"x", "good/Thumbs.db": b"x"}
    for path, content in [*usable.items(), *((p, c) for p, (c, _) in unusable.items()), *ignored.items()]:
        file = root / path
        if content is None:
            file.mkdir(parents=True)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    return set(usable), {path: reason for path, (_, reason) in unusable.items()}
