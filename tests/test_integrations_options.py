"""What becomes of hosts' options: the check, verl's tables without verl, and the tables in docs/integrations.md."""

import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from host_case import found_is, put
from pydantic import BaseModel

from ppg_fast.integrations.options import RUN, check, check_unknown, hosts_own, obeyed, refused
from ppg_fast.integrations.turns import Credit

ROOT, OURS = Path(__file__).parents[1], "ppg_fast.integrations"


def by_path(file):
    """A module whose package cannot be imported where its host is missing."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, ROOT / "ppg_fast/integrations" / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the check -------------------------------------------------------------------------------------------------------
TABLE = (
    obeyed("loss", "clip", "clip_low"),
    refused("loss", "kl.coef", (None, 0.0), "use beta"),
    refused("advantages", "gamma", 1.0, "set ppg_gamma"),
    hosts_own("loss", "deep.known", "whatever"),
)


class Pydantic(BaseModel, extra="allow"):
    clip: float = 0.2
    later: float = 0.5


@dataclass
class Nested:
    known: int = 1
    later: int = 2


@dataclass
class Config:
    clip: float = 0.2
    later: list = field(default_factory=lambda: [1])
    deep: Nested = field(default_factory=Nested)
    _target_: str = "anything"


def test_values_are_refused_where_no_host_hands_them_over():
    """One line that says where they are to be had, and not that there is no such baseline."""
    with pytest.raises(ValueError, match=r"^a host hands over no values .* for `ppg-fast train`.*got 'value'$"):
        Credit(baseline="value")
    with pytest.raises(ValueError, match=r"^baseline must be one of none, leave_one_out, group_mean, group_std, got"):
        Credit(baseline="rloo")


def test_a_refused_option_is_named_with_value_and_remedy():
    for config in ({"kl": {"coef": 0.5}}, SimpleNamespace(kl=SimpleNamespace(coef=0.5))):
        with pytest.raises(ValueError, match=r"^kl.coef of host must be None or 0.0 \(use beta\), got 0.5$"):
            check("host", TABLE, config, "loss")
        check("host", TABLE, config, "advantages")
    for config in ({}, {"kl": None}, {"kl": {"coef": None}}, {"kl": {"coef": 0}}, {"gamma": 0.5}):
        check("host", TABLE, config, "loss")


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        ({"clip": 3, "later": 0.5}, "later", 0.5),
        (SimpleNamespace(later="x"), "later", "'x'"),
        (Config(later=[1, 2]), "later", [1, 2]),
        (Config(deep=Nested(later=3)), "deep.later", 3),
        (Pydantic(later=0.25), "later", 0.25),
        (Pydantic(extra=True), "extra", True),
    ],
)
def test_an_unknown_option_is_refused_where_it_is_not_the_default(config, name, value):
    with pytest.raises(ValueError, match=f"^{re.escape(name)} is an option of host .* got {re.escape(str(value))}$"):
        check_unknown("host", TABLE, config)


def test_unknown_options_at_their_defaults_are_accepted():
    off = {"a": None, "b": False, "c": 0, "d": "", "e": [], "_private": 3}
    for config in (off, SimpleNamespace(**off), Config(clip=0.5, deep=Nested(known=7)), Pydantic(clip=1.0, extra=None)):
        check_unknown("host", TABLE, config)
    check_unknown("host", TABLE, {"later": 0.5}, names=lambda name: name.startswith("ppg_"))
    check_unknown("host", TABLE, {"later": 0.5}, defaults=Pydantic)


# ---- verl, without verl ----------------------------------------------------------------------------------------------
VERL = by_path("verl/options.py")
ALGORITHM = {  # of verl 0.9.1
    "gamma": 1.0, "lam": 1.0, "adv_estimator": "gae", "norm_adv_by_std_in_grpo": True, "use_kl_in_reward": False,
    "kl_penalty": "kl", "kl_ctrl": {"type": "fixed", "kl_coef": 0.001}, "use_pf_ppo": False,
    "pf_ppo": {"reweight_method": "pow"}, "filter_groups": None, "rollout_correction": None,
    "gdpo_reward_keys": None, "gdpo_reward_weights": None,
}  # fmt: skip
POLICY_LOSS = {
    "loss_mode": "ppg", "clip_cov_ratio": 0.0002, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0, "kl_cov_ratio": 0.0002,
    "ppo_kl_coef": 0.1, "dro_beta": None,
}  # fmt: skip
ACTOR = {
    "clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0, "loss_agg_mode": "token-sum",
    "loss_scale_factor": None, "entropy_coeff": 0, "tau_pos": 1.0, "tau_neg": 1.05, "use_kl_loss": False,
    "ppo_epochs": 1, "later": 0,
}  # fmt: skip


def dataclass_of(name, defaults):
    """A dataclass with these defaults, as verl's own, which are also mappings."""
    kinds = [(key, type(value), field(default_factory=lambda value=value: value)) for key, value in defaults.items()]
    return make_dataclass(name, kinds)


