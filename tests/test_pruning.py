import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attr_batch.errors import DataError, SpecError
from attr_batch.models import UNet, load_weights, save_weights
from attr_batch.pruning import (
    Magnitude,
    NoPruning,
    PruningPlan,
    _width,
    count_macs,
    count_parameters,
)

ATTENDING = UNet(block_out_channels=(32, 64), attention=(1, "mid"), attention_head_dim=8)
NETS = {
    "digits": (UNet(), 1, 8),
    "three levels": (UNet(block_out_channels=(32, 64, 64)), 3, 16),
    "two layers": (UNet(block_out_channels=(16, 32), layers_per_block=2), 3, 8),
    "attention": (ATTENDING, 1, 8),
    "one head": (UNet(block_out_channels=(16, 32), attention=(0, 1)), 1, 8),
}


@pytest.fixture(params=NETS)
def net(request):
    return NETS[request.param]


def forward(module, channels, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, size, size, generator=generator)
    with torch.no_grad():
        return module(x, torch.tensor([10, 900])).sample


def test_halving_widths_quarters_the_work(net):
    part, channels, size = net
    module = part.build(channels, size, seed=0)
    plan = Magnitude(ratio=0.5).plan(module, channels, size)
    assert 3.5 < plan.macs[0] / plan.macs[1] < 4.2
    assert plan.macs[0] == count_macs(module, channels, size)
    pruned = plan.apply(module)
    assert plan.macs[1] == count_macs(pruned, channels, size)
    assert plan.parameters[1] == count_parameters(pruned)
    assert forward(pruned, channels, size).shape == (2, channels, size, size)


def test_the_digits_net_saves_what_the_docs_say():
    plan = Magnitude().plan(UNet().build(1, 8, seed=0), 1, 8)
    assert plan.macs == (8_446_464, 2_119_104)
    assert plan.parameters == (357_625, 90_829)


def test_the_cifar_net_keeps_as_many_weights_as_the_papers():
    """METHOD: 35.7M parameters pruned by 0.3 leave 19.8M."""
    cifar = UNet(
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        attention=(1, "mid"),
        norm_num_groups=32,
    )
    plan = Magnitude(ratio=0.3).plan(cifar.build(3, 32, seed=0), 3, 32)
    assert round(plan.parameters[0] / 1e6, 1) == 35.7
    assert round(plan.parameters[1] / 1e6, 1) == 19.8


def test_macs_are_the_textbooks():
    """A 1x1-to-1x1 net: count the convolutions and linear layers by hand."""
    module = UNet(block_out_channels=(4,), norm_num_groups=2).build(1, 8, seed=0)
    wanted = 0
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d):  # one level: every convolution sees 8 x 8 pixels
            wanted += layer.weight.numel() * 64
        elif isinstance(layer, torch.nn.Linear):
            wanted += layer.weight.numel()
    assert count_macs(module, 1, 8) == wanted


def test_plan_and_weights_rebuild_the_module_bit_for_bit(net, tmp_path):
    part, channels, size = net
    module = part.build(channels, size, seed=0)
    plan = Magnitude().plan(module, channels, size)
    pruned = plan.apply(module)
    save_weights(pruned, tmp_path / "w")
    text = json.dumps(plan.to_json())
    again = PruningPlan.from_json(json.loads(text))
    assert again == plan
    rebuilt = again.apply(part.build(channels, size, seed=1))
    load_weights(rebuilt, tmp_path / "w")
    assert torch.equal(forward(rebuilt, channels, size), forward(pruned, channels, size))


def test_planning_leaves_the_module_alone(net):
    part, channels, size = net
    module = part.build(channels, size, seed=0)
    before = forward(module, channels, size)
    names = set(module.state_dict())
    assert Magnitude().plan(module, channels, size) == Magnitude().plan(module, channels, size)
    assert torch.equal(forward(module, channels, size), before)
    assert set(module.state_dict()) == names
    assert not any(m._forward_hooks for m in module.modules())


def test_removing_channels_that_do_nothing_changes_nothing():
    """The oracle of coupling: channels made inert by hand must be those that go, all the way."""
    part, channels, size = UNet(block_out_channels=(16, 32)), 1, 8
    module = part.build(channels, size, seed=0)
    resnet = module.down_blocks[0].resnets[0]
    inert = [0, 3, 5, 6, 8, 9, 14, 15]  # two of each norm group of four
    with torch.no_grad():  # what conv1 makes of them, and what conv2 reads of them
        resnet.conv1.weight[inert] = 0
        resnet.conv1.bias[inert] = 0
        resnet.time_emb_proj.weight[inert] = 0
        resnet.time_emb_proj.bias[inert] = 0
        resnet.conv2.weight[:, inert] = 0
    plan = Magnitude().plan(module, channels, size)
    kept = tuple(i for i in range(16) if i not in inert)
    prefix = "down_blocks.0.resnets.0"
    assert plan.kept[f"{prefix}.conv1"][0] == kept
    assert plan.kept[f"{prefix}.norm2"][0] == kept
    assert plan.kept[f"{prefix}.time_emb_proj"][0] == kept
    assert plan.kept[f"{prefix}.conv2"][1] == kept


