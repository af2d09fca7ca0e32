"""Decodes a tiny model by every kind of drafter, and compares the texts with the model's own.

A text is right if each of its tokens is the likeliest of the model's own forward over the whole text, up to rounding,
or if the model's own `generate` wrote it.

Shape suffixes: B rows, N nodes of a draft.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import draftsmith
from draftsmith import Target
from draftsmith.artifacts.families import find
from draftsmith.core.drafter import Drafter, Session, Step
from draftsmith.core.tree import Draft, Tree, chain

TOLERANCE = 1e-3
"""Largest difference of logits, relative to the largest logit, that counts as rounding."""
TREE = ((0,), (1,), (0, 0), (0, 1), (0, 0, 0))

QUICK_WAYS = ("chain", "tree", "early exit", "layerskip", "training pass")

IDENTICAL, REFUSED, UNSUPPORTED, WRONG, CRASH = "identical", "refused", "unsupported", "WRONG TEXT", "CRASH"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of decoding in one way."""

    verdict: str
    """identical; refused, with a sentence, before decoding; WRONG TEXT; or CRASH."""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """What is decoded: the lengths of the prompts of each batch, and new tokens per prompt."""

    batches: tuple[tuple[int, ...], ...]
    num_new: int


WHOLE = Amount(batches=((37,), (70,), (5, 37, 20)), num_new=40)
QUICK = Amount(batches=((30,), (5, 30)), num_new=8)


class PartlyRight(Drafter):
    """Drafts a known text with some wrong tokens, as chains or as trees of random shape."""

    config = None

    def __init__(self, target: Target, texts: Sequence[Sequence[int]], *, trees: bool) -> None:
        self.target, self._texts, self._trees, self._rng = target, texts, trees, random.Random(0)

    def start(self, session: Session) -> None:
        self._session = session

    def propose(self, budget: int) -> Draft:
        depth = min(budget, 4)
        pending = self._session.pending()[:, None]
        device, vocab_size = pending.device, self.target.vocab_size
        parents, tokens = [], []
        for row, text in zip(self._session.rows, self._texts, strict=True):
            following = [*text[len(row) : len(row) + depth], *[0] * depth][:depth]
            right = [token if self._rng.random() < 0.8 else (token + 1) % vocab_size for token in following]
            if not self._trees:
                parents.append([node - 1 for node in range(depth + 1)])
                tokens.append(right)
                continue
            row_parents, row_tokens, last = [-1], [0], 0
            for token in right:
                for _ in range(self._rng.randrange(2)):  # a wrong sibling before the right one
                    row_parents.append(last)
                    row_tokens.append((token + 2 + len(row_tokens)) % vocab_size)
                row_parents.append(last)
                row_tokens.append(token)
                last = len(row_tokens) - 1
            while len(row_tokens) < 2 * depth + 1:
                row_parents.append(0)
                row_tokens.append((right[0] + 30 + len(row_tokens)) % vocab_size)
            parents.append(row_parents)
            tokens.append(row_tokens[1:])
        tree = Tree.from_parents(parents, device) if self._trees else chain(depth + 1, device)
        drafted_BN = torch.tensor(tokens, device=device)
        return Draft(tokens_BN=torch.cat([pending, drafted_BN], 1), tree=tree)

    def observe(self, step: Step) -> None:
        pass


def prompts(lengths: Sequence[int], vocab_size: int, *, seed: int = 0) -> list[list[int]]:
    """Returns prompts of these lengths, in which phrases recur."""
    rng = random.Random(seed)
    rows = []
    for length in lengths:
        phrase = [rng.randrange(3, min(vocab_size, 150)) for _ in range(9)]
        rows.append([phrase[at % 9] if rng.random() < 0.9 else rng.randrange(3, 150) for at in range(length)])
    return rows


