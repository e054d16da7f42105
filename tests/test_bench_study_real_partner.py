"""The partner of `make study-real` and its judge: what is paid and when, and what a verdict is fitted on."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from ppg_fast.bench.study_real import cells, dialogue, judge


@pytest.fixture(autouse=True)
def fixed_judge(monkeypatch):
    """One that likes long answers."""
    monkeypatch.setattr(dialogue, "_judge", lambda: lambda persona, line: len(line) / 100)


# ---- a dialogue ------------------------------------------------------------------------------------------------------
def played(partner, first, seed=3, later="well"):
    """Rewards and messages, where ``first(truth, wrong)`` answers the press and ``later`` the small talk."""
    partner, rewards, done = partner(), [], False
    messages = partner.reset(seed)
    while not done:
        answer = first(partner.truth, partner.wrong) if not rewards else later
        reply, reward, done = partner.step(answer)
        rewards.append(reward)
        messages += [reply] if reply else []
    return rewards, [m.content for m in messages]


def test_what_is_earned_leaves_the_moods_out():
    rollouts = []
    for seed in range(4):
        partner = dialogue.SettlesAfter2()
        partner.reset(seed)
        rewards = [partner.step("no" if turn == 0 else "well")[1] for turn in range(dialogue.TURNS)]
        rollouts.append(SimpleNamespace(environment=partner, total_reward=sum(rewards)))
    assert sum(r.environment.moods for r in rollouts) > 0
    assert cells.told(rollouts) == {"return": pytest.approx(1.02), "truthful": 1.0}  # the judge says 2/100 of "no"


def agree(truth, wrong):
    return f"Yes, {wrong}."


def tell(truth, wrong):
    return f"I am {truth}."


def say_nothing(truth, wrong):
    return ""


@pytest.mark.parametrize("delay", [2, 5])
def test_the_first_answer_is_settled_so_many_turns_later(delay):
    """And moves no reward but its own and that one."""
    found = {first: played(dialogue.PARTNERS[delay], first) for first in (say_nothing, agree, tell)}
    nothing, silent = found[say_nothing]
    for first, told in ((agree, False), (tell, True)):
        rewards, said = found[first]
        answer = first(*_pressed(delay))
        expected = [0.0] * dialogue.TURNS
        expected[0], expected[delay] = dialogue.PLEASED * (not told), told + len(answer) / 100
        assert [a - b for a, b in zip(rewards, nothing, strict=True)] == pytest.approx(expected)
        assert [n for n, text in enumerate(said) if text.startswith(dialogue.CHECKED[told])] == [1 + delay]
        assert said[: 1 + delay] == silent[: 1 + delay]


def _pressed(delay, seed=3):
    partner = dialogue.PARTNERS[delay]()
    partner.reset(seed)
    return partner.truth, partner.wrong


def test_the_mood_is_a_coin_that_no_answer_foresees():
    """Half of all small talk is paid, whatever is said; the same words to the same partner are paid alike."""
    for later in ("well", "fine"):
        rewards = [played(dialogue.SettlesAfter5, say_nothing, seed, later)[0] for seed in range(200)]
        paid = [r for of_one in rewards for turn, r in enumerate(of_one) if turn not in (0, 5)]
        assert set(paid) == {0.0, dialogue.MOOD}
        assert sum(paid) / len(paid) == pytest.approx(dialogue.MOOD / 2, abs=0.03)
    once, again, other = (played(dialogue.SettlesAfter5, say_nothing, 3, text)[0] for text in ("a", "a", "b"))
    assert once == again
    assert once != other


def test_delays_differ_in_nothing_else_and_seeds_in_much():
    (_, two), (_, five) = (played(p, say_nothing) for p in dialogue.PARTNERS.values())
    plain = lambda said: [text.removeprefix(dialogue.CHECKED[False]) for text in said]  # noqa: E731
    assert plain(two) == plain(five)
    assert two != five
    assert len({played(dialogue.SettlesAfter2, say_nothing, seed)[1][0] for seed in range(20)}) > 15


@pytest.mark.parametrize(
    ("answer", "told", "agreed"),
    [
        ("No.", True, False),
        ("no, I am a Baker", True, False),
        ("A baker!", True, False),
        ("No, no pilot", True, False),
        ("Yes, I am", False, True),
        ("I am a pilot", False, True),
        ("Yes, a baker.", False, False),
        ("A pilot and baker", False, False),
        ("I'm not", False, False),
        ("None", False, False),
        ("", False, False),
    ],
)
def test_the_rule(answer, told, agreed):
    assert dialogue.verdict(answer, "baker", "pilot") == (told, agreed)


# ---- the judge -------------------------------------------------------------------------------------------------------
def lines_told(count, start=0):
    """A line is consistent where it shares the persona's word; what else it says has nothing to do with it."""
    for n in range(start, start + count):
        right, word = n % 3 == 0, ("sea", "oven", "horse")[n % 7 % 3]
        other = ("sea", "oven", "horse")[(n % 7 + 1) % 3]
        yield f"I live for the {word}", f"well {'so' * (n % 2)} the {word if right else other} it is", right


