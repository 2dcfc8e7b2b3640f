"""Where the tests of this folder run: on CUDA, or, to rehearse them, on the CPU.

Without a CUDA device they are skipped, each module with one reason. With
`ATTR_BATCH_TEST_DEVICE=cpu` the same tests run on the CPU, so that on the day a GPU is at hand the
tests themselves are no news: `make gpu` is seldom and short.
"""

import os

import pytest
import torch

from attr_batch import graphs, ops

DEVICE = os.environ.get("ATTR_BATCH_TEST_DEVICE", "cuda")
CUDA = DEVICE.startswith("cuda")
LAYOUTS = ["channels_last", "contiguous", "sliced", "shifted"]


def need_device() -> None:
    """Skip the calling module where there is nothing to run it on."""
    if CUDA and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device", allow_module_level=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    ops.load()
    if CUDA and ops.backend(DEVICE) != "native":
        message = "the CUDA library is missing: python setup.py build_ext --inplace"
        pytest.fail(message, pytrace=False)


def draw(shape, seed, layout="channels_last", dtype=torch.float32, device=DEVICE):
    """Return standard normal values, the same on every device and in every memory layout."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    if len(shape) != 4:
        return x
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # strided in its last dimension
        return torch.stack((x, x), dim=4)[..., 0]
    if layout == "shifted":  # channels_last, but starting where no vector may be loaded
        wide = torch.zeros(x.numel() + 1, dtype=dtype, device=device)
        shape = (x.shape[0], x.shape[2], x.shape[3], x.shape[1])
        view = wide[1:].view(shape).permute(0, 3, 1, 2)
        view.copy_(x)
        return view
    return x


def poison(*sizes):
    """Leave NaN in the memory that the next tensors of these numbers of bytes will get."""
    held = [torch.full((max(1, size // 4),), torch.nan, device=DEVICE) for size in sizes]
    del held


def double(t):
    """Return a tensor (or None) as the reference wants it: float64, on the CPU."""
    return None if t is None else t.detach().cpu().double()


def assert_close(got, want, relative):
    """Compare with a float64 reference, by the largest and by the typical error."""
    got = double(got)
    assert got.shape == want.shape
    assert bool(torch.isfinite(got).all())
    if want.numel():
        size = max(1.0, float(want.abs().max()))
        assert float((got - want).abs().max()) <= relative * size
        assert float((got - want).norm()) <= relative * max(float(want.norm()), 1e-3)


def captured(function):
    """Return what replays `function` as a CUDA graph; on a CPU, the function."""
    return graphs.captured(function) if CUDA else function
