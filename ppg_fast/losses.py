"""The policy losses by name: which numbers each one uses, what it says of a token, and where it comes from."""

from enum import IntEnum
from typing import Any, NamedTuple


class LossType(IntEnum):
    """Per-token surrogate. The numbers are the wire format shared with Triton and C++; formulas: LOSSES."""

    REINFORCE = 0
    PPO = 1
    CISPO = 2
    GSPO = 3
    GSPO_TURN = 4
    IPO = 5
    ICEPOP = 6
    DPPO_TV = 7
    DPPO_KL = 8
    SAPO = 9
    TOPR = 10
    GMPO = 11
    GMPO_TURN = 12
    VESPO = 13


class KLEstimator(IntEnum):
    """Estimator of KL(policy, reference) from one token, d = ref - l, r = exp(l - old).

    Source: joschu.net/blog/kl-approx.html
    """

    K1 = 1  # -d
    K2 = 2  # d^2 / 2
    K3 = 3  # exp(d) - d - 1 with d = min(ref - l, max_log_ratio)
    K3_UNBIASED = 4  # r k3, derivative r (l - ref)      arXiv:2512.02556
    K3_PLUS = 5  # the value of k3, the derivative of k2, l - ref; verl
    ABS = 6  # |d|


class Loss(NamedTuple):
    """A row of the table of losses."""

    uses: dict[str, float]  # the numbers of a spec that are its own, with its defaults
    value: str  # of a token
    weight: str  # w: the derivative of the value in l is -A w
    corrects: str  # what it is for
    users: str  # whose loss it is, or where it can be chosen
    source: str


# r = exp(l - old), p = exp(l), b the rollout log-prob where the caller has one, else old; sg: no gradient
_CLIP = {"clip_low": 0.2, "clip_high": 0.2}
_PPO = Loss(
    {**_CLIP, "dual_clip": 0.0},
    "-min(r A, clip(r, 1 - low, 1 + high) A), where A < 0 at most -dual_clip A",
    "r, 0 where the clip is smaller",
    "a policy that has moved since it acted",
    "TRL, verl, OpenRLHF, SkyRL, NeMo-RL, AReaL, slime",
    "arXiv:1707.06347; clip-higher arXiv:2503.14476; dual clip arXiv:1912.09729",
)
_GMPO = Loss(
    {"clip_low": 0.4, "clip_high": 0.4},
    "-r A with r = exp(mean over the sequence of x), x = l - old: min(x, high) where A > 0, max(x, -low) where A < 0",
    "r, 0 where x is clipped",
    "outliers of single tokens in the ratio of a sequence",
    "verl (geo_mean)",
    "arXiv:2507.20673",
)
LOSSES: dict[LossType, Loss] = {
    LossType.REINFORCE: Loss({}, "-A l", "1", "nothing: the data are the policy's own", "all", "Williams (1992)"),
    LossType.PPO: _PPO,
    LossType.CISPO: Loss(
        {"clip_low": 1.0, "clip_high": 0.2},
        "-sg[clip(r, 1 - low, 1 + high)] A l",
        "clip(r, 1 - low, 1 + high)",
        "clipped tokens keep a gradient",
        "MiniMax-M1, TRL, verl, slime, SkyRL, NeMo-RL",
        "arXiv:2506.13585 (upper bound)",
    ),
    LossType.GSPO: _PPO._replace(
        value="as ppo with r = exp(mean of l - old over the sequence)",
        corrects="noise of ratios of single tokens",
        users="Qwen3, TRL, verl, slime",
        source="arXiv:2507.18071",
    ),
    LossType.GSPO_TURN: _PPO._replace(
        value="as ppo with r = exp(mean of l - old over the turn)",
        corrects="noise of ratios of single tokens, in dialogues",
        users="AgileRL",
        source="arXiv:2512.17008, by the sum (ratio_reduction)",
    ),
    LossType.GMPO: _GMPO,
    LossType.GMPO_TURN: _GMPO._replace(value="as gmpo, over the turn", users="none", source="as gmpo"),
    LossType.VESPO: Loss(
        {"k_positive": 2.0, "lambda_positive": 3.0, "k_negative": 3.0, "lambda_negative": 2.0},
        "-sg[phi] A l, phi = exp(lambda (1 - w) + k log w), w = exp(sum over the sequence of (l - old)) times the "
        "product of its importance weights; k and lambda by the sign of A",
        "phi",
        "stale sequences: the weight is 1 at w = 1 and fades on both sides",
        "TRL",
        "arXiv:2602.10693; TRL 1.16, get_gamma_weights",
    ),
    LossType.IPO: Loss(
        {"clip_low": 0.1, "clip_high": 0.1},
        "-r A where -low <= p - exp(b) <= high, else 0",
        "r, 0 outside",
        "rare tokens, whose ratio is large and whose probability hardly moved",
        "prime-rl",
        "prime-rl, pull requests 2798 and 3418",
    ),
    LossType.ICEPOP: Loss(
        {"clip_low": 0.5, "clip_high": 4.0},
        "-r A where 1 - low <= exp(l - b) <= 1 + high, else 0",
        "r, 0 outside",
        "a sampler that is not the trainer's policy",
        "Ring-1T, prime-rl",
        "arXiv:2510.18855; on the current ratio: prime-rl, pull request 3526",
    ),
    LossType.DPPO_TV: Loss(
        {**_CLIP, "ratio_cap": 0.0},
        "-sg[min(r, ratio_cap)] A l; 0 where A > 0 and p - exp(old) > high, or A <= 0 and p - exp(old) < -low",
        "min(r, ratio_cap), 0 outside",
        "rare tokens, as ipo, and only steps that lead further away are stopped",
        "verl, SkyRL, prime-rl",
        "arXiv:2602.04879",
    ),
    LossType.DPPO_KL: Loss(
        {**_CLIP, "ratio_cap": 0.0},
        "as dppo_tv, stopped where p has moved that way and KL(Bernoulli(exp(old)), Bernoulli(p)) > high or low",
        "min(r, ratio_cap), 0 outside",
        "as dppo_tv",
        "verl, SkyRL",
        "arXiv:2602.04879",
    ),
    LossType.SAPO: Loss(
        {"tau_positive": 1.0, "tau_negative": 1.05},
        "-4 s A / tau with s = sigmoid(tau (r - 1)), tau by the sign of A",
        "4 s (1 - s) r",
        "the edge of the clip: the weight fades instead",
        "Qwen3-VL, TRL, verl, SkyRL, AReaL",
        "arXiv:2511.20347",
    ),
    LossType.TOPR: Loss(
        {"clip_low": 1.0, "clip_high": 0.0},
        "-A l where A > 0, else -sg[clip(r, 1 - low, 1 + high)] A l",
        "1, or clip(r, 1 - low, 1 + high) where A <= 0",
        "negative examples of an old policy, which must not dominate",
        "OpenRLHF",
        "arXiv:2503.14286",
    ),
}
LOSS_TYPES = tuple(t.name.lower() for t in LossType)
KL_ESTIMATORS = tuple(k.name.lower() for k in KLEstimator)
LOSS_NUMBERS = {t.name.lower(): int(t) for t in LossType}
KL_NUMBERS = {k.name.lower(): int(k) for k in KLEstimator}
# their ratio needs other rows, so they take two sweeps: whose tokens share it
SHARED = {"gspo": "sequence", "gspo_turn": "turn", "gmpo": "sequence", "gmpo_turn": "turn", "vespo": "sequence"}
SEQUENCE_LEVEL = tuple(SHARED)
CLIPPED_BEFORE = ("gmpo", "gmpo_turn")  # each token's log ratio is clipped, and then their mean is taken
GATED = ("ipo", "icepop", "dppo_tv", "dppo_kl")  # their weight is 0 outside of their bounds
WITH_ROLLOUT = ("ipo", "icepop")  # they compare the policy with the sampler's log-probs where there are any


