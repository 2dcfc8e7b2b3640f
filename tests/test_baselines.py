"""Baselines against definitions in float64, closed forms and what they must not depend on."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from sklearn.linear_model import Ridge

from attr_batch import ops
from attr_batch.baselines import (
    Baseline,
    ClipSimilarity,
    DTrak,
    EmbeddingDistance,
    EqualSplit,
    GradientSimilarity,
    ImageCount,
    JourneyTrak,
    Material,
    OwnSimilarity,
    PixelSimilarity,
    RelativeInfluence,
    RenormalisedInfluence,
    TrainingProperty,
    Trak,
)
from attr_batch.baselines.gradients import Projection, Query, gradient, spread
from attr_batch.baselines.influence import preconditioned
from attr_batch.data import arrange
from attr_batch.errors import DataError, Interrupted, NumericsError, SpecError
from attr_batch.instruments import FittedClassifier, FittedClusters, LabelClassifier
from attr_batch.log import Upkeep
from attr_batch.models import NoiseSchedule, UNet
from attr_batch.properties import ClassifierConfidence, ClusterEntropy
from attr_batch.recipe import derive_seed
from attr_batch.sampling import Sampling, solver_coefficients

SEED = 11
SCHEDULE = NoiseSchedule()
SAMPLING = Sampling(solver="ddim", steps=3, images=6, batch=4)
ENTROPY = ClusterEntropy(kind="cluster_entropy", clusters=2)
DARK_AND_BRIGHT = FittedClusters(np.array([-np.ones(4), np.ones(4)]), side=2)
OF_GRADIENTS = [GradientSimilarity, Trak, RelativeInfluence, RenormalisedInfluence, DTrak]
OF_GRADIENTS += [JourneyTrak]
SMALL = {"timesteps": 5, "dimension": 64}
ALL = [
    EqualSplit(), ImageCount(), TrainingProperty(), PixelSimilarity(), OwnSimilarity(),
    EmbeddingDistance(), *(kind(**SMALL) for kind in OF_GRADIENTS),
]  # fmt: skip


class Linear(torch.nn.Module):
    """A network whose gradients are known: answer = (1 + t/1000) W x."""

    def __init__(self, W):
        super().__init__()
        self.W = torch.nn.Parameter(torch.tensor(W, dtype=torch.float32))

    def forward(self, x, t, return_dict=False):
        scale = (1 + t / 1000).view(-1, 1)
        return ((scale * (x.flatten(1) @ self.W.T)).view_as(x),)


@dataclass
class TrainedModel:
    """The part of a base that baselines read."""

    module: torch.nn.Module
    schedule: NoiseSchedule = SCHEDULE

    def reference(self, subject):
        assert subject == "trained"
        return self.module


def random_images(count, size=2, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 1, size, size), np.uint8)


W = np.eye(4) * 0.5 + np.random.default_rng(5).normal(0, 0.1, (4, 4))
OWNERS = ["ann"] * 3 + ["bob"] * 2 + ["eve"]


def material(images=None, owners=OWNERS, module=None, **changes) -> Material:
    images = random_images(6) if images is None else images
    given = {
        "dataset": arrange(images, owners, None),
        "base": TrainedModel(module or Linear(W)),
        "generated": random_images(5, images.shape[-1], seed=1),
        "sampling": SAMPLING,
        "prop": ENTROPY,
        "instrument": DARK_AND_BRIGHT,
        "classifier": None,
        "seed": SEED,
    }
    return Material(**{**given, **changes})


def in_unit(images):
    return images.reshape(len(images), -1).astype(float) / 127.5 - 1


# -- without gradients ----------------------------------------------------------------------------


def test_equal_split_and_image_count():
    assert EqualSplit().scores(material()).tolist() == [1 / 3] * 3
    assert ImageCount().scores(material()).tolist() == [3, 2, 1]


@pytest.mark.parametrize("reduce", ["mean", "max", "sum"])
def test_pixel_similarity_is_the_mean_cosine(reduce):
    m = material()
    x, g = in_unit(m.dataset.images), in_unit(m.generated)
    by_hand = [
        getattr(np, reduce)(
            [
                np.mean([a @ b / np.sqrt((a @ a) * (b @ b)) for b in g])
                for a in x[m.dataset.contributor == i]
            ]
        )
        for i in range(3)
    ]
    np.testing.assert_allclose(PixelSimilarity(reduce=reduce).scores(m), by_hand, rtol=1e-6)


def test_embedding_distance_is_to_the_mean_and_the_nearest_come_first():
    m = material()
    centre = in_unit(m.generated).mean(axis=0)
    far = [np.sqrt(((a - centre) ** 2).sum()) for a in in_unit(m.dataset.images)]
    mean = [-np.mean(far[:3]), -np.mean(far[3:5]), -far[5]]
    largest = [-min(far[:3]), -min(far[3:5]), -far[5]]
    np.testing.assert_allclose(EmbeddingDistance().scores(m), mean, rtol=1e-6)
    np.testing.assert_allclose(EmbeddingDistance(reduce="max").scores(m), largest, rtol=1e-6)


def classifier(side=8):
    torch.manual_seed(3)
    net = LabelClassifier(width=4)._net((1, side, side), 3).eval()
    return FittedClassifier(("0", "1", "2"), net, side, "cpu")


def test_own_similarity_compares_what_the_classifiers_last_layer_sees():
    fitted = classifier()
    m = material(random_images(6, 8), classifier=fitted)
    seen = []
    hook = fitted.net[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    fitted.probabilities(m.dataset.images)
    fitted.probabilities(m.generated)
    hook.remove()
    x, g = (f.detach().numpy().astype(float) for f in (seen[0][:6], seen[1][:5]))
    cosine = (x @ g.T) / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(g, axis=1))
    each = cosine.mean(axis=1)
    found = OwnSimilarity(reduce="sum").scores(m)
    np.testing.assert_allclose(found, [each[:3].sum(), each[3:5].sum(), each[5]], rtol=1e-5)
    assert not np.allclose(found, PixelSimilarity(reduce="sum").scores(m))


def test_own_similarity_without_labels_is_that_of_pixels():
    m = material()
    np.testing.assert_array_equal(OwnSimilarity().scores(m), PixelSimilarity().scores(m))


def test_training_property_is_that_of_the_contributors_own_images():
    dark, bright = np.zeros((1, 1, 2, 2), np.uint8), np.full((1, 1, 2, 2), 255, np.uint8)
    m = material(np.concatenate([dark, dark, bright, dark, bright, dark]))
    thirds = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    np.testing.assert_allclose(TrainingProperty().scores(m), [thirds, np.log(2), 0])


def test_training_property_of_a_single_image_is_its_value():
    fitted = classifier()
    prop = ClassifierConfidence(kind="classifier_confidence")
    m = material(random_images(6, 8), prop=prop, instrument=fitted)
    alone = fitted.probabilities(m.dataset.images[-1:])[0, :-1].max()
    assert TrainingProperty().scores(m)[-1] == pytest.approx(alone, rel=1e-6)


# -- gradients and projections --------------------------------------------------------------------


def copies(count, seed=0):
    """Return random queries of the linear net, all in one."""
    rng = np.random.default_rng(seed)
    x, target = rng.normal(size=(2, count, 1, 2, 2))
    t = rng.integers(0, 1000, count)
    return Query(torch.tensor(x).float(), torch.from_numpy(t), torch.tensor(target).float())


def linear_gradient(W, x, t, target):
    """Return dL/dW of L = mean ((1 + t/1000) W x - target)^2, flat; x and target (copies, p)."""
    scale = (1 + t / 1000)[:, None]
    error = scale * (x @ W.T) - target
    return (2 / x.size * (scale * error).T @ x).ravel()


def test_gradient_of_the_linear_net_is_the_analytic_one():
    q = copies(7)
    x, target = (a.flatten(1).double().numpy() for a in (q.x_t, q.target))
    expected = linear_gradient(W, x, q.t.numpy(), target)
    np.testing.assert_allclose(gradient(Linear(W), q).numpy(), expected, rtol=1e-4, atol=1e-6)


def test_gradient_does_not_depend_on_how_many_copies_go_at_once():
    net = UNet(block_out_channels=(8, 16)).build(1, 8, seed=0)
    x, target = torch.randn(2, 7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    q = Query(x, torch.arange(7) * 100, target)
    whole = gradient(net, q)
    assert whole.norm() > 0.1
    torch.testing.assert_close(gradient(net, q, copies=3), whole, rtol=1e-4, atol=1e-6)


def test_weights_that_play_no_part_have_no_gradient():
    net = Linear(W)
    net.idle = torch.nn.Parameter(torch.ones(3))
    found = gradient(net, copies(2))
    assert len(found) == 19
    assert found.count_nonzero() == 16


def test_times_are_spread_evenly():
    assert spread(SCHEDULE, 4).tolist() == [125, 375, 625, 875]
    assert spread(SCHEDULE, 1000).tolist() == list(range(1000))


@pytest.mark.parametrize("dimension", [30, 31, 1000])
def test_a_projection_to_all_dimensions_loses_nothing(dimension):
    x, y = torch.randn(2, 30, generator=torch.Generator().manual_seed(0)).double()
    project = Projection.draw(30, dimension, seed=1)
    assert float(project(x) @ project(y)) == pytest.approx(float(x @ y))


def test_projection_keeps_inner_products_in_expectation():
    weights, dimension, draws = 50, 8, 4000
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, weights))
    found = np.empty(draws)
    for seed in range(draws):
        project = Projection.draw(weights, dimension, seed)
        assert project(torch.tensor(x)).shape == (dimension,)
        found[seed] = project(torch.tensor(x)) @ project(torch.tensor(y))
    bound = ((x @ x) * (y @ y) + (x @ y) ** 2) / dimension
    assert abs(found.mean() - x @ y) < 4 * np.sqrt(bound / draws)
    assert 0.5 * bound < found.var() < 1.1 * bound


# -- influence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [5, 40])  # fewer and more than dimensions
def test_preconditioned_is_the_exact_influence_in_ridge_regression(images):
    """A ridge prediction is linear in the targets: x^T K x_i is what target i has in it."""
    rng = np.random.default_rng(2)
    X, x = rng.normal(size=(images, 12)), rng.normal(size=12)
    share = [
        Ridge(alpha=0.5, fit_intercept=False, solver="cholesky").fit(X, y).predict(x[None])[0]
        for y in np.eye(images)
    ]
    np.testing.assert_allclose(preconditioned(X, 0.5) @ x, share, rtol=1e-9, atol=1e-12)


class Reference:
    """TRAK's pieces for the linear net, in float64 and without a projection."""

    def __init__(self, m: Material, timesteps: int, damping: float = 0.5) -> None:
        self.m, self.t = m, spread(SCHEDULE, timesteps)
        self.a = np.sqrt(SCHEDULE.alphas_cumprod().double().numpy())
        self.noise = self.shared_noise(timesteps)
        self.damping = damping

    @staticmethod
    def shared_noise(count):
        seed = derive_seed("gradient noise", SEED)
        return ops.counter_normal(torch.arange(count), 4, seed, 0).double().numpy()

    def noised(self, x0, t, noise):
        """Return x_t and v of images x0 (p,) or (copies, p)."""
        a = self.a[t][:, None]
        s = np.sqrt(1 - a**2)
        return a * x0 + s * noise, a * noise - s * x0

    def loss(self, x0, W=W):
        x_t, v = self.noised(x0, self.t, self.noise)
        return np.mean(((1 + self.t / 1000)[:, None] * (x_t @ W.T) - v) ** 2)

    def phi(self, images, behaviour="loss"):
        rows = []
        for x0 in in_unit(images):
            x_t, v = self.noised(x0, self.t, self.noise)
            rows.append(linear_gradient(W, x_t, self.t, v if behaviour == "loss" else 0 * v))
        return np.array(rows)

    def journey(self):
        """Return phi along paths of DDIM (Song et al. 2021, Eq. 12 without noise)."""
        seed, count = self.m.seed, len(self.m.generated)
        times = np.array(solver_coefficients("ddim", SAMPLING.steps, SCHEDULE)[0])
        noise = self.shared_noise(len(times))
        rows = []
        for x in ops.counter_normal(torch.arange(count), 4, seed, 0).double().numpy():
            guesses = []
            for i, t in enumerate(times):
                a, s = self.a[t], np.sqrt(1 - self.a[t] ** 2)
                x0 = np.clip(a * x - s * (1 + t / 1000) * W @ x, -1, 1)
                guesses.append(x0)
                if i + 1 < len(times):
                    after = self.a[times[i + 1]]
                    x = after * x0 + np.sqrt(1 - after**2) * (x - a * x0) / s
            x_t, v = self.noised(np.array(guesses), times, noise)
            rows.append(linear_gradient(W, x_t, times, v))
        return np.array(rows)

    def K(self, phi):
        return np.linalg.inv(phi.T @ phi + self.damping * np.eye(phi.shape[1]))

    def scores(self, kind):
        """Return one score per training image, by the paper's formulas for each pair."""
        behaviour = "output" if kind is DTrak else "loss"
        phi = self.phi(self.m.dataset.images, behaviour)
        generated = self.phi(self.m.generated, behaviour)
        if kind is JourneyTrak:
            generated = self.journey()
        K, norm = self.K(phi), np.linalg.norm
        each = {
            GradientSimilarity: lambda p, g: p @ g / norm(p) / norm(g),
            RelativeInfluence: lambda p, g: g @ K @ p / norm(K @ p),
            RenormalisedInfluence: lambda p, g: g @ K @ p / norm(p),
        }.get(kind, lambda p, g: g @ K @ p)
        return np.array([np.mean([each(p, g) for g in generated]) for p in phi])


