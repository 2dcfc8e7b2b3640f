import itertools
import json
import math
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
from conftest import install
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from attr_batch.data import arrange
from attr_batch.errors import NumericsError, SpecError
from attr_batch.estimators.surrogate import DataStatistics
from attr_batch.instruments import FittedClusters, LabelClassifier, PixelClusters
from attr_batch.log import Upkeep
from attr_batch.properties import (
    Call,
    ClassifierConfidence,
    ClassifierInceptionScore,
    ClassShare,
    ClusterEntropy,
    Measurement,
    Property,
)
from attr_batch.recipe import canonical

ENTROPY = ClusterEntropy(kind="cluster_entropy")
CONFIDENCE = ClassifierConfidence(kind="classifier_confidence")
SCORE = ClassifierInceptionScore(kind="classifier_inception_score")
SHARE = ClassShare(kind="class_share", label="b")


@dataclass
class Known:
    """A classifier whose probabilities are written down: an image's first pixel names its row."""

    rows: np.ndarray  # (rows, labels + 1)
    labels: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        self.labels = tuple("abcdefghijklmnop"[: self.rows.shape[1] - 1])

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        return self.rows[images[:, 0, 0, 0]]


def shown(rows) -> np.ndarray:
    """Images whose first pixel is the row of `Known`."""
    images = np.zeros((len(rows), 1, 8, 8), np.uint8)
    images[:, 0, 0, 0] = rows
    return images


def clusters(count: int) -> FittedClusters:
    """Clusters told apart by the brightness 0, 1, 2, ... of the whole image."""
    level = np.arange(count)[:, None] / 127.5 - 1
    return FittedClusters(np.repeat(level, 64, axis=1), 8)


def flat(levels) -> np.ndarray:
    return np.repeat(np.asarray(levels, np.uint8)[:, None], 64, axis=1).reshape(-1, 1, 8, 8)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def bootstrap(measure, images: np.ndarray, times: int = 300) -> float:
    """Return the sd of `measure(images).value` over resampled images."""
    rng = np.random.default_rng(0)
    N = len(images)
    return float(np.std([measure(images[rng.integers(0, N, N)]).value for _ in range(times)]))


def one_out(measure, images: np.ndarray) -> float:
    """Return the delete-one jackknife of `measure(images).value`, by its definition."""
    N = len(images)
    values = np.array([measure(np.delete(images, i, axis=0)).value for i in range(N)])
    return math.sqrt((N - 1) / N * ((values - values.mean()) ** 2).sum())


# -- cluster entropy ------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), min_size=2, max_size=12))
def test_entropy_is_that_of_the_histogram(counts):
    assume(sum(counts) >= 2)
    images = flat(np.repeat(np.arange(len(counts)), counts))
    p = np.array([c / sum(counts) for c in counts if c])
    got = ENTROPY.measure(images, clusters(len(counts)))
    assert got.value == pytest.approx(-(p * np.log(p)).sum(), abs=1e-12)


def test_entropy_of_equal_counts_is_the_logarithm():
    got = ENTROPY.measure(flat(np.arange(20).repeat(7)), clusters(20))
    assert got.value == pytest.approx(math.log(20), abs=1e-12)
    assert ENTROPY.measure(flat([3] * 50), clusters(20)) == Measurement(0.0, 0.0)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 5.0])
def test_entropy_stderr_is_the_jackknife_and_near_the_bootstrap(alpha):
    rng = np.random.default_rng(1)
    images = flat(rng.choice(20, size=400, p=rng.dirichlet([alpha] * 20)))

    def measure(images):
        return ENTROPY.measure(images, clusters(20))

    got = measure(images).stderr
    assert got == pytest.approx(one_out(measure, images), rel=1e-9)
    assert got == pytest.approx(bootstrap(measure, images), rel=0.2)


# -- with a classifier ----------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 5, 10])
def test_score_of_equal_one_hots_is_the_number_of_labels(K):
    known = Known(np.eye(K + 1)[:K])
    got = SCORE.measure(shown(np.arange(K).repeat(6)), known)
    assert got.value == pytest.approx(K, abs=1e-9)
    assert SCORE.measure(shown([1] * 30), known).value == pytest.approx(1, abs=1e-12)


def test_noise_says_nothing_about_the_class():
    K = 10
    known = Known(np.eye(K + 1))
    noise = shown([K] * 40)
    assert SCORE.measure(noise, known).value == pytest.approx(1, abs=1e-12)
    assert CONFIDENCE.measure(noise, known).value == 0
    assert SHARE.measure(noise, known).value == 0
    half = shown([*np.arange(K).repeat(4), *[K] * 40])
    assert SCORE.measure(half, known).value == pytest.approx(math.sqrt(K), abs=1e-9)
    assert CONFIDENCE.measure(half, known).value == pytest.approx(0.5, abs=1e-12)


