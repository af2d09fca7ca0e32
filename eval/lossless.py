"""Losslessness of a user's own target and drafters, shown on that target: greedy identity, and the sampled law.

    python -m eval.lossless --target T --draft runs/medusa runs/distill          # the same as ./launch.sh lossless

Greedy identity: at temperature 0 every row equals plain decoding by our loop and by transformers' own `generate`. Where
one does not, the model's own forward tells a numeric tie from an error (eval/certificate/identity.py); what follows either is not
compared.

The sampled law: many continuations of a few prompts are drawn (eval/certificate/sampled.py), and judged against the exact laws
before their tokens, as transformers' own forward and warpers give them (eval/certificate/reference.py), in three ways
(eval/certificate/chi_square.py). By prefix: rows that agree in everything so far are a group, whose next tokens follow the law
there. By rank: as many tokens are their law's likeliest, second, third or fourth, ... as the laws expect. By draft:
what was likely to be drafted comes as often as the laws say, as it is what a wrong verifier favours or shuns. The tests
share the chance of a false alarm by Bonferroni's rule, which holds for settings chosen before the outcome is known, the
seed included.

Seen are biases of the judged tokens, from about the size in the column "sees": a share of probability which, moved to
the likeliest token everywhere, or by draft to what is drafted, would be refused nine times in ten. Not seen are smaller
ones, those further on in a text, after other prompts or among tokens too rare for a cell of their own, and rows that
depend on each other without each being biased. Where rounding could move the edge of top-k or top-p nothing is judged.
A drafter whose drafts never have a chance gets no certificate for want of evidence; more rows may help.
"""

import itertools
import json
import platform
import runpy
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import draftsmith
from data.prompts import Prompt
from data.shards import hash_files, write_whole
from draftsmith import Target
from draftsmith.artifacts.artifact import own_files, read_manifest
from draftsmith.artifacts.files import check_replaceable
from draftsmith.length.costs import num_threads
from eval.bakeoff import machine
from eval.certificate.identity import FAILED, GreedySettings, compare_greedy
from eval.certificate.sampled import (
    EXTRA_TOKENS,
    GROUPINGS,
    TOO_FEW,
    SampledTestSettings,
    parse_sampling,
    sample_and_test,
)
from eval.report.table import Style, grid

LOSSLESS, NOT_LOSSLESS, LOSSY, INCONCLUSIVE = (
    "lossless",
    "not lossless",
    "lossy by construction",
    "too few samples to say",
)
NAME = "lossless"
MARKER = f"{NAME}.json"
GREEDY_COLUMNS = ("drafter", "compared with", "dtype", "batch", "rows", "tokens", "ties", "errors", "verdict")
LAW_COLUMNS = ("drafter", "law", "verifier", "tau", "by", "tokens", "chi-square", "p-value", "sees", "verdict")
MAX_NAME = 26


