"""Diffusion models: the architecture, the noise it is trained against, and its weights on disk.

A model part (`UNet`, `DiffusersFolder`) builds a torch module that is called as
`module(x_t, t, return_dict=False)[0]`, as diffusers' UNet2DModel is. An architecture that is called
otherwise (UNet2DConditionModel with a prompt and LoRA, a transformer) comes in as a further class
of the union at the foot, whose `build` wraps its module into that call; nothing else changes.

The paper's pixel model is the unconditional DDPM UNet of its CIFAR-20 use case (section 5).

Weights are safetensors, never pickles: a model folder is somebody else's data.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from attr_batch.data import existing_folder
from attr_batch.errors import DataError, Problem
from attr_batch.recipe import UNHASHED, Part

if TYPE_CHECKING:
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel

Prediction = Literal["epsilon", "v_prediction", "sample"]

WEIGHTS = "diffusion_pytorch_model.safetensors"

MAX_JSON = 1 << 20  # bytes of a config
# Of a foreign config what decides how many layers are built, and how wide.
_INTEGERS = {"layers_per_block": 16, "time_embedding_dim": 65_536, "num_train_timesteps": 100_000}
_MAX_LEVELS, _MAX_WIDTH = 8, 8192

BaseId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Training(Part):
    """How a model is trained: AdamW on the plain denoising loss.

    `warmup` steps of linearly rising learning rate, then `decay` over the steps that remain (to 0).
    `bf16` runs forward and backward on bfloat16 weights; the master weights stay fp32.
    """

    steps: PositiveInt = Field(default=600, le=100_000_000)
    batch: PositiveInt = Field(default=64, le=65_536)
    learning_rate: PositiveFloat = 3e-3
    warmup: int = Field(default=50, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: PositiveFloat | None = Field(default=1.0, description="Largest norm of the gradient.")
    precision: Literal["fp32", "bf16"] = "fp32"

    ascends: ClassVar[bool] = False  # the loss, instead of descending it

    @model_validator(mode="after")
    def _betas_in_range(self) -> Training:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self

    def rate(self, step: int) -> float:
        """Return the learning rate of step 0, 1, ..., `steps` - 1."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        match self.decay:
            case "constant":
                return self.learning_rate
            case "linear":
                return self.learning_rate * (1 - progress)
            case "cosine":
                return self.learning_rate * (1 + math.cos(math.pi * progress)) / 2


class NoiseSchedule(Part):
    """The forward process q(x_t | x_0) = N(a_t x_0, s_t^2), and what the network predicts.

    a_t^2 = `alphas_cumprod[t]` of diffusers' DDPMScheduler, s_t^2 = 1 - a_t^2. `v_prediction` is
    v = a_t eps - s_t x_0 (Salimans and Ho, 2022).
    """

    prediction: Prediction = "v_prediction"
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    timesteps: int = Field(default=1000, ge=2, le=100_000)
    beta_start: PositiveFloat = 1e-4
    beta_end: float = Field(default=2e-2, gt=0, lt=1)

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str) -> NoiseSchedule:
        """Read a diffusers scheduler_config.json. DataError for a process that is not DDPM's."""
        wanted = "a schedule of DDPM's kind (linear, scaled_linear or squaredcos_cap_v2 betas)"
        if config.get("rescale_betas_zero_snr") or config.get("trained_betas") is not None:
            raise DataError("own betas and zero terminal SNR are not supported", where, wanted)
        names = {
            "prediction_type": "prediction",
            "beta_schedule": "beta_schedule",
            "num_train_timesteps": "timesteps",
            "beta_start": "beta_start",
            "beta_end": "beta_end",
        }
        if "num_train_timesteps" not in config or "beta_schedule" not in config:
            raise DataError("names no beta_schedule and num_train_timesteps", where, wanted)
        found = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
        try:
            return cls(**{"prediction": "epsilon", **found})
        except ValidationError as error:
            at, got = error.errors()[0]["loc"][0], error.errors()[0]["input"]
            raise DataError(f"{at} {got!r} is not supported", where, f"wanted {wanted}") from None

    def diffusers_config(self) -> dict[str, Any]:
        """Return the keyword arguments that give a diffusers scheduler this forward process."""
        return {
            "num_train_timesteps": self.timesteps,
            "beta_schedule": self.beta_schedule,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
        }

    def alphas_cumprod(self) -> torch.Tensor:
        """Return a_t^2: float32 (timesteps,) on the CPU; not to be written to."""
        return _alphas_cumprod(**self.diffusers_config())

    def signal_and_noise(self, t: torch.Tensor, like: torch.Tensor) -> tuple:
        """Return (a_t, s_t) for `t` (B,), shaped to multiply `like` (B, c, h, w)."""
        squared = self.alphas_cumprod().to(like.device)[t].view(-1, *[1] * (like.ndim - 1))
        return squared.sqrt(), (1 - squared).sqrt()

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return x_t = a_t x_0 + s_t noise."""
        a, s = self.signal_and_noise(t, x0)
        return a * x0 + s * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return what the network should answer at x_t."""
        match self.prediction:
            case "epsilon":
                return noise
            case "sample":
                return x0
            case "v_prediction":
                a, s = self.signal_and_noise(t, x0)
                return a * noise - s * x0

    def to_x0(self, t: int) -> tuple[float, float]:
        """Return (k_x, k_out) with which x_0 = k_x x_t + k_out (network's answer) at time `t`."""
        squared = float(self.alphas_cumprod()[t])
        a, s = math.sqrt(squared), math.sqrt(1 - squared)
        match self.prediction:
            case "epsilon":
                return 1 / a, -s / a
            case "sample":
                return 0.0, 1.0
            case "v_prediction":
                return a, -s


