import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attr_batch import training as training_module
from attr_batch.errors import DataError, Interrupted, NumericsError
from attr_batch.fused import stack
from attr_batch.log import Upkeep
from attr_batch.models import NoiseSchedule, Training, UNet
from attr_batch.recipe import derive_seed
from attr_batch.training import (
    Ema,
    TrainResult,
    batch_indices,
    stratified_times,
    to_unit,
    train,
)

TINY = UNet(block_out_channels=(4, 8), norm_num_groups=2)
SCHEDULE = NoiseSchedule()
IMAGES = np.random.default_rng(0).integers(0, 256, (11, 1, 4, 4), dtype=np.uint8)
DROPPING = TINY.model_copy(update={"dropout": 0.3})
SHORT = Training(steps=7, batch=4, learning_rate=1e-2, warmup=2)


def run(training=SHORT, images=IMAGES, ema="short", seed=3, init=0, part=TINY, **options):
    """Train the tiny net; return everything that came of it, and the weights' bits."""
    model = part.build(1, 4, seed=init)
    mean = None if ema is None else Ema(model, ema)
    result = train(model, images, SCHEDULE, training, seed=seed, ema=mean, **options)
    bits = [p.detach().numpy().tobytes() for p in model.parameters()]
    if mean is not None:
        bits += [m.numpy().tobytes() for m in mean.weights.values()]
    return result, bits


def stop_at(step):
    """Upkeep that says stop once `step` iterations are done."""
    seen = []

    class Stopping(Upkeep):
        def tick(self, done, total, **figures):
            seen.append(done)
            return super().tick(done, total, **figures)

    return Stopping(stopping=lambda: bool(seen) and seen[-1] >= step, seconds=1e9)


