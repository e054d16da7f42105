"""One name a policy class: what `str` gives, `ppg.policy_class` reads, and the defaults of commands are made of."""

import pytest
import torch

import ppg_fast as ppg
from ppg_fast.config import TrainConfig
from ppg_fast.policy_classes import CANDIDATES, policy_classes

NAMES = {
    "greedy": ppg.Greedy(),
    "lookahead:1": ppg.Lookahead(1),
    "lookahead:3": ppg.Lookahead(3),
    "lookahead:4294967296": ppg.Lookahead(2**32),  # more than the kernels count
    "segment:4": ppg.Segment(4),
    "full": ppg.FullPlanning(),
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
    with pytest.raises(ValueError, match='a policy class is "greedy", "full", "lookahead:K" or "segment:LENGTH"'):
        ppg.policy_class(name)


def test_a_list_of_names_holds_each_class_once():
    assert policy_classes("full, greedy,Full , lookahead:02") == (ppg.FullPlanning(), ppg.Greedy(), ppg.Lookahead(2))
    with pytest.raises(ValueError, match="got ''"):
        policy_classes("greedy,")


def test_a_run_reads_its_classes_by_the_same_names():
    config = TrainConfig(policy_class="auto")
    assert config.chosen_class() == ppg.FullPlanning()
    assert config.candidate_classes() == CANDIDATES
    mixed = TrainConfig(policy_class=" Segment:4", signals=True, candidates="Greedy, FULL")
    assert mixed.policy_class == "segment:4"
    assert mixed.chosen_class() == ppg.Segment(4)
    assert mixed.candidate_classes() == (ppg.Greedy(), ppg.FullPlanning())
    assert TrainConfig().candidate_classes() == ()
