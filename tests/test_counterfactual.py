"""One conformance test for every way to a coalition's model, and the base they start from."""

import json
import math
from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from attr_batch import ops
from attr_batch.counterfactual import (
    Counterfactual,
    Finetune,
    GradientAscent,
    InfluenceUnlearning,
    Lora,
    Retrain,
    SparsifiedFinetune,
    load_base,
    prepare_dense,
    prepare_pruned,
)
from attr_batch.counterfactual.influence import Influence, NoisyImages
from attr_batch.errors import DataError, Interrupted, SpecError
from attr_batch.log import Upkeep
from attr_batch.models import (
    DiffusersFolder,
    NoiseSchedule,
    Training,
    UNet,
    load_weights,
    read_safetensors,
    save_weights,
)
from attr_batch.pruning import Magnitude, NoPruning
from attr_batch.recipe import digest
from attr_batch.training import to_unit

TRAINING = Training(steps=40, batch=32, learning_rate=2e-2, warmup=5)
MODEL = UNet(block_out_channels=(8, 16), training=TRAINING)
PRUNING = Magnitude(ratio=0.5, recovery=TRAINING)
# Two kinds of images that are easy to learn: dark left, or dark right half.
HALVES = np.repeat(np.uint8([[0, 0, 255, 255], [255, 255, 0, 0]]), 4, axis=0).reshape(2, 1, 4, 4)
IMAGES = np.tile(HALVES, (12, 1, 1, 1))
FEW = Training(steps=8, batch=16, learning_rate=1e-3, warmup=0)
MEMBERS = [
    *(
        kind(**{**FEW.model_dump(), "ema": ema})
        for kind in (SparsifiedFinetune, Finetune)
        for ema in ("restarted", "raw", "continued")
    ),
    Retrain(),
    Retrain(training=TRAINING.model_copy(update={"decay": "constant"}), ema="restarted"),
    Lora(**FEW.model_dump(), rank=2),
    Lora(**FEW.model_dump(), rank=2, base="pruned", ema="raw"),
    *(
        GradientAscent(steps=8, batch=16, learning_rate=1e-3, base=base)
        for base in ("dense", "pruned")
    ),
    *(InfluenceUnlearning(batch=8, draws=2, scale=0.1, base=base) for base in ("dense", "pruned")),
]
KEPT, REMOVED = IMAGES[::2], IMAGES[1::2]  # all dark left, all dark right


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    prepare_dense(MODEL, IMAGES, folder / "dense", seed=1)
    prepare_pruned(MODEL, PRUNING, IMAGES, folder / "dense", folder / "pruned", seed=1)
    return load_base(MODEL, folder / "dense", folder / "pruned", 1, 4)


def name(member):
    options = (getattr(member, option, "") for option in ("kind", "base", "ema"))
    return "-".join(option for option in options if option)


@pytest.fixture(params=MEMBERS, ids=name)
def member(request):
    return request.param


def bits(module):
    return [tensor.numpy().tobytes() for tensor in module.state_dict().values()]


def distance(module, other):
    """Return the Euclidean distance of two models' weights."""
    pairs = zip(module.parameters(), other.parameters(), strict=True)
    return sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5


def loss(module, images=IMAGES):
    """Return the denoising loss over all times with fixed noise."""
    schedule = NoiseSchedule()
    x0 = to_unit(torch.from_numpy(np.resize(images, (200, *images.shape[1:]))))
    noise = ops.counter_normal(torch.arange(200), x0[0].numel(), 99, 0).view(x0.shape)
    t = torch.arange(0, 1000, 5)
    with torch.no_grad():
        answer = module(schedule.add_noise(x0, noise, t), t).sample
    return float(((answer - schedule.target(x0, noise, t)) ** 2).mean())


# -- conformance -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(base):
    """Return each member's model of one half of the images under seed 3, derived once."""
    made = {}

    def derived(member):
        if member not in made:
            made[member] = member.derive(base, KEPT, REMOVED, seed=3)
        return made[member]

    return derived


def test_every_kind_of_the_union_is_tested():
    kinds = get_args(get_args(Counterfactual)[0])
    assert {type(member) for member in MEMBERS} == set(kinds)


