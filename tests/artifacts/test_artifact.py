"""Artifacts: save and load round trips, checks against the target, errors for broken files, atomic writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import draftsmith
from draftsmith import Target
from draftsmith.artifacts import files
from draftsmith.artifacts.artifact import own_files, read_manifest
from draftsmith.drafters import early_exit, lm, lookup, medusa
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
    assert manifest["config"] == {
        "num_heads": 2,
        "num_blocks": 2,
        "own_head": False,
        "shortlist": 0,
        "tree": [[0], [1], [0, 0]],
    }
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


OUTSIDE = (
    "../secret.txt",
    "/etc/hostname",
    "a/../../secret.txt",
    "..",
    "",
    ".",
    "a//b",
    "C:\\x",
    "..\\x",
    "a\0b",
    7,
    None,
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_listed_files_must_lie_in_the_artifact(folder: Path, name: Any) -> None:
    (folder.parent / "secret.txt").write_text("secret")
    edit(folder, files=["model.safetensors", name])
    check_error(folder, "it must be a relative path without '..'")
    with pytest.raises(ValueError, match="names the file"):
        own_files(folder)


@pytest.mark.parametrize("link", ["model.safetensors", "draft_config.json", "notes/deep.txt"])
def test_links_out_of_the_artifact_are_rejected(folder: Path, link: str) -> None:
    outside, file = folder.parent / "outside", folder / link
    file.parent.mkdir(exist_ok=True)
    shutil.move(file, outside) if file.exists() else outside.write_text("secret")
    file.symlink_to(outside)
    if link.startswith("notes"):
        edit(folder, files=["model.safetensors", link])
    check_error(folder, "is a link that leads out of")
    file.unlink()
    shutil.copy(outside, file)
    draftsmith.load(folder, tiny_target("llama"))
    (folder / "copy").symlink_to(link)  # a link within the folder
    edit(folder, files=["model.safetensors", "copy"])
    draftsmith.load(folder, tiny_target("llama"))


def test_links_into_the_blobs_of_a_hub_cache_are_accepted(folder: Path) -> None:
    repository = folder.parent / "models--someone--heads"
    snapshot = repository / "snapshots" / "c0"
    snapshot.parent.mkdir(parents=True)
    shutil.move(folder, snapshot)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        shutil.move(file, repository / "blobs" / str(number))
        file.symlink_to(f"../../blobs/{number}")
    draftsmith.load(snapshot, tiny_target("llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": {"name": "t", "fingerprint": None}}, "target.fingerprint is None, expected str"),
        ({"target": {"name": "t", "fingerprint": 5}}, "target.fingerprint is 5, expected str"),
        ({"vocab_size": "64"}, "vocab_size is '64', expected int"),
        ({"tokenizer_hash": 5}, "tokenizer_hash is 5, expected str or null"),
        ({"files": ["x" * 5000]}, "has no file 'x+'... .File name too long"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_entries_of_other_types_are_rejected(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    check_error(folder, message)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_weights_that_are_no_real_numbers_are_rejected(folder: Path, dtype: torch.dtype) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, folder / "model.safetensors")
    check_error(folder, f"holds {dtype}, expected torch.float32")


def test_save_replaces_no_device_and_names_impossible_paths(tmp_path: Path) -> None:
    """A device in place of a folder would be exchanged for the artifact, as /dev/null for one who may do so."""
    drafter = lookup.Drafter(lookup.Config(), tiny_target("llama"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for path, message in {
        "pipe": "pipe is a device; name a folder",
        "x" * 300: "cannot be the name of a file or folder: File name too long",
        "a\0b": "cannot be the name of a file or folder: embedded null byte",
        "file/below": "file cannot hold a folder .Not a directory.|file cannot hold a folder .File exists.",
    }.items():
        with pytest.raises(ValueError, match=message):
            draftsmith.save(drafter, tmp_path / path, drafter.target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
    with pytest.raises(ValueError, match="record has 'config', an entry that belongs to the manifest itself"):
        draftsmith.save(drafter, tmp_path / "new", drafter.target, record={"config": {}})


def test_load_names_a_missing_file(folder: Path) -> None:
    edit(folder, files=["model.safetensors", "gone.npy"])
    check_error(folder, "gone.npy is missing; the artifact must be made again")
    edit(folder, files={"model.safetensors": 1})
    check_error(folder, "it must list names")


def test_save_does_not_follow_the_link_of_a_readme(folder: Path) -> None:
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(folder.parent / "secret.txt")
    target = tiny_target("llama")
    with pytest.raises(ValueError, match=r"README.md is a link that leads out of"):
        draftsmith.save(built(medusa, HEADS, target), folder, target=target)
    assert "secret" not in str(read_files(folder).keys())


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
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    with pytest.raises((OSError, ValueError)):
        draftsmith.save(built(medusa, HEADS, target), folder, target=target, record=record)
    assert read_files(folder.parent) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name] * exists


def test_save_replaces_an_artifact_in_one_operation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process killed at any moment leaves a whole artifact at its place."""
    target = tiny_target("llama")
    monkeypatch.setattr(Path, "rename", lambda self, to: pytest.fail("the artifact was moved away"))
    draftsmith.save(built(medusa, HEADS, target), folder, target=target)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    draftsmith.load(folder, target)


