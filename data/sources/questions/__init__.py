"""Questions of many kinds, made from what is on every machine with Python: `question_rows`.

Code, docstrings, constants and pydoc's topics of the standard library; everyday subjects; and puzzles with numbers.
Every row is a conversation's user turns, some with a system prompt, and its kind as `category`; it has no answers,
which the target writes. Rows depend on the library's files alone.
"""

import random
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain, zip_longest
from typing import Any

from data.sources.questions import about_code, about_text, comparisons, everyday, puzzles
from data.sources.questions.kinds import Kind
from data.sources.questions.material import Material, is_held_out, read_material
from data.sources.records import Row

KINDS: tuple[Kind, ...] = (
    *about_code.KINDS,
    *about_text.KINDS,
    *comparisons.KINDS,
    *everyday.KINDS,
    *puzzles.KINDS,
)
NUM_TRAIN, NUM_HELD_OUT = 400, 60
"""Largest number of questions of a kind in each part."""
QUESTIONS_PER_SUBJECT = 14
GROUP = 3
"""Number of pieces that are compared or searched."""
SYSTEM_SHARE, SECOND_TURN_SHARE, THIRD_TURN_SHARE = 0.35, 0.25, 0.4
"""Share of conversations with a system prompt, with a second turn, and of the latter those with a third."""
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer in at most three sentences.",
    "You are a patient teacher. Explain step by step.",
    "You are an experienced Python programmer who reviews code for a living.",
    "You write for readers who have no technical background.",
    "You are an assistant in a software company. Be precise, and say so when you do not know something.",
    "Always answer in Markdown.",
    "You are a friendly companion who likes to explain things with examples.",
    "Answer only what was asked, without an introduction.",
    "You are an editor at a publisher of handbooks. You value short sentences.",
    "You answer questions of customers politely and to the point.",
)


def question_rows(*, held_out: bool) -> list[Row]:
    """Returns the held-out questions or those for training, the kinds in turn; none is in both."""
    return list(_of_library()[held_out])


@cache  # reading the library takes seconds
def _of_library() -> tuple[list[Row], list[Row]]:
    return make_questions(*read_material())


def make_questions(train: Material, held_out: Material) -> tuple[list[Row], list[Row]]:
    """Returns the rows made from the pieces for training and those made from the held-out pieces."""
    seen: set[str] = set()
    held_out_rows = [_rows(kind, held_out, NUM_HELD_OUT, seen, held_out=True) for kind in KINDS]
    train_rows = [_rows(kind, train, NUM_TRAIN, seen, held_out=False) for kind in KINDS]
    return _in_turn(train_rows), _in_turn(held_out_rows)


def _in_turn(by_kind: list[list[Row]]) -> list[Row]:
    return [row for row in chain.from_iterable(zip_longest(*by_kind)) if row]


def _rows(kind: Kind, material: Material, number: int, seen: set[str], *, held_out: bool) -> list[Row]:
    """Returns at most `number` rows of a kind, whose questions are not in `seen` and are added to it."""
    rows: list[Row] = []
    for where, piece in _shuffled(kind, _pieces(kind, material, number, held_out=held_out)):
        rng = random.Random(f"{kind.name} {where}")
        question = kind.ask(piece, rng)
        if question is None or question in seen:
            continue
        seen.add(question)
        rows.append(Row(where=f"{where} ({kind.name})", fields=_conversation(kind, question, rng)))
        if len(rows) == number:
            break
    return rows


def _conversation(kind: Kind, question: str, rng: random.Random) -> dict[str, Any]:
    num_turns = 1 + (rng.random() < SECOND_TURN_SHARE) * (1 + (rng.random() < THIRD_TURN_SHARE))
    turns = [question, *rng.sample(kind.follow_ups, num_turns - 1)]
    system = {"system": rng.choice(SYSTEM_PROMPTS)} if rng.random() < SYSTEM_SHARE else {}
    return {**system, "turns": turns, "category": kind.name}


def _pieces(kind: Kind, material: Material, number: int, *, held_out: bool) -> Iterable[tuple[str, Any]]:
    """Returns the pieces of a kind with their documents or subjects; a number after # tells apart those of one."""
    match kind.pieces:
        case "functions":
            return ((piece.where, piece) for piece in material.functions)
        case "passages":
            return ((piece.where, piece) for piece in material.passages)
        case "constants":
            repeated = [(piece, time) for piece in material.constants for time in range(3)]
            return ((f"{piece.where}#{time}" if time else piece.where, piece) for piece, time in repeated)
        case "function groups":
            return _groups(material.functions, kind)
        case "passage groups":
            return _groups(material.passages, kind)
        case "subjects":
            own = [one for one in everyday.SUBJECTS[kind.name] if is_held_out(f"everyday/{one}") == held_out]
            return ((f"everyday/{one}#{time}", one) for one in own for time in range(QUESTIONS_PER_SUBJECT))
        case "numbers":
            names = (f"puzzles/{kind.name}/{at}" for at in range(20 * number))
            return ((name, at) for at, name in enumerate(names) if is_held_out(name) == held_out)


def _groups(pieces: list[Any], kind: Kind) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yields groups of pieces of one part, mostly from different documents."""
    mixed = [piece for _, piece in _shuffled(kind, [(piece.where, piece) for piece in pieces])]
    for at in range(len(mixed) - GROUP + 1):
        yield f"{mixed[at].where}#group", tuple(mixed[at : at + GROUP])


def _shuffled(kind: Kind, pieces: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    found = list(pieces)
    random.Random(f"order of {kind.name}").shuffle(found)
    return found
