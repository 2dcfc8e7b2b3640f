"""One conformance test for every way to a coalition's model, and the base they start from."""

import json

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from attr_batch import ops
from attr_batch.counterfactual import (
    Counterfactual,
    Finetune,
    Retrain,
    SparsifiedFinetune,
    load_base,
    prepare_dense,
    prepare_pruned,
)
from attr_batch.errors import DataError, Interrupted, SpecError
from attr_batch.log import Upkeep
from attr_batch.models import (
    DiffusersFolder,
    NoiseSchedule,
    Training,
    UNet,
    load_weights,
    save_weights,
)
from attr_batch.pruning import Magnitude, NoPruning
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
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    prepare_dense(MODEL, IMAGES, folder / "dense", seed=1)
    prepare_pruned(MODEL, PRUNING, IMAGES, folder / "dense", folder / "pruned", seed=1)
    return load_base(MODEL, folder / "dense", folder / "pruned", 1, 4)


@pytest.fixture(params=MEMBERS, ids=lambda m: f"{m.kind}-{m.ema}")
def member(request):
    return request.param


def bits(module):
    return [tensor.numpy().tobytes() for tensor in module.state_dict().values()]


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
def everyone(base):
    """Return each member's model of all images under seed 3, derived once."""
    made = {}

    def derived(member):
        if member not in made:
            made[member] = member.derive(base, IMAGES, seed=3)
        return made[member]

    return derived


def test_a_function_of_images_and_seed_that_leaves_the_base_alone(member, base, everyone):
    first, start = everyone(member), bits(base.module(member.start))
    assert bits(member.derive(base, IMAGES, seed=3)) == bits(first)
    assert bits(member.derive(base, IMAGES, seed=4)) != bits(first)
    assert bits(member.derive(base, IMAGES[::2], seed=3)) != bits(first)
    assert bits(base.module(member.start)) == start
    assert not first.training


def test_resumed_run_has_the_same_bits(member, base, everyone, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    calls = iter(range(10))
    upkeep = Upkeep(stopping=lambda: next(calls, 9) >= 3, seconds=1e9)
    options = {"seed": 3, "checkpoint": checkpoint}
    with pytest.raises(Interrupted):
        member.derive(base, IMAGES, upkeep=upkeep, **options)
    assert bits(member.derive(base, IMAGES, **options)) == bits(everyone(member))


def test_everyone_together_give_about_the_trained_model(member, base, everyone):
    trained = loss(base.reference("pruned" if member.start == "pruned" else "trained"))
    untrained = loss(base.reference("untrained", 3))
    assert loss(everyone(member)) < trained + 0.15 * (untrained - trained)


def test_nobody_gives_the_untrained_net(member, base):
    nobody = member.derive(base, IMAGES[:0], seed=3)
    assert bits(nobody) == bits(base.fresh(member.start, 3))
    assert bits(nobody) != bits(member.derive(base, IMAGES[:0], seed=4))
    like = base.module(member.start).state_dict()
    assert {k: v.shape for k, v in nobody.state_dict().items()} == {
        k: v.shape for k, v in like.items()
    }
    assert loss(nobody) > 1.7 * loss(base.reference("trained"))


def test_a_coalition_learns_its_own_images(base):
    """k steps on one kind of images lower the loss there and raise it on the other."""
    k = SparsifiedFinetune(steps=60, batch=16, learning_rate=1e-2)
    mine, others = HALVES[:1], HALVES[1:]
    model = k.derive(base, mine, seed=0)
    assert loss(model, mine) < loss(model, others)


def test_every_member_round_trips_through_the_spec(member):
    adapter = TypeAdapter(Counterfactual)
    text = adapter.dump_json(member)
    assert adapter.validate_json(text, strict=True) == member


def test_averages_differ_in_how_much_of_the_base_is_left(base):
    """DIGITS: the published average still is mostly the base; the restarted one is not."""

    def moved(ema):
        how = SparsifiedFinetune(steps=20, batch=16, learning_rate=1e-2, ema=ema)
        model, start = how.derive(base, HALVES[:1], seed=0), base.module("pruned")
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        return sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5

    assert moved("continued") < 0.7 * moved("restarted")
    assert moved("restarted") < moved("raw")


def test_retraining_needs_to_know_how():
    with pytest.raises(SpecError) as caught:
        Retrain().check(DiffusersFolder(path="anywhere"))
    assert caught.value.problems[0].where == "counterfactual.training"
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
