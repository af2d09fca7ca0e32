"""`model.generate(custom_generate=...)` returns what `model.generate` returns, or raises ValueError."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as hf

import draftsmith
from draftsmith import Target
from draftsmith.drafters import lm, lookup, medusa
from tests.support.family import built
from tests.support.models import CAUSAL, SEQ2SEQ, VOCAB_SIZE, padded, prompts, tiny_model, tiny_target

NUM_NEW = 16


def drafter_for(target: Target, name: str = "copy") -> Any:
    """Returns a drafter: a copy of the target as draft model, heads, or look-up."""
    if name == "medusa":
        return built(medusa, medusa.Config(num_heads=2, tree=((0,), (1,), (0, 0))), target)
    if name == "lookup" or target.is_encoder_decoder:
        return lookup.Drafter(lookup.Config(), target)
    drafter = lm.Drafter(lm.Config(model=target.model.config.to_dict(), num_draft=4), target)
    drafter.model.load_state_dict(target.model.state_dict())
    return drafter.eval()


def generate_both(target: Target, drafter: Any, ids: Any, **settings: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Returns transformers' sequences and draftsmith's."""
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False} | settings
    settings = {name: value for name, value in settings.items() if value is not None}
    own = target.model.generate(torch.as_tensor(ids), **settings)
    settings |= {"custom_generate": draftsmith.custom_generate, "drafter": drafter}
    return own.tolist(), target.model.generate(torch.as_tensor(ids), **settings).tolist()


@pytest.mark.parametrize("architecture", CAUSAL + SEQ2SEQ)
def test_greedy_output_equals_transformers(architecture: str) -> None:
    target = tiny_target(architecture)
    drafter = drafter_for(target)
    # transformers includes left padding in the learned positions of an encoder.
    side = "right" if target.is_encoder_decoder else "left"
    for num_rows in (1, 5):
        ids, mask = padded(prompts(num_rows), side=side)
        own, ours = generate_both(target, drafter, ids, attention_mask=mask)
        assert ours == own, num_rows


@pytest.mark.parametrize("name", ["medusa", "lookup", "none"])
def test_every_kind_of_drafter_is_supported(name: str) -> None:
    target = tiny_target("llama")
    ids, mask = padded(prompts(5), side="left")
    own, ours = generate_both(target, None if name == "none" else drafter_for(target, name), ids, attention_mask=mask)
    assert ours == own


def test_finished_rows_are_padded_as_by_transformers() -> None:
    target = tiny_target("llama")
    ids, mask = padded(prompts(5), side="left")
    whole, _ = generate_both(target, None, ids, attention_mask=mask)
    ends = [whole[0][ids.shape[1] + 2], whole[2][ids.shape[1] + 5]]
    own, ours = generate_both(target, drafter_for(target), ids, attention_mask=mask, eos_token_id=ends, pad_token_id=9)
    assert ours == own
    assert 9 in own[0][ids.shape[1] :]
    short, ours = generate_both(target, drafter_for(target), ids[:1], attention_mask=mask[:1], eos_token_id=ends)
    assert ours == short and len(short[0]) == ids.shape[1] + 3


def test_generation_config_and_max_length_are_respected() -> None:
    target = tiny_target("llama")
    ids = [prompts(1)[0]]
    five = GenerationConfig(max_new_tokens=5, pad_token_id=0)
    own, ours = generate_both(target, drafter_for(target), ids, max_new_tokens=None, generation_config=five)
    assert ours == own
    own, ours = generate_both(target, drafter_for(target), ids, max_new_tokens=None, max_length=13)
    assert ours == own and len(own[0]) == 13


def test_sampling_respects_seeds_and_settings() -> None:
    target = tiny_target("llama")
    settings = {"max_new_tokens": NUM_NEW, "do_sample": True, "custom_generate": draftsmith.custom_generate}
    settings["drafter"] = drafter_for(target)
    ids, mask = padded(prompts(5), side="left")

    def sample(**changes: Any) -> list[list[int]]:
        return target.model.generate(ids, attention_mask=mask, **settings | changes).tolist()

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    torch.manual_seed(0)
    first = sample(temperature=0.8)
    torch.manual_seed(0)
    assert sample(temperature=0.8) == first
    greedy, _ = generate_both(target, None, ids, attention_mask=mask)
    assert sample(top_k=1) == greedy, "top-k is used"
    assert sample(top_p=1e-6, top_k=0) == greedy, "top-p is used"
    assert sample(temperature=1e-4) == greedy, "the temperature is used"
    assert sample(min_p=0.999) == sample(epsilon_cutoff=0.999) == sample(typical_p=1e-9, top_k=1) == greedy
    assert sample(top_h=1e-9) == greedy, "cutoffs that Sampling does not have are used"
    for row, prompt in zip(sample(num_return_sequences=1), prompts(5), strict=True):
        assert row[ids.shape[1] - len(prompt) : ids.shape[1]] == prompt