@pytest.mark.parametrize("kind", OF_GRADIENTS)
def test_gradient_methods_are_the_papers_formulas(kind):
    m = material()
    by_image = Reference(m, SMALL["timesteps"]).scores(kind)
    scores = [by_image[:3].sum(), by_image[3:5].sum(), by_image[5]]
    found = kind(**SMALL, reduce="sum").scores(m)
    np.testing.assert_allclose(found, scores, rtol=2e-4, atol=1e-6)
    assert np.ptp(scores) > 0.01  # or the comparison would be one of zeros


def test_more_of_an_image_with_a_high_score_lowers_the_loss_of_what_was_generated():
    m = material()
    reference = Reference(m, SMALL["timesteps"])
    phi = reference.phi(m.dataset.images)
    K, epsilon = reference.K(phi), 1e-5

    def gain(direction):
        moved = W - epsilon * (K @ direction).reshape(4, 4)
        generated = in_unit(m.generated)
        return np.mean([reference.loss(x) - reference.loss(x, moved) for x in generated]) / epsilon

    scores = Trak(**SMALL, reduce="max").by_image(m)
    np.testing.assert_allclose(scores, [gain(p) for p in phi], rtol=1e-3, atol=1e-5)


def test_images_without_a_gradient_have_no_influence():
    assert preconditioned(np.zeros((3, 2)), 0.5).tolist() == [[0, 0]] * 3
    m = material(module=Linear(np.zeros((4, 4))))  # answers 0, where its square has no slope
    for kind in (DTrak, RelativeInfluence):
        assert np.isfinite(kind(**SMALL).scores(m)).all()
    assert DTrak(**SMALL).scores(m).tolist() == [0, 0, 0]


