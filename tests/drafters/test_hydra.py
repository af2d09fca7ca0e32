"""Tests of the Hydra drafter: its heads, its decoder block, and its trees.

Shape suffixes: T positions, D hidden width, E width of the embedding, V vocabulary.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import draftsmith
from draftsmith import Target
from draftsmith.core.drafter import Session
from draftsmith.core.sampling import Sampling
from draftsmith.core.tree import Draft, Tree
from draftsmith.drafters import hydra
from draftsmith.drafters.hydra import Config, Drafter
from tests.parts.neural.test_layers import naive_attention
from tests.support.distributions import check_distribution, distribution_target
from tests.support.family import Watched, built, check_family, texts
from tests.support.models import VOCAB_SIZE, WIDTH, greedy_by_transformers, padded, prompts, tiny_target
from tests.support.runs import trainer_settings
from trainers import hydra as trainer

TREE = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (1, 0, 0))
PLAIN: dict[str, Any] = {"num_heads": 3, "tree": TREE}
PLUS: dict[str, Any] = PLAIN | {"num_blocks": 4, "own_head": True, "prefix_heads": 4, "prefix_width": 48}
DYNAMIC: dict[str, Any] = {"num_heads": 3, "tree": (), "width": 3, "num_nodes": 9}
EXAMPLE = Config(**PLUS)
NUM_NEW, ENDS = 20, (10, 11, 12)


@pytest.mark.parametrize(
    ("config", "architecture", "settings"),
    [
        (PLAIN | {"siblings": "deterministic"}, "gemma2", trainer_settings(trainer, num_heads=3)),
        (PLUS, "llama", trainer_settings(trainer, num_heads=3, num_blocks=4, own_head=True, prefix_attention=True)),
        pytest.param(
            DYNAMIC, "gpt2", trainer_settings(trainer, num_heads=3, width=3, loss="ce"), marks=pytest.mark.slow
        ),
        pytest.param(
            PLAIN | {"shortlist": 7},
            "llama",
            trainer_settings(trainer, num_heads=3, shortlist=7),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "plus", "dynamic", "shortlist"],
)
def test_family(tmp_path: Path, config: dict[str, Any], architecture: str, settings: trainer.Settings) -> None:
    given = {"architectures": (architecture,), "trainer": trainer, "settings": settings}
    check_family(hydra, Config(**config), tmp_path, **given)


def test_top_and_drawn_siblings_keep_the_distribution() -> None:
    drafter = built(hydra, Config(**PLUS, siblings="top_and_drawn"), distribution_target())
    check_distribution(drafter, distribution_target(), num_samples=2_000, top_k=3)


# --- The network ---------------------------------------------------------------------------------------------------


def naive_states(drafter: Drafter, ids: list[int]) -> Tensor:
    """Returns the state after each of the tokens [T, D]."""
    target = drafter.target
    normed_TD = target.norm(target.read(torch.tensor([ids]), (target.num_layers,))[target.num_layers])[0]
    if not drafter.config.prefix_heads:
        return normed_TD
    block = drafter.prefix
    x_TD = normed_TD + naive_attention(block.attention, naive_norm(block.attention_norm, normed_TD))
    rows = []
    for x_D in x_TD:
        inner_D = naive_norm(block.feed_forward_norm, x_D)
        gate_F, up_F = block.feed_forward.gate.weight @ inner_D, block.feed_forward.up.weight @ inner_D
        rows.append(x_D + block.feed_forward.down.weight @ (functional.silu(gate_F) * up_F))
    return torch.stack(rows)


def naive_norm(norm: Any, x_TD: Tensor) -> Tensor:
    return x_TD / (x_TD.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def naive_logits(drafter: Drafter, state_D: Tensor, drafted: list[int]) -> Tensor:
    """Returns the logits [V] of the head that reads this number of drafted tokens."""
    embedding_VE = drafter.target.model.get_input_embeddings().weight.detach()
    size = float((embedding_VE**2).mean().sqrt())
    head = drafter.heads[len(drafted) - 1]
    x_F = torch.cat([state_D, *(embedding_VE[token] / size for token in drafted)])
    z_D = head.skip.weight @ x_F + head.skip.bias + functional.silu(head.first.weight @ x_F + head.first.bias)
    for linear in head.rest:
        z_D = z_D + functional.silu(linear.weight @ z_D + linear.bias)
    if drafter.config.own_head:
        return drafter.outputs[len(drafted) - 1].weight @ z_D
    return drafter.target.head(z_D[None, None])[0, 0]


@torch.no_grad()
@pytest.mark.parametrize("config", [PLAIN | {"num_blocks": 2}, PLUS], ids=["plain", "plus"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_heads_match_naive_loops(architecture: str, config: dict[str, Any]) -> None:
    """All positions of a text at once, as in training, are compared with one at a time."""
    drafter = built(hydra, Config(**config), tiny_target(architecture))
    text = prompts(4)[3]
    hidden_1TD = drafter.target.read(torch.tensor([text]), (3,))[3]
    states_1TD, slow_TD = drafter.states(hidden_1TD), naive_states(drafter, text)
    torch.testing.assert_close(states_1TD[0], slow_TD, rtol=1e-5, atol=1e-5)
    for k in range(3):
        starts = range(len(text) - 2 - k)
        drafted = [text[t + 1 : t + 2 + k] for t in starts]
        found_1TV = drafter.head(k, drafter.features(states_1TD[:, : len(drafted)], torch.tensor([drafted])))
        slow_TV = torch.stack([naive_logits(drafter, slow_TD[t], drafted[t]) for t in starts])
        assert (found_1TV[0] - slow_TV).abs().max() < 1e-5 * slow_TV.abs().max()
    weights = [parameter.data_ptr() for parameter in drafter.parameters()]
    assert len(set(weights)) == len(weights), "blocks share nothing"


@pytest.mark.parametrize("own_head", [False, True])
def test_new_heads_predict_the_targets_logits(own_head: bool) -> None:
    target = tiny_target("llama")
    drafter = Drafter(Config(**PLAIN, num_blocks=3, own_head=own_head), target)
    state_BTD = torch.randn(1, 4, WIDTH)
    for k in range(3):
        z_BTD = drafter.features(state_BTD, torch.randint(VOCAB_SIZE, (1, 4, k + 1)))
        assert torch.equal(z_BTD, state_BTD)
        assert torch.equal(drafter.head(k, z_BTD), target.head(state_BTD))


# --- Drafts --------------------------------------------------------------------------------------------------------


class CheckedDrafts(Watched):
    """Checks each draft against the network without a cache, over each row's text and each node's path.

    Rows that have finished are skipped, because their drafts are not used.
    """

    num_compared = 0

    def start(self, session: Session) -> None:
        super().start(session)
        self._limits = [len(row) + NUM_NEW for row in session.rows]

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        assert draft.tree.depth <= min(budget, self.config.num_heads)
        parents_RN = draft.tree.parents_RN.expand(len(self._session.rows), -1)
        for row, ids in enumerate(self._session.rows):
            is_running = len(ids) < self._limits[row] and ids[-1] not in ENDS
            if is_running and len(ids) > 1 and draft.tree.num_nodes > 1:
                layer = self.target.num_layers
                states_1TD = self.inner.states(self.target.read(torch.tensor([ids[:-1]]), (layer,))[layer])
                self._compare(draft, row, parents_RN[row].tolist(), states_1TD[0, -1])
        return draft

    def _compare(self, draft: Draft, row: int, parents: list[int], state_D: Tensor) -> None:
        """Checks of every node with children that they are its likeliest tokens, or drawn from its distribution."""
        tokens, paths = draft.tokens_BN[row].tolist(), [[0]]
        for node, parent in enumerate(parents[1:], start=1):
            paths.append([*paths[parent], node])
        for node, path in enumerate(paths):
            children = [tokens[child] for child, parent in enumerate(parents) if parent == node]
            if not children:
                continue
            logits_V = naive_logits(self.inner, state_D, [tokens[one] for one in path])
            if draft.draft_probs_BNV is not None:
                probs_V = self._session.sampling.probs(logits_V)
                torch.testing.assert_close(draft.draft_probs_BNV[row, node], probs_V, rtol=1e-4, atol=1e-5)
            else:
                assert children == logits_V.topk(len(children)).indices.tolist()
            self.num_compared += 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "config",
    [PLAIN, PLUS, PLUS | {"siblings": "deterministic"}, PLUS | DYNAMIC],
    ids=["plain", "plus", "deterministic", "dynamic"],
)
def test_drafts_match_uncached_heads(config: dict[str, Any], temperature: float) -> None:
    """Ragged rows that advance at different rates, one of a single token, and rows that finish early."""
    target = tiny_target("mistral")
    drafter = CheckedDrafts(built(hydra, Config(**config), target))
    ids, mask = padded(prompts(5))
    settings = {"max_new_tokens": NUM_NEW, "eos_token_id": ENDS, "seed": 1}
    draftsmith.generate(target, ids, drafter, attention_mask=mask, temperature=temperature, **settings)
    assert drafter.num_compared > 100


def test_cache_follows_plain_steps_and_cut_drafts() -> None:
    """An acceptance-based length policy causes steps without a draft, and rows with fewer nodes than others."""
    target = tiny_target("llama")
    drafter = CheckedDrafts(built(hydra, EXAMPLE, target))
    ids, mask = padded(prompts(5))
    out = draftsmith.generate(
        target, ids, drafter, attention_mask=mask, length="expected_gain=0.3", max_new_tokens=NUM_NEW
    )
    assert texts(out) == greedy_by_transformers("llama", 5, NUM_NEW)
    assert drafter.num_compared > 20 and len(drafter.drafts) < out.stats.steps


def started_drafter(config: Config) -> Drafter:
    """Returns a drafter started on one row."""
    target = tiny_target("llama")
    drafter, (row,) = built(hydra, config, target), prompts(1)
    cache = target.new_cache(1)
    hidden = target.prefill([row[:-1]], cache, layers=(target.num_layers,))
    drafter.start(
        Session(
            target=target,
            rows=[row],
            cache=cache,
            sampling=Sampling(),
            generator=torch.Generator(),
            hidden=hidden,
        )
    )
    return drafter


def test_logits_depend_on_the_nodes_own_path() -> None:
    """Nodes with the same path have the same logits, whatever their neighbours; other nodes do not."""
    drafter = started_drafter(EXAMPLE)
    tree = Tree.from_parents([[-1, 0, 0, 0, 1, 2, 3]])
    tokens_1N = torch.tensor([[7, 20, 21, 20, 30, 30, 30]])
    first_V, other_V, same_V = drafter.logits(tokens_1N, tree, 4)[0]
    assert torch.equal(first_V, same_V)
    assert (first_V - other_V).abs().max() > 0.1
    chain_1N, alone = torch.tensor([[7, 21, 30]]), Tree.from_parents([[-1, 0, 1]])
    torch.testing.assert_close(drafter.logits(chain_1N, alone, 2)[0, 0], other_V, rtol=1e-4, atol=1e-4)


def solved_drafter(target: Target, text: list[int], num_heads: int) -> Drafter:
    """Returns heads solved so that head k predicts token t + 2 + k of `text` from tokens t + 1 to t + 1 + k."""
    tree = tuple((0,) * depth for depth in range(1, num_heads + 1))
    drafter = Drafter(Config(num_heads=num_heads, own_head=True, tree=tree), target)
    with torch.no_grad():
        hidden_1TD = target.read(torch.tensor([text]), (target.num_layers,))[target.num_layers]
        states_TD = drafter.states(hidden_1TD)[0].double()
        for k, (head, output) in enumerate(zip(drafter.heads, drafter.outputs, strict=True)):
            # The skip passes the state and half of the last drafted token.
            head.skip.weight[:, -WIDTH:] = 0.5 * torch.eye(WIDTH)
            drafted_TI = torch.tensor([text[t + 1 : t + 2 + k] for t in range(len(text) - 2 - k)])
            z_TD = drafter.features(states_TD[None, : len(drafted_TI)].float(), drafted_TI[None])[0].double()
            labels_TV = functional.one_hot(torch.tensor(text[2 + k :]), VOCAB_SIZE).double()
            output.weight.copy_(torch.linalg.lstsq(z_TD, labels_TV, driver="gelsd").solution.T)
    return drafter


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_head_k_at_position_t_predicts_token_t_plus_2_plus_k(architecture: str) -> None:
    """Heads fit one text exactly, 29 tokens in 32 dimensions: every draft is accepted, from the first on."""
    target = tiny_target(architecture)
    text = greedy_by_transformers(architecture, 1, 20)[0]
    drafter = solved_drafter(target, text, num_heads=3)
    out = draftsmith.generate(target, torch.tensor(prompts(1)), drafter, max_new_tokens=20)
    assert texts(out) == [text]
    assert out.stats.accepted_per_depth == [1, 1, 1]
    assert out.stats.steps == 5 and out.stats.tau == 4
    ids, mask = padded([text[:9], text[:14]])
    out = draftsmith.generate(target, ids, drafter, attention_mask=mask, max_new_tokens=12)
    assert texts(out) == [text[:21], text[:26]]
    assert out.stats.tau == 4


def test_row_without_hidden_state_gets_empty_draft() -> None:
    watched = Watched(built(hydra, EXAMPLE, tiny_target("llama")))
    draftsmith.generate(watched.target, torch.tensor([[4]]), watched, max_new_tokens=3)
    assert [len(tokens[0]) for tokens in watched.drafts] == [1, 4]


def test_prompt_in_chunks_gives_same_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = built(hydra, EXAMPLE, tiny_target("llama"))
    ids, mask = padded(prompts(5))
    runs = []
    for size in (512, 4):
        monkeypatch.setattr(hydra, "PREFILL_CHUNK", size)
        watched = Watched(drafter)
        draftsmith.generate(drafter.target, ids, watched, attention_mask=mask, max_new_tokens=8)
        runs.append(watched.drafts)
    assert runs[0] == runs[1]


# --- Invalid settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"prefix_heads": 4}, "prefix_heads is 4 and prefix_width 0; give both"),
        ({"prefix_heads": -4, "prefix_width": -4}, "prefix_heads is -4; it must be at least 0"),
        ({"siblings": "twins"}, "siblings is 'twins'"),
        ({"num_heads": 2}, "the tree is 4 deep, and there are 2 heads"),
        ({"tree": ((0,), (2,))}, r"tree node \[2\] needs node \[1\]"),
        ({"width": 4}, "give either a tree, or"),
        ({"tree": ()}, "give either a tree, or"),
        ({"tree": (), "width": 4, "num_nodes": 0}, "num_nodes is 0; it must be at least 1"),
    ],
)
def test_config_rejects_invalid_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**changes)


@pytest.mark.parametrize(
    "shape",
    [{"tree": tuple((rank,) for rank in range(VOCAB_SIZE + 1))}, {"tree": (), "width": VOCAB_SIZE + 1}],
)
def test_drafter_rejects_more_ranks_than_vocabulary(shape: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{VOCAB_SIZE + 1} different tokens, and the vocabulary has {VOCAB_SIZE}"):
        Drafter(Config(num_heads=1, **shape), tiny_target("llama"))


def test_target_is_no_submodule() -> None:
    drafter = Drafter(EXAMPLE, tiny_target("llama"))
    assert {name.split(".")[0] for name, _ in drafter.named_parameters()} == {"heads", "outputs", "prefix"}
    assert not any("target" in name for name, _ in drafter.named_modules())
    assert drafter.hidden_layers == (3,)
