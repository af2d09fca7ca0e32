"""A target's generation config is applied when asked, as by `model.generate`."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import draftsmith
from draftsmith import Target
from draftsmith.core.sampling import Sampling
from draftsmith.inputs.generation_config import read_config, with_sampling
from tests.support.models import prompts, tiny_model, tiny_target

OWN = {"repetition_penalty": 1.5, "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.8, "min_p": 0.05}


def target_with_config(**settings: Any) -> Target:
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(pad_token_id=0, **settings)
    return Target(model)


def new_tokens(target: Target, **settings: Any) -> list[int]:
    (prompt,) = prompts(1)
    return draftsmith.generate(target, [prompt], max_new_tokens=12, **settings).sequences[0, len(prompt) :].tolist()


def test_own_config_is_applied_only_when_asked() -> None:
    target, plain = target_with_config(repetition_penalty=1.5), new_tokens(tiny_target("llama"))
    own = target.model.generate(torch.tensor(prompts(1)), max_new_tokens=12)[0, 9:].tolist()
    with pytest.warns(UserWarning, match="repetition_penalty=1.5.*pass generation_config='model'"):
        assert new_tokens(target) == plain != own
    assert new_tokens(target, generation_config="model") == own
    assert new_tokens(tiny_target("llama"), generation_config={"repetition_penalty": 1.5}) == own
    assert new_tokens(tiny_target("llama"), generation_config=GenerationConfig(repetition_penalty=1.5)) == own


def test_arguments_take_precedence_over_the_config() -> None:
    target = target_with_config(**OWN)
    greedy = target.model.generate(torch.tensor(prompts(1)), max_new_tokens=12, do_sample=False)[0, 9:].tolist()
    assert new_tokens(target, generation_config="model", temperature=0) == greedy
    assert new_tokens(target, generation_config="model", top_k=1) == greedy
    sampled = {new_tokens(target, generation_config="model", seed=seed)[1] for seed in range(6)}
    assert len(sampled) > 1, "it samples"


def test_settings_of_sampling_are_read_from_the_config() -> None:
    target = target_with_config(**OWN)
    config = read_config(target, "model")
    assert with_sampling(config, None, None, None) == Sampling(temperature=0.6, top_k=20, top_p=0.8)
    assert with_sampling(config, 1.5, 0.9, 0) == Sampling(temperature=1.5, top_p=0.9)
    # Unset values: transformers' defaults for a config, none for a dictionary.
    given = {"do_sample": True}
    assert with_sampling(read_config(tiny_target("llama"), GenerationConfig(**given)), None, None, None).top_k == 50
    assert with_sampling(read_config(target, given), None, None, None) == Sampling(temperature=1.0)
    assert with_sampling(read_config(target, {"temperature": 0.5}), None, None, None) == Sampling(temperature=0.5)
    assert target.model.generation_config.temperature == 0.6, "the model's config is unchanged"


def test_num_return_sequences_repeats_prompts_with_random_numbers_of_their_own() -> None:
    target, rows = tiny_target("llama"), prompts(2)
    out = draftsmith.generate(
        target, rows, max_new_tokens=12, seed=0, temperature=1, generation_config={"num_return_sequences": 3}
    )
    found = [row[:length] for row, length in zip(out.sequences.tolist(), out.lengths.tolist(), strict=True)]
    assert len({tuple(row) for row in found}) == 6
    assert [row[: len(prompt)] for row, prompt in zip(found, [p for p in rows for _ in range(3)], strict=True)] == [
        p for p in rows for _ in range(3)
    ]


def test_ends_of_the_config_are_used() -> None:
    plain = new_tokens(tiny_target("llama"))
    end = plain[5]
    assert new_tokens(tiny_target("llama"), generation_config={"eos_token_id": end}) == plain[: plain.index(end) + 1]
    assert new_tokens(tiny_target("llama"), generation_config={"eos_token_id": end}, eos_token_id=()) == plain


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"typical_p": 2}, "typical_p is 2; it must be at most 1"),
        ({"epsilon_cutoff": 1, "temperature": 1.0}, "epsilon_cutoff is 1; it must be below 1"),
        ({"suppress_tokens": [5, 99_999]}, "suppress_tokens holds 99999; the target's vocabulary has"),
        ({"forced_eos_token_id": "2"}, "forced_eos_token_id is '2'; it must be a token id"),
        ({"num_beams": 0}, "num_beams is 0; .* it must be 1"),
        ({"token_healing": True}, "token_healing is not supported: it changes the prompt"),
        ({"exponential_decay_length_penalty": (1, 1.5), "eos_token_id": []}, "needs an end-of-sequence token"),
        ("models", "generation_config is 'models'; it must be 'model' for the target's own"),
        (4, "generation_config is 4; it must be 'model'"),
        ({"repetition_penalti": 1.2}, "no setting 'repetition_penalti'; did you mean 'repetition_penalty'?"),
        ({"num_beams": 3}, "num_beams is 3; .* must be 1"),
        (GenerationConfig(penalty_alpha=0.6, top_k=4), r"asks for contrastive search \(penalty_alpha=0.6\)"),
        (
            {"num_return_sequences": 2},
            "num_return_sequences is 2; it must be 1, or at temperatures above 0 up to 65,536",
        ),
        ({"num_return_sequences": 10**9, "temperature": 1.0}, "num_return_sequences is 1000000000; it must be 1, or"),
        ({"min_p": 1.5, "temperature": 1.0}, "min_p.*1.5"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p is 0.0; it must be above 0"),
        ({"temperature": -1.0}, "temperature is -1.0; it must not be negative"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a finite number"),
        ({"temperature": 1, "top_p": []}, r"top_p is \[\]; it must be a finite number"),
        ({"num_beams": "a"}, "num_beams is 'a'; it must be a whole number"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; it must be true or false"),
        ({"watermarking_config": 5}, "watermarking_config is 5: "),
    ],
)
def test_configs_that_cannot_be_used_are_rejected(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        draftsmith.generate(tiny_target("llama"), prompts(1), max_new_tokens=4, generation_config=given)
    assert "\n" not in str(error.value)
