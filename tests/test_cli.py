"""The command line: its output and its errors."""

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import draftsmith
from draftsmith.artifacts.families import find
from draftsmith.cli import _Printer, main
from draftsmith.drafters import lookup, medusa, medusa2, trigram
from draftsmith.parts import composites
from tests.support.family import built
from tests.support.runs import environment
from tests.support.text import CONTEXT, save_target, text_target


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Returns the folders of a target and of a drafter for it."""
    root = tmp_path_factory.mktemp("cli")
    path = save_target(root / "target")
    target = draftsmith.Target.from_pretrained(path)
    draftsmith.save(lookup.Drafter(lookup.Config(), target), root / "draft", target)
    return path, str(root / "draft")


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_generate_prints_the_text_of_generate(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    path, draft = folders
    prompt = "def read(path): return path\ndef read(path):"
    texts = []
    for more in ([], ["--draft", draft]):
        main(["generate", "--target", path, *more, "--max-new-tokens", "24", prompt])
        printed = capsys.readouterr()
        texts.append(printed.out)
        assert "mean accepted length (tau)" in printed.err
    target = draftsmith.Target.from_pretrained(path)
    ids = target.tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = target.tokenizer.decode(draftsmith.generate(target, ids, max_new_tokens=24).sequences[0])
    # Bytes of an incomplete character at the end are held back.
    assert texts[0] == texts[1] == expected.rstrip("\ufffd") + "\n"


def test_generate_applies_a_generation_config_and_stops(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path, draft = folders
    target, prompt = draftsmith.Target.from_pretrained(path), "def read(path): return path\ndef read(path):"
    config = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
    ids = target.tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = draftsmith.generate(target, ids, max_new_tokens=24, generation_config=config)
    expected = target.tokenizer.decode(out.sequences[0])
    command = ["generate", "--target", path, "--draft", draft, "--max-new-tokens", "24"]
    main([*command, "--generation-config", json.dumps(config), prompt])
    assert capsys.readouterr().out == expected.rstrip("\ufffd") + "\n"
    main([*command, prompt])
    whole = capsys.readouterr().out.removesuffix("\n")
    stop = whole[len(prompt) + 4 : len(prompt) + 7]
    main([*command, "--stop", stop, prompt])
    stopped = capsys.readouterr().out.removesuffix("\n")
    assert whole.startswith(stopped) and stop in stopped[len(prompt) :] and len(stopped) < len(whole)


def test_generate_with_a_fine_tuned_target_prints_its_text(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = draftsmith.Target.from_pretrained(folders[0])
    drafter = built(medusa2, medusa2.Config(rank=4, alpha=1.0), target)
    draftsmith.save(drafter, tmp_path / "draft", target=target)
    main(["generate", "--target", folders[0], "--draft", str(tmp_path / "draft"), "--max-new-tokens", "8", "def read"])
    printed = capsys.readouterr()
    ids = target.tokenizer("def read", return_tensors="pt")["input_ids"]
    expected = drafter.target.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    assert printed.out == target.tokenizer.decode(expected[0], skip_special_tokens=True).rstrip("\ufffd") + "\n"
    assert "fine-tunes its target" in printed.err
    main(["inspect", str(tmp_path / "draft")])
    assert ", which it fine-tunes\n" in capsys.readouterr().out


def test_show_drafts_marks_accepted_tokens() -> None:
    target = text_target()
    printed: list[str] = []
    printer = _Printer(target.tokenizer, marks=True, write=printed.append)
    ids = target.tokenizer("import argparse", return_tensors="pt")["input_ids"][0]
    for piece in (ids[:2], ids[2:5], ids[5:]):
        printer.put(piece)
    text = target.tokenizer.decode
    later = ids[5:]
    assert "".join(printed) == (
        f"{text(ids[:2])}[{text(ids[2:4])}]{text(ids[4:5])}"
        + (f"[{text(later[:-1])}]" if len(later) > 1 else "")
        + text(later[-1:])
    )


def test_incomplete_characters_are_held_back() -> None:
    target = text_target()
    printed: list[str] = []
    printer = _Printer(target.tokenizer, marks=False, write=printed.append)
    for token in target.tokenizer("a é b", return_tensors="pt")["input_ids"][0]:
        printer.put(token[None])
        assert "\ufffd" not in "".join(printed)
    assert "".join(printed) == "a é b"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("path", "names the file '../secret'"),
        ("link", "is a link that leads out of"),
        ("number", "explore is -1.0; it must be at least 0"),
        ("type", "explore is '1'; expected a value of type float"),
        ("weights", "weights is not finite"),
        ("truncated", "is missing or truncated"),
        ("part", "tensor blocks.0.0.bias is not finite"),
    ],
)
def test_inspect_names_faults(tmp_path: Path, fault: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    target, folder = text_target(), tmp_path / "draft"
    heads = medusa.Drafter(medusa.Config(num_heads=1, tree=((0,),)), target)
    drafter: Any = trigram.Drafter(trigram.Config(), target)
    if fault == "part":
        own, other = (composites.Part(one) for one in (heads, lookup.Drafter(lookup.Config(), target)))
        parts = tuple(composites.part_config(part.drafter) for part in (own, other))
        drafter = find("cascade").Drafter(find("cascade").Config(parts=parts), target, [own, other])
    draftsmith.save(drafter, folder, target)
    main(["inspect", str(folder)])
    assert capsys.readouterr().err == ""

    manifest = json.loads((folder / "draft_config.json").read_text())
    if fault == "path":
        manifest["files"].append("../secret")
    elif fault == "link":
        (folder / "keys.npy").rename(tmp_path / "keys.npy")
        (folder / "keys.npy").symlink_to(tmp_path / "keys.npy")
    elif fault in ("number", "type"):
        manifest["config"]["explore"] = -1.0 if fault == "number" else "1"
    elif fault == "weights":
        np.save(folder / "weights.npy", np.array([0.5, np.nan], np.float32))
    elif fault == "truncated":
        (folder / "keys.npy").write_bytes((folder / "keys.npy").read_bytes()[:20])
    else:
        file = folder / "drafters" / "0" / "model.safetensors"
        save_file(load_file(file) | {"blocks.0.0.bias": torch.full((target.hidden_size,), torch.nan)}, file)
    (folder / "draft_config.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(folder)])
    errors = capsys.readouterr().err
    assert stop.value.code == 1 and errors.count("\n") == 1
    assert errors.startswith("draftsmith: fault: ") and message in errors


def test_inspect_prints_the_manifest(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", folders[1]])
    printed = capsys.readouterr().out
    assert "family lookup" in printed and '"num_draft": 10' in printed and "draft_config.json" in printed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tmperature", "1"], "did you mean --temperature?"),
        (["--top-p", "1.5"], "top_p is 1.5"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--generation-config", '{"min_q": 1}'], "no setting 'min_q'; did you mean 'min_p'?"),
        (["--generation-config", "nowhere"], "generation config 'nowhere' cannot be read"),
        (["--verifier", "gredy"], "unknown verifier 'gredy'"),
        (["--length", "long"], "unknown length policy 'long'"),
        (["--draft", "nowhere"], "artifact nowhere: no such folder"),
        (["--target", "nowhere"], "'nowhere' is not a local folder"),
        (["--max-new-tokens", str(CONTEXT)], f"context of {CONTEXT}"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
    ],
)
def test_errors_are_one_sentence_before_weights_load(
    folders: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.setattr(draftsmith.Target, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    assert expected in error_of(capsys, "generate", "--target", folders[0], *arguments, "some text")


def test_empty_prompts_and_artifacts_of_other_targets_are_rejected(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, draft = folders
    assert "the prompt is empty" in error_of(capsys, "generate", "--target", path, "")
    other = text_target(seed=1)
    other.model.save_pretrained(tmp_path)
    other.tokenizer.save_pretrained(tmp_path)
    assert "was made for target" in error_of(capsys, "generate", "--target", str(tmp_path), "--draft", draft, "x = 1")
    assert "is not a draftsmith artifact" in error_of(capsys, "inspect", path)


def test_input_that_is_no_text_is_named(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ["--target", folders[0]]
    assert r"the text is not UTF-8: character 1 is '\udcff'" in error_of(capsys, "generate", *target, "a\udcff")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), "utf-8"))
    assert "standard input is not UTF-8 text (byte 1)" in error_of(capsys, "generate", *target, "-")
    monkeypatch.setattr("sys.stdin", None)
    assert "standard input is closed" in error_of(capsys, "generate", *target, "-")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_no_file_can_have_are_named(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    message = "cannot be the name of a file or folder"
    assert message in error_of(capsys, "inspect", name)
    assert message in error_of(capsys, "export", folders[1], "--to", "vllm", str(tmp_path / name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("output", "status", "message"),
    [("| head -c 1 >/dev/null", 141, ""), (">/dev/full", 2, "draftsmith: no space left to write")],
)
def test_output_that_cannot_be_written_ends_without_a_traceback(
    folders: tuple[str, str], output: str, status: int, message: str
) -> None:
    code = "import sys; from draftsmith.cli import main; main(sys.argv[1:])"
    words = [sys.executable, "-c", code, "generate", "--target", folders[0], "--max-new-tokens", "99", "def f("]
    command = f"{shlex.join(words)} {output}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr.count("\n")) == (status, int(bool(message))) and message in done.stderr
