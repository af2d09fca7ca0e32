"""A tiny target and its own text on disk, and ways to run trainers on them, in this process and in others."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from data.prompts import Prompt
from data.pseudo_data import PseudoDataSettings, write_pseudo_data
from draftsmith import Target
from tests.support.models import CONTEXT, VOCAB_SIZE, tiny_model, tiny_tokenizer
from trainers.training.settings import flat, from_flat

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"batch_size": 4, "max_steps": 8, "eval_steps": 4, "save_steps": 4, "log_steps": 1, "warmup_steps": 2}


def make_target(folder: Path, architecture: str = "llama", *, seed: int = 0) -> Target:
    """Writes a tiny Llama, or another model, and its tokenizer as a transformers folder; returns it as a target."""
    model = tiny_model(architecture, seed=seed)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Target.from_pretrained(str(folder), dtype="float32")


def make_data(
    target: Target,
    folder: Path,
    *,
    num_rows: int = 40,
    max_new_tokens: int = 16,
    batch_size: int = 1,
    temperature: str = "1",
) -> Path:
    """Writes pseudo-data whose rows have prompts, and so texts, of many lengths."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for row in range(num_rows):
        length = int(torch.randint(2, CONTEXT - max_new_tokens - 1, (1,), generator=generator))
        ids = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        rows.append(Prompt(ids=ids, loss_mask=None, text="", category=None, key=f"row-{row}", source="test"))
    settings = PseudoDataSettings(max_new_tokens=max_new_tokens, temperature=temperature, batch_size=20)
    write_pseudo_data(target, rows, folder, settings)
    return folder


def trainer_settings(trainer: ModuleType, **values: Any) -> Any:
    """Returns a trainer's settings from values under the names of the command line."""
    assert values.keys() <= flat(trainer.Settings()).keys(), values
    return from_flat(trainer.Settings, values)


def command(recipe: str, *launcher: str, **settings: Any) -> list[str]:
    """Returns a command line that runs a recipe; `launcher` stands before it."""
    flags = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return [*(launcher or (sys.executable,)), str(ROOT / "recipes" / f"{recipe}.py"), *flags]


def environment() -> dict[str, str]:
    """Returns this environment with one thread a process, the repository importable, and no launcher's variables."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DRAFTSMITH_OFFLINE": "1", "PATH": path}


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command from `folder` and returns what it said; its status is the caller's to judge."""
    return subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)


def logged(output: Path, *names: str) -> list[dict[str, float]]:
    """Returns the lines of a run's log, of each the step and the metrics called `names` that it has."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("step", *names) if key in line} for line in lines]


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model.safetensors")
