"""Writes the teacher store: the target's hidden states and top-k logits on a data set, cached for all trainers.

    ./launch.sh teacher_store --layers 4 8 --top-k 16                # of runs/pseudo-data, into runs/teacher-store
    ./launch.sh teacher_store --target T --data runs/mine --layers 16 --output runs/mine-store --limit-gb 50
    ./launch.sh teacher_store --target T --layers 16 --nproc 8       # processes share the shards, one to a device

The size is printed before anything is written. A run that was killed is continued by the same command, with any number
of processes. pseudo_data --layers writes text and store in one pass. The first command above: 57,500 tokens, 65 MB,
about 6,700 tokens/s on one CPU core.
"""

from dataclasses import dataclass, field
from pathlib import Path

import draftsmith
from data import POCKET
from data.examples import check_target, open_examples, usable_rows
from data.prompts import TextSettings
from data.shards import first_run_time
from data.teacher_store import MARKER, TeacherStoreSettings, plan_teacher_store, write_teacher_store
from draftsmith.loading.model_info import read_target_info
from draftsmith.loading.placement.spread import check_spread
from trainers.training import launchers
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class TeacherStoreRunSettings:
    """Input and output of the run; the contents of the store are TeacherStoreSettings."""

    target: str = str(POCKET)
    """A transformers folder, GGUF file, named target (smollm2, pocket) or hub name."""
    data: str = "runs/pseudo-data"
    """Pseudo-data of this target, or any texts or conversations."""
    text: TextSettings = field(default_factory=TextSettings)
    """Settings for reading rows of text."""
    output: str = "runs/teacher-store"
    """Output folder."""
    max_steps: int = 0
    """Maximum number of batches, 0 for all."""
    seed: int = 0
    """Accepted as by other recipes; nothing here is random."""
    dtype: str = "auto"
    """Dtype of the target's weights."""
    device_map: str = ""
    """Spread the target over devices as transformers does: auto, balanced, sequential, or modules and their devices."""
    tensor_parallel: bool = False
    """Spread the target over the processes of the run, which then write the same shards together."""


def main(run: TeacherStoreRunSettings, settings: TeacherStoreSettings) -> None:
    target_info = read_target_info(run.target)
    check_spread(run.device_map, tensor_parallel=run.tensor_parallel)
    share = launchers.begin_share(is_lockstep=run.tensor_parallel)
    now = first_run_time(Path(run.output), MARKER, is_shared=share.is_shared)
    examples = open_examples(run.data, target_info, settings=run.text, now=now)
    usable = usable_rows(examples, run.data, max_length=target_info.context_length, max_left_out=run.text.max_left_out)
    num_rows = run.max_steps * settings.batch_size or len(usable)
    rows = [examples[index] for index in usable[:num_rows]]
    plan_teacher_store(target_info, rows, Path(run.output), settings)
    target = draftsmith.Target.from_pretrained(
        run.target,
        dtype=run.dtype,
        device=launchers.device(),
        device_map=run.device_map,
        tensor_parallel=run.tensor_parallel,
        pack_weights=False,  # it reads whole texts, where packing gains little
    )
    check_target(examples, run.data, target)
    write_teacher_store(
        target,
        rows,
        Path(run.output),
        settings,
        chat_template_kwargs=run.text.chat_template_kwargs,
        now=now,
        share=share,
    )
    launchers.end()


if __name__ == "__main__":
    with launchers.user_errors():
        main(*parse_settings(TeacherStoreRunSettings, TeacherStoreSettings, description=__doc__))
