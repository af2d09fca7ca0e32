"""Which draft lengths a plan chooses: replayed rounds, costs, and the tables of engines."""

import json
from collections import Counter

import pytest

from draftsmith.loading.text_files import parse_yaml
from draftsmith.planning import engines
from draftsmith.planning.grid import Grid
from draftsmith.planning.lengths import Plan, replay
from draftsmith.planning.measure import Measured, Position


def text(*accepted: int, drafted: int = 4, confidences: tuple[float, ...] = ()) -> list[Position]:
    return [Position(num_drafted=drafted, num_accepted=one, confidences=confidences) for one in accepted]


def test_replay_of_one_row_advances_by_what_is_accepted() -> None:
    texts = [text(2, 0, 0, 1, 3, 0, 0, 0)]
    # Length 1: positions 0, 2, 3, 5, 6, 7. Length 4: 0, 3, 5, 6, 7, the positions between being skipped.
    one, four = (replay(texts, length, 1, tokens_per_place=0) for length in (1, 4))
    assert (one.tokens, one.rounds) == (8, Counter({(1, 1): 6}))
    assert (four.tokens, four.rounds) == (8, Counter({(4, 4): 5}))
    assert replay(texts, 0, 1, tokens_per_place=0).rounds == Counter({(0, 0): 8})


def test_replay_of_a_batch_verifies_its_longest_draft() -> None:
    found = replay([text(0, 0, 0, drafted=0), text(0, 0, 0, drafted=2)], 4, 2, tokens_per_place=0)
    assert (found.tokens, found.rounds) == (6, Counter({(4, 2): 3}))
    assert replay([text(0, 0, drafted=0)], 4, 1, tokens_per_place=0).rounds == Counter({(4, 0): 2})


def test_replay_stops_at_tokens_below_the_least_probability() -> None:
    texts = [text(3, 3, 3, 3, confidences=(0.9, 0.4, 0.8, 0.8))]
    # The second token is computed, and not verified.
    assert replay(texts, 4, 1, 0.5, tokens_per_place=0).rounds == Counter({(2, 1): 2})
    assert replay(texts, 4, 1, 0.3, tokens_per_place=0).rounds == Counter({(4, 4): 1})


def plan_of(verify_ms: dict[int, float], draft_ms_per_token: float = 0.0, confidences: tuple[float, ...] = ()) -> Plan:
    """Returns the plan of a drafter whose first two tokens are right, at one batch size and two contexts."""
    grid = Grid(batch_sizes=(1,), contexts=(8, 16), lengths=(0, 1, 2, 4))
    cells = [(1, 8), (1, 16)]
    return Plan(
        Measured(
            draft_ms={cell: {n: draft_ms_per_token * n for n in grid.lengths} for cell in cells},
            verify_ms=dict.fromkeys(cells, verify_ms),
            texts={context: [text(*[2] * 12, confidences=confidences)] for context in grid.contexts},
        ),
        grid,
    )


def test_the_length_with_most_tokens_per_second_is_chosen() -> None:
    free = plan_of({0: 10.0, 1: 10.0, 2: 10.0, 4: 10.0})
    # Tokens 3 and 4 never are accepted; lengths 2 and 4 are equally fast, and the shorter one is taken.
    assert free.best(1, 8).length == 2 and free.speedup(1, 8, 2) == pytest.approx(3.0)
    assert free.best(1, 8).tau == pytest.approx(3.0) and free.by_batch_size() == {1: 2}
    assert plan_of({0: 10.0, 1: 15.0, 2: 30.0, 4: 40.0}).by_batch_size() == {1: 1}
    assert plan_of({0: 10.0, 1: 20.0, 2: 31.0, 4: 60.0}).by_batch_size() == {1: 0}
    assert plan_of({0: 10.0, 1: 10.0, 2: 10.0, 4: 10.0}, draft_ms_per_token=11.0).by_batch_size() == {1: 0}
    # A gain of less than 1 % is none.
    assert plan_of({0: 10.0, 1: 19.9, 2: 40.0, 4: 60.0}).by_batch_size() == {1: 0}


def test_acceptance_is_given_by_depth() -> None:
    plan = plan_of({0: 10.0, 1: 10.0, 2: 10.0, 4: 10.0})
    plan.measured.texts[8] = [text(2, 1), text(0, 4)]
    assert plan.accepted_by_depth(8) == [0.75, 0.5, 0.25, 0.25]


def test_lengths_beyond_the_longest_draft_are_left_out() -> None:
    plan = plan_of({0: 10.0, 1: 10.0, 2: 10.0, 4: 10.0})
    plan.measured.texts = {context: [text(1, 1, drafted=1)] for context in (8, 16)}
    assert plan.lengths == (0, 1)


def test_a_least_probability_spares_tokens_that_fail() -> None:
    sure, unsure = (0.9, 0.9, 0.2, 0.2), (0.9, 0.9, 0.9, 0.9)
    costs = {0: 10.0, 1: 12.0, 2: 14.0, 4: 18.0}
    assert plan_of(costs, confidences=unsure).with_p_min()[:2] == (2, 0.0)
    plan = plan_of(costs, confidences=sure)
    assert plan.has_confidences and plan.with_p_min()[:2] == (2, 0.0)
    assert plan_of({0: 10.0, 1: 25.0, 2: 45.0, 4: 60.0}, confidences=sure).with_p_min()[0] == 0


TABLE = {1: 4, 4: 4, 8: 2, 16: 0}


def by_engine(lengths: dict[int, int], n_max: int = 4) -> dict[str, engines.Table]:
    return {one.engine: one for one in engines.tables(lengths, n_max, 0.4, has_p_min=True)}


def test_tables_of_engines() -> None:
    found = by_engine(TABLE)
    assert json.loads(found[engines.VLLM].text) == {
        "num_speculative_tokens": 4,
        "num_speculative_tokens_per_batch_size": [[1, 4, 4], [5, 8, 2], [9, 16, 0]],
    }
    assert json.loads(found[engines.SGLANG].text) == {
        "1": {"candidate_steps": [4]},
        "5": {"candidate_steps": [2]},
        "9": {"candidate_steps": [0]},
    }
    assert parse_yaml(found[engines.TENSORRT].text) == {
        "speculative_config": {"max_draft_len": 4, "draft_len_schedule": {4: 4, 8: 2}}
    }
    assert found[engines.LLAMA].text == "--spec-draft-n-max 4 --spec-draft-p-min 0.4\n"
    assert any("off at batch size 16 cannot be expressed" in note for note in found[engines.LLAMA].notes)
    assert [one["num_assistant_tokens"] for one in json.loads(found[engines.OPENVINO].text)] == [4, 2, None]
    assert any("off cannot be expressed" in note for note in found[engines.OPENVINO].notes)


def test_tables_where_nothing_pays_have_no_file() -> None:
    assert not any(one.file for one in by_engine({1: 0, 8: 0}, n_max=0).values())


def test_a_schedule_that_grows_is_cut_for_tensorrt() -> None:
    table = by_engine({1: 2, 4: 4})[engines.TENSORRT]
    assert parse_yaml(table.text)["speculative_config"] == {"max_draft_len": 2, "draft_len_schedule": {1: 2, 4: 2}}
    assert any("are cut to it" in note for note in table.notes)
    off_first = by_engine({1: 0, 4: 4}, n_max=0)[engines.TENSORRT]
    assert not off_first.file and "cannot be expressed" in off_first.notes[0]
