"""Artifacts: save and load round trips, checks against the target, errors for broken files, atomic writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import draftsmith
from draftsmith import Target
from draftsmith.artifacts.artifact import read_manifest
from draftsmith.drafters import lm, lookup, medusa
from tests.support.family import built
from tests.support.models import VOCAB_SIZE, tiny_config, tiny_model, tiny_target, tiny_tokenizer

HEADS = medusa.Config(num_heads=2, num_blocks=2, tree=((0,), (1,), (0, 0)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact of Medusa heads for the tiny Llama."""
    path = tmp_path / "heads"
    draftsmith.save(built(medusa, HEADS, tiny_target("llama")), path, target=tiny_target("llama"), record={"seed": 3})
    return path


def edit(folder: Path, **changes: Any) -> None:
    """Changes entries of the manifest and removes those that are None."""
    manifest = json.loads((folder / "draft_config.json").read_text()) | changes
    kept = {key: value for key, value in manifest.items() if value is not None}
    (folder / "draft_config.json").write_text(json.dumps(kept))


def check_error(folder: Path, message: str, target: Target | None = None) -> None:
    """Asserts that loading raises a one-line ValueError that matches `message`."""
    with pytest.raises(ValueError, match=message) as error:
        draftsmith.load(folder, target or tiny_target("llama"))
    assert "\n" not in str(error.value)


def test_manifest_contents(folder: Path) -> None:
    manifest = read_manifest(folder)
    target = tiny_target("llama")
    assert manifest["format_version"] == 1 and manifest["family"] == "medusa"
    assert manifest["config"] == {"num_heads": 2, "num_blocks": 2, "own_head": False, "tree": [[0], [1], [0, 0]]}
    assert manifest["target"] == {"name": target.name, "fingerprint": target.fingerprint}
    assert manifest["vocab_size"] == VOCAB_SIZE and manifest["tokenizer_hash"] is None
    assert manifest["layer_index"].startswith("hidden[0] is the embedding output")
    assert manifest["acceptance_mode"] == "lossless"
    assert {"python", "torch", "transformers"} <= set(manifest["versions"])
    assert manifest["command"] and manifest["seed"] == 3
    assert manifest["files"] == ["model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "draft_config.json", "model.safetensors"]


def test_weights_exclude_the_target(folder: Path) -> None:
    drafter = draftsmith.load(folder, tiny_target("llama"))
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == {f"blocks.{k}.{i}.{kind}" for k in (0, 1) for i in (0, 1) for kind in ("weight", "bias")}
    assert not drafter.training and not any(weight.requires_grad for weight in drafter.parameters())
    loaded, saved = drafter.config, HEADS
    assert (loaded.num_heads, [list(path) for path in loaded.tree]) == (2, [list(path) for path in saved.tree])


def test_files_are_readable_like_their_folder(folder: Path) -> None:
    expected = folder.stat().st_mode & 0o666
    assert {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()} == {
        file.name: expected for file in folder.iterdir()
    }


def test_tied_weights_are_stored_once_and_stay_tied_when_loaded(tmp_path: Path) -> None:
    config = lm.Config(model=tiny_config("llama", tie_word_embeddings=True).to_dict())
    drafter = built(lm, config, tiny_target("llama"))
    draftsmith.save(drafter, tmp_path / "small", target=tiny_target("llama"))
    names_stored = set(load_file(tmp_path / "small" / "model.safetensors"))
    assert "model.model.embed_tokens.weight" in names_stored and "model.lm_head.weight" not in names_stored
    loaded = draftsmith.load(tmp_path / "small", tiny_target("llama"))
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    ids = torch.arange(6)[None]
    assert torch.equal(loaded.model(ids).logits, drafter.model(ids).logits)


def test_equal_but_untied_weights_are_all_stored(tmp_path: Path) -> None:
    """Untied LM heads start as copies of the target's head."""
    config = medusa.Config(num_heads=2, own_head=True, tree=((0,), (0, 0)))
    target = tiny_target("llama")
    draftsmith.save(medusa.Drafter(config, target), tmp_path / "own", target=target)
    loaded = draftsmith.load(tmp_path / "own", target)
    head = target.model.lm_head.weight
    assert all(torch.equal(output.weight, head) for output in loaded.outputs)
    assert len({output.weight.data_ptr() for output in (*loaded.outputs, target.model.lm_head)}) == 3


def test_family_without_weights_is_saved_as_a_manifest(tmp_path: Path) -> None:
    target = tiny_target("gpt2")
    draftsmith.save(lookup.Drafter(lookup.Config(max_ngram=5), target), tmp_path / "lookup", target=target)
    assert sorted(path.name for path in (tmp_path / "lookup").iterdir()) == ["README.md", "draft_config.json"]
    assert draftsmith.load(str(tmp_path / "lookup"), target).config == lookup.Config(max_ngram=5)


def test_load_rejects_another_target(folder: Path) -> None:
    check_error(folder, "was made for target LlamaForCausalLM with weights", Target(tiny_model("llama", seed=3)))
    check_error(folder, "was made for target", tiny_target("mistral"))
    smaller = Target(tiny_model("llama", vocab_size=VOCAB_SIZE - 1))
    check_error(folder, f"was made for a vocabulary of {VOCAB_SIZE}, and target LlamaForCausalLM has 63", smaller)


def test_load_rejects_another_tokenizer(tmp_path: Path) -> None:
    model = tiny_model("llama")
    target = Target(model, tiny_tokenizer())
    draftsmith.save(lookup.Drafter(lookup.Config(), target), tmp_path / "lookup", target=target)
    assert read_manifest(tmp_path / "lookup")["tokenizer_hash"] == target.tokenizer_hash
    draftsmith.load(tmp_path / "lookup", Target(model, tiny_tokenizer()))
    draftsmith.load(tmp_path / "lookup", Target(model))  # without a tokenizer there is nothing to compare
    check_error(tmp_path / "lookup", "was made with another tokenizer", Target(model, tiny_tokenizer(prefix="v")))


def test_load_names_a_broken_weights_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        check_error(folder, "model.safetensors is truncated or not a safetensors file")
    file.unlink()
    check_error(folder, "model.safetensors is missing; the artifact must be made again")


def test_load_names_missing_unknown_and_misshapen_tensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "blocks.1.0.bias"}, file)
    check_error(folder, "tensor 'blocks.1.0.bias' is missing")
    save_file(tensors | {"blocks.9.weight": torch.zeros(2)}, file)
    check_error(folder, "tensor 'blocks.9.weight' is unknown to this drafter")
    save_file(tensors | {"blocks.0.1.weight": torch.zeros(32, 31)}, file)
    check_error(folder, r"'blocks.0.1.weight' has shape \(32, 31\), expected \(32, 32\)")