def test_num_return_sequences() -> None:
    target = tiny_target("llama")
    ids = torch.tensor(prompts(1))
    given = {"custom_generate": draftsmith.custom_generate, "drafter": drafter_for(target), "seed": 0}
    rows = target.model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=NUM_NEW, **given)
    assert rows.shape == (3, ids.shape[1] + NUM_NEW)
    assert len({tuple(row) for row in rows.tolist()}) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 3}, "num_beams is 3; .* must be 1"),
        ({"guidance_scale": 2.0}, "logits processor UnbatchedClassifierFreeGuidance.* is not supported: it runs"),
    ],
)
def test_unsupported_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    target = tiny_target("llama")
    given = {"custom_generate": draftsmith.custom_generate, "drafter": drafter_for(target), "max_new_tokens": NUM_NEW}
    with pytest.raises(ValueError, match=message) as error:
        target.model.generate(torch.tensor(prompts(1)), **given | settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3, "suppress_tokens": [4, 7], "renormalize_logits": True},
        {"do_sample": True, "temperature": 0.5, "top_k": 1, "repetition_penalty": 1.3},
    ],
    ids=lambda settings: "+".join(settings) or "plain",
)
def test_scores_and_logits_are_those_of_transformers(architecture: str, settings: dict[str, Any]) -> None:
    target = tiny_target(architecture)
    ids, mask = padded(prompts(5), side="right" if target.is_encoder_decoder else "left")
    given = {
        "do_sample": False,
        "attention_mask": mask,
        "max_new_tokens": 8,
        "return_dict_in_generate": True,
    } | settings
    given |= {"output_scores": True, "output_logits": True}
    end = int(target.model.generate(ids, **given).sequences[0, -4])
    own = target.model.generate(ids, **given, eos_token_id=end)
    given |= {"custom_generate": draftsmith.custom_generate, "drafter": drafter_for(target)}
    ours = target.model.generate(ids, **given, eos_token_id=end)
    assert type(ours) is type(own) and ours.sequences.equal(own.sequences)
    num_ended = 0
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(own[name])
        for step, (found_BV, expected_BV) in enumerate(zip(ours[name], own[name], strict=True)):
            begin = own.sequences.shape[1] - len(own.scores)
            is_ended_B = (own.sequences[:, begin : begin + step] == end).any(1)
            num_ended += int(is_ended_B.sum())
            assert found_BV[is_ended_B].isnan().all()
            # Rounding: drafted tokens are read several at a time.
            torch.testing.assert_close(found_BV[~is_ended_B], expected_BV[~is_ended_B], rtol=1e-4, atol=1e-4)
    assert num_ended > 0 or target.is_encoder_decoder, "the tiny T5 writes the same in all rows"


def test_outputs_of_the_forward_are_rejected() -> None:
    target = tiny_target("llama")
    settings = {"return_dict_in_generate": True, "output_hidden_states": True, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="output_hidden_states is not supported"):
        target.model.generate(torch.tensor(prompts(1)), custom_generate=draftsmith.custom_generate, **settings)
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        draftsmith.generate(target, prompts(1), max_new_tokens=4, generation_config={"output_attentions": True})
    processors = [hf.LogitNormalization(), hf.TopKLogitsWarper(3)]
    with pytest.raises(ValueError, match="not supported with LogitNormalization before other processors"):
        draftsmith.generate(target, prompts(1), max_new_tokens=4, logits_processor=processors, output_scores=True)


def test_a_drafter_of_another_model_is_rejected() -> None:
    other = Target(tiny_model("llama", seed=4))
    with pytest.raises(ValueError, match="the drafter was loaded for another model object"):
        generate_both(tiny_target("llama"), drafter_for(other), prompts(1))


def test_verifier_and_length_are_passed_on() -> None:
    target = tiny_target("llama")
    own, ours = generate_both(target, drafter_for(target), prompts(1))
    given = {"custom_generate": draftsmith.custom_generate, "drafter": drafter_for(target), "max_new_tokens": NUM_NEW}
    typical = target.model.generate(torch.tensor(prompts(1)), do_sample=False, verifier="typical", **given)
    assert typical.tolist() == own == ours
    with pytest.raises(ValueError, match="unknown verifier 'nosuch'"):
        target.model.generate(torch.tensor(prompts(1)), verifier="nosuch", **given)
    with pytest.raises(ValueError, match="unknown length policy 'nosuch'"):
        target.model.generate(torch.tensor(prompts(1)), length="nosuch", **given)
    assert max(own[0]) < VOCAB_SIZE