def test_the_largest_channels_stay_in_every_norm_group():
    part = UNet(block_out_channels=(16, 32))
    module = part.build(1, 8, seed=0)
    conv = module.down_blocks[0].resnets[0].conv1
    with torch.no_grad():
        conv.weight[:2] *= 100  # of the first norm group (four channels) the first two
    kept = Magnitude().plan(module, 1, 8).kept["down_blocks.0.resnets.0.conv1"][0]
    assert kept is not None
    assert kept[:2] == (0, 1)
    assert [sum(4 * g <= i < 4 * g + 4 for i in kept) for g in range(4)] == [2, 2, 2, 2]


def test_attention_heads_keep_equal_widths_and_the_right_scale():
    module = ATTENDING.build(1, 8, seed=0)
    plan = Magnitude().plan(module, 1, 8)
    pruned = plan.apply(module)
    attention = pruned.mid_block.attentions[0]
    assert (attention.heads, attention.inner_dim, attention.scale) == (8, 32, 0.5)
    outputs = plan.kept["mid_block.attentions.0.to_q"][0]
    assert outputs == plan.kept["mid_block.attentions.0.to_k"][0]
    assert outputs is not None
    assert [sum(8 * h <= i < 8 * h + 8 for i in outputs) for h in range(8)] == [4] * 8


def test_every_attention_processor_agrees_after_pruning():
    """One of diffusers' processors uses the remembered scale, the other the actual width."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    module = ATTENDING.build(1, 8, seed=0)
    Magnitude().plan(module, 1, 8).apply(module)
    fast = forward(module, 1, 8)
    for block in module.modules():
        if isinstance(block, Attention):
            block.set_processor(AttnProcessor())
    torch.testing.assert_close(forward(module, 1, 8), fast, rtol=1e-4, atol=1e-5)


def test_image_ends_are_never_pruned(net):
    part, channels, size = net
    plan = Magnitude().plan(part.build(channels, size, seed=0), channels, size)
    assert plan.kept["conv_in"][1] is None
    assert plan.kept["conv_out"][0] is None


def test_a_ratio_the_norm_groups_cannot_hold_is_refused():
    module = UNet(norm_num_groups=8).build(1, 8, seed=0)
    with pytest.raises(SpecError, match=r"got 0.106 .* wanted about 0.062") as caught:
        Magnitude(ratio=0.75).plan(module, 1, 8)
    assert caught.value.problems[0].where == "pruning.ratio"


def test_the_check_says_before_training_what_the_plan_would_say_after_it():
    part = UNet(norm_num_groups=8)
    with pytest.raises(SpecError, match=r"got 0.106 .* wanted about 0.062"):
        Magnitude(ratio=0.75).check(part, 1, 8)
    Magnitude(ratio=0.5).check(part, 1, 8)
    NoPruning().check(part, 1, 8)


def test_what_a_plan_saves_does_not_depend_on_the_weights(net):
    part, channels, size = net
    one, two = (
        Magnitude(ratio=0.3).plan(part.build(channels, size, seed), channels, size)
        for seed in (0, 1)
    )
    assert (one.macs, one.parameters) == (two.macs, two.parameters)
    assert one.kept != two.kept


@given(st.integers(1, 32), st.integers(1, 16), st.floats(0.01, 0.99))
def test_widths_fit_blocks_and_are_nearest(blocks, per_block, ratio):
    channels = blocks * per_block
    kept = _width(channels, blocks, ratio)
    assert 0 < kept <= channels
    assert kept % blocks == 0
    if channels < 64:
        wanted = channels * (1 - ratio)
        others = (k * blocks for k in range(1, per_block + 1))
        assert abs(kept - wanted) <= min(abs(k - wanted) for k in others) + 1e-9


@pytest.mark.parametrize(
    ("channels", "blocks", "ratio", "wanted"),
    [(128, 32, 0.3, 96), (64, 4, 0.3, 48), (72, 4, 0.5, 40), (24, 4, 0.5, 12), (24, 8, 0.75, 8)],
)
def test_wide_layers_are_aligned(channels, blocks, ratio, wanted):
    assert _width(channels, blocks, ratio) == wanted


def test_a_plan_of_another_architecture_is_refused():
    plan = Magnitude().plan(UNet().build(1, 8, seed=0), 1, 8)
    with pytest.raises(DataError, match="another architecture"):
        plan.apply(UNet(block_out_channels=(32, 48)).build(1, 8, seed=0))


@pytest.mark.parametrize("spoil", [{}, {"kept": 3}, {"macs": [1]}, {"kept": {"a": [["x"], None]}}])
def test_what_is_no_plan_is_refused(spoil):
    data = NoPruning().plan(UNet().build(1, 8, seed=0), 1, 8).to_json()
    data = {**data, **spoil} if spoil else {}
    with pytest.raises(DataError, match="is not a pruning plan"):
        PruningPlan.from_json(data)


def test_no_pruning_keeps_everything():
    module = UNet().build(1, 8, seed=0)
    before = copy.deepcopy(module.state_dict())
    plan = NoPruning().plan(module, 1, 8)
    assert plan.macs == (8_446_464, 8_446_464)
    after = plan.apply(module).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert PruningPlan.from_json(plan.to_json()) == plan
