"""Drafters inside OpenVINO GenAI: tokens/s plain and drafted, beside draftsmith's own loop and transformers.

    ./launch.sh serving-test --engine openvino                  # once: makes .venv-openvino
    .venv/bin/python benchmarks/openvino.py                     # plain decoding and look-up
    .venv/bin/python benchmarks/openvino.py --drafts runs/distill --num-prompts 20 --rounds 5

The target and every drafter are converted in each of `--formats`. In fp32 OpenVINO computes and keeps keys and values
in float32, as torch does here, and texts must be equal; other formats run with OpenVINO's own settings (keys and values
in 8 bits, bfloat16 where the CPU has it), and their texts are compared with plain decoding in the same format. All
methods take turns in every round. Tokens/s count what comes after a text's first token, which is the prompt's work. The
machine must be quiet.

Results: docs/serving.md.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import draftsmith
from data.prompts import load_prompts
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.drafters import lookup
from draftsmith.export import export
from draftsmith.export.launch import read_launch
from draftsmith.export.openvino import FORMATS
from draftsmith.length.costs import num_threads
from draftsmith.loading.model_info import read_target_info
from eval.doctor import openvino
from trainers.training import launchers
from trainers.training.settings import parse_settings

EXACT = "fp32"
Method = Callable[[], "Measured"]


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """The target, the drafters and the texts."""

    target: str = "smollm2"
    """A transformers folder, GGUF file or named target."""
    drafts: tuple[str, ...] = ()
    """Artifacts of drafters for it."""
    formats: tuple[str, ...] = (EXACT,)
    """Formats of the weights in OpenVINO: fp32, fp16, int8 or int4."""
    dtype: str = "float32"
    """Dtype of the target in torch."""
    num_draft: int = 4
    """Tokens per draft of the look-up."""
    data: str = "python-questions"
    """Source of the prompts."""
    num_prompts: int = 4
    """Prompts decoded in every round."""
    max_new_tokens: int = 64
    """New tokens per prompt."""
    rounds: int = 2
    """Number of times that all methods decode all prompts."""
    threads: int = 1
    """CPU threads."""
    python: str = ".venv-openvino/bin/python"
    """Interpreter with OpenVINO GenAI and optimum-intel."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.formats) - set(FORMATS)):
            raise ValueError(f"formats has {unknown[0]!r}; there are {', '.join(FORMATS)}")
        if not self.formats or self.num_prompts < 1 or self.rounds < 1 or self.max_new_tokens < 2:
            raise ValueError("formats, num_prompts and rounds must name at least one, max_new_tokens at least 2")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one method wrote in one round."""

    texts: list[list[int]]
    seconds: float
    """Time after the first token of each text."""
    num_accepted: int
    num_rounds: int


def main(run: BenchmarkSettings) -> None:
    openvino.ENVIRONMENT.check(run.python)
    for draft in run.drafts:
        read_manifest(draft)
    info = read_target_info(run.target)
    prompts = [
        prompt.ids
        for prompt in load_prompts(run.data, info.tokenizer, max_prompts=run.num_prompts, even_categories=True)
    ]
    with tempfile.TemporaryDirectory() as folder, num_threads(run.threads):
        target = Target.from_pretrained(run.target, dtype=run.dtype, device="cpu")
        drafters = {"look-up": lookup.Drafter(lookup.Config(num_draft=run.num_draft, earliest=True), target)}
        drafters |= {Path(draft).resolve().name: draftsmith.load(draft, target) for draft in run.drafts}
        methods = own_methods(run, target, drafters, prompts)
        methods |= openvino_methods(run, target, drafters, prompts, Path(folder))
        found: dict[str, list[Measured]] = defaultdict(list)
        for _ in range(run.rounds):
            for name, method in methods.items():
                found[name].append(method())
    print_table(run, found)


def own_methods(
    run: BenchmarkSettings, target: Target, drafters: dict[str, Any], prompts: list[list[int]]
) -> dict[str, Method]:
    """Returns plain decoding by transformers, and draftsmith's loop without a drafter and with each."""

    def transformers(num_new: int, prompt: list[int]) -> tuple[list[int], int]:
        ids = torch.tensor([prompt])
        never = target.vocab_size  # an id that no text contains, so that no text ends early
        options = {"max_new_tokens": num_new, "eos_token_id": never, "pad_token_id": 0, "do_sample": False}
        out = target.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return out[0, len(prompt) :].tolist(), num_new

    def loop(drafter: Any) -> Callable[[int, list[int]], tuple[list[int], int]]:
        def decode(num_new: int, prompt: list[int]) -> tuple[list[int], int]:
            out = draftsmith.generate(target, [prompt], drafter, max_new_tokens=num_new, eos_token_id=[])
            return out.sequences[0, len(prompt) :].tolist(), out.stats.steps

        return decode

    decoders = {"transformers, plain": transformers, "draftsmith, plain": loop(None)}
    decoders |= {f"draftsmith, {name}": loop(drafter) for name, drafter in drafters.items()}
    return {name: _timed(run, decode, prompts) for name, decode in decoders.items()}


