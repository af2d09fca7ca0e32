"""Tests of the bake-off: rows, tables and files, continuation, and invalid input."""

import contextlib
import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

import draftsmith
from data.prompts import Prompt
from draftsmith import Target
from draftsmith.artifacts.families import find
from eval import compare as bakeoff
from eval.bakeoff import contenders
from eval.bakeoff.measure import DecodingMethod, DecodingRequest, DecodingResult, Tally, draftsmith_method, measure
from eval.bakeoff.results import PARTIAL, check_output, claimed
from eval.bakeoff.rows import row_of
from eval.bakeoff.settings import BakeoffSettings
from eval.compare import by_category, compare
from eval.report.table import header, output_of, ranked, table, to_csv
from recipes.bakeoff import BakeoffRunSettings
from tests.support.family import built, part_config
from tests.support.models import prompts, tiny_model, tiny_target
from tests.support.runs import locked_by_another_run

KEYS = {
    *("drafter", "temperature", "batch_size", "tau", "tokens_per_s", "speedup", "identical", "lossless", "draft_ms"),
    *("verify_ms", "accepted_per_depth", "num_parameters", "artifact_mb", "train_s"),
}
SMALL = BakeoffSettings(rounds=2, max_new_tokens=8, batch_sizes=(1, 2), verifiers=("typical",), forecast_sizes=(1, 4))


def some_prompts(number: int = 4) -> list[Prompt]:
    return [
        Prompt(ids=ids, loss_mask=None, text="", category=None, key=f"row-{row}", source="test")
        for row, ids in enumerate(prompts(number))
    ]


def make_artifacts(target: Target, folder: Path) -> list[Path]:
    """Saves a drafter with a recorded training time and one without."""
    paths = []
    for name, record in (("medusa", {"train_s": 12.5}), ("lookup", {})):
        family = find(name)
        torch.manual_seed(0)
        draftsmith.save(family.Drafter(family.Config(), target), folder / name, target=target, record=record)
        paths.append(folder / name)
    return paths


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder, target = tmp_path_factory.mktemp("compare"), tiny_target("llama")
    artifacts = make_artifacts(target, folder / "artifacts")
    return compare(target, some_prompts(), artifacts, folder / "out", SMALL), folder / "out"


def test_compare_one_row_per_contender_temperature_and_batch_size(compared: tuple[list[dict[str, Any]], Path]) -> None:
    rows, _ = compared
    greedy = ["plain", "transformers", "medusa", "lookup"]
    sampled = ["plain", "transformers", "medusa", "medusa (typical)", "lookup", "lookup (typical)"]
    found = [(row["temperature"], row["batch_size"], row["drafter"]) for row in rows]
    assert found == [
        *((0.0, size, name) for size in (1, 2) for name in greedy),
        *((1.0, size, name) for size in (1, 2) for name in sampled),
    ]
    assert all(set(row) >= KEYS for row in rows)


def test_compare_row_values(compared: tuple[list[dict[str, Any]], Path]) -> None:
    rows, _ = compared
    for row in rows:
        is_drafter = row["drafter"] not in ("plain", "transformers")
        assert row["identical"] is (True if row["temperature"] == 0 else None)
        assert row["lossless"] is ("typical" not in row["drafter"])
        assert row["tau"] >= 1
        assert row["tokens_per_s"] > 0
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert (row["draft_ms"] is None) == (row["drafter"] == "transformers")
        assert bool(row["accepted_per_depth"]) == is_drafter
        assert all(0 <= share <= 1 for share in row["accepted_per_depth"])
        assert (row["artifact_mb"] > 0) == is_drafter
    by_name = {row["drafter"]: row for row in rows}
    assert by_name["plain"]["speedup"] == by_name["plain"]["speedup_low"] == 1.0
    assert by_name["medusa"]["num_parameters"] == 4 * (32 * 32 + 32)
    assert by_name["lookup"]["num_parameters"] == 0
    assert [by_name[name]["train_s"] for name in ("medusa", "lookup", "plain")] == [12.5, None, 0.0]


