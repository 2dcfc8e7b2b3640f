import json
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from attr_batch.errors import DataError
from attr_batch.models import (
    WEIGHTS,
    DiffusersFolder,
    NoiseSchedule,
    Training,
    UNet,
    load_weights,
    read_safetensors,
    save_weights,
    write_safetensors,
)

TINY = UNet(block_out_channels=(8, 16), norm_num_groups=4)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# -- learning rate and noise -----------------------------------------------------------------------


def test_rate_warms_up_then_decays():
    cosine = Training(steps=110, warmup=10, learning_rate=1.0)
    assert [cosine.rate(i) for i in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert cosine.rate(60) == pytest.approx(0.5)
    assert 0 < cosine.rate(109) < 0.001
    linear = cosine.model_copy(update={"decay": "linear"})
    assert linear.rate(35) == pytest.approx(0.75)
    assert cosine.model_copy(update={"decay": "constant"}).rate(109) == 1.0


@given(st.integers(1, 500), st.integers(0, 600), st.sampled_from(["constant", "linear", "cosine"]))
def test_rate_is_positive_and_bounded(steps, warmup, decay):
    training = Training(steps=steps, warmup=warmup, decay=decay, learning_rate=0.5)
    assert all(0 < training.rate(i) <= 0.5 for i in range(steps))


def test_betas_out_of_range_are_refused():
    with pytest.raises(ValidationError, match="betas"):
        Training(betas=(0.9, 1.0))


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noise_is_diffusers(beta_schedule):
    schedule = NoiseSchedule(beta_schedule=beta_schedule)
    theirs = DDPMScheduler(1000, beta_schedule=beta_schedule, prediction_type="v_prediction")
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 1, 4, 4, generator=generator)
    t = torch.tensor([0, 1, 500, 998, 999])
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t))
    torch.testing.assert_close(schedule.target(x0, noise, t), theirs.get_velocity(x0, noise, t))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", [0, 300, 700])
def test_the_target_gives_x0_back(prediction, t):
    schedule = NoiseSchedule(prediction=prediction)
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=generator)
    times = torch.full((3,), t)
    k_x, k_out = schedule.to_x0(t)
    x_t, target = schedule.add_noise(x0, noise, times), schedule.target(x0, noise, times)
    torch.testing.assert_close(k_x * x_t + k_out * target, x0, rtol=1e-4, atol=1e-5)


# -- UNet ------------------------------------------------------------------------------------------


def test_unet_defaults_are_the_digits_net():
    module = UNet().build(1, 8, seed=0)
    assert sum(p.numel() for p in module.parameters()) == 357_625
    assert not module.training


def test_build_is_a_function_of_the_seed_and_leaves_the_global_stream_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (TINY.build(3, 8, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(a, b)
    assert not same_weights(a, c)
    assert a(torch.zeros(2, 3, 8, 8), torch.zeros(2)).sample.shape == (2, 3, 8, 8)


def test_attention_stands_where_asked():
    module = UNet(attention=(1, "mid"), attention_head_dim=12).build(1, 8, seed=0)
    assert "AttnDownBlock2D" not in type(module.down_blocks[0]).__name__
    assert module.down_blocks[1].attentions[0].heads == 4
    assert module.up_blocks[0].attentions[0].heads == 4
    assert module.mid_block.attentions[0] is not None
    assert UNet().build(1, 8, seed=0).mid_block.attentions[0] is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_out_channels": (24, 50)}, "50 is no multiple of norm_num_groups 4"),
        ({"attention": (2,)}, "attention level 2 is not one of 0..1"),
        ({"attention_head_dim": 16}, "no multiple of attention_head_dim"),
        ({"block_out_channels": ()}, "at least 1"),
        ({"colour": 1}, "Extra inputs"),
        ({"block_out_channels": (8196,)}, "less than or equal to 8192"),
        ({"layers_per_block": 17}, "less than or equal to 16"),
        ({"base": "../../etc"}, "should match pattern"),
        ({"training": {"steps": 100_000_001}}, "less than or equal to 100000000"),
        ({"training": {"batch": 65_537}}, "less than or equal to 65536"),
    ],
)
def test_inconsistent_unets_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        UNet(**fields)


