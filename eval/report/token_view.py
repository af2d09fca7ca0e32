"""Annotates the tokens recorded by eval/report/recorded_texts.py: which part of the system produced each one.

The page marks the kinds by underlining, weight and slant as well as by colour. The arrow keys move between tokens, and
the page's script shows the note of the current one.
"""

from collections.abc import Iterator, Sequence
from typing import Any

ACCEPTED, CORRECTED, BONUS, PLAIN = "accepted", "corrected", "own", "alone"
KINDS = {
    ACCEPTED: "drafted, and accepted by the target",
    CORRECTED: "the target's correction of a rejected draft token",
    BONUS: "the target's bonus token after a fully accepted draft",
    PLAIN: "the target's token in a step without a draft",
}
"""CSS class of each kind of token, and its meaning."""


def annotated_texts(texts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns every text with each drafter's annotated tokens, drafters with most tokens per step first."""
    return [
        {
            "number": number,
            "category": text["category"],
            "prompt": text["prompt"],
            "drafters": sorted(
                (
                    {
                        "name": name,
                        "tau": _tau(steps),
                        "num_steps": len(steps),
                        "tokens": [token for at, step in enumerate(steps, start=1) for token in _tokens(at, step)],
                    }
                    for name, steps in text["steps"].items()
                ),
                key=lambda drafter: -drafter["tau"],
            ),
        }
        for number, text in enumerate(texts, start=1)
    ]


def _tau(steps: Sequence[dict[str, Any]]) -> float:
    num_tokens = sum(len(step["accepted"]) + (step["own"] is not None) for step in steps)
    return num_tokens / max(len(steps), 1)


def _tokens(number: int, step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the tokens of step `number`, each with its kind, its note and the draft tokens rejected in its place."""
    suffix = f"(step {number}, {step['num_drafted']} drafted)" if step["num_drafted"] else f"(step {number})"
    for depth, piece in enumerate(step["accepted"], start=1):
        note = f"{_quoted(piece)} - depth {depth}: {KINDS[ACCEPTED]} {suffix}"
        yield {"text": piece, "kind": ACCEPTED, "note": note, "is_first": depth == 1, "rejected": None}
    if step["own"] is not None:
        rejected, piece = step["rejected"], step["own"]
        kind = CORRECTED if rejected else BONUS if step["num_drafted"] else PLAIN
        drafted = f"; drafted: {' or '.join(map(_quoted, rejected))}" if rejected else ""
        note = f"{_quoted(piece)} - {KINDS[kind]}{drafted} {suffix}"
        struck = " | ".join(rejected) if rejected else None
        yield {"text": piece, "kind": kind, "note": note, "is_first": not step["accepted"], "rejected": struck}


def _quoted(piece: str) -> str:
    """Returns a token quoted, so that its spaces and line ends are visible."""
    return repr(piece) if piece else "part of a character"
