"""Tools: calls read from what was sampled, functions that answer them, and dialogues in which both happen."""

from ppg_fast.rollouts.tools.answers import AnswerReader
from ppg_fast.rollouts.tools.conversation import ToolConversation, a_result, counted, own_rewards, prepared, step_calls
from ppg_fast.rollouts.tools.functions import Tools

__all__ = ["AnswerReader", "ToolConversation", "Tools", "a_result", "counted", "own_rewards", "prepared", "step_calls"]
