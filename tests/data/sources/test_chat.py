"""Chat templates: supervised tokens are those that the target writes; tools, content parts, reasoning, arguments."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import draftsmith
from data.prompts import Prompt, TextSettings, load_prompts
from draftsmith import Target
from tests.support.models import tiny_model
from tests.support.text import CHAT_TEMPLATE, MARKED_TEMPLATE, trained_tokenizer

GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start>{{ m.role }}\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<start>{{ m.content }}{% else %}"
    "<assistant>{{ m.content.split('</think>')[-1] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
QWEN3 = """\
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{{- '<start>' + m.role + '\n' -}}
{%- if m.role == 'assistant' and loop.index0 > ns.last -%}
{{- '<think>\n' + m.reasoning_content | default('') + '\n</think>\n\n' -}}
{%- endif -%}
{{- m.content + '<end>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<start>assistant\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<start>{{ m.role }}\n"
    "{% for call in m.tool_calls %}call {{ call.function | tojson }}{% endfor %}{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
PARTS = GEMMA.replace(
    "m.content | trim", "m.content if m.content is string else m.content | map(attribute='text') | join"
)
TALK = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another?"},
    {"role": "assistant", "content": "Red."},
]
THOUGHTS = ("Sky.", "Not blue.")
THOUGHT = [one | ({"reasoning_content": THOUGHTS[at // 2]} if at % 2 else {}) for at, one in enumerate(TALK)]
TAGGED = [
    one | ({"content": f"<think>\n{THOUGHTS[at // 2]}\n</think>\n\n{one['content']}"} if at % 2 else {})
    for at, one in enumerate(TALK)
]
NO_THINKING = TextSettings(chat_template_kwargs={"enable_thinking": False})


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    tokenizer = trained_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>", "<end>", "<assistant>"]})
    return tokenizer


def load(folder: Path, row: Any, tokenizer: Any, **options: Any) -> list[Prompt]:
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return load_prompts(str(folder / "rows.jsonl"), tokenizer, **options)


def answers(folder: Path, row: Any, tokenizer: Any, **options: Any) -> list[str]:
    """Returns the supervised texts of a row."""
    found = []
    for prompt in load(folder, row, tokenizer, keep_answers=True, **options):
        for begin, end in spans(prompt):
            found.append(tokenizer.decode(prompt.ids[begin:end]))
    return found


def spans(prompt: Prompt) -> list[tuple[int, int]]:
    """Returns (begin, end) of each run of supervised tokens."""
    mask = [False, *(prompt.loss_mask or ()), False]
    edges = [at for at in range(len(mask) - 1) if mask[at] != mask[at + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def memorising_target(tokenizer: PreTrainedTokenizerFast, rows: list[Prompt], end_ids: list[int]) -> Target:
    """Returns a tiny model trained until it writes the supervised tokens, and a newline after the last, greedily."""
    model = tiny_model("llama", seed=0, vocab_size=len(tokenizer), max_position_embeddings=256)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    newline = tokenizer("\n")["input_ids"]
    texts = [torch.tensor([row.ids + newline]) for row in rows]
    masks = [torch.tensor([*(row.loss_mask or ()), True]) for row in rows]
    is_learnt = False
    for _ in range(300):
        outputs = [model(ids, labels=ids.where(mask, -100)) for ids, mask in zip(texts, masks, strict=True)]
        predictions = [out.logits[0, :-1].argmax(-1) for out in outputs]
        found = zip(predictions, texts, masks, strict=True)
        is_learnt = all(bool((ids[0, 1:] == tokens)[mask[1:]].all()) for tokens, ids, mask in found)
        if is_learnt:
            break
        sum(out.loss for out in outputs).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert is_learnt
    model.generation_config.eos_token_id = end_ids
    return Target(model.eval(), tokenizer)


@pytest.mark.parametrize(
    ("template", "ends", "messages", "settings", "expected"),
    [
        (CHAT_TEMPLATE, ("<eos>",), TALK, None, ["Blue.<eos>", "Red.<eos>"]),
        (MARKED_TEMPLATE, ("<eos>",), TALK, None, ["Blue.<eos>", "Red.<eos>"]),
        (GEMMA, ("<eos>", "<end>"), TALK, None, ["Blue.<end>", "Red.<end>"]),
        (PHI, ("<eos>", "<end>"), TALK, None, ["Blue.<end>", "Red.<end>"]),
        (
            R1,
            ("<eos>",),
            THOUGHT,
            None,
            ["Sky.\n</think>\n\nBlue.<eos>", "Not blue.\n</think>\n\nRed.<eos>"],
        ),
        (R1, ("<eos>",), TAGGED, None, ["Sky.\n</think>\n\nBlue.<eos>", "Not blue.\n</think>\n\nRed.<eos>"]),
        (
            QWEN3,
            ("<end>",),
            THOUGHT,
            None,
            ["<think>\nSky.\n</think>\n\nBlue.<end>", "<think>\nNot blue.\n</think>\n\nRed.<end>"],
        ),
        (QWEN3, ("<end>",), TALK, NO_THINKING, ["Blue.<end>", "Red.<end>"]),
    ],
    ids=["chatml", "marked", "gemma", "phi", "r1", "r1-tags", "qwen3", "qwen3-no-thinking"],
)
def test_supervised_tokens_are_what_the_target_generates(
    tmp_path: Path,
    template: str,
    ends: tuple[str, ...],
    messages: list[dict[str, str]],
    settings: TextSettings | None,
    expected: list[str],
) -> None:
    """After the prompt that a server would render, generating ends where the mask ends."""
    tokenizer = tokenizer_for(template)
    end_ids = tokenizer.convert_tokens_to_ids(list(ends))
    options = {"end_ids": end_ids, "settings": settings}
    assert answers(tmp_path, {"messages": messages}, tokenizer, **options) == expected
    rows = load(tmp_path, {"messages": messages}, tokenizer, keep_answers=True, **options)
    target = memorising_target(tokenizer, rows, end_ids)
    found = [(row, begin, end) for row in rows for begin, end in spans(row)]
    kwargs = settings.chat_template_kwargs if settings else {}
    for index, (row, begin, end) in enumerate(found):
        served = tokenizer.apply_chat_template(
            messages[: 2 * index + 1], add_generation_prompt=True, return_dict=False, **kwargs
        )
        assert row.ids[:begin] == served
        out = draftsmith.generate(target, torch.tensor([served]), max_new_tokens=40)
        assert out.sequences[0].tolist() == row.ids[:end]
    assert len({row.key for row in rows}) == len(rows)
    assert len({row.key.partition(".")[0] for row in rows}) == 1, "answers of one conversation are held out together"


def test_answer_without_the_reasoning_that_the_prompt_opens_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"rows.jsonl:1: .* turn 2 differently from its generation prompt.*<think>.*give"
    ):
        answers(tmp_path, {"messages": TALK}, tokenizer_for(R1))


def test_template_arguments_change_the_prompt(tmp_path: Path) -> None:
    plain, without = (
        load(tmp_path, {"messages": TALK}, tokenizer_for(QWEN3), settings=settings)[0].text
        for settings in (None, NO_THINKING)
    )
    assert without == plain + "<think>\n\n</think>\n\n"


def test_tools_and_calls_are_rendered_by_the_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"a": None, "b": 1}}}
    call = {"type": "function", "function": {"name": "add", "arguments": '{"b": 2}'}}
    messages = [
        TALK[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "name": None},
        {"role": "assistant", "content": "Three."},
    ]
    row = {"messages": messages, "tools": json.dumps([tool])}
    expected = ['call {"name": "add", "arguments": {"b": 2}}<end>', "Three.<end>"]
    tokenizer = tokenizer_for(TOOLS)
    options = {"end_ids": tokenizer.convert_tokens_to_ids(["<end>"])}
    assert answers(tmp_path, row, tokenizer, **options) == expected
    (prompt,) = load(tmp_path, row, tokenizer)
    assert '"parameters": {"b": 1}' in prompt.text
    shared = [
        {"from": "human", "value": "Name a colour."},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"b": 2}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "Three."},
    ]
    assert answers(tmp_path, {"conversations": shared}, tokenizer, **options) == expected
    with pytest.raises(
        ValueError, match=r"rows.jsonl:1: the chat template leaves out the tool call or result of turn 2"
    ):
        answers(tmp_path, row, tokenizer_for(GEMMA))
    called = {"role": "assistant", "content": "Hm.", "tool_calls": 5}
    with pytest.raises(ValueError, match="`tool_calls` should be a list of calls, found 5"):
        load(tmp_path, {"messages": [TALK[0], called]}, tokenizer)
    capsys.readouterr()
    load(tmp_path, row | {"messages": TALK}, tokenizer_for(GEMMA))
    assert "text that is not used: tools (1 rows)" in capsys.readouterr().out


@pytest.mark.parametrize(("template", "joined"), [(GEMMA, "Name\na colour."), (PARTS, "Namea colour.")])
def test_content_parts_are_rendered_or_joined(tmp_path: Path, template: str, joined: str) -> None:
    parts = [{"type": "text", "text": "Name"}, {"type": "text", "text": "a colour."}]
    (prompt,) = load(tmp_path, {"messages": [{"role": "user", "content": parts}]}, tokenizer_for(template))
    assert prompt.text.endswith(f"<start>user\n{joined}<end>\n<start>assistant\n")
    parts[0] = {"type": "image_url", "image_url": {"url": "a.png"}}
    with pytest.raises(ValueError, match=r"a part of a message is 'image_url'; only parts with text are supported"):
        load(tmp_path, {"messages": [{"role": "user", "content": parts}]}, tokenizer_for(template))


def test_reasoning_that_the_template_leaves_out_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answers(tmp_path, {"messages": THOUGHT}, tokenizer_for(CHAT_TEMPLATE)) == ["Blue.<eos>", "Red.<eos>"]
    assert "text that is not used: reasoning_content (1 rows)" in capsys.readouterr().out


def test_empty_answer_is_not_learnt(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows.jsonl:1: turn 2, the assistant's, is empty"):
        answers(tmp_path, {"messages": [TALK[0], {"role": "assistant", "content": ""}]}, tokenizer_for(CHAT_TEMPLATE))
