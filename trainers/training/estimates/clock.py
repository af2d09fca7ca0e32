"""Times the parts of a short run: its optimiser steps, evaluations and checkpoints; and reads memory and disk."""

import resource
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepClock(TrainerCallback):
    """Collects the seconds of each optimiser step, evaluation and checkpoint of a run."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.evaluations: list[float] = []
        self.checkpoints: list[float] = []
        self._last = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._last = _now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.steps.append(self._lap())

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.evaluations.append(self._lap())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.checkpoints.append(self._lap())

    def _lap(self) -> float:
        now = _now()
        lap, self._last = now - self._last, now
        return lap


def peak_memory_bytes() -> int:
    """Returns the most memory that this process has held: the accelerator's if there is one, else the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def folder_bytes(folder: Path) -> int:
    """Returns the size of all files below a folder, 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def free_bytes(folder: Path) -> int:
    """Returns the free space where `folder` is or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free


def mean(values: Iterable[float]) -> float:
    """Returns the mean, 0 of nothing."""
    known = list(values)
    return sum(known) / len(known) if known else 0.0


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
