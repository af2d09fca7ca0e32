"""The methods of a bake-off: plain decoding, transformers' `generate`, and each drafter with its ablations."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import draftsmith
from data.prompts import Prompt
from data.shards import hash_files
from draftsmith import Target, verify
from draftsmith.artifacts.artifact import own_files, read_manifest
from draftsmith.inputs.generation_config import parse_config
from draftsmith.length.target_confidence import TargetConfidenceThreshold
from eval.bakeoff.measure import DecodingMethod, draftsmith_method, transformers_method, warm_up
from eval.bakeoff.settings import BakeoffSettings
from eval.doctor.assisted import assistant_of

PLAIN, TRANSFORMERS, COUPLED = "plain", "transformers", "coupled"
PROMPT_LOOKUP = f"{TRANSFORMERS}: prompt lookup"
LOOKUP_TOKENS = 10
"""Tokens that transformers' prompt look-up copies, as in its documentation."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A decoding method with what its table row shows about it."""

    method: DecodingMethod
    family: str | None = None
    """Family of its drafter, None without a drafter."""
    drafter: Any = None
    verifier: str = "auto"
    default_verifier: str = "auto"
    """What `verifier` "auto" stands for: "coupled" in batch-invariant comparisons."""
    length: str = "auto"
    confidence_threshold: float | None = None
    """Threshold on the target's confidence below which drafting is skipped; None without one."""
    is_fine_tuned: bool = False
    """True if it decodes with a target that its drafter fine-tuned."""
    is_lossless: bool = True
    counts_forwards: bool = True
    """False if it drafts inside transformers, which does not tell how often it runs the target."""
    max_batch_size: int | None = None
    """Largest batch that the method decodes, None for any; transformers drafts for one row at a time."""
    num_parameters: int = 0
    artifact_mb: float = 0.0
    train_s: float | None = 0.0
    """Training time in seconds, None if the manifest does not record it."""
    left_out_at: Mapping[float, str] = field(default_factory=dict)
    """By temperature at which it cannot decode, the reason."""

    @property
    def reference(self) -> str:
        """Returns the name of the method that it is compared with."""
        return self.method.reference or PLAIN

    @property
    def used_verifier(self) -> str:
        """Returns the verifier that it decodes with."""
        return self.default_verifier if self.verifier == "auto" else self.verifier

    def competes_at(self, temperature: float, batch_size: int) -> bool:
        """Returns False for batches beyond its largest, and for other verifiers at temperature 0, where all agree.

        So it does for temperatures at which it cannot decode.
        """
        if (self.max_batch_size is not None and batch_size > self.max_batch_size) or temperature in self.left_out_at:
            return False
        return temperature > 0 or self.verifier == "auto"

    @property
    def is_ablation(self) -> bool:
        """Returns True if it decodes with another verifier, draft length or threshold than the drafter's own."""
        return (self.verifier, self.length, self.confidence_threshold) != ("auto", "auto", None)


