"""Model cards: their contents, when they are rewritten, and how hand-edited ones are kept."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import draftsmith
from draftsmith import Target
from draftsmith.artifacts import model_card
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.cli import main
from draftsmith.drafters import lookup, medusa, medusa2
from tests.support.family import built
from tests.support.models import tiny_target

HEADS = medusa.Config(num_heads=2, num_blocks=1, tree=((0,), (0, 0)))
RECORD = {
    "seed": 3,
    "settings": {"data": "runs/mine"},
    "data_fingerprint": "d474",
    "measured_acceptance": {"acceptance": 1.25, "right_0": 0.5},
    "train_s": 70.1,
}


def save(folder: Path, target: Target | None = None) -> Path:
    target = target or tiny_target("llama")
    draftsmith.save(built(medusa, HEADS, target), folder, target=target, record=RECORD)
    return folder


def metadata_of(folder: Path) -> dict[str, Any]:
    """Returns the card's metadata as read by the hub's own parser."""
    return ModelCard.load(folder / "README.md").data.to_dict()


def row(**changes: Any) -> dict[str, Any]:
    """Returns a row of a comparison."""
    found = {"drafter": "heads", "family": "medusa", "is_ablation": False, "temperature": 0.0, "batch_size": 1}
    found |= {"tau": 1.5, "tokens_per_s": 1234.5, "speedup": 1.25, "identical": True, "lossless": True}
    found |= {"accepted_per_depth": [0.5, 0.25], "num_prompts": 8, "max_new_tokens": 32, "dtype": "float32"}
    found |= {"hardware": "a test machine", "threads": 1, "rounds": 3, "commit": "abc", "torch": "2", "target": "tiny"}
    return found | {"transformers_version": "5"} | changes


def test_card_contains_provenance_and_usage(tmp_path: Path) -> None:
    text = (save(tmp_path / "heads") / "README.md").read_text()
    manifest = read_manifest(tmp_path / "heads")
    assert metadata_of(tmp_path / "heads") == {
        "library_name": "draftsmith",
        "tags": ["draftsmith", "speculative-decoding", "medusa"],
    }
    for expected in (
        manifest["target"]["fingerprint"],
        "| data | `runs/mine`, fingerprint d474 |",
        f"| command | `{manifest['command']}` |",
        "| seed | 3 |",
        "| training | 70 s |",
        "2,112 parameters, 0.01 MB",
        "| acceptance | 1.25 |",
        "It is lossless",
        'draftsmith.load("path/to/this/folder", target)',
        "draftsmith export path/to/this/folder --to vllm OUT\n",
    ):
        assert expected in text
    assert model_card.body(text) is not None


def test_card_names_a_base_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target("llama")
    monkeypatch.setattr(target, "name", "someone/llama")
    assert metadata_of(save(tmp_path / "heads", target))["base_model"] == "someone/llama"


def test_card_of_a_drafter_that_fine_tunes_its_target(tmp_path: Path) -> None:
    target = tiny_target("llama")
    draftsmith.save(built(medusa2, medusa2.Config(rank=4, alpha=1.0), target), tmp_path / "tuned", target=target)
    text = (tmp_path / "tuned" / "README.md").read_text()
    assert "It has fine-tuned its target" in text and "It is lossless" not in text
    assert "draftsmith.generate(drafter.target, ids" in text


def test_card_of_an_artifact_without_weights(tmp_path: Path) -> None:
    target = tiny_target("llama")
    draftsmith.save(lookup.Drafter(lookup.Config(), target), tmp_path / "lookup", target=target)
    text = (tmp_path / "lookup" / "README.md").read_text()
    assert "| size |" not in text and "## Measured" not in text


def test_python_code_of_the_card_runs(tmp_path: Path) -> None:
    from tests.support.text import save_target, text_target

    path = save_target(tmp_path / "target")
    target = text_target()
    target.name = path
    draftsmith.save(lookup.Drafter(lookup.Config(), target), tmp_path / "lookup", target=target)
    text = (tmp_path / "lookup" / "README.md").read_text().replace(model_card.PLACEHOLDER, str(tmp_path / "lookup"))
    code = text.split("```python\n")[1].split("```")[0].replace("max_new_tokens=64", "max_new_tokens=4")
    exec(compile(code, "README.md", "exec"), {})


def test_save_keeps_hand_edited_cards(tmp_path: Path) -> None:
    folder = save(tmp_path / "heads")
    for number in (1, 2):
        (folder / "README.md").write_text(f"by hand, {number}")
        with pytest.warns(UserWarning, match=r"README.md was edited by hand; it is kept as README.edited"):
            save(folder)
    assert (folder / "README.edited.md").read_text() == "by hand, 1"
    assert (folder / "README.edited2.md").read_text() == "by hand, 2"
    edited = (folder / "README.md").read_text().replace("Loading", "How to load")
    (folder / "README.md").write_text(edited)
    with pytest.warns(UserWarning, match="it is kept as README.edited3.md"):
        save(folder)
    assert (folder / "README.edited3.md").read_text() == edited
    assert model_card.body((folder / "README.md").read_text()) is not None


def test_save_replaces_an_unedited_card_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = save(save(tmp_path / "heads"))
    assert not [warning for warning in recwarn if warning.category is UserWarning]
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "draft_config.json", "model.safetensors"]


def test_card_command_adds_the_rows_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, results = save(tmp_path / "heads"), tmp_path / "bakeoff.json"
    rows = [
        row(predicted_speedup=1.2),
        row(temperature=1.0, speedup=0.8, identical=None),
        row(drafter="plain", family=None),
        row(drafter="other", tau=9.9),
    ]
    results.write_text(json.dumps(rows))
    main(["card", str(folder), "--results", str(results)])
    assert capsys.readouterr().out == f"Written: {folder / 'README.md'}\n"
    text = (folder / "README.md").read_text()
    assert "| 0 | 1 | 1.50 | 1,234 | 1.25x | 1.20x | identical | 50 25 |" in text
    assert "| 1 | 1 | 1.50 | 1,234 | 0.80x slower |  | lossless | 50 25 |" in text
    assert "a test machine" in text and "9.9" not in text and text.count("| 1.50 |") == 2
    (folder / "README.md").write_text("by hand")
    main(["card", str(folder)])
    assert "the edited card is kept as README.edited.md" in capsys.readouterr().out
    assert (folder / "README.edited.md").read_text() == "by hand"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[", "cannot be read"),
        ("{}", "is not a comparison"),
        ('[{"drafter": "heads", "family": "medusa"}]', "is not a comparison, or lacks parts of one"),
        (json.dumps([row(drafter="other"), row(family="lm")]), "no drafter called heads of family medusa was compared"),
    ],
)
def test_card_command_rejects_a_file_that_is_no_comparison_of_the_drafter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, sentence: str
) -> None:
    folder, results = save(tmp_path / "heads"), tmp_path / "bakeoff.json"
    before = (folder / "README.md").read_text()
    results.write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["card", str(folder), "--results", str(results)])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in message and message.count("\n") == 1
    assert (folder / "README.md").read_text() == before