def test_compare_first_token_acceptance_and_bound(tmp_path: Path) -> None:
    """The token rule is optimal for a single sibling; a copy of the target is always accepted."""
    target, family = tiny_target("llama"), find("lm")
    drafter = family.Drafter(family.Config(model=target.model.config.to_dict(), length="fixed", num_draft=2), target)
    drafter.model.load_state_dict(target.model.state_dict())
    draftsmith.save(drafter, tmp_path / "copy", target=target)
    torch.manual_seed(0)
    draftsmith.save(family.Drafter(drafter.config, target), tmp_path / "other", target=target)
    settings = BakeoffSettings(rounds=1, max_new_tokens=24, batch_sizes=(16,), forecast_sizes=())
    settings = replace(settings, verifiers=("token", "coupled"))
    rows = compare(target, some_prompts(16), [tmp_path / "copy", tmp_path / "other"], tmp_path / "out", settings)
    found = {row["drafter"]: row for row in rows if row["temperature"] == 1}
    assert found["plain"]["first_optimum"] is found["transformers"]["first_optimum"] is None
    assert found["copy"]["first_accepted"] == 1 and found["copy"]["first_optimum"] == pytest.approx(1, abs=1e-5)
    other = found["other (token)"]
    assert 0.02 < other["first_optimum"] < 0.9
    assert other["first_accepted"] == pytest.approx(other["first_optimum"], abs=0.2)
    coupled = found["other (coupled)"]
    assert 0.02 < coupled["first_accepted"] < coupled["first_optimum"] + 0.05
    for name in ("plain", "copy", "other"):
        assert found[f"{name} (coupled)"]["identical"] is True, "its text is that of plain decoding with the same seed"
        assert found[name]["identical"] is None
    assert found["plain (coupled)"]["speedup"] == 1
    assert all(row["first_optimum"] is None for row in rows if row["temperature"] == 0)
    text = (tmp_path / "out" / "bakeoff.md").read_text()
    assert f"{other['first_accepted']:.2f}, {other['first_optimum']:.2f}" in text and "- first token, bound:" in text


def test_compare_batch_invariant_output_is_identical(tmp_path: Path) -> None:
    """In bfloat16, sampled too: by the verifier coupled, plain decoding included."""
    target, family = Target(tiny_model("llama").to(torch.bfloat16)), find("lookup")
    draftsmith.save(family.Drafter(family.Config(), target), tmp_path / "lookup", target=target)
    settings = BakeoffSettings(rounds=1, max_new_tokens=12, batch_sizes=(2,), forecast_sizes=(), batch_invariant=True)
    with pytest.raises(ValueError, match="True in the settings and False in the target"):
        compare(target, some_prompts(2), [tmp_path / "lookup"], tmp_path / "out", settings)
    target.batch_invariant = True
    rows = compare(target, some_prompts(2), [tmp_path / "lookup"], tmp_path / "out", settings)
    found = {(row["drafter"], row["temperature"]): row for row in rows}
    assert all(found[name, temperature]["identical"] for name in ("plain", "lookup") for temperature in (0, 1))
    assert found["transformers", 1]["identical"] is None
    assert "; decoded batch-invariantly;" in (tmp_path / "out" / "bakeoff.md").read_text()


