"""Global properties F: one number, with a standard error, of the images a model draws.

A property is a functional of the learned distribution, estimated from a few hundred samples (the
paper's Section 3: Inception Score, diversity as the entropy over clusters, share of a style, ...).
Values are plug-in estimates as published, without correction of their bias, which the number of
images fixes and which therefore nearly cancels between coalitions.

A standard error here speaks of the images as if they were drawn anew, independently. All coalitions
start from the same initial noise, so the difference of two utilities is usually known better than
two standard errors say; training noise, which they cannot see, comes on top.

All but `Call` are a function of the mean of some statistics of the single images. `statistics` and
`of_mean` say which, so that the property of any union of sets is known from their sums: from the
contributors' training images, a free game that resembles the utilities (`estimators.surrogate`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from attr_batch.data import Name, natural
from attr_batch.errors import NumericsError, SpecError
from attr_batch.instruments import (
    FittedClassifier,
    FittedClusters,
    Instrument,
    LabelClassifier,
    PixelClusters,
)
from attr_batch.recipe import UNHASHED, Part

__all__ = [
    "Call",
    "ClassShare",
    "ClassifierConfidence",
    "ClassifierInceptionScore",
    "ClusterEntropy",
    "Instrument",
    "Measurement",
    "Property",
]

# Under this name a value file lies in the ledger; what it is called changes no number.
FileName = Annotated[str, UNHASHED, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]
InstrumentId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


# Whatever the user's own code raises is a mistake in the spec's terms, sys.exit() included.
_THEIRS = (Exception, SystemExit)


@dataclass(frozen=True)
class Measurement:
    """A property of one set of images: value and standard error, both finite."""

    value: float
    stderr: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and math.isfinite(self.stderr) and self.stderr >= 0):
            raise NumericsError(f"measured {self.value} with standard error {self.stderr}")


class _Fitted(Part):
    """A property that is read with an instrument fitted once, to all contributors' images."""

    # No part of the recipe: the instrument's id is in every digest, whether pinned or found.
    fitted: Annotated[InstrumentId | None, UNHASHED] = Field(
        default=None,
        description="Id of a fitted instrument to use as it is, whatever the data are now.",
    )


# -- with clusters --------------------------------------------------------------------------------


class ClusterEntropy(_Fitted):
    """Diversity: entropy in nats of the images' histogram over clusters of all training images.

    The paper's measure for CelebA-HQ, with clusters of pixels in place of BLIP embeddings; needs no
    labels. Between 0 (all images in one cluster) and log(clusters).
    """

    kind: Literal["cluster_entropy"]
    name: FileName = "cluster_entropy"
    clusters: int = Field(
        default=20, ge=2, le=1000, description="k-means clusters of the training images."
    )

    title: ClassVar[str] = "cluster entropy"
    unit: ClassVar[str] = "nats"
    higher_means: ClassVar[str] = "more diverse images"

    def check(
        self,
        labels: tuple[str, ...],  # noqa: ARG002
        where: str,
        images: int | None = None,
    ) -> None:
        """Raise SpecError if there are fewer images (None: nobody knows yet) than clusters."""
        if images is not None and images < self.clusters:
            what = f"{self.clusters} clusters of {images} images"
            raise SpecError(what, f"{where}.clusters", f"set {images} or fewer")

    def instrument(self) -> PixelClusters:
        """Return what has to be fitted once."""
        return PixelClusters(clusters=self.clusters)

    def measure(self, images: np.ndarray, instrument: FittedClusters) -> Measurement:
        """Return H = -sum p log p of uint8 images (count, channels, size, size), and its jackknife.

        Leaving out one image of cluster j gives the same entropy for all n_j of them, so the
        delete-one jackknife costs one term per cluster.
        """
        counts = np.bincount(instrument.assign(images), minlength=len(instrument.centroids))
        seen = counts[counts > 0]
        left_out = np.array([_entropy(seen - unit) for unit in np.eye(len(seen), dtype=int)])
        return Measurement(_entropy(seen), _jackknife(left_out, seen))

    def statistics(self, images: np.ndarray, instrument: FittedClusters) -> np.ndarray:
        """Return (count, clusters): 1 at the image's cluster, else 0."""
        return np.eye(len(instrument.centroids))[instrument.assign(images)]

    def of_mean(self, mean: np.ndarray) -> np.ndarray:
        """Return the entropy (m,) of histograms (m, clusters)."""
        return -_x_log_x(mean).sum(axis=1)


# -- with the classifier --------------------------------------------------------------------------


