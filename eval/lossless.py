"""Certificate that drafters are lossless on a user's own target: greedy identity, and the sampled distribution.

    python -m eval.lossless --target T --draft runs/medusa runs/distill          # the same as ./launch.sh lossless

Greedy identity: at temperature 0 every row equals plain decoding by draftsmith's loop and by transformers' `generate`.
Where texts differ, the model's own forward separates a numeric tie from an error (eval/certificate/identity.py); tokens
after the first difference are not compared.

Sampled identity, with `--verifier coupled`: above temperature 0 too every row equals plain decoding by that verifier
with the same seed (eval/certificate/sampled_identity.py), in place of the tests below unless `--statistics` is given.

With `--batch-invariant` these two are exact: no difference between draftsmith's texts is a numeric tie, and the bits of
the logits by which their tokens were chosen must be equal too (eval/certificate/same_text.py), in any dtype.

Sampled distribution: a few prompts are continued many times (eval/certificate/sampled.py). The tokens are tested
against exact distributions, computed with transformers' own forward and warpers (eval/certificate/reference.py), with
three groupings (eval/certificate/chi_square.py). By prefix: rows with the same tokens so far are a group, whose next
tokens follow the distribution there. By rank: the number of tokens that are the likeliest, second likeliest, ... of
their distribution is as expected. By draft: tokens likely to be drafted, which a wrong verifier favours or avoids, come
as often as expected. The tests share the false-alarm probability by Bonferroni's rule, which holds if the settings,
including the seed, are chosen before the outcome is known.

The tests detect biases of the tested tokens, from about the size in the column "detectable bias": probability mass
that, shifted to the likeliest token at every position (by draft: to drafted tokens), fails the test with probability
0.9. They do not detect smaller biases, biases further on in a text, after other prompts or among tokens too rare for a
cell of their own, or dependence between rows that are each unbiased. Positions where rounding could change which tokens
top-k or top-p keep are not tested. A drafter whose drafted tokens are never probable gets no certificate for lack of
evidence; more rows may help.
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
from data.shards import hash_files, write_atomically
from draftsmith import Target
from draftsmith.artifacts.artifact import own_files, read_manifest
from draftsmith.artifacts.files import check_replaceable
from draftsmith.length.costs import num_threads
from eval import hardware
from eval.certificate.identity import FAILED, GreedySettings, compare_greedy
from eval.certificate.sampled import (
    EXTRA_TOKENS,
    GROUPINGS,
    TOO_FEW,
    SampledTestSettings,
    parse_sampling,
    sample_and_test,
)
from eval.certificate.sampled_identity import KIND as SAMPLED_IDENTITY
from eval.certificate.sampled_identity import compare_sampled
from eval.report.table import Style, grid, shorten

LOSSLESS, NOT_LOSSLESS, LOSSY, INCONCLUSIVE = (
    "lossless",
    "not lossless",
    "lossy by construction",
    "inconclusive, too few samples",
)
NAME = "lossless"
MARKER = f"{NAME}.json"
GREEDY_COLUMNS = ("drafter", "compared with", "dtype", "batch", "rows", "tokens", "ties", "errors", "verdict")
SAMPLED_COLUMNS = (
    "drafter",
    "sampling",
    "verifier",
    "tau",
    "grouped\nby",
    "tokens",
    "chi-square\n/ d.o.f.",
    "p-value",
    "detectable\nbias",
    "verdict",
)
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
    samplings = [parse_sampling(text) for text in settings.samplings]
    level = settings.false_alarm / (len(GROUPINGS) * len(artifacts) * len(samplings))
    exact = cache(lambda: load("float64"))
    exact_for = cache(lambda path: draftsmith.load(path, exact()).target)
    verifier = settings.verifier if settings.is_lossy else "auto"
    test_sampled = partial(
        sample_and_test, prompts=prompts[: settings.sampled_prompts], level=level, tie_tolerance=greedy.tie_tolerance
    )
    conditions: dict[str, Any] = {}
    greedy_tests, sampled_tests = [], []
    with num_threads(settings.threads), _progress(artifacts, len(prompts), settings, greedy) as bar:
        for dtype in dict.fromkeys([settings.sampled_dtype, *greedy.dtypes]):
            target = exact() if dtype == "float64" else load(dtype)
            drafters = {str(path): draftsmith.load(path, target) for path in artifacts}
            if dtype == settings.sampled_dtype:
                conditions = describe_conditions(target, artifacts, prompts) | {
                    "settings": asdict(settings) | asdict(greedy)
                }
                # A verifier that does not fit a drafter raises here, before the long tests.
                tested = itertools.product(drafters.values(), samplings) if settings.samples else ()
                for drafter, sampling in tested:
                    one_row = replace(settings, num_rows=1)
                    test_sampled(drafter.target, drafter, sampling, one_row, on_progress=lambda num_tokens: None)
            if dtype in greedy.dtypes:
                options = {"verifier": verifier, "on_progress": bar.update}
                coupled = samplings if settings.is_coupled else []
                of_sampled = partial(compare_sampled, seed=settings.seed, on_progress=bar.update)
                own = {name: drafter for name, drafter in drafters.items() if drafter.target is target}
                greedy_tests += compare_greedy(target, own, prompts, greedy, exact=exact, **options)
                for sampling in coupled:
                    greedy_tests += of_sampled(target, own, prompts, sampling, greedy, exact=exact)
                for name, drafter in drafters.items():
                    if drafter.target is not target:
                        # A drafter that fine-tunes its target is compared with plain decoding of the fine-tuned one.
                        alone, fine_tuned_by = {name: drafter}, f", fine-tuned by {Path(name).name}"
                        exact_of = partial(exact_for, name)
                        greedy_tests += compare_greedy(
                            drafter.target,
                            alone,
                            prompts,
                            greedy,
                            exact=exact_of,
                            fine_tuned_by=fine_tuned_by,
                            **options,
                        )
                        for sampling in coupled:
                            greedy_tests += of_sampled(
                                drafter.target,
                                alone,
                                prompts,
                                sampling,
                                greedy,
                                exact=exact_of,
                                fine_tuned_by=fine_tuned_by,
                            )
            if dtype == settings.sampled_dtype and settings.samples:
                for (name, drafter), sampling in itertools.product(drafters.items(), samplings):
                    sampled_tests += [
                        {"drafter": name, "tuned": drafter.target is not target} | test
                        for test in test_sampled(drafter.target, drafter, sampling, settings, on_progress=bar.update)
                    ]
    tests = sorted(greedy_tests, key=_title) + sampled_tests
    verdicts = {test["verdict"] for test in tests}
    verdict = NOT_LOSSLESS if FAILED in verdicts else INCONCLUSIVE if TOO_FEW in verdicts else LOSSLESS
    return {"verdict": LOSSY if settings.is_lossy else verdict} | conditions | {"tests": tests}


def _progress(
    artifacts: Sequence[Path], num_prompts: int, settings: SampledTestSettings, greedy: GreedySettings
) -> tqdm:
    num_fine_tuned = sum(read_manifest(path).get("tunes_target", False) for path in artifacts)
    num_decoders = len(artifacts) + 2 * (1 + num_fine_tuned)
    num_greedy = len(greedy.dtypes) * len(greedy.batch_sizes) * num_decoders * num_prompts
    if settings.is_coupled:
        num_greedy += num_greedy // num_decoders * (num_decoders - 1 - num_fine_tuned) * len(settings.samplings)
    num_sampled = len(artifacts) * len(settings.samplings) * settings.num_rows * settings.samples
    total = num_greedy * greedy.max_new_tokens + num_sampled * (settings.num_tokens + EXTRA_TOKENS)
    # Without a terminal each update of the progress bar is a new line.
    interval = 0.5 if sys.stderr.isatty() else 20
    return tqdm(total=total, desc="lossless", unit="token", unit_scale=True, mininterval=interval)


def describe_conditions(target: Target, artifacts: Sequence[Path], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Returns the conditions of the certificate: software, hardware, target, artifacts, prompts and command."""
    hashes = [hash_files(own_files(path)) for path in artifacts]
    return {
        "command": shlex.join(sys.orig_argv),
        "commit": hardware.commit(),
        "hardware": hardware.describe(target.device),
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
    """Returns the certificate as text: verdict, conditions, one table for each kind of test, and all differences."""
    target, versions, commit = certificate["target"], certificate["versions"], certificate["commit"] or "unknown"
    about = [
        f"target {target['name']}, fingerprint {target['fingerprint']}",
        f"on {certificate['hardware']}, {certificate['threads']} thread(s); commit {commit},"
        f" torch {versions['torch']}, transformers {versions['transformers']}",
        *(
            f"artifact {artifact['path']}, hash {artifact['hash']}{_fine_tuning_note(artifact)}"
            for artifact in certificate["artifacts"]
        ),
        f"command {certificate['command']}",
    ]
    is_markdown = style == "markdown"
    found = [f"{'# ' * is_markdown}Losslessness: {certificate['verdict']}", ""]
    found += [f"- {line}" if is_markdown else line for line in about]
    for title, tests in groupby(certificate["tests"], key=_title):
        rows = list(tests)
        columns, cells = (GREEDY_COLUMNS, _greedy_cells) if "ties" in rows[0] else (SAMPLED_COLUMNS, _sampled_cells)
        found += ["", f"{'## ' * is_markdown}{title.capitalize()}", "", *grid([columns, *map(cells, rows)], style)]
        found += [line for test in rows for line in _differences(test)]
    return [
        *found,
        "",
        "tokens: number compared or tested. chi-square / d.o.f.: by prefix, Fisher's combination of all positions.",
        "detectable bias: probability mass that, shifted to likely or drafted tokens, is detected 9 times in 10.",
    ]


def _title(test: dict[str, Any]) -> str:
    """Returns the title of the table that a test is in."""
    return f"{test['kind']}, {describe_sampling(test)}" if test["kind"] == SAMPLED_IDENTITY else test["kind"]


def _fine_tuning_note(artifact: dict[str, Any]) -> str:
    is_tuned = artifact["manifest"].get("tunes_target", False)
    return "; it fine-tunes its target and is tested with the fine-tuned one" if is_tuned else ""


def check_output(folder: Path) -> None:
    """Raises ValueError if `folder` is a file, or contains files but no certificate."""
    check_replaceable(folder, marker=MARKER)


def save(certificate: dict[str, Any], folder: Path) -> None:
    """Writes `lossless.json` and `lossless.md`, each atomically; raises ValueError as `check_output` does."""
    check_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(certificate, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / MARKER, lambda path: path.write_text(text))
    write_atomically(
        folder / f"{NAME}.md", lambda path: path.write_text("\n".join([*lines(certificate, "markdown"), ""]))
    )


def _greedy_cells(test: dict[str, Any]) -> list[str]:
    numbers = [test["batch_size"], test["num_rows"], test["num_samples"], len(test["ties"]), len(test["errors"])]
    return [shorten(test["drafter"], MAX_NAME), test["reference"], test["dtype"], *map(str, numbers), _verdict(test)]


def _sampled_cells(test: dict[str, Any]) -> list[str]:
    shift = test["detectable_shift"]
    return [
        shorten(test["drafter"], MAX_NAME),
        describe_sampling(test),
        test["verifier"],
        f"{test['tau']:.2f}",
        test["grouped_by"],
        f"{test['num_samples']:,}",
        f"{test['statistic']:.1f} / {test['degrees_of_freedom']}",
        f"{test['p_value']:.2g}",
        "-" if shift is None else f"{100 * shift:.1f}%",
        _verdict(test),
    ]


def describe_sampling(test: dict[str, Any]) -> str:
    """Returns the sampling settings of a test in words."""
    parts = [f"temperature {test['temperature']:g}"]
    parts += [f"top-p {test['top_p']:g}"] * (test["top_p"] < 1) + [f"top-k {test['top_k']}"] * (test["top_k"] > 0)
    return ", ".join(parts)


def _differences(test: dict[str, Any]) -> list[str]:
    """Returns a line for each numeric tie and each error of a greedy test."""
    found = []
    for difference in (*test.get("ties", ()), *test.get("errors", ())):
        gap = "other bits of logits" if difference.get("is_of_bits") else "one text ends earlier"
        if difference["gap"] is not None:
            gap = "gap {gap:.2g} ({gap_float64:.2g} in float64), tolerance {tolerance:.2g}".format(**difference)
        found.append(
            f"- {'numeric tie' if difference['is_tie'] else 'ERROR'}: {test['drafter']} and {test['reference']},"
            f" {test['dtype']}, batch {test['batch_size']}, prompt {difference['prompt']}, new token"
            f" {difference['position']}: {difference['tokens'][0]} and {difference['tokens'][1]}, {gap};"
            f" {difference['num_not_compared']} tokens not compared"
        )
    return ["", *found] if found else []


def _verdict(test: dict[str, Any]) -> str:
    return test["verdict"].upper() if test["verdict"] == "failed" else test["verdict"]


if __name__ == "__main__":
    # The command line is the recipe's: recipes may import the settings parser, eval may not.
    runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "lossless.py"), run_name="__main__")
