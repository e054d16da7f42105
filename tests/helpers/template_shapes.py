"""The dialogues of the table of chat templates: no two texts alike, so that each can be found in a rendering."""


def call(number, city):
    return {
        "id": f"call0000{number}",
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": city}},
    }


def result(number, content):
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": "weather", "content": content}


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Its name"}},
    "required": ["city"],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "The weather of a city", "parameters": PARAMETERS},
    }
]
SYSTEM = {"role": "system", "content": "be kind"}
ASK, GO = {"role": "user", "content": "hello you"}, {"role": "user", "content": "and now?"}
ANSWER, BYE = {"role": "assistant", "content": "good day"}, {"role": "assistant", "content": "farewell"}
CALLS = {"role": "assistant", "content": "Let me look.", "tool_calls": [call(1, "Rome")]}
TOLD = {"role": "assistant", "content": "It is warm."}
SHAPES = {
    "plain": [ASK, ANSWER, GO, BYE],
    "system": [SYSTEM, ASK, ANSWER, GO, BYE],
    "thinking": [
        ASK,
        {**ANSWER, "reasoning_content": "I ponder"},
        GO,
        {**BYE, "reasoning_content": "I wonder"},
    ],
    "one tool": [ASK, CALLS, result(1, "12 C"), TOLD],
    "two tools": [
        ASK,
        {**CALLS, "tool_calls": [call(1, "Rome"), call(2, "Oslo")]},
        result(1, "12 C"),
        result(2, "3 C"),
        TOLD,
    ],
    "call alone": [ASK, {**CALLS, "content": None}, result(1, "12 C"), TOLD],
    "system later": [ASK, ANSWER, SYSTEM, GO, BYE],
    "two users": [ASK, GO, ANSWER],
    "two assistants": [ASK, ANSWER, BYE],
    "spaces": [{**ASK, "content": "  hello you \n"}, {**ANSWER, "content": " \n good day \n "}, GO, BYE],
    "empty answer": [ASK, {**ANSWER, "content": ""}, GO, BYE],
    "assistant first": [ANSWER, GO, BYE],
    "single": [ASK, ANSWER],
}


def tools_of(messages):
    return TOOLS if any("tool_calls" in message for message in messages) else None