def certify(
    load: Callable[[str], Target],
    artifacts: Sequence[Path],
    prompts: Sequence[Prompt],
    settings: SampledTestSettings,
    greedy: GreedySettings,
) -> dict[str, Any]:
    """Returns the certificate of `artifacts` with the target that `load` loads as a given dtype.

    Raises ValueError for an artifact of another target, a verifier that does not fit its drafts, or too few prompts.
    """
    greedy.check_prompts(len(prompts))
    laws = [parse_sampling(law) for law in settings.laws]
    level = settings.false_alarm / (len(GROUPINGS) * len(artifacts) * len(laws))
    exact = cache(lambda: load("float64"))
    exact_for = cache(lambda path: draftsmith.load(path, exact()).target)
    verifier = settings.verifier if settings.is_lossy else "auto"
    draw = partial(
        sample_and_test, prompts=prompts[: settings.law_prompts], level=level, tie_tolerance=greedy.tie_tolerance
    )
    told: dict[str, Any] = {}
    tests, drawn = [], []
    with num_threads(settings.threads), _progress(artifacts, len(prompts), settings, greedy) as bar:
        for dtype in dict.fromkeys([settings.law_dtype, *greedy.dtypes]):
            target = exact() if dtype == "float64" else load(dtype)
            drafters = {str(path): draftsmith.load(path, target) for path in artifacts}
            if dtype == settings.law_dtype:
                told = facts(target, artifacts, prompts) | {"settings": asdict(settings) | asdict(greedy)}
                # What does not fit is refused before anything takes long.
                for drafter, law in itertools.product(drafters.values(), laws):
                    draw(
                        drafter.target, drafter, law, replace(settings, num_rows=1), on_progress=lambda num_tokens: None
                    )
            if dtype in greedy.dtypes:
                given = {"verifier": verifier, "on_progress": bar.update}
                own = {name: drafter for name, drafter in drafters.items() if drafter.target is target}
                tests += compare_greedy(target, own, prompts, greedy, exact=exact, **given)
                for name, drafter in drafters.items():
                    if drafter.target is not target:
                        # What has tuned its target is compared with that one, decoded plainly.
                        alone, tuned_by = {name: drafter}, f", tuned by {Path(name).name}"
                        exact_of = partial(exact_for, name)
                        tests += compare_greedy(
                            drafter.target, alone, prompts, greedy, exact=exact_of, tuned_by=tuned_by, **given
                        )
            if dtype == settings.law_dtype:
                for (name, drafter), law in itertools.product(drafters.items(), laws):
                    drawn += [
                        {"drafter": name, "tuned": drafter.target is not target} | test
                        for test in draw(drafter.target, drafter, law, settings, on_progress=bar.update)
                    ]
    verdicts = {test["verdict"] for test in tests + drawn}
    verdict = NOT_LOSSLESS if FAILED in verdicts else INCONCLUSIVE if TOO_FEW in verdicts else LOSSLESS
    return {"verdict": LOSSY if settings.is_lossy else verdict} | told | {"tests": tests + drawn}


def _progress(
    artifacts: Sequence[Path], num_prompts: int, settings: SampledTestSettings, greedy: GreedySettings
) -> tqdm:
    num_tuned = sum(read_manifest(path).get("tunes_target", False) for path in artifacts)
    num_decoders = len(artifacts) + 2 * (1 + num_tuned)
    num_greedy = len(greedy.dtypes) * len(greedy.batch_sizes) * num_decoders * num_prompts
    num_drawn = len(artifacts) * len(settings.laws) * settings.num_rows
    total = num_greedy * greedy.max_new_tokens + num_drawn * (settings.num_tokens + EXTRA_TOKENS)
    # Where there is no terminal every update is a line of its own.
    interval = 0.5 if sys.stderr.isatty() else 20
    return tqdm(total=total, desc="lossless", unit="token", unit_scale=True, mininterval=interval)


