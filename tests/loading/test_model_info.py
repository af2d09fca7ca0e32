"""Configurations of targets that cannot be used are named in one sentence, before weights load."""

from pathlib import Path

import pytest

from draftsmith.loading.model_info import read_target_info
from tests.support.models import tiny_config


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[" * 100_000, "maximum recursion depth"),
        ("config.json", "null", "cannot be read"),
        ("config.json", '{"model_type": "llama", "num_hidden_layers": "3"}', "expected int, got str"),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}', "modulo by zero"),
        ("config.json", '{"model_type": "llama", "dtype": "float99"}', "no attribute 'float99'"),
        ("generation_config.json", "{", "generation_config.json cannot be read"),
        ("generation_config.json", "[]", "generation_config.json cannot be read"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id holds '2'; it must be a token id"),
        ("generation_config.json", '{"eos_token_id": [[2]]}', r"eos_token_id holds \[2\]; it must be a token id"),
    ],
    ids=lambda value: value[:40],
)
def test_broken_configurations_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_target_info(str(tmp_path))
    assert "\n" not in str(error.value)


def test_names_that_no_file_can_have_are_named() -> None:
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="cannot be the name of a file or folder"):
            read_target_info(name)
