"""Searches for the sublayers to skip in self-drafting (Draft & Verify, 2309.08168; SWIFT, 2410.06916).

Shape suffixes: B rows, T positions, N supervised positions.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import draftsmith
from data.batches import Batch, Example, collate, example, order
from data.shards import write_atomically
from draftsmith import Target
from draftsmith.artifacts import json_text
from draftsmith.drafters.layerskip import Config, Drafter
from draftsmith.length import policies
from draftsmith.loading.model_info import TargetInfo
from draftsmith.parts.checks import check_at_least
from draftsmith.parts.self_drafting.sublayers import sublayers
from trainers import Metrics
from trainers.corpora import evaluation
from trainers.layer_search.bits import Bits, Space
from trainers.layer_search.search import METHODS, search
from trainers.layer_search.sublayer_costs import (
    CachedTexts,
    SublayerCosts,
    influence,
    measure_costs,
    simulate,
    speed_up,
)
from trainers.training.logs import make_logger
from trainers.training.run_settings import RunSettings

NOTHING_TO_ESTIMATE = "its time is that of --max-trials searches, whatever the data"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The search and its objective, and how drafts are made; `--max-steps` is the number of masks evaluated."""

    objective: str = field(default="modelled", metadata={"choices": ["modelled", "acceptance", "speed"]})
    """Predicted speed-up from measured costs and drafts simulated on the text (modelled); fraction of the target's
    tokens predicted correctly, at a fixed skip_ratio (acceptance); or measured tokens per second of decoding, which
    depends on the load of the machine (speed)."""
    search: str = field(default="gp", metadata={"choices": list(METHODS)})
    """Search method: a Gaussian process of the scores (gp), neighbours of the best mask (greedy), or random."""
    skip_ratio: float = 0.0
    """Fraction of all sublayers that is skipped, rounded down to a whole number; 0 for any."""
    num_texts: int = 8
    """Number of rows that masks are evaluated on."""
    text_tokens: int = 256
    """Number of tokens of each that are read."""
    new_tokens: int = 32
    """Number of tokens decoded after each prompt, with the objective speed."""
    config: Config = field(
        default_factory=Config,
        metadata={
            "omit": (
                *("attention", "mlp"),
                *("window", "guided_every", "good_enough", "patience", "max_trials"),
            )
        },
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_texts", "new_tokens")
        check_at_least(self, 3, "text_tokens")
        if not 0 <= self.skip_ratio <= 1:
            raise ValueError(f"skip_ratio is {self.skip_ratio}; it must lie between 0 and 1")
        if self.objective == "acceptance" and not self.skip_ratio:
            raise ValueError("acceptance alone is best without skipping: give a skip_ratio, such as 0.45")


def check(settings: Settings, target: TargetInfo) -> None:
    """Raises ValueError for an encoder-decoder, before its weights load."""
    if target.is_encoder_decoder:
        raise ValueError(f"{target.name} is an encoder-decoder; only sublayers of causal targets can be skipped")


needs = evaluation.needs


def fit(settings: Settings, target: Target, rows: Sequence[Example], run: RunSettings, output: Path) -> Drafter:
    """Returns the drafter with the best mask found; `evaluations.jsonl` in `output` logs all masks evaluated."""
    num_layers = target.num_layers
    num_ones = int(settings.skip_ratio * 2 * num_layers) if settings.skip_ratio else None
    space = Space(num_bits=2 * num_layers, num_ones=num_ones)
    sample = _sample_rows(rows, settings, run.seed)
    texts = CachedTexts(target, collate(sample), settings.config.num_draft)
    starts = initial_masks(influence(target, sample), num_ones)
    score_of = _objective(settings, target, texts, sample, output)
    best = search(
        settings.search,
        space,
        score_of,
        starts,
        num_evaluations=run.max_steps,
        seed=run.seed,
        path=output / "evaluations.jsonl",
        report=make_logger(run, output),
    )
    decoded = _decode(Drafter(_config(settings, best), target), sample, settings.text_tokens)
    print(
        f"best: skips {sum(best[:num_layers])} attention and {sum(best[num_layers:])} feed-forward layers of"
        f" {num_layers}; {decoded['tau']:.2f} tokens per round in decoding these texts"
    )
    return Drafter(_config(settings, best), target)


def evaluate(drafter: Drafter, batch: Batch, settings: Settings, target: Target) -> Metrics:
    """Returns the fraction of the target's own tokens that are predicted, and results of simulated greedy decoding.

    These are the tokens committed (tau) and drafted per round.
    """
    texts, config = CachedTexts(target, batch, drafter.config.num_draft), drafter.config
    right_N, confidence_N = texts.agreement(drafter.skipped)
    policy = policies.make("fixed" if config.width else config.length)
    rounds = simulate(texts.segments(right_N, confidence_N), policy, config.num_draft)
    num_drafted, num_tokens = (sum(drafted for drafted, _ in rounds), sum(matched + 1 for _, matched in rounds))
    return {
        "acceptance": (right_N.sum(), len(right_N)),
        "tau": (torch.tensor(num_tokens), len(rounds)),
        "drafted": (torch.tensor(num_drafted), len(rounds)),
    }


def initial_masks(influences: Sequence[float], num_ones: int | None) -> list[Bits]:
    """Returns the first masks to evaluate: every second block, attention alone, and the least influential sublayers.

    Each skips sublayers in some order, up to a quarter, half or three quarters of them, or up to `num_ones`.
    """
    num_layers = len(influences) // 2
    space = Space(num_bits=2 * num_layers, num_ones=num_ones)
    second = [*range(1, num_layers, 2), *range(0, num_layers, 2)]
    by_influence = sorted(range(2 * num_layers), key=influences.__getitem__)
    attention_by_influence = [bit for bit in by_influence if bit < num_layers]
    rest = [bit for bit in by_influence if bit >= num_layers]
    half, quarter = num_layers, num_layers // 2
    orders: list[tuple[list[int], list[int]]] = [
        ([bit for block in second for bit in (block, num_layers + block)], [half]),
        ([*second, *(num_layers + block for block in second)], [quarter]),
        ([*attention_by_influence, *rest], [quarter]),
        (by_influence, [quarter, half, half + quarter]),
    ]
    chosen = [order[:size] for order, sizes in orders for size in (sizes if num_ones is None else [num_ones])]
    return list(dict.fromkeys(space.ones(one) for one in chosen))


def _objective(
    settings: Settings, target: Target, texts: CachedTexts, rows: Sequence[Example], output: Path
) -> Callable[[Bits], dict[str, float]]:
    if settings.objective == "speed":
        # Warms up.
        _decode(Drafter(_config(settings, (0,) * 2 * target.num_layers), target), rows[:1], settings.new_tokens)
        return lambda bits: _decode(Drafter(_config(settings, bits), target), rows, settings.new_tokens)
    is_modelled = settings.objective == "modelled"
    costs = _load_or_measure_costs(target, settings.config.num_draft, output / "costs.json") if is_modelled else None

    def score_of(bits: Bits) -> dict[str, float]:
        config = _config(settings, bits)
        right_N, confidence_N = texts.agreement(sublayers(config.attention, config.mlp))
        acceptance = right_N.float().mean().item()
        if costs is None:
            return {"score": acceptance}
        policy = policies.make("fixed" if config.width else config.length)
        rounds = simulate(texts.segments(right_N, confidence_N), policy, config.num_draft)
        return {
            "score": speed_up(rounds, bits, costs),
            "acceptance": acceptance,
            "tau": 1 + sum(num_matched for _, num_matched in rounds) / len(rounds),
            "draft_cost": costs.draft(bits) / costs.whole,
        }

    return score_of


def _decode(drafter: Drafter, rows: Sequence[Example], most: int) -> dict[str, float]:
    """Returns tokens per second, prefill included, and tau of greedy decoding from rows' first supervised tokens."""
    began, tokens, steps = time.perf_counter(), 0, 0
    for row in rows:
        num_prompt = max(1, int(row.loss_mask_T.int().argmax()))
        prompt_1T, num_new = row.tokens_T[None, :num_prompt], min(most, len(row.tokens_T) - num_prompt)
        stats = draftsmith.generate(
            drafter.target, prompt_1T.to(drafter.target.device), drafter, max_new_tokens=num_new
        ).stats
        tokens, steps = tokens + stats.new_tokens, steps + stats.steps
    return {"score": tokens / (time.perf_counter() - began), "tau": tokens / steps}


def _load_or_measure_costs(target: Target, num_draft: int, path: Path) -> SublayerCosts:
    """Returns the costs in the file `path`, which are measured and written first if it does not exist."""
    if not path.exists():
        costs = measure_costs(target, num_draft)
        write_atomically(
            path, lambda staging: staging.write_text(json_text.text_of(dataclasses.asdict(costs), indent=1))
        )
    return SublayerCosts(**json_text.read(path))


def _config(settings: Settings, bits: Bits) -> Config:
    blocks = range(len(bits) // 2)
    return dataclasses.replace(
        settings.config,
        attention=tuple(block for block in blocks if bits[block]),
        mlp=tuple(block for block in blocks if bits[len(blocks) + block]),
    )


def _sample_rows(rows: Sequence[Example], settings: Settings, seed: int) -> list[Example]:
    """Returns the first tokens of random rows with supervised tokens among them, without stored target outputs."""
    sample: list[Example] = []
    for index in order(len(rows), seed=seed, epoch=0):
        if len(sample) == settings.num_texts:
            break
        row = rows[index]
        tokens_T, mask_T = row.tokens_T[: settings.text_tokens], row.loss_mask_T[: settings.text_tokens]
        if mask_T[2:].any():
            sample.append(example(tokens_T.tolist(), mask_T.tolist(), row.key))
    if not sample:
        raise ValueError(f"no row has a supervised token among its first {settings.text_tokens} tokens")
    return sample
