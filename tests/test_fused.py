"""The fused forward pass against diffusers' own, in float64, where nothing hides."""

import copy

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from attr_batch import fused
from attr_batch.counterfactual import Lora
from attr_batch.models import UNet
from attr_batch.pruning import Magnitude

UNETS = {
    "plain": dict(block_out_channels=(8, 16)),
    "attention": dict(block_out_channels=(8, 16, 16), attention=(1, "mid")),
    "heads": dict(
        block_out_channels=(16, 16), attention=(0, 1), attention_head_dim=4, layers_per_block=2
    ),
    "dropout": dict(block_out_channels=(8, 16), dropout=0.3),
}
SMALL = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
CONFIGS = {
    "scale_shift": dict(resnet_time_scale_shift="scale_shift"),
    "no padding": dict(downsample_padding=0),
    "scaled": dict(mid_block_scale_factor=1.4),
    "centred": dict(center_input_sample=True),
}


def modules(name, count=1):
    """Return modules of one architecture with different weights, in float64."""
    if name in UNETS:
        unet = UNet(**UNETS[name])
        found = [unet.build(3, 8, seed) for seed in range(count)]
    else:
        config = dict(
            **SMALL,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
        )
        found = []
        for seed in range(count):
            torch.manual_seed(seed)
            found.append(UNet2DModel(**{**config, **CONFIGS[name]}).eval())
    return [m.double() for m in found]


def arguments(batch=6):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.double)
    return x, 1 + torch.randint(0, 999, (batch,), generator=generator)


@pytest.mark.parametrize(
    ("name", "pruned"),
    [(n, p) for p in (False, True) for n in (*UNETS, *(() if p else CONFIGS))],
)
def test_the_forward_pass_is_diffusers(name, pruned):
    (module,) = modules(name)
    if pruned:
        plan = Magnitude(ratio=0.5).plan(module.float(), 3, 8)
        plan.apply(module)
        module.double()
    assert fused.supported(module)
    x, t = arguments()
    want = module(x, t, return_dict=False)[0]
    got = fused.fuse(module)(x, t, return_dict=False)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["plain", "heads", "scale_shift"])
def test_the_derivatives_are_diffusers(name):
    (module,) = modules(name)
    x, t = arguments()
    found = []
    for network in (module, fused.fuse(module)):
        loss = network(x, t, return_dict=False)[0].square().sum()
        found.append(torch.autograd.grad(loss, list(module.parameters())))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_dropout_drops_in_training_alone():
    (module,) = modules("dropout")
    x, t = arguments()
    network = fused.fuse(module)
    calm = network(x, t)[0]
    module.train()
    assert not torch.equal(network(x, t)[0], network(x, t)[0])
    torch.manual_seed(5)
    once = network(x, t)[0]
    torch.manual_seed(5)
    assert torch.equal(network(x, t)[0], once)
    module.eval()
    assert torch.equal(network(x, t)[0], calm)


@pytest.mark.parametrize("name", ["plain", "heads", "scale_shift", "no padding"])
def test_a_cohort_is_its_models(name):
    each = modules(name, 3)
    cohort = fused.stack(each)
    x, t = arguments()
    got = fused.fuse(cohort)(x, t)[0]
    want = [
        m(x[2 * k : 2 * k + 2], t[2 * k : 2 * k + 2], return_dict=False)[0]
        for k, m in enumerate(each)
    ]
    torch.testing.assert_close(got, torch.cat(want), rtol=0, atol=1e-11)
    gradient = torch.autograd.grad(got.square().sum(), list(cohort.parameters()))
    for k, m in enumerate(each):
        single = torch.autograd.grad(want[k].square().sum(), list(m.parameters()))
        for all_, one in zip(gradient, single, strict=True):
            torch.testing.assert_close(all_[k], one, rtol=1e-9, atol=1e-9)


def test_a_cohort_gives_its_models_back():
    each = modules("heads", 2)
    empty = [copy.deepcopy(each[1]), copy.deepcopy(each[0])]
    fused.unstack(fused.stack(each), empty)
    for module, other in zip(each, empty, strict=True):
        for name, weight in module.state_dict().items():
            assert torch.equal(weight, other.state_dict()[name])


def test_what_is_not_plain_is_left_alone():
    (module,) = modules("plain")
    assert fused.fuse(module) is not module
    adapted = Lora(rank=2)._adapted(copy.deepcopy(module).float(), 0)
    assert fused.fuse(adapted) is adapted
    assert not fused.supported(adapted.model)
    torch.manual_seed(0)
    for config in (
        dict(act_fn="mish"),
        dict(time_embedding_type="fourier"),
        dict(num_class_embeds=3),
        dict(down_block_types=("DownBlock2D", "SkipDownBlock2D")),
        dict(downsample_type="resnet", down_block_types=("AttnDownBlock2D", "DownBlock2D")),
    ):
        blocks = dict(
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        other = UNet2DModel(**{**SMALL, **blocks, **config})
        assert fused.fuse(other) is other, config


def test_bfloat16_is_a_copy():
    (module,) = modules("attention")
    module.float()
    half = fused.to_bfloat16(module)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    x, t = arguments()
    with torch.no_grad():
        got = fused.fuse(half)(x.bfloat16(), t)[0]
        want = module(x.float(), t, return_dict=False)[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


def test_a_cohort_keeps_what_is_frozen():
    each = modules("plain", 2)
    for module in each:
        module.conv_in.requires_grad_(False)
    cohort = fused.stack(each)
    assert {n for n, p in cohort.named_parameters() if not p.requires_grad} == {
        "conv_in.weight",
        "conv_in.bias",
    }


def _own_processor(module):
    module.mid_block.attentions[0].set_processor(type("Mine", (), {"__call__": None})())


def _own_forward(module):
    module.down_blocks[0].resnets[0].forward = lambda x, *_: x


def _no_norm(module):
    module.up_blocks[0].resnets[0].norm1 = torch.nn.Identity()


def _dilated(module):
    module.conv_out.dilation = (2, 2)


def _same_padding(module):
    module.conv_in.padding = "same"


@pytest.mark.parametrize(
    "change", [_own_processor, _own_forward, _no_norm, _dilated, _same_padding]
)
def test_what_was_changed_is_left_alone(change):
    (module,) = modules("attention")
    assert fused.supported(module)
    change(module)
    assert not fused.supported(module)


def test_every_row_has_its_time():
    (module,) = modules("plain")
    x, t = arguments()
    with pytest.raises(ValueError, match="a time for every row"):
        fused.fuse(module)(x, t[:1])
