"""Drafters that several tests share: a scripted one, and small ones with random weights.

Shape suffixes as in draftsmith/core/tree.py.
"""

import random
from functools import cache
from typing import Any

import torch

import draftsmith
from data.batches import collate, example
from data.teacher import complete
from draftsmith import Target
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.tree import Draft, Tree, chain
from draftsmith.drafters import dflash, lm, lookup, medusa
from tests.support.distributions import VOCAB_SIZE as SAMPLED_VOCAB_SIZE
from tests.support.distributions import distribution_target
from tests.support.family import built
from tests.support.models import VOCAB_SIZE, padded, prompts, tiny_config, tiny_target
from trainers import dflash as dflash_trainer

NUM_NEW = 20
TREE = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
HEADS = medusa.Config(num_heads=3, tree=TREE)
SMALL = lm.Config(model=tiny_config("llama", num_hidden_layers=1).to_dict(), num_draft=4, length="refit=0.1")
SAMPLED_SMALL = tiny_config("llama", vocab_size=SAMPLED_VOCAB_SIZE, num_hidden_layers=1).to_dict()


def overfitted_dflash(target: Target, texts: list[list[int]], *, num_steps: int, **shape: Any) -> dflash.Drafter:
    """Returns a DFlash drafter trained for a few steps on all tokens of the texts, so that it drafts a part of them."""
    torch.manual_seed(0)
    config = dflash.Config(**{"mask_token": target.vocab_size - 1} | shape)
    settings = dflash_trainer.Settings(num_anchors=16)
    drafter = dflash.Drafter(config, target).float().train().requires_grad_(True)
    rows = [example(text, None, str(number)) for number, text in enumerate(texts)]
    batch = complete(collate(rows), target, config.layers)
    optimiser = torch.optim.Adam(drafter.parameters(), lr=5e-3)
    for step in range(num_steps):
        dflash_trainer.begin_step(drafter, settings, step, num_steps)
        optimiser.zero_grad()
        dflash_trainer.loss(drafter, batch, settings, target)[0].backward()
        optimiser.step()
    return drafter.eval().requires_grad_(False)


class Scripted(Drafter):
    """Drafts each row's expected text: along a random path of a random tree, or as a chain.

    With `wrong_every` n, every n-th token of the text is wrong, so that drafts are accepted up to there.
    """

    config, hidden_layers = None, (1,)

    def __init__(self, target: Target, expected: list[list[int]], *, trees: bool, wrong_every: int = 0) -> None:
        self.target, self.expected, self.trees, self.wrong_every = target, expected, trees, wrong_every
        self._rng = random.Random(0)

    def start(self, session: Session) -> None:
        self._session = session

    def propose(self, budget: int) -> Draft:
        depth = min(budget, 4)
        continuations = [self._continuation(row, depth) for row in range(len(self._session.rows))]
        pending = self._session.pending()[:, None]
        if not self.trees:
            return Draft(tokens_BN=torch.cat([pending, torch.tensor(continuations)], 1), tree=chain(depth + 1))
        num_nodes = 3 * depth + 1
        parents, tokens = [], []
        for continuation in continuations:
            branch = sorted(self._rng.sample(range(1, num_nodes), depth))
            others = [token for token in range(VOCAB_SIZE) if token not in continuation]
            row_parents, row_tokens = [-1], [0]
            for node in range(1, num_nodes):
                if node in branch:
                    at = branch.index(node)
                    row_parents.append(branch[at - 1] if at else 0)
                    row_tokens.append(continuation[at])
                else:
                    # Beside the branch, so that the accepted path must be gathered; its token equals no other node's.
                    parent = self._rng.randrange(node)
                    row_parents.append(parent if _depth(row_parents, parent) < depth else 0)
                    row_tokens.append(others[node])
            parents.append(row_parents)
            tokens.append(row_tokens)
        drafted = torch.tensor(tokens)[:, 1:]
        return Draft(tokens_BN=torch.cat([pending, drafted], 1), tree=Tree.from_parents(parents))

    def observe(self, step: Step) -> None:
        """Checks that the requested hidden layer is there."""
        assert step.hidden[1].shape[:2] == step.draft.tokens_BN.shape

    def _continuation(self, row: int, depth: int) -> list[int]:
        begin = len(self._session.rows[row])
        text = self.expected[row] + [0] * depth
        is_wrong = [self.wrong_every > 0 and (begin + at + 1) % self.wrong_every == 0 for at in range(depth)]
        return [(text[begin + at] + is_wrong[at]) % VOCAB_SIZE for at in range(depth)]


def _depth(parents: list[int], node: int) -> int:
    return 0 if node == 0 else 1 + _depth(parents, parents[node])


@cache
def tiny_drafter(name: str, architecture: str) -> Any:
    """Returns a drafter for `tiny_target(architecture)`: random heads, a small random LM, a noisy copy, or look-up."""
    target = tiny_target(architecture)
    if name == "medusa":
        return built(medusa, HEADS, target)
    if name == "lm":
        return built(lm, SMALL, target)
    if name == "lookup":
        return lookup.Drafter(lookup.Config(), target)
    copied = lm.Drafter(lm.Config(model=target.model.config.to_dict(), num_draft=5, length="refit=0.2"), target)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for own, theirs in zip(copied.model.parameters(), target.model.parameters(), strict=True):
            noise = torch.randn(own.shape, generator=generator)
            own.copy_(theirs + 0.05 * theirs.std(correction=0) * noise)
    return copied.eval()


def generate_rows(target: Target, num_rows: int, drafter: Any = None, *, side: str = "right", **settings: Any) -> Any:
    """Returns the output of `generate` for `num_rows` prompts of different lengths, padded at `side`."""
    ids, mask = padded(prompts(num_rows), side=side)
    settings = {"max_new_tokens": NUM_NEW} | settings
    return draftsmith.generate(target, ids, drafter, attention_mask=mask, **settings)


@cache
def sampled_drafter(name: str) -> Any:
    """Returns a random drafter for `distribution_target()`: heads, a small LM, or look-up."""
    target = distribution_target()
    if name == "medusa":
        return built(medusa, medusa.Config(num_heads=3, tree=TREE), target)
    if name == "lm":  # stops after unlikely tokens, so that rows draft unequal lengths
        return built(lm, lm.Config(model=SAMPLED_SMALL, num_draft=3, length="refit=0.3"), target)
    if name == "lm_tree":
        paths = ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
        return built(lm, lm.Config(model=SAMPLED_SMALL, num_draft=3, tree=paths), target)
    return lookup.Drafter(lookup.Config(), target)
