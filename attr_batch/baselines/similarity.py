"""Baselines that compare training images with generated ones in some space of features.

The paper's Table 1 has cosine similarity of pixels and of CLIP embeddings, and for CelebA-HQ the
distance to the mean of the generated images' BLIP-VQA embeddings. An image's score is its mean
over the generated images. As the mean of cosines is the product with the mean unit vector, no
matrix of all pairs is needed.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from attr_batch.baselines.material import Material, ScoredByImage
from attr_batch.data import existing_folder
from attr_batch.errors import DataError, SpecError
from attr_batch.instruments import FittedClassifier, pixels
from attr_batch.models import NoiseSchedule
from attr_batch.recipe import UNHASHED, file_digest

if TYPE_CHECKING:
    import torch

BATCH = 256  # images an embedding network sees at once

Folder = Annotated[str, UNHASHED, Field(min_length=1)]


class _Cosine(ScoredByImage):
    """Mean cosine similarity to the generated images."""

    def embed(self, material: Material, images: np.ndarray) -> np.ndarray:
        """Return float32 (images, features) of uint8 (images, channels, size, size)."""
        raise NotImplementedError

    def by_image(self, material: Material) -> np.ndarray:
        """Return float64 (training images,)."""
        training = unit(self.embed(material, material.dataset.images))
        generated = unit(self.embed(material, material.generated))
        return training @ generated.mean(axis=0)


class PixelSimilarity(_Cosine):
    """Cosine similarity of pixels in [-1, 1]."""

    kind: Literal["pixel_similarity"] = "pixel_similarity"

    def embed(self, material: Material, images: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """Return the pixels."""
        return _flat_pixels(images)


class OwnSimilarity(_Cosine):
    """Cosine similarity of the penultimate features of the labels' classifier.

    It stands in for CLIP where no such network is at hand: a net trained on the job's own labels.
    Without labels there is no classifier and this is `pixel_similarity`.
    """

    kind: Literal["own_similarity"] = "own_similarity"

    def embed(self, material: Material, images: np.ndarray) -> np.ndarray:
        """Return what the classifier's last layer sees, or the pixels."""
        return _own_features(images, material.classifier)


class ClipSimilarity(_Cosine):
    """Cosine similarity of CLIP image embeddings.

    `path` is a local folder as transformers' `save_pretrained` writes it: config.json, weights as
    safetensors, preprocessor_config.json. Any model will do that transformers' AutoModel knows and
    that has `get_image_features` (CLIP, SigLIP, ...).
    """

    kind: Literal["clip_similarity"] = "clip_similarity"
    path: Folder = Field(description="Folder of the model, safetensors.")

    def recipe(self) -> dict[str, Any]:
        """Return the fields and the digests of the model's files."""
        return {**super().recipe(), "files": _model_files(self.path)}

    def check(self, schedule: NoiseSchedule, where: str) -> None:
        """Raise SpecError without transformers, DataError if there is no such model."""
        super().check(schedule, where)
        ClipModel.load(self.path, "cpu", where)

    def embed(self, material: Material, images: np.ndarray) -> np.ndarray:
        """Return the projected image embeddings."""
        return _clip_features(material, self.path, images)


class EmbeddingDistance(ScoredByImage):
    """Minus the Euclidean distance to the mean embedding of the generated images.

    Minus, so that more credit goes to the nearer. The paper embeds CelebA-HQ with BLIP-VQA; here it
    is done as in `own_similarity` or, with `path`, as in `clip_similarity`.
    """

    kind: Literal["embedding_distance"] = "embedding_distance"
    path: Folder | None = Field(default=None, description="Folder of a CLIP model, safetensors.")

    def recipe(self) -> dict[str, Any]:
        """Return the fields and the digests of the model's files."""
        files = None if self.path is None else _model_files(self.path)
        return {**super().recipe(), "files": files}

    def check(self, schedule: NoiseSchedule, where: str) -> None:
        """Raise SpecError without transformers, DataError if there is no such model."""
        super().check(schedule, where)
        if self.path is not None:
            ClipModel.load(self.path, "cpu", where)

    def by_image(self, material: Material) -> np.ndarray:
        """Return float64 (training images,)."""
        centre = self._embed(material, material.generated).mean(axis=0, dtype=float)
        difference = self._embed(material, material.dataset.images) - centre
        return -np.linalg.norm(difference, axis=1)

    def _embed(self, material: Material, images: np.ndarray) -> np.ndarray:
        if self.path is None:
            return _own_features(images, material.classifier)
        return _clip_features(material, self.path, images)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return the rows of (count, features), each divided by its length, as float64; 0 stays 0."""
    return divided(vectors, np.linalg.norm(vectors.astype(float), axis=1))


def divided(vectors: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the rows of (count, features), each divided by its `lengths` (count,), if not 0."""
    lengths = lengths[:, None]
    return np.divide(vectors, lengths, out=np.zeros(vectors.shape), where=lengths > 0)


