"""Checks for the usual causes of a drafter accepting fewer tokens than in training.

A check reports a fault if a recorded condition differs from the present one, or if undoing the suspected fault raises
the drafter's first-token accuracy by more than 0.05 and three standard errors.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from data.batches import Example
from draftsmith import Target
from draftsmith.artifacts import json_text
from draftsmith.artifacts.artifact import LAYER_INDEX
from draftsmith.artifacts.model_card import WEIGHTS, is_hub_name
from draftsmith.artifacts.provenance import rotary, template_hash
from eval.doctor.serving import ServingCounts, agrees
from eval.doctor.teacher_forced import OFFSETS, DraftCounts, GreedyText, draft_from_positions

THETAS = (10_000.0, 500_000.0, 1_000_000.0)
MARGIN, ERRORS = 0.05, 3
MIN_GREEDY_AGREEMENT = 0.9
Verdict = Literal["ok", "fault", "unknown"]
REMEDIES = {
    "template": "restore that chat template, or make the data again and retrain",
    "mask": "make the data again with ./launch.sh pseudo_data and retrain",
    "numbers": "load the target in float32, or train the drafter again with a smaller learning rate",
    "layers": "correct the layers in the artifact's draft_config.json",
    "rotary": "load the target that was trained on, or correct the rotary base in the artifact's draft_config.json",
    "vocabulary": "write d2t and t2d from one sorted list of target ids",
    "dtype": "load the target as in training (--dtype), or save the weights again",
    "position": "compare the shift of labels in training with the positions in drafting",
    "carried state": "compare what the drafter keeps in `observe` with what it reads in training",
    "verifier": "export again with --target-name and the folder or hub name of the target there",
    "export": "compare the exported files with docs/serving.md and the server's version",
}
"""Remedy of a fault, by the name of its check."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check."""

    name: str
    verdict: Verdict
    message: str


@dataclass(frozen=True, kw_only=True)
class CheckContext:
    """A loaded artifact with greedy texts of its target, on which the checks run."""

    manifest: dict[str, Any]
    drafter: Any
    texts: Sequence[GreedyText]
    positions: Sequence[tuple[int, int]]
    """(text, position in it) at which drafts begin."""
    depth: int
    """Largest number of drafted tokens."""
    teacher_forced: DraftCounts
    """Accuracy of the drafts at `positions`, given the target's text before them."""

    @property
    def target(self) -> Target:
        return self.drafter.target

    def rerun(self, drafter: Any, *, shift: int = 0) -> DraftCounts:
        """Returns the counts of another drafter, or with hidden layers shifted by `shift`."""
        return draft_from_positions(self.target, drafter, self.texts, self.positions, self.depth, shift=shift)

    def is_better(self, accuracy: float) -> bool:
        """Returns True if this first-token accuracy is significantly higher than the drafter's own."""
        own = self.teacher_forced.accuracy_at(0)
        error = math.sqrt(max(own * (1 - own), accuracy * (1 - accuracy)) / max(self.teacher_forced.num_drafts, 1))
        return accuracy > own + max(MARGIN, ERRORS * error)


def check_template(manifest: dict[str, Any], data: dict[str, Any] | None, tokenizer: Any) -> Finding:
    """Compares the chat templates of training and of the data with the tokenizer's present one."""
    now = template_hash(tokenizer)
    recorded = {"the artifact": manifest.get("made_with"), "its data": data}
    known = {name: record["template_hash"] for name, record in recorded.items() if record and "template_hash" in record}
    if not known:
        return Finding(name="template", verdict="unknown", message="the chat template of training is not recorded")
    different = [name for name, before in known.items() if before != now]
    if different:
        were = "were" if len(different) > 1 else "was"
        message = f"{' and '.join(different)} {were} made with a chat template other than the tokenizer's present one"
        return Finding(name="template", verdict="fault", message=message)
    message = "no chat template, as in training" if now is None else "same chat template as in training"
    return Finding(name="template", verdict="ok", message=message)


