"""Tools: calls read from what was sampled, functions that answer them, and dialogues in which both happen."""

from ppg_fast.rollouts.tools.answer_reader import AnswerReader
from ppg_fast.rollouts.tools.functions import Tools
from ppg_fast.rollouts.tools.tool_conversation import (
    ToolConversation,
    a_result,
    counted,
    own_rewards,
    prepared,
    step_calls,
)

__all__ = ["AnswerReader", "ToolConversation", "Tools", "a_result", "counted", "own_rewards", "prepared", "step_calls"]
