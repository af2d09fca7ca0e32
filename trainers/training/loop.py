"""Entry point of all trainers: `train` runs any family under any launcher and writes an artifact."""

import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Subset
from transformers import TrainerCallback

import draftsmith
from data.batches import Batch, Example, collate, split, truncate
from data.examples import Examples, check_target, open_examples, usable_rows
from data.folder_lock import locked
from data.shards import check_folder, first_run_time, open_folder
from data.teacher import complete
from data.teacher_store import TeacherStore
from draftsmith import Target
from draftsmith.artifacts import json_text
from draftsmith.artifacts.artifact import check_fits, read_manifest
from draftsmith.artifacts.families import find
from draftsmith.length.costs import num_threads
from draftsmith.loading.model_info import TargetInfo, read_target_info
from draftsmith.loading.placement.spread import check_spread
from trainers.compilation.compiled_losses import check_compiler, compiled_losses
from trainers.training import checkpoints, evaluation, launchers, logs
from trainers.training.estimates import dry_run
from trainers.training.estimates.trial import Trial, TrialResult, TrialRun
from trainers.training.evaluation import ACCEPTANCE
from trainers.training.gradient import DraftTrainer, LossModule, training_arguments
from trainers.training.run_settings import RunSettings
from trainers.training.settings import flat


def train(family: ModuleType, settings: Any, run: RunSettings) -> Path:
    """Trains a drafter of `family` and returns the folder of its artifact.

    Continues an unfinished run in that folder and skips a finished one. Raises ValueError for invalid settings, data
    or folders, before the target's weights load unless the check needs them.
    """
    started, command = time.perf_counter(), shlex.join(sys.argv)
    name = family.__name__.rpartition(".")[2]
    output = run.folder(name).resolve()
    dry_run.check(run, launchers.num_ranks())
    if run.dry_run and hasattr(family, "NOTHING_TO_ESTIMATE"):
        print(f"{name}: {family.NOTHING_TO_ESTIMATE}, so there is nothing to estimate")
        return output
    deepspeed = launchers.begin(run)
    check_spread(run.device_map, tensor_parallel=run.tensor_parallel)
    if not run.dry_run:
        launchers.write_default_data(run)
    target_info = read_target_info(run.target)
    _check_tensor_parallel(run, family, target_info)
    _check_has_losses(run, family)
    if hasattr(family, "check"):
        family.check(settings, target_info)
    _check_first_steps(settings, run, family)
    _check_start(run, family, target_info)
    now = first_run_time(output, checkpoints.MARKER)
    examples = open_examples(run.data, target_info, settings=run.text, now=now)
    max_length = min(run.max_length, target_info.context_length)
    usable = usable_rows(examples, run.data, max_length=max_length, max_left_out=run.text.max_left_out)
    if run.dry_run:
        _dry_run(family, settings, run, examples, usable, max_length, output, started)
        return output
    identity = {"family": name, **flat(settings), **run.identity()}
    if hasattr(family, "fit"):
        identity["data_fingerprint"] = examples.fingerprint
    is_first = launchers.rank() == 0
    with locked(output, kept=partial(checkpoints.kept, output)) if is_first else nullcontext():
        options: dict[str, Any] = {"notes": {"command": command, "template_time": now.isoformat()}}
        if is_first:
            checkpoints.set_damaged_aside(output)
            options["disposable"] = checkpoints.disposable(output)
            check_folder(output, checkpoints.MARKER, identity, **options)
        if checkpoints.is_finished(output):
            checkpoints.clear(output)
            print(f"{output}: this run is finished; nothing to do")
            return output
        target = _load_target(run)
        if run.tensor_parallel:
            _ = target.fingerprint  # which all ranks compute together
        check_target(examples, run.data, target)
        train_rows, held_out = _split(_narrowed(examples, family, settings, target), usable, run, max_length)
        if is_first:
            open_folder(output, checkpoints.MARKER, identity, **options)
        logs.begin(run, flat(settings) | flat(run), output)
        earlier_s, costs = 0.0, dict[str, float]()
        if hasattr(family, "fit"):
            drafter = family.fit(settings, target, train_rows, run, output) if is_first else None
            earlier_s = family.prior_train_s(settings) if hasattr(family, "prior_train_s") else 0.0
        else:
            facts = {"data_fingerprint": examples.fingerprint, "target_fingerprint": target.fingerprint}
            drafter, earlier_s, costs = _train_by_gradient(
                family, settings, run, target, train_rows, list(held_out), output, deepspeed, facts
            )
        if is_first or run.tensor_parallel:
            drafter, acceptance = _finish_and_evaluate(drafter, family, settings, run, target, held_out, costs)
        if is_first:
            train_s = round(earlier_s + time.perf_counter() - started, 1)
            record: dict[str, Any] = {
                "command": command,
                "trainer": name,
                "seed": run.seed,
                "settings": flat(settings) | flat(run),
                "data_fingerprint": examples.fingerprint,
                "measured_acceptance": json_text.without_nan(acceptance),
                "train_s": train_s,
            }
            logs.log_artifact(run, acceptance, train_s, output)
            draftsmith.save(drafter, output / "artifact", target=target, record=record)
            checkpoints.publish(output / "artifact", output)
            print(f"{output}: trained in {train_s:.0f} s; held-out {ACCEPTANCE} {evaluation.shown(acceptance)}")
    launchers.end()
    return output


