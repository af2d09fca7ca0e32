"""Online training: the loss, lossless output, state kept and reset, and a rising acceptance rate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import draftsmith
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.core.tree import Draft
from draftsmith.drafters import cnn, lookup, lstm
from recipes.online import ServingSettings, main
from tests.support.distributions import check_distribution, distribution_target
from tests.support.family import Watched, built, check_forget, check_greedy
from tests.support.models import CONTEXT, padded, prompts, tiny_model, tiny_target
from tests.support.text import save_target, write_prompts
from tests.trainers.parts.test_on_policy import draft_model
from trainers.online import Online, OnlineSettings
from trainers.parts.losses import Teacher, divergence

CONFIGS: dict[Any, Any] = {
    lstm: lstm.Config(hidden_size=24, rank=32, num_draft=4, length="fixed"),
    cnn: cnn.Config(num_channels=24, rank=32, num_draft=4, length="fixed"),
}


def drafters(target: Target) -> list[Any]:
    reading = [built(family, config, target) for family, config in CONFIGS.items()]
    return reading if target.is_encoder_decoder else [*reading, draft_model(target, length="fixed")]


def call(drafter: Any, num_rows: int = 5, **settings: Any) -> Any:
    ids, mask = padded(prompts(num_rows))
    return draftsmith.generate(drafter.target, ids, drafter, attention_mask=mask, max_new_tokens=20, **settings)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_greedy_output_is_identical_to_the_targets(architecture: str) -> None:
    """Output is identical while each call trains at a learning rate that changes drafts."""
    for drafter in drafters(tiny_target(architecture)):
        online = Online(drafter, OnlineSettings(every=1, learning_rate=3e-2))
        check_greedy(online, architecture)
        assert online.num_steps == 2


@pytest.mark.parametrize(
    ("architecture", "number"),
    [("llama", 0), *(pytest.param(*one, marks=pytest.mark.slow) for one in (("llama", 1), ("llama", 2), ("t5", 0)))],
)
def test_sampled_output_follows_the_targets_distribution(architecture: str, number: int) -> None:
    online = Online(
        drafters(distribution_target(architecture))[number], OnlineSettings(every=1000, kept=1000, learning_rate=1e-2)
    )
    check_distribution(online, online.target, num_samples=4_000)
    assert online.num_steps == 3


def test_forget_restores_the_first_weights() -> None:
    for drafter in drafters(tiny_target("llama")):
        online = Online(drafter, OnlineSettings(every=1, learning_rate=3e-2))
        check_forget(online)
        assert online.num_steps > 0


def test_weights_change_between_calls_only() -> None:
    """They change when the next call starts, after enough requests."""
    drafter = drafters(tiny_target("llama"))[0]
    online = Online(drafter, OnlineSettings(every=10))
    seen: list[list[torch.Tensor]] = []

    class Looking(Watched):
        def propose(self, budget: int) -> Draft:
            seen[-1].append(torch.cat([weight.flatten() for weight in drafter.parameters()]).clone())
            return super().propose(budget)

    for _ in range(3):
        seen.append([])
        call(Looking(online))
    assert all(len(one) > 2 and all(torch.equal(weights, one[0]) for weights in one) for one in seen)
    assert torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[1][0], seen[2][0])


class Rejections(Watched):
    """Records (row, position) of the tokens after which the target rejected one."""

    positions: list[tuple[int, int]]

    def start(self, session: Any) -> None:
        self.positions = []
        super().start(session)

    def propose(self, budget: int) -> Draft:
        self._before = [len(row) for row in self._session.rows]
        return super().propose(budget)

    def observe(self, step: Any) -> None:
        for row, path in enumerate(step.paths):
            position = self._before[row] + len(path) - 2
            if path and len(path) < step.draft.tree.num_nodes and position + 1 < len(self._session.rows[row]):
                self.positions.append((row, position))
        super().observe(step)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize("top_k", [0, 5])
def test_loss_is_the_divergence_at_rejections(architecture: str, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both distributions are computed again; the drafter does not run the target again."""
    target = tiny_target(architecture)
    for drafter in drafters(target):
        online = Online(drafter, OnlineSettings(every=100, kept=100, top_k=top_k))
        watched = Rejections(online)
        ids, mask = padded(prompts(5))
        out = call(watched, temperature=1.0, seed=0)
        source = target.encode(ids, mask) if target.is_encoder_decoder else None
        last, terms = target.num_layers, []
        with torch.no_grad():
            theirs_BTV = target.logits(target.read(out.sequences, (last,), source)[last])
            for row, position in watched.positions:
                text = out.sequences[row : row + 1, : position + 1]
                if drafter.draft_model is not None:
                    own_V = drafter.model(text).logits[0, -1]
                else:
                    one = source and draftsmith.core.target.Source(
                        **{k: v[row : row + 1] for k, v in vars(source).items()}
                    )
                    own_V = drafter.head(one)(drafter(text, one))[0, -1]
                terms.append(divergence("forward_kl")(own_V[None], _teacher(theirs_BTV[row, position], top_k)))
        if not target.is_encoder_decoder:
            monkeypatch.setattr(target, "read", None)
        found = online.learn()
        monkeypatch.undo()
        assert len(watched.positions) > 10 and found == pytest.approx(torch.cat(terms).mean().item(), rel=1e-3)
        assert online.learn() is None


