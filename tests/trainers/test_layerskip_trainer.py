"""The search for sublayers to skip: scores against real decoding, each objective by hand, and `kill -9`."""

import itertools
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import draftsmith
from data.batches import Example, collate, example
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.drafters.layerskip import Config, Drafter
from draftsmith.length.policies import Confidence, Fixed
from draftsmith.parts.self_drafting.sublayers import sublayers
from tests.support.models import greedy_by_transformers, prompts, tiny_target
from tests.support.runs import command, environment, make_data, make_target, trainer_settings
from trainers import layerskip
from trainers.layer_search.sublayer_costs import (
    CachedTexts,
    SublayerCosts,
    influence,
    measure_costs,
    simulate,
    speed_up,
)
from trainers.layerskip import evaluate, initial_masks
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings

TARGET = tiny_target("llama")
COSTS = SublayerCosts(
    whole=10.0, no_attention=6.0, no_mlp=7.0, neither=1.0, verify={"0": 10.0, "1": 11.0, "2": 12.0, "4": 16.0}
)


def greedy_rows(num_rows: int = 3, num_new: int = 20) -> list[Example]:
    """Returns greedy continuations of prompts; the prompts are not supervised."""
    texts = greedy_by_transformers("llama", num_rows, num_new)
    given = [len(prompt) for prompt in prompts(num_rows)]
    return [
        example(ids, [position >= begin for position in range(len(ids))], str(begin))
        for ids, begin in zip(texts, given, strict=True)
    ]


def segments(right: list[int], confidence: list[float] | None = None) -> Any:
    return iter([([bool(one) for one in right], confidence or [0.9] * len(right))])


def test_simulated_rounds_by_hand() -> None:
    """Drafts of three tokens: two correct, none correct, all correct, and the rest of the text."""
    assert simulate(segments([1, 1, 0, 0, 1, 1, 1, 1, 1]), Fixed(), 3) == [(3, 2), (3, 0), (3, 3), (1, 1)]
    sure = [0.9, 0.1, 0.9, 0.9, 0.9, 0.2, 0.9]
    assert simulate(segments([1, 1, 1, 1, 0, 1, 1], sure), Confidence(0.5), 3) == [(2, 2), (3, 1), (1, 1)]
    twice = itertools.chain(segments([1]), segments([0, 1]))
    assert simulate(twice, Fixed(), 3) == [(1, 1), (2, 0), (1, 1)], "no draft crosses segments"


def test_costs_and_speed_up_by_hand() -> None:
    assert COSTS.draft((0, 0, 0, 0)) == 10 and COSTS.draft((1, 1, 1, 1)) == 1
    assert COSTS.draft((1, 0, 0, 0)) == (6 + 10) / 2
    assert COSTS.draft((1, 0, 1, 1)) == (1 + 7) / 2
    assert [COSTS.verification(size) for size in (0, 1, 3, 4)] == [10, 11, 14, 16]
    # 3 + 1 tokens in 2 * 4 + 12 + 1 * 4 + 11 ms, plain decoding taking 10 ms each.
    assert speed_up([(2, 2), (1, 0)], (1, 0, 1, 1), COSTS) == pytest.approx(4 * 10 / 35)
    assert speed_up([(0, 0)], (0, 0, 0, 0), COSTS) == 1, "without drafts it is plain decoding"


@pytest.mark.parametrize(("attention", "mlp"), [((1,), ()), ((), (1,)), ((0, 2), (1,)), ((), ())])
def test_acceptance_equals_that_of_single_token_drafts(attention: tuple[int, ...], mlp: tuple[int, ...]) -> None:
    """Drafts of a single token read the whole model's cache, as in decoding, so that counts are equal."""
    rows = greedy_rows()
    texts = CachedTexts(TARGET, collate(rows), 1)
    right_N, confidence_N = texts.agreement(sublayers(attention, mlp))
    drafter = Drafter(Config(attention=attention, mlp=mlp, num_draft=1, length="fixed"), TARGET)
    num_drafted = 0
    for row, stretch in zip(rows, texts.segments(right_N, confidence_N), strict=True):
        rounds = simulate(iter([stretch]), Fixed(), 1)
        begin = max(2, int(row.loss_mask_T.int().argmax()))
        prompt_1T, num_new = row.tokens_T[None, :begin], len(row.tokens_T) - begin
        stats = draftsmith.generate(TARGET, prompt_1T, drafter, max_new_tokens=num_new).stats
        num_drafts = stats.drafted[0]
        # Decoding drafts nothing when a single token is missing.
        assert num_drafts in (len(rounds), len(rounds) - 1)
        assert sum(num_matched for _, num_matched in rounds[:num_drafts]) == stats.accepted[0]
        num_drafted += num_drafts
    assert num_drafted > 20


