"""The one entry point of all trainers: `train` runs any family under any launcher and leaves an artifact."""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Subset

import draftsmith
from data.batches import Batch, Example, collate, cut, split
from data.examples import Examples, check_target, open_examples
from data.shards import open_folder
from data.teacher import complete
from draftsmith import Target
from draftsmith.artifacts.artifact import check_fits, read_manifest
from draftsmith.artifacts.families import find
from draftsmith.core.model_info import TargetFacts, read_facts
from draftsmith.core.stats import num_threads
from trainers.training import checkpoints, evaluation, launchers, logs
from trainers.training.evaluation import ACCEPTANCE
from trainers.training.gradient import DraftTrainer, Step, arguments_of
from trainers.training.run_settings import RunSettings
from trainers.training.settings import flat


def train(family: ModuleType, settings: Any, run: RunSettings) -> Path:
    """Trains a drafter of `family` and returns the folder that holds its artifact.

    Continues an unfinished run found there; says so and does nothing if it is finished. Raises ValueError for
    settings, data or folders that do not fit, before the target's weights load wherever they are not needed to tell.
    """
    started, command = time.perf_counter(), shlex.join(sys.argv)
    name = family.__name__.rpartition(".")[2]
    output = run.folder(name).resolve()
    deepspeed = launchers.begin(run)
    launchers.write_default_data(run)
    target_facts = read_facts(run.target)
    if hasattr(family, "check"):
        family.check(settings, target_facts)
    _check_start(run, family, target_facts)
    examples = open_examples(run.data, target_facts)
    if launchers.rank() == 0:
        identity = {"family": name, **flat(settings), **run.identity()}
        if hasattr(family, "fit"):
            identity["data_fingerprint"] = examples.fingerprint
        open_folder(output, checkpoints.MARKER, identity, notes={"command": command})
    if checkpoints.is_finished(output):
        print(f"{output} holds the finished run of these very settings: nothing is left to do")
        return output
    logs.begin(run, flat(settings) | flat(run), output)

    target = Target.from_pretrained(run.target, dtype="bfloat16" if run.bf16 else "float32", device=launchers.device())
    target.model.requires_grad_(False)
    check_target(examples, run.data, target)
    train_on, held_out = _split(examples, run, min(run.max_length, target.context_length))
    spent_s, costs = 0.0, dict[str, float]()
    if hasattr(family, "fit"):
        drafter = family.fit(settings, target, train_on, run, output) if launchers.rank() == 0 else None
        spent_s = family.prior_train_s(settings) if hasattr(family, "prior_train_s") else 0.0
    else:
        facts = {"data_fingerprint": examples.fingerprint, "target_fingerprint": target.fingerprint}
        drafter, spent_s, costs = _descend(
            family, settings, run, target, train_on, list(held_out), output, deepspeed, facts
        )
    if launchers.rank() == 0:
        needs = family.needs(settings, target)
        judged = [complete(batch, target, needs.layers + needs.held_out_layers, needs.top_k) for batch in held_out]
        if hasattr(family, "finish"):
            # Costs are measured there: training may run on more threads than decoding does.
            with num_threads(run.decode_threads):
                drafter = family.finish(drafter, settings, target, judged)
        with torch.no_grad():
            acceptance = evaluation.evaluate_all(drafter, judged, family, settings, target, needs, costs)
        record: dict[str, Any] = {
            "command": command,
            "trainer": name,
            "seed": run.seed,
            "settings": flat(settings) | flat(run),
            "data_fingerprint": examples.fingerprint,
            "measured_acceptance": acceptance,
            "train_s": round(spent_s + time.perf_counter() - started, 1),
        }
        logs.conclude(run, acceptance, record["train_s"], output)
        draftsmith.save(drafter, output / "artifact", target=target, record=record)
        checkpoints.publish(output / "artifact", output)
        print(f"{output}: trained in {record['train_s']:.0f} s; held-out {ACCEPTANCE} {acceptance[ACCEPTANCE]:.3f}")
    launchers.end()
    return output