@functools.lru_cache(maxsize=8)
def _alphas_cumprod(**config: Any) -> torch.Tensor:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(**config).alphas_cumprod


class UNet(Part):
    """A UNet2DModel trained here, from nothing.

    Level 0 is the full resolution; `attention` names the levels that attend (and `mid`). Size and
    channels of the images follow the data unless pinned.
    """

    kind: Literal["unet"] = "unet"
    block_out_channels: tuple[Annotated[int, Field(ge=1, le=8192)], ...] = Field(
        default=(24, 48), min_length=1, max_length=8
    )
    layers_per_block: PositiveInt = Field(default=1, le=16)
    attention: tuple[int | Literal["mid"], ...] = ()
    attention_head_dim: PositiveInt | None = Field(
        default=None, description="None: one head per block."
    )
    norm_num_groups: PositiveInt = 4
    dropout: float = Field(default=0.0, ge=0, lt=1)
    size: PositiveInt | None = None
    channels: PositiveInt | None = None
    schedule: NoiseSchedule = NoiseSchedule()
    training: Training = Training()
    base: BaseId | None = Field(default=None, description="Id of a trained base to use as it is.")

    @model_validator(mode="after")
    def _consistent(self) -> UNet:
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels {width} is no multiple of norm_num_groups "
                    f"{self.norm_num_groups}"
                )
            if self.attention_head_dim is not None and width % self.attention_head_dim:
                raise ValueError(
                    f"block_out_channels {width} is no multiple of attention_head_dim "
                    f"{self.attention_head_dim}"
                )
        levels = len(self.block_out_channels)
        for level in self.attention:
            if level != "mid" and not 0 <= level < levels:
                raise ValueError(f"attention level {level} is not one of 0..{levels - 1} or mid")
        return self

    def inputs(self) -> dict[str, Any]:
        """Return what the trained model depends on, beside the data and the seed."""
        return {**self.architecture(), "training": self.training.recipe()}

    def architecture(self) -> dict[str, Any]:
        """Return what of `inputs` still matters once `base` says the weights: all but training."""
        recipe = self.recipe()
        return {name: recipe[name] for name in recipe if name not in ("base", "training")}

    def check(self, channels: int, size: int) -> None:
        """Raise DataError if images of `channels` x `size` x `size` do not fit."""
        _check_shape("model", channels, size, self.channels, self.size, self.block_out_channels)

    def build(self, channels: int, size: int, seed: int) -> UNet2DModel:
        """Return the freshly initialised module (fp32, CPU, eval mode): a function of `seed`."""
        levels = range(len(self.block_out_channels))
        attends = [level in self.attention for level in levels]
        config = {
            "sample_size": size,
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": self.block_out_channels,
            "layers_per_block": self.layers_per_block,
            "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            "add_attention": "mid" in self.attention,
            "attention_head_dim": self.attention_head_dim,
            "norm_num_groups": self.norm_num_groups,
            "dropout": self.dropout,
        }
        return _build(config, seed)

    def initial(self, channels: int, size: int, seed: int) -> UNet2DModel:
        """Return the module that the training on all data starts from: a fresh one."""
        return self.build(channels, size, seed)