def test_damping_is_added_to_the_kernel():
    m = material()
    reference = Reference(m, SMALL["timesteps"], damping=3.0)
    found = Trak(**SMALL, damping=3.0).by_image(m)
    np.testing.assert_allclose(found, reference.scores(Trak), rtol=2e-4, atol=1e-6)


# -- all of them ----------------------------------------------------------------------------------

NET = UNet(block_out_channels=(8, 16)).build(1, 8, seed=0)
IMAGES = random_images(6, 8)


def real(**changes) -> Material:
    """Return material with a UNet and a classifier."""
    clusters = FittedClusters(np.random.default_rng(0).normal(size=(2, 64)), side=8)
    given = {"images": IMAGES, "module": NET, "classifier": classifier(), "instrument": clusters}
    return material(**{**given, **changes})


def test_the_list_of_all_is_complete():
    kinds = {member.kind for member in ALL} | {"clip_similarity"}
    union = TypeAdapter(Baseline).json_schema()["discriminator"]["mapping"]
    assert kinds == set(union)


def test_what_was_asked_before_leaves_no_trace():
    shared, backwards = real(), real()
    first = [member.scores(shared) for member in ALL]
    then = [member.scores(backwards) for member in reversed(ALL)][::-1]
    for one, other in zip(first, then, strict=True):
        assert one.shape == (3,)
        assert one.dtype == np.float64
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def shared():
    return real()


