"""Why a drafter accepts less than it did in training: checks that name the usual causes, each by what it can measure.

A fault is told where a record differs from what is there now, or where the drafter does clearly better if the fault is
undone: 0.05 and three standard errors more of its first tokens are right.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from data.batches import Example
from draftsmith import Target
from draftsmith.artifacts.artifact import LAYER_INDEX
from draftsmith.artifacts.model_card import WEIGHTS
from draftsmith.artifacts.provenance import rotary, template_hash
from eval.doctor.serving import ServingCounts, agrees
from eval.doctor.teacher_forced import OFFSETS, DraftCounts, GreedyText, draft_from_positions

THETAS = (10_000.0, 500_000.0, 1_000_000.0)
MARGIN, ERRORS = 0.05, 3
LEAST_GREEDY = 0.9
Verdict = Literal["sound", "fault", "not known"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found."""

    name: str
    verdict: Verdict
    told: str


@dataclass(frozen=True, kw_only=True)
class CheckContext:
    """An artifact, loaded, with texts that its target wrote greedily."""

    manifest: dict[str, Any]
    drafter: Any
    texts: Sequence[GreedyText]
    places: Sequence[tuple[int, int]]
    depth: int
    teacher_forced: DraftCounts
    """What its drafts came to at `places`."""

    @property
    def target(self) -> Target:
        return self.drafter.target

    def again(self, drafter: Any, *, shift: int = 0) -> DraftCounts:
        """Returns the same of another drafter, or of this one reading other layers."""
        return draft_from_positions(self.target, drafter, self.texts, self.places, self.depth, shift=shift)

    def is_better(self, share: float) -> bool:
        """Returns whether so many first tokens right are clearly more than the drafter's own."""
        own = self.teacher_forced.right_at(0)
        error = math.sqrt(max(own * (1 - own), share * (1 - share)) / max(self.teacher_forced.num_drafts, 1))
        return share > own + max(MARGIN, ERRORS * error)


def check_template(manifest: dict[str, Any], data: dict[str, Any] | None, tokenizer: Any) -> Finding:
    """Compares the chat template of training, and of the data's writing, with the tokenizer's now."""
    now = template_hash(tokenizer)
    recorded = {"the artifact": manifest.get("made_with"), "its data": data}
    known = {what: record["template_hash"] for what, record in recorded.items() if record and "template_hash" in record}
    if not known:
        return Finding(name="template", verdict="not known", told="nothing recorded which chat template was used")
    other = [what for what, before in known.items() if before != now]
    if other:
        were = "were" if len(other) > 1 else "was"
        told = f"{' and '.join(other)} {were} made with another chat template than the tokenizer has now"
        return Finding(name="template", verdict="fault", told=told)
    told = "there was no chat template, nor is there one" if now is None else "the chat template is that of training"
    return Finding(name="template", verdict="sound", told=told)


@torch.no_grad()
def check_mask(rows: Sequence[Example], target: Target, data: dict[str, Any] | None) -> Finding:
    """Looks whether the loss mask covers what the target wrote: of greedy text, whether it would write that again."""
    num_learnt = int(sum(row.loss_mask_T[1:].sum() for row in rows))
    num_tokens = sum(len(row.tokens_T) for row in rows)
    covered = f"the loss mask covers {num_learnt:,} of {num_tokens:,} tokens looked at"
    if not num_learnt:
        return Finding(name="mask", verdict="fault", told=f"{covered}: nothing is learnt")
    if data is None or "temperature" not in data:
        return Finding(
            name="mask", verdict="not known", told=f"{covered}; whether the target wrote them is not recorded"
        )
    if set(data["temperature"]) != {0.0}:
        return Finding(
            name="mask", verdict="not known", told=f"{covered}; only of greedy text can it be told whose it is"
        )
    agreed, first = [], []
    for row in rows:
        tokens_T, mask_T = row.tokens_T.to(target.device), row.loss_mask_T.to(target.device)
        hidden_1TD = target.read(tokens_T[None], layers=(target.num_layers,))[target.num_layers]
        is_own_T = target.logits(hidden_1TD)[0, :-1].argmax(-1) == tokens_T[1:]
        agreed.append(is_own_T[mask_T[1:]])
        first.append(agreed[-1][:1])
    share, first_share = (float(torch.cat(parts).float().mean()) for parts in (agreed, first))
    told = f"{covered}; the target would write {share:.0%} of these again, and {first_share:.0%} of each text's first"
    if min(share, first_share) < LEAST_GREEDY:
        return Finding(name="mask", verdict="fault", told=f"{told}: the mask covers what the target did not write")
    return Finding(name="mask", verdict="sound", told=told)


