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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draftsmith
from draftsmith import Target
from draftsmith.drafters import lookup
from draftsmith.export import export
from draftsmith.export.launch import read_launch
from draftsmith.export.openvino import FORMATS
from draftsmith.length.costs import num_threads
from eval.doctor import openvino
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

EXACT = "fp32"
LOOK_UP = "look-up"


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(RateSettings):
    """What is decoded, and OpenVINO's formats."""

    formats: tuple[str, ...] = (EXACT,)
    """Formats of the weights in OpenVINO: fp32, fp16, int8 or int4."""
    num_draft: int = 4
    """Tokens per draft of the look-up."""
    python: str = ".venv-openvino/bin/python"
    """Interpreter with OpenVINO GenAI and optimum-intel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.formats:
            raise ValueError(f"formats names none; there are {', '.join(FORMATS)}")
        if unknown := sorted(set(self.formats) - set(FORMATS)):
            raise ValueError(f"formats has {unknown[0]!r}; there are {', '.join(FORMATS)}")


def main(run: BenchmarkSettings) -> None:
    openvino.ENVIRONMENT.check(run.python)
    prompts = read_prompts(run)
    with tempfile.TemporaryDirectory() as folder, num_threads(run.threads):
        target = Target.from_pretrained(run.target, dtype=run.dtype, device="cpu")
        own_look_up = lookup.Drafter(lookup.Config(num_draft=run.num_draft, earliest=True), target)
        draftsmith.save(own_look_up, Path(folder) / LOOK_UP, target)
        drafters = {LOOK_UP: own_look_up} | load_drafters(run, target)
        methods = own_methods(run, target, drafters, prompts, past_end=True)
        found = take_turns(methods | openvino_methods(run, prompts, Path(folder)), run.rounds)
    print_table(run, found, lambda engine: engine.startswith("OpenVINO") and EXACT not in engine)


def openvino_methods(run: BenchmarkSettings, prompts: Sequence[list[int]], folder: Path) -> dict[str, Method]:
    """Returns OpenVINO without a drafter and with each, in all formats, once everything is converted."""
    methods: dict[str, Method] = {}
    for weight_format in run.formats:
        options = {"quantise_target": weight_format}
        launch = read_launch(export(folder / LOOK_UP, "openvino", folder / f"{LOOK_UP}-{weight_format}", **options))
        openvino.convert(run.python, launch)
        all_settings = {PLAIN: {}, LOOK_UP: launch["settings"]}
        for draft in run.drafts:
            name = Path(draft).resolve().name
            options = {"target_name": launch["target"], "quantise": weight_format}
            exported = read_launch(export(draft, "openvino", folder / f"{name}-{weight_format}", run.target, **options))
            openvino.convert(run.python, exported)
            all_settings[name] = exported["settings"]
        for name, settings in all_settings.items():
            method = _served(run, launch["target"], settings, prompts, weight_format, folder)
            methods[method_name(f"OpenVINO {weight_format}", name)] = method
    return methods


def _served(
    run: BenchmarkSettings,
    target: str,
    settings: dict[str, Any],
    prompts: Sequence[list[int]],
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


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(BenchmarkSettings, description=__doc__))
