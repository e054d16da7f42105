"""Tools: calls read from what was sampled, functions that answer them, and dialogues in which both happen."""
