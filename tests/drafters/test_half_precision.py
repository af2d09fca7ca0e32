"""Drafters in half precision: training, decoding, artifact and export compute the same logits.

State dicts cannot show it: rotary frequencies are in no checkpoint, and a cast to bfloat16 rounds them for good. Texts
are long, because the error of a rounded frequency grows with the position.

Shape suffixes: B rows, T tokens, N nodes, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import draftsmith
from draftsmith import Target
from draftsmith.artifacts.families import find, names
from draftsmith.core.tree import Draft
from draftsmith.drafters import cascade, early_exit, layerskip, lm, lookup, merge, prophet, staged
from draftsmith.export import export
from draftsmith.loading.precision import cast
from tests.drafters.test_eagle3 import chains
from tests.drafters.test_every_family import example_of
from tests.support.family import Watched, built, part_config
from tests.support.models import CONTEXT, SEQ2SEQ, VOCAB_SIZE, tiny_config, tiny_model, tiny_tokenizer

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
ROTARY = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox")


def small(target: Target, architecture: str = "llama", **changes: Any) -> lm.Config:
    # A width whose square root, Gemma's scale of embeddings, is no number of bfloat16.
    sizes = {"vocab_size": target.vocab_size, "hidden_size": 40}
    model = tiny_config(architecture, **sizes).to_dict()
    return lm.Config(**{"model": model, "num_draft": 4, "length": "fixed"} | changes)


def composite(family: ModuleType, target: Target) -> Any:
    trees = {"width": 2} if family is merge else {}
    parts = (part_config("lookup", lookup.Config()), part_config("lm", small(target, **trees)))
    return family.Config(parts=parts[::-1] if family is staged else parts)


def and_slow(values: Iterable[str], fast: Collection[str]) -> list[Any]:
    """Returns the values as parameters of a test, those not in `fast` in the slow suite."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


Case = tuple[ModuleType, Callable[[Target], Any]]
CASES: dict[str, Case] = {
    **{f"lm {name}": (lm, lambda target, name=name: small(target, name)) for name in ROTARY},
    "lm tied": (lm, lambda target: small(target, rank=8, shortlist=20)),
    **{name: (find(name), example_of(name)) for name in ("translated", "kangaroo", "medusa2", "prophet", "hydra")},
    "eagle3": (find("eagle3"), chains),
    "dflash": (find("dflash"), example_of("dflash")),
    "mtp": (find("mtp"), example_of("mtp")),
    "early_exit": (early_exit, example_of("early_exit")),
    "early_exit prefix": (early_exit, early_exit.Config(exit_layer=2, num_draft=4, length="fixed")),
    "early_exit fine-tuned": (early_exit, early_exit.Config(exit_layer=2, tunes=True, length="fixed")),
    "early_exit adapters": (early_exit, early_exit.Config(exit_layer=2, tunes=True, rank=2, alpha=1.0, length="fixed")),
    "prophet joint": (prophet, prophet.Config(num_layers=1, num_draft=4, joint=True, length="fixed")),
    "layerskip": (layerskip, layerskip.Config(attention=(1,), mlp=(1,), num_draft=4, length="fixed")),
    **{one.__name__.rpartition(".")[2]: (one, lambda target, one=one: composite(one, target))
       for one in (merge, cascade, staged)},
}  # fmt: skip
SIMILAR = ("lm mistral", "lm qwen2", "lm qwen3", "lm gemma2", "lm phi3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target stored in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "llama"
    cast(tiny_model("llama"), BFLOAT16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens_1T() -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (1, CONTEXT - 12), generator=torch.Generator().manual_seed(0))


class Recorded(Watched):
    """Records every draft's tokens and distributions."""

    def propose(self, budget: int) -> Draft:
        draft = super().propose(budget)
        self.found = [*getattr(self, "found", []), draft.tokens_BN, draft.draft_probs_BNV]
        return draft


def drafts(drafter: Any, tokens_1T: Tensor) -> list[Tensor | None]:
    """Returns the tokens and distributions of a few drafts, and the target's tokens."""
    recorded = Recorded(drafter)
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 0, "eos_token_id": []}
    out = draftsmith.generate(drafter.target, tokens_1T, recorded, **settings)
    return [*recorded.found, out.sequences]


def are_equal(some: list[Tensor | None], others: list[Tensor | None]) -> bool:
    pairs = list(zip(some, others, strict=True))
    return all(one is other if one is None or other is None else torch.equal(one, other) for one, other in pairs)


def logits_of(model: Any, tokens_1T: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens_1T, use_cache=False).logits


def trained(drafter: Any, dtype: torch.dtype) -> Any:
    """Returns the drafter after the casts of a training run, which holds its weights in float32."""
    for cast_to in (FLOAT32, dtype):
        drafter.to(cast_to)
    drafter.eval().on_weights_loaded()
    return drafter