def test_compare_transformers_assisted_generation(tmp_path: Path) -> None:
    """It stands in the table of batch 1 with the same draft LM, with the same greedy output."""
    target, family = tiny_target("llama"), find("lm")
    drafter = family.Drafter(family.Config(model=target.model.config.to_dict(), num_draft=2), target)
    draftsmith.save(drafter, tmp_path / "small", target=target)
    settings = BakeoffSettings(rounds=1, max_new_tokens=6, batch_sizes=(1, 2), assisted=True, forecast_sizes=())
    rows = compare(
        target, some_prompts(2), [tmp_path / "small"], tmp_path / "out", settings, notes={"left_out": {"x": "y"}}
    )
    theirs = ["transformers: prompt lookup", "transformers: small"]
    for size, expected in ((1, theirs), (2, [])):
        found = [row for row in rows if row["batch_size"] == size and row["drafter"].startswith("transformers:")]
        assert sorted({row["drafter"] for row in found}) == expected
        assert all(row["identical"] for row in found if row["temperature"] == 0)
        assert all(row["tau"] is None for row in found), "transformers does not tell its forwards"
    text = (tmp_path / "out" / "bakeoff.md").read_text()
    assert "x (y); transformers' assisted generation at batch 2 (it takes one prompt at a time)" in text


def test_compare_keeps_batches_full(tmp_path: Path) -> None:
    target = tiny_target("llama")
    drafter = built(find("lookup"), find("lookup").Config(), target)
    draftsmith.save(drafter, tmp_path / "lookup", target=target)
    settings = BakeoffSettings(
        rounds=1,
        max_new_tokens=6,
        batch_sizes=(1, 2),
        temperatures=(0.0,),
        forecast_sizes=(2,),
        continuous_batching=True,
    )
    rows = compare(target, some_prompts(5), [tmp_path / "lookup"], tmp_path / "out", settings)
    found = {row["drafter"]: row for row in rows if row["batch_size"] == 2}
    assert sorted(found) == ["lookup", "plain"], "transformers has no such batches here"
    # Batches that begin together would leave the fifth prompt out.
    assert all(row["identical"] and row["num_decoded"] == 5 for row in found.values())
    assert found["lookup"]["predicted_speedup"] > 0
    text = (tmp_path / "out" / "bakeoff.md").read_text()
    assert "batches above 1 kept full" in text and "transformers' loop at batch 2" in text


