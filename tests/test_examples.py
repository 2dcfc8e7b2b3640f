"""The data of the examples: what is written is what the digits or the IDX files hold."""

from __future__ import annotations

import gzip
import re
import runpy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from attr_batch import spec
from attr_batch.data import Dataset

ROOT = Path(__file__).parent.parent


@pytest.fixture
def make(monkeypatch):
    """Return a function that runs an example's make_data.py and loads what its job reads."""

    def run(example: str, folder: Path, *arguments: str) -> Dataset:
        script = ROOT / "examples" / example / "make_data.py"
        monkeypatch.setattr(sys, "argv", [str(script), str(folder), *arguments])
        runpy.run_path(str(script), run_name="__main__")
        job = spec.load(script.with_name("job.yaml"), [f"data.path={folder}"])
        return job.data.load()

    return run


def flat(images: np.ndarray) -> list[bytes]:
    return [image.tobytes() for image in images]


@pytest.fixture(scope="module")
def digits() -> dict[bytes, str]:
    """The label of every digit, by its bytes."""
    intensities, target = map(np.asarray, load_digits(return_X_y=True))
    pixels = np.rint(intensities * (255 / 16)).astype(np.uint8)
    return dict(zip(flat(pixels), map(str, target), strict=True))


def given(data: Dataset, whose: str) -> list[tuple[bytes, str]]:
    """Return the images of a contributor with their labels."""
    assert data.labels is not None
    rows = data.contributor == data.roster.ids.index(whose)
    labels = [data.label_names[label] for label in data.labels[rows]]
    return list(zip(flat(data.images[rows]), labels, strict=True))


@pytest.mark.parametrize("corrupt", ["pixels", "labels"])
def test_all_but_eve_give_digits_and_their_labels(make, tmp_path, digits, corrupt):
    data = make("poisoned", tmp_path / "images", "--corrupt", corrupt)
    assert [c.images for c in data.roster.contributors] == [224] * 8
    clean = {pair for name in data.roster.ids if name != "Eve" for pair in given(data, name)}
    assert len(clean) == 7 * 224
    assert clean <= set(digits.items())


def test_eve_shuffles_the_pixels_of_each_image(make, tmp_path, digits):
    data = make("poisoned", tmp_path / "images", "--corrupt", "pixels")
    poison = given(data, "Eve")
    assert not any(image in digits for image, _ in poison)
    known = {(bytes(sorted(image)), label) for image, label in digits.items()}
    assert {(bytes(sorted(image)), label) for image, label in poison} <= known


def test_eve_shuffles_labels_and_gives_noise(make, tmp_path, digits):
    data = make("poisoned", tmp_path / "images", "--corrupt", "labels")
    poison = given(data, "Eve")
    right = [digits[image] == label for image, label in poison if image in digits]
    assert len(right) == 112
    assert np.mean(right) < 0.3  # by chance .1
    noise = [np.frombuffer(image, np.uint8) for image, _ in poison if image not in digits]
    assert np.mean(noise) == pytest.approx(127.5, abs=5)


def test_the_seed_alone_decides_who_gets_what(make, tmp_path):
    seeds = {"first": "0", "again": "0", "other": "1"}
    found = {k: make("poisoned", tmp_path / k, "--seed", seed) for k, seed in seeds.items()}
    assert found["first"].digest == found["again"].digest != found["other"].digest


def write_idx(path: Path, values: np.ndarray) -> None:
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes()))


@pytest.fixture
def source(tmp_path) -> Path:
    """Thirty random images in the files of Fashion-MNIST, three of each class in turn."""
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (30, 28, 28), np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.tile(np.arange(10, dtype=np.uint8), 3))
    return tmp_path


def test_fashion_is_framed_and_its_classes_contribute(make, source, tmp_path):
    data = make("fashion", tmp_path / "images", "--source", str(source), "--per-class", "2")
    assert data.shape == (1, 32, 32)
    assert [c.images for c in data.roster.contributors] == [2] * 10
    content = gzip.decompress((source / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    first = np.frombuffer(content, np.uint8).reshape(30, 28, 28)[:20]  # two of each class
    assert set(flat(data.images[:, 0, 2:-2, 2:-2])) == set(flat(first))
    assert (data.images > 0).sum() == first.size  # the frame is black
    bag = data.images[data.contributor == data.roster.ids.index("bag")]
    assert set(flat(bag[:, 0, 2:-2, 2:-2])) == {first[8].tobytes(), first[18].tobytes()}


def test_what_is_no_idx_file_is_refused(make, source, tmp_path, capsys):
    (source / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"PNG"))
    with pytest.raises(SystemExit):
        make("fashion", tmp_path / "images", "--source", str(source))
    assert "is not an IDX file" in capsys.readouterr().err
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("example", ["poisoned", "fashion"])
def test_a_folder_that_exists_is_left_alone(make, source, tmp_path, example):
    (tmp_path / "images").mkdir()
    more = ["--source", str(source)] if example == "fashion" else []
    with pytest.raises(SystemExit):
        make(example, tmp_path / "images", *more)
    assert not list((tmp_path / "images").iterdir())


@pytest.mark.parametrize("page", sorted(ROOT.glob("examples/*/README.md")), ids=str)
def test_the_pages_name_files_that_exist(page):
    named = set(re.findall(r"examples/[\w/]+\.(?:py|yaml)", page.read_text()))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]
