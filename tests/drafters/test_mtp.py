"""Tests of MTP heads as drafters: their drafts against a plain loop without cache, and what is refused.

Shape suffixes: T positions, S steps, D hidden width.
"""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import draftsmith
from draftsmith import Target
from draftsmith.artifacts.published.mtp import layer_config
from draftsmith.drafters import mtp
from draftsmith.drafters.mtp import Config, Drafter, heads_state
from tests.support.families.mtp_targets import CONFIGS, write_target
from tests.support.family import Watched, built, check_family, texts
from tests.support.models import VOCAB_SIZE, prompts, tiny_config, tiny_target
from tests.support.runs import trainer_settings
from trainers import import_mtp
from trainers import mtp as trainer
from trainers.training.run_settings import RunSettings

SETTINGS = trainer_settings(trainer, num_draft=3)


def small(target: Target, **changes: Any) -> Config:
    """Returns the configuration of a layer of the target's own class, as training from nothing makes it."""
    config = target.model.config.get_text_config(decoder=True)
    return Config(**{"model": layer_config(config, target.name, None)} | changes)


EXAMPLE = small


def imported(target: Target, **settings: Any) -> Drafter:
    """Returns the head of the target's checkpoint as a drafter."""
    given = import_mtp.Settings(**settings)
    import_mtp.check(given, target)  # type: ignore[arg-type]
    return import_mtp.fit(given, target, [], RunSettings(), Path())


def test_family(tmp_path: Path) -> None:
    check_family(mtp, small, tmp_path, trainer=trainer, settings=SETTINGS)


@pytest.mark.slow
def test_family_with_a_shortlist(tmp_path: Path) -> None:
    settings = trainer_settings(trainer, shortlist=40, loss="lk", num_steps=2, num_draft=5)
    check_family(mtp, lambda target: small(target, shortlist=7), tmp_path, trainer=trainer, settings=settings)


# --- The network --------------------------------------------------------------------------------------------------


def naive_steps(drafter: Drafter, ids: list[int], num_steps: int, later: list[int] | None = None) -> Tensor:
    """Returns the outputs [S, D] of the steps after a text: each by a forward of all positions from the first on.

    Steps after the first read the tokens in `later`, or the likeliest ones under the step before. A head reads the same
    positions as the one before it, one token on; the last, past its own step, one position more.
    """
    target, embed = drafter.target, drafter.target.model.get_input_embeddings()
    before = dict.fromkeys(("model", "norm"), None)
    handle = target.model.get_decoder().norm.register_forward_hook(
        lambda _, given, found: before.update(model=given[0], norm=found)
    )
    with torch.no_grad():
        target.model.get_decoder()(input_ids=torch.tensor([ids[:-1]]))
    handle.remove()
    target_TD = before["norm" if drafter.config.reads_normed else "model"][0]
    tokens, outputs, states_TD = ids[1:], [], target_TD
    for step in range(num_steps):
        head = drafter.heads[min(step, len(drafter.heads) - 1)]
        embedded_TD = embed(torch.tensor(tokens))
        if drafter.config.zeroes_first:
            embedded_TD = torch.cat([torch.zeros_like(embedded_TD[:1]), embedded_TD[1:]])
        embedded_TD = head.embedding_norm(embedded_TD)
        x_TD = head.projection(torch.cat([embedded_TD, head.hidden_norm(states_TD)], dim=1))
        out_TD = head.model.get_decoder()(inputs_embeds=x_TD[None]).last_hidden_state[0]
        outputs.append(out_TD[-1])
        likeliest = int(target.model.get_output_embeddings()(outputs[-1]).argmax())
        tokens = [*tokens, likeliest if later is None else later[step]]
        if step + 1 < len(drafter.heads):
            tokens, states_TD = tokens[1:], out_TD if drafter.is_chained else target_TD
        else:
            states_TD = torch.cat([states_TD, outputs[-1][None]])
    return torch.stack(outputs)


@torch.no_grad()
def naive_draft(drafter: Drafter, ids: list[int], num_draft: int) -> list[int]:
    """Returns the likeliest tokens after a text."""
    if num_draft == 0:
        return []
    outputs_SD = naive_steps(drafter, ids, num_draft)
    return drafter.target.model.get_output_embeddings()(outputs_SD).argmax(-1).tolist()


def reference_rounds(drafter: Drafter, prompt: list[int], text: list[int]) -> list[int]:
    """Returns how many tokens are accepted in each round of greedy decoding, whose output is `text`."""
    ids, whole, rounds = prompt, prompt + text, []
    while len(ids) < len(whole):
        draft = naive_draft(drafter, ids, min(drafter.config.num_draft, len(whole) - len(ids) - 1))
        right = [token == whole[len(ids) + place] for place, token in enumerate(draft)]
        rounds.append([*right, False].index(False))
        ids = whole[: len(ids) + rounds[-1] + 1]
    return rounds


class Compared(Watched):
    """Asserts that every draft is that of the plain loop."""

    num_compared = 0

    def propose(self, budget: int) -> Any:
        draft = super().propose(budget)
        for row, ids in enumerate(self._session.rows):
            if len(ids) > 1 and draft.tree.depth:
                assert draft.tokens_BN[row, 1:].tolist() == naive_draft(self.inner, ids, draft.tree.depth)
                self.num_compared += 1
        return draft


