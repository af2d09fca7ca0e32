"""Drafters inside llama.cpp: tokens/s plain and drafted, acceptance, and the costs that bound the speed-up.

    ./launch.sh serving-test --engine llama.cpp                 # once: makes .venv-llamacpp
    .venv/bin/python benchmarks/llama_cpp.py --drafts runs/smollm2/bakeoff/eagle3 runs/smollm2/bakeoff/ngram
    .venv/bin/python benchmarks/llama_cpp.py --drafts D1 D2 --kinds original q8_0 q4_0 f32 --data spec_bench.jsonl \
        --num-prompts 40 --max-new-tokens 128 --rounds 5        # a long run; wants a quiet machine

Every drafter is exported and run by llama.cpp on each of the target's files, beside plain decoding and llama.cpp's own
`ngram-simple` and `ngram-mod`, which take turns in every round. Speed-ups are ratios of CPU time after the first token,
one thread, so that other work on the machine counts little; tokens/s are of that CPU time too. Texts must be plain
decoding's, token for token, or the share of equal ones is shown.

For each file it prints the time of a forward of k tokens as a multiple of that of one, v(k). A draft of k tokens that
are each accepted with probability a, and cost c forwards each, gives (1 - a^(k+1)) / (1 - a) tokens for v(k+1) + k c
forwards: the table shows the a at which the best k reaches 1.3, and what is reached if all are accepted.

Results: docs/serving.md.
"""

import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import draftsmith
from data.prompts import load_prompts
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.drafters import lookup
from draftsmith.export import export
from draftsmith.export.launch import read_launch
from draftsmith.loading.model_info import read_target_info
from eval.doctor import llama_cpp
from trainers.training import launchers
from trainers.training.settings import parse_settings

ORIGINAL = "original"
"""The GGUF file that the target comes from."""
BATCH_SIZES = (1, 2, 3, 4, 5, 6, 8)
GOAL = 1.3
OWN: dict[str, dict[str, Any]] = {
    "plain": {},
    "ngram-simple": {"spec-type": "ngram-simple"},
    "ngram-mod": {"spec-type": "ngram-mod"},
}
"""llama.cpp without a drafter, and with look-ups of its own at their default settings."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """The target, the drafters and the texts."""

    target: str = "smollm2"
    """A transformers folder, GGUF file or named target."""
    drafts: tuple[str, ...] = ()
    """Artifacts of drafters for it."""
    kinds: tuple[str, ...] = (ORIGINAL, "q8_0")
    """The target's files: `original` is the GGUF file that it comes from, others are written in that type."""
    quantise: str = "q8_0"
    """Type of the drafters' matrices."""
    num_draft: int = 0
    """Tokens per draft; 0 for each drafter's own number."""
    data: str = "python-questions"
    """Source of the prompts."""
    num_prompts: int = 4
    """Prompts decoded in every round."""
    max_new_tokens: int = 64
    """New tokens per prompt."""
    rounds: int = 2
    """Number of times that all methods decode all prompts."""
    python: str = field(default=".venv-llamacpp/bin/python")
    """Interpreter with xllamacpp."""

    def __post_init__(self) -> None:
        if not self.kinds or self.num_prompts < 1 or self.rounds < 1 or self.max_new_tokens < 2:
            raise ValueError("kinds, num_prompts and rounds must name at least one, max_new_tokens at least 2")


