"""Questions about two or three pieces: comparisons, and answers that must be found among several passages."""

import random

from data.sources.questions.kinds import ABOUT_CODE, ABOUT_TEXT, Kind
from data.sources.questions.material import Function, Passage


def _compare_code(pair: tuple[Function, ...], rng: random.Random) -> str | None:
    one, other = pair[:2]
    if len(one.code) + len(other.code) > 1_800:
        return None
    asked = rng.choice(
        (
            "Compare these two functions.",
            "Which of these functions is easier to read, and why?",
            "What do these functions have in common?",
            "Which of the two is slower for large inputs?",
            "Describe each of these functions in one sentence.",
        )
    )
    return f"{asked}\n\n```python\n{one.code}\n```\n\n```python\n{other.code}\n```"


def _compare_texts(pair: tuple[Passage, ...], rng: random.Random) -> str | None:
    one, other = pair[:2]
    if len(one.text) + len(other.text) > 2_200:
        return None
    asked = rng.choice(
        (
            "What is the difference between what these two texts describe?",
            "Compare the two texts in a table.",
            f"When would I use {one.subject}, and when {other.subject}?",
            "Summarise each text in one sentence.",
            "Which of the two texts is clearer? Give two reasons.",
        )
    )
    return f"{asked}\n\nText 1: {one.text}\n\nText 2: {other.text}"


def _search(pieces: tuple[Passage, ...], rng: random.Random) -> str | None:
    if len(pieces) < 3 or sum(len(piece.text) for piece in pieces) > 3_600:
        return None
    wanted = rng.choice(pieces)
    passages = "\n\n".join(piece.text for piece in pieces)
    question = rng.choice((f"What is {wanted.subject} for?", f"What does the text say about {wanted.subject}?"))
    return rng.choice(
        (
            f"{passages}\n{question}",
            f"Context:\n\n{passages}\n\nQuestion: {question}\nAnswer:",
            f"{question} Answer from these search results, and name the one that you used.\n\n{passages}",
        )
    )


KINDS = (
    Kind(name="compare code", pieces="function groups", ask=_compare_code, follow_ups=ABOUT_CODE),
    Kind(name="compare texts", pieces="passage groups", ask=_compare_texts, follow_ups=ABOUT_TEXT),
    Kind(name="answer from search", pieces="passage groups", ask=_search, follow_ups=ABOUT_TEXT),
)