@pytest.fixture(scope="module")
def turned_round():
    """Return the same material under names that turn the contributors' order round."""
    renamed = {"ann": "zoe", "bob": "bob", "eve": "amy"}
    return real(owners=[renamed[name] for name in OWNERS])


@pytest.mark.parametrize("member", ALL, ids=lambda member: member.kind)
class TestEvery:
    def test_follows_contributors_wherever_they_stand(self, member, shared, turned_round):
        found = member.scores(turned_round)[::-1]
        np.testing.assert_allclose(found, member.scores(shared), rtol=1e-5, atol=1e-9)

    def test_round_trips_through_the_spec(self, member):
        assert TypeAdapter(Baseline).validate_json(member.model_dump_json()) == member


def test_the_same_image_scores_the_same_for_two_contributors():
    images = IMAGES.copy()
    images[3] = images[0]
    m = real(images=images, owners=["ann", "ann", "ann", "bob", "eve", "kim"])
    owner = m.dataset.contributor
    for member in ALL:
        if hasattr(member, "by_image"):
            by_image = member.by_image(m)
            same = np.isclose(by_image[owner == 0], by_image[owner == 1], rtol=1e-9, atol=1e-12)
            assert same.sum() == 1


@pytest.mark.parametrize("kind", OF_GRADIENTS)
def test_seeds_matter_where_something_is_drawn(kind, shared):
    other = dataclasses.replace(shared, seed=2)
    assert not np.allclose(kind(**SMALL).scores(other), kind(**SMALL).scores(shared))


