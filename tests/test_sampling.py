import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from pydantic import ValidationError

from attr_batch import ops
from attr_batch.errors import Interrupted, NumericsError, SpecError
from attr_batch.fused import stack
from attr_batch.log import Upkeep
from attr_batch.models import NoiseSchedule, UNet
from attr_batch.sampling import Sampling, _integrate, solver_coefficients, solver_steps

NET = UNet(block_out_channels=(8, 16)).build(1, 8, seed=0)
SHAPE = (1, 8, 8)
SCHEDULERS = {
    "dpmpp": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "ddim": DDIMScheduler,
}
SCHEDULES = {
    "v, cosine": NoiseSchedule(),
    "epsilon, linear": NoiseSchedule(prediction="epsilon", beta_schedule="linear"),
    "x0, scaled linear": NoiseSchedule(prediction="sample", beta_schedule="scaled_linear"),
}


def ours(solver, count, schedule, clip=None, model=NET, ids=None):
    steps = solver_steps(solver, count, schedule)
    table = [torch.tensor(step.coefficients, dtype=torch.float32) for step in steps]
    ids = torch.arange(3) if ids is None else ids
    with torch.no_grad():

        def network(x, t):
            return model(x, t, return_dict=False)[0]

        return _integrate(network, torch.float32, steps, table, ids, SHAPE, [7], clip)


def theirs(solver, count, schedule, model=NET, **options):
    """Return what diffusers' own sampling loop makes of the same noise."""
    config = {**schedule.diffusers_config(), "prediction_type": schedule.prediction}
    if solver == "ddim":
        config["clip_sample"] = False
    scheduler = SCHEDULERS[solver](**{**config, **options})
    scheduler.set_timesteps(count)
    x = ops.counter_normal(torch.arange(3), 64, 7, 0).view(3, *SHAPE)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).sample, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("given", [{"images": 1_000_001}, {"batch": 65_537}])
