"""Whole models on a GPU: the fused forward pass, graphs, cohorts, training and sampling."""

import contextlib
import copy
from unittest import mock

import numpy as np
import pytest
import torch
from on_device import CUDA, DEVICE, need_device

from attr_batch import sampling as sampling_module
from attr_batch import training as training_module
from attr_batch.errors import Interrupted
from attr_batch.fused import fuse, stack, supported, to_bfloat16, unstack
from attr_batch.graphs import Replayed
from attr_batch.log import Upkeep
from attr_batch.models import NoiseSchedule, Training, UNet
from attr_batch.pruning import Magnitude
from attr_batch.sampling import Sampling
from attr_batch.training import Ema, train

pytestmark = pytest.mark.gpu
need_device()

UNETS = {
    "plain": dict(block_out_channels=(16, 32), norm_num_groups=4),
    "attention": dict(block_out_channels=(16, 32, 32), attention=(1, "mid"), norm_num_groups=4),
    "heads": dict(
        block_out_channels=(16, 16), attention=(0, 1), attention_head_dim=4, layers_per_block=2
    ),
}
SCHEDULE = NoiseSchedule()
SHAPE = (3, 8, 8)
IMAGES = np.random.default_rng(0).integers(0, 256, (23, *SHAPE), dtype=np.uint8)
SHORT = Training(steps=12, batch=8, learning_rate=1e-2, warmup=6)
# Of the way a weight moves in training: Adam turns a last bit of a tiny gradient into a whole step,
# in bfloat16 often.
SHARE = {"fp32": 1e-2, "bf16": 0.4}


def build(name, count=1, pruned=False):
    found = [UNet(**UNETS[name]).build(3, 8, seed) for seed in range(count)]
    if pruned:
        plan = Magnitude(ratio=0.5).plan(found[0], 3, 8)
        found = [plan.apply(m) for m in found]
    return [m.to(DEVICE) for m in found]


def inputs(batch=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, *SHAPE, generator=generator)
    t = 1 + torch.randint(0, 999, (batch,), generator=generator)
    return x.to(DEVICE, dtype), t.to(DEVICE)


@contextlib.contextmanager
def without_graphs():
    """Run what would become a graph as ordinary calls."""

    def plain(function, device):
        return function

    with (
        mock.patch.object(training_module, "Replayed", plain),
        mock.patch.object(sampling_module, "Replayed", plain),
    ):
        yield


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_moved_alike(start, one, other, share):
    """Compare two trainings by how far they went."""
    moved = sum(float((one[name] - start[name]).abs().sum()) for name in start)
    differ = sum(float((one[name] - other[name]).abs().sum()) for name in start)
    assert moved > 0
    assert differ <= share * moved


# -- the forward pass ------------------------------------------------------------------------------


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", UNETS)
def test_the_forward_pass_is_diffusers(name, pruned):
    (module,) = build(name, pruned=pruned)
    assert supported(module)
    x, t = inputs()
    with torch.no_grad():
        want = module(x, t, return_dict=False)[0]
        got = fuse(module)(x, t, return_dict=False)[0]
        half = fuse(to_bfloat16(module))(x.bfloat16(), t, return_dict=False)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert float((half.float() - want).norm() / want.norm()) < 0.03


@pytest.mark.parametrize("name", UNETS)
def test_the_derivatives_are_diffusers(name):
    (module,) = build(name)
    x, t = inputs()
    found = []
    for network in (module, fuse(module)):
        loss = network(x, t, return_dict=False)[0].square().mean()
        found.append(torch.autograd.grad(loss, list(module.parameters())))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", UNETS)
def test_a_cohort_is_its_models(name, dtype):
    each = build(name, 3)
    cohort = stack(each)
    if dtype == torch.bfloat16:
        cohort = to_bfloat16(cohort)
    x, t = inputs()
    got = fuse(cohort)(x.to(dtype), t)[0]
    with torch.no_grad():
        want = torch.cat(
            [
                m(x[2 * k : 2 * k + 2], t[2 * k : 2 * k + 2], return_dict=False)[0]
                for k, m in enumerate(each)
            ]
        )
    far = float((got.detach().float() - want).norm() / want.norm())
    assert far < (1e-5 if dtype == torch.float32 else 0.03)
    gradient = torch.autograd.grad(got.float().square().mean(), list(cohort.parameters()))
    for k, m in enumerate(each):
        two = slice(2 * k, 2 * k + 2)
        loss = m(x[two], t[two], return_dict=False)[0].square().mean() / 3
        single = torch.autograd.grad(loss, list(m.parameters()))
        mine = torch.cat([g[k].flatten().float() for g in gradient])
        alone = torch.cat([g.flatten() for g in single])
        assert float((mine - alone).norm() / alone.norm()) < (
            1e-4 if dtype == torch.float32 else 0.06
        )