def check(
    model: Any, amount: Amount = WHOLE, *, only: Sequence[str] = (), target: Target | None = None
) -> dict[str, Outcome]:
    """Returns the outcome of every way of decoding, or of `only` some; of `target` if the model is not supported."""
    try:
        target = target or Target(model)
    except ValueError as error:
        return {"target": Outcome(verdict=UNSUPPORTED, detail=str(error))}
    except Exception as error:  # what a user would see as a traceback
        return {"target": Outcome(verdict=CRASH, detail=_brief(error))}
    checks = _Checks(model, target, amount)
    outcomes = {"plain": checks.decode(lambda _: None)}
    if outcomes["plain"].verdict == CRASH:
        return outcomes  # there is no text to draft from
    texts = checks.texts
    if problem := target.abilities.cannot_batch:
        outcomes["ragged"] = Outcome(verdict=REFUSED, detail=f"unequal rows: {problem}")
    exits, skips = {"exit_layer": 2, "num_draft": 3}, {"attention": (1,), "mlp": (2,), "num_draft": 3}
    ways: dict[str, Callable[[list[list[int]]], Drafter | None]] = {
        "lookup": lambda _: _drafter("lookup", target),
        "chain": lambda rows: PartlyRight(target, rows, trees=False),
        "tree": lambda rows: _tree_drafter(target, rows),
        "draft LM": lambda _: _drafter("lm", target, model=_small_model(target), num_draft=3, length="fixed"),
        "medusa": lambda _: _drafter("medusa", target, num_heads=3, tree=TREE),
        "early exit": lambda _: _drafter("early_exit", target, **exits, length="fixed", own_norm=False),
        "early exit tree": lambda _: _drafter("early_exit", target, **exits, width=2, num_nodes=6, own_norm=False),
        "layerskip": lambda _: _drafter("layerskip", target, **skips, length="fixed"),
    }
    for name, make in ways.items():
        if (not only or name in only) and (target.takes_trees or name != "early exit tree"):
            outcomes[name] = checks.decode(make, texts)
    for name, run in (("training pass", checks.training_pass), ("folder", checks.folder)):
        if not only or name in only:
            outcomes[name] = run()
    return outcomes


def _tree_drafter(target: Target, texts: list[list[int]]) -> Drafter:
    target.check_trees()
    return PartlyRight(target, texts, trees=True)


def _small_model(target: Target) -> dict[str, Any]:
    settings = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"model_type": "llama", "vocab_size": target.vocab_size, "max_position_embeddings": 256} | settings


def _drafter(family: str, target: Target, **config: Any) -> Drafter:
    """Returns a drafter of the family with random weights, if it has any."""
    module = find(family)
    drafter = module.Drafter(module.Config(**config), target)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    if isinstance(drafter, nn.Module):
        drafter.eval()
    drafter.on_weights_loaded()
    return drafter


