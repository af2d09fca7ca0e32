"""Counts rows whose text differs from plain decoding's in batch-invariant decoding: none should, with any drafter.

    ./launch.sh same_text --drafts runs/medusa runs/lookup          # pocket target, bfloat16, into runs/same_text
    ./launch.sh same_text --target smollm2 --drafts runs/smollm2/bakeoff/* --num-prompts 40 --max-new-tokens 128

Greedily and sampled by the verifier coupled, the ids of each prompt and the bits of the logits that they were chosen by
are compared. The same command continues a run that was stopped: each drafter's counts are written as soon as they are
complete. The exit status is 1 if any row differs.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import draftsmith
from data import POCKET
from data.prompts import load_prompts, prompt_room
from data.shards import hash_files, write_atomically
from data.sources import default_source
from draftsmith import Target
from draftsmith.artifacts.artifact import check_fits, own_files, read_manifest
from draftsmith.core.drafter import Drafter
from draftsmith.inputs.invariance.self_test import shapes_for
from draftsmith.length.costs import num_threads
from draftsmith.loading.model_info import read_target_info
from eval.certificate.same_text import DecodedText, count_differences, decode
from eval.report.table import grid
from trainers.training import launchers
from trainers.training.settings import parse_settings

COLUMNS = ("drafter", "temperature", "rows", "tau", "other ids", "other bits")


@dataclass(frozen=True, kw_only=True)
class SameTextSettings:
    """The drafters, the prompts, and how they are decoded."""

    target: str = str(POCKET)
    """A transformers folder, GGUF file, named target (smollm2, pocket) or hub name."""
    drafts: tuple[str, ...] = ()
    """Folders of the artifacts to compare with plain decoding; those that hold no artifact are passed over."""
    output: str = "runs/same_text"
    """Folder for a file of counts of each drafter."""
    data: str = ""
    """Source of the prompts (data/sources); if empty, python-source, or python-docstrings for an encoder-decoder."""
    num_prompts: int = 8
    """Number of prompts."""
    prompt_tokens: int = 64
    """Length of prompts cut from source code or plain text, in tokens."""
    max_new_tokens: int = 64
    """New tokens per prompt."""
    temperatures: str = "0,1"
    """Sampling temperatures, separated by commas; 0 is greedy."""
    batch_size: int = 8
    """Prompts per batch."""
    dtype: str = "bfloat16"
    """Dtype of the target's weights."""
    seed: int = 0
    """Random seed of the choice of prompts and of sampling."""
    threads: int = 1
    """CPU threads; 0 uses torch's default."""


def main(run: SameTextSettings) -> int:
    """Returns the exit status."""
    artifacts = [Path(draft) for draft in run.drafts if (Path(draft) / "draft_config.json").is_file()]
    if not artifacts:
        raise ValueError(f"--drafts names {len(run.drafts)} folders and no artifact; name at least one")
    info = read_target_info(run.target)
    for artifact in artifacts:
        check_fits(str(artifact), read_manifest(artifact), info)
    target = Target.from_pretrained(run.target, dtype=run.dtype)
    found = load_prompts(
        run.data or default_source("", is_encoder_decoder=info.is_encoder_decoder),
        info.tokenizer,
        max_prompts=run.num_prompts,
        max_prompt_tokens=prompt_room(info, run.max_new_tokens),
        prompt_tokens=run.prompt_tokens,
        is_encoder_decoder=info.is_encoder_decoder,
        seed=run.seed,
    )
    prompts, output = [prompt.ids for prompt in found], Path(run.output)
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with num_threads(run.threads):
        print(
            f"{target.name} in {run.dtype}, {torch.get_num_threads()} thread(s): {shapes_for(target, run.batch_size)}"
        )
        settings = {key: value for key, value in asdict(run).items() if key not in ("drafts", "output")}
        identity = settings | {"fingerprint": target.fingerprint, "prompts": prompts}
        identity["num_threads"] = torch.get_num_threads()
        plain: dict[float, DecodedText] = {}
        for artifact in artifacts:
            path = output / f"{artifact.resolve().name}.json"
            own = identity | {"artifact": hash_files(own_files(artifact))}
            written = json.loads(path.read_text()) if path.is_file() else {}
            if written.get("identity") != own:
                drafter = draftsmith.load(artifact, target)
                is_tuned = drafter.target is not target
                counts = compare(drafter.target, drafter, prompts, run, {} if is_tuned else plain)
                written = {"identity": own, "counts": [{"drafter": artifact.resolve().name} | row for row in counts]}
                write_atomically(path, partial(_write, json.dumps(written)))
            rows += written["counts"]
            for row in written["counts"]:
                print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    keys = ("drafter", "temperature", "num_rows", "tau", "different_ids", "different_bits")
    print("\n".join(["", *grid([COLUMNS, *([str(row[key]) for key in keys] for row in rows)], "terminal")]))
    num_different = sum(max(row["different_ids"], row["different_bits"]) for row in rows)
    print(f"\n{sum(row['num_rows'] for row in rows)} rows, {num_different} of them other than plain decoding's")
    return int(num_different > 0)


def compare(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[list[int]],
    run: SameTextSettings,
    plain: dict[float, DecodedText],
) -> list[dict[str, Any]]:
    """Returns the counts at each temperature; `plain` keeps the target's own text from drafter to drafter."""
    counts = []
    for temperature in map(float, run.temperatures.split(",")):
        if temperature not in plain:
            plain[temperature] = decode_all(target, None, prompts, run, temperature)
        drafted = decode_all(target, drafter, prompts, run, temperature)
        counts.append({"temperature": temperature} | count_differences(plain[temperature], drafted))
    return counts


def decode_all(
    target: Target, drafter: Drafter | None, prompts: Sequence[list[int]], run: SameTextSettings, temperature: float
) -> DecodedText:
    """Decodes all prompts, a batch at a time."""
    found = DecodedText(rows=[], hashes=[])
    for begin in range(0, len(prompts), run.batch_size):
        part = prompts[begin : begin + run.batch_size]
        seeds = range(run.seed + begin, run.seed + begin + len(part))
        found += decode(target, drafter, part, temperature=temperature, seeds=seeds, max_new_tokens=run.max_new_tokens)
    return found


def _write(text: str, path: Path) -> None:
    path.write_text(text)


if __name__ == "__main__":
    with launchers.user_errors():
        sys.exit(main(*parse_settings(SameTextSettings, description=__doc__)))
