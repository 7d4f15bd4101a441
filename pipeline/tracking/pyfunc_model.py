"""The model as MLflow loads and serves it: images as text in, class names and probabilities out.

MLflow copies this file into the model and runs it wherever the model is loaded ("models from code"), so it imports
nothing of this package. It prepares images as `data.batch_spec` and `data.loading.dali` do: turned upright by their
EXIF orientation, RGB, a square of size / val_resize of the short side cut out, resized to the model's size.

Whoever may ask a model server may send it anything: what is read and decoded has limits, and an image that
cannot be used costs its own row of the answer alone.
"""

import base64
import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from io import BytesIO
from typing import Any
from urllib import request
from urllib.error import HTTPError

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

NOTES = "model.json"  # beside the graph in its file, as `export` writes it
MAX_MB = 32  # of an encoded image
MAX_PIXELS = 80_000_000
FETCH_S = 10.0  # for an image at a URL
TOP = 5  # likeliest classes in an answer
BATCH = 32  # images of a request that are classified together
NUM_THREADS = 8  # that fetch and decode: each may hold an image of MAX_PIXELS
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")  # what can be trained on; MPO is read as JPEG
ORIENTATION = 0x0112  # EXIF's number for it
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(Exception):
    """Why there is no prediction for an image."""


class Classifier(PythonModel):  # type: ignore[misc]
    """An exported graph and the names of its classes."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the graph, of uint8 (N, 3, S, S) to logits (N, C), without running code from its file."""
        files = {NOTES: ""}
        self._graph = torch.export.load(context.artifacts["graph"], extra_files=files).module()
        notes = json.loads(files[NOTES])
        self._classes, self._size, self._val_resize = notes["classes"], notes["size"], notes["val_resize"]

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Classify the images of the column "image": base64 of an encoded image, as a data: URI or not, or a URL.

        Returns:
            For each row "class" and "probability", the likeliest "classes" (at most TOP) with their "probabilities",
            and "error": why there is none of these, or an empty text.
        """
        images = model_input["image"].tolist()
        rows: list[dict[str, Any]] = []
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for start in range(0, len(images), BATCH):
                rows += self._classify(list(pool.map(self._prepare, images[start : start + BATCH])))
        columns = ["class", "probability", "classes", "probabilities", "error"]
        return pd.DataFrame(rows, columns=columns, dtype=object)  # else nothing would become NaN, which is no JSON

    def _prepare(self, image: object) -> Tensor | ImageError:
        try:
            return to_pixels(to_bytes(image), self._size, self._val_resize)
        except ImageError as e:
            return e

    @torch.inference_mode()
    def _classify(self, images: Sequence[Tensor | ImageError]) -> list[dict[str, Any]]:
        nothing: dict[str, Any] = {"class": None, "probability": None, "classes": [], "probabilities": []}
        rows = [{**nothing, "error": str(image)} for image in images]
        usable = [k for k, image in enumerate(images) if isinstance(image, Tensor)]
        if not usable:
            return rows
        logits = self._graph(torch.stack([images[k] for k in usable]))  # type: ignore[misc]
        best = logits.double().softmax(1).topk(min(TOP, len(self._classes)))
        for k, shares, places in zip(usable, best.values.tolist(), best.indices.tolist(), strict=True):
            names = [self._classes[place] for place in places]
            likeliest = {"class": names[0], "probability": shares[0]}
            rows[k] = {**likeliest, "classes": names, "probabilities": shares, "error": ""}
        return rows


def to_bytes(image: object) -> bytes:
    """The encoded image that a text holds or names.

    Raises:
        ImageError: it does neither.
    """
    if not isinstance(image, str) or not image.strip():
        raise ImageError("no image; give base64 of an encoded image, or an http(s) URL")
    text = image.strip()
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text):
        if scheme[1].lower() not in ("http", "https"):
            raise ImageError(f"a URL of {scheme[1][:20]}:// is not fetched; give one of http(s)://, or base64")
        return _fetch(text)
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    if len(text) > MAX_MB * 2**20 * 3 // 2:  # base64 takes 4/3 of the bytes, and breaks lines
        raise ImageError(f"larger than {MAX_MB} MB")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise ImageError("neither base64 of an encoded image nor an http(s) URL") from None


def _fetch(url: str) -> bytes:
    # Not urllib's usual opener, which follows to ftp://, and reads files.
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPErrorProcessor,
        request.HTTPDefaultErrorHandler,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    deadline, data = time.monotonic() + FETCH_S, bytearray()
    try:
        with opener.open(url, timeout=FETCH_S) as answer:
            while part := answer.read1(2**16):
                data += part
                if len(data) > MAX_MB * 2**20:
                    raise ImageError(f"larger than {MAX_MB} MB")
                if time.monotonic() > deadline:  # the timeout is for each part
                    raise ImageError(f"not fetched within {FETCH_S:.0f} s")
    except HTTPError as e:
        e.close()
        raise ImageError(f"not fetched: HTTP {e.code}") from None
    except (OSError, ValueError, HTTPException) as e:
        raise ImageError(f"not fetched: {e}") from None
    return bytes(data)


def to_pixels(data: bytes, size: int, val_resize: int) -> Tensor:
    """The (3, size, size) uint8 pixels of an encoded image.

    Raises:
        ImageError: it cannot be decoded, or is too large.
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width} x {image.height} is more than {MAX_PIXELS // 10**6} million pixels")
            image.load()
            square = _rgb(_cut(image, size / val_resize))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image in a known format") from None
    except Exception as e:  # PIL raises what its format plug-ins raise: OSError, SyntaxError, struct.error, ...
        raise ImageError(f"not a readable image ({e})") from None
    pixels = torch.from_numpy(np.array(square))[None].permute(0, 3, 1, 2)
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0]


def _cut(image: Image.Image, fraction: float) -> Image.Image:
    """The square of `fraction` of the short side in the middle of the upright image."""
    exif = Image.Exif()  # `getexif` would add XMP's orientation, which training does not know
    exif.load(image.info.get("exif", b""))
    if (turn := TURNS.get(exif.get(ORIENTATION, 1))) is not None:
        image = image.transpose(turn)
    side = max(round(min(image.size) * fraction), 1)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("its pixels are floating-point numbers, of unknown range")
    if image.mode.startswith("I"):  # 16 bits a pixel; `convert` would cut off what is above 255
        levels = (np.asarray(image, dtype=np.uint32) + 128) // 257
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    image.info.pop("transparency", None)  # of a palette: dropped, as an alpha channel is
    return image.convert("RGB")


set_model(Classifier())
