"""Texts written down by eval/report/recorded_texts.py as HTML: who wrote each token, told by marks as well as by colours.

Tokens are reached by the arrow keys; what is known of one is in its `data-note`, which the page's script shows.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

ACCEPTED, CORRECTED, OWN, ALONE = "accepted", "corrected", "own", "alone"
KINDS = {
    ACCEPTED: "drafted, and accepted by the target",
    CORRECTED: "the target's, where it rejected what was drafted",
    OWN: "the target's, after a draft that was accepted whole",
    ALONE: "the target's, nothing being drafted",
}
NUM_OPEN = 3
LINE_END = '<span class="end" aria-hidden="true">&#8629;</span>\n'


def token_view(texts: Sequence[dict[str, Any]]) -> str:
    """Returns every text as each drafter came to write it, those with most tokens a step first."""
    parts = [_legend()]
    for number, text in enumerate(texts, start=1):
        category = f" ({escape(text['category'])})" if text["category"] else ""
        parts.append(f"<article><h3>Text {number}{category}</h3>")
        parts.append(
            f"<details><summary>The prompt</summary><pre class='text'>{escape(text['prompt'])}</pre></details>"
        )
        by_tau = sorted(text["steps"].items(), key=lambda item: -_tau(item[1]))
        parts += [
            _written(name, steps, label=f"text {number} by {name}", is_open=place < NUM_OPEN)
            for place, (name, steps) in enumerate(by_tau)
        ]
        parts.append("</article>")
    return "\n".join(parts)


def _legend() -> str:
    samples = "".join(f'<li><span class="token {kind}">token</span> {told}</li>' for kind, told in KINDS.items())
    return (
        f'<ul class="legend">{samples}<li><span class="first token own">|</span> a step begins</li></ul>'
        '<p><label><input type="checkbox" id="show-rejected"> Show what was drafted where the target wrote'
        " something else</label></p><p>Tab leads to a text, the arrow keys from token to token; Escape closes the"
        " note.</p>"
    )


def _tau(steps: Sequence[dict[str, Any]]) -> float:
    num_tokens = sum(len(step["accepted"]) + (step["own"] is not None) for step in steps)
    return num_tokens / max(len(steps), 1)


def _written(name: str, steps: Sequence[dict[str, Any]], *, label: str, is_open: bool) -> str:
    tokens = [token for number, step in enumerate(steps, start=1) for token in _tokens(number, step)]
    if tokens:
        tokens[0] = tokens[0].replace('tabindex="-1"', 'tabindex="0"', 1)
    summary = f"{escape(name)}: {_tau(steps):.2f} tokens a step, {len(steps)} steps"
    return (
        f"<details{' open' if is_open else ''}><summary>{summary}</summary>"
        f'<pre class="text tokens" role="group" aria-label="{escape(label)}">{"".join(tokens)}</pre></details>'
    )


def _tokens(number: int, step: dict[str, Any]) -> list[str]:
    """Returns a step's tokens, each with what is to be said of it."""
    drafted = f"step {number}, {step['num_drafted']} drafted" if step["num_drafted"] else f"step {number}"
    found = [
        (piece, ACCEPTED, f"depth {depth}: {KINDS[ACCEPTED]}") for depth, piece in enumerate(step["accepted"], start=1)
    ]
    rejected = step["rejected"]
    if step["own"] is not None:
        kind = CORRECTED if rejected else OWN if step["num_drafted"] else ALONE
        told = KINDS[kind]
        if rejected:
            told += f"; drafted was {' or '.join(_quoted(piece) for piece in rejected)}"
        found.append((step["own"], kind, told))
    tokens = []
    for place, (piece, kind, told) in enumerate(found):
        if kind == CORRECTED:
            tokens.append(f'<del class="rejected">{_shown(" | ".join(rejected))}</del>')
        note = escape(f"{_quoted(piece)} - {told} ({drafted})")
        begins = " first" if place == 0 else ""
        tokens.append(f'<span class="token {kind}{begins}" tabindex="-1" data-note="{note}">{_shown(piece)}</span>')
    return tokens


def _quoted(piece: str) -> str:
    """Returns a token so that its spaces and line ends can be read."""
    return repr(piece) if piece else "part of a character"


def _shown(piece: str) -> str:
    """Returns a token's text; line ends, which could bear no mark, are shown."""
    return escape(piece or "\u25af").replace("\n", LINE_END)