@cache
def target_of(architecture: str, folder: Path, num_heads: int = 1) -> Target:
    """Returns a tiny target with MTP heads in its checkpoint."""
    name = f"{architecture}-{num_heads}"
    write_target(folder / name, architecture, num_heads=num_heads)
    return Target.from_pretrained(str(folder / name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mtp")


FAST = ("qwen3_5_text", "deepseek_v3", "mimo")
FORMS = [one if one in FAST else pytest.param(one, marks=pytest.mark.slow) for one in CONFIGS]


@pytest.mark.parametrize("num_draft", [1, 3, 5])
@pytest.mark.parametrize("architecture", ["mimo_v2_flash", "deepseek_v3"])
def test_several_heads_draft_as_in_a_plain_loop(folder: Path, architecture: str, num_draft: int) -> None:
    """Of three heads, chained or not, as long as the text is read late (1), and past the last head (5)."""
    drafter = imported(target_of(architecture, folder, num_heads=3), num_draft=num_draft)
    assert len(drafter.heads) == 3 and drafter.is_chained == (architecture == "deepseek_v3")
    check_drafts(drafter, max_new_tokens=12)


def test_heads_that_are_seldom_used_catch_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads_state, "MOST_UNREAD", 3)
    monkeypatch.setattr(heads_state, "PREFILL_CHUNK", 4)
    drafter = imported(target_of("deepseek_v3", folder, num_heads=3))
    check_drafts(drafter, SometimesLonger, max_new_tokens=16)


class SometimesLonger(Compared):
    """Drafts one token a round, and three every fifth round."""

    num_rounds = 0

    def propose(self, budget: int) -> Any:
        self.num_rounds += 1
        return super().propose(min(budget, 3 if self.num_rounds % 5 == 0 else 1))


def check_drafts(drafter: Drafter, watched: type[Compared] = Compared, **given: Any) -> None:
    """Asserts that drafts in a ragged batch are those of the plain loop, and the text the target's."""
    target, rows, compared = drafter.target, prompts(4), watched(drafter)
    out = draftsmith.generate(target, rows, compared, eos_token_id=[], **given)
    assert texts(out) == texts(draftsmith.generate(target, rows, eos_token_id=[], **given))
    assert compared.num_compared >= 3 * len(rows)


@pytest.mark.parametrize("architecture", ["mistral", *FORMS])
def test_drafts_are_those_of_a_plain_loop(folder: Path, architecture: str) -> None:
    """In a ragged batch, over several rounds, beyond Mistral's window; and the text is the target's."""
    if architecture in CONFIGS:
        target = target_of(architecture, folder)
        drafter = imported(target)
    else:
        target = tiny_target(architecture)
        drafter = built(mtp, small(target), target)
    check_drafts(drafter, max_new_tokens=6)


@pytest.mark.parametrize(
    ("architecture", "num_heads"),
    [("deepseek_v3", 1), ("deepseek_v3", 3), pytest.param("glm4_moe", 1, marks=pytest.mark.slow)],
)
def test_steps_are_those_of_transformers(
    folder: Path, architecture: str, num_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reads the heads itself, once it is told that they are layers 2 and on, not 61 or 46."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    target = target_of(architecture, folder, num_heads)
    monkeypatch.setattr(target.model, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[2-4]\."])
    theirs, ours = MtpModel.from_pretrained(target.model), imported(target)
    ids = prompts(4)[3]
    with torch.no_grad():
        states = target.model.get_decoder()(input_ids=torch.tensor([ids[:-1]])).last_hidden_state
        positions = torch.arange(1, len(ids))[None]
        cache = MtpCache(config=target.model.config.get_mtp_config())
        _, logits, _ = theirs(torch.tensor([ids[1:]]), states, None, positions, cache)
        outputs = naive_steps(ours, ids, num_heads)
    torch.testing.assert_close(target.model.get_output_embeddings()(outputs), logits[0], rtol=1e-4, atol=1e-4)


# --- What is refused ----------------------------------------------------------------------------------------------


def test_wrong_shapes_are_rejected() -> None:
    target = tiny_target("llama")
    llama = small(target).model
    for model, message in (
        (llama | {"num_hidden_layers": 2}, "has 2 layers; it must have one"),
        (llama | {"hidden_size": 8}, "hidden_size is 8; .* has 32"),
        ({key: value for key, value in llama.items() if key != "model_type"}, "names no model_type"),
        (tiny_config("mamba", hidden_size=32, num_hidden_layers=1).to_dict(), "cannot be an MTP head"),
    ):
        with pytest.raises(ValueError, match=message):
            Drafter(Config(model=model), target)
    with pytest.raises(ValueError, match=f"shortlist is {VOCAB_SIZE + 1}"):
        Drafter(small(target, shortlist=VOCAB_SIZE + 1), target)
    with pytest.raises(ValueError, match="is an encoder-decoder; MTP heads need a causal target"):
        Drafter(small(target), tiny_target("t5"))
    with pytest.raises(ValueError, match="num_draft is 0; it must be at least 1"):
        dataclasses.replace(small(target), num_draft=0)


def test_target_without_attention_is_rejected() -> None:
    config = tiny_config("qwen3_5_text", num_hidden_layers=1, layer_types=["linear_attention"])
    with pytest.raises(ValueError, match="tiny has no layer of attention alone"):
        layer_config(config, "tiny", None)


def test_more_heads_than_any_checkpoint_are_refused_before_they_are_made() -> None:
    with pytest.raises(ValueError, match="num_heads is 65; it must be at most 64"):
        Config(model={}, num_heads=65)
