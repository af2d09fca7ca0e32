"""The target's outputs that are kept while texts are written, against one pass over each finished text."""

from typing import Any

import pytest
import torch

import draftsmith
from draftsmith import Target
from draftsmith.drafters import lookup
from draftsmith.inputs.outputs import top_logits
from tests.support.drafters import tiny_drafter
from tests.support.models import VOCAB_SIZE, prompts, tiny_target

NUM_PROMPTS, TOP_K = 9, 6
EOS = tuple(range(3, VOCAB_SIZE, 9))
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
"""Float32 sums over other shapes: about 1e-6 of values up to 10, over three blocks."""


def check_outputs(target: Target, drafter: Any = None, **settings: Any) -> list[draftsmith.StreamedText]:
    """Checks every output of a stream against the target's own pass over the whole text."""
    layers = (0, 2, target.num_layers)
    settings = {"batch_size": 4, "max_new_tokens": 14, "eos_token_id": EOS} | settings
    given = [[5], *prompts(NUM_PROMPTS - 1, seed=4)]  # of one token nothing is prefilled
    outputs = {"output_layers": layers, "output_top_logits": TOP_K}
    texts = list(draftsmith.generate_stream(target, given, drafter, **settings, **outputs))
    plain = list(draftsmith.generate_stream(target, given, drafter, **settings))
    assert {text.index: text.new_ids for text in texts} == {text.index: text.new_ids for text in plain}
    for text in texts:
        ids_1T = torch.tensor([text.prompt_ids + text.new_ids])
        with torch.inference_mode():
            expected = target.read(ids_1T, layers)
            logits_TK, _, normaliser_T = (part[0] for part in top_logits(target, expected[target.num_layers], TOP_K))
            all_logits_TV = target.head(target.norm(expected[target.num_layers]))[0]
        assert text.outputs is not None and set(text.outputs.hidden) == {*layers}
        for layer in layers:
            torch.testing.assert_close(text.outputs.hidden[layer], expected[layer][0], **TOLERANCE)
        torch.testing.assert_close(text.outputs.top_logits_TK, logits_TK, **TOLERANCE)
        torch.testing.assert_close(text.outputs.log_normaliser_T, normaliser_T, **TOLERANCE)
        # Ids of equal logits may change places.
        chosen_TK = all_logits_TV.gather(-1, text.outputs.top_ids_TK)
        torch.testing.assert_close(chosen_TK, text.outputs.top_logits_TK, **TOLERANCE)
    return texts


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_outputs_equal_one_pass_over_the_text(architecture: str) -> None:
    texts = check_outputs(tiny_target(architecture))
    assert {text.ended for text in texts} == {True, False}, "texts must end by the limit and by themselves"


def test_outputs_of_sampled_and_drafted_texts() -> None:
    """Accepted drafts enter in order, tokens that follow the last are left out."""
    target = tiny_target("llama")
    check_outputs(target, temperature=1.0, seed=3)
    check_outputs(target, lookup.Drafter(lookup.Config(), target))
    check_outputs(target, tiny_drafter("eagle3", "llama"))


def test_drafter_that_ran_the_first_blocks_leaves_them_to_the_target() -> None:
    """Early exit resumes above blocks whose outputs are kept."""
    target = tiny_target("llama")
    check_outputs(target, tiny_drafter("early_exit", "llama"))


def test_invalid_outputs_are_rejected() -> None:
    target = tiny_target("llama")
    for given, message in (
        ({"output_layers": [99]}, "hidden layer 99 does not exist; .* has layers 0 to"),
        ({"output_top_logits": VOCAB_SIZE + 1}, rf"output_top_logits is {VOCAB_SIZE + 1}; .* pass 0 to {VOCAB_SIZE}"),
        ({"output_top_logits": -1}, "output_top_logits is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            draftsmith.generate_stream(target, [[5]], max_new_tokens=4, **given)
