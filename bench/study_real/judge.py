"""A judge of persona lines, fitted on the verdicts of Consistent-LLMs files: logistic regression on words.

Features of a line are its words, the words that it shares with the persona, and its length, weighed by how rare they
are and scaled to length 1. The ridge is chosen once; nothing is tuned. Whole dialogues are held out to say how good it
is.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ppg_fast.dialogues.dialogue import read_dialogues
from ppg_fast.spec import require
from ppg_fast.writing import opened

RIDGE = 3.0  # weight of the squared weights, of a sum over lines
RARE = 5  # lines that a feature must be in
HELD_OUT = 5  # one dialogue in so many
Line = tuple[str, str, bool]  # persona, line, whether it was judged consistent


def features(persona: str, line: str) -> Counter[str]:
    """What a line is judged by."""
    words, known = re.findall(r"[a-z']+", line.lower()), set(re.findall(r"[a-z']+", persona.lower()))
    shared = [f"{word} of the persona" for word in words if word in known]
    return Counter([*words, *shared, f"length {len(words).bit_length()}"])


@dataclass(frozen=True)
class Judge:
    """Calls: the probability, 0 to 1, that the line would have been judged consistent."""

    bias: float
    weights: dict[str, float]  # of a feature, by how rare it is
    rarity: dict[str, float]

    def __call__(self, persona: str, line: str) -> float:
        """Of one line."""
        found = {w: n * self.rarity[w] for w, n in features(persona, line).items() if w in self.rarity}
        length = math.sqrt(sum(x * x for x in found.values())) or 1.0
        return 1 / (1 + math.exp(-self.bias - sum(self.weights[w] * x / length for w, x in found.items())))

    @classmethod
    def read(cls, path: str) -> "Judge":
        """What `write` wrote."""
        return cls(**json.loads(Path(path).read_text()))

    def write(self, path: Path) -> str:
        """Keep it; returns its digest, the first 12 digits of SHA-256."""
        text = json.dumps(asdict(self), sort_keys=True) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        with opened(path) as file:
            file.write(text)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @classmethod
    def fit(cls, lines: Sequence[Line]) -> "Judge":
        """Ridge-regularised logistic regression by Newton's method, float64."""
        import torch

        counts = [features(persona, line) for persona, line, _ in lines]
        seen = Counter(word for count in counts for word in count)
        words = sorted(word for word, n in seen.items() if n >= RARE)
        rarity = {word: round(1 + math.log(len(lines) / seen[word]), 6) for word in words}
        place = {word: i for i, word in enumerate(words)}
        X = torch.zeros(len(lines), len(words) + 1, dtype=torch.float64)
        for row, count in zip(X, counts, strict=True):
            for word in count.keys() & place.keys():
                row[place[word]] = count[word] * rarity[word]
        X = torch.nn.functional.normalize(X, dim=1)
        X[:, -1] = 1.0
        y, ridge = torch.tensor([float(right) for *_, right in lines]).double(), torch.full((len(words) + 1,), RIDGE)
        ridge[-1] = 1e-6
        w = torch.zeros(len(words) + 1, dtype=torch.float64)
        for _ in range(NEWTON):
            p = torch.sigmoid(X @ w)
            hessian = (X * (p * (1 - p))[:, None]).T @ X + torch.diag(ridge)
            w = w - torch.linalg.solve(hessian, X.T @ (p - y) + ridge * w)
        found = [round(x, 6) for x in w.tolist()]
        return cls(found[-1], dict(zip(words, found[:-1], strict=True)), rarity)


NEWTON = 8  # steps: quadratic convergence, the ridge keeps them from overshooting


def lines_of(files: Sequence[str]) -> list[list[Line]]:
    """The judged lines of each dialogue. ValueError where there are none."""
    found = []
    for dialogue in (d for file in files for d in read_dialogues(file)):
        persona = " ".join(m.content for m in dialogue.messages if m.role == "system")
        said = [m.content for m in dialogue.messages if m.role == "assistant"]
        judged = [(persona, s, r > 0.5) for s, r in zip(said, dialogue.turn_rewards, strict=True) if r is not None]
        found.append(judged)
    require(any(found), "data must hold judged lines (Consistent-LLMs files)", ", ".join(files))
    return found


def fitted(files: Sequence[str]) -> tuple[Judge, dict[str, Any]]:
    """The judge of all lines, and how one that was fitted without a fifth of the dialogues does on these."""
    dialogues = lines_of(files)
    apart = [line for number, d in enumerate(dialogues) if number % HELD_OUT == 0 for line in d]
    rest = [line for number, d in enumerate(dialogues) if number % HELD_OUT for line in d]
    trial = Judge.fit(rest)
    said = [(trial(persona, line), right) for persona, line, right in apart]
    about = {
        "files": sorted(Path(file).name for file in files),
        "dialogues": len(dialogues),
        "lines": len(apart) + len(rest),
        "consistent": sum(right for *_, right in (*apart, *rest)) / (len(apart) + len(rest)),
        "held_out_lines": len(apart),
        "auc": area(said),
    }
    return Judge.fit([*rest, *apart]), about


def area(said: Sequence[tuple[float, bool]]) -> float:
    """The share of pairs of a consistent and an inconsistent line in which the former scores higher (AUC)."""
    above, below = ([score for score, right in said if right is wanted] for wanted in (True, False))
    if not (above and below):
        return float("nan")
    wins = sum((a > b) + 0.5 * (a == b) for a in above for b in below)
    return wins / (len(above) * len(below))
