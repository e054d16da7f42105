"""The loss of `ppg-fast train`: presets, numbers of a loss, and runs that began before there were either."""

import dataclasses

import pytest

from ppg_fast.config import TrainConfig, as_now, make_config, read_yaml, write_yaml
from ppg_fast.config.defaults import LOSS_SETTINGS
from ppg_fast.losses import PRESETS
from ppg_fast.spec import UNUSED, PolicyLossSpec

pytest.importorskip("transformers")
from ppg_fast.jobs import changes


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_that_of_the_spec(name, tmp_path):
    config = make_config({"preset": name})
    assert config.loss_spec() == PolicyLossSpec.preset(name)
    assert config.loss_type == PolicyLossSpec.preset(name).loss_type
    write_yaml(tmp_path / "c.yaml", config)
    again = make_config(read_yaml(str(tmp_path / "c.yaml")))
    assert again == config
    assert again.loss_spec() == config.loss_spec()


def test_flags_change_a_preset():
    config = make_config({"preset": "dapo"}, {"clip_high": "0.3", "dual_clip": "3", "kl_coef": 0.1})
    assert config.loss_spec() == PolicyLossSpec.preset("dapo", clip_high=0.3, dual_clip=3.0, kl_coef=0.1)
    assert make_config({"preset": "ipo"}, {"log_ratio_coef": "0"}).loss_spec() == PolicyLossSpec("ipo")
    assert TrainConfig(preset="sapo", tau_negative=2.0).loss_spec() == PolicyLossSpec("sapo", tau_negative=2.0)


def test_every_number_of_a_loss_is_a_setting():
    """But the softcap of a head, which is the model's."""
    fields = {field.name for field in dataclasses.fields(PolicyLossSpec)}
    assert fields - set(LOSS_SETTINGS) == {"logit_softcap"}


def test_without_anything_the_loss_is_the_plain_one():
    config = TrainConfig()
    assert config.loss_type == "reinforce"
    assert config.loss_spec() == PolicyLossSpec()
    assert make_config({"loss_type": "cispo"}).loss_spec() == PolicyLossSpec("cispo")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"preset": "dpo"}, r"^preset must be one of grpo, .*got 'dpo'"),
        ({"preset": "dapo", "loss_type": "sapo"}, r"^loss_type must be ppo with preset dapo, or left out, got 'sapo'$"),
        ({"loss_type": "sapo", "clip_high": 0.3}, r"^clip_high must be left out: loss_type sapo does not .*got 0.3$"),
        (
            {"importance_mode": "mask"},
            r'^importance_mode "mask" needs importance_floor or importance_cap, got \'mask\'$',
        ),
        ({"importance_mode": "drop", "importance_cap": 2.0}, "^importance_mode must be one of truncate, mask, got"),
        (
            {"importance_cap": 1.0, "importance_floor": 2.0},
            "^importance_floor must be at most importance_cap, 1.0, got",
        ),
        ({"kl_cap": 10.0}, "^kl_cap bounds a KL term and needs kl_coef > 0, got 10.0$"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(given, words):
    with pytest.raises(ValueError, match=words):
        make_config(given)


def of_an_old_run(tmp_path, **loss):
    """What a run wrote before a loss had numbers of its own: every number, whether its loss used it or not."""
    new = "preset eta nll_coef kl_cap importance_floor z_coef " + " ".join(UNUSED)
    write_yaml(tmp_path / "config.yaml", TrainConfig())
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    given = {"clip_low": 0.2, "clip_high": 0.2, **loss}
    gone = [
        *new.split(),
        "log_ratio_coef",
        "ratio_reduction",
        "opsm_delta",
        "importance_mode",
        "max_log_ratio",
        "nan_rollout",
        *given,
    ]
    lines = [line for line in lines if line.split(":")[0] not in gone] + [f"{k}: {v}" for k, v in given.items()]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(
    ("loss", "spec"),
    [
        ({"loss_type": "reinforce", "clip_high": 0.28}, PolicyLossSpec()),
        ({"loss_type": "ppo", "clip_high": 0.28}, PolicyLossSpec("ppo", clip_high=0.28)),
        ({"loss_type": "cispo"}, PolicyLossSpec("cispo", clip_low=1.0, clip_high=0.2)),
    ],
)
def test_an_old_run_goes_on_with_the_loss_it_had(loss, spec, tmp_path):
    settings = read_yaml(str(of_an_old_run(tmp_path, **loss)))
    config = make_config(settings)
    assert config.loss_spec() == spec
    stored = {name: value for name, value in vars(TrainConfig()).items() if name in settings} | loss
    stored |= {"clip_low": 0.2, "clip_high": loss.get("clip_high", 0.2)}  # as its checkpoint has them
    changes.require_changeable(stored, config)
    assert changes.differences(stored, config) == {}


def test_what_a_person_writes_is_taken_as_it_is(tmp_path):
    (tmp_path / "c.yaml").write_text("loss_type: cispo\nclip_low: 0.2\n")
    assert make_config(read_yaml(str(tmp_path / "c.yaml"))).loss_spec().clip_low == 0.2
    assert as_now({"loss_type": "cispo", "clip_low": 0.2}) == {"loss_type": "cispo", "clip_low": 0.2}