class Pieces:
    """A streamer that records its pieces."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = 0

    def put(self, piece: torch.Tensor) -> None:
        self.pieces.append(piece.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_tokens_are_streamed_to_stream_to(architecture: str) -> None:
    target, streamer = tiny_target(architecture), Pieces()
    own, ours = generate_both(target, drafter_for(target), prompts(1))
    given = {"custom_generate": draftsmith.custom_generate, "drafter": drafter_for(target), "do_sample": False}
    out = target.model.generate(torch.tensor(prompts(1)), max_new_tokens=NUM_NEW, stream_to=streamer, **given)
    assert out.tolist() == own == ours
    assert [token for piece in streamer.pieces for token in piece] == own[0]
    assert streamer.ended == 1 and len(streamer.pieces) > 2


def test_masks_of_ones_are_supported() -> None:
    for architecture in ("llama", "t5"):
        target = tiny_target(architecture)
        ids = torch.tensor([prompts(1)[0], prompts(1)[0]])
        own, ours = generate_both(target, drafter_for(target), ids, attention_mask=torch.ones_like(ids))
        assert ours == own


def test_num_return_sequences_of_an_encoder_decoder() -> None:
    target = tiny_target("t5")
    (ids, mask), rows = padded(prompts(2)), []
    given = {"custom_generate": draftsmith.custom_generate, "do_sample": True, "top_k": 1, "max_new_tokens": NUM_NEW}
    for num in (1, 3):
        rows.append(target.model.generate(ids, attention_mask=mask, num_return_sequences=num, **given).tolist())
    assert rows[1] == [row for row in rows[0] for _ in range(3)]


def test_end_tokens_outside_the_vocabulary_are_ignored_as_in_transformers() -> None:
    target = tiny_target("llama")
    own, ours = generate_both(target, drafter_for(target), prompts(1), eos_token_id=VOCAB_SIZE + 3, pad_token_id=0)
    assert ours == own


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("llama", {"streamer": Pieces()}, "transformers does not hand streamer to a function.* pass it as stream_to"),
        ("llama", {"drafter": "runs/medusa"}, "drafter is 'runs/medusa'; pass the drafter"),
        ("llama", {"assistant_model": tiny_target("llama").model}, "assistant_model is not supported"),
        ("llama", {"stop_strings": "w3"}, "stop_strings is 'w3', but the target has no tokenizer"),
        ("llama", {"penalty_alpha": 0.6, "top_k": 4}, r"asks for contrastive search \(penalty_alpha=0.6\)"),
        ("llama", {"dola_layers": "low"}, r"asks for dola generation \(dola_layers='low'\)"),
        ("llama", {"prompt_lookup_num_tokens": 3}, r"asks for assisted generation \(prompt_lookup_num_tokens=3\)"),
        ("llama", {"position_ids": torch.arange(4, 13)[None]}, "position_ids are not those of the prompts"),
        (
            "llama",
            {"past_key_values": "filled"},
            "past_key_values holds 4 tokens, and draftsmith has a cache of its own",
        ),
        ("llama", {"inputs_embeds": "embeddings"}, "inputs_embeds is not supported by draftsmith"),
        ("gpt2", {"token_type_ids": torch.ones(1, 9).long()}, "token_type_ids is not supported by draftsmith"),
        ("t5", {"decoder_input_ids": torch.tensor([[0, 5, 6]])}, "decoder_input_ids are not supported; .* token 0"),
        ("t5", {"inputs_embeds": "embeddings"}, "inputs_embeds is not supported by draftsmith"),
        ("t5", {"encoder_outputs": "encoded"}, "embeddings or encoder_outputs; pass its token ids"),
    ],
)
def test_arguments_that_would_be_ignored_are_rejected(
    architecture: str, settings: dict[str, Any], message: str
) -> None:
    target, ids = tiny_target(architecture), torch.tensor(prompts(1))
    given = {"custom_generate": draftsmith.custom_generate, "drafter": drafter_for(target), "max_new_tokens": NUM_NEW}
    with torch.no_grad():
        if settings.get("past_key_values") == "filled":
            settings = {"past_key_values": target.model(ids[:, :4], use_cache=True).past_key_values}
        if "inputs_embeds" in settings:
            settings, ids = {"inputs_embeds": target.model.get_input_embeddings()(ids)}, None
        if "encoder_outputs" in settings:
            settings, ids = {"encoder_outputs": target.model.get_encoder()(ids)}, None
    with pytest.raises(ValueError, match=message) as error:
        target.model.generate(ids, **given | settings)
    assert "\n" not in str(error.value)