def check_layers(patient: CheckContext) -> Finding:
    """Gives the drafter the hidden layers before and after those it asks for."""
    if patient.manifest.get("layer_index", LAYER_INDEX) != LAYER_INDEX:
        told = f"the artifact counts layers so: {patient.manifest['layer_index']!r}; here {LAYER_INDEX!r}"
        return Finding(name="layers", verdict="fault", told=told)
    layers = patient.drafter.hidden_layers
    if not layers:
        return Finding(name="layers", verdict="sound", told="it reads no hidden layers of the target")
    shifts = [
        shift for shift in (-1, 1) if min(layers) + shift >= 0 and max(layers) + shift <= patient.target.num_layers
    ]
    found = {shift: patient.again(patient.drafter, shift=shift).right_at(0) for shift in shifts}
    own = f"{patient.teacher_forced.right_at(0):.0%} of first tokens are right with layers {_list(layers)}"
    shares = "".join(f", {share:.0%} with {_list([one + shift for one in layers])}" for shift, share in found.items())
    better = [shift for shift, share in found.items() if patient.is_better(share)]
    if better:
        told = f"{own}{shares}: it was trained on layers {'one lower' if better[0] < 0 else 'one higher'}"
        return Finding(name="layers", verdict="fault", told=told)
    return Finding(name="layers", verdict="sound", told=own + shares)


def check_rotary(patient: CheckContext) -> Finding:
    """Compares the target's rotary positions with those of training, and tries other bases in the drafter's own."""
    recorded = (patient.manifest.get("made_with") or {}).get("rotary")
    now = rotary(patient.target.model.config)
    if recorded is not None and recorded != now:
        told = f"the target's rotary positions were {recorded} in training and are {now}"
        return Finding(name="rotary", verdict="fault", told=told)
    target_told = (
        "the target's are those of training" if recorded is not None else "of the target's nothing is recorded"
    )
    bases = _bases(dataclasses.asdict(patient.drafter.config))
    if not bases or patient.target is not patient.target.base:
        verdict: Verdict = "sound" if recorded is not None else "not known"
        return Finding(name="rotary", verdict=verdict, told=f"{target_told}; the drafter sets none of its own")
    others = {*THETAS, *_bases(now)} - set(bases)
    found = {theta: patient.again(with_base(patient.drafter, theta)).right_at(0) for theta in sorted(others)}
    own = f"{patient.teacher_forced.right_at(0):.0%} of first tokens are right with base {_list(bases)}"
    shares = "".join(f", {share:.0%} with {theta:g}" for theta, share in found.items())
    best = max(found, key=lambda theta: found[theta])
    if patient.is_better(found[best]):
        told = f"{own}{shares}: it was trained with another base of its rotary positions, such as {best:g}"
        return Finding(name="rotary", verdict="fault", told=told)
    return Finding(name="rotary", verdict="sound", told=f"{target_told}; {own}{shares}")


def check_vocabulary(drafter: Any, texts: Sequence[GreedyText]) -> Finding:
    """Looks whether d2t and t2d name the same tokens, in order, and how much of the text these are."""
    buffers = dict(drafter.named_buffers()) if isinstance(drafter, nn.Module) else {}
    d2t, t2d = buffers.get("d2t"), buffers.get("t2d")
    if d2t is None or t2d is None:
        return Finding(name="vocabulary", verdict="sound", told="it drafts with no map of its own")
    ids_W = d2t.cpu() + torch.arange(len(d2t))
    named = set(t2d.cpu().nonzero()[:, 0].tolist())
    fault = ""
    if (ids_W.diff() <= 0).any() or int(ids_W.min()) < 0 or int(ids_W.max()) >= len(t2d):
        fault = "d2t leads outside the vocabulary or not upwards: it holds differences, target id less draft id"
    elif set(ids_W.tolist()) != named:
        fault = f"d2t and t2d differ in {len(set(ids_W.tolist()) ^ named)} tokens"
    if fault:
        return Finding(name="vocabulary", verdict="fault", told=fault)
    written = [token for text in texts for token in text.ids[text.num_prompt :]]
    share = sum(token in named for token in written) / len(written)
    told = f"{len(named):,} of {len(t2d):,} tokens can be drafted, {share:.0%} of what the target wrote"
    return Finding(name="vocabulary", verdict="sound", told=told)


def check_dtype(folder: Path, manifest: dict[str, Any], target: Target) -> Finding:
    """Compares the dtypes of target and stored weights with those of training; looks for NaN and infinity."""
    recorded = (manifest.get("made_with") or {}).get("dtype")
    now = str(target.dtype).removeprefix("torch.")
    stored: set[str] = set()
    broken = []
    for name, tensor in _tensors(folder / WEIGHTS):
        if tensor.is_floating_point():
            stored.add(str(tensor.dtype).removeprefix("torch."))
            broken += [name] if not tensor.isfinite().all() else []
    if broken:
        return Finding(name="dtype", verdict="fault", told=f"{_list(broken)} hold NaN or infinity")
    if recorded is None:
        return Finding(name="dtype", verdict="not known", told=f"nothing recorded the dtype of training; now {now}")
    order = ("float16", "bfloat16", "float32", "float64")
    narrower = [kind for kind in stored if kind in order and order.index(kind) < order.index(recorded)]
    if narrower:
        told = f"the weights are stored in {_list(narrower)} and were trained with a target in {recorded}"
        return Finding(name="dtype", verdict="fault", told=told)
    if now != recorded:
        return Finding(name="dtype", verdict="fault", told=f"the target was in {recorded} in training and is in {now}")
    return Finding(name="dtype", verdict="sound", told=f"the target is in {now}, as in training")


