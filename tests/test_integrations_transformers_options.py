"""What becomes of the options of transformers' Trainer and TRL's configuration: every field of the installed classes
has a row, and what would swallow the policy loss is refused by name."""

import importlib
from dataclasses import fields
from types import MethodType

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from accelerate.utils import convert_outputs_to_fp32
from transformers_case import V, single_thread, tiny

from ppg_fast.integrations.transformers import PackedCollator, patch
from ppg_fast.integrations.transformers.options import OPTIONS

one_thread = pytest.fixture(autouse=True, scope="module")(single_thread)


def names(table):
    return {name for option in table for name in option.names.split()}


def test_every_training_argument_has_a_row():
    """Red for an option of a later transformers: read what it does to the loss, and give it a row."""
    assert {field.name for field in fields(transformers.TrainingArguments)} - names(OPTIONS) == set()


@pytest.mark.parametrize("config", ["GRPOConfig", "PPGConfig"])
def test_every_option_of_trl_has_a_row(config):
    pytest.importorskip("trl", reason="trl is not installed")
    ours = importlib.import_module("ppg_fast.integrations.trl.config")
    options = {field.name for field in fields(getattr(ours, config))}
    added = {field.name for field in fields(ours.PPGOptions)} if config == "PPGConfig" else set()
    assert options - names(OPTIONS) - names(ours.OPTIONS) - added == set()


def test_trls_rloo_has_no_place_here():
    """Its loss and advantages are another trainer's: baseline="leave_one_out" is what it is for."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    ours = importlib.import_module("ppg_fast.integrations.trl.config")
    with pytest.raises(TypeError, match="args of PPGTrainer must be a PPGConfig, got RLOOConfig"):
        ours.check_options(trl.RLOOConfig("nowhere", use_cpu=True, bf16=False, report_to=[]))


def test_trl_refuses_label_smoothing(tmp_path):
    pytest.importorskip("trl", reason="trl is not installed")
    ours = importlib.import_module("ppg_fast.integrations.trl.config")
    with pytest.raises(ValueError, match=r"label_smoothing_factor of TRL must be 0.0 \(GRPOTrainer does not read it\)"):
        ours.PPGConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], label_smoothing_factor=0.1)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return {"input_ids": torch.arange(2, 9), "labels": torch.arange(2, 9), "advantages": torch.ones(7)}


def train(folder, model, rows, **options):
    settings = transformers.TrainingArguments(
        str(folder), max_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        **{key: value for key, value in options.items() if key != "data_collator"},
    )  # fmt: skip
    collator = {"data_collator": options["data_collator"]} if "data_collator" in options else {}
    transformers.Trainer(model=model, args=settings, train_dataset=rows, **collator).train()


def test_label_smoothing_is_refused_by_name(tmp_path):
    dialogues = [{"input_ids": [5, 7, 8, 9], "turn_ids": [-1, -1, 0, 0], "rewards": [0.5], "group_id": 0}] * 2
    with patch(tiny(), policy_class="full", baseline="none") as patched:
        with pytest.raises(ValueError, match=r"needs labels or shift_labels .*label_smoothing_factor"):
            train(tmp_path, patched.model, Rows(), label_smoothing_factor=0.1)
        with pytest.raises(ValueError, match=r"makes no logits \(label_smoothing_factor must be 0\)"):
            train(tmp_path, patched.model, dialogues, label_smoothing_factor=0.1, data_collator=PackedCollator())


def test_a_forward_put_in_place_of_the_patched_one_does_not_swallow_the_loss():
    """As Liger's do, which take any keyword."""
    model = tiny()
    call = {"input_ids": torch.randint(2, V, (1, 5)), "labels": torch.randint(2, V, (1, 5))}

    def lce_forward(self, input_ids=None, labels=None, **kwargs):
        return type(self).forward(self, input_ids=input_ids, labels=labels)

    with patch(model):
        ours, model.forward = model.forward, MethodType(lce_forward, model)
        with pytest.raises(ValueError, match=r"was replaced \(use_liger_kernel .*got \['advantages'\]"):
            model(**call, advantages=torch.ones(1, 5))
        assert model(**call).loss.isfinite()
        model.forward = ours
        assert model(**call, advantages=torch.ones(1, 5)).loss.isfinite()
    patched = patch(model)
    ours = model.forward
    model.forward = MethodType(convert_outputs_to_fp32(ours.__func__), model)  # as accelerate prepares it
    assert model(**call, advantages=torch.ones(1, 5)).loss.isfinite()
    model.forward = ours
    patched.undo()
