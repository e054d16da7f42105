"""Which of some prompts to ask a query with, from a log of answers: `ppg-fast prompts fit` and `choose`.

Prompt-OIRL (Sun et al., arXiv:2309.06553): a reward model of one step, from (query, prompt, correct) rows alone,
chooses a prompt for each query. It is worth having only where it beats the best single prompt, so that is always
measured: on queries that the model has not seen, as a paired difference with its standard error.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ppg_fast.dialogues.records import Problems, Record, read_records
from ppg_fast.spec import require
from ppg_fast.writing import opened

FORMAT = "ppg_fast prompt choice, 1"
FOLDS, COMPONENTS, FEWEST = 5, 32, 20
SURE = 1.96  # standard errors from the gain to its lower bound: 95 % on both sides

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Row:
    """One logged answer. ``propensity``: the probability with which its prompt was the one that was tried."""

    query: str
    prompt: str
    correct: int
    propensity: float | None = None


@dataclass(frozen=True)
class Choice:
    """A log with what choosing by query gains on it: mean and standard error of the paired difference to ``best``, the
    best single prompt. ``shares``: how often each prompt is right; ``encoder``: a folder, "" for TF-IDF."""

    rows: list[Row]
    encoder: str
    prompts: list[str]
    shares: list[float]
    best: str
    gain: float
    error: float
    format: str = FORMAT
    queries: list[str] = field(default_factory=list)

    @property
    def lower(self) -> float:
        """The lower bound of the gain; only above 0 is a prompt chosen by query."""
        return self.gain - SURE * self.error

    def describe(self) -> str:
        """What was found, in two lines."""
        chosen = "chosen by query" if self.lower > 0 else "no gain: every query gets the best single prompt"
        tried = f"{len(self.rows)} answers to {len(self.queries)} queries, {len(self.prompts)} prompts"
        right = f"best single prompt {self.best!r}: {max(self.shares):.3f} right"
        return f"{tried}; {right}\nby query {self.gain:+.4f} +- {self.error:.4f} (cross-fitted): {chosen}"


def read_log(path: str) -> list[Row]:
    """Rows {"query", "prompt", "correct": 0 or 1, "propensity"?}. ValueError names file, line and value."""
    rows = []
    for record in read_records(Path(path), Problems(path, strict=True, nothing=f"{path} holds no row")):
        value = _object(record, ("query", "prompt"))
        correct, propensity = value.get("correct", -1), value.get("propensity")
        require(correct in (0, 1), f"{record.where}: correct must be 0 or 1", correct)
        right = propensity is None or (isinstance(propensity, float) and 0 < propensity < 1)
        require(right, f"{record.where}: a propensity must be a number > 0 and < 1", propensity)
        rows.append(Row(value["query"], value["prompt"], int(correct), propensity))
    return rows


def _object(record: Record, keys: Sequence[str]) -> Mapping[str, Any]:
    value = record.value
    require(isinstance(value, dict), f"{record.where} must be an object with {', '.join(keys)}", type(value).__name__)
    for key in keys:
        said = value.get(key)
        rule = f"{record.where}: {key} must be a text that is not empty"
        require(isinstance(said, str) and bool(said.strip()), rule, said)
    return value


def fit(rows: Sequence[Row], encoder: str = "") -> Choice:
    """Cross-fit a reward model by query, and say what choosing by it gains.

    Of each of 5 parts of the queries, a model of the other four chooses the prompt of the highest prediction. With
    v_q(p) the share of right answers to query q under prompt p (where not every prompt was tried: the mean of
    1[prompt = p] correct / propensity over its rows, inverse propensity scores) the gain is the mean over q of
    v_q(chosen) - v_q(best), best = argmax_p mean_q v_q(p), and its error sd / sqrt(queries). Same rows: same numbers,
    in any order. ValueError for fewer than 20 queries, 2 prompts or 20 rows of a prompt, and where a prompt was not
    tried and a row has no propensity.
    """
    rows = sorted(rows, key=lambda row: (row.query, row.prompt, row.correct, row.propensity or 0))
    queries, prompts = (sorted({getattr(row, name) for row in rows}) for name in ("query", "prompt"))
    require(len(queries) >= FEWEST, f"a log must have at least {FEWEST} queries", len(queries))
    require(len(prompts) >= 2, "a log must have at least 2 prompts", len(prompts))
    values = values_of(rows, queries, prompts)
    for prompt, count in Counter(row.prompt for row in rows).items():
        require(count >= FEWEST, f"prompt {short(prompt)} must have at least {FEWEST} rows", count)
    shares = values.mean(0)
    best = int(shares.argmax())
    embed = _Encoder(encoder) if encoder else tf_idf
    order = np.random.default_rng(0).permutation(len(queries))
    chosen = np.empty(len(queries), dtype=np.int64)
    for part in (order[start::FOLDS] for start in range(FOLDS)):
        held_out = {queries[i] for i in part}
        predict = Model([row for row in rows if row.query not in held_out], prompts, embed)
        chosen[part] = best_or_better(predict([queries[i] for i in part]), best)
    gains = values[np.arange(len(queries)), chosen] - values[:, best]
    gain, error = float(gains.mean()), float(gains.std(ddof=1) / len(queries) ** 0.5)
    return Choice(rows, encoder, prompts, shares.tolist(), prompts[best], gain, error, queries=queries)


def values_of(rows: Sequence[Row], queries: Sequence[str], prompts: Sequence[str]) -> Array:
    """(Q, P) float64: an unbiased estimate of how often each prompt is right for each query."""
    place = [{name: i for i, name in enumerate(names)} for names in (queries, prompts)]
    counts, right, weighted = (np.zeros((len(queries), len(prompts))) for _ in range(3))
    for row in rows:
        at = place[0][row.query], place[1][row.prompt]
        counts[at] += 1
        right[at] += row.correct
        weighted[at] += row.correct / (row.propensity or 1.0)
    if counts.all():
        return right / counts
    query, prompt = map(int, np.argwhere(counts == 0)[0])
    seen = f"{short(prompts[prompt])} was not tried with {short(queries[query])}"
    rule = f"where not every prompt was tried with every query, each row must have its propensity ({seen})"
    without = sum(row.propensity is None for row in rows)
    require(not without, rule, f"{without} rows without one")
    return weighted / counts.sum(1, keepdims=True)


def short(text: str) -> str:
    """The beginning of a text, for a message."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def best_or_better(scores: Array, best: int) -> Array:
    """(n,): for each row of ``scores`` (n, P) the highest, ``best`` where nothing is higher, the first of two alike."""
    highest = scores.argmax(1)
    return np.where(scores.max(1) > scores[:, best], highest, best)