def check_position(patient: CheckContext, judged: float | None) -> Finding:
    """Looks whether first tokens are right for another place, and compares them with the trainer's judgement.

    `judged` is how often the trainer says that the first token is right, None if it does not say.
    """
    rates = {offset: patient.teacher_forced.right_at(offset) for offset in OFFSETS}
    best = max(rates, key=lambda offset: rates[offset])
    own = f"{rates[0]:.1%} of first tokens are right"
    if best and patient.is_better(rates[best]):
        told = f"{own}, and {rates[best]:.1%} are what stands {abs(best)} {'later' if best > 0 else 'earlier'}: shifted"
        return Finding(name="position", verdict="fault", told=told)
    if judged is None:
        return Finding(name="position", verdict="sound", told=f"{own}, and at no other place more are")
    told = f"{own} in drafts, {judged:.1%} by the trainer's own reckoning of the same texts"
    error = math.sqrt(max(judged * (1 - judged), 0.01) / max(patient.teacher_forced.num_drafts, 1))
    is_whole = len(patient.places) == sum(len(text.ids) - text.num_prompt for text in patient.texts)
    if abs(judged - rates[0]) > (0.02 if is_whole else max(MARGIN, ERRORS * error)):
        return Finding(
            name="position", verdict="fault", told=f"{told}: training and drafting read the texts differently"
        )
    return Finding(name="position", verdict="sound", told=told)


def check_carried(patient: CheckContext, fresh: DraftCounts, carried: DraftCounts) -> Finding:
    """Compares drafts begun afresh with those of real decoding at the very same places."""
    told = f"decoding accepts {_mean(carried):.2f} tokens a draft, drafts begun afresh at its places {_mean(fresh):.2f}"
    if patient.drafter.keeps_state_between_calls or not isinstance(patient.drafter, nn.Module):
        return Finding(name="carried state", verdict="sound", told=f"{told}; it may learn as it goes")
    # At the end of a text less is drafted in decoding, of which a tree may be another: a token a text proves nothing.
    slack = len(patient.texts) / max(carried.num_drafts, 1)
    if abs(_mean(carried) - _mean(fresh)) > max(0.02 * max(1.0, _mean(fresh)), slack):
        told += ": what it keeps from step to step goes astray"
        return Finding(name="carried state", verdict="fault", told=told)
    return Finding(name="carried state", verdict="sound", told=told)


def check_export(served: ServingCounts, own: ServingCounts, *, is_tree: bool) -> Finding:
    """Compares what vLLM accepts of the artifact's export with what draftsmith's loop accepts of as long drafts."""
    told = f"vLLM accepts {served.per_draft:.2f} tokens a draft, draftsmith's loop {own.per_draft:.2f}"
    if is_tree:
        return Finding(name="export", verdict="not known", told=f"{told}, of trees: vLLM verifies one token a place")
    if agrees(served, own):
        return Finding(name="export", verdict="sound", told=told)
    same = sum(one == other for one, other in zip(served.texts, own.texts, strict=True))
    told += f" ({same} of {len(own.texts)} texts are the same): vLLM does not run what was exported"
    return Finding(name="export", verdict="fault", told=told)


def with_base(drafter: Any, theta: float) -> Any:
    """Returns the drafter with another base of its rotary positions, and the same weights."""
    values = _rebased(dataclasses.asdict(drafter.config), theta)
    changes = {name: values[name] for name in values if values[name] != dataclasses.asdict(drafter.config)[name]}
    other = type(drafter)(dataclasses.replace(drafter.config, **changes), drafter.target)
    other.load_state_dict(drafter.state_dict())
    return other.to(drafter.target.device).eval()


def _bases(values: Any) -> list[float]:
    """Returns the bases of rotary positions anywhere in a configuration."""
    if not isinstance(values, dict):
        return []
    own = [float(value) for key, value in values.items() if key in ("theta", "rope_theta")]
    return sorted({*own, *(base for value in values.values() for base in _bases(value))})


def _rebased(values: Any, theta: float) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: theta if key in ("theta", "rope_theta") else _rebased(value, theta) for key, value in values.items()}


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.is_file():
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                yield name, stored.get_tensor(name)


def _mean(counts: DraftCounts) -> float:
    return sum(counts.accepted) / max(counts.num_drafts, 1)


def _list(values: Any) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
