"""Write the solar cells of the package elpv-dataset (2,624 real photographs of 300x300) as an image folder.

    pip install elpv-dataset                # its licence is non-commercial: it is not shipped with this project
    python scripts/make_elpv.py data/elpv

Electroluminescence photographs of solar cells (Buerhop-Lutz et al. 2018), half of them with cracks and dead regions.
data/elpv/{train,val}/{functional,defective}/NNNN.png: a quarter of the cells of each kind (monocrystalline,
polycrystalline) and each degree of certainty is for validation, as in Deitsch et al. 2019. Defective are the
cells that experts called so with a likelihood above a half.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from elpv_dataset.utils import load_dataset
from PIL import Image

VAL_SHARE = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; an existing data set there is kept")
    folder: Path = parser.parse_args().folder
    if folder.exists():
        print(f"{folder} is there already")
        return
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    counts = write(unfinished)
    unfinished.rename(folder)
    print(f"wrote {folder}: {counts['train']} training and {counts['val']} validation images of two classes")


def write(folder: Path) -> dict[str, int]:
    """Write the split, the same on every machine; returns the images in each part."""
    images, likelihoods, kinds = load_dataset()
    in_val = np.zeros(len(images), dtype=bool)
    generator = np.random.default_rng(0)
    for stratum in sorted(set(zip(likelihoods.tolist(), kinds.tolist(), strict=True))):
        (rows,) = np.nonzero((likelihoods == stratum[0]) & (kinds == stratum[1]))
        in_val[generator.permutation(rows)[: round(VAL_SHARE * len(rows))]] = True
    for i, pixels in enumerate(images):
        label = "defective" if likelihoods[i] > 0.5 else "functional"
        path = folder / ("val" if in_val[i] else "train") / label / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return {"train": int((~in_val).sum()), "val": int(in_val.sum())}


if __name__ == "__main__":
    main()