class _Checks:
    """The ways of decoding one model, and its own texts, each made once."""

    def __init__(self, model: Any, target: Target, amount: Amount) -> None:
        self._model, self._target, self._num_new = model, target, amount.num_new
        batches = [prompts(lengths, target.vocab_size, seed=seed) for seed, lengths in enumerate(amount.batches)]
        self._batches = [rows for rows in batches if len(rows) == 1 or not target.abilities.cannot_batch]
        self._right: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        self.texts: list[list[list[int]]] = []
        """The plain texts of each batch."""

    def decode(
        self, make: Callable[[list[list[int]]], Drafter | None], texts: list[list[list[int]]] | None = None
    ) -> Outcome:
        """Decodes every batch with the drafter that `make` returns for its texts."""
        for index, rows in enumerate(self._batches):
            try:
                drafter = make(texts[index] if texts else [])
            except ValueError as error:
                return Outcome(verdict=REFUSED, detail=str(error))
            except Exception as error:
                return Outcome(verdict=CRASH, detail=f"made: {_brief(error)}")
            try:
                out = draftsmith.generate(self._target, rows, drafter, max_new_tokens=self._num_new)
            except Exception as error:
                return Outcome(verdict=CRASH, detail=f"{len(rows)} rows: {_brief(error)}")
            found = [ids[:length] for ids, length in zip(out.sequences.tolist(), out.lengths.tolist(), strict=True)]
            if texts is None:
                self.texts.append(found)
            for row, (prompt, text) in enumerate(zip(rows, found, strict=True)):
                if gap := self._gap(prompt, text):
                    return Outcome(verdict=WRONG, detail=f"batch of {len(rows)}, row {row}: {gap}")
        return Outcome(verdict=IDENTICAL)

    @torch.inference_mode()
    def _gap(self, prompt: list[int], text: list[int]) -> str:
        """Returns where a text is not the model's own, empty if it is."""
        key = (tuple(prompt), tuple(text))
        if key in self._right:
            return ""
        begin = 1 if self._target.is_encoder_decoder else len(prompt)
        ids = torch.tensor([text])
        given = {"input_ids": ids}
        if self._target.is_encoder_decoder:
            given = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": ids}
        logits_TV = self._model(**given, use_cache=False).logits[0].float()
        chosen = logits_TV[begin - 1 : -1].gather(1, ids[0, begin:, None])[:, 0]
        best = logits_TV[begin - 1 : -1].amax(1)
        is_off = best - chosen > TOLERANCE * max(1.0, float(logits_TV.abs().max()))
        if is_off.any():
            generated = self._model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                do_sample=False,
                max_new_tokens=self._num_new,
            )[0].tolist()
            if generated != text:
                at = int(is_off.nonzero()[0])
                return f"new token {at} has logit {chosen[at]:.3f}, the likeliest {best[at]:.3f}"
        self._right.add(key)
        return ""

    @torch.inference_mode()
    def training_pass(self) -> Outcome:
        """Compares the hidden states that heads are trained on with the model's own logits."""
        rows = [text for batch in self.texts for text in batch]
        longest = max(map(len, rows))
        tokens_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        last = self._target.num_layers
        try:
            source = None
            if self._target.is_encoder_decoder:
                sources = [prompt for batch in self._batches for prompt in batch]
                width = max(map(len, sources))
                padded = torch.tensor([row + [0] * (width - len(row)) for row in sources])
                mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sources])
                source = self._target.encode(padded, mask)
            found_BTV = self._target.logits(self._target.read(tokens_BT, (last,), source)[last])
        except ValueError as error:
            return Outcome(verdict=REFUSED, detail=str(error))
        except Exception as error:
            return Outcome(verdict=CRASH, detail=_brief(error))
        for row, text in enumerate(rows):
            given = {"input_ids": torch.tensor([text])}
            if self._target.is_encoder_decoder:
                given = {"input_ids": torch.tensor([sources[row]]), "decoder_input_ids": torch.tensor([text])}
            expected_TV = self._model(**given, use_cache=False).logits[0]
            gap = float((found_BTV[row, : len(text)] - expected_TV).abs().max() / expected_TV.abs().max().clamp(min=1))
            if not gap < TOLERANCE:
                return Outcome(verdict=WRONG, detail=f"logits of row {row} are off by {gap:.2g}")
        return Outcome(verdict=IDENTICAL)

    def folder(self) -> Outcome:
        """Saves the model, loads the folder, and decodes with look-up."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                self._model.save_pretrained(folder)
                loaded = Target.from_pretrained(folder, dtype="float32", device="cpu")
            except ValueError as error:
                return Outcome(verdict=REFUSED, detail=str(error))
            except Exception as error:
                return Outcome(verdict=CRASH, detail=_brief(error))
            rows = self._batches[-1]
            out = draftsmith.generate(
                loaded, rows, _drafter("lookup", loaded), max_new_tokens=self._num_new, eos_token_id=()
            )
            found = [ids[:length] for ids, length in zip(out.sequences.tolist(), out.lengths.tolist(), strict=True)]
        gaps = [self._gap(prompt, text) for prompt, text in zip(rows, found, strict=True)]
        return Outcome(verdict=WRONG if any(gaps) else IDENTICAL, detail=next(filter(None, gaps), ""))


def _brief(error: Exception) -> str:
    """Returns an error's kind and first sentence."""
    text = str(error).split("\n")[0][:300]
    return f"{type(error).__name__}: {text}"