def dead_process() -> int:
    """Returns the number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_save_removes_staging_folders_of_dead_processes_only(folder: Path) -> None:
    parent, target = folder.parent, tiny_target("llama")
    dead, alive = dead_process(), os.getppid()
    kept = [f".heads.staging-{alive}", f".heads2.staging-{dead}", ".heads.staging-x", f".heads.other-{dead}"]
    for name in (*kept, f".heads.staging-{dead}", f".heads.retired-{dead}", f".heads.retired-{os.getpid()}"):
        (parent / name).mkdir()
        (parent / name / "big.bin").write_text("x")
    draftsmith.save(built(medusa, HEADS, target), folder, target=target)
    assert sorted(path.name for path in parent.iterdir()) == sorted([*kept, folder.name])


def test_save_restores_an_artifact_that_a_killed_process_had_moved(folder: Path) -> None:
    before = read_files(folder)
    folder.rename(folder.with_name(f".heads.retired-{dead_process()}"))
    drafter = lookup.Drafter(lookup.Config(), tiny_target("llama"))
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        draftsmith.save(drafter, folder, target=tiny_target("llama"), record={"seed": object()})
    with pytest.raises(RuntimeError), files.atomic_folder(folder, marker="draft_config.json"):
        raise RuntimeError("interrupted")
    assert read_files(folder) == before


def test_save_through_a_link_replaces_its_target(folder: Path) -> None:
    link, target = folder.parent / "latest", tiny_target("llama")
    link.symlink_to(folder)
    draftsmith.save(lookup.Drafter(lookup.Config(), target), link, target=target)
    assert link.is_symlink() and read_manifest(folder)["family"] == "lookup"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["heads", "latest"]


def test_drafters_are_saved_and_loaded_for_their_own_target_only(tmp_path: Path) -> None:
    target = tiny_target("llama")
    drafter = lookup.Drafter(lookup.Config(), target)
    other = Target(tiny_model("llama", vocab_size=80))
    with pytest.raises(ValueError, match="the drafter was made for target LlamaForCausalLM with weights") as error:
        draftsmith.save(drafter, tmp_path / "artifact", other)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="or another tokenizer"):
        draftsmith.save(drafter, tmp_path / "artifact", Target(target.model, tiny_tokenizer()))
    for wrong in ("a/name", target.model):
        with pytest.raises(ValueError, match="target is .*; pass draftsmith.Target"):
            draftsmith.save(drafter, tmp_path / "artifact", wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="target is .*; pass draftsmith.Target"):
            draftsmith.load(tmp_path / "artifact", wrong)  # type: ignore[arg-type]
    for path in (None, 5, drafter):
        with pytest.raises(ValueError, match=r"path is .*; it must be the folder of an artifact"):
            draftsmith.save(drafter, path, target)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"path is .*; it must be the folder of an artifact"):
            draftsmith.load(path, target)  # type: ignore[arg-type]
    for record, message in (
        ([1], "record is a list"),
        ({"a": object()}, "a value cannot be written as JSON: Object of"),
    ):
        with pytest.raises(ValueError, match=message):
            draftsmith.save(drafter, tmp_path / "artifact", target, record=record)  # type: ignore[arg-type]
    for other in ("runs/lookup", lookup.Drafter, None):
        with pytest.raises(ValueError, match=r"drafter is .*; pass the drafter that draftsmith.load"):
            draftsmith.save(other, tmp_path / "artifact", target)
    assert not any(tmp_path.iterdir()), "nothing was written"
    draftsmith.save(drafter, tmp_path / "artifact", Target(target.model))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_load_and_save_reject_weights_that_are_not_finite(folder: Path, value: float) -> None:
    file, target = folder / "model.safetensors", tiny_target("llama")
    before, drafter = read_files(folder), draftsmith.load(folder, target)
    drafter.blocks[1][0].bias[3] = value
    with pytest.raises(ValueError, match=r"tensor blocks.1.0.bias is not finite"):
        draftsmith.save(drafter, folder, target)
    assert read_files(folder) == before
    tensors = load_file(file)
    tensors["blocks.1.0.bias"][3] = value
    save_file(tensors, file)
    check_error(folder, "model.safetensors: tensor blocks.1.0.bias is not finite")


def test_drafter_without_tensors_of_its_own_is_loaded(tmp_path: Path) -> None:
    target, config = tiny_target("llama"), early_exit.Config(own_norm=False)
    draftsmith.save(early_exit.Drafter(config, target), tmp_path / "exit", target)
    assert draftsmith.load(tmp_path / "exit", target).config == config


def test_load_rejects_weights_that_overflow_in_the_dtype_of_the_target(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["blocks.0.0.weight"][0, 0] = 3.4e38
    save_file(tensors, file)
    draftsmith.load(folder, tiny_target("llama"))
    half = Target(tiny_model("llama").to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"in the dtype of the target: tensor blocks.0.0.weight is not finite"):
        draftsmith.load(folder, half)


def test_check_replaceable_ignores_the_incomplete_marker_of_a_killed_process(tmp_path: Path) -> None:
    (tmp_path / ".store.json.part-123").write_text("{")
    files.check_replaceable(tmp_path, marker="store.json")
    (tmp_path / "other.json.part-123").write_text("{")
    with pytest.raises(ValueError, match="contains other files"):
        files.check_replaceable(tmp_path, marker="store.json")


def save_and_exit(folder: Path, operation: int) -> bool:
    """Saves over an artifact in a child process that ends before a file operation; returns whether it ended before."""
    child = os.fork()
    if child == 0:
        count = iter(range(operation))

        def watched(function: Any) -> Any:
            def run(*arguments: Any, **options: Any) -> Any:
                if next(count, None) is None:
                    os._exit(1)
                return function(*arguments, **options)

            return run

        for owner, name in ((Path, "mkdir"), (Path, "rename"), (Path, "write_text"), (files, "_exchange")):
            setattr(owner, name, watched(getattr(owner, name)))
        shutil.rmtree = watched(shutil.rmtree)
        target = tiny_target("llama")
        draftsmith.save(lookup.Drafter(lookup.Config(max_ngram=7), target), folder, target)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.parametrize("can_exchange", [True, False])
def test_save_survives_being_killed_before_any_file_operation(
    tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system cannot exchange folders, the next save brings the artifact back."""
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target, folder, operation = tiny_target("llama"), tmp_path / "draft", 0
    draftsmith.save(lookup.Drafter(lookup.Config(), target), folder, target)
    while save_and_exit(folder, operation):
        operation += 1
        if can_exchange:
            assert draftsmith.load(folder, target).config.max_ngram in (3, 7)
        with pytest.raises(RuntimeError), files.atomic_folder(folder, marker="draft_config.json"):
            raise RuntimeError("interrupted")
        assert draftsmith.load(folder, target).config.max_ngram in (3, 7)
        assert [path.name for path in tmp_path.iterdir()] == ["draft"]
    assert operation >= 6 and draftsmith.load(folder, target).config.max_ngram == 7