def test_without_skipping_every_token_is_accepted() -> None:
    metrics = evaluate(
        Drafter(Config(num_draft=4, length="fixed"), TARGET), collate(greedy_rows()), layerskip.Settings(), TARGET
    )
    rate, rounds = metrics["acceptance"], metrics["tau"]
    assert int(rate[0]) == rate[1] == 20 + 20 + 19, "all supervised tokens but the second of a row"
    assert float(rounds[0]) / rounds[1] > 4
    worse = evaluate(Drafter(Config(mlp=(0, 1)), TARGET), collate(greedy_rows()), layerskip.Settings(), TARGET)
    assert worse["acceptance"][0] < rate[0]


@torch.no_grad()
def test_influence_equals_that_measured_with_hooks() -> None:
    """1 - cosine of a block's outputs with and without the sublayer, whose output a hook zeroes."""
    rows = greedy_rows(2)
    expected = []
    for kind in ("self_attn", "mlp"):
        for layer in TARGET.model.model.layers:
            parts: list[float] = []
            for row in rows:
                outputs: list[Tensor] = []
                for is_silent in (False, True):
                    caught = layer.register_forward_hook(lambda module, given, out, to=outputs: to.append(out[0]))
                    silencer = getattr(layer, kind).register_forward_hook(silence) if is_silent else caught
                    TARGET.model(row.tokens_T[None])
                    caught.remove()
                    silencer.remove()
                for one, other in zip(*outputs, strict=True):
                    parts.append(1 - float(one @ other) / float(one.norm() * other.norm()))
            expected.append(sum(parts) / len(parts))
            assert expected[-1] > 0.001
    assert influence(TARGET, rows) == pytest.approx(expected, abs=1e-5)