def test_check_reports_all_problems_at_once():
    with pytest.raises(DataError) as caught:
        UNet(channels=3, size=32, block_out_channels=(8, 8, 8)).check(1, 10)
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "halved 2 times" in text
    assert "8 or 12" in text
    with pytest.raises(DataError, match=r"a data\.size such as 32, or fewer levels"):
        UNet(block_out_channels=(8,) * 6).check(1, 20)
    UNet(block_out_channels=(8, 8, 8)).check(1, 12)


def test_inputs_do_not_name_the_pinned_base():
    assert UNet(base="ab" * 32).inputs() == UNet().inputs()
    assert UNet(training=Training(steps=1)).inputs() != UNet().inputs()


def test_a_pinned_base_leaves_the_architecture_and_the_schedule():
    plain = UNet().architecture()
    assert UNet(base="ab" * 32, training=Training(steps=1)).architecture() == plain
    others = [{"dropout": 0.1}, {"size": 8}, {"schedule": NoiseSchedule(timesteps=9)}]
    assert all(UNet(**other).architecture() != plain for other in others)
    assert plain.keys() == UNet.model_fields.keys() - {"base", "training"}


# -- a diffusers folder ----------------------------------------------------------------------------


def small_model(seed=0, **config):
    torch.manual_seed(seed)
    shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    widths = {"block_out_channels": (8, 16), "layers_per_block": 1}
    return UNet2DModel(**{**shape, **blocks, **widths, **config})


@pytest.fixture(params=["pipeline", "model", "flat"])
def folder(request, tmp_path):
    scheduler = DDIMScheduler(500, beta_schedule="linear", prediction_type="v_prediction")
    if request.param == "pipeline":
        small_model().save_pretrained(tmp_path / "unet")
        (tmp_path / "model_index.json").write_text("{}")
    else:
        small_model().save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path if request.param == "flat" else tmp_path / "scheduler")
    return tmp_path


def test_folder_gives_model_and_schedule(folder):
    part = DiffusersFolder(path=str(folder))
    part.check(1, 8)
    assert same_weights(part.initial(1, 8, seed=3), small_model())
    assert not same_weights(part.build(1, 8, seed=3), small_model())
    wanted = NoiseSchedule(prediction="v_prediction", beta_schedule="linear", timesteps=500)
    assert part.schedule == wanted


def test_folder_is_known_by_content_not_by_place(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere") / "copy"
    other.parent.mkdir(exist_ok=True)
    folder.rename(other)
    inputs = DiffusersFolder(path=str(other)).inputs()
    assert str(other) not in json.dumps(inputs)
    weights = next(other.rglob(WEIGHTS))
    small_model(seed=1).save_pretrained(weights.parent)
    assert DiffusersFolder(path=str(other)).inputs()["weights"] != inputs["weights"]


def test_a_pinned_base_leaves_of_a_folder_all_but_its_weights_and_training(folder):
    part = DiffusersFolder(path=str(folder))
    plain, before = part.architecture(), part.inputs()
    small_model(seed=1).save_pretrained(next(folder.rglob(WEIGHTS)).parent)
    again = DiffusersFolder(path=str(folder), training=Training(), base="ab" * 32)
    assert again.architecture() == plain
    assert again.inputs() != before
    assert again.inputs() == {
        **plain,
        "training": Training().recipe(),
        "weights": again.inputs()["weights"],
    }
    edit(next(folder.rglob("scheduler_config.json")), num_train_timesteps=9)
    assert part.architecture() != plain
    assert DiffusersFolder(path=str(folder), size=8).architecture() != part.architecture()


def test_weights_are_hashed_once_until_they_change(folder, monkeypatch):
    import hashlib

    hashed, really = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: hashed.append(a) or really(*a))
    first = DiffusersFolder(path=str(folder)).inputs()
    assert DiffusersFolder(path=str(folder)).inputs() == first
    assert len(hashed) == 1
    small_model(seed=1).save_pretrained(next(folder.rglob(WEIGHTS)).parent)
    assert DiffusersFolder(path=str(folder)).inputs() != first


def half_weights(folder):
    weights = next(folder.rglob(WEIGHTS))
    tensors, _ = read_safetensors(weights)
    write_safetensors(weights, {name: t.half() for name, t in tensors.items()})


