"""The tables of draft lengths that engines read, each with what it cannot express.

A measured batch size stands for the sizes above the one before it, up to itself: between two measured sizes the length
of the larger one is used, since a draft that is too short costs less than one that is too long.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from draftsmith.artifacts import json_text

VLLM, SGLANG, TENSORRT, LLAMA, OPENVINO = "vLLM", "SGLang", "TensorRT-LLM", "llama.cpp", "OpenVINO GenAI"


@dataclass(frozen=True, kw_only=True)
class Table:
    """The settings for one engine."""

    engine: str
    file: str
    """Name of the file, empty if the engine is to run without drafts, which then needs no file."""
    text: str
    notes: tuple[str, ...] = ()


def tables(lengths: Mapping[int, int], n_max: int, p_min: float, *, has_p_min: bool) -> list[Table]:
    """Returns every engine's table.

    `lengths` is the draft length by batch size, 0 for off; `n_max` and `p_min` are those of the smallest batch size.
    """
    found = [_vllm(lengths), _sglang(lengths), _tensorrt(lengths), _llama(lengths, n_max, p_min, has_p_min=has_p_min)]
    return [*found, _openvino(lengths)]


def ranges(lengths: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """Returns (first, last, length) of each range of batch sizes, neighbours of equal length joined."""
    found: list[tuple[int, int, int]] = []
    first = 1
    for size, length in sorted(lengths.items()):
        if found and found[-1][2] == length:
            found[-1] = (found[-1][0], size, length)
        else:
            found.append((first, size, length))
        first = size + 1
    return found


def _vllm(lengths: Mapping[int, int]) -> Table:
    largest = max(lengths)
    if not any(lengths.values()):
        return Table(engine=VLLM, file="", text="", notes=("nothing pays: serve without --speculative-config.",))
    settings = {
        "num_speculative_tokens": max(lengths.values()),
        "num_speculative_tokens_per_batch_size": [list(one) for one in ranges(lengths)],
    }
    notes = [
        "add these keys to the --speculative-config of the exported drafter; 0 is off.",
        f"batches of more than {largest} get the last range's length.",
        "vLLM ignores the table with --data-parallel-size above 1.",
    ]
    return Table(engine=VLLM, file="vllm.json", text=_json(settings), notes=tuple(notes))


def _sglang(lengths: Mapping[int, int]) -> Table:
    if not any(lengths.values()):
        return Table(engine=SGLANG, file="", text="", notes=("nothing pays: serve without --speculative-algorithm.",))
    # Keys are the least batch size of each entry.
    settings = {str(first): {"candidate_steps": [length]} for first, _, length in ranges(lengths)}
    steps = next(length for _, _, length in ranges(lengths) if length)
    notes = (
        "--speculative-adaptive --speculative-adaptive-config sglang-adaptive.json --speculative-eagle-topk 1"
        f" --speculative-num-steps {steps} --speculative-num-draft-tokens {steps + 1}",
        "0 steps are off. SGLang reads the file for EAGLE and EAGLE3 with one candidate a step; other algorithms have"
        " one --speculative-num-steps for all batch sizes, which cannot be off.",
        f"batches of more than {max(lengths)} get the last entry's length.",
    )
    return Table(engine=SGLANG, file="sglang-adaptive.json", text=_json(settings), notes=notes)


def _tensorrt(lengths: Mapping[int, int]) -> Table:
    found = ranges(lengths)
    first = found[0][2]
    if not first:
        note = (
            "nothing pays: serve without speculative_config."
            if not any(lengths.values())
            else "off at the smallest batch size but not at larger ones cannot be expressed: the first length of"
            " draft_len_schedule must be max_draft_len, and no other may be longer; serve without speculative_config."
        )
        return Table(engine=TENSORRT, file="", text="", notes=(note,))
    notes = [
        "in the LLM API's YAML; a key is the largest batch size of its length, and batches above the last key do not"
        " draft. Versions before 1.3 read a key as the smallest: give them the first batch size of each range instead."
    ]
    if max(lengths.values()) > first:
        notes.append(f"lengths above that of the smallest batch size, {first}, cannot be expressed and are cut to it.")
    while found and not found[-1][2]:
        found.pop()  # off above the last key needs no entry
    if found[-1][1] == max(lengths):
        notes.append(f"batches of more than {max(lengths)} are off; they were not measured.")
    entries = "".join(f"    {last}: {min(length, first)}\n" for _, last, length in found)
    text = f"speculative_config:\n  max_draft_len: {first}\n  draft_len_schedule:\n{entries}"
    return Table(engine=TENSORRT, file="tensorrt-llm.yaml", text=text, notes=tuple(notes))


def _llama(lengths: Mapping[int, int], n_max: int, p_min: float, *, has_p_min: bool) -> Table:
    smallest = min(lengths)
    if not n_max:
        note = f"nothing pays at batch size {smallest}: start it without a draft."
        return Table(engine=LLAMA, file="", text="", notes=(note,))
    notes = [f"one setting for all loads: that of batch size {smallest}."]
    if off := [str(size) for size in sorted(lengths) if not lengths[size]]:
        notes.append(f"off at batch size {', '.join(off)} cannot be expressed: limit --parallel, or start two servers.")
    if has_p_min:
        notes.append(
            "p-min there is a probability among the draft's ten best tokens, slightly more than that used here."
        )
    else:
        notes.append("the drafter reports no probabilities, so p-min stays 0.")
    text = f"--spec-draft-n-max {n_max} --spec-draft-p-min {p_min:g}\n"
    return Table(engine=LLAMA, file="llama.cpp.args", text=text, notes=tuple(notes))


def _openvino(lengths: Mapping[int, int]) -> Table:
    if not any(lengths.values()):
        return Table(
            engine=OPENVINO, file="", text="", notes=("nothing pays: make the pipeline without a draft model.",)
        )
    settings = [
        {"first_batch_size": first, "last_batch_size": last, "num_assistant_tokens": length or None}
        for first, last, length in ranges(lengths)
    ]
    notes = [
        "num_assistant_tokens is set in each request's GenerationConfig; the application chooses it by its load.",
        "off cannot be expressed by it, since 0 stands for the default of 5: where it is null, use a pipeline without"
        " draft model.",
    ]
    return Table(
        engine=OPENVINO,
        file="openvino.json",
        text=_json(settings),
        notes=tuple(notes if 0 in lengths.values() else notes[:1]),
    )


def _json(value: object) -> str:
    return json_text.text_of(value, indent=1) + "\n"