PolicyLossConfig = dataclass_of("PolicyLossConfig", POLICY_LOSS)
ActorConfig = dataclass_of("ActorConfig", {**ACTOR, "policy_loss": PolicyLossConfig()})
AlgoConfig = dataclass_of("AlgoConfig", ALGORITHM)
REFUSED_ALGORITHM = {
    "gamma": 0.9, "lam": 0.95, "norm_adv_by_std_in_grpo": False, "use_pf_ppo": True, "gdpo_reward_keys": ["format"],
    "gdpo_reward_weights": [1.0], "rollout_correction.rollout_rs": "seq_mean_k1, token_k1",
}  # fmt: skip
REFUSED_ACTOR = {
    "policy_loss.clip_cov_ratio": 0.1, "policy_loss.kl_cov_ratio": 0.1, "policy_loss.clip_cov_lb": 0.0,
    "policy_loss.clip_cov_ub": 1.0, "policy_loss.ppo_kl_coef": 1.0, "policy_loss.dro_beta": 0.5,
}  # fmt: skip


def nested(path, value, defaults):
    name, _, rest = path.partition(".")
    return {**defaults, name: {rest: value} if rest else value}


@pytest.mark.parametrize("name", REFUSED_ALGORITHM)
@pytest.mark.parametrize("kind", [dict, AlgoConfig], ids=["mapping", "dataclass"])
def test_verls_algorithm_is_checked(name, kind):
    value = REFUSED_ALGORITHM[name]
    config = kind(**nested(name, value, {**ALGORITHM, "adv_estimator": "ppg_full"}))
    with pytest.raises(ValueError, match=rf"^{name} of verl's algorithm must .*got {re.escape(repr(value))}$"):
        VERL.check_algorithm(config, AlgoConfig)


@pytest.mark.parametrize("name", REFUSED_ACTOR)
def test_verls_actor_is_checked(name):
    first, _, rest = name.partition(".")
    value = REFUSED_ACTOR[name]
    config = ActorConfig(**{first: PolicyLossConfig(**{rest: value}) if rest else value})
    with pytest.raises(ValueError, match=rf"^{name} of verl's actor must be .*got {re.escape(repr(value))}$"):
        VERL.check_actor(config)


def test_verls_options_that_we_honour_pass():
    correction = {"rollout_is": "token", "rollout_rs": "seq_mean_k1", "bypass_mode": False}
    given = {"ppg": {"gamma": 0.9}, "rollout_correction": correction, "use_kl_in_reward": True}
    for config in (ALGORITHM, {**ALGORITHM, **given}, {**ALGORITHM, "rollout_correction": {"rollout_rs": None}}):
        VERL.check_algorithm(config, AlgoConfig)
    VERL.check_actor(ActorConfig(clip_ratio_low=0.1, entropy_coeff=0.1, use_kl_loss=True, loss_scale_factor=5))
    VERL.check_actor(ActorConfig(tau_pos=2.0))


