"""An environment as TRL has it: made anew for each rollout, its public methods are tools.

ppg-fast train --model FOLDER --prompts examples/tools/prompts.jsonl --tools examples/tools/basket.py:Basket
"""


class Basket:
    def reset(self, item="apple", **row):
        """Called with what the prompt's line holds; what it returns stands at the end of the last message."""
        self.item, self.basket = item, {}
        return f" The basket is for {item}s."

    def put(self, item: str, count: int) -> str:
        """Put pieces of an item into the basket.

        Args:
            item: The item, in the singular.
            count: How many pieces.
        """
        self.basket[item] = self.basket.get(item, 0) + count
        return f"{self.basket[item]} {item}s in the basket"

    def get_reward(self) -> float:
        """The reward of the dialogue: no --reward is needed."""
        return float(self.basket.get(self.item, 0) > 0)