# -- data, noise, times ----------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(1, 50), st.lists(st.integers(1, 30), max_size=6))
def test_order_depends_on_images_seen_alone(count, total, cuts):
    whole = batch_indices(5, count, 0, total)
    edges = sorted({0, total, *(c for c in cuts if c < total)})
    pieces = [batch_indices(5, count, a, b - a) for a, b in itertools.pairwise(edges)]
    assert np.array_equal(np.concatenate(pieces), whole)
    for epoch in range(total // count):
        assert sorted(whole[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_each_epoch_is_permuted_once(monkeypatch):
    def order(seed, epoch):
        return np.random.default_rng(derive_seed("order", seed, epoch)).permutation(10)

    wanted = np.concatenate([order(5, epoch) for epoch in range(3)])
    training_module._permutation.cache_clear()
    got = np.concatenate([batch_indices(5, 10, start, 3) for start in range(0, 30, 3)])
    assert np.array_equal(got, wanted)
    assert training_module._permutation.cache_info().misses == 3


def test_order_differs_by_seed_and_epoch():
    order = batch_indices(0, 100, 0, 200)
    assert not np.array_equal(order[:100], order[100:])
    assert not np.array_equal(order, batch_indices(1, 100, 0, 200))


@given(st.integers(0, 1000), st.integers(1, 200))
def test_times_are_spread_evenly(step, batch):
    t = stratified_times(0, step, batch, 1000)
    assert t.min() >= 0
    assert t.max() <= 999
    edges = np.sort(t)
    assert np.diff(edges).max(initial=0) <= math.ceil(1000 / batch)


def test_times_are_uniform():
    t = np.concatenate([stratified_times(0, step, 8, 10) for step in range(2000)])
    shares = np.bincount(t, minlength=10) / len(t)
    assert np.abs(shares - 0.1).max() < 0.005


def test_to_unit_spans_minus_one_to_one():
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


# -- averages --------------------------------------------------------------------------------------


def averaged(kind, steps, start=0):
    """Return how much of the starting weights is left after `steps` updates."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.ones_(model.weight)
    ema = Ema(model, kind, start)
    torch.nn.init.zeros_(model.weight)
    for _ in range(steps):
        ema.update(list(model.parameters()))
    ema.copy_to(model)
    return model.weight.item()


def test_short_average_forgets_what_it_started_from():
    assert averaged("short", 1) == pytest.approx(1 / 3)
    # (1/3)(2/4)(3/5)...(25/27) = 2/(26 27), and the bound .95 is not reached before
    assert averaged("short", 25) == pytest.approx(2 / (26 * 27))


@pytest.mark.parametrize(("before", "k", "left"), [(10_000, 1000, 0.42), (20_000, 500, 0.80)])
def test_long_average_lags_as_the_published_one_does(before, k, left):
    """CIFAR-20 and CelebA-HQ of the paper: steps of the recovery, then k on the coalition."""
    assert averaged("long", k, start=before) == pytest.approx(left, abs=0.005)
    closed = math.prod((before + j) / (before + k + j) for j in range(1, 10))
    assert averaged("long", k, start=before) == pytest.approx(closed, rel=1e-9)


def test_long_average_never_forgets_faster_than_one_in_ten_thousand():
    assert averaged("long", 1, start=10**6) == pytest.approx(0.9999, rel=1e-12)


# -- the loop --------------------------------------------------------------------------------------


def test_it_learns():
    images = np.repeat(np.uint8([[0], [255]]), 16, axis=1).reshape(2, 1, 4, 4)
    training = Training(steps=150, batch=32, learning_rate=1e-2, warmup=10)
    first, _ = run(training.model_copy(update={"steps": 1}), images)
    last, _ = run(training, images)
    assert last.loss < 0.6 * first.loss
    assert last.steps == 150


def test_one_step_is_adamw_on_the_denoising_loss():
    """Against the same step written out in float64."""
    from attr_batch import ops

    training = Training(steps=1, batch=4, learning_rate=1e-3, warmup=0, clip=None)
    model = TINY.build(1, 4, seed=0)
    oracle = TINY.build(1, 4, seed=0).double()
    train(model, IMAGES, SCHEDULE, training, seed=9)

    x0 = to_unit(torch.from_numpy(IMAGES[batch_indices(9, 11, 0, 4)])).double()
    noise = ops.counter_normal(torch.arange(4), 16, derive_seed("noise", 9), 0)
    noise = noise.view(4, 1, 4, 4).double()
    t = torch.from_numpy(stratified_times(9, 0, 4, 1000))
    a2 = SCHEDULE.alphas_cumprod().double()[t].view(-1, 1, 1, 1)
    answer = oracle(a2.sqrt() * x0 + (1 - a2).sqrt() * noise, t).sample
    ((answer - (a2.sqrt() * noise - (1 - a2).sqrt() * x0)) ** 2).mean().backward()
    for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        assert theirs.grad is not None
        decayed = theirs * (1 - 1e-3 * 0.01)
        wanted = decayed - 1e-3 * theirs.grad / (theirs.grad.abs() + 1e-8)
        big = theirs.grad.abs() > 1e-5  # where the sign is beyond float32's doubt
        torch.testing.assert_close(ours[big].double(), wanted[big], rtol=1e-4, atol=2e-6)


def test_same_seed_same_bits_and_the_seed_matters():
    assert run() == run()
    assert run()[1] != run(seed=4)[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_is_a_function_of_the_seed_and_leaves_the_global_stream_alone(precision):
    training = SHORT.model_copy(update={"precision": precision})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = run(training, part=DROPPING)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert run(training, part=DROPPING) == first
    assert first[1] != run(training)[1]


def test_every_step_drops_others():
    seen = []

    class Watched(torch.nn.Dropout):
        def forward(self, x):
            seen.append(super().forward(torch.ones(64)) == 0)
            return x

    model = TINY.build(1, 4, seed=0)
    model.watched = Watched(0.5)
    model.conv_in.register_forward_hook(lambda *_: model.watched(torch.ones(1)) and None)
    train(model, IMAGES, SCHEDULE, SHORT, seed=3)
    assert len({tuple(dropped.tolist()) for dropped in seen}) == len(seen) == SHORT.steps


def test_read_only_images_are_fine():
    frozen = IMAGES.copy()
    frozen.flags.writeable = False
    assert run(images=frozen) == run()


def test_loss_shown_is_the_mean_of_the_steps_seen():
    one, _ = run(SHORT.model_copy(update={"steps": 1, "warmup": 0}))
    model = TINY.build(1, 4, seed=0)
    losses = []
    hook = torch.nn.functional.mse_loss
    training = SHORT.model_copy(update={"steps": 2, "warmup": 0})
    try:
        torch.nn.functional.mse_loss = lambda *a: losses.append(hook(*a)) or losses[-1]
        result = train(model, IMAGES, SCHEDULE, training, seed=3)
    finally:
        torch.nn.functional.mse_loss = hook
    first, second = (loss.item() for loss in losses)
    assert one.loss == pytest.approx(first, rel=1e-5)
    assert result.loss == pytest.approx((0.98 * first + second) / 1.98, rel=1e-5)


def test_bf16_trains_the_fp32_masters():
    model = TINY.build(1, 4, seed=0)
    training = SHORT.model_copy(update={"precision": "bf16"})
    result = train(model, IMAGES, SCHEDULE, training, seed=3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.loss == pytest.approx(run()[0].loss, rel=0.05)


def test_divergence_is_a_numerics_error():
    wild = SHORT.model_copy(update={"learning_rate": 1e30, "clip": None, "steps": 20})
    with pytest.raises(NumericsError, match="loss became"):
        run(wild)


# -- interruption ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "ema"),
    [(TINY, "short"), (TINY, "long"), (TINY, None), (DROPPING, "short")],
    ids=["short", "long", "raw", "dropout"],
)
@pytest.mark.parametrize("steps", [(1,), (3,), (6,), (2, 4, 5), (7,)])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, steps, part, ema):
    checkpoint = tmp_path / "checkpoint"
    for step in steps:
        with pytest.raises(Interrupted, match=f"step {step} of 7"):
            run(ema=ema, part=part, checkpoint=checkpoint, upkeep=stop_at(step))
    assert run(ema=ema, part=part, checkpoint=checkpoint) == run(ema=ema, part=part)


def test_nothing_is_digested_for_a_checkpoint_never_written(tmp_path, monkeypatch):
    monkeypatch.setattr(training_module, "digest", None)
    monkeypatch.setattr(training_module, "hashlib", None)
    assert run(checkpoint=tmp_path / "checkpoint") == run()
    assert not list(tmp_path.iterdir())


def test_a_killed_run_resumes_from_its_last_tick(tmp_path):
    checkpoint = tmp_path / "checkpoint"

    class Killed(Exception):
        pass

    class Killing(Upkeep):
        def tick(self, done, total, **figures):
            if done == 5:
                raise Killed
            return done == 3

    with pytest.raises(Killed):
        run(checkpoint=checkpoint, upkeep=Killing())
    assert run(checkpoint=checkpoint) == run()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_torn_checkpoint_is_ignored_with_a_warning(tmp_path, capsys, keep):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(Interrupted):
        run(checkpoint=checkpoint, upkeep=stop_at(3))
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(keep * len(whole))])
    assert run(checkpoint=checkpoint) == run()
    assert "checkpoint ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4},
        {"init": 1},
        {"ema": "long"},
        {"images": IMAGES[:10]},
        {"images": 255 - IMAGES},
        {"training": SHORT.model_copy(update={"clip": 2.0})},
    ],
)
def test_a_foreign_checkpoint_is_refused(tmp_path, other):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(Interrupted):
        run(checkpoint=checkpoint, upkeep=stop_at(3))
    with pytest.raises(DataError, match="another training"):
        run(checkpoint=checkpoint, **other)


def test_an_interrupted_run_without_checkpoint_stops_too():
    with pytest.raises(Interrupted):
        run(upkeep=stop_at(2))


def test_ticks_show_the_loss():
    seen = []
    upkeep = Upkeep(lambda done, total, figures: seen.append((done, total, figures)), seconds=0)
    result, _ = run(upkeep=upkeep)
    assert isinstance(result, TrainResult)
    assert [(done, total) for done, total, _ in seen] == [(i, 7) for i in range(1, 8)]
    assert all(math.isfinite(figures["loss"]) for _, _, figures in seen[1:])


# -- cohorts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("seeds", [(3, 3, 3), (3, 4, 3)])
def test_a_cohort_learns_as_its_models_do_alone(clip, precision, seeds):
    """Different images, different start weights; one of them has gradients that are clipped."""
    training = SHORT.model_copy(update={"clip": clip, "precision": precision})
    parts = [IMAGES[:5], IMAGES[3:], 255 - IMAGES]
    models = [TINY.build(1, 4, seed) for seed in range(3)]
    cohort = stack(models)
    mean = Ema(cohort, "short")
    together = train(cohort, parts, SCHEDULE, training, seed=seeds, ema=mean)
    losses = []
    for k, (model, images) in enumerate(zip(models, parts, strict=True)):
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        ema = Ema(model, "short")
        losses.append(train(model, images, SCHEDULE, training, seed=seeds[k], ema=ema).loss)
        moved = differs = averages_differ = 0.0
        for name, weight in model.state_dict().items():
            moved += float((weight - start[name]).abs().sum())
            differs += float((cohort.get_parameter(name).detach()[k] - weight).abs().sum())
            averages_differ += float((mean.weights[name][k] - ema.weights[name]).abs().sum())
        # Adam turns a last bit of a tiny gradient into a whole step, in bfloat16 often.
        share = 1e-3 if precision == "fp32" else 0.2
        assert max(differs, averages_differ) <= share * moved
    assert together.loss == pytest.approx(np.mean(losses), rel=1e-2)


def test_a_cohort_resumes_with_the_same_bits(tmp_path):
    def bits(**options):
        cohort = stack([TINY.build(1, 4, seed) for seed in range(2)])
        train(cohort, [IMAGES, IMAGES[:4]], SCHEDULE, SHORT, seed=3, **options)
        return [p.detach().numpy().tobytes() for p in cohort.parameters()]

    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Interrupted):
        bits(checkpoint=file, upkeep=stop_at(4))
    assert bits(checkpoint=file) == bits()


@pytest.mark.parametrize("parts", [[IMAGES], [IMAGES] * 3, [IMAGES, IMAGES[:0]], IMAGES])
def test_a_cohort_wants_images_for_each_model(parts):
    cohort = stack([TINY.build(1, 4, seed) for seed in range(2)])
    with pytest.raises(ValueError, match="2 models, and arrays of"):
        train(cohort, parts, SCHEDULE, SHORT, seed=3)


def test_a_cohort_wants_a_seed_for_each_model_or_one_for_all():
    cohort = stack([TINY.build(1, 4, seed) for seed in range(2)])
    with pytest.raises(ValueError, match="2 models, and arrays of 11, 11 images for them, 3"):
        train(cohort, [IMAGES, IMAGES], SCHEDULE, SHORT, seed=[1, 2, 3])


def test_a_cohort_does_not_drop():
    cohort = stack([DROPPING.build(1, 4, seed) for seed in range(2)])
    with pytest.raises(ValueError, match="dropout"):
        train(cohort, [IMAGES, IMAGES], SCHEDULE, SHORT, seed=3)