@torch.no_grad()
def check_mask(rows: Sequence[Example], target: Target, data: dict[str, Any] | None) -> Finding:
    """Checks that the loss mask covers the target's own tokens, by comparing greedy text with the target's argmax."""
    num_supervised = int(sum(row.loss_mask_T[1:].sum() for row in rows))
    num_tokens = sum(len(row.tokens_T) for row in rows)
    covered = f"the loss mask covers {num_supervised:,} of {num_tokens:,} inspected tokens"
    if not num_supervised:
        return Finding(name="mask", verdict="fault", message=f"{covered}: there is nothing to learn from")
    if data is None or "temperature" not in data:
        return Finding(
            name="mask", verdict="unknown", message=f"{covered}; whether the target generated them is not recorded"
        )
    if set(data["temperature"]) != {0.0}:
        return Finding(
            name="mask", verdict="unknown", message=f"{covered}; only greedy text can be checked against the target"
        )
    agreements, first = [], []
    for row in rows:
        tokens_T, mask_T = row.tokens_T.to(target.device), row.loss_mask_T.to(target.device)
        hidden_1TD = target.read(tokens_T[None], layers=(target.num_layers,))[target.num_layers]
        is_own_T = target.logits(hidden_1TD)[0, :-1].argmax(-1) == tokens_T[1:]
        agreements.append(is_own_T[mask_T[1:]])
        first.append(agreements[-1][:1])
    share, first_share = (float(torch.cat(parts).float().mean()) for parts in (agreements, first))
    message = f"{covered}; {share:.0%} of these and {first_share:.0%} of each text's first are the target's argmax"
    if min(share, first_share) < MIN_GREEDY_AGREEMENT:
        return Finding(
            name="mask", verdict="fault", message=f"{message}: the mask covers tokens that the target did not generate"
        )
    return Finding(name="mask", verdict="ok", message=message)