def test_half_precision_weights_become_fp32_masters(folder):
    half_weights(folder)
    module = DiffusersFolder(path=str(folder)).initial(1, 8, seed=0)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def pickle_only(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pickle_only, "is a pickle"),
        (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS}"),
        (lambda f: (f / "scheduler_config.json").unlink(), "no scheduler_config.json"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
        (lambda f: edit(f / "config.json", _class_name="UNet2DConditionModel"), "ConditionModel"),
        (lambda f: edit(f / "config.json", block_out_channels=8), "block_out_channels is 8"),
        (lambda f: cut(f / WEIGHTS), "cannot be read as safetensors"),
        (lambda f: edit(f / "config.json", num_class_embeds=3), "class-conditional"),
        (lambda f: edit(f / "scheduler_config.json", prediction_type="flow"), "'flow'"),
        (lambda f: edit(f / "scheduler_config.json", rescale_betas_zero_snr=True), "terminal SNR"),
        (lambda f: (f / "scheduler_config.json").write_text("{}"), "names no beta_schedule"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, spoil, message):
    small_model().save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        DiffusersFolder(path=str(tmp_path)).check(1, 8)
    assert caught.value.problems[0].where
    assert caught.value.problems[0].hint or "JSON" in message


@pytest.mark.parametrize(
    "changes", [{"norm_num_groups": 5}, {"down_block_types": ["Nothing"] * 2}, {"act_fn": 3}]
)
def test_a_config_that_diffusers_cannot_build_is_a_data_error(tmp_path, changes):
    small_model().save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(
        DataError, match=r"config\.json: diffusers cannot build the model"
    ) as caught:
        DiffusersFolder(path=str(tmp_path)).build(1, 8, seed=0)
    assert caught.value.problems[0].hint


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_path_that_cannot_be_a_folder_is_a_data_error(name):
    part = DiffusersFolder(path=name)
    for use in (part.inputs, lambda: part.schedule, lambda: part.check(1, 8)):
        with pytest.raises(DataError, match=r"^model\.path") as caught:
            use()
        assert caught.value.problems[0].hint


def test_folder_refuses_other_images(folder):
    part = DiffusersFolder(path=str(folder))
    with pytest.raises(DataError, match="in_channels 1, data has 3"):
        part.check(3, 8)
    with pytest.raises(DataError, match="cannot be halved"):
        part.check(1, 9)
    with pytest.raises(DataError, match="no such folder"):
        DiffusersFolder(path=str(folder / "missing")).check(1, 8)


# -- weights on disk -------------------------------------------------------------------------------


def test_weights_round_trip_bit_for_bit_and_bytes_are_stable(tmp_path):
    module = TINY.build(1, 8, seed=0)
    save_weights(module, tmp_path / "a", {"b": 1, "a": [2]})
    save_weights(module, tmp_path / "b", {"a": [2], "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    other = TINY.build(1, 8, seed=1)
    assert load_weights(other, tmp_path / "a") == {"a": [2], "b": 1}
    assert same_weights(module, other)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    module, path = TINY.build(1, 8, seed=0), tmp_path / "w"
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    spoiled = {
        "lacks conv_in.bias": {k: v for k, v in weights.items() if k != "conv_in.bias"},
        "has extra": {**weights, "extra": torch.zeros(1)},
        r"conv_in.bias is \(3,\), wanted \(8,\)": {**weights, "conv_in.bias": torch.zeros(3)},
        "conv_in.bias is torch.float16": {**weights, "conv_in.bias": torch.zeros(8).half()},
    }
    for message, tensors in spoiled.items():
        write_safetensors(path, {name: tensor + 1 for name, tensor in tensors.items()})
        with pytest.raises(DataError, match=message):
            load_weights(module, path)
        assert all(torch.equal(t, weights[name]) for name, t in module.state_dict().items())


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_torn_files_are_data_errors(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("torn") / "w"
    write_safetensors(path, {"x": torch.arange(10.0)})
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        read_safetensors(path)


def test_a_pickle_is_never_opened(tmp_path):
    torch.save({"x": np.zeros(3)}, tmp_path / "w")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        read_safetensors(tmp_path / "w")


def test_parts_leave_torch_out():
    import subprocess

    code = (
        "import sys, attr_batch.counterfactual, attr_batch.sampling\n"
        "attr_batch.models.UNet().check(1, 8)\n"
        "assert not {'torch', 'diffusers', 'torch_pruning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