def test_score_equals_its_formula():
    rng = np.random.default_rng(0)
    p = softmax(3 * rng.normal(size=(50, 5)))
    q = p[:, :4] + p[:, 4:] / 4
    kl = (q * np.log(q / q.mean(axis=0))).sum(axis=1)
    got = SCORE.measure(shown(range(50)), Known(p))
    assert got.value == pytest.approx(math.exp(kl.mean()), rel=1e-12)


@pytest.mark.parametrize("prop", [SCORE, CONFIDENCE, SHARE], ids=lambda prop: prop.kind)
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_stderr_is_the_jackknife_and_near_the_bootstrap(prop, sharpness):
    rng = np.random.default_rng(2)
    known = Known(softmax(sharpness * rng.normal(size=(250, 6))))
    images = shown(range(250))

    def measure(images):
        return prop.measure(images, known)

    got = measure(images).stderr
    exact = 0.01 if prop is SHARE else 1e-9  # the share's is widened a little
    assert got == pytest.approx(one_out(measure, images), rel=exact)
    assert got == pytest.approx(bootstrap(measure, images), rel=0.15)


def test_confidence_is_the_mean_of_the_best_label():
    known = Known(np.array([[0.1, 0.2, 0.7], [0.8, 0.15, 0.05]]))
    got = CONFIDENCE.measure(shown([0, 1, 1]), known)
    assert got.value == pytest.approx(0.6)
    assert got.stderr == pytest.approx(math.sqrt(0.12 / 3))  # sd of .2, .8, .8


@pytest.mark.parametrize(("k", "N"), [(0, 100), (1, 100), (50, 100), (100, 100), (37, 512)])
def test_share_is_binomial_and_never_certain(k, N):
    got = SHARE.measure(shown([1] * k + [0] * (N - k)), Known(np.eye(4)))
    assert got.value == k / N
    if 10 <= k <= N - 10:
        assert got.stderr == pytest.approx(math.sqrt(k / N * (1 - k / N) / N), rel=0.02)
    assert 0.4 / N < got.stderr < 0.6 / math.sqrt(N)


# -- at check time --------------------------------------------------------------------------------


@pytest.mark.parametrize("prop", [CONFIDENCE, SCORE, SHARE], ids=lambda prop: prop.kind)
@pytest.mark.parametrize("labels", [(), ("b",)])
def test_classifier_properties_need_labels(prop, labels):
    with pytest.raises(SpecError, match="at least two labels") as caught:
        prop.check(labels, "properties.1")
    assert caught.value.problems[0].where == "properties.1"
    assert "data.label" in caught.value.problems[0].hint
    assert "cluster_entropy" in caught.value.problems[0].hint
    prop.check(("a", "b"), "properties.1")
    ENTROPY.check((), "properties.0")


def test_an_unknown_label_is_answered_with_the_labels():
    with pytest.raises(SpecError, match=r"properties\.0\.label: .* 'x'\n  hint: .*: 2, 10, b"):
        ClassShare(kind="class_share", label="x").check(("10", "2", "b"), "properties.0")


# -- call -----------------------------------------------------------------------------------------