def test_verls_functions_walk_the_tables(monkeypatch, request):
    """The estimator and the loss that are registered, under stand-ins of the modules that they import."""
    if importlib.util.find_spec("verl"):
        pytest.skip("verl itself is here: tests/test_integrations_verl*.py")
    registered = {}

    def register(name):
        return lambda function: registered.setdefault(name, function)

    class FusedLinearForPPO:
        pass

    def agg_loss(loss_mat, loss_mask, **_):
        return (loss_mat * loss_mask).sum()

    core = {"register_adv_est": register, "register_policy_loss": register, "agg_loss": agg_loss}
    put(monkeypatch, "verl.trainer.ppo.core_algos", **core)
    put(monkeypatch, "verl.trainer.config", AlgoConfig=AlgoConfig)
    put(monkeypatch, "verl.models.transformers", monkey_patch=SimpleNamespace(patch_forward_with_backends=print))
    functions = SimpleNamespace(FusedLinearForPPO=FusedLinearForPPO)
    put(monkeypatch, "verl.utils.experimental", torch_functional=functions)
    found_is(monkeypatch, "0.9.1")
    request.addfinalizer(lambda: [sys.modules.pop(n) for n in [*sys.modules] if n.startswith(f"{OURS}.verl")])
    importlib.import_module(f"{OURS}.verl")
    row = torch.ones(1, 2)
    advantages, _ = registered["ppg_full"](row, row, {**ALGORITHM, "ppg": {"baseline": "none"}})
    assert advantages.tolist() == [[2.0, 2.0]]
    with pytest.raises(ValueError, match=r"^gamma of verl's algorithm must be 1.0 .*, got 0.9$"):
        registered["ppg_full"](row, row, {**ALGORITHM, "gamma": 0.9})
    actor = ActorConfig()
    actor.get, actor.global_batch_info = lambda name, default: getattr(actor, name, default), {}
    loss, _ = registered["ppg"](row, row, advantages, row, "token-sum", actor)
    assert loss == -4.0
    actor.policy_loss = PolicyLossConfig(dro_beta=2.0)
    with pytest.raises(ValueError, match=r"^policy_loss.dro_beta of verl's actor must be None .*, got 2.0$"):
        registered["ppg"](row, row, advantages, row, "token-sum", actor)


def test_verls_options_that_nobody_knows():
    with pytest.raises(ValueError, match=r"^later is an option of verl's actor .* its default 0, got 3$"):
        VERL.check_actor(ActorConfig(later=3))
    with pytest.raises(
        ValueError, match=r"^turn_weights is an option of verl's algorithm .*, or be off, got 'linear'$"
    ):
        VERL.check_algorithm({**ALGORITHM, "turn_weights": "linear"}, AlgoConfig)
    with pytest.raises(ValueError, match=r"^policy_loss.later is an option of verl's actor"):
        VERL.check_actor(ActorConfig(policy_loss=dataclass_of("Later", {**POLICY_LOSS, "later": 0})(later=1)))


def test_every_row_of_verl_that_refuses_has_a_case():
    for table, cases in ((VERL.ALGORITHM, REFUSED_ALGORITHM), (VERL.ACTOR, REFUSED_ACTOR)):
        assert {name for option in table if option.allows for name in option.names.split()} == set(cases)


# ---- the page --------------------------------------------------------------------------------------------------------
def as_markdown(table, shown=9):
    """The table of docs/integrations.md; of options without effect on the loss the first ``shown`` names and the number
    of the others."""
    lines = ["| options | for | what becomes of them |", "|---|---|---|"]
    for option in table:
        names = option.names.split()
        cut = shown if option.part == RUN else len(names)
        more = f" and {len(names) - cut} more" if len(names) > cut else ""
        fate = option.fate if option.fate != "refused" else f"refused unless {option.must}"
        fate += f", must be {option.must}" if option.must and option.fate != "refused" else ""
        listed = ", ".join(f"`{name}`" for name in names[:cut])
        lines.append(f"| {listed}{more} | {option.part} | {fate}: {option.note} |")
    return "\n".join(lines) + "\n"


def table_of(host, monkeypatch):
    if host.startswith("verl"):
        return getattr(VERL, host.split(".")[1])
    if host in ("trl.config", "axolotl"):
        pytest.importorskip("trl", reason="trl is not installed")
    if host == "axolotl":
        importlib.import_module("axolotl_case").stub_axolotl(monkeypatch, None)
    return importlib.import_module(f"ppg_fast.integrations.{host}").OPTIONS


@pytest.mark.parametrize(
    "host",
    [
        "transformers.options", "trl.config", "axolotl", "verl.ALGORITHM", "verl.ACTOR", "prime_rl", "skyrl",
        "slime_options", "nemo_rl",
    ],
)  # fmt: skip
def test_the_page_shows_the_table(host, monkeypatch):
    shown = as_markdown(table_of(host, monkeypatch))
    page = (ROOT / "docs/integrations.md").read_text()
    assert shown in page, f"put this table of {host} into docs/integrations.md:\n{shown}"


def test_a_long_row_without_effect_is_cut():
    rows = [hosts_own(RUN, "a b c", "x"), hosts_own("loss", "d e f", "y")]
    assert as_markdown(rows, shown=2).splitlines()[-2:] == [
        "| `a`, `b` and 1 more | the run | the host's: x |",
        "| `d`, `e`, `f` | loss | the host's: y |",
    ]
