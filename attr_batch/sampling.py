"""Sampling: the same initial noise for every model, few steps of a good solver, any batch split.

A solver is what diffusers' scheduler says it is. Its step is linear in the current sample and in
the x_0 predictions of this and earlier steps, so `solver_coefficients` reads the step's numbers off
the scheduler itself by letting it integrate basis vectors, and `ops.solver_step` applies them. That
takes Python and a dozen small kernels out of every step, and leaves one definition of the solver.

The paper samples with 100 DDIM steps, most of its cost; 10 to 20 steps of DPM-Solver++ (Lu et al.,
2022) or UniPC (Zhao et al., 2023) do the same. The i-th sample's noise is a function of (seed, i),
the same for every coalition: common random numbers take most of sampling's variance out of the
difference of two utilities.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from attr_batch import log
from attr_batch.errors import Interrupted, NumericsError, SpecError
from attr_batch.fused import cohort_size, fuse, to_bfloat16
from attr_batch.graphs import Replayed
from attr_batch.models import NoiseSchedule
from attr_batch.recipe import UNHASHED, Part

if TYPE_CHECKING:
    import torch

Solver = Literal["dpmpp", "unipc", "ddim"]
MAX_HISTORY = 3  # earlier x_0 predictions that ops.solver_step combines


class Sampling(Part):
    """How samples are drawn from a model.

    `clip` bounds the x_0 prediction of every step (pixels lie in [-1, 1]); null switches it off.
    """

    solver: Solver = "dpmpp"
    steps: PositiveInt = Field(default=12, le=1000)
    images: int = Field(
        default=512, ge=2, le=1_000_000, description="More take longer and measure better."
    )
    batch: PositiveInt = Field(default=256, le=65_536)
    clip: PositiveFloat | None = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int | None = Field(default=None, ge=0, lt=1 << 53, description="Default: the job's seed.")
    # Which samples stay in the store does not change a number.
    keep: Annotated[Literal["none", "grid", "all"], UNHASHED] = "grid"

    def check(self, schedule: NoiseSchedule) -> None:
        """Raise SpecError if the solver cannot take so many steps of `schedule`; loads torch."""
        solver_steps(self.solver, self.steps, schedule)

    def draw(
        self,
        model: torch.nn.Module,
        schedule: NoiseSchedule,
        shape: tuple[int, int, int],
        seed: int | Sequence[int],
        *,
        upkeep: log.Upkeep | None = None,
        device: str = "cpu",
    ) -> np.ndarray:
        """Draw `images` samples of `shape` (channels, size, size): uint8 (images, c, h, w).

        A cohort of K models (`fused.stack`) gives (K, images, c, h, w), each model's samples from
        the noise of its own of K seeds, or all from that of one.

        Raises:
            NumericsError: a sample is not finite.
            Interrupted: `upkeep` said to stop, which it is asked after every step of the solver.
            SpecError: the solver has no such number of steps.
        """
        import torch

        upkeep = upkeep or log.Upkeep()
        steps = solver_steps(self.solver, self.steps, schedule)
        model = model.to(device).eval()
        if self.precision == "bf16":  # a copy: autocast would cast the weights at every layer
            model = to_bfloat16(model)
        fused = fuse(model)
        network = Replayed(lambda x, t: fused(x, t, return_dict=False)[0], device)
        dtype, models = next(model.parameters()).dtype, cohort_size(model)
        seeds = [seed] * models if isinstance(seed, int) else list(seed)
        if len(seeds) != models:
            raise ValueError(f"{models} models, {len(seeds)} seeds")
        table = [torch.tensor(s.coefficients, dtype=torch.float32, device=device) for s in steps]
        drawn = []

        def pause(done: int) -> None:
            if upkeep.tick(done, self.images) and upkeep.stopping():
                raise Interrupted(f"stopped after {done} of {self.images} samples")

        for start in range(0, self.images, self.batch):
            stop = min(start + self.batch, self.images)
            ids = torch.arange(start, stop, device=device)
            with torch.inference_mode():
                on_step = functools.partial(pause, start)
                x0 = _integrate(network, dtype, steps, table, ids, shape, seeds, self.clip, on_step)
            x0 = x0.view(models, -1, *shape)
            drawn.append(_to_uint8(x0).cpu().numpy())
            pause(stop)
        samples = np.concatenate(drawn, axis=1)
        return samples[0] if models == 1 else samples


@dataclass(frozen=True)
class SolverStep:
    """One step: the time at which the network is asked, and `ops.solver_step`'s coefficients.

    x_0 = k_0 x + k_1 answer; next x = k_2 x + k_3 x_0 + sum_j k_(4+j) (j-th earlier x_0, the newest
    first) + k_last noise, with as many earlier x_0 as `history` says.
    """

    t: int
    coefficients: tuple[float, ...]
    history: int


def solver_steps(solver: Solver, count: int, schedule: NoiseSchedule) -> list[SolverStep]:
    """Return the steps of a deterministic solver. SpecError if it has no `count` steps."""
    times, linear = solver_coefficients(solver, count, schedule)
    steps = []
    for i, (t, row) in enumerate(zip(times, linear, strict=True)):
        history = min(i, MAX_HISTORY)
        k_x, k_out = schedule.to_x0(t)
        steps.append(SolverStep(t, (k_x, k_out, *row[: 2 + history], 0.0), history))
    return steps


def solver_coefficients(
    solver: Solver, count: int, schedule: NoiseSchedule
) -> tuple[list[int], np.ndarray]:
    """Read a diffusers scheduler's steps: times, and rows (r, c_0, c_1, ...) of float64.

    x_(i+1) = r x_i + c_0 m_i + c_1 m_(i-1) + ..., m_i being the x_0 prediction of step i. We run
    the scheduler on vectors that hold the coefficients of x_T, m_0, m_1, ...: m_i is a basis vector
    and x_i says how it came about. r is the ratio of the shares of x_T in x_(i+1) and x_i. UniPC
    corrects x_i before it predicts x_(i+1); both are multiples of the same x_(i-1), so that the
    correction is no more than another combination of m_i, m_(i-1), ....
    """
    import torch

    scheduler = _scheduler(solver, schedule)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # diffusers makes numpy of tensors
            scheduler.set_timesteps(count)
    except ValueError as error:
        raise SpecError(str(error).splitlines()[0], "sampling.steps") from None
    times = scheduler.timesteps.tolist()
    if len(set(times)) != count:
        what = f"{solver} cannot take {count} steps of {schedule.timesteps} times"
        raise SpecError(what, "sampling.steps", "use fewer steps")
    rows = np.zeros((count, 2 + MAX_HISTORY))
    basis = torch.eye(1 + count, dtype=torch.float64).view(1 + count, 1, 1 + count, 1, 1)
    x = basis[0]
    for i, t in enumerate(scheduler.timesteps):
        before = x.flatten().numpy()
        x = scheduler.step(basis[1 + i], t, x, return_dict=False)[0].double()
        after = x.flatten().numpy()
        r = after[0] / before[0]
        combination = (after - r * before)[1 : 2 + i][::-1]  # of m_i, m_(i-1), ..., m_0
        if np.abs(combination[1 + MAX_HISTORY :]).max(initial=0) > 1e-4:
            msg = f"{type(scheduler).__name__} looks back more than {MAX_HISTORY} steps"
            raise NotImplementedError(msg)
        rows[i, 0] = r
        kept = combination[: 1 + MAX_HISTORY]
        rows[i, 1 : 1 + len(kept)] = kept
    return times, rows


def _scheduler(solver: Solver, schedule: NoiseSchedule) -> Any:
    """Return diffusers' scheduler, made to take x_0 predictions as they are."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    config = {**schedule.diffusers_config(), "prediction_type": "sample"}
    match solver:
        case "dpmpp":
            return DPMSolverMultistepScheduler(**config)
        case "unipc":
            return UniPCMultistepScheduler(**config)
        case "ddim":
            return DDIMScheduler(**config, clip_sample=False)