def facts(target: Target, artifacts: Sequence[Path], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Returns what the certificate holds for: software, hardware, target, artifacts, prompts, and the command."""
    hashes = [hash_files(own_files(path)) for path in artifacts]
    return {
        "command": shlex.join(sys.orig_argv),
        "commit": machine.commit(),
        "hardware": machine.hardware(target.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "draftsmith": draftsmith.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "target": {
            "name": target.name,
            "fingerprint": target.fingerprint,
            "tokenizer_hash": target.tokenizer_hash,
            "architecture": type(target.model).__name__,
        },
        "artifacts": [
            {"path": str(path), "hash": found, "manifest": read_manifest(path)}
            for path, found in zip(artifacts, hashes, strict=True)
        ],
        "prompts": [{"key": prompt.key, "source": prompt.source, "ids": prompt.ids} for prompt in prompts],
    }


def lines(certificate: dict[str, Any], style: Style) -> list[str]:
    """Returns the certificate as text: the verdict, what it holds for, one table for each kind of test, every tie."""
    told = certificate
    about = [
        f"target {told['target']['name']}, fingerprint {told['target']['fingerprint']}",
        f"on {told['hardware']}, {told['threads']} thread(s); commit {told['commit'] or 'unknown'}, torch"
        f" {told['versions']['torch']}, transformers {told['versions']['transformers']}",
        *(f"artifact {artifact['path']}, hash {artifact['hash']}{_tuned(artifact)}" for artifact in told["artifacts"]),
        f"command {told['command']}",
    ]
    is_markdown = style == "markdown"
    found = [f"{'# ' * is_markdown}Losslessness: {told['verdict']}", ""]
    found += [f"- {line}" if is_markdown else line for line in about]
    for kind, tests in groupby(told["tests"], key=lambda test: test["kind"]):
        rows = list(tests)
        columns, cells = (GREEDY_COLUMNS, _greedy_cells) if "ties" in rows[0] else (LAW_COLUMNS, _law_cells)
        found += ["", f"{'## ' * is_markdown}{kind.capitalize()}", "", *grid([columns, *map(cells, rows)], style)]
        found += [line for test in rows for line in _differences(test)]
    return [
        *found,
        "",
        "Tokens: compared or judged. Chi-square: over its degrees of freedom; by prefix, Fisher's of all positions.",
        "Sees: the share of probability that, moved to likely or to drafted tokens, would be refused 9 times in 10.",
    ]


def _tuned(artifact: dict[str, Any]) -> str:
    return "; it tunes its target, and is judged for the tuned one" * artifact["manifest"].get("tunes_target", False)


def check_output(folder: Path) -> None:
    """Raises ValueError if `folder` is a file, or holds something but no certificate."""
    check_replaceable(folder, marker=MARKER)


def save(certificate: dict[str, Any], folder: Path) -> None:
    """Writes `lossless.json` and `lossless.md`, each whole or not at all; raises ValueError as `check_output` does."""
    check_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(certificate, indent=1, allow_nan=False) + "\n"
    write_whole(folder / MARKER, lambda path: path.write_text(text))
    write_whole(folder / f"{NAME}.md", lambda path: path.write_text("\n".join([*lines(certificate, "markdown"), ""])))


def _greedy_cells(test: dict[str, Any]) -> list[str]:
    numbers = [test["batch_size"], test["num_rows"], test["num_samples"], len(test["ties"]), len(test["errors"])]
    return [_short(test["drafter"]), test["reference"], test["dtype"], *map(str, numbers), _verdict(test)]


def _law_cells(test: dict[str, Any]) -> list[str]:
    shift = test["sees_shift"]
    return [
        _short(test["drafter"]),
        describe_sampling(test),
        test["verifier"],
        f"{test['tau']:.2f}",
        test["judged_by"],
        f"{test['num_samples']:,}",
        f"{test['statistic']:.1f} / {test['degrees_of_freedom']}",
        f"{test['p_value']:.2g}",
        "-" if shift is None else f"{100 * shift:.1f} %",
        _verdict(test),
    ]


def describe_sampling(test: dict[str, Any]) -> str:
    """Returns a law in words."""
    parts = [f"temperature {test['temperature']:g}"]
    parts += [f"top-p {test['top_p']:g}"] * (test["top_p"] < 1) + [f"top-k {test['top_k']}"] * (test["top_k"] > 0)
    return ", ".join(parts)


def _differences(test: dict[str, Any]) -> list[str]:
    """Returns a line for each numeric tie and each error of a greedy test."""
    told = []
    for difference in (*test.get("ties", ()), *test.get("errors", ())):
        gap = "where one text ends"
        if difference["gap"] is not None:
            gap = "gap {gap:.2g} ({gap_float64:.2g} in float64), tolerance {tolerance:.2g}".format(**difference)
        told.append(
            f"- {'numeric tie' if difference['is_tie'] else 'ERROR'}: {test['drafter']} and {test['reference']},"
            f" {test['dtype']}, batch {test['batch_size']}, prompt {difference['prompt']}, new token"
            f" {difference['position']}: {difference['tokens'][0]} and {difference['tokens'][1]}, {gap};"
            f" {difference['num_not_compared']} tokens not compared"
        )
    return ["", *told] if told else []


def _verdict(test: dict[str, Any]) -> str:
    return test["verdict"].upper() if test["verdict"] == "failed" else test["verdict"]


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else "..." + name[3 - MAX_NAME :]


if __name__ == "__main__":
    # The command line is the recipe's, which may import what reads settings.
    runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "lossless.py"), run_name="__main__")