@contextmanager
def watched_modules(drafter: Any) -> Iterator[list[str]]:
    """Yields a list to which the drafter's modules that put out NaN or infinite numbers are added while it drafts.

    Minus infinity is left out: it is the logit of tokens outside a shortlist.
    """
    broken: list[str] = []

    def hook(name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and bool((output.isnan() | output.isposinf()).any()) and name not in broken:
                broken.append(name)

        return look

    modules = drafter.named_modules() if isinstance(drafter, nn.Module) else ()
    hooks = [module.register_forward_hook(hook(name)) for name, module in modules if name]
    try:
        yield broken
    finally:
        for one in hooks:
            one.remove()


def check_numbers(drafter: Any, broken: Sequence[str]) -> Finding:
    """Reports modules that put out numbers that are not finite, although their weights are."""
    if broken:
        message = f"the drafter's module {broken[0]} puts out NaN or infinite numbers in {drafter.target.dtype}"
        return Finding(name="numbers", verdict="fault", message=message)
    return Finding(name="numbers", verdict="ok", message="all numbers that the drafter computes are finite")


def check_layers(context: CheckContext) -> Finding:
    """Compares first-token accuracy with the hidden layers one below and one above those that the drafter reads."""
    if context.manifest.get("layer_index", LAYER_INDEX) != LAYER_INDEX:
        message = (
            f"the artifact's layer index is {context.manifest['layer_index']!r}; this version's is {LAYER_INDEX!r}"
        )
        return Finding(name="layers", verdict="fault", message=message)
    layers = context.drafter.hidden_layers
    if not layers:
        return Finding(name="layers", verdict="ok", message="the drafter reads no hidden layers of the target")
    shifts = [
        shift for shift in (-1, 1) if min(layers) + shift >= 0 and max(layers) + shift <= context.target.num_layers
    ]
    accuracies = {shift: context.rerun(context.drafter, shift=shift).accuracy_at(0) for shift in shifts}
    own = f"{context.teacher_forced.accuracy_at(0):.0%} first-token accuracy with layers {_list(layers)}"
    others = "".join(
        f", {accuracy:.0%} with {_list([one + shift for one in layers])}" for shift, accuracy in accuracies.items()
    )
    better = [shift for shift, accuracy in accuracies.items() if context.is_better(accuracy)]
    if better:
        message = f"{own}{others}: it was trained with layers {'one lower' if better[0] < 0 else 'one higher'}"
        return Finding(name="layers", verdict="fault", message=message)
    return Finding(name="layers", verdict="ok", message=own + others)


def check_rotary(context: CheckContext) -> Finding:
    """Compares the target's rotary parameters with those of training, and tries other bases in the drafter."""
    recorded = (context.manifest.get("made_with") or {}).get("rotary")
    now = rotary(context.target.model.config)
    if recorded is not None and recorded != now:
        message = f"the target's rotary parameters were {recorded} in training and are {now}"
        return Finding(name="rotary", verdict="fault", message=message)
    target_message = (
        "the target's are those of training" if recorded is not None else "the target's in training are not recorded"
    )
    bases = _bases(dataclasses.asdict(context.drafter.config))
    if not bases or context.target is not context.target.base:
        verdict: Verdict = "ok" if recorded is not None else "unknown"
        return Finding(name="rotary", verdict=verdict, message=f"{target_message}; the drafter has none of its own")
    candidates = {*THETAS, *_bases(now)} - set(bases)
    accuracies = {
        theta: context.rerun(with_base(context.drafter, theta)).accuracy_at(0) for theta in sorted(candidates)
    }
    own = f"{context.teacher_forced.accuracy_at(0):.0%} first-token accuracy with base {_list(bases)}"
    others = "".join(f", {accuracy:.0%} with {theta:g}" for theta, accuracy in accuracies.items())
    best = max(accuracies, key=lambda theta: accuracies[theta])
    if context.is_better(accuracies[best]):
        message = f"{own}{others}: it was trained with another rotary base, such as {best:g}"
        return Finding(name="rotary", verdict="fault", message=message)
    return Finding(name="rotary", verdict="ok", message=f"{target_message}; {own}{others}")


def check_vocabulary(drafter: Any, texts: Sequence[GreedyText]) -> Finding:
    """Checks that d2t and t2d name the same tokens in ascending order, and how much of the text these cover."""
    buffers = dict(drafter.named_buffers()) if isinstance(drafter, nn.Module) else {}
    d2t, t2d = buffers.get("d2t"), buffers.get("t2d")
    if d2t is None or t2d is None:
        return Finding(name="vocabulary", verdict="ok", message="the drafter uses the target's vocabulary")
    ids_W = d2t.cpu() + torch.arange(len(d2t))
    named = set(t2d.cpu().nonzero()[:, 0].tolist())
    fault = ""
    if (ids_W.diff() <= 0).any() or int(ids_W.min()) < 0 or int(ids_W.max()) >= len(t2d):
        fault = "d2t leaves the vocabulary or is not ascending; it must contain target id minus draft id"
    elif set(ids_W.tolist()) != named:
        fault = f"d2t and t2d differ in {len(set(ids_W.tolist()) ^ named)} tokens"
    if fault:
        return Finding(name="vocabulary", verdict="fault", message=fault)
    written = [token for text in texts for token in text.ids[text.num_prompt :]]
    share = sum(token in named for token in written) / len(written)
    message = f"{len(named):,} of {len(t2d):,} tokens can be drafted; they are {share:.0%} of the target's text"
    return Finding(name="vocabulary", verdict="ok", message=message)


def check_dtype(folder: Path, manifest: dict[str, Any], target: Target) -> Finding:
    """Compares the dtypes of target and stored weights with those of training."""
    recorded = (manifest.get("made_with") or {}).get("dtype")
    now = str(target.dtype).removeprefix("torch.")
    stored = {
        str(tensor.dtype).removeprefix("torch.")
        for _, tensor in _tensors(folder / WEIGHTS)
        if tensor.is_floating_point()
    }
    if recorded is None:
        return Finding(
            name="dtype", verdict="unknown", message=f"the dtype of training is not recorded; it is now {now}"
        )
    order = ("float16", "bfloat16", "float32", "float64")
    narrower = [kind for kind in stored if kind in order and order.index(kind) < order.index(recorded)]
    if narrower:
        message = f"the weights are stored in {_list(narrower)}, but were trained with a target in {recorded}"
        return Finding(name="dtype", verdict="fault", message=message)
    if now != recorded:
        return Finding(
            name="dtype", verdict="fault", message=f"the target was in {recorded} in training and is in {now}"
        )
    return Finding(name="dtype", verdict="ok", message=f"the target is in {now}, as in training")


def check_position(context: CheckContext, trainer_accuracy: float | None) -> Finding:
    """Checks whether first tokens match another position, and compares their accuracy with the trainer's own.

    `trainer_accuracy` is the first-token accuracy by the trainer's evaluation, None if it has none.
    """
    rates = {offset: context.teacher_forced.accuracy_at(offset) for offset in OFFSETS}
    best = max(rates, key=lambda offset: rates[offset])
    own = f"first-token accuracy {rates[0]:.1%}"
    if best and context.is_better(rates[best]):
        direction = "later" if best > 0 else "earlier"
        message = f"{own}, but {rates[best]:.1%} against tokens {abs(best)} {direction}: drafts are shifted"
        return Finding(name="position", verdict="fault", message=message)
    if trainer_accuracy is None:
        return Finding(name="position", verdict="ok", message=f"{own}, not higher against tokens at other positions")
    message = f"{own} in drafts, {trainer_accuracy:.1%} by the trainer's evaluation of the same texts"
    error = math.sqrt(max(trainer_accuracy * (1 - trainer_accuracy), 0.01) / max(context.teacher_forced.num_drafts, 1))
    covers_all_positions = len(context.positions) == sum(len(text.ids) - text.num_prompt for text in context.texts)
    if abs(trainer_accuracy - rates[0]) > (0.02 if covers_all_positions else max(MARGIN, ERRORS * error)):
        return Finding(
            name="position", verdict="fault", message=f"{message}: training and drafting process the texts differently"
        )
    return Finding(name="position", verdict="ok", message=message)


def check_state(context: CheckContext, fresh: DraftCounts, carried: DraftCounts) -> Finding:
    """Compares teacher-forced drafts with those of real decoding at the same positions."""
    message = f"decoding accepts {_mean(carried):.2f} tokens per draft, teacher-forced drafts {_mean(fresh):.2f}"
    if context.drafter.keeps_state_between_calls or not isinstance(context.drafter, nn.Module):
        return Finding(
            name="carried state", verdict="ok", message=f"{message}; its state may legitimately depend on earlier steps"
        )
    # Decoding drafts less at the end of a text, possibly another tree: a token per text is no evidence.
    slack = len(context.texts) / max(carried.num_drafts, 1)
    if abs(_mean(carried) - _mean(fresh)) > max(0.02 * max(1.0, _mean(fresh)), slack):
        message += ": the state carried from step to step is wrong"
        return Finding(name="carried state", verdict="fault", message=message)
    return Finding(name="carried state", verdict="ok", message=message)


def check_export(served: ServingCounts, own: ServingCounts, *, is_tree: bool, engine: str = "vLLM") -> Finding:
    """Compares greedy acceptance of the exported artifact in an engine with draftsmith's, for drafts of one length.

    At temperature 0 only: above it, vLLM 0.32.0 for CPUs does not sample the model while it speculates.
    """
    message = f"{engine} accepts {served.per_draft:.2f} tokens per draft greedily, draftsmith {own.per_draft:.2f}"
    if is_tree:
        return Finding(
            name="export",
            verdict="unknown",
            message=f"{message}; draftsmith drafts trees, of which {engine} verifies one token per position",
        )
    if agrees(served, own):
        return Finding(name="export", verdict="ok", message=message)
    same = sum(one == other for one, other in zip(served.texts, own.texts, strict=True))
    message += f" ({same} of {len(own.texts)} texts are equal): {engine} does not reproduce the exported drafter"
    return Finding(name="export", verdict="fault", message=message)


def check_verifier(export: Path) -> Finding:
    """Checks whether the speculators library finds the verifier that an export names.

    It needs the verifier's weights to load the drafter at all, and takes a relative name from the folder where it is
    started. Raises ValueError if there is no export for speculators.
    """
    try:
        name = json_text.read(export / "config.json")["speculators_config"]["verifier"]["name_or_path"]
    except (OSError, LookupError, TypeError) as error:
        raise ValueError(f"{export} is no export for speculators: its config.json names no verifier") from error
    if (Path(name) / "config.json").is_file():
        return Finding(name="verifier", verdict="ok", message=f"speculators finds its verifier, {name}")
    if (export / name / "config.json").is_file():
        message = f"speculators finds its verifier, {name}, where it is started in {export}"
        return Finding(name="verifier", verdict="ok", message=message)
    if not name.startswith(".") and is_hub_name(name):
        message = f"the verifier {name} is no folder here, so speculators looks for it on the hub"
        return Finding(name="verifier", verdict="unknown", message=message)
    message = f"the verifier {name} is no model's folder, so speculators cannot load the drafter"
    return Finding(name="verifier", verdict="fault", message=message)


def with_base(drafter: Any, theta: float) -> Any:
    """Returns the drafter with another rotary base and the same weights."""
    values = _rebased(dataclasses.asdict(drafter.config), theta)
    changes = {name: values[name] for name in values if values[name] != dataclasses.asdict(drafter.config)[name]}
    other = type(drafter)(dataclasses.replace(drafter.config, **changes), drafter.target)
    other.load_state_dict(drafter.state_dict())
    return other.to(drafter.target.device).eval()


def _bases(values: Any) -> list[float]:
    """Returns all rotary bases in a nested configuration."""
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