def test_the_plan_does_not_depend_on_the_device():
    (module,) = build("attention")
    there = Magnitude(ratio=0.5).plan(module, 3, 8)
    here = Magnitude(ratio=0.5).plan(copy.deepcopy(module).cpu(), 3, 8)
    assert there.macs == here.macs
    assert {n: [k and len(k) for k in ks] for n, ks in there.kept.items()} == {
        n: [k and len(k) for k in ks] for n, ks in here.kept.items()
    }


# -- graphs ----------------------------------------------------------------------------------------


def test_a_replayed_function_answers_as_called():
    (module,) = build("attention")
    fused = fuse(to_bfloat16(module))
    replayed = Replayed(lambda x, t: fused(x, t, return_dict=False)[0], DEVICE)
    with torch.inference_mode():
        for i in range(7):
            x, t = inputs(dtype=torch.bfloat16)
            x, t = x * (i + 1), (t + 50 * i) % 1000
            got = replayed(x, t).clone()
            torch.testing.assert_close(got, fused(x, t)[0], rtol=0.02, atol=0.02)
        x, t = inputs(4, torch.bfloat16)  # another shape is an ordinary call
        torch.testing.assert_close(replayed(x, t), fused(x, t)[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replayed_training_is_the_eager_one(precision):
    """With a learning rate that changes, gradients that are clipped, an average."""
    training = SHORT.model_copy(update={"precision": precision, "clip": 0.3})
    (module,) = build("attention", pruned=True)
    start, found = weights(module), []
    for context in (contextlib.nullcontext(), without_graphs()):
        with context:
            trained = copy.deepcopy(module)
            ema = Ema(trained, "short")
            result = train(trained, IMAGES, SCHEDULE, training, seed=3, ema=ema, device=DEVICE)
        found.append((weights(trained), ema.weights, result.loss))
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        assert_moved_alike(start, one, other, SHARE[precision])
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-2)


def test_a_training_on_this_device_is_the_cpus():
    (module,) = build("plain")
    start, found = weights(module.cpu()), []
    for device in ("cpu", DEVICE):
        trained = copy.deepcopy(module)
        train(trained, IMAGES, SCHEDULE, SHORT, seed=3, device=device)
        found.append(weights(trained.cpu()))
    assert_moved_alike(start, *found, 0.05)


@pytest.mark.parametrize("step", [2, 9])
def test_a_resumed_training_is_the_undisturbed_one(tmp_path, step):
    """Stopped before the graph is captured, and after."""
    (module,) = build("plain")
    start = weights(module)
    whole, halved = copy.deepcopy(module), copy.deepcopy(module)
    train(whole, IMAGES, SCHEDULE, SHORT, seed=3, device=DEVICE)
    seen = []

    class Stopping(Upkeep):
        def tick(self, done, total, **figures):
            seen.append(done)
            return super().tick(done, total, **figures)

    run = dict(seed=3, device=DEVICE, checkpoint=tmp_path / "checkpoint.safetensors")
    upkeep = Stopping(stopping=lambda: bool(seen) and seen[-1] >= step, seconds=1e9)
    with pytest.raises(Interrupted):
        train(halved, IMAGES, SCHEDULE, SHORT, upkeep=upkeep, **run)
    halved = copy.deepcopy(module)
    train(halved, IMAGES, SCHEDULE, SHORT, **run)
    assert_moved_alike(start, weights(whole), weights(halved), SHARE["fp32"])


# -- cohorts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cohort_learns_as_its_models_do_alone(precision):
    training = SHORT.model_copy(update={"precision": precision, "clip": 0.3})
    parts = [IMAGES[:9], IMAGES[5:], 255 - IMAGES]
    models = build("attention", 3, pruned=True)
    starts = [weights(m) for m in models]
    cohort = stack(models)
    together = train(cohort, parts, SCHEDULE, training, seed=3, device=DEVICE)
    apart = [copy.deepcopy(m) for m in models]
    unstack(cohort, models)
    losses = []
    for start, mine, alone, images in zip(starts, models, apart, parts, strict=True):
        losses.append(train(alone, images, SCHEDULE, training, seed=3, device=DEVICE).loss)
        assert_moved_alike(start, weights(alone), weights(mine), SHARE[precision])
    assert together.loss == pytest.approx(np.mean(losses), rel=2e-2)


# -- sampling --------------------------------------------------------------------------------------


def nearly_equal(images, others, precision):
    far = np.abs(images.astype(int) - others.astype(int))
    if precision == "fp32":
        return far.max() <= 2 and (far > 0).mean() < 0.02
    return far.mean() < 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("solver", ["dpmpp", "unipc", "ddim"])
def test_samples_do_not_depend_on_the_graph(solver, precision):
    """Two whole batches, and one that is smaller than the graph."""
    (module,) = build("attention", pruned=True)
    sampling = Sampling(solver=solver, steps=6, images=19, batch=8, precision=precision)
    replayed = sampling.draw(module, SCHEDULE, SHAPE, seed=5, device=DEVICE)
    with without_graphs():
        plain = sampling.draw(module, SCHEDULE, SHAPE, seed=5, device=DEVICE)
    assert replayed.shape == (19, *SHAPE)
    assert nearly_equal(replayed, plain, precision)
    one_batch = sampling.model_copy(update={"batch": 32})
    whole = one_batch.draw(module, SCHEDULE, SHAPE, seed=5, device=DEVICE)
    assert nearly_equal(replayed, whole, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cohort_draws_what_its_models_draw(precision):
    each = build("attention", 3, pruned=True)
    sampling = Sampling(steps=6, images=19, batch=8, precision=precision)
    together = sampling.draw(stack(each), SCHEDULE, SHAPE, seed=5, device=DEVICE)
    assert together.shape == (3, 19, *SHAPE)
    for mine, module in zip(together, each, strict=True):
        alone = sampling.draw(module, SCHEDULE, SHAPE, seed=5, device=DEVICE)
        assert nearly_equal(mine, alone, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_neighbours_in_a_cohort_change_no_bit(precision):
    """What the runner relies on: a place is an evaluation's own, who else is there is chance."""
    one, two, three = build("attention", 3, pruned=True)
    sampling = Sampling(steps=6, images=19, batch=8, precision=precision)
    first = sampling.draw(stack([one, two, three]), SCHEDULE, SHAPE, seed=5, device=DEVICE)
    other = sampling.draw(stack([one, three, one]), SCHEDULE, SHAPE, seed=5, device=DEVICE)
    third = sampling.draw(stack([two, two, three]), SCHEDULE, SHAPE, seed=5, device=DEVICE)
    assert np.array_equal(first[0], other[0])
    assert np.array_equal(first[1], third[1])
    assert np.array_equal(first[2], third[2])


def test_samples_on_this_device_are_the_cpus():
    (module,) = build("plain")
    sampling = Sampling(steps=6, images=9, batch=8)
    there = sampling.draw(module, SCHEDULE, SHAPE, seed=5, device=DEVICE)
    here = sampling.draw(module.cpu(), SCHEDULE, SHAPE, seed=5)
    assert nearly_equal(there, here, "fp32")


@pytest.mark.skipif(not CUDA, reason="a CPU has no such memory")
def test_nothing_is_left_behind():
    """A worker that evaluates many coalitions must not fill the GPU."""
    (module,) = build("attention", pruned=True)
    left = []
    for _ in range(4):
        trained = copy.deepcopy(module)
        train(trained, IMAGES, SCHEDULE, SHORT, seed=3, device=DEVICE)
        Sampling(steps=4, images=8, batch=8).draw(trained, SCHEDULE, SHAPE, 5, device=DEVICE)
        del trained
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        left.append(torch.cuda.memory_reserved())
    assert left[-1] <= left[1]
