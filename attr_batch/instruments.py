"""What a property needs fitted once: a classifier of the data's labels, or clusters of pixels.

An instrument is fitted on all contributors' images, never on a coalition's: it is the ruler, the
same for every coalition, and part of the digest of every value read from it. The paper measures
CIFAR-20 with the Inception network trained on ImageNet and CelebA-HQ with clusters of BLIP-VQA
embeddings (Section 5.1). Neither network comes with this package: a small net trained on the job's
own labels knows its classes better than ImageNet's does, and needs no download.

The classifier has one class more than there are labels: *noise*. Without it a net must call even
the static of an untrained model some class, and does so with a confidence of .9; then v(∅) beats
real coalitions and the jump from ∅ leaks into every value.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from attr_batch.data import Dataset
from attr_batch.errors import DataError, Interrupted, LedgerConflict
from attr_batch.log import Upkeep
from attr_batch.recipe import Part

if TYPE_CHECKING:
    import torch
    from sklearn.cluster import KMeans

WEIGHTS, CARD = "weights.safetensors", "card.json"
BATCH = (
    256  # images a net sees at once; the last batch is filled up, so results do not depend on it
)
HELD_OUT = 5  # every fifth image of a label is kept from training, for the quoted accuracy
STARTS = 4  # of k-means, of which the best is kept
MIN_STEPS = 200  # so that a few hundred images are learned, too


# -- the classifier -------------------------------------------------------------------------------


class LabelClassifier(Part):
    """A small convolutional net trained on the data's own labels and a noise class.

    Not the ImageNet Inception net: its figures compare within one data set only.
    """

    kind: Literal["label_classifier"] = "label_classifier"
    epochs: int = Field(default=20, ge=1, le=1000, description="Passes over the training images.")
    width: int = Field(default=24, ge=4, le=256, description="Channels of the first stage.")
    lr: float = Field(default=3e-3, gt=0, le=1, description="Peak learning rate of AdamW.")
    batch: int = Field(default=64, ge=4, le=4096, description="Labelled images a step.")
    resolution: int = Field(
        default=64, ge=8, le=256, description="Larger images are averaged down to this side."
    )

    def fit(
        self, data: Dataset, folder: Path, *, seed: int, upkeep: Upkeep, device: str = "cpu"
    ) -> None:
        """Train on four fifths of the data; write weights and card (accuracy on the last fifth).

        The same data give the same bytes on a CPU, whatever the number of its threads. ValueError
        without labels; Interrupted when stopped: nothing is written then, the next run fits anew.
        """
        if data.labels is None:
            raise ValueError("the data have no labels")
        held = held_out(data.labels)
        with _one_thread():
            net = self._train(data, data.labels, np.flatnonzero(~held), seed, upkeep, device)
        fitted = FittedClassifier(data.label_names, net, self._side(data.shape), device)
        card = {
            "instrument": self.recipe(),
            "seed": seed,
            "data": data.digest,
            "shape": list(data.shape),
            "labels": list(data.label_names),
            "images": {"training": int((~held).sum()), "held_out": int(held.sum())},
            **_quality(fitted, data.images[held], data.labels[held]),
        }
        _write(folder, net.cpu().state_dict(), card)

    def load(self, folder: Path, *, device: str = "cpu") -> FittedClassifier:
        """Return the classifier fitted in `folder`; LedgerConflict if a file is missing or torn."""
        from safetensors.torch import load_file

        card = _read_card(folder)
        names, shape = tuple(card["labels"]), tuple(card["shape"])
        net = self._net(shape, len(names))
        try:
            net.load_state_dict(load_file(folder / WEIGHTS))
        except Exception as error:  # safetensors and torch each have their own
            raise _torn(folder / WEIGHTS, error) from error
        return FittedClassifier(names, net.to(device).eval(), self._side(shape), device)

    def _side(self, shape: Sequence[int]) -> int:
        return min(shape[1], self.resolution)

    def _net(self, shape: Sequence[int], labels: int) -> torch.nn.Sequential:
        """Build stages of two convolutions that halve the side down to 2..5, then one layer."""
        from torch import nn

        side = self._side(shape)
        stages = max(2, round(math.log2(side / 4)))
        layers: list[nn.Module] = []
        channels = shape[0]
        for stage in range(stages):
            width = self.width * min(2**stage, 4)
            for c in (channels, width):
                layers += [nn.Conv2d(c, width, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
            channels = width
        flat = channels * (side // 2**stages) ** 2
        return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(flat, labels + 1))

    def _train(
        self,
        data: Dataset,
        labels: np.ndarray,
        rows: np.ndarray,
        seed: int,
        upkeep: Upkeep,
        device: str,
    ) -> torch.nn.Sequential:
        """Return the trained net: cross-entropy over the labels and noise, one-cycle AdamW."""
        import torch

        x = torch.from_numpy(pixels(data.images[rows], self._side(data.shape))).to(device)
        y = torch.from_numpy(labels[rows]).to(device)
        noise = len(data.label_names)
        devices = [] if device == "cpu" else [torch.device(device)]
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            net = self._net(data.shape, noise).to(device)
            batch = min(self.batch, len(x))
            steps = max(MIN_STEPS, self.epochs * (len(x) // batch))
            optimizer = torch.optim.AdamW(net.parameters(), lr=self.lr, weight_decay=1e-2)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
            generator = torch.Generator().manual_seed(seed)
            order = _batches(len(x), batch, generator)
            for step in range(1, steps + 1):
                i = next(order).to(device)
                j = i[torch.randperm(batch, generator=generator).to(device)][: max(1, batch // 4)]
                rejected = rejects(x[j], x[i[: len(j)]], y[j] != y[i[: len(j)]], generator)
                target = torch.cat([y[i], torch.full_like(y[j], noise)])
                logits = net(torch.cat([x[i], rejected]))
                loss = torch.nn.functional.cross_entropy(logits, target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                upkeep.tick(step, steps, loss=loss.item())
                if upkeep.stopping() and step < steps:
                    hint = "run again: the fit starts anew"
                    raise Interrupted("stopped while training the classifier", hint=hint)
        return net.eval()


@dataclass(frozen=True, eq=False)
class FittedClassifier:
    """A trained classifier: `labels` in the order of its outputs, the last output being noise."""

    labels: tuple[str, ...]
    net: torch.nn.Sequential
    side: int
    device: str

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return float64 (count, labels + 1) for uint8 images (count, channels, size, size).

        Every batch has `BATCH` images, the last is filled up with black ones, so an image's result
        does not depend on how many others are asked for.
        """
        import torch

        count = len(images)
        found = np.empty((count, len(self.labels) + 1))
        with _one_thread(), torch.inference_mode():
            for start in range(0, count, BATCH):
                part = pixels(images[start : start + BATCH], self.side)
                padding = [(0, BATCH - len(part)), *[(0, 0)] * 3]
                x = torch.from_numpy(np.pad(part, padding)).to(self.device)
                p = self.net(x).double().softmax(dim=1)[: len(part)]
                found[start : start + len(part)] = p.cpu().numpy()
        return found


