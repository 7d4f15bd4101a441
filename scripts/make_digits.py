"""Write scikit-learn's bundled handwritten digits (1,797 real images of 8x8) as an image folder.

    python scripts/make_digits.py data/digits

The demo's data set: data/digits/{train,val}/{0..9}/NNNN.jpg, 1,437 and 360 images, enlarged to
32x32 and saved as JPEG, so that the real decode and crop path runs on them. Nothing is downloaded.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NUM_VAL = 360
SIDE = 32  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; an existing data set there is kept")
    folder: Path = parser.parse_args().folder
    if folder.exists():
        print(f"{folder} is there already")
        return
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write(unfinished)
    unfinished.rename(folder)
    print(f"wrote {folder}: 1,437 training and 360 validation images of ten digits")


def write(folder: Path) -> None:
    """Write the split, the same on every machine."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    for place, i in enumerate(order):
        split = "val" if place < NUM_VAL else "train"
        path = folder / split / str(digits.target[i]) / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[i] * (255 / 16)).round().astype(np.uint8)
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path, quality=95)


if __name__ == "__main__":
    main()
