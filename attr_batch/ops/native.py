"""Which back end answers, and loading it.

Which back end answers is part of a run's key. So it is never chosen by trying: `backend` reads
`ATTR_BATCH_OPS` (`auto`, `native`, `reference`) and looks for the library file, and a file that is
there but does not load is an error. That question, and importing this module, leaves torch out,
because planning asks it; torch comes with the first op (`load`).
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attr_batch.errors import SpecError
from attr_batch.log import warn

if TYPE_CHECKING:
    import torch

Backend = Literal["native", "reference"]

_FOLDER = Path(__file__).parent.parent
_LIBRARIES = {"cpu": _FOLDER / "_native_cpu.so", "cuda": _FOLDER / "_native_cuda.so"}
_REBUILD = "build with: pip install --no-build-isolation -e . (needs a C++ compiler)"
_registry: torch.library.Library | None = None  # the declared ops live as long as this


@dataclass(frozen=True)
class Op:
    """An op as PyTorch's dispatcher is told of it.

    `reference` is the kernel wherever there is no native one, `fake` gives shapes only.
    `backward(ctx, *grads)` and `keep(ctx, inputs, output)`, what it needs, are the derivative of an
    op that has one.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    keep: Callable[..., None] | None = None

    @property
    def name(self) -> str:
        """The op's name in `torch.ops.attr_batch`."""
        return self.schema.partition("(")[0]


def _mode() -> str:
    mode = os.environ.get("ATTR_BATCH_OPS", "auto")
    if mode not in {"auto", "native", "reference"}:
        raise SpecError(f"{mode!r} is not auto, native or reference", where="ATTR_BATCH_OPS")
    return mode


def backend(device: str = "cpu") -> Backend:
    """Return which kernels serve `device` (`cpu`, `cuda`, `cuda:1`, ...), without torch.

    SpecError if `ATTR_BATCH_OPS=native` and there is no library for it.
    """
    mode = _mode()
    library = _LIBRARIES.get(device.partition(":")[0])
    if mode != "reference" and library is not None and library.exists():
        return "native"
    if mode == "native":
        what = f"no native ops for {device}: {library.name if library else 'a library'} is missing"
        raise SpecError(what, where="ATTR_BATCH_OPS=native", hint=_REBUILD)
    return "reference"


def build_info() -> dict[str, Any]:
    """Return how the native ops were built and what this CPU offers, as far as it is known."""
    info: dict[str, Any] = {
        "ops": _mode(),
        "libraries": [path.name for path in _LIBRARIES.values() if path.exists()],
    }
    try:
        native = importlib.import_module("attr_batch._native_info")
    except ImportError as error:
        return {**info, "build": None, "why": str(error)}
    return {**info, "build": native.build(), "cpu_features": native.cpu_features()}


def load() -> None:
    """Declare the ops and load the native libraries; done once, by the first op.

    SpecError if a library is there but does not load, or is missing under `ATTR_BATCH_OPS=native`.
    """
    global _registry
    if _registry is not None:
        return
    import torch

    from attr_batch.ops import OPS

    mode = _mode()
    if mode == "native":
        backend("cpu")  # raises where its library is missing
    devices = ["cpu", "cuda"] if torch.version.cuda else ["cpu"]
    native = [d for d in devices if mode != "reference" and _LIBRARIES[d].exists()]
    registry = torch.library.Library("attr_batch", "DEF")
    for op in OPS:
        registry.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = f"attr_batch::{op.name}"
        torch.library.register_fake(name, op.fake, lib=registry)
        if mode != "native":
            registry.impl(op.name, op.reference, "CompositeExplicitAutograd")
        if op.backward is not None:
            torch.library.register_autograd(name, op.backward, setup_context=op.keep, lib=registry)
    for device in devices:
        if device in native:
            _load_library(_LIBRARIES[device])
        elif mode == "auto" and (device == "cpu" or torch.cuda.is_available()):
            warn(f"no native ops for {device}: using the slower reference ops", hint=_REBUILD)
    _registry = registry


def call(name: str, *inputs: Any) -> Any:
    """Return what an op with a derivative gives.

    `register_autograd` spends some 0.15 ms of Python on every call that is differentiated, as much
    as the op itself on small images; an autograd function around the op spends a fifth of that.
    """
    load()
    import torch

    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _function(name).apply(*inputs)
    return getattr(torch.ops.attr_batch, name).default(*inputs)


@functools.cache
def _function(name: str) -> Any:
    import torch

    from attr_batch.ops import OPS

    (op,) = (op for op in OPS if op.name == name)
    kernel = getattr(torch.ops.attr_batch, name).default

    class Derived(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = kernel(*inputs)
            assert op.keep is not None  # noqa: S101
            op.keep(ctx, inputs, output)
            return output

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore
            assert op.backward is not None  # noqa: S101
            return op.backward(ctx, *grads)

    return Derived


def _load_library(path: Path) -> None:
    import torch

    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        what = f"the native ops do not load: {error.__cause__ or error}"
        hint = f"re{_REBUILD}, or set ATTR_BATCH_OPS=reference (other run keys)"
        raise SpecError(what, where=str(path), hint=hint) from error
