"""Rewards that see calls and results as OpenAI messages, and the environment where there is one."""


def right(messages, answer="", **info):
    """1 for an answer that holds the right number; a call earns nothing by itself."""
    last = messages[-1]
    return None if last.get("tool_calls") else float(answer in last["content"])


def in_the_basket(messages, environment, wanted=0, **info):
    """Whether the basket holds what was wanted: the environment as it is when the dialogue is over."""
    return float(sum(environment.basket.values()) == wanted)
