"""Trainers: one loop (`trainers.training.loop.train`) and one small file per family, which supplies what is below.

A family's file is a module with these names; the loop knows no family by name.

    Settings                               a frozen, keyword-only dataclass
    check(settings, facts)                 optional: refuses what is wrong before the target's weights load
    build(settings, target) -> drafter     a new drafter, its weights in float32
    prepare(drafter, settings, target, rows)     optional: what a new drafter takes from the rows before training
    needs(settings, target) -> Needs       what batches must hold of the target
    loss(drafter, batch, settings, target) -> (sum, metrics)     the loss summed over the batch's supervised tokens
    begin_step(drafter, settings, step, num_steps)               optional: told before each step how many are done
    rate_factors(settings) -> {prefix: step -> factor}           optional: of the learning rate of weights called so
    mix(drafter, batch, settings, target, salt) -> batch         optional: a batch as it is to be learnt from, before
                                                                 the target reads it; chance goes by rows and salt
    judge(drafter, batch, settings, target) -> metrics           on held-out rows: "acceptance", the larger the better
    own_text(drafter, batch, settings, target) -> batch | None   optional: held-out rows rewritten by the drafter, on
                                                                 which it is judged too: "acceptance_on_draft_text"
    measure(drafter, settings, target) -> costs                  optional: of the machine, once before training
    conclude(means, costs) -> means        optional: further held-out figures, worked out of those of `judge`
    BEST                                   optional: the held-out figure that names the best step; else "acceptance"
    finish(drafter, settings, target, held_out) -> drafter       optional: a last touch after training
    fit(settings, target, rows, run, output) -> drafter          in place of `loss` and `build`: without gradient; what
                                                                 it needs to be continued it keeps in `output`
    spent_s(settings) -> seconds           optional, beside `fit`: of training that went into what it is made from

Metrics are (sum, count) pairs, added over micro-batches and ranks and divided once, when they are logged.
"""

from dataclasses import dataclass

from torch import Tensor

Metrics = dict[str, tuple[Tensor, int]]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a family reads of the target, in every batch or on held-out rows only."""

    layers: tuple[int, ...] = ()
    """Hidden layers; 0 is the embedding output, i the output of the i-th block."""
    top_k: int = 0
    """Largest logits at each position."""
    held_out_layers: tuple[int, ...] = ()
    """Hidden layers that `judge` and `finish` read beside those."""