def test_methods_of_one_call_share_the_gradients():
    passes = []
    net = UNet(block_out_channels=(8, 16)).build(1, 8, seed=0)
    net.register_forward_hook(lambda *_: passes.append(1))
    m = real(module=net)
    for kind in (Trak, RelativeInfluence, RenormalisedInfluence, GradientSimilarity):
        kind(**SMALL).scores(m)
    assert len(passes) == 6 + 5  # training and generated images
    JourneyTrak(**SMALL).scores(m)
    assert len(passes) == 11 + 2 * 3 + 5  # two batches of three steps, and the generated images


# -- what can be wrong ----------------------------------------------------------------------------


def test_more_times_than_the_schedule_has_are_refused():
    Trak(timesteps=1000).check(SCHEDULE, "validation.baselines.0")
    with pytest.raises(SpecError, match="1001 of 1000 times") as caught:
        Trak(timesteps=1001).check(SCHEDULE, "validation.baselines.0")
    assert caught.value.problems[0].where == "validation.baselines.0.timesteps"


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "trak", "damping": 0},
        {"kind": "trak", "timesteps": 0},
        {"kind": "trak", "reduce": "median"},
        {"kind": "equal_split", "reduce": "mean"},
        {"kind": "clip_similarity"},
        {"kind": "unknown"},
    ],
)
def test_bad_specs_are_refused(given):
    with pytest.raises(ValidationError):
        TypeAdapter(Baseline).validate_python(given)


