"""Targets and drafters used by eight threads at a time give the same results as in one thread."""

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import draftsmith
from draftsmith import Target
from draftsmith.drafters import cascade, early_exit, lookup
from draftsmith.inputs import locks
from draftsmith.length.policies import Heuristic
from tests.support.drafters import tiny_drafter
from tests.support.family import built, part_config, texts
from tests.support.models import greedy_by_model, greedy_by_transformers, prompts, tiny_model, tiny_target

NUM_THREADS, NUM_NEW, NUM_ROWS = 8, 12, 5
LARGER: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 8},
    "opt": {"num_hidden_layers": 8},
    "t5": {},
    "bart": {},
}
"""More layers make it likelier that a thread is interrupted within a forward."""


@pytest.fixture(autouse=True)
def _frequent_switches() -> Iterator[None]:
    """Makes Python switch between threads a thousand times more often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(run: Callable[[int], Any], num_calls: int) -> list[Any]:
    """Returns the results of `run(0)`, `run(1)`, ..., called by eight threads that begin together."""
    barrier = threading.Barrier(NUM_THREADS)

    def work(thread: int) -> list[tuple[int, Any]]:
        torch.set_num_threads(1)
        barrier.wait()
        return [(call, run(call)) for call in range(thread, num_calls, NUM_THREADS)]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = [pair for pairs in pool.map(work, range(NUM_THREADS)) for pair in pairs]
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


def early_exit_drafter(target: Target) -> Any:
    """Returns a drafter that shares the target's first blocks and their forward context."""
    return built(early_exit, early_exit.Config(exit_layer=2, num_draft=3), target)


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(one, marks=pytest.mark.slow) for one in ("opt", "t5", "bart"))]
)
def test_one_target_with_a_drafter_for_each_thread(architecture: str) -> None:
    target = Target(tiny_model(architecture, **LARGER[architecture]))
    expected = greedy_by_model(target.model, NUM_ROWS, NUM_NEW)
    kinds: list[Callable[[Target], Any]] = [lambda target: lookup.Drafter(lookup.Config(), target), lambda _: None]
    if not target.is_encoder_decoder:
        kinds += [early_exit_drafter] * 2

    def run(call: int) -> list[list[int]]:
        drafter = kinds[call % len(kinds)](target)
        return texts(draftsmith.generate(target, [prompts(NUM_ROWS)[call % NUM_ROWS]], drafter, max_new_tokens=NUM_NEW))

    found = in_threads(run, 10 * NUM_THREADS)
    wrong = [call for call, text in enumerate(found) if text != [expected[call % NUM_ROWS]]]
    assert not wrong, f"{len(wrong)} of {len(found)} texts are wrong"


@pytest.mark.parametrize("name", ["medusa", "copy", "lookup", "cascade"])
def test_one_drafter_for_all_threads(name: str) -> None:
    target, expected = tiny_target("llama"), greedy_by_transformers("llama", NUM_ROWS, NUM_NEW)
    if name == "cascade":
        parts = tuple(part_config("lookup", lookup.Config(max_ngram=length)) for length in (2, 3))
        drafter: Any = cascade.Drafter(cascade.Config(parts=parts), target)
        used = [drafter, drafter.parts[0].drafter, drafter.parts[1].drafter]
    else:
        used = [tiny_drafter(name, "llama")]

    def run(call: int) -> list[list[int]]:
        drafter, row = used[call % len(used)], call % NUM_ROWS
        return texts(draftsmith.generate(target, [prompts(NUM_ROWS)[row]], drafter, max_new_tokens=NUM_NEW))

    found = in_threads(run, 4 * NUM_THREADS)
    assert [text for (text,) in found] == [expected[call % NUM_ROWS] for call in range(len(found))]


def test_one_length_policy_for_all_threads() -> None:
    target, policy = tiny_target("llama"), Heuristic()
    rows = prompts(NUM_ROWS)

    def run(call: int) -> list[list[int]]:
        drafter = lookup.Drafter(lookup.Config(), target)
        given = rows[: call % NUM_ROWS + 1]  # each number of rows gets a policy of its own
        return texts(draftsmith.generate(target, given, drafter, max_new_tokens=NUM_NEW, length=policy))

    for call, found in enumerate(in_threads(run, 4 * NUM_THREADS)):
        assert found == greedy_by_transformers("llama", NUM_ROWS, NUM_NEW)[: call % NUM_ROWS + 1]


