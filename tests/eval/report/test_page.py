"""Tests of the HTML report: recorded steps, tables, charts and tokens, on a self-contained page."""

import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import draftsmith
from data.prompts import Prompt
from draftsmith import Target
from draftsmith.artifacts.families import find
from eval.bakeoff.settings import BakeoffSettings
from eval.compare import compare
from eval.report import charts
from eval.report.page import PAGE, page, write_report
from eval.report.recorded_texts import (
    TEXTS,
    DecodingStep,
    _as_text,
    _pieces,
    _tree_statistics,
    greedy_steps,
    record_texts,
    select_prompts,
)
from tests.support.family import built
from tests.support.models import greedy_by_transformers, prompts, tiny_model, tiny_target
from tests.support.runs import command, run
from tests.support.text import trained_tokenizer

HOSTILE = "</script><script>alert('&1')</script>\"<img src=x>"
VOID = {"meta", "link", "input", "img"}


def prompt_of(ids: list[int], category: str | None = None) -> Prompt:
    return Prompt(ids=ids, loss_mask=None, text="", category=category, key=str(ids), source="test")


def drafter_of(family: str, target: Target) -> Any:
    torch.manual_seed(0)
    module = find(family)
    if family == "lm":
        drafter = module.Drafter(
            module.Config(model=target.model.config.to_dict(), num_draft=3, length="fixed"), target
        )
        drafter.model.load_state_dict(target.model.state_dict())
        return drafter
    return built(module, module.Config(), target)


@pytest.mark.parametrize("family", ["lookup", "medusa", "lm"])
def test_greedy_steps_equal_decoding(family: str) -> None:
    """Their tokens are the greedy text, and their counts those of `generate`."""
    target = tiny_target("llama")
    drafter = drafter_of(family, target)
    expected = greedy_by_transformers("llama", 4, 20)
    for ids, text in zip(prompts(4), expected, strict=True):
        steps = greedy_steps(drafter, ids, 20)
        assert [token for step in steps for token in (*step.accepted, step.target_token)] == text[len(ids) :]
        stats = draftsmith.generate(target, torch.tensor([ids]), drafter, max_new_tokens=20).stats
        assert len(steps) == stats.steps
        assert sum(len(step.path) for step in steps) == sum(stats.accepted)
        assert sum(max(map(len, step.drafted), default=0) for step in steps) == sum(stats.drafted)
        assert all(step.target_token not in step.rejected for step in steps)
    if family == "lm":
        assert len(steps) == 5, "drafts of a copy of the target are always accepted"


def test_greedy_steps_text_ends_within_a_draft() -> None:
    model = tiny_model("llama")
    ids, text = prompts(1)[0], greedy_by_transformers("llama", 1, 20)[0]
    new = text[len(ids) :]
    model.generation_config.eos_token_id = new[5]
    end = new.index(new[5]) + 1
    target = Target(model)
    steps = greedy_steps(drafter_of("lm", target), ids, 20)
    assert [
        token for step in steps for token in step.accepted + [step.target_token] * (step.target_token is not None)
    ] == new[:end]


def test_decoding_step_rejected_siblings_and_tree_statistics() -> None:
    drafted = {(0,): 5, (1,): 6, (0, 0): 7, (0, 1): 8, (1, 0): 9}
    steps = [
        DecodingStep(drafted=drafted, path=(0,), target_token=3),
        DecodingStep(drafted=drafted, path=(1, 0), target_token=4),
    ]
    assert (steps[0].accepted, steps[0].rejected) == ([5], [7, 8])
    assert (steps[1].accepted, steps[1].rejected) == ([6, 9], [])
    tree = _tree_statistics(steps)
    assert tree["num_nodes"] == 5
    assert {node["path"]: (node["drafted"], node["accepted"]) for node in tree["nodes"]} == {
        (0,): (2, 1),
        (0, 0): (2, 0),
        (0, 1): (2, 0),
        (1,): (2, 1),
        (1, 0): (2, 1),
    }


def test_select_prompts_prefers_different_categories() -> None:
    found = [prompt_of([row], category) for row, category in enumerate(["a", "a", "b", None, "c"])]
    assert [prompt.ids for prompt in select_prompts(found)] == [[0], [2], [3]]
    assert [prompt.ids for prompt in select_prompts(found[:2])] == [[0], [1]]


def test_pieces_join_to_the_text_and_complete_characters() -> None:
    tokenizer = trained_tokenizer()
    target = Target(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer)
    ids = tokenizer("def f(日本):\n    return 'é'")["input_ids"]
    pieces = _pieces(target, ids[:3], ids[3:])
    assert "".join(pieces) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:3])) :]
    assert "" in pieces and not any("\ufffd" in piece for piece in pieces)
    step = DecodingStep(drafted={(0,): ids[1]}, path=(0,), target_token=None)
    (found,) = _as_text(target, ids[:1], [step])
    assert found == {"accepted": [tokenizer.decode(ids[1:2])], "own": None, "rejected": [], "num_drafted": 1}