def held_out(labels: np.ndarray) -> np.ndarray:
    """Return which images are kept from training: every fifth of each label.

    A contributor's images stand in the order of their content hashes, so this is a random choice
    that needs no seed and follows an image wherever it goes.
    """
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        held[np.flatnonzero(labels == label)[HELD_OUT - 1 :: HELD_OUT]] = True
    return held


def rejects(
    x: torch.Tensor, other: torch.Tensor, differs: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return images of no class, made from real ones `x` (count, channels, side, side) in [-1, 1].

    What broken and half-trained diffusion models draw: static of any mean and strength, soft blobs
    (the same at half the resolution), shuffled pixels, images drowned in noise, and, where the
    labels differ, two images laid over each other. The kinds take turns.
    """
    import torch

    count, channels, side, _ = x.shape

    def normal(s: int) -> torch.Tensor:
        return torch.randn(count, channels, s, s, generator=generator).to(x)

    def uniform() -> torch.Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator).to(x)

    static, mean, strength = normal(side), 2 * uniform() - 1, 1.5 * uniform()
    half = torch.nn.functional.interpolate(normal(side // 2), size=(side, side), mode="bilinear")
    shuffle = torch.rand(count, 1, side * side, generator=generator).argsort(dim=2).to(x.device)
    shuffled = x.flatten(2).gather(2, shuffle.expand(-1, channels, -1)).view_as(x)
    alpha = uniform() / 2
    kinds = (
        mean + strength * static,
        mean + 1.5 * strength * half,
        shuffled,
        alpha * x + (1 - alpha**2).sqrt() * static,
        torch.where(differs.view(-1, 1, 1, 1), (x + other) / 2, shuffled),
    )
    turn = torch.arange(count, device=x.device) % len(kinds)
    return torch.stack(kinds)[turn, torch.arange(count, device=x.device)].clamp(-1, 1)


def _batches(count: int, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield index batches without end, a fresh shuffle each epoch."""
    import torch

    while True:
        yield from torch.randperm(count, generator=generator).split(batch)[: count // batch]


def _quality(fitted: FittedClassifier, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return what a report should say of a classifier, measured on held-out images."""
    if not len(images):
        return {"accuracy": None, "accuracy_by_label": {}, "confidence": {}}
    p = fitted.probabilities(images)
    static = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    right = p.argmax(axis=1) == labels
    return {
        "accuracy": float(right.mean()),
        "accuracy_by_label": {
            fitted.labels[i]: float(right[labels == i].mean()) for i in np.unique(labels)
        },
        "confidence": {
            "held_out": float(p[:, :-1].max(axis=1).mean()),
            "static": float(fitted.probabilities(static)[:, :-1].max(axis=1).mean()),
        },
    }


# -- the clusters ---------------------------------------------------------------------------------


class PixelClusters(Part):
    """k-means clusters of the training images' pixels (k-means++ start, Lloyd's iteration).

    The paper clusters embeddings by Ward's method; k-means minimises the same within-cluster
    variance, takes memory linear in the number of images, and assigns new images by its own rule:
    the nearest centroid.
    """

    kind: Literal["pixel_clusters"] = "pixel_clusters"
    clusters: int = Field(default=20, ge=2, le=1000, description="Number of clusters.")
    resolution: int = Field(
        default=16, ge=4, le=64, description="Larger images are averaged down to this side."
    )

    def fit(
        self, data: Dataset, folder: Path, *, seed: int, upkeep: Upkeep, device: str = "cpu"
    ) -> None:
        """Cluster all images; write centroids and card. One CPU thread, whatever `device`.

        DataError if there are fewer different images than clusters; Interrupted when stopped
        between two of the `STARTS`: nothing is written then, the next run fits anew.
        """
        del device
        side = min(data.shape[1], self.resolution)
        x = pixels(data.images, side).reshape(len(data), -1)
        different = len(np.unique(x, axis=0))
        if different < self.clusters:
            what = f"{different} different images for {self.clusters} clusters"
            raise DataError(what, "properties: cluster_entropy", "set fewer `clusters`")
        with _one_thread():
            fitted = self._best(x, seed, upkeep)
            counts = np.bincount(fitted.predict(x), minlength=self.clusters)
        card = {
            "instrument": self.recipe(),
            "seed": seed,
            "data": data.digest,
            "shape": list(data.shape),
            "images": len(data),
            "counts": counts.tolist(),
        }
        _write(folder, {"centroids": np.ascontiguousarray(fitted.cluster_centers_)}, card)

    def _best(self, x: np.ndarray, seed: int, upkeep: Upkeep) -> KMeans:
        """Return the tightest of `STARTS` clusterings."""
        from sklearn.cluster import KMeans

        random_state = np.random.RandomState(seed % 2**32)
        found = []
        for start in range(1, STARTS + 1):
            found.append(KMeans(self.clusters, n_init=1, random_state=random_state).fit(x))  # pyright: ignore[reportArgumentType]
            if upkeep.tick(start, STARTS) and upkeep.stopping() and start < STARTS:
                hint = "run again: the fit starts anew"
                raise Interrupted("stopped while clustering the images", hint=hint)
        return min(found, key=lambda fitted: fitted.inertia_)

    def load(self, folder: Path, *, device: str = "cpu") -> FittedClusters:
        """Return the clusters fitted in `folder`; LedgerConflict if a file is missing or torn."""
        from safetensors.numpy import load_file

        del device
        card = _read_card(folder)
        try:
            centroids = load_file(folder / WEIGHTS)["centroids"]
        except Exception as error:  # safetensors has its own
            raise _torn(folder / WEIGHTS, error) from error
        return FittedClusters(centroids.astype(float), min(card["shape"][1], self.resolution))


@dataclass(frozen=True, eq=False)
class FittedClusters:
    """Centroids float64 (clusters, channels * side * side) of images scaled to [-1, 1]."""

    centroids: np.ndarray
    side: int

    def assign(self, images: np.ndarray) -> np.ndarray:
        """Return the nearest cluster, int64 (count,), of images (count, channels, size, size)."""
        c = self.centroids
        found = np.empty(len(images), np.int64)
        with _one_thread():
            for start in range(0, len(images), BATCH):
                x = pixels(images[start : start + BATCH], self.side).astype(float)
                x = x.reshape(len(x), -1)
                distance = (c**2).sum(axis=1) - 2 * x @ c.T  # less |x|^2, the same for all
                found[start : start + len(x)] = distance.argmin(axis=1)
        return found


Instrument = LabelClassifier | PixelClusters


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread within: how a sum is split among threads changes its last bits."""
    import torch
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


# -- pixels and files -----------------------------------------------------------------------------


def pixels(images: np.ndarray, side: int) -> np.ndarray:
    """Return uint8 images (count, channels, size, size) as float32 in [-1, 1], `side` wide.

    Larger images are averaged down over exact areas, A x A^T with A (side, size).
    """
    size = images.shape[-1]
    if side >= size:
        return images.astype(np.float32) / 127.5 - 1
    A = _areas(size, side)
    small = np.empty((*images.shape[:2], side, side), np.float32)
    for start in range(0, len(images), BATCH):
        x = images[start : start + BATCH].astype(np.float32) / 127.5 - 1
        small[start : start + BATCH] = A @ x @ A.T
    return small


@lru_cache
def _areas(size: int, side: int) -> np.ndarray:
    """Return A (side, size): the share of pixel j in cell i, rows summing to 1."""
    edges = np.arange(side + 1) * (size / side)
    low = np.maximum(edges[:-1, None], np.arange(size))
    high = np.minimum(edges[1:, None], np.arange(size) + 1)
    return (np.maximum(high - low, 0) / (size / side)).astype(np.float32)


def _write(folder: Path, tensors: dict[str, Any], card: dict[str, Any]) -> None:
    if isinstance(next(iter(tensors.values())), np.ndarray):
        from safetensors.numpy import save_file
    else:
        from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    text = json.dumps(card, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (folder / CARD).write_text(text + "\n", encoding="utf-8")


def _read_card(folder: Path) -> dict[str, Any]:
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if not isinstance(card["shape"], list):
            raise TypeError("shape is not a list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _torn(folder / CARD, error) from error
    return card


def _torn(path: Path, error: BaseException) -> LedgerConflict:
    what = f"cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    return LedgerConflict(what, str(path), "`attr-batch repair` moves it away; then run again")