def numbers_of(loss_type: str) -> dict[str, float]:
    """The numbers of a spec that a loss of this type uses, with its defaults."""
    return LOSSES[LossType(LOSS_NUMBERS[loss_type])].uses


class Preset(NamedTuple):
    """The numbers that a trainer's users mean by a name."""

    numbers: dict[str, Any]  # arguments of a spec
    reduction: str  # that goes with it, and its normalizer
    source: str


_TRL = "TRL 1.16, GRPOConfig"
PRESETS: dict[str, Preset] = {
    "grpo": Preset({"loss_type": "ppo"}, "sequence_mean", f"arXiv:2402.03300; {_TRL}"),
    "dapo": Preset({"loss_type": "ppo", "clip_high": 0.28}, "token_mean", "arXiv:2503.14476"),
    "dr_grpo": Preset(
        {"loss_type": "ppo"}, "sum, normalizer: sequences times the longest answer allowed", "arXiv:2503.20783"
    ),
    "gspo": Preset(
        {"loss_type": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}, "sequence_mean", "arXiv:2507.18071, section 5.1"
    ),
    "cispo": Preset({"loss_type": "cispo", "clip_high": 4.0}, "token_mean", "arXiv:2510.13786; TRL's epsilon_high 5"),
    "gmpo": Preset({"loss_type": "gmpo"}, "sequence_mean", "arXiv:2507.20673: exp(-0.4) to exp(0.4)"),
    "vespo": Preset({"loss_type": "vespo"}, "token_mean", "TRL 1.16, GRPOConfig"),
    "ipo": Preset({"loss_type": "ipo", "log_ratio_coef": 1e-3}, "token_mean", "prime-rl, IPOLossConfig"),
    "icepop": Preset({"loss_type": "icepop"}, "token_mean", "arXiv:2510.18855: 0.5 to 5"),
    "dppo_tv": Preset({"loss_type": "dppo_tv", "ratio_cap": 20.0}, "token_mean", "arXiv:2602.04879; verl 0.9"),
    "dppo_kl": Preset(
        {"loss_type": "dppo_kl", "clip_low": 0.05, "clip_high": 0.05, "ratio_cap": 20.0},
        "token_mean",
        "arXiv:2602.04879; verl 0.9",
    ),
    "sapo": Preset({"loss_type": "sapo"}, "sequence_mean", "arXiv:2511.20347; TRL, verl"),
    "topr": Preset({"loss_type": "topr"}, "sequence_mean", "arXiv:2503.14286"),
}