def test_record_texts_is_json_with_every_drafter() -> None:
    target = tiny_target("llama")
    drafters = {"one": drafter_of("lookup", target), "two": drafter_of("medusa", target)}
    recorded = record_texts(target, [prompt_of(ids) for ids in prompts(4)], drafters, 12)
    assert [set(text["steps"]) for text in recorded["texts"]] == [{"one", "two"}] * 3
    assert set(recorded["trees"]) == {"one", "two"}
    assert len(json.loads(json.dumps(recorded))["trees"]["two"]["nodes"]) > 3


# The page


class Parsed(HTMLParser):
    """Elements with their attributes, checked for balance, and the text of each element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]


def some_rows() -> list[dict[str, Any]]:
    """Returns rows as recipes/bakeoff.py wrote them before it added forecasts and categories."""
    rows = []
    for temperature in (0.0, 1.0):
        for name, speedup in (("plain", 1.0), ("good", 1.5), (HOSTILE, 0.75)):
            is_drafter = name != "plain"
            row = {"drafter": name, "temperature": temperature, "batch_size": 1, "tau": 2.0, "tokens_per_s": 1234.0}
            row |= {"speedup": speedup, "speedup_low": speedup - 0.1, "speedup_high": speedup + 0.1}
            row |= {"identical": True if temperature == 0 else None, "lossless": True, "tuned": False}
            row |= {"draft_ms": 0.5, "verify_ms": 2.0, "commit_ms": 0.1, "first_accepted": None, "first_optimum": None}
            row |= {"accepted_per_depth": [0.5, 0.25] if is_drafter else [], "num_parameters": 10, "artifact_mb": 1.5}
            row |= {
                "train_s": 30.0 if is_drafter else 0.0,
                "family": "kind" if is_drafter else None,
                "verifier": "auto",
            }
            row |= {
                "length": "auto",
                "confidence_threshold": None,
                "is_ablation": False,
                "target": "tiny",
                "dtype": "float32",
            }
            row |= {"hardware": "CPU", "threads": 1, "commit": None, "torch": "2", "transformers_version": "5"}
            rows.append(row | {"num_prompts": 4, "max_new_tokens": 8, "rounds": 3})
    return rows


def with_forecasts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows with the columns of newer comparisons."""
    added = []
    for row in rows:
        is_drafter, speedup = row["family"] is not None, row["speedup"]
        more: dict[str, Any] = {"predicted_speedup": 1.25 if is_drafter else None}
        more["predicted_by_batch_size"] = {"1": speedup, "2": speedup / 2} if is_drafter else None
        more["break_even_batch"] = (1 if speedup < 1 else 2) if is_drafter else None
        more["speedup_by_category"] = {HOSTILE: speedup, "maths": 2.0} if is_drafter else None
        more["prompts_by_category"] = {HOSTILE: 3, "maths": 1}
        added.append(row | more)
    return added


def some_texts() -> dict[str, Any]:
    steps = [
        {"accepted": ["a", "\n  "], "own": "c", "rejected": [HOSTILE, "d"], "num_drafted": 4},
        {"accepted": [HOSTILE], "own": "e", "rejected": [], "num_drafted": 1},
        {"accepted": [], "own": "", "rejected": [], "num_drafted": 0},
        {"accepted": ["f"], "own": None, "rejected": [], "num_drafted": 2},
    ]
    tree = {"num_steps": 4, "num_nodes": 2.0, "nodes": [{"path": [0], "drafted": 4, "accepted": 2}]}
    tree["nodes"] += [{"path": path, "drafted": 2, "accepted": 1} for path in ([0, 0], [0, 1], [1])]  # type: ignore
    texts = [{"prompt": HOSTILE, "category": HOSTILE, "steps": {"good": steps, HOSTILE: steps[2:3]}}]
    return {"texts": texts, "trees": {"good": tree, HOSTILE: tree}}


