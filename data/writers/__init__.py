"""Writers of pseudo-data: `LocalWriter` runs draftsmith's own loop; data/writers/server.py uses an inference server."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import draftsmith
from data.prompts import Prompt
from data.shards import hash_files
from data.teacher_store import TeacherStoreSettings
from draftsmith import Target
from draftsmith.core.sampling import Sampling
from draftsmith.inputs.generation_config import described, parse_config
from draftsmith.inputs.outputs import TextOutputs

OWN_SETTINGS = ("do_sample", "temperature", "top_p", "top_k", "max_length", "max_new_tokens")
"""Settings of a generation config that pseudo-data has itself."""


@dataclass(frozen=True, kw_only=True)
class PseudoDataSettings:
    """Generation settings of the target."""

    max_new_tokens: int = 128
    """Maximum number of new tokens per row."""
    temperature: str = "0"
    """Sampling temperature, 0 for greedy; several with commas, as in 0,1, are assigned to the prompts in turn."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the smallest set of tokens with this total probability."""
    top_k: int = 0
    """Number of most likely tokens to sample from, 0 for all."""
    batch_size: int = 32
    """Number of prompts in a batch; with a server, number of concurrent requests."""
    shard_batches: int = 4
    """Number of batches in a shard, the most that a killed run loses."""
    generation_config: str = ""
    """'model' applies the target's own generation config, such as its repetition penalty; or JSON such as {"min_p":
    0.1}, or a JSON file. Its temperature, top-p, top-k and lengths are not read: they are settings of their own."""
    seed: int = 0
    """Seed from which each batch's own seed is derived."""
    verifier: Literal["auto", "coupled"] = "auto"
    """With coupled the sampled text of a prompt depends on `seed` and the prompt alone, not on drafter or batches, up
    to rounding."""
    batch_invariant: bool = False
    """Decode batch-invariantly: the text depends on drafter and batches not even by rounding, in any dtype."""

    def __post_init__(self) -> None:
        try:
            temperatures = self.temperatures
        except ValueError:
            raise ValueError(f"temperature is {self.temperature!r}; expected a number, or several as in 0,1") from None
        for temperature in temperatures:
            Sampling(temperature=temperature, top_p=self.top_p, top_k=self.top_k)
        parse_config(self.generation_config)
        if self.verifier not in ("auto", "coupled"):
            raise ValueError(f"verifier is {self.verifier!r}; it must be auto or coupled")
        for name in ("max_new_tokens", "batch_size", "shard_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def temperatures(self) -> list[float]:
        return [float(part) for part in str(self.temperature).split(",")]  # a YAML preset gives numbers


@dataclass(frozen=True, kw_only=True)
class GenerationBatch:
    """A batch of prompts to be completed."""

    index: int
    """Index of the batch in the run."""
    prompts: list[Prompt]
    """Prompts of similar length."""
    temperature: float
    """Sampling temperature."""
    seed: int
    """Seed derived from the run's seed and `index`."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The completion of one prompt."""

    ids: list[int]
    """New tokens, the end-of-text token included."""
    ended: bool
    """True if the target generated an end-of-text token."""
    is_retokenized: bool = False
    """True if the ids were obtained by tokenizing a server's text."""
    outputs: TextOutputs | None = None
    """The target's outputs at every token of the prompt and the completion, if the writer keeps them."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The model that writes, as recorded in the manifest."""

    target: str
    """Name of the target."""
    target_fingerprint: str | None
    """Hash of the target's weights; None behind a server."""
    tokenizer_hash: str | None
    """Hash of the tokenizer."""
    draft: str | None = None
    """Hash of the drafter's artifact, which changes the samples at temperatures above 0."""
    server_model: str | None = None
    """The server's name for its model."""
    decoder_start_token_id: int | None = None
    """First token of an encoder-decoder's text; None for a causal target."""

    def recorded(self) -> dict[str, Any]:
        """Returns the fields that identify a run, without those of encoder-decoders for a causal target."""
        return {
            key: value for key, value in asdict(self).items() if key != "decoder_start_token_id" or value is not None
        }


class Writer(Protocol):
    """Generates the completions of a shard's batches."""

    origin: Origin
    tokenizer: Any
    num_shards_at_once: int
    """Number of shards whose batches it can write at once, each from a thread of its own."""

    def recorded_config(self, settings: PseudoDataSettings) -> dict[str, Any]:
        """Returns the settings of the generation config, as recorded in the manifest; raises ValueError for others."""
        ...

    def write(self, shard: Sequence[GenerationBatch], settings: PseudoDataSettings) -> Iterator[list[Completion]]: ...

    def close(self) -> None:
        """Gives up what is not written yet, after an error in another thread."""
        ...


class LocalWriter:
    """Generates with draftsmith's own loop, optionally sped up by the drafter in the folder `draft`, losslessly.

    With a `store` completions have the target's outputs that it holds. Raises ValueError for a target without a
    tokenizer and for a drafter of another target.
    """

    num_shards_at_once = 1

    def __init__(self, target: Target, *, draft: str = "", store: TeacherStoreSettings | None = None) -> None:
        if target.tokenizer is None:
            raise ValueError(f"target {target.name} has no tokenizer, which pseudo-data requires")
        self.target, self.tokenizer = target, target.tokenizer
        self.store = store
        self.drafter = draftsmith.load(draft, target) if draft else None
        self.origin = Origin(
            target=target.name,
            target_fingerprint=target.fingerprint,
            tokenizer_hash=target.tokenizer_hash,
            draft=hash_files(path for path in sorted(Path(draft).rglob("*")) if path.is_file()) if draft else None,
            decoder_start_token_id=target.decoder_start_token_id,
        )

    def recorded_config(self, settings: PseudoDataSettings) -> dict[str, Any]:
        """Returns the settings of the generation config; raises ValueError for those it cannot have."""
        found = described(self.target, parse_config(settings.generation_config))
        if found.get("max_time") is not None:
            raise ValueError(
                f"max_time is {found['max_time']}; pseudo-data has no time limit, so that its text does not depend on"
                " the machine"
            )
        if (found.get("num_return_sequences") or 1) != 1:
            raise ValueError(
                f"num_return_sequences is {found['num_return_sequences']}; pseudo-data has one row a prompt"
            )
        return {name: value for name, value in found.items() if name not in OWN_SETTINGS}

    def write(self, shard: Sequence[GenerationBatch], settings: PseudoDataSettings) -> Iterator[list[Completion]]:
        """Yields the completions of each batch in turn; prompts of the whole shard take the places of rows that end."""
        found: dict[tuple[int, int], Completion] = {}
        waiting = list(shard)
        for temperature in dict.fromkeys(batch.temperature for batch in shard):
            batches = [batch for batch in shard if batch.temperature == temperature]
            rows = [(batch, row) for batch in batches for row in range(len(batch.prompts))]
            for text in draftsmith.generate_stream(
                self.target,
                [batch.prompts[row].ids for batch, row in rows],
                self.drafter,
                batch_size=settings.batch_size,
                max_new_tokens=settings.max_new_tokens,
                temperature=temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                generation_config=parse_config(settings.generation_config),
                seed=[seed for batch in batches for seed in _row_seeds(batch, settings)],
                verifier=settings.verifier,
                batch_invariant=settings.batch_invariant or None,
                output_layers=self.store.layers if self.store is not None else (),
                output_top_logits=self.store.top_k if self.store is not None else 0,
            ):
                batch, row = rows[text.index]
                found[batch.index, row] = Completion(ids=text.new_ids, ended=text.ended, outputs=text.outputs)
                while waiting and all((waiting[0].index, row) in found for row in range(len(waiting[0].prompts))):
                    batch = waiting.pop(0)
                    yield [found.pop((batch.index, row)) for row in range(len(batch.prompts))]

    def close(self) -> None:
        """Does nothing: it writes in the caller's thread."""


def _row_seeds(batch: GenerationBatch, settings: PseudoDataSettings) -> list[int]:
    """Returns a seed for each prompt, derived from the run's seed and the prompt's key."""
    return [derive_seed(settings.seed, prompt.key) for prompt in batch.prompts]


def derive_seed(seed: int, index: int | str) -> int:
    """Returns a 63-bit seed derived from `seed` and `index`."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big") >> 1