def test_load_names_a_broken_manifest(folder: Path, tmp_path: Path) -> None:
    edit(folder, config={"num_heads": 2, "num_block": 2})
    check_error(folder, "unknown setting 'num_block'; did you mean 'num_blocks'?")
    edit(folder, config={"num_heads": 0, "tree": [[0]]})
    check_error(folder, "num_heads is 0; it must be at least 1")
    edit(folder, config={"num_heads": 2}, family="medsua")
    check_error(folder, "unknown drafter family 'medsua'; did you mean 'medusa'?")
    edit(folder, format_version=2)
    check_error(folder, "has format version 2; this version of draftsmith reads 1")
    edit(folder, vocab_size=None)
    check_error(folder, "draft_config.json lacks vocab_size")
    for text in ("{broken", "", "[]", "3", "null", '{"format_version": 1}'):
        (folder / "draft_config.json").write_text(text)
        check_error(folder, "draft_config.json")
    (folder / "draft_config.json").write_bytes(b"\xff\xfe{}")
    check_error(folder, "is not valid JSON")
    (folder / "draft_config.json").unlink()
    check_error(folder, "is not a draftsmith artifact: it has no draft_config.json")
    check_error(tmp_path / "nowhere", "no such folder")


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_save_keeps_a_folder_of_other_files(tmp_path: Path) -> None:
    target = tiny_target("llama")
    drafter = built(medusa, HEADS, target)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.txt").write_text("important")
    with pytest.raises(ValueError, match="thesis contains other files"):
        draftsmith.save(drafter, other, target=target)
    with pytest.raises(ValueError, match=r"chapter1.txt is a file; name a folder"):
        draftsmith.save(drafter, other / "chapter1.txt", target=target)
    assert read_files(tmp_path) == {"thesis/chapter1.txt": b"important"}
    (tmp_path / "empty").mkdir()
    draftsmith.save(drafter, tmp_path / "empty", target=target)
    draftsmith.save(drafter, tmp_path / "new" / "deep", target=target)
    draftsmith.load(tmp_path / "new" / "deep", target)


def test_save_replaces_all_files_of_an_artifact(folder: Path) -> None:
    """Replaced by a drafter without weights: no file of the first artifact remains."""
    target = tiny_target("llama")
    draftsmith.save(lookup.Drafter(lookup.Config(), target), folder, target=target)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "draft_config.json"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("failure", ["weights", "manifest", "rename"])
@pytest.mark.parametrize("exists", [True, False])
def test_failed_save_keeps_the_previous_artifact(
    folder: Path, failure: str, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exists:
        shutil.rmtree(folder)
    before = read_files(folder.parent)
    target = tiny_target("llama")
    record: dict[str, Any] = {}
    if failure == "weights":

        def truncated(tensors: Any, file: Path) -> None:
            file.write_bytes(b"half of ")
            raise OSError("no space left on device")

        monkeypatch.setattr("draftsmith.artifacts.artifact.save_file", truncated)
    elif failure == "manifest":
        record = {"measured_acceptance": object()}
    else:
        rename = Path.rename

        def fail_final_rename(self: Path, to: Path) -> Path:
            if "staging" in self.name:
                raise OSError("disk error")
            return rename(self, to)

        monkeypatch.setattr(Path, "rename", fail_final_rename)
    with pytest.raises((OSError, TypeError)):
        draftsmith.save(built(medusa, HEADS, target), folder, target=target, record=record)
    assert read_files(folder.parent) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name] * exists
