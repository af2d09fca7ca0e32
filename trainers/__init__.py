"""Trainers: one training loop (`trainers.training.loop.train`) and one file per family.

A family's trainer is a module with the names below; the loop finds them by name and knows no family.

    Settings                     frozen, keyword-only dataclass of the command-line settings; a field `config` of the
                                 drafter's own Config makes its fields settings as well
    check(settings, target)      optional; raises ValueError for settings that do not fit the target, before its weights
                                 load
    needs(settings, target) -> Needs
                                 target outputs that batches must contain
    evaluate(drafter, batch, settings, target) -> metrics
                                 metrics on held-out rows; "acceptance" is required, larger is better
    summarise(means, costs) -> means
                                 optional; further metrics computed from the means of `evaluate` and the measured costs
    RUNS_BLOCKS                  optional; True if training runs or tunes the target's own blocks
    BEST_METRIC                  optional; metric that selects the best checkpoint, "acceptance" by default
    finish(drafter, settings, target, held_out) -> drafter
                                 optional; final step after training, such as choosing the draft tree

Trained by gradient:

    build(settings, target) -> drafter
                                 new drafter with float32 weights
    prepare(drafter, settings, target, rows)
                                 optional; initialises a new drafter from the training rows
    loss(drafter, batch, settings, target) -> (sum, metrics)
                                 loss summed over the batch's supervised tokens
    step_needs(settings, target, step) -> Needs
                                 optional; what a training batch must contain when `step` steps are done, `needs` by
                                 default
    begin_step(drafter, settings, step, num_steps)
                                 optional; called before each optimiser step with the number of steps done
    first_steps(settings) -> (name, number)
                                 optional; a setting, and its number of first steps, which train otherwise than the rest
    learning_rate_factors(settings) -> {prefix: step -> factor}
                                 optional; learning-rate factors of the weights whose names start with the prefix
    transform_batch(drafter, batch, settings, target, salt) -> batch
                                 optional; changes a training batch before the target reads it; randomness must depend
                                 on the row keys and `salt` alone
    self_generated(drafter, batch, settings, target) -> batch | None
                                 optional; held-out prompts continued by the drafter, on which it is evaluated as well
                                 ("acceptance_on_draft_text")
    measure_costs(drafter, settings, target) -> costs
                                 optional; costs on this machine, measured once before training

Built without gradient, in place of these:

    fit(settings, target, rows, run, output) -> drafter
                                 builds the drafter; keeps in `output` what an interrupted run needs to continue
    prior_train_s(settings) -> seconds
                                 optional; training time of the artifacts that the drafter is composed of
    NOTHING_TO_ESTIMATE          optional; why `--dry-run` cannot estimate the run from its rows

Metrics are (sum, count) pairs, added over micro-batches and ranks and divided once, when they are logged.
"""

from dataclasses import dataclass

from torch import Tensor

Metrics = dict[str, tuple[Tensor, int]]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Target outputs that a family reads, in every batch or for held-out rows only."""

    layers: tuple[int, ...] = ()
    """Hidden layers; 0 is the embedding output, i the output of the i-th block."""
    top_k: int = 0
    """Number of largest logits kept at each position."""
    held_out_layers: tuple[int, ...] = ()
    """Additional hidden layers that `evaluate` and `finish` read."""