@pytest.mark.parametrize(("rounding", "word"), [(10.0, "ties"), (0.0, "DIFFERS")])
def test_compare_reads_the_gap_of_differing_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: float, word: str
) -> None:
    """One row of transformers gets another token; the gap is that of plain decoding's logits there."""
    target, changed = tiny_target("llama"), 3

    def transformers_with_another_token(target: Target, **_: Any) -> Any:
        def decode(request: DecodingRequest) -> DecodingResult:
            rows = draftsmith_method(target)(request).rows
            if request.prompts[0] == some_prompts(1)[0].ids:
                rows[0][changed] = (rows[0][changed] + 1) % target.vocab_size
            return DecodingResult(rows=rows)

        return decode

    monkeypatch.setattr(contenders, "transformers_method", transformers_with_another_token)
    num_measured = 0

    def measured_rounding(*_: Any, on_width: Callable[[], object]) -> float:
        nonlocal num_measured
        num_measured += 1
        return rounding

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bakeoff, "measured_rounding", measured_rounding)
    settings = BakeoffSettings(
        rounds=2, max_new_tokens=6, batch_sizes=(1,), temperatures=(0.0,), forecast_sizes=(), threads=1
    )
    with monkeypatch.context() as patch:
        patch.setattr(bakeoff, "record_texts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compare(target, some_prompts(2), [], tmp_path / "out", settings)
    num_before = num_measured
    rows = compare(target, some_prompts(2), [], tmp_path / "out", settings)
    assert num_measured == num_before > 0, "the rounding is kept when a comparison is continued"
    plain, theirs = rows
    ids = some_prompts(1)[0].ids
    request = DecodingRequest(prompts=[ids], temperature=0.0, max_new_tokens=6, seed=0)
    (text,) = draftsmith_method(target)(request).rows
    with torch.inference_mode():
        logits_V = target.model(torch.tensor([ids + text[:changed]])).logits[0, -1]
    gap = float(logits_V[text[changed]] - logits_V[(text[changed] + 1) % target.vocab_size])
    assert theirs["largest_gap"] == pytest.approx(gap, abs=1e-4) and theirs["rounding"] == rounding
    assert (theirs["num_different"], theirs["num_decoded"]) == (2, 4), "one of two rows, in two rounds"
    assert output_of(theirs) == f"{word} 2/4 ({gap:.2g})" and output_of(plain) == "identical"


def test_compare_fine_tuned_target_is_its_own_baseline(tmp_path: Path) -> None:
    """Its rows are marked, follow plain decoding of the fine-tuned target, and have the same output."""
    target, family = tiny_target("llama"), find("medusa2")
    drafter = built(family, family.Config(rank=4, alpha=1.0), target)
    draftsmith.save(drafter, tmp_path / "fine_tuned", target=target)
    settings = BakeoffSettings(
        rounds=1,
        max_new_tokens=12,
        batch_sizes=(2,),
        verifiers=("typical",),
        confidence_thresholds=(0.5,),
        forecast_sizes=(),
    )
    rows = compare(target, some_prompts(), [tmp_path / "fine_tuned"], tmp_path / "out", settings)
    greedy = [(row["drafter"], row["tuned"], row["identical"]) for row in rows if row["temperature"] == 0]
    assert greedy == [
        ("plain", False, True),
        ("transformers", False, True),
        ("fine_tuned (plain)", True, False),
        ("fine_tuned", True, True),
        ("fine_tuned (threshold 0.5)", True, True),
    ]
    text = (tmp_path / "out" / "bakeoff.md").read_text()
    shown = [line.split("|") for line in text.splitlines() if line.startswith("| fine_tuned")]
    outputs = [cells[6].strip() for cells in shown if len(cells) > 7]
    assert sorted(outputs[:3]) == ["fine-tuned*", "identical*", "identical*"]
    assert sorted(outputs[3:7]) == ["fine-tuned*", "lossless*", "lossless*", "lossy"]
    assert "*: compared with plain decoding of the target as fine-tuned by this drafter" in text
    assert max(map(len, table(rows, "terminal"))) <= 120


def test_compare_leaves_a_drafter_out_where_it_cannot_draft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that sampled, as one of a user's own family may, could be merged at temperature 0 alone."""
    target, family = tiny_target("llama"), find("merge")
    monkeypatch.setattr(family, "_greedy", lambda session: session)
    sampling = part_config("hydra", find("hydra").Config(num_heads=2, tree=((0,), (1,), (0, 0))))
    config = family.Config(parts=(part_config("lookup", find("lookup").Config()), sampling))
    draftsmith.save(built(family, config, target), tmp_path / "merged", target=target)
    artifacts = [tmp_path / "merged", make_artifacts(target, tmp_path)[1]]
    given: dict[str, Any] = {"rounds": 1, "max_new_tokens": 6, "batch_sizes": (1,), "forecast_sizes": (1,)}
    settings = BakeoffSettings(temperatures=(0.0, 1.0), lengths=("fixed=1",), **given)
    rows = compare(target, some_prompts(2), artifacts, tmp_path / "out", settings)
    everywhere = ["plain", "transformers", "lookup", "lookup (fixed=1)"]
    for temperature, expected in (
        (0, [*everywhere[:2], "merged", "merged (fixed=1)", *everywhere[2:]]),
        (1, everywhere),
    ):
        assert [row["drafter"] for row in rows if row["temperature"] == temperature] == expected
    reason = "hydra samples its drafts even at temperature 0, and only deterministic trees can be merged"
    assert list(rows[0]["left_out"]) == ["merged at temperature 1"]
    assert reason in rows[0]["left_out"]["merged at temperature 1"]
    assert "not in the table: merged at temperature 1 (" in " ".join(" ".join(table(rows, "terminal")).split())
    assert f"merged is left out at temperature 1: {reason}" in " ".join(capsys.readouterr().out.split())
    only_above = BakeoffSettings(temperatures=(1.0,), **given)
    with pytest.raises(ValueError, match=f"no artifact can draft: merged: .*{reason}"):
        compare(target, some_prompts(2), artifacts[:1], tmp_path / "none", only_above)
    assert not (tmp_path / "none").exists()


def test_compare_files_contain_the_rows(compared: tuple[list[dict[str, Any]], Path]) -> None:
    rows, folder = compared
    kinds = ("json", "md", "csv", "png", "texts.json", "html", "started.txt")
    assert {file.name for file in folder.iterdir()} == {f"bakeoff.{kind}" for kind in kinds}
    assert json.loads((folder / "bakeoff.json").read_text()) == rows
    with (folder / "bakeoff.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    for row, texts in zip(rows, read, strict=True):
        assert set(row) == set(texts)  # there are no categories, which have columns of their own
        for key, value in row.items():
            assert texts[key] == value if isinstance(value, str) else json.loads(texts[key] or "null") == value


def test_table_markdown_and_terminal_width(compared: tuple[list[dict[str, Any]], Path]) -> None:
    rows, folder = compared
    markdown = (folder / "bakeoff.md").read_text()
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    measured = [cells for cells in shown if len(cells) == 10 and cells[0] != "drafter" and "-" not in cells[0]]
    found = [(cells[0], cells[1]) for cells in measured]
    assert found == [(row["drafter"], f"{row['tau']:.2f}") for row in ranked(rows)]
    assert {cells[6] for cells in measured} == {"identical", "lossless", "lossy"}
    lines = [*header(rows, "terminal").splitlines(), *table(rows, "terminal")]
    assert max(map(len, lines)) <= 120


def test_table_with_all_columns_and_long_names_fits_the_terminal(compared: tuple[list[dict[str, Any]], Path]) -> None:
    changes = {"tokens_per_s": 12345.0, "accepted_per_depth": [1.0] * 6, "predicted_speedup": 12.5, "speedup": 0.5}
    changes |= {"first_accepted": 0.5, "first_optimum": 0.75, "draft_ms": 123.45, "verify_ms": 1234.5}
    rows = [row | changes | {"drafter": f"a-rather-long-name-of-{row['drafter']}"} for row in compared[0]]
    lines = table(rows, "terminal")
    assert max(map(len, lines)) <= 120
    medusa = next(line for line in lines if "of-medusa" in line or "medusa " in line)
    assert medusa.startswith("...") and "0.50x slower" in medusa and medusa.endswith("0.50, 0.75")


def test_compare_adds_predictions(compared: tuple[list[dict[str, Any]], Path]) -> None:
    rows, folder = compared
    for row in rows:
        is_drafter = row["family"] is not None
        assert (row["predicted_speedup"] is not None) == is_drafter
        if is_drafter:
            by_size = {int(size): ratio for size, ratio in row["predicted_by_batch_size"].items()}
            assert list(by_size) == [1, 2, 4] and min(by_size.values()) > 0
            if row["batch_size"] == 1:  # a single row has no stragglers
                assert row["predicted_speedup"] == pytest.approx(by_size[1])
            assert row["break_even_batch"] == next((size for size, ratio in by_size.items() if ratio < 1), None)
    markdown = (folder / "bakeoff.md").read_text()
    assert "## Predicted speed-up by batch size, continuous batching, temperature 1" in markdown
    slow = [row["drafter"] for row in rows if row["break_even_batch"] == 1 and row["temperature"] == 0]
    assert ("Predicted to slow decoding down even at batch size 1, temperature 0" in markdown) == bool(slow)


def test_compare_by_category(tmp_path: Path) -> None:
    target = tiny_target("llama")
    named = [
        replace(prompt, category=category)
        for prompt, category in zip(
            some_prompts(7), ["maths", "code", "maths", "code", "maths", "rare", None], strict=True
        )
    ]
    assert {name: len(group) for name, group in by_category(named, 2).items()} == {"maths": 3, "code": 2, "others": 2}
    assert {name: len(group) for name, group in by_category(named, 3).items()} == {"maths": 3, "others": 4}
    assert {name: len(group) for name, group in by_category(named, 4).items()} == {"": 7}
    assert {name: len(group) for name, group in by_category(some_prompts(2), 1).items()} == {"": 2}
    settings = BakeoffSettings(rounds=2, max_new_tokens=6, batch_sizes=(1, 4), temperatures=(0.0,), forecast_sizes=())
    rows = compare(target, named, make_artifacts(target, tmp_path)[1:], tmp_path / "out", settings)
    (row, without) = (row for row in rows if row["drafter"] == "lookup")
    groups = ["maths", "code", "rare", "others"]
    assert list(row["speedup_by_category"]) == groups and not without["speedup_by_category"]
    assert row["prompts_by_category"] == {"maths": 3, "code": 2, "rare": 1, "others": 1}
    assert row["tokens_per_s"] > 0 and row["identical"]
    text = (tmp_path / "out" / "bakeoff.md").read_text()
    assert "## Speed-up by category (prompts), temperature 0, batch 1" in text and "maths (3)" in text
    first, *_ = csv.DictReader((tmp_path / "out" / "bakeoff.csv").read_text().splitlines())
    assert [name for name in first if name.startswith("speedup: ")] == [f"speedup: {name}" for name in groups]
    assert float(first["speedup: maths"]) == 1.0, "plain decoding is its own baseline"
    many = {f"category {number}": 2 for number in range(9)}
    wide = row | {"speedup_by_category": dict.fromkeys(many, 1.5), "prompts_by_category": many}
    assert max(map(len, table([wide], "terminal"))) <= 120 and to_csv([wide]).count("speedup: category") == 9


def test_table_marks_slow_downs_and_differing_output(compared: tuple[list[dict[str, Any]], Path]) -> None:
    row = compared[0][2] | {"speedup": 0.8, "speedup_low": 0.7, "speedup_high": 0.9, "identical": False}
    line = next(line for line in table([row], "terminal") if line.startswith("medusa"))
    assert "0.80x slower" in line
    assert "0.70-0.90" in line
    assert "DIFFERS" in line
    tie = row | {"num_different": 2, "num_decoded": 8, "largest_gap": 0.062, "rounding": 0.12, "is_tie": True}
    lines = table([tie], "markdown")
    assert "| ties 2/8 (0.062) |" in "\n".join(lines)
    assert any("rounding: the most that" in line and "0.12 (batch 1)" in line for line in lines)
    worse = tie | {"largest_gap": 0.5, "is_tie": False}
    assert "| DIFFERS 2/8 (0.5) |" in "\n".join(table([worse], "markdown"))
    measured = ("num_different", "num_decoded", "largest_gap", "rounding", "is_tie")
    old = {key: value for key, value in row.items() if key not in measured}
    assert "| DIFFERS |" in "\n".join(table([old], "markdown")), "rows of older comparisons have no counts"


def test_plot_is_not_blank(compared: tuple[list[dict[str, Any]], Path]) -> None:
    pixels = matplotlib.image.imread(compared[1] / "bakeoff.png")[..., :3]
    assert min(pixels.shape[:2]) > 400
    packed = (pixels * 255).round().astype(np.int64) @ (1, 256, 256**2)  # sorted far faster than rows of three
    colours, counts = np.unique(packed, return_counts=True)
    assert len(colours) > 50
    assert 0.02 < 1 - counts.max() / counts.sum() < 0.6  # neither blank nor filled


def test_compare_ablation_rows_of_lengths_and_confidence_thresholds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = BakeoffRunSettings(
        batch_sizes="2",
        rounds=2,
        max_new_tokens=8,
        lengths="fixed=1,refit,expected_gain",
        confidence_thresholds="0.3,0.5",
        forecast_sizes="",
    )
    target = tiny_target("llama")
    rows = compare(target, some_prompts(), make_artifacts(target, tmp_path), tmp_path / "out", run.comparison())
    kinds = ("", " (fixed=1)", " (expected_gain)", " (threshold 0.3)", " (threshold 0.5)")
    expected = ["plain", "transformers", *(f"{name}{kind}" for name in ("medusa", "lookup") for kind in kinds)]
    assert [row["drafter"] for row in rows] == expected * 2
    output = capsys.readouterr().out
    for name in ("medusa", "lookup"):
        assert f"{name} (refit) is left out: length 'refit' needs the draft model's confidence" in output
    for row in rows:
        assert row["lossless"] and row["identical"] is (True if row["temperature"] == 0 else None)
        assert row["is_ablation"] is ("(" in row["drafter"])
        assert "fixed" not in row["drafter"] or len(row["accepted_per_depth"]) == 1
        assert (row["length"], row["confidence_threshold"]) == {
            "fixed=1": ("fixed=1", None),
            "expected_gain": ("expected_gain", None),
            "threshold 0.3": ("auto", 0.3),
            "threshold 0.5": ("auto", 0.5),
        }.get(row["drafter"].partition(" (")[2].rstrip(")"), ("auto", None))
    drafter = draftsmith.load(tmp_path / "medusa", target)
    own = DecodingMethod(name="mine", decode=draftsmith_method(target, drafter))
    (limited,) = contenders._ablations(own, drafter, {}, BakeoffSettings(confidence_thresholds=(0.999,)))
    request = DecodingRequest(prompts=prompts(2), temperature=0.0, max_new_tokens=12, seed=0)
    drafted = [
        decode(request).stats.drafted[0] for decode in (limited.method.decode, draftsmith_method(target, drafter))
    ]
    assert drafted[0] < drafted[1], "the threshold skips most drafts"
    lines = table(rows, "terminal")
    sizes = lines[next(at for at, line in enumerate(lines) if "parameters" in line) + 1 :]
    assert {line.split()[0] for line in sizes[:2]} == {"medusa", "lookup"} and not sizes[2]


def test_compare_continues_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, output = tiny_target("llama"), tmp_path / "out"
    artifacts = make_artifacts(target, tmp_path)
    settings = BakeoffSettings(rounds=2, max_new_tokens=4, batch_sizes=(1,), forecast_sizes=())
    calls = 0

    def interrupt_third_call(*args: Any, **options: Any) -> dict[str, Tally]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return measure(*args, **options)

    monkeypatch.setattr(bakeoff, "measure", interrupt_third_call)
    with pytest.raises(KeyboardInterrupt):
        compare(target, some_prompts(), artifacts, output, settings)
    lines = (output / PARTIAL).read_text().splitlines()
    assert len(lines) == 3  # the identity and two parts
    (output / PARTIAL).write_text("\n".join([*lines, lines[-1][:50]]))  # a truncated line is skipped
    rows = compare(target, some_prompts(), artifacts, output, settings)
    assert calls == 5
    first = json.loads(lines[1])["tallies"]["medusa"]
    assert rows[2]["drafter"] == "medusa"
    assert rows[2]["tau"] == pytest.approx(first["tokens"] / first["steps"])
    assert not (output / PARTIAL).exists()
    (output / PARTIAL).write_text("\n".join(lines))
    compare(target, some_prompts(), artifacts, output, replace(settings, max_new_tokens=5))
    assert calls == 9  # parts of a comparison with other settings are not used
    message = "starting over, since the 2 measured parts differ in: max_new_tokens"
    assert message in capsys.readouterr().out


def test_row_speedup_is_the_median_ratio_within_rounds() -> None:
    contender = contenders.Contender(
        method=DecodingMethod(name="mine", decode=draftsmith_method(tiny_target("llama"))), family="lookup"
    )
    seconds = [(1.0, 0.5), (10.0, 4.0), (2.0, 1.9)]  # the second round ran on a busy machine
    rounds = [
        {
            "plain": Tally(tokens=10, seconds=plain, steps=10),
            "mine": Tally(tokens=10, seconds=mine, steps=4, draft_ms=8.0, drafted=[4, 2], accepted=[3, 1]),
        }
        for plain, mine in seconds
    ]
    row = row_of(contender, 0.0, 1, rounds)
    assert row["speedup"] == 2.0
    assert (row["speedup_low"], row["speedup_high"]) == (pytest.approx((2 + 2 / 1.9) / 2), 2.25)
    assert (row["tau"], row["draft_ms"], row["accepted_per_depth"]) == (2.5, 2.0, [0.75, 0.5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"temperatures": (-1.0,)}, "temperatures are"),
        ({"batch_sizes": ()}, "batch sizes are"),
        ({"verifiers": ("best",)}, "unknown verifier 'best'"),
        ({"lengths": ("long",)}, "unknown length policy 'long'"),
        ({"confidence_thresholds": (0.5, 1.5)}, "confidence_thresholds are"),
    ],
)
def test_settings_invalid_values_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BakeoffSettings(**changes)


