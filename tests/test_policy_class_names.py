"""One name a policy class: what `str` gives, `ppg.policy_class` reads, and the defaults of commands are made of."""

import re

import pytest
import torch

import ppg_fast as ppg
from ppg_fast.config import TrainConfig
from ppg_fast.policy_classes import policy_classes

NAMES = {
    "greedy": ppg.Greedy(),
    "lookahead:1": ppg.Lookahead(1),
    "lookahead:3": ppg.Lookahead(3),
    "lookahead:4294967296": ppg.Lookahead(2**32),  # more than the kernels count
    "segment:4": ppg.Segment(4),
    "full": ppg.FullPlanning(),
    "lags:1,0.5,0.25": ppg.LagWeights((1, 0.5, 0.25)),
    "lags:0,0.1,1e-07": ppg.LagWeights(torch.tensor([0, 0.1, 1e-7], dtype=torch.float64)),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_class_prints_as_the_name_that_reads_it(name):
    assert str(NAMES[name]) == f"{NAMES[name]}" == name
    assert ppg.policy_class(name) == NAMES[name]
    assert ppg.policy_class(f" {name.upper()} ") == NAMES[name]


@pytest.mark.parametrize(
    ("chosen", "name"),
    [(ppg.Segment(torch.zeros(2, 3).long()), "segment:ids"), (ppg.RewardMask(torch.ones(3, 3).bool()), "mask")],
)
def test_a_class_made_of_a_tensor_has_a_short_text_that_is_no_name(chosen, name):
    assert str(chosen) == name
    names = 'a policy class is "greedy", "full", "lookahead:K", "segment:LENGTH" or "lags:W0,W1,...", got'
    with pytest.raises(ValueError, match=re.escape(names)):
        ppg.policy_class(name)


def test_a_list_of_names_holds_each_class_once():
    assert policy_classes("full, greedy,Full , lookahead:02") == (ppg.FullPlanning(), ppg.Greedy(), ppg.Lookahead(2))
    both = ppg.LagWeights([1, 0.5]), ppg.Greedy(), ppg.LagWeights([0.25])
    assert policy_classes("lags:1, .5,greedy , lags:0.25") == both
    with pytest.raises(ValueError, match="got ''"):
        policy_classes("greedy,")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], r"LagWeights needs one weight a lag, got \[\]"),
        ("1", "LagWeights needs one weight a lag, got '1'"),
        ([1, -0.5], "a weight of LagWeights must be a finite number >= 0.*got -0.5"),
        ([float("nan")], "a weight of LagWeights must be a finite number >= 0.*got nan"),
        ([0, 0], "one weight of LagWeights must be above 0, got"),
    ],
)
def test_weights_that_are_none_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        ppg.LagWeights(weights)


def test_weights_in_a_name_that_are_none_are_named():
    for name, wrong in (("lags:1,x", "'x' in 'lags:1,x'"), ("lags:", "'' in 'lags:'"), ("lags", "'' in 'lags'")):
        with pytest.raises(ValueError, match=f"the weights of lags must be numbers with commas, got {wrong}"):
            ppg.policy_class(name)


def test_a_run_reads_its_classes_by_the_same_names():
    config = TrainConfig(policy_class="auto")
    assert config.chosen_class() == ppg.FullPlanning()
    assert config.measures
    mixed = TrainConfig(policy_class=" Segment:4", signals=True)
    assert mixed.policy_class == "segment:4"
    assert mixed.chosen_class() == ppg.Segment(4)
    assert mixed.measures
    assert not TrainConfig().measures
