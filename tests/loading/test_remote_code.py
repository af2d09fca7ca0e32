"""Code in a model's folder runs with `--trust-remote-code` only, and standard input is not read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({mark!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
NEEDS_CODE = "its folder has Python code that must run; read that code, and pass --trust-remote-code if you trust it"


def model_folder(folder: Path, mark: Path, *, part: str) -> Path:
    """Writes a tiny Llama whose model ("model"), or tokenizer alone ("tokenizer"), is a class of the folder's code."""
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    file = folder / ("config.json" if part == "model" else "tokenizer_config.json")
    settings = json.loads(file.read_text())
    if part == "model":
        settings |= {"model_type": "own_llama", "architectures": ["OwnModel"]}
        settings["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    else:
        settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    file.write_text(json.dumps(settings))
    return folder


def run(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python with `words`; standard input answers yes to every question."""
    environment = os.environ | {"HF_MODULES_CACHE": str(home), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, input="y\n" * 9, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("part", "command"),
    [
        pytest.param("model", "generate", marks=pytest.mark.slow),
        pytest.param("tokenizer", "generate", marks=pytest.mark.slow),
        ("model", "recipe"),
    ],
)
def test_code_of_a_folder_runs_only_with_the_flag(part: str, command: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = model_folder(tmp_path / "target", mark, part=part)
    if command == "generate":
        main = "from draftsmith.cli import main; main()"
        words = ["-c", main, "generate", "w4 w5", "--target", str(folder), "--max-new-tokens", "2"]
    else:
        (tmp_path / "text.txt").write_text("w4 w5 w6 w7 " * 3000)
        data, output = str(tmp_path / "text.txt"), str(tmp_path / "run")
        words = ["recipes/lookup.py", "--target", str(folder), "--data", data, "--output", output]
    done = run(*words, home=tmp_path / "modules")
    assert not mark.exists(), "the code has run"
    assert done.returncode == (2 if command == "generate" else 1) and NEEDS_CODE in done.stderr, done.stderr
    assert "Do you wish" not in done.stdout + done.stderr and "Traceback" not in done.stderr
    if command == "recipe":
        assert not (tmp_path / "run").exists()
    done = run(*words, "--trust-remote-code", home=tmp_path / "modules")
    assert done.returncode == 0, done.stderr
    assert mark.exists()
    if command == "recipe":
        manifest = json.loads((tmp_path / "run" / "draft_config.json").read_text())
        assert manifest["made_with"]["trust_remote_code"] is True
