"""Measures what the teacher store costs beside its text: written in one pass, and by a pass of its own over the text.

    .venv/bin/python benchmarks/text_and_store.py --target smollm2 --dtype bfloat16 --data python-questions:train

Both write the same prompts to folders of their own, in turn, `repeats` times in one process; the time is the
processor's, the median of the repeats. Text alone stands beside them. In float32 the texts must be the same; in half
precision, where a row's text depends on the rows beside it, other texts are counted. The largest difference of the
stored hidden states and log-probabilities is printed.
"""

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from data import POCKET
from data.prompts import load_prompts
from data.pseudo_data import read_pseudo_data, write_pseudo_data
from data.teacher_store import TeacherStoreSettings, open_teacher_store, write_teacher_store
from data.writers import LocalWriter, PseudoDataSettings
from data.writers.teacher_outputs import StoreOfText
from draftsmith import Target
from trainers.training.settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What is written."""

    target: str = str(POCKET)
    """Transformers folder, or name of a target."""
    dtype: str = "auto"
    """Dtype in which the weights are loaded."""
    data: str = "python-source:train"
    """Source of the prompts."""
    max_prompts: int = 32
    """Number of prompts."""
    max_prompt_tokens: int = 320
    """Length of the longest prompt."""
    max_new_tokens: int = 64
    """Maximum number of new tokens per row."""
    batch_size: int = 32
    """Number of rows that run together."""
    layers: tuple[int, ...] = (4, 8)
    """Hidden layers that are stored."""
    top_k: int = 32
    """Number of largest logits that are stored."""
    repeats: int = 3
    """Runs of each way."""
    num_threads: int = 1
    """Threads of the process."""


def main(settings: BenchmarkSettings) -> None:
    torch.set_num_threads(settings.num_threads)
    target = Target.from_pretrained(settings.target, dtype=settings.dtype)
    prompts = load_prompts(
        settings.data,
        target.tokenizer,
        max_prompts=settings.max_prompts,
        max_prompt_tokens=settings.max_prompt_tokens,
        long_prompts="drop",
    )
    text_settings = PseudoDataSettings(max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size)
    stored = TeacherStoreSettings(layers=settings.layers, top_k=settings.top_k)

    def text_alone(folder: Path) -> None:
        write_pseudo_data(LocalWriter(target), prompts, folder / "text", text_settings)

    def two_passes(folder: Path) -> None:
        text_alone(folder)
        write_teacher_store(target, read_pseudo_data(folder / "text", target), folder / "store", stored)

    def one_pass(folder: Path) -> None:
        store = StoreOfText(folder=folder / "store", settings=stored)
        writer = LocalWriter(target, store=stored)
        write_pseudo_data(writer, prompts, folder / "text", text_settings, store=store)

    ways: dict[str, Callable[[Path], None]] = {"text": text_alone, "two passes": two_passes, "one pass": one_pass}
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as root:
        for repeat in range(settings.repeats):
            for name, write in ways.items():
                began = time.process_time()
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    write(Path(root) / f"{name} {repeat}")
                times_s[name].append(time.process_time() - began)
        check(Path(root), target)
    for name, times in times_s.items():
        listed = ", ".join(f"{one:.1f}" for one in times)
        print(f"{name:<12}{statistics.median(times):8.1f} s of processor time  ({listed})")
    ratios = [two / one for two, one in zip(times_s["two passes"], times_s["one pass"], strict=True)]
    extra = [(one - text) / (two - text) for text, two, one in zip(*times_s.values(), strict=True)]
    ratio, share = statistics.median(ratios), statistics.median(extra)
    print(f"two passes take {ratio:.2f} times as long as one, which has {share:.0%} of the store's own cost")


def check(root: Path, target: Target) -> None:
    """Prints the text's length and how far the two stores are apart; raises AssertionError if float32 texts differ."""
    one, two = (open_teacher_store(root / f"{name} 0" / "store", target) for name in ("one pass", "two passes"))
    assert one.keys == two.keys
    hidden = log_probs = largest = 0.0
    num_same = num_ids = num_new = num_other = 0
    for ours, theirs in zip(one, two, strict=True):
        if not torch.equal(ours.tokens_T, theirs.tokens_T):
            assert target.dtype != torch.float32
            num_other += 1
            continue
        assert ours.top_ids_TK is not None and theirs.top_ids_TK is not None
        assert ours.log_normaliser_T is not None and theirs.log_normaliser_T is not None
        assert ours.top_logits_TK is not None and theirs.top_logits_TK is not None
        num_new += int(ours.loss_mask_T.sum())
        for layer in one.layers:
            gap_TD = ours.hidden[layer].float() - theirs.hidden[layer].float()
            hidden = max(hidden, gap_TD.abs().max().item())
            largest = max(largest, theirs.hidden[layer].float().abs().max().item())
        first, second = (row.top_logits_TK[:, 0] - row.log_normaliser_T for row in (ours, theirs))
        log_probs = max(log_probs, (first - second).abs().max().item())
        num_same += int((ours.top_ids_TK[:, 0] == theirs.top_ids_TK[:, 0]).sum())
        num_ids += len(ours.tokens_T)
    print(
        f"{len(one)} rows, {num_other} of other text; in the others {num_ids:,} tokens, {num_new:,} of them new; hidden"
        f" states differ by at most {hidden:.3g} of {largest:.3g}, the likeliest token's log-probability by"
        f" {log_probs:.3g}, and it is the same at {num_same / num_ids:.2%} of the positions"
    )


if __name__ == "__main__":
    main(*parse_settings(BenchmarkSettings, description=__doc__))
