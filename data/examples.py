"""Opens any kind of data as examples for training: `open_examples`."""

import hashlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from data import pseudo_data, teacher_store
from data.batches import Example, example
from data.prompts import Prompt, TextSettings, load_prompts, print_coverage, prompt_room
from data.shards import check_origin
from data.sources import LeftOut, looks_local
from data.sources.pairs import split_columns
from draftsmith import Target
from draftsmith.loading.model_info import NO_LIMIT, TargetInfo


class Examples(Protocol):
    """A sequence of examples: the interface of `TeacherStore`, `PseudoData` and `TextExamples`."""

    keys: list[str]

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest of its folder, None for texts."""

    @property
    def fingerprint(self) -> str:
        """The hash that identifies the data in an artifact's manifest."""

    @property
    def first_supervised(self) -> Sequence[int | None]:
        """The position of each row's first supervised token after its first token; None if it has none."""

    def where(self, index: int) -> str:
        """Returns the origin of a row, as `file:line` where it is known."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class TextExamples(Sequence[Example]):
    """Conversations, documents, or sources with labels; a label begins with `start`, the decoder's start token."""

    manifest = None

    def __init__(self, prompts: list[Prompt], start: int | None = None) -> None:
        self.keys = [prompt.key for prompt in prompts]
        labels = [prompt.label for prompt in prompts if prompt.label is not None]
        self.fingerprint = hashlib.sha256(("".join(self.keys) + repr(labels) * bool(labels)).encode()).hexdigest()[:32]
        self._prompts, self._start = prompts, start

    @property
    def first_supervised(self) -> Sequence[int | None]:
        return [self._first_supervised(prompt) for prompt in self._prompts]

    def _first_supervised(self, prompt: Prompt) -> int | None:
        if prompt.label is not None:
            return 1 if prompt.label else None
        mask = prompt.loss_mask or [True] * len(prompt.ids)
        return next((position for position in range(1, len(mask)) if mask[position]), None)

    def where(self, index: int) -> str:
        return self._prompts[index].source

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        prompt = self._prompts[index]
        if prompt.label is not None:
            assert self._start is not None
            mask = [False] + [True] * len(prompt.label)
            return example([self._start, *prompt.label], mask, prompt.key, source=prompt.ids, where=prompt.source)
        return example(prompt.ids, prompt.loss_mask, prompt.key, where=prompt.source)


def check_target(examples: Examples, source: str, target: Target) -> None:
    """Raises ValueError if `examples`, opened before the weights were loaded, belong to another target."""
    if examples.manifest is not None:
        check_origin(Path(source), examples.manifest, target)


def usable_rows(examples: Examples, source: str, *, max_length: int, max_left_out: float = 0.5) -> list[int]:
    """Returns the indices of the rows that have a supervised token among their first `max_length` tokens.

    The first token of a row is not learnt, as nothing precedes it. Prints how many rows are left out, with the origins
    of the first; raises ValueError if they are more than `max_left_out` of the rows, or all.
    """
    left_out, kept = LeftOut(), []
    for index, position in enumerate(examples.first_supervised):
        if position is not None and position < max_length:
            kept.append(index)
            continue
        reason = "it has nothing to learn" if position is None else f"its answer lies beyond {max_length:,} tokens"
        left_out.add(f"{examples.where(index)}: {reason}")
    left_out.report(source, len(examples), max_left_out)
    return kept


def open_examples(
    source: str,
    target: Target | TargetInfo,
    *,
    settings: TextSettings | None = None,
    now: datetime | None = None,
    seed: int = 0,
) -> Examples:
    """Returns the rows of a teacher store, of pseudo-data, or of any source that `load_prompts` reads, with answers.

    Chat templates that write the date take it from `now`. Prints the share of supervised tokens. Raises ValueError for
    data that cannot be read, is unfinished or belongs to another target.
    """
    folder = Path(source)
    if (folder / teacher_store.MARKER).exists():
        stored = teacher_store.open_teacher_store(folder, target)
        print_coverage(source, stored.manifest["num_learnt"], stored.manifest["num_tokens"])
        return stored
    if (folder / pseudo_data.MARKER).exists():
        written = pseudo_data.read_pseudo_data(folder, target)
        print_coverage(source, written.num_supervised, written.num_tokens)
        return written
    if not Path(split_columns(source)[0]).exists() and looks_local(source):
        raise ValueError(f"no such file or folder: {source!r}; make training data with recipes/pseudo_data.py")
    limit = prompt_room(target, 0)
    texts = load_prompts(
        source,
        target.tokenizer,
        max_prompt_tokens=limit if limit < NO_LIMIT else 0,
        long_prompts="cut",
        keep_answers=True,
        is_encoder_decoder=target.is_encoder_decoder,
        end_ids=target.eos_token_ids,
        settings=settings,
        now=now,
        seed=seed,
    )
    if target.is_encoder_decoder and target.decoder_start_token_id is None:
        raise ValueError(f"target {target.name} has no decoder_start_token_id in its configuration; set it")
    return TextExamples(texts, target.decoder_start_token_id)