def silence(module: torch.nn.Module, given: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def test_initial_masks_by_hand() -> None:
    """Of four blocks, bits 0 to 3 are attentions, 4 to 7 feed-forward layers; 6, 1, 2, 5, 3 influence least."""
    matters = [0.9, 0.2, 0.3, 0.5, 0.8, 0.4, 0.1, 0.7]
    found = [[index for index, bit in enumerate(bits) if bit] for bits in initial_masks(matters, None)]
    assert found == [[1, 3, 5, 7], [1, 3], [1, 2], [1, 6], [1, 2, 5, 6], [1, 2, 3, 5, 6, 7]]
    found = [[index for index, bit in enumerate(bits) if bit] for bits in initial_masks(matters, 3)]
    assert found == [[1, 3, 5], [0, 1, 3], [1, 2, 3], [1, 2, 6]]


def test_measured_costs_are_those_of_the_sublayers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake clock: a forward takes a millisecond for each token and each sublayer that is run."""
    target, now = tiny_target("llama"), 0.0
    forward = target.forward

    def timed(tokens_BN: Tensor, *given: Any, skipped: Any) -> Any:
        nonlocal now
        now += 1e-3 * (tokens_BN.shape[1] + 2 * target.num_layers - len(skipped))
        return forward(tokens_BN, *given, skipped=skipped)

    with monkeypatch.context() as patched:
        patched.setattr(target, "forward", timed)
        patched.setattr(time, "process_time", lambda: now)
        patched.setattr(target, "prefill", lambda *_: None)
        costs = measure_costs(target, 5)
    num_layers = target.num_layers
    found = (costs.whole, costs.no_attention, costs.no_mlp, costs.neither)
    assert found == pytest.approx((1 + 2 * num_layers, 1 + num_layers, 1 + num_layers, 1))
    assert list(costs.verify) == ["0", "1", "2", "3", "4", "5"]
    assert list(costs.verify.values()) == pytest.approx([1 + size + 2 * num_layers for size in range(6)])
    assert costs.verification(0) == costs.whole


def test_decoding_speed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten tokens in two seconds; the clock is read before the first prompt and after the last."""
    clock = iter([1.0, 3.0])
    drafter = Drafter(Config(num_draft=4, length="fixed"), TARGET)
    generate = draftsmith.generate
    outs = []

    def recorded_generate(*given: Any, **settings: Any) -> Any:
        with monkeypatch.context() as real:
            real.setattr(time, "perf_counter", perf_counter)
            outs.append(generate(*given, **settings))
        return outs[-1]

    perf_counter = time.perf_counter
    monkeypatch.setattr(draftsmith, "generate", recorded_generate)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    found = layerskip._decode(drafter, greedy_rows(2), 5)
    assert found == {"score": 5.0, "tau": 5.0}
    assert [out.stats.new_tokens for out in outs] == [5, 5]


def test_acceptance_search_skips_exactly_the_given_fraction(folder: Path) -> None:
    output = train(
        layerskip, trainer_settings(layerskip, objective="acceptance", skip_ratio=0.6), settings(folder, "share")
    )
    lines = evaluations(output)
    assert len(lines) == 12 and len({line["bits"] for line in lines}) == 12
    assert all(line["bits"].count("1") == 3 for line in lines), "60 of 100 of six sublayers, rounded down"
    config = read_manifest(output)["config"]
    assert len(config["attention"]) + len(config["mlp"]) == 3
    best = max(lines, key=lambda line: line["score"])
    assert best["bits"] == "".join(str(int(at % 3 in config["attention" if at < 3 else "mlp"])) for at in range(6))


@pytest.mark.parametrize(("objective", "search"), [("modelled", "gp"), ("speed", "greedy")])
def test_other_objectives_try_any_number_of_sublayers(folder: Path, objective: str, search: str) -> None:
    chosen = trainer_settings(layerskip, objective=objective, search=search, num_texts=2, new_tokens=4)
    lines = evaluations(train(layerskip, chosen, settings(folder, objective, max_steps=9)))
    assert len({line["bits"].count("1") for line in lines}) > 1
    assert all(line["score"] > 0 for line in lines)
    assert {line["by"] for line in lines} == {"start", *(("gp", "local") if search == "gp" else ("greedy",))}
    if objective == "modelled":
        costs = SublayerCosts(**json.loads((folder / "modelled" / "costs.json").read_text()))
        for line in lines:
            bits = tuple(map(int, line["bits"]))
            assert line["draft_cost"] == pytest.approx(costs.draft(bits) / costs.whole)


@pytest.mark.slow
def test_a_killed_search_continues_to_the_same_log(folder: Path) -> None:
    """The process gets SIGKILL at a random time after its second evaluation; then the same command runs again."""
    chosen = {"objective": "acceptance", "skip_ratio": 0.4, "num_texts": 2, "search": "gp"}
    run = settings(folder, "killed", max_steps=15)
    words = command(
        "layerskip", target=run.target, data=run.data, output=run.output, max_steps=15, batch_size=4, **chosen
    )
    process = subprocess.Popen(words, env=environment(), start_new_session=True, stderr=subprocess.PIPE, text=True)
    log = Path(run.output) / "evaluations.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.002)
    time.sleep(int.from_bytes(os.urandom(2), "big") / 2**16 / 20)
    os.killpg(process.pid, signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, error
    kept = log.read_text()
    whole = train(layerskip, trainer_settings(layerskip, **chosen), settings(folder, "whole", max_steps=15))
    train(layerskip, trainer_settings(layerskip, **chosen), run)
    assert log.read_text() == (whole / "evaluations.jsonl").read_text()
    assert log.read_text().startswith(kept[: kept.rfind("\n") + 1])


def evaluations(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "evaluations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target in `target` and its text in `data`."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    make_data(make_target(root / "target"), root / "data", num_rows=20)
    return root


def settings(folder: Path, name: str, *, max_steps: int = 12) -> RunSettings:
    paths = {"target": str(folder / "target"), "data": str(folder / "data"), "output": str(folder / name)}
    return RunSettings(**paths, max_steps=max_steps, batch_size=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "acceptance"}, "acceptance alone is best without skipping: give a skip_ratio"),
        ({"skip_ratio": 1.5}, "skip_ratio is 1.5"),
        ({"num_texts": 0}, "num_texts is 0; it must be at least 1"),
        ({"text_tokens": 2}, "text_tokens is 2; it must be at least 3"),
        ({"num_draft": 0}, "num_draft is 0"),
        ({"length": "long"}, "unknown length policy"),
    ],
)
def test_invalid_settings_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_settings(layerskip, **changes)
