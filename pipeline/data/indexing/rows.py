"""What an index says of one image, or why it cannot be trained on.

Reads each image's header, so that crops can be drawn before anything is decoded.
"""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

from pipeline.failures import says_of_one_file

# What PIL calls the formats that DALI decodes, and their usual suffixes; a file is judged by its content alone.
DECODABLE = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
    "JPEG2000": "jp2",
}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}
EXIF_ORIENTATION = 0x0112
EXIF_TRANSPOSED = (5, 6, 7, 8)  # values that swap height and width
TAIL_BYTES = 4096
MAX_CLASSES = 1_000_000  # a label beyond is a hash or an id, not a class


class InvalidImage(Exception):  # noqa: N818
    """Why an image cannot be trained on."""


class Label(NamedTuple):
    """A class by its number or by its name."""

    number: int | None = None
    text: str | None = None


class Header(NamedTuple):
    """What an index keeps of an image: bytes; pixels with its EXIF orientation applied; what else is notable."""

    size: int
    height: int
    width: int
    cmyk: bool
    exif_rotated: bool


class Row(NamedTuple):
    """An image, or what is left out and why."""

    file: str
    name: str = ""
    offset: int = 0
    number: int | None = None
    text: str | None = None
    size: int = 0
    height: int = 0
    width: int = 0
    cmyk: bool = False
    exif_rotated: bool = False
    reason: str | None = None

    @classmethod
    def of(cls, file: str, name: str, offset: int, label: Callable[[], Label], header: Callable[[], Header]) -> "Row":
        """The row of an image whose label and header may raise InvalidImage."""
        try:
            f"{file}{name}".encode()
            number, text = label()
            return cls(file, name, offset, number, text, **header()._asdict())
        except UnicodeEncodeError:
            return cls.refused(file, "the name is not UTF-8; rename it", name, offset)
        except InvalidImage as e:
            return cls.refused(file, str(e), name, offset)

    @classmethod
    def refused(cls, file: str, reason: str, name: str = "", offset: int = 0) -> "Row":
        return cls(printable(file), printable(name), offset, reason=printable(reason))


def read_file_header(path: Path, root: Path | None = None) -> Header:
    """An image file of this machine, of which no pixels are read if it is sound.

    Args:
        root: the folder that it was found in, of which a mount may go.

    Raises:
        InvalidImage: it cannot be trained on. OSError: nothing can be said of it, as the storage fails.
    """
    try:
        if not path.is_file():
            if path.exists():
                raise InvalidImage("not a file")
            raise FileNotFoundError(errno.ENOENT, "no such file")
        f = path.open("rb")
    except OSError as e:
        if root is not None and not says_of_one_file(e, root):
            raise
        raise InvalidImage("no such file" if e.errno == errno.ENOENT else f"not readable ({e.strerror})") from None
    with f:
        return read_header(f)


def read_header(f: BinaryIO) -> Header:
    """The header of an encoded image.

    Raises:
        InvalidImage: it cannot be trained on.
    """
    try:
        size = f.seek(0, os.SEEK_END)
        if size == 0:
            raise InvalidImage("empty file")
        f.seek(max(0, size - TAIL_BYTES))
        tail = f.read()
        f.seek(0)
        return _header(f, size, tail)
    except InvalidImage:
        raise
    except UnidentifiedImageError:
        raise InvalidImage("not an image in a known format") from None
    except OSError as e:
        if e.errno is not None:  # the storage's; PIL's own have none
            raise
        raise InvalidImage(f"not a readable image ({e})") from None
    except Exception as e:  # PIL raises what its format plug-ins raise: SyntaxError, struct.error, ...
        raise InvalidImage(f"not a readable image ({e})") from None


def _header(f: BinaryIO, size: int, tail: bytes) -> Header:
    with Image.open(f) as image:
        if image.format not in DECODABLE:
            raise InvalidImage(f"format {image.format} is not decoded by DALI; convert it to JPEG or PNG")
        width, height = image.size
        orientation = _orientation(f, image)
        if orientation in EXIF_TRANSPOSED and image.format != "TIFF":  # whose size PIL gives turned already
            width, height = height, width
        if not _ends_well(image.format, tail):
            image.load()  # raises where the file is cut off
        return Header(size, height, width, image.mode == "CMYK", orientation in range(2, 9))


def _orientation(f: BinaryIO, image: Image.Image) -> int:
    """The EXIF orientation that DALI applies. PIL's `getexif` would add XMP's, which DALI does not know."""
    if image.format == "TIFF":
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    if image.format == "PNG" and "exif" not in image.info:
        position = f.tell()
        f.seek(0)
        behind_pixels = b"eXIf" in f.read()
        f.seek(position)
        if behind_pixels:
            image.load()
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    return int(exif.get(EXIF_ORIENTATION, 1))


def _ends_well(image_format: str | None, tail: bytes) -> bool:
    """Whether a file's last bytes hold its format's end marker; formats without one always do."""
    return {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(image_format or "", b"") in tail


def parse_label(value: Any) -> Label:
    """A class number or name as found in a file.

    Raises:
        InvalidImage: it is neither.
    """
    if isinstance(value, str) and value:
        return Label(text=value)
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < MAX_CLASSES:
            raise InvalidImage(f"label {str(value)[:20]} is not a class number from 0 to {MAX_CLASSES - 1}")
        return Label(number=value)
    raise InvalidImage(
        "no label" if value is None or value == "" else f"label {value!r} is neither a number nor a name"
    )


def is_class_number(text: str) -> bool:
    """Whether a label's text is a class number, as opposed to a class name."""
    return re.fullmatch(r"-?[0-9]{1,4000}", text) is not None  # beyond, Python refuses to read it


def printable(text: str) -> str:
    """A file's name without bytes that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