def _dry_run(
    family: ModuleType,
    settings: Any,
    run: RunSettings,
    examples: Examples,
    usable: list[int],
    max_length: int,
    output: Path,
    started: float,
) -> None:
    """Estimates the run from short ones in temporary folders; `started` is the clock's time when it began."""
    target = _load_target(run)
    check_target(examples, run.data, target)
    train_rows, held_out = _split(_narrowed(examples, family, settings, target), usable, run, max_length)
    facts = {"data_fingerprint": examples.fingerprint, "target_fingerprint": target.fingerprint}

    def train_briefly(one: TrialRun) -> TrialResult:
        costs = dict[str, float]()
        if hasattr(family, "fit"):
            drafter = family.fit(settings, target, one.rows, one.run, one.folder)
        else:
            drafter, _, costs = _train_by_gradient(
                family, settings, one.run, target, one.rows, list(held_out), one.folder, None, facts, one.callbacks
            )
        began = time.perf_counter()
        drafter, _ = _finish_and_evaluate(drafter, family, settings, one.run, target, held_out, costs)
        draftsmith.save(drafter, one.folder / "artifact", target=target, record={})
        return TrialResult(drafter=drafter, finish_s=time.perf_counter() - began)

    trial = Trial(
        name=family.__name__.rpartition(".")[2],
        run=dataclasses.replace(run, report_to="jsonl"),
        target=target,
        rows=train_rows,
        held_out=held_out,
        output=output,
        is_by_gradient=not hasattr(family, "fit"),
        train=train_briefly,
    )
    dry_run.dry_run(trial, max_length, time.perf_counter() - started)


def _load_target(run: RunSettings) -> Target:
    if run.compile:
        check_compiler(launchers.device())  # before the weights load
    return Target.from_pretrained(
        run.target,
        dtype="bfloat16" if run.bf16 else "float32",
        device=launchers.device(),
        device_map=run.device_map,
        tensor_parallel=run.tensor_parallel,
        pack_weights=False,  # it reads whole texts, where packing gains little
    )


def _finish_and_evaluate(
    drafter: Any,
    family: ModuleType,
    settings: Any,
    run: RunSettings,
    target: Target,
    held_out: list[Batch],
    costs: dict[str, float],
) -> tuple[Any, dict[str, float]]:
    """Returns the drafter after the family's final step, and its metrics on the held-out batches."""
    needs = family.needs(settings, target)
    layers = needs.layers + needs.held_out_layers
    batches = [complete(batch, target, layers, needs.top_k) for batch in held_out]
    if hasattr(family, "finish"):
        # It measures costs, and training may run on more threads than decoding.
        with num_threads(run.decode_threads):
            drafter = family.finish(drafter, settings, target, batches)
    with torch.no_grad():
        return drafter, evaluation.evaluate_all(drafter, batches, family, settings, target, needs, costs)