def test_sizes_beyond_reason_are_refused(given):
    with pytest.raises(ValidationError, match="less than or equal"):
        Sampling(**given)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 12, 20])
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_our_loop_is_diffusers_loop(solver, count, schedule):
    want = theirs(solver, count, schedule)
    scale = float(want.abs().max())
    torch.testing.assert_close(ours(solver, count, schedule), want, rtol=0, atol=2e-4 * scale)


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_an_ideal_denoiser_arrives_at_its_image(solver):
    """A model that knows the answer: every solver must end exactly there."""
    image = torch.linspace(-1, 1, 64).view(1, *SHAPE)

    class Ideal(torch.nn.Linear):
        def forward(self, x, t, return_dict):
            return (image.expand_as(x),)

    schedule = NoiseSchedule(prediction="sample")
    result = ours(solver, 8, schedule, model=Ideal(1, 1))
    torch.testing.assert_close(result, image.expand(3, -1, -1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_steps_keep_the_forward_process(solver):
    """If every x_0 prediction is x_0, x_t must lie at a_t x_0 + s_t noise at every step."""
    schedule = NoiseSchedule(beta_schedule="linear")
    times, rows = solver_coefficients(solver, 10, schedule)
    squared = schedule.alphas_cumprod().double()[times].numpy()
    a, s = np.append(np.sqrt(squared), 1.0), np.append(np.sqrt(1 - squared), 0.0)
    assert times == sorted(times, reverse=True)
    r, combination = rows[:, 0], rows[:, 1:].sum(axis=1)
    assert r == pytest.approx(s[1:] / s[:-1], abs=1e-5)
    assert combination == pytest.approx(a[1:] - r * a[:-1], abs=1e-5)


def test_clip_bounds_every_x0_prediction():
    class Wild(torch.nn.Linear):
        def forward(self, x, t, return_dict):
            return (1e6 * torch.ones_like(x),)

    schedule = NoiseSchedule(prediction="sample")
    assert ours("dpmpp", 6, schedule, clip=0.5, model=Wild(1, 1)).max() == pytest.approx(0.5)
    assert ours("dpmpp", 6, schedule, model=Wild(1, 1)).max() > 1e5


def test_clipping_is_glides():
    """DDIM with the noise rederived from the clipped x_0, as diffusers has it on request."""
    schedule = NoiseSchedule(prediction="epsilon", beta_schedule="linear")
    scheduler = DDIMScheduler(**schedule.diffusers_config(), clip_sample=True)
    scheduler.set_timesteps(9)
    x = ops.counter_normal(torch.arange(3), 64, 7, 0).view(3, *SHAPE)
    with torch.no_grad():
        for t in scheduler.timesteps:
            answer = NET(x, t).sample
            x = scheduler.step(answer, t, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(ours("ddim", 9, schedule, clip=1.0), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_more_steps_than_times_are_refused(solver):
    with pytest.raises(SpecError) as caught:
        Sampling(solver=solver, steps=30).check(NoiseSchedule(timesteps=20))
    assert caught.value.problems[0].where == "sampling.steps"
    Sampling(solver=solver, steps=5).check(NoiseSchedule(timesteps=20))


# -- draw ------------------------------------------------------------------------------------------


def draw(seed=1, model=NET, upkeep=None, **fields):
    sampling = Sampling(**{"images": 10, "batch": 4, "steps": 4, **fields})
    return sampling.draw(model, NoiseSchedule(), SHAPE, seed, upkeep=upkeep)


def test_samples_are_uint8_images_and_a_function_of_the_seed():
    samples = draw()
    assert samples.dtype == np.uint8
    assert samples.shape == (10, *SHAPE)
    assert np.array_equal(samples, draw())
    assert not np.array_equal(samples, draw(seed=2))


@pytest.mark.parametrize("batch", [1, 3, 10, 64])
def test_samples_do_not_depend_on_the_batch(batch):
    difference = draw(batch=batch).astype(int) - draw(batch=10)
    assert np.abs(difference).max() <= 1


def test_more_images_leave_the_first_as_they_were():
    assert np.array_equal(draw(images=12)[:8], draw(images=8))


def test_initial_noise_is_the_same_for_any_split_bit_for_bit():
    whole = ops.counter_normal(torch.arange(10), 64, 7, 0)
    parts = [ops.counter_normal(torch.arange(a, min(a + 4, 10)), 64, 7, 0) for a in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole)


def test_bf16_draws_about_the_same_and_leaves_the_model_alone():
    fine, coarse = draw().astype(int), draw(precision="bf16").astype(int)
    assert {p.dtype for p in NET.parameters()} == {torch.float32}
    assert 0 < np.abs(fine - coarse).mean() < 10


def test_whole_range_of_pixels():
    class Constant(torch.nn.Linear):
        def forward(self, x, t, return_dict):
            return (torch.linspace(-1.2, 1.2, 64).view(SHAPE).expand_as(x),)

    sampling = Sampling(images=2, steps=3, clip=None)
    samples = sampling.draw(Constant(1, 1), NoiseSchedule(prediction="sample"), SHAPE, 0)
    wanted = np.linspace(-1.2, 1.2, 64).clip(-1, 1) * 127.5 + 127.5
    assert np.abs(samples[0].ravel() - wanted).max() <= 0.51


def test_a_nan_is_a_numerics_error():
    class Broken(torch.nn.Linear):
        def forward(self, x, t, return_dict):
            return (x * math.nan,)

    with pytest.raises(NumericsError, match="not finite"):
        draw(model=Broken(1, 1))


def test_interruption_between_batches():
    ticks = []
    upkeep = Upkeep(lambda *a: ticks.append(a), stopping=lambda: len(ticks) > 1, seconds=0)
    with pytest.raises(Interrupted, match="4 of 10"):
        draw(upkeep=upkeep, steps=1)
    assert [t[0] for t in ticks] == [0, 4]


def test_interruption_within_a_batch():
    asked = []

    class Asked(torch.nn.Linear):
        def forward(self, x, t, return_dict):
            asked.append(t)
            return (x,)

    upkeep = Upkeep(stopping=lambda: len(asked) == 2, seconds=1e9)
    with pytest.raises(Interrupted, match="0 of 10"):
        draw(model=Asked(1, 1), batch=10, steps=4, upkeep=upkeep)
    assert len(asked) == 2


def test_what_is_kept_is_no_part_of_the_recipe():
    assert Sampling(keep="all").recipe() == Sampling(keep="none").recipe()
    assert Sampling(steps=13).recipe() != Sampling().recipe()


@pytest.mark.parametrize("seeds", [(5, 5, 5), (5, 6, 5)])
def test_a_cohort_draws_what_its_models_draw(seeds):
    models = [UNet(block_out_channels=(8, 16)).build(1, 8, seed) for seed in (0, 1, 2)]
    sampling = Sampling(steps=3, images=10, batch=4)
    together = sampling.draw(stack(models), NoiseSchedule(), SHAPE, seeds)
    assert together.shape == (3, 10, *SHAPE)
    for k, model in enumerate(models):
        alone = sampling.draw(model, NoiseSchedule(), SHAPE, seeds[k])
        apart = np.abs(together[k].astype(int) - alone)
        assert apart.max() <= 1  # convolutions differ in last bits
    with pytest.raises(ValueError, match="3 models, 2 seeds"):
        sampling.draw(stack(models), NoiseSchedule(), SHAPE, [5, 6])