def _flat_pixels(images: np.ndarray) -> np.ndarray:
    return pixels(images, images.shape[-1]).reshape(len(images), -1)


def _own_features(images: np.ndarray, classifier: FittedClassifier | None) -> np.ndarray:
    import torch

    if classifier is None:
        return _flat_pixels(images)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            x = torch.from_numpy(pixels(images[start : start + BATCH], classifier.side))
            parts.append(classifier.net[:-1](x.to(classifier.device)).cpu().numpy())
    return np.concatenate(parts)


# -- CLIP -----------------------------------------------------------------------------------------


def _clip_features(material: Material, path: str, images: np.ndarray) -> np.ndarray:
    model = material.once(
        ("clip", path), lambda: ClipModel.load(path, material.device, "baselines")
    )
    return model.embed(images)


class ClipModel:
    """An image encoder of transformers and the numbers with which it wants its pixels scaled."""

    def __init__(self, module: Any, side: int, mean: list[float], std: list[float]) -> None:
        self.module, self.side, self.mean, self.std = module, side, mean, std

    @classmethod
    def load(cls, path: str, device: str, where: str) -> ClipModel:
        """Read a local folder. SpecError without transformers, DataError if it is no such model."""
        try:
            from transformers import AutoModel
        except ImportError:
            hint = "pip install transformers, or use `kind: own_similarity`"
            raise SpecError("needs the package transformers", where, hint) from None
        folder = existing_folder(path, f"{where}.path", "wanted a model saved by transformers")
        try:
            scaling = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
            module = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
            side = module.config.vision_config.image_size
            module.get_image_features  # noqa: B018
            mean, std = scaling["image_mean"], scaling["image_std"]
        except Exception as error:  # whatever transformers stumbles over lies in the folder
            what = f"cannot be read as an image encoder: {type(error).__name__}: {error}"
            hint = "wanted config.json, model.safetensors and preprocessor_config.json"
            raise DataError(what, str(folder), hint) from error
        return cls(module.to(device).eval(), side, mean, std)

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Return float32 (images, features) of uint8 (images, channels, size, size)."""
        import torch

        parts = []
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                x = self._pixels(images[start : start + BATCH])
                found = self.module.get_image_features(pixel_values=x)
                found = getattr(found, "pooler_output", found)  # transformers 5 wraps the tensor
                parts.append(found.float().cpu().numpy())
        return np.concatenate(parts)

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        """Return the images as the encoder wants them: colour, its size, its scale."""
        import torch

        device = next(self.module.parameters()).device
        x = torch.tensor(images, device=device).float() / 255
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        x = torch.nn.functional.interpolate(
            x, size=(self.side, self.side), mode="bicubic", antialias=True
        ).clamp(0, 1)
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


def _model_files(path: str) -> dict[str, str]:
    """Return the sha256 of the files that decide what a model folder computes, by name."""
    names = ("config.json", "preprocessor_config.json")
    files = sorted(p for p in Path(path).glob("*") if p.suffix == ".safetensors" or p.name in names)
    return {
        file.name: _digest(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files
    }


@functools.lru_cache(maxsize=32)
def _digest(path: Path, *_stamp: int) -> str:
    return file_digest(path)