@pytest.mark.parametrize("is_new", [False, True])
def test_page_is_self_contained_and_escapes_text(is_new: bool) -> None:
    parsed = Parsed(text := page(with_forecasts(some_rows()) if is_new else some_rows(), some_texts()))
    assert len(parsed.of("script")) == len(parsed.of("style")) == len(parsed.of("h1")) == 1 and not parsed.of("img")
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    inner = "".join(text for tag, text in parsed.texts if tag in ("style", "script"))
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|https?:|import\(|innerHTML", inner)
    (policy,) = (found["content"] for found in parsed.of("meta") if found.get("http-equiv"))
    assert policy and policy.startswith("default-src 'none'")
    assert [found["content"] for found in parsed.of("meta") if found.get("name") == "viewport"]
    assert text.count(HOSTILE) == 0 and sum(text.count(HOSTILE) for _, text in parsed.texts) >= 5
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {f"#{name}" for name in ids} >= {found["href"] for found in parsed.of("a")}
    assert ({"batches", "categories"} <= set(ids)) == is_new


def test_page_tables_have_all_rows_and_sort_keys() -> None:
    parsed = Parsed(page(with_forecasts(some_rows()), some_texts()))
    heads = [text for tag, text in parsed.texts if tag == "button"]
    assert heads[:5] == ["drafter", "speed-up", "quartiles", "predicted speed-up", "break-even batch"]
    assert "first token" not in heads, "an empty column"
    cells = [text for tag, text in parsed.texts if tag == "td"]
    assert {"1.50x", "0.75x slower", "0.65-0.85", "1.25x", "2", "1,234", "lossless", "identical"} <= set(cells)
    values = [found["data-value"] for found in parsed.of("td")]
    assert "1.5" in values and "1234.0" in values and "" in values
    first = [found["scope"] for found in parsed.of("th")]
    assert first.count("row") == 2 * 3 + 2 * 2
    verdicts = "".join(text for tag, text in parsed.texts if tag in ("li", "b"))
    assert "Temperature 0, batch 1: fastest drafter: good, 1.50x; 1 of 2 slow decoding down." in " ".join(
        verdicts.split()
    )


def test_page_tokens_are_marked_without_colour() -> None:
    parsed = Parsed(page(some_rows(), some_texts()))
    tokens = [found for found in parsed.of("span") if "data-note" in found]
    kinds = [(found["class"] or "").split()[1] for found in tokens]
    assert kinds == ["accepted", "accepted", "corrected", "accepted", "own", "alone", "accepted", "alone"]
    begins = [(found["class"] or "").endswith("first") for found in tokens[:7]]
    assert begins == [True, False, False, True, False, True, True]
    note = tokens[2]["data-note"] or ""
    assert "'c'" in note and repr(HOSTILE) in note and "'d'" in note and "step 1, 4 drafted" in note
    assert [found["tabindex"] for found in tokens] == ["0", *["-1"] * 6, "0"]
    style = (Path(charts.__file__).parent / "report.css").read_text()
    assert "underline" in re.search(r"\.accepted \{[^}]*\}", style).group()  # type: ignore[union-attr]
    assert "wavy" in re.search(r"\.corrected \{[^}]*\}", style).group()  # type: ignore[union-attr]
    assert "italic" in re.search(r"\.alone \{[^}]*\}", style).group()  # type: ignore[union-attr]


def test_against_cost_labels_do_not_overlap() -> None:
    drawn = random.Random(0)
    points = [(f"drafter{n}", 10 ** drawn.uniform(0.5, 3.5), drawn.uniform(0.6, 1.4)) for n in range(20)]
    svg = charts.against_cost(points, "many")
    labels = re.findall(r'class="label" x="([\d.-]+)" y="([\d.-]+)"[^>]*>([^<]*)<', svg)
    assert len(labels) == svg.count("<circle") == 20
    boxes = [(float(x), float(y) - 11, float(x) + charts.LETTER * len(name), float(y) + 3) for x, y, name in labels]
    smaller = [(x1 + 0.1, y1 + 0.1, x2 - 0.1, y2 - 0.1) for x1, y1, x2, y2 in boxes]
    assert not any(charts._overlap(one, other) for at, one in enumerate(smaller) for other in smaller[:at])
    assert min(x1 for x1, *_ in boxes) >= 0 and max(x2 for _, _, x2, _ in boxes) <= charts.WIDTH
    assert min(y1 for _, y1, *_ in boxes) >= 0 and max(y2 for *_, y2 in boxes) <= charts.HEIGHT


def test_charts_of_a_single_point() -> None:
    assert "only" in charts.against_cost([("only", 0.0, 1.0)], "one")
    assert charts.by_depth([("temperature 0", [1.0])], "one").count("<circle") == 1
    assert charts.tree([{"path": [0], "drafted": 3, "accepted": 0}], "one").count("<text") == 1


def test_tree_chart_positions_of_branches() -> None:
    svg = charts.tree(some_texts()["trees"]["good"]["nodes"], "tree")
    positions = re.findall(r'class="node" cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert len(set(positions)) == len(positions) == 4
    first, low, high, second = ((float(x), float(y)) for x, y in positions)
    assert low[0] == high[0] > first[0] == second[0]
    assert low[1] < high[1] < second[1] and low[1] < first[1] < high[1]


def test_write_report_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "bakeoff.json").write_text(json.dumps(some_rows()))
    assert write_report(tmp_path) == tmp_path / PAGE
    assert 'id="texts"' not in (tmp_path / PAGE).read_text()
    (tmp_path / TEXTS).write_text(json.dumps(some_texts()))
    done = run([*command("report"), str(tmp_path)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / PAGE).read_text() == page(some_rows(), some_texts())


def test_compare_writes_the_page(tmp_path: Path) -> None:
    target = tiny_target("llama")
    for name in ("lookup", "medusa"):
        made = drafter_of(name, target)
        draftsmith.save(made, tmp_path / "made" / name, target=target, record={"train_s": 3.0})
    settings = BakeoffSettings(rounds=1, max_new_tokens=8, batch_sizes=(1,), temperatures=(0.0,), lengths=("fixed=1",))
    artifacts = [tmp_path / "made" / name for name in ("lookup", "medusa")]
    rows = compare(target, [prompt_of(ids) for ids in prompts(2)], artifacts, tmp_path / "out", settings)
    assert any(row["is_ablation"] for row in rows)
    parsed = Parsed((tmp_path / "out" / PAGE).read_text())
    ids = {attributes["id"] for _, attributes in parsed.elements if "id" in attributes}
    assert {"table", "cost", "batches", "acceptance", "trees", "texts"} <= ids
    titles = [text for tag, text in parsed.texts if tag == "summary"]
    assert sorted(title.split(":")[0] for title in titles) == sorted(["The prompt", "lookup", "medusa"] * 2)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "has no bakeoff.json"), ("[{", "not valid JSON"), ("[]", "contains no comparison")]
)
def test_write_report_without_a_comparison_raises(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "bakeoff.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / PAGE).exists()


# In a browser

ACTIONS = """
const faults = [];
addEventListener("error", (event) => faults.push(event.message));
addEventListener("load", () => {
  const button = [...document.querySelectorAll("thead button")].find((one) => one.textContent === "speed-up");
  const column = () => [...button.closest("table").tBodies[0].rows].map((row) => row.cells[1].textContent);
  button.focus();
  const result = { isFocused: document.activeElement === button, faults };
  button.click(); result.descending = column();
  button.click(); result.ascending = column();
  const token = document.querySelector(".token[tabindex='0']"), note = document.getElementById("note");
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  result.hidden = [note.hidden];
  token.focus(); result.note = note.textContent; result.hidden.push(note.hidden);
  press("ArrowRight"); press("ArrowRight"); result.next = note.textContent;
  result.stops = document.querySelector(".tokens").querySelectorAll("[tabindex='0']").length;
  press("End"); result.last = note.textContent;
  press("Escape"); result.hidden.push(note.hidden);
  const box = document.getElementById("show-rejected"), other = document.querySelector(".rejected");
  const seen = () => other.offsetWidth > 0;
  result.rejected = [seen()]; box.click(); result.rejected.push(seen());
  result.tooWide = document.documentElement.scrollWidth > innerWidth; result.width = innerWidth;
  parent.postMessage(result, "*");
});
"""
FRAMES = """<script>
addEventListener("message", (event) => {{
  document.getElementById("results").textContent += JSON.stringify(event.data) + "\\n";
}});
</script><pre id="results"></pre>{frames}"""


@pytest.mark.slow
def test_page_in_chromium_at_two_widths_by_keyboard(tmp_path: Path) -> None:
    """In headless Chromium the console is empty, the page fits the window, and everything works by keyboard."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    text = page(with_forecasts(some_rows()), some_texts())
    (tmp_path / "page.html").write_text(text.replace("<body>", f"<body><script>{ACTIONS}</script>"))
    frames = "".join(f'<iframe src="page.html" width="{width}" height="900"></iframe>' for width in (1280, 390))
    (tmp_path / "frames.html").write_text(FRAMES.format(frames=frames))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=8000 --dump-dom"
    done = subprocess.run(
        [browser, *flags.split(), f"--user-data-dir={tmp_path}/user", f"file://{tmp_path}/frames.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    results = [json.loads(line) for line in re.search(r"<pre[^>]*>(.*?)</pre>", done.stdout, re.S)[1].splitlines()]  # type: ignore[index]
    assert sorted(one["width"] for one in results) == [390, 1280]
    for one in results:
        assert one["isFocused"] and one["faults"] == [] and not one["tooWide"]
        assert one["descending"] == ["1.50x", "1.00x", "0.75x slower"] == one["ascending"][::-1]
        assert one["note"].startswith("'a' - depth 1: drafted") and one["next"].startswith("'c' - the target's")
        assert one["last"].startswith("'f'") and one["stops"] == 1
        assert one["hidden"] == [True, False, True] and one["rejected"] == [False, True]