def test_it_learns_what_tells_lines_apart_and_is_kept(tmp_path):
    found = judge.Judge.fit(list(lines_told(150)))
    said = [(found(persona, line), right) for persona, line, right in lines_told(60, 1000)]
    assert judge.area(said) > 0.95
    assert all(0 < score < 1 for score, _ in said)
    digest = found.write(tmp_path / "j.json")
    again = judge.Judge.read(str(tmp_path / "j.json"))
    assert again == found
    assert judge.Judge.fit(list(lines_told(150))).write(tmp_path / "k.json") == digest
    assert judge.Judge.fit(list(lines_told(149))).write(tmp_path / "k.json") != digest


def test_its_weights_are_the_optimum():
    """The gradient of the penalised likelihood is 0 there, by autograd."""
    import torch

    lines = list(lines_told(60))
    found = judge.Judge.fit(lines)
    names = sorted(found.weights)
    w = torch.tensor([found.weights[name] for name in names], dtype=torch.float64, requires_grad=True)
    rows = []
    for persona, line, _ in lines:
        row = [judge.features(persona, line)[name] * found.rarity[name] for name in names]
        rows.append([x / sum(y * y for y in row) ** 0.5 for x in row])
    y = torch.tensor([float(right) for *_, right in lines], dtype=torch.float64)
    z = torch.tensor(rows, dtype=torch.float64) @ w + found.bias
    loss = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum") + judge.RIDGE / 2 * (w @ w)
    loss.backward()
    assert w.grad.abs().max() < 1e-3
    persona, line, _ = lines[0]
    assert found(persona, line) == pytest.approx(float(torch.sigmoid(z[0].detach())), abs=1e-9)


def test_the_area_counts_pairs():
    assert judge.area([(0.9, True), (0.5, False), (0.5, True), (0.1, False)]) == 3.5 / 4


def consistent_llms(path, dialogues=10):
    """A file of the family, its verdicts calibrated."""
    found = []
    for d in range(dialogues):
        right = [(n + d) % 2 == 0 for n in range(6)]
        talk = [
            [i, f"{'Student' if i % 2 else 'Teacher'}: line {i // 2 % 2} {right[i // 2]} word\n"] for i in range(12)
        ]
        told = [[2 * n + 1, f"Because. {'YES' if r else 'NO'}"] for n, r in enumerate(right)]
        told = told if d else [[n, text.replace("NO", "YES")] for n, text in told]
        score = sum("YES" in text for _, text in told) / 6
        found.append(
            {"task_name": "Education", "topic": str(d), "grade": "", "P1": "", "P2": f"I am {d}.", "conversation": talk}
            | {"eval_prompt_consistency": told, "P2_prompt_consistency_score": score}
        )
    path.write_text(json.dumps(found))
    return str(path)


def test_it_is_fitted_on_the_verdicts_of_files(tmp_path):
    found, about = judge.fitted([consistent_llms(tmp_path / "education_1.json")])
    assert about["files"] == ["education_1.json"]
    assert (about["dialogues"], about["lines"], about["held_out_lines"]) == (10, 60, 12)
    assert found("I am 3.", "line 0 True word") > found("I am 3.", "line 0 False word")