def test_a_diverged_model_is_an_error():
    with pytest.raises(NumericsError, match="gradient is not finite"):
        Trak(**SMALL).scores(material(module=Linear(W * np.nan)))


def test_stops_when_told_to():
    upkeep = Upkeep(stopping=lambda: True)
    with pytest.raises(Interrupted):
        Trak(**SMALL).scores(material(upkeep=upkeep))


# -- CLIP -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Return a tiny random CLIP in a folder, as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 64},
        vision_config={**tower, "image_size": 8, "patch_size": 4},
        projection_dim=5,
    )
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    scaling = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(scaling))
    return folder, model


def clip_by_hand(model, images):
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])
    x = np.repeat(images / 255, 3, axis=1)
    x = (x - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        seen = model.vision_model(pixel_values=torch.tensor(x).float()).pooler_output
        return model.visual_projection(seen).double().numpy()


def test_clip_similarity_is_the_cosine_of_image_embeddings(clip):
    folder, model = clip
    m = real()
    x, g = (clip_by_hand(model, images) for images in (m.dataset.images, m.generated))
    cosine = (x @ g.T) / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(g, axis=1))
    found = ClipSimilarity(path=str(folder)).by_image(m)
    np.testing.assert_allclose(found, cosine.mean(axis=1), rtol=1e-4, atol=1e-6)
    far = -np.linalg.norm(x - g.mean(axis=0), axis=1)
    found = EmbeddingDistance(path=str(folder)).by_image(m)
    np.testing.assert_allclose(found, far, rtol=1e-4, atol=1e-6)


def test_clip_takes_images_of_any_size_and_colour(clip):
    folder, _ = clip
    grey = np.repeat(np.repeat(IMAGES, 2, axis=2), 2, axis=3)
    baseline = ClipSimilarity(path=str(folder))
    small, large = real(), real(images=grey)
    large = dataclasses.replace(large, generated=random_images(5, 16, seed=1))
    assert baseline.scores(large).shape == baseline.scores(small).shape
    colour = arrange(np.repeat(IMAGES, 3, axis=1), OWNERS, None)
    generated = np.repeat(small.generated, 3, axis=1)
    same = dataclasses.replace(small, dataset=colour, generated=generated)
    each = baseline.by_image(same)
    np.testing.assert_allclose(np.sort(each), np.sort(baseline.by_image(small)), rtol=1e-5)


def test_clips_weights_are_part_of_the_recipe(clip, tmp_path):
    folder, _ = clip
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    recipe = ClipSimilarity(path=str(folder)).recipe()
    assert ClipSimilarity(path=str(tmp_path)).recipe() == recipe  # where it lies does not matter
    scaling = {"image_mean": [0.5] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(scaling))
    assert ClipSimilarity(path=str(tmp_path)).recipe() != recipe


def test_only_safetensors_are_read(clip, tmp_path):
    folder, _ = clip
    ClipSimilarity(path=str(folder)).check(SCHEDULE, "validation.baselines.0")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(DataError, match="cannot be read as an image encoder"):
        ClipSimilarity(path=str(tmp_path)).check(SCHEDULE, "validation.baselines.0")
    with pytest.raises(DataError, match="no such folder"):
        EmbeddingDistance(path=str(tmp_path / "none")).check(SCHEDULE, "validation.baselines.0")


def test_clip_without_transformers_is_explained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SpecError, match="needs the package transformers"):
        ClipSimilarity(path=str(tmp_path)).check(SCHEDULE, "validation.baselines.0")
