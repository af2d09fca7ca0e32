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
from draftsmith.drafters.mtp import Config, Drafter
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

    Steps after the first read the tokens in `later`, or the likeliest ones under the step before.
    """
    target, embed = drafter.target, drafter.target.model.get_input_embeddings()
    with torch.no_grad():
        states_TD = target.model.get_decoder()(input_ids=torch.tensor([ids[:-1]])).last_hidden_state[0]
    tokens, outputs = ids[1:], []
    for step in range(num_steps):
        embedded_TD = drafter.embedding_norm(embed(torch.tensor(tokens)))
        x_TD = drafter.projection(torch.cat([embedded_TD, drafter.hidden_norm(states_TD)], dim=1))
        outputs.append(drafter.model.get_decoder()(inputs_embeds=x_TD[None]).last_hidden_state[0, -1])
        likeliest = int(target.model.get_output_embeddings()(outputs[-1]).argmax())
        tokens = [*tokens, likeliest if later is None else later[step]]
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
def target_of(architecture: str, folder: Path) -> Target:
    """Returns a tiny target with an MTP head in its checkpoint."""
    write_target(folder / architecture, architecture)
    return Target.from_pretrained(str(folder / architecture))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mtp")


FAST = ("qwen3_5_text", "deepseek_v3")
FORMS = [one if one in FAST else pytest.param(one, marks=pytest.mark.slow) for one in CONFIGS]


@pytest.mark.parametrize("architecture", ["mistral", *FORMS])
def test_drafts_are_those_of_a_plain_loop(folder: Path, architecture: str) -> None:
    """In a ragged batch, over several rounds, beyond Mistral's window; and the text is the target's."""
    if architecture in CONFIGS:
        target = target_of(architecture, folder)
        drafter = imported(target)
    else:
        target = tiny_target(architecture)
        drafter = built(mtp, small(target), target)
    rows, compared = prompts(4), Compared(drafter)
    out = draftsmith.generate(target, rows, compared, max_new_tokens=6, eos_token_id=[])
    assert texts(out) == texts(draftsmith.generate(target, rows, max_new_tokens=6, eos_token_id=[]))
    assert compared.num_compared >= 3 * len(rows)


@pytest.mark.parametrize("architecture", ["deepseek_v3", pytest.param("glm4_moe", marks=pytest.mark.slow)])
def test_first_step_is_that_of_transformers(folder: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads the head itself, once it is told that it is layer 2, not 61 or 46."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    target = target_of(architecture, folder)
    monkeypatch.setattr(target.model, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2\."])
    theirs, ours = MtpModel.from_pretrained(target.model), imported(target)
    ids = prompts(4)[3]
    with torch.no_grad():
        states = target.model.get_decoder()(input_ids=torch.tensor([ids[:-1]])).last_hidden_state
        positions = torch.arange(1, len(ids))[None]
        cache = MtpCache(config=target.model.config.get_mtp_config())
        _, logits, _ = theirs(torch.tensor([ids[1:]]), states, None, positions, cache)
        outputs = naive_steps(ours, ids, 1)
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