@pytest.mark.parametrize("name", and_slow(CASES, [name for name in CASES if name not in SIMILAR]))
def test_training_artifact_and_export_have_the_same_logits(
    folder: Path, tokens_1T: Tensor, tmp_path: Path, name: str
) -> None:
    """The export as loaded by transformers: the draft model, or the fine-tuned target."""
    family, config = CASES[name]
    target = Target.from_pretrained(str(folder))
    drafter = built(family, config, target)
    if isinstance(drafter, nn.Module):
        trained(drafter, BFLOAT16)
    draftsmith.save(drafter, tmp_path / "artifact", target)
    loaded = draftsmith.load(tmp_path / "artifact", Target.from_pretrained(str(folder)))
    if family is not cascade:  # it chooses its parts by measured times
        assert are_equal(drafts(drafter, tokens_1T), drafts(loaded, tokens_1T))
    out = export(tmp_path / "artifact", "vllm" if family is layerskip else "transformers", tmp_path / "out")
    if drafter.fine_tunes_target and (out / "target").is_dir():
        exported = AutoModelForCausalLM.from_pretrained(out / "target", dtype=BFLOAT16)
        assert torch.equal(logits_of(drafter.target.model, tokens_1T), logits_of(exported, tokens_1T))
    if isinstance(drafter, lm.Drafter) and (out / "config.json").is_file():
        for dtype in (BFLOAT16, FLOAT32):
            exported = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
            again = draftsmith.load(tmp_path / "artifact", Target.from_pretrained(str(folder), dtype=str(dtype)[6:]))
            for one in (again, *([drafter, loaded] if dtype == BFLOAT16 else [])):
                assert torch.equal(logits_of(one.model, tokens_1T), logits_of(exported, tokens_1T)), dtype
    else:
        assert not name.startswith("lm") or name == "lm tied"


@pytest.mark.parametrize("name", ["early_exit prefix", "layerskip"])
def test_reduced_target_has_the_logits_of_its_export(
    folder: Path, tokens_1T: Tensor, tmp_path: Path, name: str
) -> None:
    """Its blocks run in the target, with the target's frequencies; the export has its own."""
    family, config = CASES[name]
    target = Target.from_pretrained(str(folder))
    drafter = built(family, config, target)
    draftsmith.save(drafter, tmp_path / "artifact", target)
    exported = AutoModelForCausalLM.from_pretrained(
        export(tmp_path / "artifact", "vllm", tmp_path / "out"), dtype=BFLOAT16
    )
    copied = Target.from_pretrained(str(folder)).model
    if family is early_exit:
        copied.model.layers, copied.model.norm = copied.model.layers[:2], drafter.norm
    else:
        del copied.model.layers[1]
    copied.config.num_hidden_layers = 2
    assert torch.equal(logits_of(copied, tokens_1T), logits_of(exported, tokens_1T))


@pytest.mark.parametrize("family", [name for name in names() if issubclass(find(name).Drafter, nn.Module)])
def test_casts_round_no_buffer(folder: Path, family: str) -> None:
    """Nor do the casts of a module around it, as DeepSpeed's and those of a user."""
    drafter = built(find(family), example_of(family), Target.from_pretrained(str(folder)))
    before = {name: buffer.clone() for name, buffer in drafter.named_buffers()}
    nn.Sequential(drafter).to(torch.float16).bfloat16().float().half()
    assert {weight.dtype for weight in drafter.parameters()} <= {torch.float16}
    saved = drafter.state_dict()
    for name, buffer in drafter.named_buffers():
        if name not in saved:
            assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("architecture", and_slow((*ROTARY, *SEQ2SEQ), ("llama", "gemma3_text", "t5")))
@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16], ids=str)
def test_cast_equals_loading_in_that_dtype(
    tokens_1T: Tensor, tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    """Including the weights that transformers keeps in float32, as T5's `wo` in float16."""
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if architecture in SEQ2SEQ else AutoModelForCausalLM
    loaded, found = auto.from_pretrained(tmp_path, dtype=dtype), cast(model, dtype)
    expected = {name: weight.dtype for name, weight in loaded.named_parameters()}
    assert {name: weight.dtype for name, weight in found.named_parameters()} == expected
    given = {"decoder_input_ids": tokens_1T} if architecture in SEQ2SEQ else {}
    with torch.no_grad():
        logits = [one(input_ids=tokens_1T, use_cache=False, **given).logits for one in (found, loaded)]
    assert torch.equal(*logits)
    assert len(set(expected.values())) == 1 + (architecture == "t5" and dtype == torch.float16)
    if architecture in ROTARY and architecture != "gpt_neox":  # with two rotary dimensions, of frequency 1
        rounded = tiny_model(architecture).to(dtype)
        assert not torch.equal(logits_of(rounded, tokens_1T), logits[1]), "the text is too short to show rounding"