def _descend(
    family: ModuleType,
    settings: Any,
    run: RunSettings,
    target: Target,
    train_on: Sequence[Example],
    held_out: list[Batch],
    output: Path,
    deepspeed: str | None,
    facts: dict[str, Any],
) -> tuple[Any, float, dict[str, float]]:
    """Trains by gradient; returns the drafter at its best checkpoint, the seconds spent in earlier sessions, and what
    was measured before the first.
    """
    facts = facts | {"num_ranks": launchers.num_ranks()}
    resumed = checkpoints.newest_whole(output)
    step, found = resumed or (0, {"spent_s": 0.0, "best_step": 0, "costs": {}})
    changed = [f"{key} was {found[key]}, is {value}" for key, value in facts.items() if resumed and found[key] != value]
    if changed:
        raise ValueError(f"{output} cannot be continued ({'; '.join(changed)}); name another --output")
    if step < run.max_steps:
        costs = found["costs"] if resumed else _measured(family, settings, run, target)
        torch.manual_seed(run.seed)
        drafter = family.build(settings, target)
        if next(drafter.parameters(), None) is None:
            print(f"{output}: these settings leave nothing to train")
            return drafter.eval(), 0.0, {}
        if hasattr(family, "prepare"):
            family.prepare(drafter, settings, target, train_on)
        if run.start_from:
            _take_weights(drafter, run, target)
        arguments = arguments_of(run, output, deepspeed, evaluation.best_of(family))
        found["costs"] = launchers.from_rank_0(costs)
        trainer = DraftTrainer(
            Step(drafter, family, settings, target, found["costs"]),
            arguments,
            target=target,
            held_out=held_out,
            output=output,
            facts={**facts, "costs": found["costs"]},
            spent_s=found["spent_s"],
            train_dataset=train_on,
            eval_dataset=held_out,
            data_collator=_Collate(min(run.max_length, target.context_length)),
        )
        if resumed:
            print(f"{output}: continuing at step {step} of {run.max_steps}")
        trainer.train(resume_from_checkpoint=str(checkpoints.folder(output, step)) if resumed else None)
        found = {**found, "best_step": trainer.state.best_global_step}
    if deepspeed:
        launchers.leave_deepspeed()
    # Sharded weights (ZeRO-3) are whole in the checkpoint only, so that the drafter is built anew from it.
    torch.manual_seed(run.seed)
    drafter = family.build(settings, target).to(target.dtype).eval()
    weights = load_file(checkpoints.folder(output, found["best_step"]) / checkpoints.WEIGHTS)
    drafter.load_state_dict({name.removeprefix("drafter."): weight for name, weight in weights.items()})
    return drafter, found["spent_s"], found["costs"]


def _check_start(run: RunSettings, family: ModuleType, target: TargetFacts) -> None:
    """Raises ValueError for an artifact that no run of this family can start from, by its manifest alone."""
    if not run.start_from:
        return
    manifest = read_manifest(run.start_from)
    check_fits(run.start_from, manifest, target)
    if hasattr(family, "fit"):
        raise ValueError(f"--start-from {run.start_from}: what is made without gradient starts from nothing")
    if find(manifest["family"]).Drafter is not getattr(family, "Drafter", None):
        raise ValueError(f"--start-from {run.start_from} is a drafter of another family, {manifest['family']}")


def _take_weights(drafter: nn.Module, run: RunSettings, target: Target) -> None:
    given = draftsmith.load(run.start_from, target).state_dict()
    own = {name: weight.shape for name, weight in drafter.state_dict().items()}
    wrong = [name for name in own.keys() | given.keys() if name not in given or given[name].shape != own.get(name)]
    if wrong:
        raise ValueError(f"--start-from {run.start_from} is of another shape, as in {min(wrong)}; ask for the same one")
    drafter.load_state_dict(given)


def _measured(family: ModuleType, settings: Any, run: RunSettings, target: Target) -> dict[str, float]:
    """Returns what the family wants measured once, of a drafter as it is to decode."""
    if not hasattr(family, "measure_costs"):
        return {}
    with num_threads(run.decode_threads):
        return family.measure_costs(family.build(settings, target).to(target.dtype).eval(), settings, target)


def _split(examples: Examples, run: RunSettings, max_length: int) -> tuple[Sequence[Example], list[Batch]]:
    """Returns the rows to train on and the held-out ones in batches."""
    train_on, held_out = split(examples.keys, held_out_share=run.held_out_share, seed=run.seed)
    batch_size = run.batch_size * launchers.num_ranks()
    if len(train_on) < batch_size:
        raise ValueError(f"{run.data} has {len(train_on)} rows to train on, fewer than the {batch_size} of one batch")
    rows = [cut(examples[index], max_length) for index in held_out[: run.max_held_out]]
    batches = [collate(rows[begin : begin + run.batch_size]) for begin in range(0, len(rows), run.batch_size)]
    return Subset(examples, train_on), batches  # type: ignore[arg-type,return-value]


class _Collate:
    """Joins rows, each cut to `max_length` tokens, under the name that the loop knows them by."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length

    def __call__(self, rows: Sequence[Example]) -> dict[str, Batch]:
        return {"batch": collate([cut(row, self._max_length) for row in rows])}