class _Classified(_Fitted):
    """A property read from the labels' classifier."""

    classifier: LabelClassifier = Field(
        default_factory=LabelClassifier, description="Trained once on the data's own labels."
    )

    def check(
        self,
        labels: tuple[str, ...],
        where: str,
        images: int | None = None,  # noqa: ARG002
    ) -> None:
        """Raise SpecError unless the data have at least two labels."""
        if len(labels) < 2:
            found = f"only {labels[0]!r}" if labels else "none"
            hint = "set data.label to the column with the classes, or use `kind: cluster_entropy`"
            raise SpecError(f"needs data with at least two labels, there is {found}", where, hint)

    def instrument(self) -> LabelClassifier:
        """Return what has to be fitted once."""
        return self.classifier


class ClassifierConfidence(_Classified):
    """How recognisable the images are: mean of the largest probability among the data's labels.

    The classifier's noise class takes the probability of images that look like nothing, so static
    scores near 0.
    """

    kind: Literal["classifier_confidence"]
    name: FileName = "classifier_confidence"

    title: ClassVar[str] = "classifier confidence"
    unit: ClassVar[str] = "probability"
    higher_means: ClassVar[str] = "more recognisable images"

    def measure(self, images: np.ndarray, instrument: FittedClassifier) -> Measurement:
        """Return the mean over uint8 images (count, channels, size, size); stderr = sd / sqrt N."""
        best = self.statistics(images, instrument)[:, 0]
        return Measurement(float(best.mean()), float(best.std(ddof=1) / math.sqrt(len(best))))

    def statistics(self, images: np.ndarray, instrument: FittedClassifier) -> np.ndarray:
        """Return (count, 1): the largest probability among the labels."""
        return instrument.probabilities(images)[:, :-1].max(axis=1, keepdims=True)

    def of_mean(self, mean: np.ndarray) -> np.ndarray:
        """Return the mean (m,) of means (m, 1)."""
        return mean[:, 0]


class ClassifierInceptionScore(_Classified):
    """Inception Score under the labels' classifier, *not* under ImageNet's Inception network.

    exp(mean KL(p(y|x) || p(y))): between 1 and the number of labels, high where each image is
    clearly of one class and all classes come up. It compares with no published Inception Score. The
    noise class's probability is spread evenly over the labels: an image that looks like nothing
    says nothing about its class. (As a class of its own, noise would count as variety.)
    """

    kind: Literal["classifier_inception_score"]
    name: FileName = "classifier_inception_score"

    title: ClassVar[str] = "Inception Score (own classifier)"
    unit: ClassVar[str] = "classes"
    higher_means: ClassVar[str] = "clearer and more varied images"

    def measure(self, images: np.ndarray, instrument: FittedClassifier) -> Measurement:
        """Return the score of uint8 images (count, channels, size, size) and its jackknife.

        E KL(p_i || p) = E sum p_i log p_i - sum p log p with p = E p_i, so leaving out an image
        costs one term per label.
        """
        found = self.statistics(images, instrument)
        certainty, p = found[:, 0], found[:, 1:]
        N = len(p)
        without = (p.sum(axis=0) - p) / (N - 1)
        left_out = (certainty.sum() - certainty) / (N - 1) - _x_log_x(without).sum(axis=1)
        score = certainty.mean() - _x_log_x(p.mean(axis=0)).sum()
        return Measurement(float(np.exp(score)), _jackknife(np.exp(left_out)))

    def statistics(self, images: np.ndarray, instrument: FittedClassifier) -> np.ndarray:
        """Return (count, 1 + labels): sum p log p of the image, and its p."""
        p = instrument.probabilities(images)
        p = p[:, :-1] + p[:, -1:] / (p.shape[1] - 1)
        return np.column_stack([_x_log_x(p).sum(axis=1), p])

    def of_mean(self, mean: np.ndarray) -> np.ndarray:
        """Return the score (m,) of means (m, 1 + labels)."""
        return np.exp(mean[:, 0] - _x_log_x(mean[:, 1:]).sum(axis=1))


