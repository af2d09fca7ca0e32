"""Who competes: plain decoding, transformers' own `generate`, each drafter, and each drafter decoded otherwise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import draftsmith
from data.prompts import Prompt
from data.shards import hash_files
from draftsmith import Target, verify
from draftsmith.artifacts.artifact import own_files, read_manifest
from draftsmith.length.target_confidence import TargetConfidenceThreshold
from eval.bakeoff.measure import DecodingMethod, draftsmith_method, transformers_method, warm_up
from eval.bakeoff.settings import BakeoffSettings

PLAIN, TRANSFORMERS = "plain", "transformers"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A contender and what the table says of it beside its speed."""

    contender: DecodingMethod
    family: str | None = None
    """None where nothing drafts."""
    drafter: Any = None
    verifier: str = "auto"
    length: str = "auto"
    gate: float | None = None
    is_tuned: bool = False
    """Whether it decodes for a target that its drafter has tuned."""
    is_lossless: bool = True
    num_parameters: int = 0
    artifact_mb: float = 0.0
    train_s: float | None = 0.0
    """None where the manifest does not say."""

    @property
    def reference(self) -> str:
        """The contender that it is compared with."""
        return self.contender.reference or PLAIN

    def competes_at(self, temperature: float) -> bool:
        """At temperature 0 the law is one-hot, and every verifier keeps what "auto" does."""
        return temperature > 0 or self.verifier == "auto"

    @property
    def is_ablation(self) -> bool:
        """Whether its drafter has a row of its own, decoded otherwise."""
        return (self.verifier, self.length, self.gate) != ("auto", "auto", None)


def contenders(
    target: Target, prompts: Sequence[Prompt], artifacts: Sequence[Path], settings: BakeoffSettings
) -> list[Contender]:
    """Returns plain decoding first; raises ValueError for an artifact that does not fit, or two of one name."""
    found = [
        Contender(contender=DecodingMethod(name=PLAIN, decode=draftsmith_method(target))),
        Contender(contender=DecodingMethod(name=TRANSFORMERS, decode=transformers_method(target))),
    ]
    for name, path in zip(_names(artifacts), artifacts, strict=True):
        manifest = read_manifest(path)
        drafter = draftsmith.load(path, target)
        parameters: list[Tensor] = list(drafter.parameters())
        facts: dict[str, Any] = {
            "family": manifest["family"],
            "drafter": drafter,
            "is_tuned": drafter.target is not target,
            "num_parameters": sum(parameter.numel() for parameter in parameters),
            "artifact_mb": sum(file.stat().st_size for file in own_files(path)) / 1e6,
            "train_s": manifest.get("train_s"),
        }
        reference = None
        if facts["is_tuned"]:
            # What it drafts for is decoded plainly too: its text is another than the target's own.
            reference = f"{name} ({PLAIN})"
            decode = draftsmith_method(drafter.target)
            found.append(Contender(contender=DecodingMethod(name=reference, decode=decode), is_tuned=True))
        contender = DecodingMethod(
            name=name, decode=draftsmith_method(drafter.target, drafter), reference=reference, drafter=drafter
        )
        found.append(Contender(contender=contender, **facts))
        for entry in _ablations(contender, drafter, facts, settings):
            try:
                warm_up(entry.contender, [prompts[0].ids], temperature=1.0)
                found.append(entry)
            except ValueError as error:
                print(f"{entry.contender.name} is left out: {error}")
    return found


def _ablations(
    own: DecodingMethod, drafter: Any, facts: dict[str, Any], settings: BakeoffSettings
) -> Iterator[Contender]:
    """Yields the drafter, in its own way contender `own`, with each other verifier, policy of lengths and gate."""

    def other(what: str, **options: Any) -> DecodingMethod:
        given = {"drafter": drafter} | options
        return replace(own, name=f"{own.name} ({what})", decode=draftsmith_method(drafter.target, **given))

    for verifier in settings.verifiers:
        is_lossless = verify.find(verifier)[0].LOSSLESS
        yield Contender(
            contender=other(verifier, verifier=verifier), verifier=verifier, is_lossless=is_lossless, **facts
        )
    for policy in settings.lengths:
        yield Contender(contender=other(policy, policy=policy), length=policy, **facts)
    for gate in settings.gates:
        yield Contender(
            contender=other(f"gate {gate:g}", drafter=TargetConfidenceThreshold(drafter, gate)), gate=gate, **facts
        )


def _names(artifacts: Sequence[Path]) -> list[str]:
    """Returns each folder's name, with its parent's before it where two are the same."""
    names = [path.resolve().name for path in artifacts]
    taken = [*names, PLAIN, TRANSFORMERS]
    longer = [
        name if taken.count(name) == 1 else f"{path.resolve().parent.name}/{name}"
        for name, path in zip(names, artifacts, strict=True)
    ]
    repeated = next((name for name in longer if longer.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"two artifacts are called {repeated}; give them folders of different names")
    return longer


def fingerprint(artifact: Path) -> str:
    return hash_files(own_files(artifact))