class Model:
    """How likely each prompt is right for a query: for each, gradient-boosted trees over the query's embedding, small
    ones, since small differences of noisy answers decide. A prompt without a row is never chosen."""

    def __init__(self, rows: Sequence[Row], prompts: Sequence[str], embed: Any) -> None:
        self.prompts, self.embed, self.rows = prompts, embed, rows

    def __call__(self, queries: Sequence[str]) -> Array:
        """(n, P) float64."""
        make = import_module("sklearn.ensemble").HistGradientBoostingRegressor
        names = sorted({row.query for row in self.rows})
        place = {query: i for i, query in enumerate(names)}
        known, asked = self.embed(names, queries)
        scores = np.full((len(queries), len(self.prompts)), -np.inf)
        for number, prompt in enumerate(self.prompts):
            rows = [row for row in self.rows if row.prompt == prompt]
            if rows:
                trees = make(max_iter=60, learning_rate=0.05, max_leaf_nodes=3, early_stopping=False, random_state=0)
                trees.fit(known[[place[row.query] for row in rows]], [row.correct for row in rows])
                scores[:, number] = trees.predict(asked)
        return scores


def tf_idf(known: Sequence[str], asked: Sequence[str]) -> tuple[Array, Array]:
    """Embeddings of both: TF-IDF of the words of ``known``, down to 32 numbers by a truncated SVD."""
    words = import_module("sklearn.feature_extraction.text").TfidfVectorizer(
        sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"
    )
    try:
        found, others = words.fit_transform(known), words.transform(asked)
    except ValueError as error:
        raise ValueError(f"the queries of a log must have words ({error}), got {short(known[0])}") from error
    if found.shape[1] <= COMPONENTS:
        return found.toarray(), others.toarray()
    width = min(COMPONENTS, len(known) - 1)
    svd = import_module("sklearn.decomposition").TruncatedSVD(width, random_state=0).fit(found)
    return svd.transform(found), svd.transform(others)


