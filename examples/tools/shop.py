"""Tools as functions: types and a docstring make each of them known to the model.

ppg-fast train --model FOLDER --prompts examples/tools/prompts.jsonl --tools examples/tools/shop.py \
    --reward examples/tools/rewards.py:right --partner none
"""

PRICES = {"apple": 3, "pear": 4, "melon": 11}


def price(item: str) -> int:
    """Look up what one piece of an item costs.

    Args:
        item: The item, in the singular.
    """
    if item not in PRICES:
        raise KeyError(f"no {item} in this shop")
    return PRICES[item]


def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b
