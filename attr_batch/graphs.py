"""CUDA graphs: a step of hundreds of small kernels, launched as one.

At the widths that pruning leaves, a GPU computes faster than Python launches. A captured graph
replays a whole forward pass, or a whole training step, with one call. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

WARM_UP = 3  # calls before the capture: libraries choose algorithms, the optimizer makes its state


def beside(function: Callable[[], Any]) -> Any:
    """Call on a stream of its own, as a capture does, so that no state belongs to another."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = function()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def captured(function: Callable[[], Any], warm_up: int = WARM_UP) -> Callable[[], Any]:
    """Return what replays `function` as a CUDA graph; its result is the same memory each time."""
    import torch

    for _ in range(warm_up):
        beside(function)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


class Replayed:
    """A function of tensors that is captured after a few calls and replayed from then on.

    The first `WARM_UP` calls are ordinary ones, whose effects count. `function` must not look at
    values on the host, and must find and leave everything else it uses at the same place in memory;
    what it returns is overwritten by the next call. Inputs of other shapes, and everything on
    another device than CUDA, are ordinary calls.
    """

    def __init__(self, function: Callable[..., Any], device: str) -> None:
        self._function = function
        self._captures = device.startswith("cuda")
        self._calls = 0
        self._inputs: list[Tensor] = []
        self._replay: Callable[[], Any] | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        """Return `function(*inputs)`."""
        if not self._captures:
            return self._function(*inputs)
        if self._replay is None and self._calls < WARM_UP:
            self._calls += 1
            return beside(lambda: self._function(*inputs))
        if self._replay is None:
            self._inputs = [t.clone() for t in inputs]
            self._replay = captured(lambda: self._function(*self._inputs), warm_up=0)
        if any(a.shape != b.shape for a, b in zip(inputs, self._inputs, strict=True)):
            return self._function(*inputs)
        import torch

        torch._foreach_copy_(self._inputs, list(inputs))  # pyright: ignore
        return self._replay()