class _Encoder:
    """Embeddings by a Hugging Face encoder in a folder: the mean of its last hidden states; each query once."""

    def __init__(self, folder: str) -> None:
        require(Path(folder, "config.json").is_file(), "encoder must be a folder with config.json", folder)
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
        self.known: dict[str, Array] = {}

    def __call__(self, *parts: Sequence[str]) -> list[Array]:
        import torch

        for query in (query for part in parts for query in part if query not in self.known):
            with torch.no_grad():
                hidden = self.model(**self.tokenizer(query, return_tensors="pt", truncation=True)).last_hidden_state
            self.known[query] = hidden[0].mean(0).double().numpy()
        return [np.stack([self.known[query] for query in part]) for part in parts]


def save(choice: Choice, path: Path) -> None:
    """Write it as JSON, the log itself: what reads it executes nothing, and fits again, to the same bits."""
    whole = {**vars(choice), "rows": [list(vars(row).values()) for row in choice.rows]}
    with opened(path) as file:
        file.write(json.dumps(whole, ensure_ascii=False) + "\n")


def load(path: str) -> Choice:
    """What `save` wrote. ValueError for anything else."""
    try:
        whole = json.loads(Path(path).read_text(encoding="utf-8"))
        assert whole["format"] == FORMAT
        return Choice(**{**whole, "rows": [Row(*row) for row in whole["rows"]]})
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} must be what `ppg-fast prompts fit` wrote, got something else") from error


def choose(choice: Choice, path: str) -> list[dict[str, Any]]:
    """The objects of a JSONL, each with a "query", and with the "prompt" to ask it with.

    The best single prompt where the lower bound of the gain is not above 0, else the one of the highest prediction. An
    object's "prompts" are those to choose among; ValueError for one that the log has not, of which nothing is known.
    """
    asked, index = [], {prompt: i for i, prompt in enumerate(choice.prompts)}
    for record in read_records(Path(path), Problems(path, strict=True, nothing=f"{path} holds no query")):
        value = dict(_object(record, ("query",)))
        among = value.get("prompts", choice.prompts)
        require(isinstance(among, list) and bool(among), f"{record.where}: prompts must be a list of texts", among)
        for prompt in among:
            known = isinstance(prompt, str) and prompt in index
            require(known, f"{record.where}: a prompt must be one of the log's {len(index)}", prompt)
        asked.append((value, [index[prompt] for prompt in among]))
    scores = np.tile(choice.shares, (len(asked), 1))
    if choice.lower > 0:
        embed = _Encoder(choice.encoder) if choice.encoder else tf_idf
        scores = Model(choice.rows, choice.prompts, embed)([value["query"] for value, _ in asked])
    chosen = []
    for (value, among), row in zip(asked, scores, strict=True):
        best = max(range(len(among)), key=lambda i: choice.shares[among[i]])
        chosen.append({**value, "prompt": choice.prompts[among[int(best_or_better(row[None, among], best)[0])]]})
    return chosen