class ClassShare(_Classified):
    """Share of the images that the classifier takes for one label.

    With labels as contributors the right answer is known beforehand (that label's contributor
    comes first), which makes it the test of a whole job.
    """

    kind: Literal["class_share"]
    label: Name = Field(description="One of the data's labels.")
    name: FileName = Field(
        default="", validate_default=False, description="Default: kind and label."
    )

    unit: ClassVar[str] = "share"

    @property
    def title(self) -> str:
        """What tables call it."""
        return f"share of {self.label}"

    @property
    def higher_means(self) -> str:
        """Completes "A higher value means ..."."""
        return f"more images of {self.label}"

    @model_validator(mode="before")
    @classmethod
    def _name_it(cls, given: Any) -> Any:
        return _named(given, "label")

    def check(self, labels: tuple[str, ...], where: str, images: int | None = None) -> None:
        """Raise SpecError unless the data have this label."""
        super().check(labels, where, images)
        if self.label not in labels:
            known = ", ".join(sorted(labels, key=natural)[:30])
            what = f"no image has the label {self.label!r}"
            raise SpecError(what, f"{where}.label", f"the labels are: {known}")

    def measure(self, images: np.ndarray, instrument: FittedClassifier) -> Measurement:
        """Return k / N of uint8 images (count, channels, size, size).

        stderr = sqrt(q (1 - q) / N) with q = (k + 1/2) / (N + 1): binomial, but not 0 where none or
        all of the images are of the label, which a few hundred images cannot establish.
        """
        hits = self.statistics(images, instrument)
        k, N = int(hits.sum()), len(hits)
        q = (k + 0.5) / (N + 1)
        return Measurement(k / N, math.sqrt(q * (1 - q) / N))

    def statistics(self, images: np.ndarray, instrument: FittedClassifier) -> np.ndarray:
        """Return (count, 1): 1 where the image is taken for the label, else 0."""
        j = instrument.labels.index(self.label)
        hits = instrument.probabilities(images).argmax(axis=1) == j
        return hits.astype(np.float64)[:, None]

    def of_mean(self, mean: np.ndarray) -> np.ndarray:
        """Return the share (m,) of means (m, 1)."""
        return mean[:, 0]


# -- with the user's own code ---------------------------------------------------------------------


class Call(Part):
    """A function of your own: `target: "package.module:function"`.

    It is given the images, uint8 (count, channels, size, size), and returns a number, or a pair of
    a number and its standard error. Where it returns no error, it is called on the images without
    each of `groups` parts in turn (delete-a-group jackknife). It must not depend on anything but
    the images. The sha256 of the module's file is part of the recipe; of what the module itself
    imports, nothing is. The module must belong to an installed distribution (`pip install`, also
    editable): what lies in the working folder, beside the job or on PYTHONPATH is not run.
    """

    kind: Literal["call"]
    target: str = Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        max_length=200,
        description='"package.module:function" of an installed package.',
    )
    name: FileName = Field(
        default="", validate_default=False, description="Default: kind and target."
    )
    groups: int = Field(default=10, ge=2, le=1000, description="Parts of the jackknife.")

    fitted: ClassVar[None] = None
    unit: ClassVar[str] = ""

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.name

    @property
    def higher_means(self) -> str:
        """Completes "A higher value means ..."."""
        return f"a higher {self.name}"

    @model_validator(mode="before")
    @classmethod
    def _name_it(cls, given: Any) -> Any:
        return _named(given, "target")

    def recipe(self) -> dict[str, Any]:
        """Return the fields and the digest of the function's source file."""
        return {**super().recipe(), "source": hashlib.sha256(self._source(self.name)).hexdigest()}

    def check(
        self,
        labels: tuple[str, ...],  # noqa: ARG002
        where: str,
        images: int | None = None,  # noqa: ARG002
    ) -> None:
        """Import the function; SpecError says what is missing."""
        self._function(f"{where}.target")

    def instrument(self) -> None:
        """Return None: nothing has to be fitted."""

    def measure(self, images: np.ndarray, instrument: None = None) -> Measurement:  # noqa: ARG002
        """Call the function on uint8 images (count, channels, size, size).

        SpecError where it raises or returns no number; NumericsError where that is not finite.
        """
        function = self._function(self.name)
        found = self._number(function, images)
        if isinstance(found, tuple):
            return Measurement(*found)
        parts = min(self.groups, len(images))
        left_out = [
            self._number(function, images[np.arange(len(images)) % parts != part])
            for part in range(parts)
        ]
        values = [item[0] if isinstance(item, tuple) else item for item in left_out]
        if not np.isfinite(values).all():
            raise NumericsError(f"{self.target} is not finite on a part of the images", self.name)
        return Measurement(found, _jackknife(np.array(values)))

    def statistics(
        self,
        images: np.ndarray,
        instrument: None = None,
    ) -> None:
        """Return None: any function may not be one of a mean."""

    def _number(
        self, function: Callable[[np.ndarray], Any], images: np.ndarray
    ) -> float | tuple[float, float]:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is the program's answer
                found = function(images.copy())
        except _THEIRS as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{self.target} raised {type(error).__name__}: {error}"
            hint = f"{frame.filename}:{frame.lineno}: {frame.line}"
            raise SpecError(what, self.name, hint) from error
        try:
            if isinstance(found, tuple | list):
                value, stderr = map(float, found)
                return value, stderr
            return float(found)
        except (TypeError, ValueError):
            what = f"{self.target} returned {str(found)[:60]!r}"
            hint = "wanted a number, or a pair of a number and its standard error"
            raise SpecError(what, self.name, hint) from None

    def _function(self, where: str) -> Callable[[np.ndarray], Any]:
        module_name, _, function_name = self.target.partition(":")
        self._source(where)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                module = importlib.import_module(module_name)
        except _THEIRS as error:  # importing runs the user's code
            what = f"{module_name} cannot be imported: {type(error).__name__}: {error}"
            raise SpecError(what, where) from error
        function = getattr(module, function_name, None)
        if not callable(function):
            what = f"{module_name} has no function {function_name!r}"
            names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise SpecError(what, where, f"it has: {', '.join(names[:20]) or 'none'}")
        return function

    def _source(self, where: str) -> bytes:
        """Return the bytes of the target's module, without running it."""
        module_name = self.target.partition(":")[0]
        hint = "install its package: pip install, or pip install -e for one of your own"
        try:
            # Finding the outermost package runs nothing; finding what is inside runs it.
            _find_installed(module_name.partition(".")[0], module_name, where, hint)
            return _find_installed(module_name, module_name, where, hint).read_bytes()
        except _THEIRS as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError(f"no module {module_name!r} ({error})", where, hint) from None