class DiffusersFolder(Part):
    """A UNet2DModel in a folder as diffusers writes it: a pipeline, or the model alone.

    The weights must be safetensors. `training` says how to go on training it on all data before it
    is pruned; without it the model is used as it is.
    """

    kind: Literal["diffusers"] = "diffusers"
    path: Annotated[str, UNHASHED] = Field(min_length=1)
    size: PositiveInt | None = None
    channels: PositiveInt | None = None
    training: Training | None = None
    base: BaseId | None = Field(default=None, description="Id of a trained base to use as it is.")

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule in the folder's scheduler_config.json."""
        root = self._root
        places = [root / "scheduler" / "scheduler_config.json", root / "scheduler_config.json"]
        for place in places:
            if place.is_file():
                return NoiseSchedule.from_config(_read_json(place), str(place))
        hint = "save the scheduler beside the model: scheduler.save_pretrained('.../scheduler')"
        raise DataError("no scheduler_config.json", str(root), hint)

    @property
    def config(self) -> dict[str, Any]:
        """The UNet2DModel's config.json without the entries that do not change the model."""
        place = self._unet_folder / "config.json"
        config = _read_json(place)
        name = config.get("_class_name")
        if name != "UNet2DModel":
            hint = "only unconditional pixel models (UNet2DModel) can be read so far"
            shown = repr(name[:60]) if isinstance(name, str) else "no model"
            raise DataError(f"is the config of {shown}", str(place), hint)
        if config.get("class_embed_type") or config.get("num_class_embeds"):
            raise DataError("is class-conditional", str(place), "wanted an unconditional model")
        _check_extent(config, str(place))
        return {key: value for key, value in config.items() if not key.startswith("_")}

    def inputs(self) -> dict[str, Any]:
        """Return what the model depends on: config, schedule and the weights' sha256."""
        found = self._weights.stat()
        weights = _file_sha256(self._weights, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        training = None if self.training is None else self.training.recipe()
        return {**self.architecture(), "training": training, "weights": weights}

    def architecture(self) -> dict[str, Any]:
        """Return what of `inputs` still matters once `base` says the weights.

        The folder's own weights and how to go on training them do not.
        """
        pins = {"kind": self.kind, "size": self.size, "channels": self.channels}
        return {**pins, "config": self.config, "schedule": self.schedule.recipe()}

    def check(self, channels: int, size: int) -> None:
        """Raise DataError if the folder cannot be used, or the images do not fit the model."""
        config, _ = self.config, self.schedule
        with _open_safetensors(self._weights, "np"):
            pass  # the header says how long the file has to be
        where = str(self._unet_folder / "config.json")
        for key in ("in_channels", "out_channels"):
            if config.get(key, 3) != channels:
                hint = f"set data.channels, or use a model with {channels} channels"
                raise DataError(f"{key} {config.get(key, 3)}, data has {channels}", where, hint)
        widths = config.get("block_out_channels", (224, 448, 672, 896))
        _check_shape(where, channels, size, self.channels, self.size, widths)

    def build(self, channels: int, size: int, seed: int) -> UNet2DModel:
        """Return the freshly initialised module (fp32, CPU, eval mode): a function of `seed`."""
        self.check(channels, size)
        try:
            self._check_parameters()
            return _build(self.config, seed)
        except DataError:
            raise
        except Exception as error:  # whatever diffusers stumbles over stands in the config
            what = f"diffusers cannot build the model: {type(error).__name__}: {error}"
            place = str(self._unet_folder / "config.json")
            raise DataError(what, place, "does UNet2DModel.from_pretrained read it?") from error

    def _check_parameters(self) -> None:
        """Raise DataError before memory is taken for more parameters than the weights can hold."""
        import torch

        with torch.device("meta"):
            parameters = sum(p.numel() for p in _build(self.config, 0).parameters())
        held = self._weights.stat().st_size
        if parameters > held:
            what = f"describes {parameters:,} parameters, {WEIGHTS} has {held:,} bytes"
            raise DataError(what, str(self._unet_folder / "config.json"), "is it of another model?")

    def initial(self, channels: int, size: int, seed: int) -> UNet2DModel:
        """Return the module with the folder's weights."""
        module = self.build(channels, size, seed)
        load_weights(module, self._weights, cast=True)
        return module

    @property
    def _root(self) -> Path:
        return existing_folder(self.path, "model.path", "wanted a folder saved by diffusers")

    @property
    def _unet_folder(self) -> Path:
        root = self._root
        for folder in (root / "unet", root):
            if (folder / "config.json").is_file():
                return folder
        hint = "wanted a diffusers pipeline (unet/config.json) or model (config.json)"
        raise DataError("no config.json", str(root), hint)

    @property
    def _weights(self) -> Path:
        folder = self._unet_folder
        if (folder / WEIGHTS).is_file():
            return folder / WEIGHTS
        pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in {".bin", ".ckpt", ".pt"}]
        if pickles:
            hint = "pickles can run code and are never opened; where you trust it, convert it with "
            hint += "UNet2DModel.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
            raise DataError(f"{pickles[0]} is a pickle, wanted {WEIGHTS}", str(folder), hint)
        raise DataError(f"no {WEIGHTS}", str(folder), "wanted one safetensors file of weights")


