"""Composite drafters, which are made of other drafters: their configurations, their artifacts and their parts.

A composite's configuration lists its parts as {"family": ..., "config": ...}. Each part is saved as an artifact in the
composite's own folder: `drafters/0`, `drafters/1` and so on.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from draftsmith.artifacts import artifact
from draftsmith.artifacts.families import find, name_of
from draftsmith.artifacts.files import inside
from draftsmith.core.drafter import Drafter, Session, Step, always_continue
from draftsmith.core.target import Target
from draftsmith.core.tree import Draft
from draftsmith.length.controller import LengthControlled, with_length_control

PartConfigs = tuple[dict[str, Any], ...]
PARTS_FOLDER = "drafters"


class Part:
    """One drafter of a composite, which gets only its own hidden layers and has its own draft-length policy."""

    def __init__(self, drafter: Drafter, record: dict[str, Any] | None = None) -> None:
        self.drafter, self.config, self.hidden_layers = drafter, drafter.config, drafter.hidden_layers
        self.record = record or {}
        """Provenance from the manifest of the artifact that it was loaded from."""

    @property
    def name(self) -> str:
        return name_of(self.drafter)

    def start(self, session: Session) -> None:
        # The composite's own draft-length policy does not apply to its parts.
        self._session = self._own(session)
        self._controlled = with_length_control(self.drafter, "auto")
        self._controlled.start(self._session)

    def change_rows(self, origins: list[int | None], new: Session | None) -> bool:
        """Follows rows as `Drafter.change_rows` does."""
        return self._controlled.change_rows(origins, self._own(new) if new is not None else None)

    def rewind(self, lengths: list[int]) -> None:
        """Continues after the tokens of each row past its first `lengths` were taken back and perhaps replaced.

        A drafter that cannot rewind starts again; its draft-length policy keeps what it has learnt.
        """
        if not self.drafter.rewind(lengths):
            self._controlled.start(self._session)
        elif isinstance(self._controlled, LengthControlled):
            self._controlled.reactivate()

    def propose(self, budget: int) -> Draft:
        return self._controlled.propose(budget)

    def observe(self, step: Step) -> None:
        self._controlled.observe(replace(step, hidden=self._own_layers(step.hidden)))

    def _own(self, session: Session) -> Session:
        return replace(session, hidden=self._own_layers(session.hidden), should_continue=always_continue)

    def _own_layers(self, hidden: dict[int, Tensor]) -> dict[int, Tensor]:
        return {layer: hidden[layer] for layer in self.hidden_layers if layer in hidden}


def check_parts(parts: PartConfigs, *, least: int = 2) -> None:
    """Raises ValueError for fewer than `least` parts, or a part that is not a family and its configuration."""
    if len(parts) < least:
        raise ValueError(f"{len(parts)} part(s) given; there must be at least {least}")
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or set(part) != {"family", "config"}:
            raise ValueError(f'part {index} is {part}; it must be {{"family": name, "config": settings}}')


def part_config(drafter: Drafter) -> dict[str, Any]:
    """Returns a drafter's family and configuration, as a composite's configuration lists them."""
    return {"family": name_of(drafter), "config": json.loads(json.dumps(asdict(drafter.config)))}


def make_part(part: dict[str, Any], target: Target) -> Part:
    """Returns a new drafter of this family and configuration, with freshly initialised weights."""
    module = find(part["family"])
    config = artifact.make_config(module.Config, part["config"], f"part {part['family']}")
    drafter: Drafter = module.Drafter(config, target)
    if isinstance(drafter, nn.Module):
        artifact.make_ready(drafter, target)
    return _checked(Part(drafter), target)


def load_artifact(path: str | Path, target: Target, *, made_for: Target | None = None) -> Part:
    """Returns the drafter of an artifact as a part; the arguments and errors are those of `artifact.load`."""
    manifest = artifact.read_manifest(path)
    # Configuration and target are written again when the part is saved; its provenance is kept.
    record = {key: manifest[key] for key in manifest.keys() - {"target", "tokenizer_hash", "config"}}
    return _checked(Part(artifact.load(path, target, made_for=made_for), record), target)


def save_parts(parts: Iterable[Part], folder: Path) -> None:
    """Writes each part's artifact into the composite's folder."""
    for index, part in enumerate(parts):
        artifact.save(part.drafter, folder / PARTS_FOLDER / str(index), part.drafter.target, record=part.record)


def load_part(folder: Path, configs: PartConfigs, index: int, target: Target) -> Part:
    """Returns a part that `save_parts` wrote; raises ValueError if it differs from its entry in `configs`."""
    path = inside(folder, f"{PARTS_FOLDER}/{index}")
    manifest = artifact.read_manifest(path)
    if {key: manifest[key] for key in ("family", "config")} != configs[index]:
        raise ValueError(
            f"{path} holds another drafter than {folder / artifact.MANIFEST} lists; the artifact must be made again"
        )
    return load_artifact(path, target)


def forget_all(parts: Iterable[Part]) -> None:
    """Makes all parts forget earlier calls."""
    for part in parts:
        part.drafter.forget()


def hidden_layers_of(parts: Iterable[Part]) -> tuple[int, ...]:
    """Returns the hidden layers that any part reads."""
    return tuple(sorted({layer for part in parts for layer in part.hidden_layers}))


def parameters_of(parts: Iterable[Part]) -> Iterator[Tensor]:
    """Yields the weights of all parts."""
    for part in parts:
        yield from part.drafter.parameters()


def _checked(part: Part, target: Target) -> Part:
    """Returns the part; raises ValueError if it drafts for a fine-tuned target."""
    if part.drafter.target is not target:
        raise ValueError(
            f"{part.name} fine-tunes its target, but all parts of a composite must draft for the same target; leave it"
            " out"
        )
    return part
