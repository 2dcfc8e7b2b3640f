"""attr-batch: who made a diffusion model good, as Shapley values with intervals."""

__version__ = "0.1.0"
