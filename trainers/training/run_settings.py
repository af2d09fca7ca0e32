"""What every run can be told, whatever the family."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data import POCKET

DEFAULT_DATA = "runs/pseudo-data"
REPORTS_ONLY = ("output", "log_steps", "report_to", "wandb_project")
"""Settings that change nothing in the artifact: an unfinished run may be continued with others."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The run itself: data in, artifact out, and the optimiser between."""

    target: str = str(POCKET)
    """Transformers folder or hub name of the frozen target; the pocket target by default."""
    data: str = DEFAULT_DATA
    """What to learn from: a folder of pseudo-data or a teacher store, which hold the target's own text, or any source
    of text, answers as they stand; written first if default."""
    output: str = ""
    """Folder for the artifact, runs/<recipe> if empty; an unfinished run found there is continued. Each trial of
    a wandb sweep has a folder of its own in it, or in runs/sweeps/<sweep>."""
    start_from: str = ""
    """Artifact of the same family, shape and target whose weights a new run starts from, instead of new ones."""
    max_steps: int = 300
    """Optimiser steps."""
    seed: int = 0
    """Of the drafter's first weights, the order of the rows and the choice of held-out ones."""
    batch_size: int = 8
    """Rows that one rank reads at once."""
    gradient_accumulation: int = 1
    """Such batches an optimiser step; the loss is exactly that of the joined batch."""
    max_length: int = 1024
    """Longer rows are cut to so many tokens."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW."""
    schedule: str = field(default="cosine", metadata={"choices": ["cosine", "linear", "constant"]})
    """How the rate falls after the warm-up."""
    warmup_steps: int = 20
    """Steps in which the rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's, for matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient, 0 for any."""
    bf16: bool = False
    """Target and arithmetic in bfloat16; the drafter's weights stay in float32. Without it all is float32."""
    held_out_share: float = 0.05
    """Share of the rows, by a hash of their prompts, that is never trained on."""
    max_held_out: int = 32
    """Held-out rows used at most; what the target says of them is kept in memory."""
    eval_steps: int = 100
    """Steps between judgements of acceptance on held-out rows, each with a checkpoint; the best one is kept."""
    save_steps: int = 100
    """Steps between checkpoints: what a killed run loses at most."""
    log_steps: int = 10
    """Steps between lines in log.jsonl."""
    report_to: str = field(default="jsonl", metadata={"choices": ["jsonl", "wandb"]})
    """Log to log.jsonl in the output folder alone, or to wandb too ($WANDB_MODE=offline needs no account)."""
    wandb_project: str = "draftsmith"
    """Project in wandb."""
    decode_threads: int = 1
    """CPU threads that decoding will have, which the sizes of trees depend on; 0 for torch's own choice."""
    deepspeed: str = ""
    """DeepSpeed config, by path or as zero0, zero1, zero2, zero3; plain data parallelism if empty."""

    def __post_init__(self) -> None:
        at_least_one = ("max_steps", "batch_size", "gradient_accumulation", "max_held_out")
        for name in (*at_least_one, "eval_steps", "save_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.decode_threads < 0:
            raise ValueError(f"decode_threads is {self.decode_threads}; it must be 0 or more")
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; a row needs at least 2 tokens")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share is {self.held_out_share}; it must lie between 0 and 1, both excluded")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")

    def folder(self, recipe: str) -> Path:
        """Returns the output folder; a trial of a wandb sweep has one of its own in it, called by the id of its run."""
        sweep, trial = (os.environ.get(f"WANDB_{name}_ID") for name in ("SWEEP", "RUN"))
        if not sweep or not trial:
            return Path(self.output or f"runs/{recipe}")
        return Path(self.output or f"runs/sweeps/{sweep}") / trial

    def identity(self) -> dict[str, Any]:
        """Returns what must be the same for a run to be continued, local paths resolved."""
        kept = {key: value for key, value in asdict(self).items() if key not in REPORTS_ONLY}
        for key in ("target", "data", "start_from", "deepspeed"):
            if kept[key] and Path(kept[key]).exists():
                kept[key] = str(Path(kept[key]).resolve())
        return kept
