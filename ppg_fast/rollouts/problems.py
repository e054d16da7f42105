"""Five small problems, each with the window of rewards that it needs known by construction, and each as a dialogue in
words.

A turn is a question with two answers that count: the honest one, and the tempting one that pleases at once. Who is paid
what, and when, is a table: `honest_pays[t][k]` is what an honest answer of turn t adds to the reward of turn k >= t,
`tempting_pays[t]` what a tempting one adds to its own, and the finale pays the square of the honest share at the last
turn. To that comes noise that no answer causes, Gaussian, of mean zero, drawn anew in every dialogue, so no mean of a
group removes it. The policy class of a problem is the smallest window that holds every reward which a turn causes: its
gradient is that of the true value, and every longer one only adds noise.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ppg_fast.dialogues.message import Message
from ppg_fast.spec import require, require_one_of

Table = tuple[tuple[float, ...], ...]
DRAWN = "drawn:"  # and a seed: the name of a problem that nobody chose
REVIEW = "review:"  # and a name: one of those that a reviewer made


@dataclass(frozen=True)
class Problem:
    """Who is paid what and when, over ``turns`` turns; noise = ``noise`` times independent standard normals, (T,
    any)."""

    name: str
    policy_class: str  # the smallest window that holds everything a turn causes
    why: str
    turns: int
    honest_pays: Table  # (T, T), row = who answers, column = the turn whose reward it is
    tempting_pays: tuple[float, ...]  # (T,)
    noise: Table  # (T, sources)
    finale: float = 0.0

    def rewards(self, honest: Sequence[float], tempting: Sequence[float]) -> list[float]:
        """Rewards of the turns answered so far, without noise; 0/1 (or probabilities) of the answers given so far."""
        turns = range(len(honest))
        paid = [
            tempting[k] * self.tempting_pays[k] + sum(honest[t] * self.honest_pays[t][k] for t in range(k + 1))
            for k in turns
        ]
        if len(honest) == self.turns:
            paid[-1] += self.finale * (sum(honest) / self.turns) ** 2
        return paid

    def with_noise(self, scale: float) -> "Problem":
        """The same with its noise times ``scale``."""
        return replace(self, noise=tuple(tuple(scale * value for value in row) for row in self.noise))

    @cached_property
    def best_return(self) -> float:
        """What honesty earns in every turn; it is the most there is."""
        return sum(self.rewards([1.0] * self.turns, [0.0] * self.turns))


def _table(turns: int, *entries: tuple[int, int, float]) -> Table:
    cells = {(t, k): value for t, k, value in entries}
    return tuple(tuple(cells.get((t, k), 0.0) for k in range(turns)) for t in range(turns))


def _judge(turns: int, deviation: float) -> Table:
    """Noise that is independent from turn to turn: a judge who errs."""
    return _table(turns, *((t, t, deviation) for t in range(turns)))


def _mood(turns: int, deviation: float, stays: float) -> Table:
    """An autoregressive mood: correlation ``stays`` from turn to turn, the same ``deviation`` at each."""
    fresh = deviation * math.sqrt(1 - stays**2)
    return tuple(
        tuple((deviation if s == 0 else fresh) * stays ** (t - s) if s <= t else 0.0 for s in range(turns))
        for t in range(turns)
    )


def _immediate(turns: int = 12) -> Problem:
    why = "persona consistency: each answer is judged by itself, and at once; what comes later is not of its making"
    pays = _table(turns, *((t, t, 1.0) for t in range(turns)))
    return Problem("immediate", "greedy", why, turns, pays, (0.0,) * turns, _judge(turns, 2.0))


def _commitments(turns: int = 12, delay: int = 2) -> Problem:
    why = (
        f"commitments: giving in pleases at once, and {delay} turns later the user finds out; {delay + 1} rewards "
        "hold both"
    )
    pressed = turns - delay
    pays = _table(turns, *((t, t + delay if t < pressed else t, 1.0) for t in range(turns)))
    return Problem(
        "commitments", f"lookahead:{delay + 1}", why, turns, pays, (0.4,) * pressed + (0.0,) * delay, _judge(turns, 2.0)
    )


def _topics(topics: int = 3, length: int = 4) -> Problem:
    why = (
        f"topics of {length} turns: the last turn of a topic settles its first; how a new topic is liked is luck, "
        "and nobody's merit"
    )
    turns = topics * length
    openings = range(0, turns, length)
    pays = _table(turns, *((t, t + length - 1, 1.0) if t in openings else (t, t, 0.25) for t in range(turns)))
    tempting = tuple(0.4 if t in openings else 0.0 for t in range(turns))
    luck = _table(turns, *((t, t, 6.0 if t and t in openings else 0.25) for t in range(turns)))
    return Problem("topics", f"segment:{length}", why, turns, pays, tempting, luck)


def _plan(turns: int = 8) -> Problem:
    why = (
        "a goal of the whole dialogue: what honesty earns is paid at the end, the more the fewer exceptions there were"
    )
    return Problem("plan", "full", why, turns, _table(turns), (0.25,) * turns, _judge(turns, 0.25), finale=float(turns))


def _mood_problem(turns: int = 12) -> Problem:
    why = (
        "misleading noise: thanks come one turn later; a mood that lasts for many turns pays far more, whatever is said"
    )
    pays = _table(turns, *((t, min(t + 1, turns - 1), 1.0) for t in range(turns)))
    return Problem("mood", "lookahead:2", why, turns, pays, (0.4,) * (turns - 1) + (0.0,), _mood(turns, 2.5, 0.95))


PROBLEMS = {p.name: p for p in (_immediate(), _commitments(), _topics(), _plan(), _mood_problem())}


def _review(turns: int = 12) -> tuple[Problem, ...]:
    """Six that a reviewer of this study made against it: hard for windows, and for what finds weights by itself."""
    last, every = turns - 1, range(turns)
    quiet, faint, soon = _judge(turns, 1.0), _mood(turns, 1.0, 0.9), (0.6,) * (turns - 2) + (0.0,) * 2
    at_once = _table(turns, *((t, t, 1.0) for t in every))
    mixed = _table(turns, (0, last, 6.0), *((t, t, 1.0) for t in every if t))
    early = (1.0,) + (0.0,) * last
    in_six = _table(turns, *((t, min(t + 6, last), 1.0) for t in every))
    in_two = _table(turns, *((t, min(t + 2, last), 1.0) for t in every))
    in_turn = _table(turns, *((t, min(t + 5 * (t % 2), last), 1.0) for t in every))
    tempting = tuple(0.6 if t % 2 and t < last else 0.0 for t in every)
    idle = (0.0,) * turns
    return (
        _reviewed("at_once", "greedy", "paid at once, beside a lasting mood", at_once, idle, _mood(turns, 2.0, 0.95)),
        _reviewed("late", "full", "temptation now, the truth six turns later", in_six, (0.5,) * last + (0.0,), quiet),
        _reviewed("first", "full", "the first answer is worth a third, paid at the end", mixed, early, faint),
        _reviewed("first_loud", "full", "the same with three times its noise", mixed, early, _mood(turns, 3.0, 0.9)),
        _reviewed(
            "moody", "lookahead:3", "two turns later, beside a strong mood", in_two, soon, _mood(turns, 2.5, 0.95)
        ),
        _reviewed("in_turn", "lookahead:6", "paid at once and five turns later, in turn", in_turn, tempting, quiet),
    )


def _reviewed(name: str, own: str, why: str, honest: Table, tempting: tuple[float, ...], noise: Table) -> Problem:
    return Problem(f"{REVIEW}{name}", own, why, len(honest), honest, tempting, noise)


REVIEWED = {p.name: p for p in _review()}


def drawn(seed: int) -> Problem:
    """A problem that nobody chose: when answers are paid, what temptation pays and the noise are all drawn by ``seed``.

    Six in ten pay each answer within a reach of up to five turns, two at once or at the end of its topic, two mostly at
    the end of the dialogue. Settings are found, and claims tested, on these: the five above were made to make a point.
    """
    rng = random.Random(f"drawn-{seed}")
    turns, kind = rng.randint(6, 12), rng.choices(("reach", "topics", "plan"), (6, 2, 2))[0]
    reach, length = rng.choice((0, 0, 1, 2, 3, 5)), rng.randint(3, 5)
    size, finale = (0.25, turns * rng.uniform(0.3, 1.0)) if kind == "plan" else (1.0, 0.0)
    pays, tempting = [], []
    for t in range(turns):
        last = min(t - t % length + length, turns) - 1
        k = rng.choice((t, last)) if kind == "topics" else min(t + rng.randint(0, 0 if finale else reach), turns - 1)
        pays.append((t, k, size * rng.uniform(0.5, 1.5)))
        tempting.append(rng.uniform(0.0, 0.6) * pays[t][2] if k > t or finale else 0.0)
    luck = rng.uniform(1.0, 6.0) if kind == "topics" else 0.0
    openings = _table(turns, *((t, t, luck) for t in range(length, turns, length)))
    mood = _mood(turns, rng.choice((0.0, 1.0)) * rng.uniform(0.0, 3.0), rng.uniform(0.5, 0.95))
    noise = tuple(a + b + c for a, b, c in zip(_judge(turns, rng.uniform(0.25, 3.0)), mood, openings, strict=True))
    needed = max(k - t for t, k, _ in pays) + 1
    own = (
        "full"
        if finale
        else "greedy"
        if needed == 1
        else f"segment:{length}"
        if kind == "topics"
        else f"lookahead:{needed}"
    )
    return Problem(f"{DRAWN}{seed}", own, f"drawn: {kind}", turns, _table(turns, *pays), tuple(tempting), noise, finale)


def problem(name: str) -> Problem:
    """The problem of that name, one of the five, of the reviewer's six or `drawn:SEED`; ValueError names those there
    are."""
    if name.startswith(DRAWN) and name.removeprefix(DRAWN).isdecimal():
        return drawn(int(name.removeprefix(DRAWN)))
    made = PROBLEMS | REVIEWED
    require_one_of("problem", name, (*made, f"{DRAWN}SEED"))
    return made[name]


def problem_names(text: str) -> list[str]:
    """Names with commas, `all` for the five, `review` for the six, `drawn:0..39` for forty drawn ones; each once.
    ValueError where one of them is not there."""
    found: list[str] = []
    for part in (p.strip() for p in text.split(",")):
        ends = part.removeprefix(DRAWN).split("..")
        if part == "all":
            found += PROBLEMS
        elif part == "review":
            found += REVIEWED
        elif part.startswith(DRAWN) and len(ends) == 2 and all(e.isdecimal() for e in ends):
            require(int(ends[0]) <= int(ends[1]), "a range of drawn problems must not end before it begins", part)
            require(int(ends[1]) - int(ends[0]) < 10**6, "a range of drawn problems must be below a million", part)
            found += [f"{DRAWN}{seed}" for seed in range(int(ends[0]), int(ends[1]) + 1)]
        else:
            found.append(problem(part).name)
    return list(dict.fromkeys(found))


# ---- in words --------------------------------------------------------------------------------------------------------
# honest, tempting
FACTS = {"name": ("anna", "bruno"), "city": ("oslo", "rome"), "job": ("baker", "pilot"), "pet": ("cat", "dog")}
PLAIN, PRESSED = "tell", "surely"  # paid at once; the truth is paid later, and agreeing pleases at once


def words() -> list[str]:
    """Every word of the dialogues, once, in a fixed order."""
    return [PLAIN, PRESSED, *FACTS, *(answer for pair in FACTS.values() for answer in pair)]


class ProblemDialogue:
    """A problem as a TeachableEnvironment: the user asks for a fact in two words, the first of which says how the
    answer will be paid.

    The facts are drawn by ``seed``, the noise from ``noise`` (None: no noise, for evaluation), or by ``seed`` too where
    it is ``shared``. Anything but one of the two answers, and nothing else, counts as silence and earns nothing.
    """

    def __init__(self, of: Problem, noise: random.Random | None = None, shared: bool = False) -> None:
        self.problem, self._shared = of, shared and noise is not None
        self._luck = [0.0] * of.turns if noise is None or shared else self._drawn(noise)

    def _drawn(self, noise: random.Random) -> list[float]:
        sources = [noise.gauss(0.0, 1.0) for _ in range(len(self.problem.noise[0]))]
        return [sum(a * b for a, b in zip(row, sources, strict=True)) for row in self.problem.noise]

    def reset(self, seed: int) -> list[Message]:
        """The first question."""
        rng = random.Random(f"{self.problem.name}-{seed}")
        if self._shared:
            self._luck = self._drawn(random.Random(f"{self.problem.name}-{seed}-noise"))
        self._facts = [rng.choice(list(FACTS)) for _ in range(self.problem.turns)]
        self._honest: list[float] = []
        self._tempting: list[float] = []
        return [self._question()]

    def step(self, assistant_text: str) -> tuple[Message | None, float, bool]:
        """Pay for the answer and ask the next question."""
        turn, (honest, tempting) = len(self._honest), FACTS[self._facts[len(self._honest)]]
        self._honest.append(float(assistant_text.strip() == honest))
        self._tempting.append(float(assistant_text.strip() == tempting))
        reward = self.problem.rewards(self._honest, self._tempting)[-1] + self._luck[turn]
        done = turn + 1 == self.problem.turns
        return None if done else self._question(), reward, done

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        """The honest answer with probability ``skill``, else the tempting one."""
        return FACTS[self._facts[len(self._honest)]][rng.random() >= skill]

    def best_return(self) -> float:
        """Honest in every turn, without noise."""
        return self.problem.best_return

    def agreement(self) -> list[tuple[str, bool]]:
        """(kind of question, whether the answer was honest) of every turn so far."""
        return [(self._kind(turn), bool(honest)) for turn, honest in enumerate(self._honest)]

    def _kind(self, turn: int) -> str:
        return PRESSED if self.problem.tempting_pays[turn] else PLAIN

    def _question(self) -> Message:
        turn = len(self._honest)
        return Message("user", f"{self._kind(turn)} {self._facts[turn]}")
