"""Write real photographs of 500x375 pixels as an image folder, for benchmarks and tests.

    python scripts/make_photos.py data/photos [--num 512]

ImageNet's usual size and about its bytes an image: crops of the two photographs that scikit-learn brings along, at
random places and scales, half of them mirrored, saved as JPEG of quality 90 in one class folder each. The same
on every machine; nothing is downloaded.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

WIDTH, HEIGHT = 500, 375  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--num", type=int, default=512, help="images")
    args = parser.parse_args()
    write(args.folder, args.num)
    print(f"wrote {args.num} photographs to {args.folder}")


def write(folder: Path, num: int, width: int = WIDTH, height: int = HEIGHT) -> None:
    """Write `num` photographs of one size under `folder`/CLASS."""
    sample = load_sample_images()
    photos = {
        Path(name).stem: Image.fromarray(pixels) for name, pixels in zip(sample.filenames, sample.images, strict=True)
    }
    draws = np.random.default_rng(0)
    for name in photos:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(num):
        name = list(photos)[i % len(photos)]
        photo = photos[name]
        largest = min(photo.width / width, photo.height / height)
        scale = largest * draws.uniform(0.7, 1.0)
        w, h = int(width * scale), int(height * scale)
        x, y = int(draws.integers(0, photo.width - w + 1)), int(draws.integers(0, photo.height - h + 1))
        crop = photo.resize((width, height), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
        if draws.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crop.save(folder / name / f"{i:04d}.jpg", quality=90)


if __name__ == "__main__":
    main()
