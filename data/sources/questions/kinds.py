"""The form of a kind of question: which pieces it is asked about, in which words, and what is asked next."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Ask = Callable[[Any, random.Random], str | None]
"""Returns the question about a piece; None if it does not suit the piece."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of question, which is its rows' category."""

    name: str
    pieces: Literal["functions", "function groups", "passages", "passage groups", "constants", "subjects", "numbers"]
    ask: Ask
    follow_ups: tuple[str, ...]
    """What a user may ask next, whatever the answer was."""


def worded(*forms: str, **choices: tuple[str, ...]) -> Callable[..., str]:
    """Returns a function that fills one of `forms` with a choice of each of `choices` and with given fields."""

    def fill(rng: random.Random, **fields: str) -> str:
        chosen = {name: rng.choice(values) for name, values in choices.items()}
        return rng.choice(forms).format(**chosen, **fields)

    return fill


LANGUAGES = ("French", "German", "Spanish", "Italian", "Portuguese", "Dutch")
ABOUT_CODE = (
    "Shorter, please.",
    "Now give an example of how it is used.",
    "Which edge cases should I test?",
    "Can you say that again for someone who is new to Python?",
    "What would you change to make it faster?",
    "Add comments to the code.",
    "Now add type hints.",
    "Write a one-line summary of that.",
    "How would the same thing look in JavaScript?",
    "What could go wrong if the arguments have the wrong type?",
    "Put your answer into a table.",
    "Are you sure? Check your answer once more.",
)
ABOUT_TEXT = (
    "Shorter, please.",
    "Now say it in one sentence.",
    "Translate your answer into German.",
    "Can you give an example?",
    "Rewrite your answer as bullet points.",
    "Explain it to a child.",
    "Which words in your answer might a beginner not know? Explain them.",
    "Make it sound more formal.",
    "What is missing from the text?",
    "Give your answer a title.",
    "Now write it as a short e-mail.",
    "Is there anything in your answer that the text does not say?",
)
EVERYDAY = (
    "Shorter, please.",
    "Now give an example.",
    "Can you put that into a list?",
    "Rewrite it so that a ten-year-old understands it.",
    "What would someone who disagrees say?",
    "Make it funnier.",
    "Translate your answer into Spanish.",
    "Tell me more about the second point.",
    "Sum it up in one sentence.",
    "Write the same thing as a poem of four lines.",
    "What are the three most important words in your answer, and why?",
    "Take a moment to criticise your answer, then improve it.",
)
CALCULATED = (
    "Explain each step.",
    "Now double the first number. What is the answer?",
    "Check the result in another way.",
    "Write a Python function that solves problems of this kind.",
    "Give only the final number.",
    "Make up a similar problem.",
)
