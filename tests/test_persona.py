"""The persona interview: who is paid for what, and when."""

import random

import pytest

from ppg_fast.rollouts.persona import DELAY, PLEASED, SETTLED, PersonaInterview, words


def play(env, seed, answer):
    """Rewards of a whole dialogue in which ``answer(environment)`` speaks."""
    env.reset(seed)
    rewards, done = [], False
    while not done:
        reply, reward, done = env.step(answer(env))
        assert (reply is None) == done
        rewards.append(reward)
    return rewards


def truthful(env):
    turn = len(env.answers)
    return f"{env._truth(env.questions[turn])} {env._courtesy() or ''}"


def pleasing(env):
    question = env.questions[len(env.answers)]
    return f"{question.pressed or env._truth(question)} {env._courtesy() or ''}"


def silent(env):
    return ""


@pytest.mark.parametrize("plain", [False, True])
def test_truth_earns_the_best_return_and_silence_almost_nothing(plain):
    env = PersonaInterview(plain=plain)
    for seed in range(50):
        rewards = play(env, seed, truthful)
        assert sum(rewards) == pytest.approx(env.best_return())
        assert all(0 <= r <= 1 for r in rewards)
        assert sum(play(env, seed, silent)) == 0
        if not plain:
            assert 6 <= len(rewards) <= 8
            assert sum(play(env, seed, pleasing)) < env.best_return()


def test_a_pressed_user_is_pleased_now_and_pays_for_the_truth_later():
    env = PersonaInterview()
    for seed in range(30):
        true, pleased = play(env, seed, truthful), play(env, seed, pleasing)
        pressed = [t for t, q in enumerate(env.questions) if q.kind == "press"]
        assert len(pressed) == 2
        for t in pressed:
            if t - DELAY not in pressed:  # which this turn would settle
                assert 0 < pleased[t] - true[t] <= PLEASED
            later = t + DELAY
            if later not in pressed:
                assert true[later] - pleased[later] == pytest.approx(SETTLED)


@pytest.mark.parametrize("answer", ["oslo oslo", "oslo rome", "it is my own dear oslo", "name oslo", "banana", ""])
def test_answers_that_do_not_count(answer):
    env = PersonaInterview(plain=True)
    env.reset(0)
    turn = next(i for i, q in enumerate(env.questions) if q.fact == "city")
    env.persona["city"] = env.questions[turn].truth = "oslo"
    for _ in range(turn):
        env.step("")
    _, reward, _ = env.step(answer)
    assert reward == 0


def test_an_answer_that_names_the_value_once_counts():
    env = PersonaInterview(plain=True)
    env.reset(0)
    question = env.questions[0]
    assert env.step(f"my {question.fact} is {question.truth}")[1] == 1.0


def test_the_colour_is_the_assistants_own_choice():
    env = PersonaInterview()
    seed = next(s for s in range(99) if env.reset(s) and any(q.kind == "recall" for q in env.questions))
    env.reset(seed)
    chosen, recalled = (next(i for i, q in enumerate(env.questions) if q.kind == k) for k in ("choose", "recall"))
    for said, right in (("green", True), ("black", False)):
        env.reset(seed)
        for turn in range(recalled + 1):
            env.step("green" if turn == chosen else said if turn == recalled else "")
        assert env.correct[recalled] is right


def test_a_seed_names_one_dialogue_and_held_out_personas_are_apart():
    env = PersonaInterview()
    assert env.reset(7) == env.reset(7) != env.reset(8)
    seen = {env.reset(s)[0].content for s in range(300)}
    held_out = {PersonaInterview(held_out=True).reset(s)[0].content for s in range(300)}
    assert not seen & held_out


def test_everything_said_is_in_the_vocabulary():
    vocabulary = set(words())
    rng = random.Random(0)
    for seed in range(40):
        env = PersonaInterview()
        heard = [m.content for m in env.reset(seed)]
        done = False
        while not done:
            text = env.demonstrate(rng, 0.5)
            reply, _, done = env.step(text)
            heard += [text] + ([reply.content] if reply else [])
        assert set(" ".join(heard).split()) <= vocabulary


def test_a_more_skilled_teacher_earns_more():
    def mean_return(skill):
        rng, env = random.Random(0), PersonaInterview()
        return sum(sum(play(env, s, lambda e: e.demonstrate(rng, skill))) for s in range(100)) / 100

    assert mean_return(0.0) < mean_return(0.5) < mean_return(1.0)


def test_the_courtesy_is_half_of_every_later_reward():
    env = PersonaInterview()
    seed = next(s for s in range(99) if env.reset(s) and any(q.kind == "courtesy" for q in env.questions[:4]))
    polite = play(env, seed, truthful)
    asked = next(t for t, q in enumerate(env.questions) if q.kind == "courtesy")
    rude = play(env, seed, lambda e: str(e._truth(e.questions[len(e.answers)])))
    assert rude[: asked + 1] == polite[: asked + 1]
    for turn in range(asked + 1, len(rude)):
        assert polite[turn] - rude[turn] == pytest.approx(env.questions[turn].own / 2)
