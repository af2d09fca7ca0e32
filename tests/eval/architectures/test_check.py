"""Tests of architectures: representative ones are decoded in every way, and what is refused gets a sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith import Target
from eval.architectures.__main__ import DOCUMENT, document, outcomes_of
from eval.architectures.check import CRASH, IDENTICAL, QUICK, QUICK_WAYS, REFUSED, UNSUPPORTED, WRONG, check
from eval.architectures.models import Variant, tiny_config, tiny_model, variants

VARIANTS = {variant.name: variant for variant in variants()}
# Each stands for a kind: names of norms, blocks that return tuples, widths that differ, positions, windows.
WHOLLY_SUPPORTED = (
    "llama",
    "phi",  # its final norm is called final_layernorm
    "biogpt",  # layer_norm
    "gptj",  # blocks return tuples
    "falcon",  # its attention is called self_attention
    "gpt_oss",  # an MLP that returns two values
    "granitemoe",  # its MLP is called block_sparse_moe
    "deepseek_v3",  # latent attention: keys are wider than values
    "gemma4_text",  # two widths of heads
    "minimax_m2",  # a window in its config that it does not apply
    "xglm",  # computed positions
    "llama4_text",  # attention in chunks, a base model by another name
    "deepseek_v32",  # keys of its own by which attention is sparse
    "nanochat",  # a norm that is used twice
    "bloom",  # biases by position
    "falcon+alibi",
    "mpt",
    "gpt_neo",  # windows by position in some blocks
)
RUN_WHOLE = ("bert", "modernbert-decoder", "opt+350m")
RECURRENT = ("qwen3_next", "lfm2_moe", "mamba2", "jamba", "falcon_h1", "zamba2")
ENCODER_DECODERS = ("marian@seq2seq", "pegasus_x", "m2m_100", "umt5", "t5gemma", "t5gemma2", "nllb-moe")


def outcomes(name: str) -> dict[str, str]:
    found = check(tiny_model(VARIANTS[name]), QUICK, only=QUICK_WAYS)
    assert not [(way, one.detail) for way, one in found.items() if one.verdict in (WRONG, CRASH)]
    return {way: one.verdict for way, one in found.items()}


SLOW = (
    "llama4_text",
    "llama",
    "biogpt",
    "falcon",
    "granitemoe",
    "xglm",
    "pegasus_x",
    "modernbert-decoder",
    "mamba2",
    "falcon_h1",
    "qwen3_next",
    "falcon+alibi",
    "mpt",
    "opt+350m",
    "t5gemma",
    "nllb-moe",
)


def some(names: tuple[str, ...]) -> list[Any]:
    """Returns the names as parameters; those whose kind another one shows are slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.mark.parametrize("name", some(WHOLLY_SUPPORTED))
def test_every_way_of_decoding_writes_the_models_own_text(name: str) -> None:
    assert outcomes(name) == dict.fromkeys(("plain", *QUICK_WAYS), IDENTICAL)


@pytest.mark.parametrize("name", some(RUN_WHOLE))
def test_models_that_cannot_be_split_are_run_whole(name: str) -> None:
    parts = ("early exit", "layerskip", "training pass")
    assert outcomes(name) == dict.fromkeys(("plain", "chain", "tree"), IDENTICAL) | dict.fromkeys(parts, REFUSED)


@pytest.mark.parametrize("name", some(ENCODER_DECODERS))
def test_encoder_decoders_verify_chains_in_ragged_batches(name: str) -> None:
    found = outcomes(name)
    assert [found[way] for way in ("plain", "chain", "training pass")] == [IDENTICAL] * 3
    assert [found[way] for way in ("tree", "early exit", "layerskip")] == [REFUSED] * 3


@pytest.mark.parametrize("name", some(RECURRENT))
def test_models_with_recurrent_state_verify_chains(name: str) -> None:
    found = outcomes(name)
    assert [found[way] for way in ("plain", "chain", "early exit", "training pass")] == [IDENTICAL] * 4
    assert found["tree"] == REFUSED


def test_models_that_count_positions_in_the_cache_decode_one_prompt_at_a_time() -> None:
    """Inkling's biases of attention are of one row's positions."""
    found = outcomes("inkling_text")
    assert [found[way] for way in ("plain", "chain", "early exit", "training pass")] == [IDENTICAL] * 4
    assert found["ragged"] == REFUSED
    target = Target(tiny_model(VARIANTS["inkling_text"]))
    with pytest.raises(ValueError, match="cannot run 2 rows of unequal lengths .*; decode them one at a time"):
        draftsmith.generate(target, [[3, 4], [5]], max_new_tokens=2)


@pytest.mark.parametrize("name", ["recurrent_gemma", "deepseek_v4", "openai-gpt", "minimax"])
def test_unsupported_models_get_one_sentence(name: str) -> None:
    (found,) = check(tiny_model(VARIANTS[name])).values()
    assert found.verdict == UNSUPPORTED and "\n" not in found.detail and len(found.detail) < 300


def test_a_config_that_tells_is_refused_before_weights_load(tmp_path: Path) -> None:
    config = tiny_config(VARIANTS["bert"])
    config.is_decoder, config.architectures = False, ["BertLMHeadModel"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^BertLMHeadModel reads text in both directions, since is_decoder is false"):
        Target.from_pretrained(tmp_path)


def test_drafters_of_hidden_states_are_refused_by_a_target_that_is_run_whole() -> None:
    target = Target(tiny_model(VARIANTS["opt+350m"]))
    with pytest.raises(
        ValueError,
        match="is run whole, without hidden states or parts, since it projects after its final norm: take a drafter",
    ):
        target.read(torch.tensor([[3, 4, 5]]), (1,))
    out = draftsmith.generate(target, [[3, 4, 5], [6, 7]], max_new_tokens=3)
    assert out.lengths.tolist() == [6, 5]


def test_a_wrong_text_is_found() -> None:
    """A model whose final norm stays inside every span, as an unknown name of the norm would leave it."""
    variant = Variant(model_type="llama", is_seq2seq=False)
    model = tiny_model(variant)
    target = Target(model)
    target._norm = torch.nn.Identity()
    found = check(model, QUICK, only=("chain",), target=target)
    assert found["plain"].verdict == WRONG


WRAPPED = (
    "gemma3",
    "gemma4",
    "kimi_k25",
    "llama4",
    "mistral3",
    "mistral_large4",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_vl",
    "qwen3_vl_moe",
)


@pytest.mark.parametrize(
    "model_type", [name if name == "qwen3_vl" else pytest.param(name, marks=pytest.mark.slow) for name in WRAPPED]
)
def test_the_text_of_a_wrapper_is_decoded_from_its_folder(model_type: str) -> None:
    model = tiny_model(VARIANTS[f"{model_type}@wrapper"])
    found = check(model, QUICK, only=("lookup", "medusa", "folder"))
    assert {one.verdict for one in found.values()} == {IDENTICAL}
    target = Target(model)
    image = next(token for token, name in target.media_token_ids.items() if name.startswith("image_token_"))
    with pytest.raises(
        ValueError, match=f"prompt 1 holds token {image}, the target's image_token_.*; draftsmith decodes"
    ):
        draftsmith.generate(target, [[3, 4], [5, image]], max_new_tokens=2)


@pytest.mark.slow
def test_the_committed_table_is_what_the_script_gives() -> None:
    """A quarter of an hour; `python -m eval.architectures --quick` writes the table anew."""
    found = {name: outcomes_of(variant, is_quick=True) for name, variant in VARIANTS.items()}
    assert document(found, is_quick=True) == DOCUMENT.read_text()