def test_compare_in_a_folder_that_another_run_uses_raises(tmp_path: Path) -> None:
    target, settings = tiny_target("llama"), replace(SMALL, rounds=1, batch_sizes=(1,), verifiers=(), forecast_sizes=())
    with locked_by_another_run(tmp_path / "out"), pytest.raises(ValueError, match="out is in use by another run"):
        compare(target, some_prompts(1), [], tmp_path / "out", settings)


def test_claimed_leaves_nothing_if_nothing_was_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), claimed(tmp_path / "out"):
        raise ValueError("wrong")
    assert not (tmp_path / "out").exists()


def test_check_output_other_files_raise(tmp_path: Path) -> None:
    check_output(tmp_path)
    check_output(tmp_path / "new")
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="contains other files"):
        check_output(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        check_output(tmp_path / "thesis.txt")
    (tmp_path / "bakeoff.json").touch()
    check_output(tmp_path)


def test_names_of_artifacts_are_unique(tmp_path: Path) -> None:
    names = [tmp_path / "one" / "heads", tmp_path / "two" / "heads", tmp_path / "plain"]
    assert contenders._names(names) == ["one/heads", "two/heads", f"{tmp_path.name}/plain"]
    with pytest.raises(ValueError, match="two artifacts are called"):
        contenders._names([tmp_path / "heads", tmp_path / "heads"])


@pytest.mark.parametrize(
    "is_own", [pytest.param(True, id="model"), pytest.param(False, id="json", marks=pytest.mark.slow)]
)
def test_compare_under_a_generation_config_is_identical(tmp_path: Path, is_own: bool) -> None:
    """Plain decoding, transformers and drafters decode under the same processors, also where text differs by them."""
    settings = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    target = Target(tiny_model("llama"))
    # What the target's own config sets is not applied unless asked.
    target.model.generation_config.update(**(settings if is_own else {"repetition_penalty": 9.0}))
    artifacts = make_artifacts(target, tmp_path / "artifacts")
    found = {}
    for name, config in (("with", "model" if is_own else json.dumps(settings)), ("without", "")):
        run = replace(SMALL, rounds=1, temperatures=(0.0,), verifiers=(), generation_config=config, assisted=True)
        run = replace(run, forecast_sizes=(1,))
        with pytest.warns(UserWarning, match="repetition_penalty") if not config else contextlib.nullcontext():
            rows = compare(target, some_prompts(), artifacts, tmp_path / name, run)
        assert {row["drafter"] for row in rows if row["identical"]} == {row["drafter"] for row in rows}
        found[name] = json.loads((tmp_path / name / "bakeoff.texts.json").read_text())["texts"]
        assert rows[0]["generation_config"].get("no_repeat_ngram_size") == (2 if config else None)
        drafted = next(row for row in rows if row["family"] == "medusa")
        assert (drafted["predicted_speedup"] is None) == bool(config)
    assert found["with"] != found["without"]