def contenders(
    target: Target, prompts: Sequence[Prompt], artifacts: Sequence[Path], settings: BakeoffSettings
) -> list[Contender]:
    """Returns all contenders, plain decoding first; says which of them cannot decode at which temperatures.

    Raises ValueError for an artifact that does not fit the target, for two artifacts of the same name, and if no
    artifact can draft at any temperature.
    """
    config = parse_config(settings.generation_config)
    default = COUPLED if settings.batch_invariant else "auto"
    plain = DecodingMethod(name=PLAIN, decode=draftsmith_method(target, verifier=default, config=config))
    found = [
        Contender(method=plain, default_verifier=default),
        Contender(
            method=DecodingMethod(name=TRANSFORMERS, decode=transformers_method(target, config=config)),
            max_batch_size=1 if settings.continuous_batching else None,
        ),
        *_coupled_baseline(target, PLAIN, settings),
    ]
    if settings.assisted and not target.is_encoder_decoder:
        decode = transformers_method(target, prompt_lookup=LOOKUP_TOKENS, config=config)
        found.append(
            Contender(method=DecodingMethod(name=PROMPT_LOOKUP, decode=decode), max_batch_size=1, counts_forwards=False)
        )
    for name, path in zip(_names(artifacts), artifacts, strict=True):
        manifest = read_manifest(path)
        drafter = draftsmith.load(path, target)
        parameters: list[Tensor] = list(drafter.parameters())
        columns: dict[str, Any] = {
            "family": manifest["family"],
            "drafter": drafter,
            "default_verifier": default,
            "is_fine_tuned": drafter.target is not target,
            "num_parameters": sum(parameter.numel() for parameter in parameters),
            "artifact_mb": sum(file.stat().st_size for file in own_files(path)) / 1e6,
            "train_s": manifest.get("train_s"),
        }
        reference = None
        if columns["is_fine_tuned"]:
            # The fine-tuned target writes other text than the original one, so it needs its own baseline.
            reference = f"{name} ({PLAIN})"
            decode = draftsmith_method(drafter.target, verifier=default, config=config)
            alone = DecodingMethod(name=reference, decode=decode)
            found.append(Contender(method=alone, default_verifier=default, is_fine_tuned=True))
            found += _coupled_baseline(drafter.target, reference, settings, is_fine_tuned=True)
        decode = draftsmith_method(drafter.target, drafter, verifier=default, config=config)
        method = DecodingMethod(name=name, decode=decode, reference=reference, drafter=drafter)
        own = _tried(Contender(method=method, **columns), prompts[0], settings)
        found.append(own)
        assistant = assistant_of(drafter) if settings.assisted else None
        if assistant is not None:
            decode = transformers_method(target, assistant, config=config)
            assisted = DecodingMethod(name=f"{TRANSFORMERS}: {name}", decode=decode)
            found.append(Contender(method=assisted, max_batch_size=1, counts_forwards=False))
        if _competes(own, settings):
            ablations = (_tried(one, prompts[0], settings) for one in _ablations(method, drafter, columns, settings))
            found += [one for one in ablations if _competes(one, settings)]
    drafting = [one for one in found if one.drafter is not None and not one.is_ablation]
    if drafting and not any(_competes(one, settings) for one in drafting):
        reasons = {one.method.name: next(iter(one.left_out_at.values())) for one in drafting}
        raise ValueError("no artifact can draft: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))
    return found


def left_out(competing: Sequence[Contender], settings: BakeoffSettings) -> dict[str, str]:
    """Returns why drafters are missing from the table, by name, or from parts of it, by name and temperature."""
    return {
        f"{one.method.name}{'' if not _competes(one, settings) else f' at temperature {temperature:g}'}": reason
        for one in competing
        for temperature, reason in one.left_out_at.items()
        if not one.is_ablation
    }


def _tried(contender: Contender, prompt: Prompt, settings: BakeoffSettings) -> Contender:
    """Returns the contender with the temperatures at which it cannot decode, found by trying, which it prints."""
    reasons = {}
    for temperature in settings.temperatures:
        if contender.competes_at(temperature, 1):
            try:
                warm_up(contender.method, [prompt.ids], temperature)
            except ValueError as error:
                reasons[temperature] = str(error)
    found = replace(contender, left_out_at=reasons)
    for temperature, reason in reasons.items():
        where = f" at temperature {temperature:g}" if _competes(found, settings) else ""
        print(f"{contender.method.name} is left out{where}: {reason}")
    return found


def _competes(contender: Contender, settings: BakeoffSettings) -> bool:
    """Returns whether a contender is in any part of the table."""
    return any(contender.competes_at(temperature, 1) for temperature in settings.temperatures)


def _coupled_baseline(
    target: Target, plain: str, settings: BakeoffSettings, *, is_fine_tuned: bool = False
) -> Iterator[Contender]:
    """Yields plain decoding by the verifier "coupled", if drafters are compared with it: their text must equal its."""
    if COUPLED in settings.verifiers:
        name = f"{plain} ({COUPLED})"
        decode = draftsmith_method(target, verifier=COUPLED, config=parse_config(settings.generation_config))
        method = DecodingMethod(name=name, decode=decode, reference=name)
        yield Contender(method=method, verifier=COUPLED, is_fine_tuned=is_fine_tuned)


def _ablations(
    own: DecodingMethod, drafter: Any, columns: dict[str, Any], settings: BakeoffSettings
) -> Iterator[Contender]:
    """Yields the drafter of `own` with each other verifier, draft-length policy and confidence threshold."""

    def changed(label: str, **options: Any) -> DecodingMethod:
        default = COUPLED if settings.batch_invariant else "auto"
        given = {"verifier": default, "config": parse_config(settings.generation_config)}
        options = {"drafter": drafter} | given | options
        return replace(own, name=f"{own.name} ({label})", decode=draftsmith_method(drafter.target, **options))

    for verifier in settings.verifiers:
        is_lossless = verify.find(verifier)[0].LOSSLESS
        method = changed(verifier, verifier=verifier)
        if verifier == COUPLED:
            method = replace(method, reference=f"{own.reference or PLAIN} ({COUPLED})")
        yield Contender(method=method, verifier=verifier, is_lossless=is_lossless, **columns)
    for policy in settings.lengths:
        yield Contender(method=changed(policy, policy=policy), length=policy, **columns)
    for threshold in settings.confidence_thresholds:
        yield Contender(
            method=changed(f"threshold {threshold:g}", drafter=TargetConfidenceThreshold(drafter, threshold)),
            confidence_threshold=threshold,
            **columns,
        )


def _names(artifacts: Sequence[Path]) -> list[str]:
    """Returns each folder's name, prefixed with its parent's name where two are the same."""
    names = [path.resolve().name for path in artifacts]
    taken = [*names, PLAIN, TRANSFORMERS, PROMPT_LOOKUP]
    longer = [
        name if taken.count(name) == 1 else f"{path.resolve().parent.name}/{name}"
        for name, path in zip(names, artifacts, strict=True)
    ]
    repeated = next((name for name in longer if longer.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"two artifacts are called {repeated}; rename the folder of one of them")
    return longer


def fingerprint(artifact: Path) -> str:
    """Returns a hash of the artifact's files."""
    return hash_files(own_files(artifact))
