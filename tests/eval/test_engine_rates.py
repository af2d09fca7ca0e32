"""Rates of draftsmith's loop and transformers: same texts, forwards and accepted tokens that add up, and ratios."""

from pathlib import Path

import pytest

import draftsmith
from data import POCKET
from draftsmith import Target
from draftsmith.drafters import lookup
from eval.engine_rates import (
    Measured,
    RateSettings,
    load_drafters,
    method_name,
    own_methods,
    print_table,
    read_prompts,
    take_turns,
)


def test_all_methods_write_the_same_texts_of_full_length(tmp_path: Path) -> None:
    pocket = Target.from_pretrained(POCKET, dtype="float32")
    draftsmith.save(lookup.Drafter(lookup.Config(num_draft=4), pocket), tmp_path / "look-up", pocket)
    drafts = (str(tmp_path / "look-up"),)
    run = RateSettings(target="pocket", data="python-source", num_prompts=2, max_new_tokens=24, drafts=drafts)
    prompts = read_prompts(run)
    found = take_turns(own_methods(run, pocket, load_drafters(run, pocket), prompts, past_end=True), 1)
    assert list(found) == ["transformers, plain", "draftsmith, plain", "draftsmith, look-up"]
    expected = found["transformers, plain"][0].texts
    assert [len(text) for text in expected] == [24, 24]
    for (one,) in found.values():
        assert one.texts == expected
        assert one.num_accepted + one.num_rounds == sum(len(text) - 1 for text in expected)
        assert one.seconds > 0
    assert found["draftsmith, plain"][0].num_accepted == 0
    assert found["draftsmith, look-up"][0].num_accepted > 0


def test_texts_end_where_the_target_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pocket = Target.from_pretrained(POCKET, dtype="float32")
    run = RateSettings(target="pocket", data="python-source", num_prompts=1, max_new_tokens=12)
    prompts = read_prompts(run)
    whole = own_methods(run, pocket, {}, prompts, past_end=True)["transformers, plain"]().texts[0]
    end = next(token for at, token in enumerate(whole) if at and token not in whole[:at])
    monkeypatch.setattr(pocket.model.generation_config, "eos_token_id", end)
    ended = Target(pocket.model, pocket.tokenizer)
    for method in own_methods(run, ended, {}, prompts).values():
        measured = method()
        assert measured.texts == [whole[: whole.index(end) + 1]]
        assert measured.num_rounds == len(measured.texts[0]) - 1


def test_prompts_longer_than_the_limit_are_left_out() -> None:
    run = RateSettings(target="pocket", data="python-source", num_prompts=2, max_prompt_tokens=64)
    assert all(len(prompt) <= 64 for prompt in read_prompts(run))


def test_the_table_compares_each_engine_with_transformers_or_itself(capsys: pytest.CaptureFixture[str]) -> None:
    def measured(seconds: float, text: list[int], num_accepted: int = 0) -> list[Measured]:
        return [Measured(texts=[text], seconds=seconds, num_accepted=num_accepted, num_rounds=4 - num_accepted)]

    found = {
        method_name("transformers", "plain"): measured(4.0, [1, 2, 3, 4, 5]),
        method_name("other", "plain"): measured(2.0, [1, 2, 3, 4, 6]),
        method_name("other", "look-up"): measured(1.0, [1, 2, 3, 4, 6], num_accepted=2),
    }
    print_table(RateSettings(), found, lambda engine: engine == "other")
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows[0] == "| other, plain | 2.0 | 2.00 | 1.00 | 0.00 | 1 of 1 |"
    assert rows[1] == "| other, look-up | 4.0 | 4.00 | 2.00 | 1.00 | 1 of 1 |"


def test_settings_without_work_are_rejected() -> None:
    with pytest.raises(ValueError, match="max_new_tokens at least 2"):
        RateSettings(max_new_tokens=1)