def _train_by_gradient(
    family: ModuleType,
    settings: Any,
    run: RunSettings,
    target: Target,
    train_rows: Sequence[Example],
    held_out: list[Batch],
    output: Path,
    deepspeed: str | None,
    facts: dict[str, Any],
    observers: Sequence[TrainerCallback] = (),
) -> tuple[Any, float, dict[str, float]]:
    """Trains by gradient; returns the drafter at its best checkpoint, the seconds of training before this session and
    the costs measured before the first step.
    """
    facts = facts | {"num_ranks": launchers.num_ranks()}
    resumed = checkpoints.newest_complete(output)
    step, saved = resumed or (0, {"spent_s": 0.0, "best_step": 0, "costs": {}})
    changed = [f"{key} was {saved[key]}, is {value}" for key, value in facts.items() if resumed and saved[key] != value]
    if changed:
        raise ValueError(f"{output} cannot be continued ({'; '.join(changed)}); choose another --output")
    if step < run.max_steps:
        costs = saved["costs"] if resumed else _measure_costs(family, settings, run, target)
        torch.manual_seed(run.seed)
        drafter = family.build(settings, target)
        if next(drafter.parameters(), None) is None:
            print(f"{output}: with these settings the drafter has no parameters to train")
            return drafter.eval(), 0.0, {}
        if hasattr(family, "prepare"):
            family.prepare(drafter, settings, target, train_rows)
        if run.start_from:
            _load_start_weights(drafter, run, target)
        arguments = training_arguments(run, output, deepspeed, evaluation.best_metric(family))
        saved["costs"] = launchers.broadcast_from_rank_0(costs)
        trainer = DraftTrainer(
            LossModule(drafter, family, settings, target, saved["costs"]),
            arguments,
            target=target,
            held_out=held_out,
            output=output,
            facts={**facts, "costs": saved["costs"]},
            earlier_s=saved["spent_s"],
            observers=observers,
            train_dataset=train_rows,
            eval_dataset=held_out,
            max_length=min(run.max_length, target.context_length),
            group_by_length=run.group_by_length,
            data_collator=list,
        )
        if resumed:
            print(f"{output}: continuing at step {step} of {run.max_steps}")
        target.ranks_differ = run.tensor_parallel
        with compiled_losses() if run.compile else nullcontext():
            trainer.train(resume_from_checkpoint=str(checkpoints.folder(output, step)) if resumed else None)
        target.ranks_differ = False
        saved = {**saved, "best_step": trainer.state.best_global_step}
    if deepspeed:
        launchers.disable_sharded_init()
    # Under ZeRO-3 only the checkpoint has complete weights, so the drafter is built again and loaded from it.
    torch.manual_seed(run.seed)
    drafter = family.build(settings, target).to(target.dtype).eval()
    weights = load_file(checkpoints.best_undamaged(output, saved["best_step"]) / checkpoints.WEIGHTS)
    drafter.load_state_dict({name.removeprefix("drafter."): weight for name, weight in weights.items()})
    return drafter, saved["spent_s"], saved["costs"]


def _check_tensor_parallel(run: RunSettings, family: ModuleType, target: TargetInfo) -> None:
    """Raises ValueError if a family, a target or DeepSpeed cannot be combined with a target spread over the ranks."""
    if not run.tensor_parallel:
        return
    name = family.__name__.rpartition(".")[2]
    if hasattr(family, "fit"):
        raise ValueError(f"{name} is built without gradient, by one process; omit --tensor-parallel")
    if getattr(family, "RUNS_BLOCKS", False):
        raise ValueError(
            f"{name} runs or tunes the target's own blocks while it trains, which cannot be combined with"
            " --tensor-parallel; train it without"
        )
    if target.is_encoder_decoder:
        raise ValueError(
            f"{target.name} is an encoder-decoder, for which there is no --tensor-parallel training; omit it"
        )
    if run.deepspeed:
        raise ValueError("--deepspeed and --tensor-parallel cannot be combined; give one of them")


def _check_has_losses(run: RunSettings, family: ModuleType) -> None:
    """Raises ValueError if a setting of optimiser steps is given for a family that takes none."""
    if not hasattr(family, "fit"):
        return
    name = family.__name__.rpartition(".")[2]
    if run.compile:
        raise ValueError(f"{name} is built without gradient, so there is no loss to compile; omit --compile")
    if run.group_by_length:
        raise ValueError(f"{name} is built without gradient, so there are no batches to group; omit --group-by-length")