def test_custom_generate_in_threads() -> None:
    target, expected = tiny_target("opt"), greedy_by_transformers("opt", NUM_ROWS, NUM_NEW)
    drafter = tiny_drafter("lookup", "opt")

    def run(call: int) -> list[int]:
        given = {"custom_generate": draftsmith.custom_generate, "drafter": drafter, "do_sample": False}
        ids = torch.tensor([prompts(NUM_ROWS)[call % NUM_ROWS]])
        return target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, **given).tolist()

    found = in_threads(run, 2 * NUM_THREADS)
    assert [text for (text,) in found] == [expected[call % NUM_ROWS] for call in range(len(found))]


class Nested:
    """A streamer that generates with the drafter that it streams."""

    def __init__(self, drafter: Any) -> None:
        self.drafter = drafter

    def put(self, piece: torch.Tensor) -> None:
        draftsmith.generate(self.drafter.target, [[4]], self.drafter, max_new_tokens=2)

    def end(self) -> None:
        raise AssertionError("the nested call is rejected")


def test_a_nested_call_with_the_same_drafter_is_rejected() -> None:
    target, drafter = tiny_target("llama"), tiny_drafter("lookup", "llama")
    for _ in range(2):  # a failed call must not keep the drafter
        with pytest.raises(ValueError, match="in the middle of another call of generate in the same thread"):
            draftsmith.generate(target, [[4]], drafter, max_new_tokens=2, streamer=Nested(drafter))
    assert draftsmith.generate(target, [[4]], drafter, max_new_tokens=2).lengths.tolist() == [3]


def opened(drafter: Any, **settings: Any) -> Iterator[Any]:
    """Returns a stream of which one text was read."""
    stream = draftsmith.generate_stream(drafter.target, prompts(3), drafter, batch_size=1, max_new_tokens=2, **settings)
    next(stream)
    return stream


def generate_two(drafter: Any, **settings: Any) -> list[int]:
    return draftsmith.generate(drafter.target, [[4]], drafter, max_new_tokens=2, **settings).lengths.tolist()


def test_an_open_stream_of_the_same_thread_is_named_and_can_be_closed() -> None:
    drafter = tiny_drafter("lookup", "llama")
    stream = opened(drafter)
    with pytest.raises(ValueError, match=r"an open stream .* last read by this thread; read the stream .* close\(\)"):
        generate_two(drafter)
    stream.close()  # type: ignore[attr-defined]
    assert generate_two(drafter) == [3]


def test_dropped_streams_release_their_drafter() -> None:
    drafter = tiny_drafter("lookup", "llama")
    opened(drafter)
    assert generate_two(drafter) == [3]
    cycle: list[Any] = [opened(drafter)]
    cycle.append(cycle)
    del cycle
    assert generate_two(drafter) == [3]
    policy = Heuristic()
    stream = opened(drafter, length=policy)
    with pytest.raises(ValueError, match="an open stream"):
        generate_two(lookup.Drafter(lookup.Config(), drafter.target), length=policy)
    del stream
    assert generate_two(drafter, length=policy) == [3]


def test_a_stream_whose_thread_has_ended_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 0.01)
    drafter = tiny_drafter("lookup", "llama")
    streams: list[Iterator[Any]] = []
    reader = threading.Thread(target=lambda: streams.append(opened(drafter)), name="reader")
    reader.start()
    reader.join()
    with pytest.raises(ValueError, match="last read by thread 'reader', which has ended; read the stream"):
        generate_two(drafter)
    assert len(list(streams[0])) == 2, "it can still be read, and by another thread"
    assert generate_two(drafter) == [3]


def test_a_call_waits_for_a_stream_that_another_thread_may_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 0.01)
    drafter = tiny_drafter("lookup", "llama")
    is_open, goes_on = threading.Event(), threading.Event()
    found: list[int] = []

    def read() -> None:
        stream = opened(drafter)
        is_open.set()
        assert goes_on.wait(600)
        found.append(len(list(stream)))

    def warn(message: str, **_: Any) -> None:
        messages.append(message)
        goes_on.set()

    messages: list[str] = []
    monkeypatch.setattr(locks.warnings, "warn", warn)
    reader = threading.Thread(target=read, name="reader")
    reader.start()
    assert is_open.wait(600)
    assert generate_two(drafter) == [3]
    reader.join()
    assert found == [2]
    assert len(messages) == 1 and "waiting: this drafter is in use by an open stream" in messages[0]


def test_a_drafter_can_be_copied_with_its_target() -> None:
    drafter = copy.deepcopy(tiny_drafter("medusa", "llama"))
    out = draftsmith.generate(drafter.target, [prompts(1)[0]], drafter, max_new_tokens=NUM_NEW)
    assert texts(out) == greedy_by_transformers("llama", 1, NUM_NEW)