def test_a_function_of_images_and_seed_that_leaves_all_else_alone(member, base, half):
    first, start = bits(half(member)), bits(base.module(member.start))
    assert not half(member).training
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert bits(member.derive(base, REMOVED, KEPT, seed=3)) != first
    assert bits(member.derive(base, KEPT, REMOVED, seed=4)) != first
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert bits(member.derive(base, KEPT, REMOVED, seed=3)) == first
    assert bits(base.module(member.start)) == start


def test_resumed_run_has_the_same_bits(member, base, half, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    calls = iter(range(10))
    upkeep = Upkeep(stopping=lambda: next(calls, 9) >= 3, seconds=1e9)
    options = {"seed": 3, "checkpoint": checkpoint}
    with pytest.raises(Interrupted):
        member.derive(base, KEPT, REMOVED, upkeep=upkeep, **options)
    assert checkpoint.exists()
    assert bits(member.derive(base, KEPT, REMOVED, **options)) == bits(half(member))


def test_what_belongs_to_another_coalition_is_refused(member, base, tmp_path):
    options = {"seed": 3, "checkpoint": tmp_path / "checkpoint"}
    with pytest.raises(Interrupted):
        member.derive(base, KEPT, REMOVED, upkeep=Upkeep(stopping=lambda: True), **options)
    with pytest.raises(DataError, match="another"):
        member.derive(base, REMOVED, KEPT, **options)


def test_everyone_together_give_about_the_trained_model(member, base):
    trained = base.reference("pruned" if member.start == "pruned" else "trained")
    everyone = member.derive(base, IMAGES, IMAGES[:0], seed=3)
    untrained = loss(base.reference("untrained", 3))
    assert loss(everyone) < loss(trained) + 0.15 * (untrained - loss(trained))
    assert (bits(everyone) == bits(trained)) == member.unlearns


def test_nobody_gives_the_untrained_net_unless_by_unlearning_all(member, base):
    nobody, fresh = member.derive(base, IMAGES[:0], IMAGES, seed=3), base.fresh(member.start, 3)
    assert (bits(nobody) == bits(fresh)) == (not member.unlearns)
    assert bits(nobody) != bits(member.derive(base, IMAGES[:0], IMAGES, seed=4))
    like = base.module(member.start).state_dict()
    assert {k: v.shape for k, v in nobody.state_dict().items()} == {
        k: v.shape for k, v in like.items()
    }
    if member.unlearns:
        assert loss(nobody) > loss(base.module(member.start)) + 0.01
    else:
        assert loss(nobody) > 1.7 * loss(base.reference("trained"))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Return the base of three images with three channels of 5 x 5."""
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 5, 5), dtype=np.uint8)
    part = UNet(block_out_channels=(8,), attention=("mid",), training=FEW)
    folder = tmp_path_factory.mktemp("odd")
    prepare_dense(part, images, folder / "dense", seed=1)
    pruning = Magnitude(ratio=0.5, recovery=FEW)
    prepare_pruned(part, pruning, images, folder / "dense", folder / "pruned", seed=1)
    return load_base(part, folder / "dense", folder / "pruned", 3, 5), images


def test_one_image_of_an_odd_size_in_bf16(member, odd):
    base, images = odd
    if isinstance(member, Retrain):
        member = Retrain(training=FEW.model_copy(update={"precision": "bf16"}), ema=member.ema)
    elif isinstance(member, Training):
        member = member.model_copy(update={"precision": "bf16"})
    model = member.derive(base, images[:1], images[1:], seed=3)
    assert all(w.isfinite().all() and w.dtype == torch.float32 for w in model.parameters())
    assert bits(model) != bits(base.module(member.start))
    assert bits(model) == bits(member.derive(base, images[:1], images[1:], seed=3))


def test_a_coalition_learns_its_own_images(base):
    """k steps on one kind of images lower the loss there and raise it on the other."""
    k = SparsifiedFinetune(steps=60, batch=16, learning_rate=1e-2)
    mine, others = HALVES[:1], HALVES[1:]
    model = k.derive(base, mine, seed=0)
    assert loss(model, mine) < loss(model, others)


def test_every_member_round_trips_through_the_spec(member):
    adapter = TypeAdapter(Counterfactual)
    assert adapter.validate_json(adapter.dump_json(member), strict=True) == member
    assert adapter.validate_json(json.dumps(member.recipe()), strict=True) == member


@pytest.mark.parametrize(
    ("member", "name"),
    [
        (SparsifiedFinetune(), "1fdbca1242ab"),
        (Finetune(ema="continued"), "815e49266e8c"),
        (Retrain(), "181a44528774"),
        (Retrain(training=Training(), ema="restarted"), "947cfdf80803"),
    ],
)
def test_names_of_what_is_in_stores_do_not_change(member, name):
    assert digest(member.recipe()).startswith(name)


# -- averages --------------------------------------------------------------------------------------


def test_the_continued_average_lags_as_published(base):
    """With weights that stand still after T steps, (T/(T + k))^9 or so of the average is left."""
    how = SparsifiedFinetune(
        steps=20, batch=4, learning_rate=1e-12, weight_decay=0, ema="continued"
    )
    means, metadata = read_safetensors(base.pruned / "pruned-ema.safetensors")
    assert metadata["updates"] == 40
    left = math.prod((40 + j) / (60 + j) for j in range(1, 10))
    start = dict(base.module("pruned").named_parameters())
    for weight, got in how.derive(base, KEPT, seed=0).named_parameters():
        wanted = left * means[weight] + (1 - left) * start[weight]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_the_restarted_average_stays_behind_the_last_weights(base):
    def moved(ema):
        how = SparsifiedFinetune(steps=20, batch=16, learning_rate=1e-2, ema=ema)
        return distance(how.derive(base, HALVES[:1], seed=0), base.module("pruned"))

    assert 0.2 * moved("raw") < moved("restarted") < moved("raw")


# -- LoRA ------------------------------------------------------------------------------------------


def test_adapters_add_what_their_rank_allows_to_layers_and_nothing_to_the_rest(base):
    model = Lora(steps=4, batch=8, learning_rate=1e-2, rank=2, ema="raw").derive(base, KEPT, seed=0)
    start = base.module("dense")
    assert list(model.state_dict()) == list(start.state_dict())
    layers = dict(model.named_modules())
    for name, before in start.named_parameters():
        change = (model.get_parameter(name) - before).detach()
        layer = layers[name.rpartition(".")[0]]
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear) and name.endswith("weight"):
            values = torch.linalg.svdvals(change.double().flatten(1))
            assert values[0] > 0, name
            assert (values[2:] < 1e-5 * values[0]).all(), name
        else:
            assert not change.any(), name


def test_alpha_scales_what_the_adapters_add(base):
    """One step moves B, which is zero, by the learning rate whatever the gradient's size."""

    def change(alpha):
        how = Lora(
            steps=1, batch=8, learning_rate=1e-5, weight_decay=0, rank=2, alpha=alpha, ema="raw"
        )
        model = how.derive(base, KEPT, seed=0)
        return (model.conv_in.weight - base.module("dense").conv_in.weight).detach()

    torch.testing.assert_close(change(8), 4 * change(2), rtol=1e-2, atol=1e-6)


# -- unlearning ------------------------------------------------------------------------------------


def test_one_step_of_ascent_is_a_step_of_descent_backwards(base):
    once = {"steps": 1, "batch": 8, "learning_rate": 1e-3, "weight_decay": 0}
    up = GradientAscent(**once).derive(base, KEPT, REMOVED, seed=0)
    down = Finetune(**once, ema="raw").derive(base, REMOVED, seed=0)
    for a, b, start in zip(
        up.parameters(), down.parameters(), base.module("dense").parameters(), strict=True
    ):
        torch.testing.assert_close(a - start, start - b, rtol=1e-3, atol=1e-7)


def test_steps_and_learning_rate_bound_the_ascent(base):
    how = GradientAscent(steps=10, batch=8, learning_rate=1e-3)
    model = how.derive(base, KEPT, REMOVED, seed=0)
    furthest = max(
        float((a - b).detach().abs().max())
        for a, b in zip(model.parameters(), base.module("dense").parameters(), strict=True)
    )
    assert 0.5 * 10 * 1e-3 < furthest < 1.001 * 10 * 1e-3


@pytest.mark.parametrize(
    "how",
    [GradientAscent(steps=5, batch=16, learning_rate=3e-4), InfluenceUnlearning(draws=30)],
    ids=lambda how: how.kind,
)
def test_the_removed_images_lose_more(base, how):
    model, start = how.derive(base, KEPT, REMOVED, seed=0), base.module("dense")
    kept, removed = (loss(model, part) - loss(start, part) for part in (KEPT, REMOVED))
    assert removed > 0.01
    assert removed > 2 * kept


def test_the_influence_step_refits_a_linear_model():
    """Least squares through the origin: to first order the step is the refit without R."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 3, generator=generator, dtype=torch.float64)
    y = 0.7 * x + torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def fit(rows):
        return (x[rows] * y[rows]).sum(0) / x[rows].square().sum(0)

    removed = torch.arange(6000) < 150
    weights = fit(removed | ~removed).requires_grad_()
    signs = torch.randn(6000, generator=generator, dtype=torch.float64).sign()
    influence = Influence([weights])
    for part in torch.arange(6000).split(4):
        losses = (weights * x[part] - y[part]).square().mean(1)
        influence.add(losses, removed[part], signs[part])
    (move,) = influence.step(6000, values=3, damping=1e-9)
    torch.testing.assert_close(move, fit(~removed) - weights.detach(), rtol=0.15, atol=1e-4)


def test_one_image_a_batch_gives_the_exact_squares():
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    influence = Influence([weights])
    for row, removed in zip(x, (True, False), strict=True):
        influence.add((row @ weights)[None] ** 2, torch.tensor([removed]), -torch.ones(1).double())
    gradients = 2 * (x @ weights.detach())[:, None] * x
    torch.testing.assert_close(influence.gradient[0], gradients[0])
    torch.testing.assert_close(influence.squares[0], gradients.square().sum(0))
    squares = gradients.square().sum(0)
    mean_loss = float((x @ weights.detach()).square().mean())
    wanted = gradients[0] / (5 / (2 * mean_loss) * (squares + 0.5 * squares.mean()))
    torch.testing.assert_close(influence.step(2, values=5, damping=0.5)[0], wanted)


def test_influence_does_not_depend_on_the_order_of_the_images(base):
    images = np.random.default_rng(1).integers(0, 256, (9, 1, 4, 4), dtype=np.uint8)
    how, order = InfluenceUnlearning(batch=4), [2, 0, 3, 1]
    first = how.derive(base, images[4:], images[:4], seed=0)
    assert bits(how.derive(base, images[4:][::-1], images[:4][order], seed=0)) == bits(first)


def test_an_images_noise_is_the_same_whoever_is_removed(base):
    images = np.random.default_rng(1).integers(0, 256, (5, 1, 4, 4), dtype=np.uint8)
    seen = []
    for removed in (1, 3):
        noisy = NoisyImages(images[removed:], images[:removed], seed=3)
        with torch.no_grad():
            seen.append(noisy.losses(base.module("dense"), base.schedule, slice(0, 5), 1, 2))
        assert noisy.removed.sum() == removed
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    assert set(seen[0][1].tolist()) <= {-1.0, 1.0}


# -- retraining ------------------------------------------------------------------------------------


def test_retraining_needs_to_know_how():
    with pytest.raises(SpecError) as caught:
        Retrain().check(DiffusersFolder(path="anywhere"))
    assert caught.value.problems[0].where == "counterfactual.training"
    with pytest.raises(SpecError) as caught:
        Retrain().check(DiffusersFolder(path="anywhere"), "validation.oracle")
    assert caught.value.problems[0].where == "validation.oracle.training"
    Retrain(training=FEW).check(DiffusersFolder(path="anywhere"))
    Retrain().check(MODEL)


# -- the base --------------------------------------------------------------------------------------


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_folders_hold_what_they_should_and_nothing_else(base):
    assert set(files(base.dense)) == {"card.json", "dense.safetensors", "dense-ema.safetensors"}
    wanted = {"card.json", "pruned.safetensors", "pruned-ema.safetensors", "pruning.json"}
    assert set(files(base.pruned)) == wanted
    card = json.loads((base.pruned / "card.json").read_text())
    assert card["macs"][0] > 3 * card["macs"][1]
    assert card["loss"] > 0
    assert json.loads((base.dense / "card.json").read_text())["steps"] == 40


def test_a_base_interrupted_in_both_trainings_has_the_same_bytes(base, tmp_path):
    dense, pruned = tmp_path / "dense", tmp_path / "pruned"

    def upkeep():
        calls = iter(range(1000))
        return Upkeep(stopping=lambda: next(calls) >= 25, seconds=1e9)

    def until_done(prepare):
        for attempt in range(10):
            try:
                prepare(upkeep())
            except Interrupted:
                continue
            return attempt
        pytest.fail("never done")

    assert until_done(lambda u: prepare_dense(MODEL, IMAGES, dense, seed=1, upkeep=u)) > 0
    made = lambda u: prepare_pruned(MODEL, PRUNING, IMAGES, dense, pruned, seed=1, upkeep=u)  # noqa: E731
    assert until_done(made) > 0
    assert files(dense) == files(base.dense)
    assert files(pruned) == files(base.pruned)


def test_a_finished_base_is_not_trained_again(base, tmp_path):
    stopping = Upkeep(stopping=lambda: True)
    card = prepare_dense(MODEL, IMAGES, base.dense, seed=1, upkeep=stopping)
    assert card == json.loads((base.dense / "card.json").read_text())


def test_references_are_what_was_written(base):
    assert bits(base.reference("trained")) == bits(base.module("dense"))
    assert bits(base.reference("pruned")) == bits(base.module("pruned"))
    assert loss(base.reference("pruned")) < loss(base.fresh("pruned", 0)) / 1.7


def test_weights_are_read_once_and_every_module_is_one_of_its_own(base, monkeypatch):
    from attr_batch.counterfactual import prepared

    def from_disk(start, folder):
        module = base.fresh(start, 9)
        load_weights(module, folder / f"{start}.safetensors")
        return module

    read = []
    monkeypatch.setattr(
        prepared, "load_weights", lambda *a: read.append(a[1].name) or load_weights(*a)
    )
    anew = load_base(MODEL, base.dense, base.pruned, 1, 4)
    for start, folder in (("dense", base.dense), ("pruned", base.pruned)):
        wanted = bits(from_disk(start, folder))
        first = anew.module(start)
        assert bits(first) == wanted
        for parameter in first.parameters():
            torch.nn.init.zeros_(parameter)
        assert bits(anew.module(start)) == wanted
    assert read == ["dense.safetensors", "pruned.safetensors"]


def test_without_pruning_the_dense_model_is_fine_tuned(base, tmp_path):
    card = prepare_pruned(MODEL, NoPruning(), IMAGES, base.dense, tmp_path, seed=1)
    assert card["macs"][0] == card["macs"][1]
    assert card["loss"] is None
    plain = load_base(MODEL, base.dense, tmp_path, 1, 4)
    assert bits(plain.module("pruned")) == bits(base.module("dense"))
    how = FEW.model_dump()
    sparsified = SparsifiedFinetune(**how).derive(plain, HALVES, seed=0)
    assert bits(sparsified) == bits(Finetune(**how).derive(plain, HALVES, seed=0))
    nobody = SparsifiedFinetune(**how).derive(plain, HALVES[:0], seed=0)
    assert bits(nobody) == bits(Finetune(**how).derive(plain, HALVES[:0], seed=0))


def test_a_diffusers_folder_is_used_as_it_is(base, tmp_path):
    module = base.module("dense")
    module.save_pretrained(tmp_path / "theirs")
    from diffusers import DDPMScheduler

    config = {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}
    DDPMScheduler(**config).save_pretrained(tmp_path / "theirs")
    part = DiffusersFolder(path=str(tmp_path / "theirs"))
    card = prepare_dense(part, IMAGES, tmp_path / "dense", seed=1)
    prepare_pruned(part, PRUNING, IMAGES, tmp_path / "dense", tmp_path / "pruned", seed=1)
    theirs = load_base(part, tmp_path / "dense", tmp_path / "pruned", 1, 4)
    assert card["steps"] == 0
    assert bits(theirs.module("dense")) == bits(module)
    assert loss(SparsifiedFinetune(**FEW.model_dump()).derive(theirs, IMAGES, seed=0)) < 0.6


def test_foreign_files_are_data_errors(base, tmp_path):
    with pytest.raises(DataError, match=r"pruning.json"):
        load_base(MODEL, base.dense, tmp_path, 1, 4)
    save_weights(base.module("pruned"), tmp_path / "dense.safetensors")
    with pytest.raises(DataError, match="wanted"):
        prepare_pruned(MODEL, PRUNING, IMAGES, tmp_path, tmp_path / "new", seed=1)
