"""Decodes every architecture of the installed transformers in every way, and writes the table docs/architectures.md.

python -m eval.architectures                      # half an hour on one core
python -m eval.architectures --only llama t5      # prints these alone
"""

import argparse
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from eval.architectures.check import CRASH, IDENTICAL, QUICK, REFUSED, UNSUPPORTED, WHOLE, WRONG, Outcome, check
from eval.architectures.models import Variant, tiny_model, variants

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
MAX_PARAMETERS = 20_000_000
"""Larger models have parts that their configuration cannot make small, such as an encoder of sound."""
NOT_BUILT = "not built"
WAYS = {
    "plain": ("plain",),
    "look-up, draft LM": ("lookup", "chain", "draft LM"),
    "trees": ("tree",),
    "Medusa": ("medusa",),
    "early exit": ("early exit", "early exit tree"),
    "LayerSkip": ("layerskip",),
    "training": ("training pass",),
    "saved folder": ("folder",),
}
"""Columns of the table, and the ways of decoding that each stands for."""
ORDER = (CRASH, WRONG, REFUSED, IDENTICAL)
INTRODUCTION = """# Architectures

Every causal and encoder-decoder architecture of transformers {version}, built tiny with random weights and decoded by
`python -m eval.architectures{flags}`. `yes`: the text is the model's own, for one prompt and for prompts of unequal
lengths in a batch; `alone`: for one prompt at a time; `-`: refused in a sentence. A `+name` is a switch of the
architecture's configuration. What is not supported is named with its reason below the table.

{summary}
"""


def outcomes_of(variant: Variant, *, is_quick: bool) -> dict[str, Outcome]:
    """Returns the outcome of each way of decoding a variant."""
    try:
        model = tiny_model(variant)
    except Exception as error:  # a package that is missing, or a configuration that has no small form
        return {"target": Outcome(verdict=NOT_BUILT, detail=f"{type(error).__name__}: {str(error).splitlines()[0]}")}
    if sum(weight.numel() for weight in model.parameters()) > MAX_PARAMETERS:
        return {"target": Outcome(verdict=NOT_BUILT, detail="some part of it has no small form")}
    try:
        return check(model, QUICK if is_quick else WHOLE)
    except Exception as error:  # the reference itself: the model's own forward
        return {"target": Outcome(verdict=NOT_BUILT, detail=f"its own forward fails with {type(error).__name__}")}


def verdict_of(outcomes: dict[str, Outcome]) -> str:
    """Returns the worst verdict of a variant, identical where nothing but refusals differs."""
    verdicts = {outcome.verdict for outcome in outcomes.values()}
    return next((verdict for verdict in (CRASH, WRONG, NOT_BUILT, UNSUPPORTED) if verdict in verdicts), IDENTICAL)


def document(found: dict[str, dict[str, Outcome]], *, is_quick: bool) -> str:
    """Returns the document."""
    counts = Counter(map(verdict_of, found.values()))
    summary = f"{len(found)} variants: " + ", ".join(f"{number} {verdict}" for verdict, number in counts.most_common())
    flags = " --quick" if is_quick else ""
    lines = [INTRODUCTION.format(version=transformers.__version__, flags=flags, summary=summary + ".")]
    lines += ["| architecture | " + " | ".join(WAYS) + " |", "| --- |" + " --- |" * len(WAYS)]
    rest = []
    for name, outcomes in found.items():
        if "target" in outcomes:
            rest.append(f"- `{name}`: {outcomes['target'].verdict}; {outcomes['target'].detail}")
            continue
        cells = []
        for ways in WAYS.values():
            verdicts = {outcomes[way].verdict for way in ways if way in outcomes} or {outcomes["plain"].verdict}
            worst = next(verdict for verdict in ORDER if verdict in verdicts)
            yes = "alone" if "ragged" in outcomes else "yes"
            cells.append({IDENTICAL: yes, REFUSED: "-"}.get(worst, worst))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "## Not supported or not built", "", *rest, ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.architectures", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="names of variants, printed and not written")
    parser.add_argument("--quick", action="store_true", help="shorter prompts and texts")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    chosen = [variant for variant in variants() if not given.only or variant.name in given.only]
    if unknown := set(given.only) - {variant.name for variant in chosen}:
        parser.error(f"unknown variants: {', '.join(sorted(unknown))}")
    found = {variant.name: outcomes_of(variant, is_quick=given.quick) for variant in tqdm(chosen, unit="variant")}
    text = document(found, is_quick=given.quick)
    if given.only:
        print(text)
        for name, outcomes in found.items():
            for way, outcome in outcomes.items():
                if outcome.detail:
                    print(f"{name}, {way}: {outcome.verdict}: {outcome.detail}")
    else:
        DOCUMENT.write_text(text)
        print(f"Written: {DOCUMENT}")


if __name__ == "__main__":
    main()