def main(run: BenchmarkSettings) -> None:
    llama_cpp.ENVIRONMENT.check(run.python)
    for draft in run.drafts:
        read_manifest(draft)
    info = read_target_info(run.target)
    prompts = [
        prompt.ids
        for prompt in load_prompts(run.data, info.tokenizer, max_prompts=run.num_prompts, even_categories=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        targets, methods = exports(run, Path(folder))
        for kind, target_file in targets.items():
            measure(run, kind, target_file, methods, prompts, Path(folder) / f"runs-{kind}")


def measure(
    run: BenchmarkSettings,
    kind: str,
    target_file: Path,
    methods: dict[str, dict[str, Any]],
    prompts: list[list[int]],
    folder: Path,
) -> None:
    """Prints the costs of one file of the target, and a row for each method."""
    folder.mkdir()
    options = {"is_exact": False, "is_timed": True}
    costs = llama_cpp.run(run.python, target_file, prompts[:1], 2, folder / "costs", batch_sizes=BATCH_SIZES)
    forward_s = {int(size): seconds for size, seconds in costs["batch_cpu_s"].items()}
    print(f"\n{run.target} {kind} ({target_file.stat().st_size / 1e6:.0f} MB), {len(prompts)} prompts of {run.data}")
    print("v(k): " + ", ".join(f"{size}: {seconds / forward_s[1]:.2f}" for size, seconds in forward_s.items()))
    print(describe_bound({size: seconds / forward_s[1] for size, seconds in forward_s.items()}, 0.0))
    print("| drafter | tokens/s | speed-up | accepted a round | accepted of drafted | equal texts |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number in range(run.rounds):
        for name, settings in methods.items():
            launch = {"settings": settings} if settings else None
            path = folder / f"{name}-{number}"
            found[name].append(
                llama_cpp.run(run.python, target_file, prompts, run.max_new_tokens, path, launch, **options)
            )
    plain = found["plain"]
    for name, responses in found.items():
        seconds = [sum(answer["cpu_s"] for answer in one["answers"]) for one in responses]
        ratios = [
            sum(answer["cpu_s"] for answer in other["answers"]) / own for other, own in zip(plain, seconds, strict=True)
        ]
        counts = llama_cpp.counts_of(responses[0])
        expected = [answer["text"] for answer in plain[0]["answers"]]
        num_new = sum(len(text) - 1 for text in counts.texts)
        same = sum(one == other for one, other in zip(counts.texts, expected, strict=True))
        drafted = f"{sum(counts.accepted) / counts.num_drafted:.2f}" if counts.num_drafted else ""
        print(
            f"| {name} | {num_new / median(seconds):.1f} | {median(ratios):.2f} ({min(ratios):.2f} to"
            f" {max(ratios):.2f}) | {counts.per_draft:.2f} | {drafted} | {same} of {len(expected)} |"
        )


def exports(run: BenchmarkSettings, folder: Path) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """Returns the target's files by kind, and the settings of every method; drafters are written once for all files."""
    target = Target.from_pretrained(run.target)
    draftsmith.save(lookup.Drafter(lookup.Config(), target), folder / "own", target)
    targets = {}
    for kind in run.kinds:
        quantise_target = "" if kind == ORIGINAL else kind
        launch = read_launch(export(folder / "own", "llama.cpp", folder / kind, quantise_target=quantise_target))
        targets[kind] = Path(launch["target"])
    methods, given = dict(OWN), str(targets[run.kinds[0]])
    for draft in run.drafts:
        name = Path(draft).resolve().name
        has_weights = (Path(draft) / "model.safetensors").is_file()
        options = {"target_name": given, "quantise": run.quantise if has_weights else ""}
        settings = read_launch(export(draft, "llama.cpp", folder / f"draft-{name}", run.target, **options))["settings"]
        if run.num_draft and "spec-draft-n-max" in settings:
            settings["spec-draft-n-max"] = run.num_draft
        methods[name] = settings
    return targets, methods


def describe_bound(costs: dict[int, float], draft_cost: float) -> str:
    """Returns the acceptance at which drafts of the best length reach `GOAL`, and the speed-up if all are accepted."""
    lengths = [size - 1 for size in costs if size > 1]
    best = max((length + 1) / (costs[length + 1] + length * draft_cost) for length in lengths)
    for percent in range(101):
        share = percent / 100
        expected = {length: sum(share**depth for depth in range(length + 1)) for length in lengths}
        speeds = {length: expected[length] / (costs[length + 1] + length * draft_cost) for length in lengths}
        length = max(speeds, key=lambda one: speeds[one])
        if speeds[length] >= GOAL:
            return (
                f"free drafts reach {GOAL} at an acceptance of {share:.2f} a token ({length} tokens), {best:.2f} at 1"
            )
    return f"even free drafts that are all accepted reach {best:.2f} only"


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(BenchmarkSettings, description=__doc__))
