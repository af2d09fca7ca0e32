"""Drafters inside llama.cpp: tokens/s plain and drafted, beside draftsmith's own loop, and the costs that bound both.

    ./launch.sh serving-test --engine llama.cpp                 # once: makes .venv-llamacpp
    .venv/bin/python benchmarks/llama_cpp.py --drafts runs/smollm2/bakeoff/eagle3 runs/smollm2/bakeoff/ngram
    .venv/bin/python benchmarks/llama_cpp.py --drafts D1 D2 --kinds original q8_0 q4_0 f32 --data spec_bench.jsonl \
        --num-prompts 40 --max-new-tokens 128 --rounds 5        # a long run

Every drafter is exported and run by llama.cpp on each of the target's files, beside plain decoding and llama.cpp's own
`ngram-simple` and `ngram-mod`; draftsmith's loop and transformers decode the same prompts in torch, on as many threads.
All take turns in every round. Tokens/s count what comes after a text's first token, which is the prompt's work. The
texts of llama.cpp are compared with its plain decoding of the same file. The machine must be quiet.

For each file it prints the time of a forward of k tokens as a multiple of that of one, v(k). A draft of k tokens that
are each accepted with probability a, and cost c forwards each, gives (1 - a^(k+1)) / (1 - a) tokens for v(k+1) + k c
forwards: the line shows the a at which the best k reaches 1.3, and what is reached if all are accepted.

Results: docs/serving.md.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draftsmith
from draftsmith import Target
from draftsmith.drafters import lookup
from draftsmith.export import export
from draftsmith.export.launch import read_launch
from draftsmith.length.costs import num_threads
from eval.doctor import llama_cpp
from eval.engine_rates import (
    PLAIN,
    Measured,
    Method,
    RateSettings,
    load_drafters,
    method_name,
    own_methods,
    print_table,
    read_prompts,
    take_turns,
)
from trainers.training import launchers
from trainers.training.settings import parse_settings

ENGINE = "llama.cpp"
ORIGINAL = "original"
"""The GGUF file that the target comes from."""
BATCH_SIZES = (1, 2, 3, 4, 5, 6, 8)
GOAL = 1.3
OWN: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "ngram-simple": {"spec-type": "ngram-simple"},
    "ngram-mod": {"spec-type": "ngram-mod"},
}
"""llama.cpp without a drafter, and with look-ups of its own at their default settings."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(RateSettings):
    """What is decoded, and the target's files in llama.cpp."""

    kinds: tuple[str, ...] = (ORIGINAL, "q8_0")
    """The target's files: `original` is the GGUF file that it comes from, others are written in that type."""
    quantise: str = "q8_0"
    """Type of the drafters' matrices."""
    num_draft: int = 0
    """Tokens per draft in llama.cpp; 0 for each drafter's own number."""
    python: str = ".venv-llamacpp/bin/python"
    """Interpreter with xllamacpp."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kinds:
            raise ValueError(f"kinds names none; name {ORIGINAL} or a type of GGUF files")


def main(run: BenchmarkSettings) -> None:
    llama_cpp.ENVIRONMENT.check(run.python)
    prompts = read_prompts(run)
    with tempfile.TemporaryDirectory() as name, num_threads(run.threads):
        folder = Path(name)
        target = Target.from_pretrained(run.target, dtype=run.dtype, device="cpu")
        targets, settings = exports(run, target, folder)
        for kind, target_file in targets.items():
            print_costs(run, kind, target_file, prompts[:1], folder)
        methods = own_methods(run, target, load_drafters(run, target), prompts)
        for kind, target_file in targets.items():
            for drafter, flags in settings.items():
                methods[method_name(f"{ENGINE} {kind}", drafter)] = served(run, target_file, flags, prompts, folder)
        found = take_turns(methods, run.rounds)
    print_table(run, found, lambda engine: engine.startswith(ENGINE))


def exports(run: BenchmarkSettings, target: Target, folder: Path) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """Returns the target's files by kind, and the settings of every method; drafters are written once for all files."""
    draftsmith.save(lookup.Drafter(lookup.Config(), target), folder / "own", target)
    targets = {}
    for kind in run.kinds:
        quantise_target = "" if kind == ORIGINAL else kind
        launch = read_launch(export(folder / "own", ENGINE, folder / kind, quantise_target=quantise_target))
        targets[kind] = Path(launch["target"])
    methods, given = dict(OWN), str(targets[run.kinds[0]])
    for draft in run.drafts:
        name = Path(draft).resolve().name
        has_weights = (Path(draft) / "model.safetensors").is_file()
        options = {"target_name": given, "quantise": run.quantise if has_weights else ""}
        settings = read_launch(export(draft, ENGINE, folder / f"draft-{name}", run.target, **options))["settings"]
        if run.num_draft and "spec-draft-n-max" in settings:
            settings["spec-draft-n-max"] = run.num_draft
        methods[name] = settings
    return targets, methods


def print_costs(
    run: BenchmarkSettings, kind: str, target_file: Path, prompts: Sequence[list[int]], folder: Path
) -> None:
    """Prints the costs of forwards of one file of the target, and what drafts can gain at these costs."""
    options = {"num_threads": run.threads, "batch_sizes": BATCH_SIZES}
    seconds = llama_cpp.run(run.python, target_file, prompts, 2, folder / f"costs-{kind}", **options)["batch_s"]
    forward_s = {int(size): one for size, one in seconds.items()}
    costs = {size: one / forward_s[1] for size, one in forward_s.items()}
    print(f"\n{run.target} {kind} ({target_file.stat().st_size / 1e6:.0f} MB), {1e3 * forward_s[1]:.1f} ms a token")
    print("v(k): " + ", ".join(f"{size}: {cost:.2f}" for size, cost in costs.items()))
    print(describe_bound(costs))


def served(
    run: BenchmarkSettings, target_file: Path, flags: dict[str, Any], prompts: Sequence[list[int]], folder: Path
) -> Method:
    """Returns llama.cpp with these flags of `llama-server` on one file of the target."""

    def method() -> Measured:
        launch = {"settings": flags} if flags else None
        path = Path(tempfile.mkdtemp(dir=folder)) / "run"
        options = {"num_threads": run.threads, "is_exact": False, "is_timed": True}
        response = llama_cpp.run(run.python, target_file, prompts, run.max_new_tokens, path, launch, **options)
        counts = llama_cpp.counts_of(response)
        num_accepted = sum(counts.accepted)
        return Measured(
            texts=counts.texts,
            seconds=sum(answer["wall_s"] for answer in response["answers"]),
            num_accepted=num_accepted,
            num_rounds=sum(len(text) - 1 for text in counts.texts) - num_accepted,
        )

    return method


def describe_bound(costs: dict[int, float]) -> str:
    """Returns the acceptance at which free drafts of the best length reach `GOAL`, and the gain if all are accepted."""
    lengths = [size - 1 for size in costs if size > 1]
    best = max((length + 1) / costs[length + 1] for length in lengths)
    for percent in range(101):
        share = percent / 100
        expected = {length: sum(share**depth for depth in range(length + 1)) for length in lengths}
        speeds = {length: expected[length] / costs[length + 1] for length in lengths}
        length = max(speeds, key=lambda one: speeds[one])
        if speeds[length] >= GOAL:
            return (
                f"free drafts reach {GOAL} at an acceptance of {share:.2f} a token ({length} tokens), {best:.2f} at 1"
            )
    return f"even free drafts that are all accepted reach {best:.2f} only"


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(BenchmarkSettings, description=__doc__))
