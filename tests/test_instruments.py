import contextlib
import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from attr_batch.data import Digits, arrange
from attr_batch.errors import DataError, Interrupted, LedgerConflict
from attr_batch.instruments import (
    BATCH,
    MIN_STEPS,
    STARTS,
    LabelClassifier,
    PixelClusters,
    held_out,
    pixels,
    rejects,
)
from attr_batch.log import Upkeep

SMALL = LabelClassifier(epochs=1, width=8)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return Digits().load()


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    SMALL.fit(digits, folder, seed=3, upkeep=Upkeep())
    return folder


def colours(size: int, channels: int, count: int = 60):
    """Images that are bright on the left or on the right, labelled so."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (count, channels, size, size), np.uint8)
    labels = ["left" if i % 2 else "right" for i in range(count)]
    for image, label in zip(images, labels, strict=True):
        half = slice(0, size // 2) if label == "left" else slice(size // 2, size)
        image[:, :, half] += 180
    return arrange(images, [str(i % 3) for i in range(count)], labels)


def test_the_classifier_knows_digits_and_noise(digits, folder):
    card = json.loads((folder / "card.json").read_text())
    fitted = SMALL.load(folder)
    held = held_out(digits.labels)
    p = fitted.probabilities(digits.images[held])
    assert card["accuracy"] == (p.argmax(axis=1) == digits.labels[held]).mean() > 0.95
    assert card["images"] == {"training": int((~held).sum()), "held_out": int(held.sum())}
    assert card["labels"] == list("0123456789")
    assert card["confidence"]["held_out"] == p[:, :-1].max(axis=1).mean() > 0.85
    assert card["confidence"]["static"] < 0.05
    grey = np.full((1, 1, 8, 8), 128, np.uint8)
    assert fitted.probabilities(grey)[0, -1] > 0.9
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-12)


def test_fit_gives_the_same_bytes_and_leaves_the_global_stream_alone(digits, folder, tmp_path):
    torch.manual_seed(11)
    SMALL.fit(digits, tmp_path / "again", seed=3, upkeep=Upkeep())
    assert torch.initial_seed() == 11
    torch.testing.assert_close(
        torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(11))
    )
    SMALL.fit(digits, tmp_path / "other", seed=4, upkeep=Upkeep())
    for name in ("weights.safetensors", "card.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes()


def test_probabilities_do_not_depend_on_the_split(digits, folder):
    fitted = SMALL.load(folder)
    images = digits.images[: BATCH + 44]
    whole = fitted.probabilities(images)
    pieces = [fitted.probabilities(part) for part in np.split(images, [1, 8, 100, BATCH + 1])]
    assert (np.concatenate(pieces) == whole).all()
    assert (fitted.probabilities(images[::-1])[::-1] == whole).all()


@pytest.mark.parametrize(("size", "channels"), [(8, 3), (11, 1), (33, 3), (96, 1)])
def test_any_size_and_channel_count(tmp_path, size, channels):
    data = colours(size, channels)
    part = LabelClassifier(epochs=1, width=4, batch=16, resolution=32)
    part.fit(data, tmp_path, seed=0, upkeep=Upkeep())
    assert json.loads((tmp_path / "card.json").read_text())["accuracy"] == 1.0
    p = part.load(tmp_path).probabilities(data.images)
    assert (p.argmax(axis=1) == data.labels).mean() > 0.95


def test_every_fifth_image_of_a_label_is_held_out():
    labels = np.array([0, 1, 0, 0, 1, 0, 0, 0, 1, 2, 1, 1])
    assert np.flatnonzero(held_out(labels)).tolist() == [6, 11]


def test_a_single_image_of_a_label_is_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 1, 8, 8), np.uint8)
    data = arrange(images, ["a", "b", "b"], ["x", "y", "z"])
    LabelClassifier(width=4, batch=4).fit(data, tmp_path, seed=0, upkeep=Upkeep())
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["accuracy"] is None
    assert card["images"] == {"training": 3, "held_out": 0}


def test_rejects_are_in_range_and_blend_only_what_differs():
    x, other = torch.full((50, 1, 8, 8), -0.5), torch.full((50, 1, 8, 8), 1.0)
    generator = torch.Generator().manual_seed(0)
    differs = torch.arange(50) < 25
    made = rejects(x, other, differs, generator)
    assert made.shape == x.shape
    assert made.abs().max() <= 1
    blends = made[4::5, 0, 0, 0]  # the fifth kind
    assert blends.tolist() == [0.25] * 5 + [-0.5] * 5


def test_stopped_fit_writes_nothing(digits, tmp_path):
    calls = []

    def stopping() -> bool:
        calls.append(0)
        return len(calls) > 5

    with pytest.raises(Interrupted, match="stopped while training the classifier"):
        SMALL.fit(digits, tmp_path / "x", seed=0, upkeep=Upkeep(stopping=stopping))
    assert not (tmp_path / "x").exists()


def test_progress_ends_at_the_number_of_steps(tmp_path):
    seen = []
    upkeep = Upkeep(lambda done, total, figures: seen.append((done, total, set(figures))))
    part = LabelClassifier(width=4, batch=16)
    part.fit(colours(8, 1), tmp_path, seed=0, upkeep=upkeep)
    assert seen[-1] == (MIN_STEPS, MIN_STEPS, {"loss"})


def test_unlabelled_data_are_a_mistake_of_the_caller(tmp_path):
    data = arrange(np.zeros((2, 1, 8, 8), np.uint8), ["a", "b"], None)
    with pytest.raises(ValueError, match="no labels"):
        SMALL.fit(data, tmp_path, seed=0, upkeep=Upkeep())


@contextlib.contextmanager
def threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        with threadpool_limits(number):
            yield
        assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("part", [LabelClassifier(width=4, batch=32), PixelClusters(clusters=5)])
def test_the_number_of_threads_changes_no_bit(tmp_path, part):
    data = colours(16, 3, count=300)
    for number in (1, 2):
        with threads(number):
            part.fit(data, tmp_path / str(number), seed=0, upkeep=Upkeep())
    for name in ("weights.safetensors", "card.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    fitted = part.load(tmp_path / "1")
    measure = fitted.assign if isinstance(part, PixelClusters) else fitted.probabilities
    measured = []
    for number in (1, 2):
        with threads(number):
            measured.append(measure(data.images))
    assert (measured[0] == measured[1]).all()


# -- clusters -------------------------------------------------------------------------------------


def test_clusters_find_separate_groups(tmp_path):
    rng = np.random.default_rng(0)
    base = np.array([10, 90, 170, 240])
    images = (base.repeat(20)[:, None, None, None] + rng.integers(-8, 9, (80, 1, 8, 8))).astype(
        "u1"
    )
    data = arrange(images, [str(i % 2) for i in range(80)], None)
    part = PixelClusters(clusters=4)
    part.fit(data, tmp_path, seed=0, upkeep=Upkeep())
    assert json.loads((tmp_path / "card.json").read_text())["counts"] == [20] * 4
    found = part.load(tmp_path).assign(images)
    assert len(set(found)) == 4
    assert (found == found[::20].repeat(20)).all()


def test_assign_is_the_nearest_centroid_in_float64(digits, tmp_path):
    part = PixelClusters()
    part.fit(digits, tmp_path / "a", seed=1, upkeep=Upkeep())
    part.fit(digits, tmp_path / "b", seed=1, upkeep=Upkeep())
    assert (tmp_path / "a/weights.safetensors").read_bytes() == (
        tmp_path / "b/weights.safetensors"
    ).read_bytes()
    fitted = part.load(tmp_path / "a")
    x = digits.images.reshape(len(digits), -1) / 127.5 - 1
    wanted = ((x[:, None] - fitted.centroids) ** 2).sum(axis=2).argmin(axis=1)
    assert (fitted.assign(digits.images) == wanted).all()


def test_starts_are_those_of_scikit_learn(digits, tmp_path):
    part = PixelClusters()
    part.fit(digits, tmp_path, seed=7, upkeep=Upkeep())
    x = pixels(digits.images, 8).reshape(len(digits), -1)
    with threads(1):
        theirs = KMeans(20, n_init=STARTS, random_state=7).fit(x)
    assert (part.load(tmp_path).centroids == theirs.cluster_centers_).all()


@pytest.mark.parametrize("start", [1, 3])
def test_clustering_stops_between_two_starts(digits, tmp_path, start):
    seen = []
    upkeep = Upkeep(lambda *a: seen.append(a[:2]), lambda: len(seen) >= start, seconds=0)
    with pytest.raises(Interrupted, match="stopped while clustering"):
        PixelClusters().fit(digits, tmp_path / "x", seed=0, upkeep=upkeep)
    assert seen == [(i, STARTS) for i in range(1, start + 1)]
    assert not (tmp_path / "x").exists()


def test_too_few_different_images_for_the_clusters(tmp_path):
    data = arrange(np.zeros((30, 1, 8, 8), np.uint8), ["a", "b"] * 15, None)
    with pytest.raises(DataError, match="1 different images for 20 clusters\n  hint: set fewer"):
        PixelClusters().fit(data, tmp_path, seed=0, upkeep=Upkeep())


# -- pixels and files -----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "side"), [(8, 8), (8, 16), (12, 4), (11, 4), (33, 16)])
def test_pixels_are_averaged_over_exact_areas(size, side):
    images = np.random.default_rng(0).integers(0, 256, (3, 2, size, size), np.uint8)
    got = pixels(images, side)
    if side >= size:
        assert (got == images.astype(np.float32) / 127.5 - 1).all()
        return
    fine = images.repeat(side, axis=2).repeat(
        side, axis=3
    )  # every cell is now size x size of these
    cells = fine.reshape(3, 2, side, size, side, size).mean(axis=(3, 5))
    np.testing.assert_allclose(got, cells / 127.5 - 1, atol=2e-6)


@pytest.mark.parametrize("part", [SMALL, PixelClusters()])
@pytest.mark.parametrize("damaged", ["card.json", "weights.safetensors"])
def test_torn_files_are_conflicts(digits, tmp_path, part, damaged):
    with pytest.raises(LedgerConflict, match=r"card\.json"):
        part.load(tmp_path)
    part.fit(colours(8, 1), tmp_path, seed=0, upkeep=Upkeep())
    part.load(tmp_path)
    whole = (tmp_path / damaged).read_bytes()
    (tmp_path / damaged).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LedgerConflict, match=damaged) as caught:
        part.load(tmp_path)
    assert "repair" in caught.value.problems[0].hint


def test_weights_of_another_net_are_a_conflict(folder):
    with pytest.raises(LedgerConflict, match=r"weights\.safetensors"):
        LabelClassifier(epochs=1, width=16).load(folder)


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"width": 3}, {"lr": 0}, {"resolution": 4}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValidationError):
        LabelClassifier(**bad)