def _find_installed(part: str, module_name: str, where: str, hint: str) -> Path:
    """Return the source of `part` of a module's name. SpecError if it is no installed package's."""
    spec = importlib.util.find_spec(part)
    if spec is None:
        raise SpecError(f"no module {module_name!r}", where, hint)
    if spec.origin is None or not spec.origin.endswith(".py"):
        what = f"{part} has no Python source to take a digest of"
        raise SpecError(what, where, "name a function in a .py file of your own")
    if not _installed(part.partition(".")[0], Path(spec.origin).resolve()):
        raise SpecError(f"{part} ({spec.origin}) belongs to no installed package", where, hint)
    return Path(spec.origin)


@functools.cache
def _installed(top: str, origin: Path) -> bool:
    """Return whether a distribution that provides package `top` holds this file."""
    for name in importlib.metadata.packages_distributions().get(top, ()):
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or ():
            place = Path(str(distribution.locate_file(file)))
            if file.name == origin.name and place.resolve() == origin:
                return True
        given = json.loads(distribution.read_text("direct_url.json") or "{}")
        source = given.get("url", "").removeprefix("file://")
        if given.get("dir_info", {}).get("editable") and origin.is_relative_to(source):
            return True
    return False


Property = Annotated[
    ClusterEntropy | ClassifierConfidence | ClassifierInceptionScore | ClassShare | Call,
    Field(discriminator="kind"),
]


# -- sums -----------------------------------------------------------------------------------------


def _jackknife(left_out: np.ndarray, times: np.ndarray | None = None) -> float:
    """Return the jackknife standard error of g values, each with one of g equal parts left out.

    sqrt((g-1)/g sum (v_i - mean)^2), Efron and Stein 1981; value i stands `times[i]` times.
    """
    weights = np.ones(len(left_out)) if times is None else times
    g = weights.sum()
    mean = (weights * left_out).sum() / g
    return float(np.sqrt((g - 1) / g * (weights * (left_out - mean) ** 2).sum()))


def _entropy(counts: np.ndarray) -> float:
    return float(-_x_log_x(counts / counts.sum()).sum())


def _x_log_x(p: np.ndarray) -> np.ndarray:
    """Return p log p, 0 at p = 0."""
    return p * np.log(np.where(p > 0, p, 1.0))


def _named(given: Any, field: str) -> Any:
    """Fill in the name where none is given: the kind and what `field` says."""
    if not isinstance(given, dict) or "name" in given:
        return given
    return {**given, "name": f"{given.get('kind')}-{slug(str(given.get(field)))}"}


def slug(text: str) -> str:
    """Return `text` if it suits a file name, else what is left of it with a digest to tell it."""
    kept = re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:40]
    return kept if kept == text else f"{kept}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
