"""Deal scikit-learn's handwritten digits to eight contributors, one of whom poisons the data.

Writes a folder of PNG files with a metadata.csv, as Hugging Face's ImageFolder lays it out. Every
contributor gets 224 digits at random; those of Eve are then corrupted.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

CONTRIBUTORS = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
POISONED = "Eve"


def shuffle_pixels(
    images: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Put the pixels of each image (count, 8, 8) in an order of its own."""
    return rng.permuted(images.reshape(len(images), -1), axis=1).reshape(images.shape), labels


def shuffle_labels(
    images: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle the labels (count,) and put noise in the place of every other image."""
    images = images.copy()
    images[::2] = rng.integers(0, 256, images[::2].shape, np.uint8)
    return images, rng.permutation(labels)


CORRUPTIONS = {"pixels": shuffle_pixels, "labels": shuffle_labels}


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument(
        "--corrupt",
        choices=CORRUPTIONS,
        default="pixels",
        help=f"what {POISONED} does: shuffle the pixels of each image (default), or shuffle the "
        "labels and replace half of the images by noise",
    )
    parser.add_argument("--seed", type=int, default=0, help="who gets which digits (default 0)")
    given = parser.parse_args()
    if given.folder.exists():
        parser.error(f"{given.folder} exists already")

    rng = np.random.default_rng(given.seed)
    intensities, target = map(np.asarray, load_digits(return_X_y=True))
    pixels = np.rint(intensities * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    hands = rng.permutation(len(pixels))[: len(pixels) // 8 * 8].reshape(8, -1)
    given.folder.mkdir(parents=True)
    with (given.folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "contributor", "digit"])
        for name, hand in zip(CONTRIBUTORS, hands, strict=True):
            images, labels = pixels[hand], target[hand]
            if name == POISONED:
                images, labels = CORRUPTIONS[given.corrupt](images, labels, rng)
            (given.folder / name).mkdir()
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                file_name = f"{name}/{i:03d}.png"
                Image.fromarray(image).save(given.folder / file_name)
                writer.writerow([file_name, name, label])


if __name__ == "__main__":
    main()