def _integrate(
    network: Callable[..., Any],
    dtype: torch.dtype,
    steps: list[SolverStep],
    table: list[torch.Tensor],
    ids: torch.Tensor,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    clip: float | None,
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Return each seed's samples with these ids: float32 (K B, c, h, w), a model's together.

    `on_step` is called after every step.
    """
    import torch

    from attr_batch import ops

    bound = math.inf if clip is None else clip
    noise = {seed: ops.counter_normal(ids, math.prod(shape), seed, 0) for seed in seeds}
    x = torch.cat([noise[seed] for seed in seeds]).view(-1, *shape)
    ids = ids.repeat(len(seeds))
    earlier: list[torch.Tensor] = []
    for i, (step, k) in enumerate(zip(steps, table, strict=True), start=1):
        t = torch.full((len(ids),), step.t, device=x.device)
        answer = network(x.to(dtype), t)
        x, x0 = ops.solver_step(x, answer, earlier, k, ids, seeds[0], i, bound)  # adds no noise
        earlier = [x0, *earlier][:MAX_HISTORY]
        on_step()
    return x


def _to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Return samples in [-1, 1] as uint8. NumericsError if one is not finite."""
    import torch

    if not torch.isfinite(x).all():
        hint = "the model may have diverged in training: a smaller learning_rate may help"
        raise NumericsError("a sample is not finite", None, hint)
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