def _check_first_steps(settings: Any, run: RunSettings, family: ModuleType) -> None:
    """Raises ValueError if all steps are of the kind that a family begins with."""
    if not hasattr(family, "first_steps"):
        return
    name, number = family.first_steps(settings)
    if number and number >= run.max_steps:
        raise ValueError(
            f"{name} is {number}, and max_steps {run.max_steps}: give fewer first steps than steps, as"
            " the rest train what those leave out"
        )


def _check_start(run: RunSettings, family: ModuleType, target: TargetInfo) -> None:
    """Raises ValueError if --start-from is unsuitable for this family, as far as its manifest shows."""
    if not run.start_from:
        return
    manifest = read_manifest(run.start_from)
    check_fits(run.start_from, manifest, target)
    if hasattr(family, "fit"):
        raise ValueError(f"--start-from {run.start_from}: this family is built without gradient, so remove that flag")
    if find(manifest["family"]).Drafter is not getattr(family, "Drafter", None):
        raise ValueError(
            f"--start-from {run.start_from} is a drafter of another family, {manifest['family']}; "
            "use an artifact of the family to train"
        )


def _load_start_weights(drafter: nn.Module, run: RunSettings, target: Target) -> None:
    """Copies the weights of the artifact --start-from; raises ValueError if names or shapes differ."""
    start = draftsmith.load(run.start_from, target)
    weights = start.state_dict()
    changed = _changed(start.config, drafter.config)
    shapes = {name: weight.shape for name, weight in drafter.state_dict().items()}
    differing = [name for name in shapes | weights if name not in weights or weights[name].shape != shapes.get(name)]
    if differing:
        raise ValueError(
            f"--start-from {run.start_from} has weights of another shape, such as {min(differing)}"
            f"{f' ({changed})' if changed else ''}; use the settings that it was trained with"
        )
    if changed:
        print(f"--start-from {run.start_from}: {changed}")
    drafter.load_state_dict(weights)


def _changed(old: Any, new: Any) -> str:
    """Returns the settings, of two configurations of a family, whose values differ."""
    pairs = ((field.name, getattr(old, field.name), getattr(new, field.name)) for field in dataclasses.fields(new))
    return ", ".join(f"{name} was {was!r:.60}, is {value!r:.60}" for name, was, value in pairs if was != value)


def _measure_costs(family: ModuleType, settings: Any, run: RunSettings, target: Target) -> dict[str, float]:
    """Returns the costs that the family measures before training, of a drafter in decoding precision."""
    if not hasattr(family, "measure_costs"):
        return {}
    with num_threads(run.decode_threads):
        return family.measure_costs(family.build(settings, target).to(target.dtype).eval(), settings, target)


def _narrowed(examples: Examples, family: ModuleType, settings: Any, target: Target) -> Examples:
    """Returns a teacher store that reads only what a family trained by gradient needs; other examples as they are."""
    if hasattr(family, "fit") or not isinstance(examples, TeacherStore):
        return examples
    needs = family.needs(settings, target)
    return examples.reading((*needs.layers, *needs.held_out_layers), top=needs.top_k > 0)


def _split(
    examples: Examples, usable: list[int], run: RunSettings, max_length: int
) -> tuple[Sequence[Example], list[Batch]]:
    """Returns the training rows and the batches of held-out rows, both of the `usable` rows."""
    keys = [examples.keys[index] for index in usable]
    train_rows, held_out = (
        [usable[index] for index in side] for side in split(keys, held_out_share=run.held_out_share, seed=run.seed)
    )
    batch_size = run.batch_size * launchers.num_ranks()
    if len(train_rows) < batch_size:
        raise ValueError(f"{run.data} has {len(train_rows)} training rows, fewer than the {batch_size} of one batch")
    rows = [truncate(examples[index], max_length) for index in held_out[: run.max_held_out]]
    batches = [collate(rows[begin : begin + run.batch_size]) for begin in range(0, len(rows), run.batch_size)]
    return Subset(examples, train_rows), batches  # type: ignore[arg-type,return-value]