def _teacher(logits_V: torch.Tensor, top_k: int) -> Teacher:
    if not top_k:
        return Teacher(logits=logits_V[None])
    top = logits_V[None].topk(top_k)
    return Teacher(logits=top.values, ids_NK=top.indices, log_normaliser_N=logits_V.logsumexp(-1)[None])


def test_acceptance_rises_with_repeated_prompts() -> None:
    """With the same five prompts fifteen times, each drafter's acceptance rate rises by at least half."""
    for drafter in drafters(tiny_target("llama")):
        online = Online(drafter, OnlineSettings(every=5, learning_rate=2e-2))
        rates = []
        for _ in range(15):
            stats = call(online).stats
            rates.append(stats.accepted[0] / stats.drafted[0])
        assert rates[-1] > 1.5 * rates[0] and rates[-1] > 0.2, rates


def test_no_more_than_kept_requests_are_stored() -> None:
    online = Online(drafters(tiny_target("llama"))[0], OnlineSettings(every=3, kept=3))
    call(online)
    online._collect_requests()
    assert len(online._requests) == 3
    assert all(len(one.tokens_T) <= CONTEXT and one.top_ids_TK.shape[-1] == 64 for one in online._requests)


def test_a_saved_drafter_continues_training_to_the_same_weights(tmp_path: Path) -> None:
    """The artifact is an ordinary one; the optimiser's state is saved beside it."""
    target = Target(tiny_model("llama"))
    online = Online(built(lstm, CONFIGS[lstm], target), OnlineSettings(every=5))
    for _ in range(2):
        call(online)
    online.learn()
    online.save(tmp_path / "artifact")
    state = tmp_path / "state.safetensors"
    online.save_optimizer(state)
    # A run saved before `ends` was called `tied_head` continues as well.
    former = {name.replace("tied_head.", "ends."): value for name, value in load_file(state).items()}
    assert former.keys() != load_file(state).keys()
    save_file(former, state)
    other = Online(draftsmith.load(tmp_path / "artifact", target), OnlineSettings(every=5))
    other.load_optimizer(state)
    for one in (online, other):
        call(one, temperature=1.0, seed=0)
        one.learn()
    for name, weight in online.drafter.state_dict().items():
        assert torch.equal(weight, other.drafter.state_dict()[name])


def test_an_interrupted_recipe_continues(tmp_path: Path) -> None:
    """Stopped after a block, it ends with the same weights and figures as an unbroken run and an ordinary artifact."""
    target = save_target(tmp_path / "target")
    data = str(write_prompts(tmp_path / "prompts.jsonl", 6))
    draftsmith.save(
        built(lstm, CONFIGS[lstm], Target.from_pretrained(target, dtype="float32")),
        tmp_path / "draft",
        target=Target.from_pretrained(target, dtype="float32"),
    )
    given: dict[str, Any] = {"draft": str(tmp_path / "draft"), "target": target, "data": data, "block": 2}
    settings, runs = OnlineSettings(every=1, learning_rate=1e-2), {}
    for name, steps in (("whole", (0,)), ("parts", (1, 2, 0))):
        for max_steps in steps:
            output = str(tmp_path / name)
            main(ServingSettings(**given, output=output, max_steps=max_steps, max_new_tokens=8), settings)
        manifest = read_manifest(tmp_path / name / "artifact")
        drafter = draftsmith.load(tmp_path / name / "artifact", Target.from_pretrained(target, dtype="float32"))
        runs[name] = manifest["served"], {key: weight.tolist() for key, weight in drafter.state_dict().items()}
    assert runs["whole"] == runs["parts"]
    served, weights = runs["whole"]
    assert [block["steps"] for block in served] == sorted({block["steps"] for block in served}) and len(served) == 3
    assert (
        weights["layers.weight_hh_l0"]
        != load_file(tmp_path / "draft" / "model.safetensors")["layers.weight_hh_l0"].tolist()
    )
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 1_000
    with pytest.raises(ValueError, match="block was 2, is 3"):
        main(ServingSettings(**given | {"block": 3, "output": str(tmp_path / "whole")}, max_new_tokens=8), settings)


def test_invalid_drafters_and_settings_raise() -> None:
    target = tiny_target("llama")
    with pytest.raises(ValueError, match="the family lookup cannot"):
        Online(lookup.Drafter(lookup.Config(), target))
    for message, changes in (
        ("every is 0", {"every": 0}),
        ("kept must be at least as large", {"every": 9, "kept": 8}),
        ("top_k", {"top_k": -1}),
    ):
        with pytest.raises(ValueError, match=message):
            OnlineSettings(**changes)
