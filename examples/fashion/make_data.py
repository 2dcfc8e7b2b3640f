"""Lay out some of Fashion-MNIST (Xiao et al., 2017) as a folder of 32x32 images.

Reads the training set's two IDX files, takes the first images of each of the ten classes, frames
them with black from 28x28 to 32x32, and writes PNG files with a metadata.csv, as Hugging Face's
ImageFolder lays it out. The classes are the contributors.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
FRAME = ((0, 0), (2, 2), (2, 2))  # 28x28 to 32x32, which halves more often


def read_idx(path: Path) -> np.ndarray:
    """Return the unsigned bytes of an IDX file in their shape; ValueError for anything else.

    Bytes 0, 0, the type (8), the number of dimensions, each dimension as 32 bits with the high byte
    first, and the values (LeCun's description of MNIST's files).
    """
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument(
        "--source", type=Path, required=True, metavar="DIR", help=f"holds {IMAGES} and {LABELS}"
    )
    parser.add_argument(
        "--per-class", type=int, default=300, metavar="N", help="images of each class (default 300)"
    )
    given = parser.parse_args()
    if given.folder.exists():
        parser.error(f"{given.folder} exists already")
    try:
        images = np.pad(read_idx(given.source / IMAGES), FRAME)
        labels = read_idx(given.source / LABELS)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    given.folder.mkdir(parents=True)
    with (given.folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "class"])
        for number, name in enumerate(CLASSES):
            (given.folder / name).mkdir()
            for i in np.flatnonzero(labels == number)[: given.per_class]:
                file_name = f"{name}/{i:05d}.png"
                Image.fromarray(images[i]).save(given.folder / file_name)
                writer.writerow([file_name, name])


if __name__ == "__main__":
    main()