def _timed(
    run: BenchmarkSettings, decode: Callable[[int, list[int]], tuple[list[int], int]], prompts: list[list[int]]
) -> Method:
    def method() -> Measured:
        texts, seconds, num_rounds = [], 0.0, 0
        for prompt in prompts:
            for num_new, sign in ((1, -1), (run.max_new_tokens, 1)):
                before_s = time.perf_counter()
                text, steps = decode(num_new, prompt)
                seconds += sign * (time.perf_counter() - before_s)
            texts.append(text)
            num_rounds += steps - 1
        num_accepted = sum(map(len, texts)) - len(texts) - num_rounds
        return Measured(texts=texts, seconds=seconds, num_accepted=num_accepted, num_rounds=num_rounds)

    return method


def openvino_methods(
    run: BenchmarkSettings, target: Target, drafters: dict[str, Any], prompts: list[list[int]], folder: Path
) -> dict[str, Method]:
    """Returns OpenVINO without a drafter and with each, in all formats, once everything is converted."""
    methods: dict[str, Method] = {}
    draftsmith.save(drafters["look-up"], folder / "look-up", target)
    for weight_format in run.formats:
        options = {"quantise_target": weight_format}
        launch = read_launch(export(folder / "look-up", "openvino", folder / f"look-up-{weight_format}", **options))
        openvino.convert(run.python, launch)
        all_settings = {"plain": {}, "look-up": launch["settings"]}
        for draft in run.drafts:
            name = Path(draft).resolve().name
            options = {"target_name": launch["target"], "quantise": weight_format}
            exported = read_launch(export(draft, "openvino", folder / f"{name}-{weight_format}", run.target, **options))
            openvino.convert(run.python, exported)
            all_settings[name] = exported["settings"]
        for name, settings in all_settings.items():
            method = _served(run, launch["target"], settings, prompts, weight_format, folder)
            methods[f"OpenVINO {weight_format}, {name}"] = method
    return methods


def _served(
    run: BenchmarkSettings,
    target: str,
    settings: dict[str, Any],
    prompts: list[list[int]],
    weight_format: str,
    folder: Path,
) -> Method:
    def method() -> Measured:
        options = {"num_threads": run.threads, "is_exact": weight_format == EXACT, "is_timed": True}
        path = Path(tempfile.mkdtemp(dir=folder)) / "run"
        answers = openvino.run(run.python, target, prompts, run.max_new_tokens, path, settings, **options)
        return Measured(
            texts=[answer["text"] for answer in answers],
            seconds=sum(answer["wall_s"] for answer in answers),
            num_accepted=sum(size - 1 for answer in answers for size in answer["sizes"]),
            num_rounds=sum(len(answer["sizes"]) - 1 for answer in answers),
        )

    return method


def print_table(run: BenchmarkSettings, found: dict[str, list[Measured]]) -> None:
    """Prints a row for each method; speed-ups are over transformers' plain decoding and over the engine's own."""
    plain = found["transformers, plain"]
    print(f"\n{run.target}, {len(plain[0].texts)} prompts of {run.data}, {run.max_new_tokens} new tokens each")
    print("| engine, drafter | tokens/s | over transformers | over its own plain | accepted a round | equal texts |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, rounds in found.items():
        engine = name.partition(",")[0]
        own = found[f"{engine}, plain"]
        expected = own if engine.startswith("OpenVINO") and EXACT not in engine else plain
        num_new = sum(len(text) - 1 for text in rounds[0].texts)
        speed = median(num_new / one.seconds for one in rounds)
        over = [
            median(other.seconds / one.seconds for one, other in zip(rounds, base, strict=True))
            for base in (plain, own)
        ]
        same = sum(one == other for one, other in zip(rounds[0].texts, expected[0].texts, strict=True))
        per_round = rounds[0].num_accepted / max(rounds[0].num_rounds, 1)
        print(
            f"| {name} | {speed:.1f} | {over[0]:.2f} | {over[1]:.2f} | {per_round:.2f} | {same} of"
            f" {len(rounds[0].texts)} |"
        )


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(BenchmarkSettings, description=__doc__))