def _check_extent(config: dict[str, Any], where: str) -> None:
    """Raise DataError where a foreign config asks for an absurd number or width of layers."""
    for key, most in _INTEGERS.items():
        value = config.get(key)
        if value is not None and not (type(value) is int and 1 <= value <= most):
            raise DataError(f"{key} is no whole number from 1 to {most}", where)
    widths = config.get("block_out_channels", (1,))
    good = isinstance(widths, list) and all(type(w) is int and 1 <= w <= _MAX_WIDTH for w in widths)
    if "block_out_channels" in config and not (good and 1 <= len(widths) <= _MAX_LEVELS):
        hint = f"wanted a list of 1 to {_MAX_LEVELS} widths up to {_MAX_WIDTH}"
        shown = str(widths)[:60] if isinstance(widths, int | float | str) else "no such list"
        raise DataError(f"block_out_channels is {shown}", where, hint)


def _check_shape(
    where: str,
    channels: int,
    size: int,
    pinned_channels: int | None,
    pinned_size: int | None,
    widths: Sequence[int],
) -> None:
    """Raise DataError with all that keeps images of this shape from going through the UNet."""
    problems = []
    if pinned_channels is not None and pinned_channels != channels:
        what = f"model.channels is {pinned_channels}, data has {channels}"
        problems.append(Problem(what, where, "leave it out to follow the data"))
    if pinned_size is not None and pinned_size != size:
        what = f"model.size is {pinned_size}, data has {size}"
        problems.append(Problem(what, where, "leave it out to follow the data, or set data.size"))
    halvings = 2 ** (len(widths) - 1)
    if size % halvings:
        what = f"image size {size} cannot be halved {len(widths) - 1} times"
        below = size // halvings
        fits = [halvings * k for k in (below, below + 1) if k]
        hint = f"use a data.size such as {' or '.join(map(str, fits))}, or fewer levels"
        problems.append(Problem(what, where, hint))
    if problems:
        raise DataError.of(problems)


def _build(config: dict[str, Any], seed: int) -> UNet2DModel:
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: Any = UNet2DModel.from_config(config)
        return module.eval()


def reinitialise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw all weights anew, in place, as the layers do at birth: a function of `seed`."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in module.modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
    return module


@functools.lru_cache(maxsize=8)
def _file_sha256(path: Path, *_stamp: int) -> str:
    """Return the sha256 of a file that is read anew only if its size or times changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON:
            raise DataError(f"more than {MAX_JSON} bytes", str(path), "is it a config?")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot be read as JSON: {error}", str(path)) from None
    if not isinstance(content, dict):
        raise DataError("is not a JSON object", str(path))
    return content


# -- weights on disk ----------------------------------------------------------------------------


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: Any = None) -> None:
    """Write tensors and JSON-able `metadata`, whole or not at all; same content, same bytes."""
    from safetensors.torch import save

    # One entry: safetensors writes several in an arbitrary order.
    header = {"attr_batch": json.dumps(metadata, sort_keys=True)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that waits under this name
            file.write(save(tensors, header))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Return tensors (CPU) and metadata. DataError if the file is missing, torn or foreign."""
    with _open_safetensors(path, "pt") as file:
        metadata = json.loads((file.metadata() or {}).get("attr_batch", "null"))
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


@contextlib.contextmanager
def _open_safetensors(path: Path, framework: Literal["np", "pt"]) -> Iterator[Any]:
    """Open a file, which reads its header alone. DataError if it is missing, torn or foreign."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        what = f"cannot be read as safetensors: {error}"
        raise DataError(what, str(path), "is it completely copied?") from None


def save_weights(module: torch.nn.Module, path: Path, metadata: Any = None) -> None:
    """Write a module's weights, whole or not at all."""
    write_safetensors(path, module.state_dict(), metadata)


def load_weights(module: torch.nn.Module, path: Path, *, cast: bool = False) -> Any:
    """Read `path` into `module` and return its metadata; with `cast`, from any float dtype.

    DataError says what does not fit, before anything is changed.
    """
    wanted = module.state_dict()
    with _open_safetensors(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    hint = "the weights belong to another architecture"
    for names, what in (
        (wanted.keys() - shapes.keys(), "lacks"),
        (shapes.keys() - wanted, "has"),
    ):
        if names:
            raise DataError(f"{what} {min(names)[:200]} ({len(names)} in all)", str(path), hint)
    for name, tensor in wanted.items():
        if shapes[name] != tensor.shape:
            what = f"{name} is {shapes[name]}, wanted {tuple(tensor.shape)}"
            raise DataError(what, str(path), hint)
    tensors, metadata = read_safetensors(path)
    for name, tensor in wanted.items():
        found = tensors[name]
        same = cast and found.is_floating_point() and tensor.is_floating_point()
        if found.dtype != tensor.dtype and not same:
            raise DataError(f"{name} is {found.dtype}, wanted {tensor.dtype}", str(path))
    module.load_state_dict(tensors)
    return metadata


Model = Annotated[UNet | DiffusersFolder, Field(discriminator="kind")]
