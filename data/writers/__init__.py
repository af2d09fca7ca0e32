"""Who writes pseudo-data: the target itself, by draftsmith's own loop. `data.writers.server.Server` is the other one."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

import draftsmith
from data.prompts import Prompt
from data.shards import hash_files
from draftsmith import Target
from draftsmith.core.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class PseudoDataSettings:
    """How the target writes."""

    max_new_tokens: int = 128
    """Tokens a row at most; fewer where the target ends the text itself."""
    temperature: str = "0"
    """0 is greedy; several with commas, as in 0,1, are dealt out to the prompts in turn."""
    top_p: float = 1.0
    """Nucleus: the smallest set of tokens with this much probability is sampled from."""
    top_k: int = 0
    """Sample from this many tokens only, 0 for all."""
    batch_size: int = 32
    """Prompts written together; with a server, requests in flight."""
    shard_batches: int = 4
    """Batches a shard: what a killed run loses at most."""
    seed: int = 0
    """Each batch's own seed follows from this one."""

    def __post_init__(self) -> None:
        try:
            temperatures = self.temperatures
        except ValueError:
            raise ValueError(f"temperature is {self.temperature!r}; expected a number, or several as in 0,1") from None
        for temperature in temperatures:
            Sampling(temperature=temperature, top_p=self.top_p, top_k=self.top_k)
        for name in ("max_new_tokens", "batch_size", "shard_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def temperatures(self) -> list[float]:
        return [float(part) for part in str(self.temperature).split(",")]  # a YAML preset gives numbers


@dataclass(frozen=True, kw_only=True)
class Work:
    """One batch to write."""

    index: int
    """Its place in the whole run."""
    prompts: list[Prompt]
    """Of similar lengths."""
    temperature: float
    """Of the whole batch."""
    seed: int
    """Derived from the run's seed and `index`."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What was written after one prompt."""

    ids: list[int]
    """New tokens only, the end-of-text token included."""
    ended: bool
    """Whether the target ended the text itself."""
    is_retokenized: bool = False
    """Whether the ids were guessed from a server's text."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Who writes, as it is recorded."""

    target: str
    """The target's name, for people."""
    target_fingerprint: str | None
    """Of its weights; None behind a server, which does not tell."""
    tokenizer_hash: str | None
    """Of the tokenizer that made and reads the ids."""
    draft: str | None = None
    """Hash of the drafter's artifact: at temperature 0 it changes nothing, otherwise the samples are others."""
    server_model: str | None = None
    """What a server calls its model."""
    decoder_start_token_id: int | None = None
    """With which an encoder-decoder's text begins; a causal target's begins with the prompt."""

    def recorded(self) -> dict[str, Any]:
        """Returns what makes a run the same run; of a causal target nothing of decoders."""
        return {
            key: value for key, value in asdict(self).items() if key != "decoder_start_token_id" or value is not None
        }


class Writer(Protocol):
    """Writes a shard's batches; `LocalTarget` here, `Server` in data/writers/server.py."""

    origin: Origin
    tokenizer: Any

    def write(self, shard: Sequence[Work], settings: PseudoDataSettings) -> Iterator[list[Completion]]: ...


class LocalTarget:
    """Writes with draftsmith's own loop; the drafter in the folder `draft` speeds it up and leaves the law as it is.

    Raises ValueError for a target without a tokenizer, and for a drafter of another target.
    """

    def __init__(self, target: Target, *, draft: str = "") -> None:
        if target.tokenizer is None:
            raise ValueError(f"target {target.name} has no tokenizer, without which pseudo-data cannot be recorded")
        self.target, self.tokenizer = target, target.tokenizer
        self.drafter = draftsmith.load(draft, target) if draft else None
        self.origin = Origin(
            target=target.name,
            target_fingerprint=target.fingerprint,
            tokenizer_hash=target.tokenizer_hash,
            draft=hash_files(path for path in sorted(Path(draft).rglob("*")) if path.is_file()) if draft else None,
            decoder_start_token_id=target.decoder_start_token_id,
        )

    def write(self, shard: Sequence[Work], settings: PseudoDataSettings) -> Iterator[list[Completion]]:
        """Yields the completions of each batch in turn."""
        for work in shard:
            rows = [torch.tensor(prompt.ids, device=self.target.device) for prompt in work.prompts]
            out = draftsmith.generate(
                self.target,
                pad_sequence(rows, batch_first=True),
                self.drafter,
                attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
                max_new_tokens=settings.max_new_tokens,
                temperature=work.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                seed=work.seed,
            )
            starts = [1 if self.target.is_encoder_decoder else len(prompt.ids) for prompt in work.prompts]
            found = zip(out.sequences.tolist(), starts, out.lengths.tolist(), strict=True)
            written = [row[start:length] for row, start, length in found]
            yield [Completion(ids=ids, ended=ids[-1] in self.target.eos_token_ids) for ids in written]


def derive_seed(seed: int, index: int) -> int:
    """Returns a seed of 63 bits for the `index`-th part of what `seed` governs."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big") >> 1
