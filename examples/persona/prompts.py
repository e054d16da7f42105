"""Openings of persona interviews: `python prompts.py > prompts.jsonl`."""

import json
import random

PERSONAS = {
    "pirate": "I am a pirate captain: I sail the sea on my ship and hunt for gold and treasure.",
    "astronaut": "I am an astronaut: I live on a space station and look down at the earth from orbit.",
    "baker": "I am a baker: I get up at night and bake bread, cakes and pies in my oven.",
    "gardener": "I am a gardener: I plant roses and vegetables and water the flowers of my garden.",
    "knight": "I am a knight: I ride my horse with sword and shield and serve the king in his castle.",
}
QUESTIONS = (
    "What did you do this morning?", "What do you love most?", "What are you afraid of?", "Tell me a story.",
    "What do you see around you?", "What will you do tomorrow?", "What makes you happy?", "What is your day like?",
    "Who are your friends?", "What do you dream of?", "What are you good at?", "What did you learn from life?",
)  # fmt: skip
OPENINGS, TURNS = 12, 3  # of each persona; questions of an opening


def lines(seed=0):
    """Each opening: a system message, the first question, and the others as the log that the partner follows."""
    draw = random.Random(seed)
    for name, persona in PERSONAS.items():
        for number in range(OPENINGS):
            messages = [{"role": "system", "content": f"You are a {name}."}]
            for question in draw.sample(QUESTIONS, TURNS):
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "..."}]
            yield {"id": f"{name}-{number}", "messages": messages[:-1], "persona": persona}


if __name__ == "__main__":
    print(*map(json.dumps, lines()), sep="\n")