SOURCE = """
import numpy as np
CONSTANT = 3
def brightness(images): return images.mean()
def with_error(images): return [images.mean(), 0.5]
def spoils(images):
    images[:] = 0
    return 1
def raises(images): return 1 / 0
def text(images): return "bright"
def triple(images): return 1, 2, 3
def leaves(images): raise SystemExit(3)
def nan(images): return float("nan")
def talks(images): print("what it has to say"); return 1, 0.5
def nan_on_parts(images): return 1.0 if len(images) == 40 else float("nan")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_measures.py").write_text(SOURCE)
    install(tmp_path, "my_measures.py", "my_package/__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "my_measures.py"
    sys.modules.pop("my_measures", None)


def call(function: str) -> Call:
    return Call(kind="call", target=f"my_measures:{function}")


def test_call_measures_with_a_grouped_jackknife(module):
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8)
    got = call("brightness").measure(images)
    means = np.array([np.delete(images, np.s_[g::10], axis=0).mean() for g in range(10)])
    assert got.value == images.mean()
    assert got.stderr == pytest.approx(math.sqrt(0.9 * ((means - means.mean()) ** 2).sum()))
    # a mean's delete-one jackknife is the textbook standard error
    each = Call(kind="call", target="my_measures:brightness", groups=1000).measure(images)
    per_image = images.mean(axis=(1, 2, 3))
    assert each.stderr == pytest.approx(per_image.std(ddof=1) / math.sqrt(40))
    assert call("with_error").measure(images) == Measurement(images.mean(), 0.5)


def test_what_a_call_prints_is_no_part_of_the_answer(module, capsys):
    module.write_text('print("imported")\n' + SOURCE)
    call("talks").measure(flat([9] * 12))
    assert capsys.readouterr() == ("", "imported\nwhat it has to say\n")


def test_call_cannot_spoil_the_images_for_the_next_property(module):
    images = flat([9] * 12)
    call("spoils").measure(images)
    assert (images == 9).all()


@pytest.mark.parametrize(
    ("function", "error", "what"),
    [
        (
            "raises",
            SpecError,
            r"raised ZeroDivisionError: division by zero\n  hint: .*py:9: def raises",
        ),
        ("text", SpecError, r"returned 'bright'\n  hint: wanted a number"),
        ("triple", SpecError, r"returned '\(1, 2, 3\)'\n  hint: wanted a number"),
        ("leaves", SpecError, "raised SystemExit: 3"),
        ("nan", NumericsError, "not finite"),
        ("nan_on_parts", NumericsError, "not finite on a part"),
        ("gone", SpecError, r"no function 'gone'\n  hint: it has: brightness, with_error"),
        ("CONSTANT", SpecError, "no function 'CONSTANT'"),
    ],
)
def test_call_explains_what_is_wrong_with_a_function(module, function, error, what):
    with pytest.raises(error, match=what):
        call(function).measure(flat([1] * 40))


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("no_such_module:f", "no module 'no_such_module'\n  hint: install its package"),
        ("no_such.module:f", "no module 'no_such.module'"),
        ("math:sqrt", "math has no Python source"),
    ],
)
def test_call_explains_what_is_wrong_with_a_module(target, what):
    with pytest.raises(SpecError, match=rf"^properties\.0\.target: {what}"):
        Call(kind="call", target=target).check((), "properties.0")


@pytest.mark.parametrize(
    ("text", "what"), [("import nothing_like_it", "Mod"), ("raise SystemExit(3)", "SystemExit: 3")]
)
def test_a_module_that_cannot_be_imported(module, text, what):
    module.write_text(text)
    wanted = rf"properties\.0\.target: my_measures cannot be imported: {what}"
    with pytest.raises(SpecError, match=wanted):
        call("f").check((), "properties.0")


def test_a_package_that_cannot_be_imported(module):
    package = module.parent / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit(3)")
    with pytest.raises(SpecError, match=r"^properties\.0\.target: no module 'my_package\.a'"):
        Call(kind="call", target="my_package.a:f").check((), "properties.0")


def test_more_clusters_than_images_are_refused_before_work():
    ENTROPY.check((), "properties.0")
    ENTROPY.check((), "properties.0", images=20)
    with pytest.raises(SpecError, match=r"^properties\.0\.clusters: 20 clusters of 19") as caught:
        ENTROPY.check((), "properties.0", images=19)
    assert caught.value.problems[0].hint == "set 19 or fewer"


def test_calls_recipe_moves_with_its_source(module):
    call("brightness").check((), "properties.0")
    before = call("brightness").recipe()
    module.write_text(SOURCE + "# changed\n")
    assert call("brightness").recipe() != before


# -- all kinds ------------------------------------------------------------------------------------

KINDS = [
    {"kind": "cluster_entropy", "clusters": 4},
    {"kind": "classifier_confidence", "classifier": {"epochs": 1, "width": 4}},
    {"kind": "classifier_inception_score", "classifier": {"epochs": 1, "width": 4}},
    {"kind": "class_share", "label": 7, "classifier": {"epochs": 1, "width": 4}},
    {"kind": "call", "target": "my_measures:brightness"},
]


def parsed(tree: dict) -> Property:
    return TypeAdapter(Property).validate_json(json.dumps(tree), strict=True)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 1, 8, 8), np.uint8)
    images[::2, :, :4] //= 8
    names = ["7" if i % 2 else "8" for i in range(40)]
    return arrange(images, names, names)


@pytest.fixture(scope="module")
def fitted(data, tmp_path_factory):
    """One fitted instrument for every different part, as the runner keeps them."""
    found = {}

    def of(prop):
        part = prop.instrument()
        if part is not None and part not in found:
            folder = tmp_path_factory.mktemp("instrument")
            part.fit(data, folder, seed=0, upkeep=Upkeep())
            found[part] = part.load(folder)
        return found.get(part)

    return of


def test_every_kind_is_tested():
    kinds = TypeAdapter(Property).json_schema()["discriminator"]["mapping"]
    assert sorted(kinds) == sorted(tree["kind"] for tree in KINDS)


@pytest.mark.parametrize("tree", KINDS, ids=lambda tree: tree["kind"])
def test_conformance(module, tree, data, fitted):
    prop = parsed(tree)
    prop.check(data.label_names, "properties.0")
    prop.check(data.label_names, "properties.0", images=len(data))
    assert isinstance(prop.instrument(), LabelClassifier | PixelClusters | None)
    images = data.images.copy()
    images.setflags(write=False)
    one = prop.measure(images, fitted(prop))
    assert type(one.value) is float
    assert type(one.stderr) is float
    assert one == prop.measure(images, fitted(prop))
    # a functional of the distribution: neither order nor repetition count
    backwards = prop.measure(images[::-1], fitted(prop))
    twice = prop.measure(np.concatenate([images, images]), fitted(prop))
    assert backwards.value == pytest.approx(one.value, abs=1e-12)
    assert twice.value == pytest.approx(one.value, abs=1e-12)
    assert prop.title
    assert prop.higher_means
    assert isinstance(prop.unit, str)
    assert "/" not in prop.name
    assert canonical(prop.recipe())
    named = parsed({**tree, "name": "mine"})
    assert named.name == "mine"
    assert named.recipe() == prop.recipe()
    for bad in ("a/b", "", "../x", "-x"):
        with pytest.raises(ValidationError):
            parsed({**tree, "name": bad})


@pytest.mark.parametrize("tree", KINDS, ids=lambda tree: tree["kind"])
def test_of_any_coalition_s_images_it_is_known_from_the_contributors_sums(tree, data, fitted):
    prop = parsed(tree)
    parts = np.split(data.images, [5, 17, 24])
    found = [prop.statistics(part, fitted(prop)) for part in parts]
    if isinstance(prop, Call):
        assert found == [None] * 4
        return
    assert all(
        s.dtype == np.float64 and len(s) == len(p) for s, p in zip(found, parts, strict=True)
    )
    game = DataStatistics.of(found).surrogate(prop.of_mean)
    Z = np.array([z for z in itertools.product((0.0, 1.0), repeat=4) if any(z)])
    for z, w in zip(Z, game.values(Z), strict=True):
        images = np.concatenate([part for part, there in zip(parts, z, strict=True) if there])
        assert w == pytest.approx(prop.measure(images, fitted(prop)).value, abs=1e-12)


@pytest.mark.parametrize("tree", KINDS[:4], ids=lambda tree: tree["kind"])
def test_a_pinned_instrument_is_an_id_and_changes_nothing_else(tree):
    pinned = parsed({**tree, "fitted": "0a" * 32})
    assert pinned.recipe() == parsed(tree).recipe()
    assert pinned.instrument() == parsed(tree).instrument()
    for bad in ("", "0a" * 31, "0A" * 32, "../" + "0" * 61):
        with pytest.raises(ValidationError):
            parsed({**tree, "fitted": bad})


def test_a_call_has_nothing_to_pin():
    assert parsed(KINDS[4]).fitted is None
    with pytest.raises(ValidationError):
        parsed({**KINDS[4], "fitted": "0a" * 32})


def test_properties_with_one_classifier_share_it(fitted):
    parts = {parsed(tree).instrument() for tree in KINDS[1:4]}
    assert len(parts) == 1
    assert parsed({"kind": "classifier_confidence"}).instrument() not in parts


@pytest.mark.parametrize("tree", [{"kind": "class_share"}, {"kind": "call", "target": "no colon"}])
def test_one_mistake_is_one_error(tree):
    with pytest.raises(ValidationError) as caught:
        parsed(tree)
    assert caught.value.error_count() == 1


def test_names_suit_files_and_stay_apart():
    labels = ["Van Gogh", "Van/Gogh", "夜", "昼", "x" * 90, "x" * 91, "3"]
    names = [ClassShare(kind="class_share", label=label).name for label in labels]
    assert len(set(names)) == len(labels)
    assert names[-1] == "class_share-3"
    assert all(name.isascii() and len(name) <= 80 for name in names)


@pytest.mark.parametrize("value", [(math.nan, 0.1), (1.0, math.inf), (1.0, -0.1)])
def test_a_measurement_is_finite(value):
    with pytest.raises(NumericsError, match="measured"):
        Measurement(*value)


def test_torch_is_not_imported_before_work():
    code = "import sys, attr_batch.properties; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
