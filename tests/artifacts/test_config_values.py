"""Numbers of configurations: every field of every family has a finite range, checked on load and from flags."""

import dataclasses
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import draftsmith
from draftsmith.artifacts import json_text
from draftsmith.artifacts.artifact import make_config
from draftsmith.artifacts.config_values import LARGEST
from draftsmith.artifacts.families import find, names
from draftsmith.drafters import lookup, trigram
from tests.support.models import tiny_target
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

FAMILIES = names()
TRAINERS = [
    name
    for name in (path.stem for path in sorted(Path(importlib.import_module("trainers").__path__[0]).glob("*.py")))
    if hasattr(importlib.import_module(f"trainers.{name}"), "Settings")
]
SEEDS = ("seed", "chance")
"""Settings of which every whole number is valid."""


def numbers_beyond_range(instance: Any) -> Iterator[tuple[str, Any]]:
    """Yields (field, value) with a number that no setting can have, for each number in a dataclass."""
    for field in dataclasses.fields(instance):
        value, name = getattr(instance, field.name), field.name
        is_list = isinstance(value, tuple) and all(isinstance(one, int | float) for one in value)
        if isinstance(value, bool) or not (isinstance(value, int | float) or (is_list and value)):
            continue
        for wrong in (
            (math.nan, math.inf, -math.inf, -(2**40), 2**40) if name not in SEEDS else (math.nan, math.inf, -1)
        ):
            yield name, (wrong,) if is_list else wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_config_rejects_numbers_beyond_its_range(family: str) -> None:
    example = importlib.import_module(f"tests.drafters.test_{family}").EXAMPLE
    config = example(tiny_target("llama")) if callable(example) else example
    config = getattr(config, "config", config)
    for name, value in numbers_beyond_range(config):
        with pytest.raises(ValueError, match="must|multiple|fraction|at least|list hidden|apply to"):
            pytest.fail(f"{name}={value}: {dataclasses.replace(config, **{name: value})}")


@pytest.mark.parametrize("trainer", [*TRAINERS, "run"])
def test_settings_reject_numbers_beyond_their_range(trainer: str) -> None:
    kind = RunSettings if trainer == "run" else importlib.import_module(f"trainers.{trainer}").Settings
    fields = dataclasses.fields(kind)
    required = [one.name for one in fields if one.default is one.default_factory is dataclasses.MISSING]
    settings = kind(**dict.fromkeys(required, "x"))
    for name, value in numbers_beyond_range(settings):
        with pytest.raises(ValueError, match="must|multiple|fraction|at least|list hidden|apply to"):
            pytest.fail(f"{name}={value}: {dataclasses.replace(settings, **{name: value})}")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", ".nan"])
def test_flags_reject_numbers_that_are_not_finite(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = importlib.import_module("trainers.trigram").Settings
    with pytest.raises(SystemExit) as stop:
        parse_settings(settings, RunSettings, description=None, argv=["--explore", value, "--learning-rate", value])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 2
    assert "explore takes a" in message and "learning-rate takes a" in message


def test_flags_reject_whole_numbers_of_more_than_64_bits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_settings(RunSettings, description=None, argv=["--seed", str(LARGEST + 1)])
    assert "seed takes a whole number of at most 64 bits, not '9223372036854775808'" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact of a family whose compiled code reads its configuration."""
    target = tiny_target("llama")
    draftsmith.save(trigram.Drafter(trigram.Config(), target), tmp_path / "trigram", target)
    return tmp_path / "trigram"


@pytest.mark.parametrize("name", ["explore", "explore_base", "bump", "largest", "num_iterations", "chance", "depth"])
@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 25, '"5"', "null", "true", "[1]"])
def test_load_rejects_numbers_that_are_not_numbers(folder: Path, name: str, text: str) -> None:
    file = folder / "draft_config.json"
    manifest = json.loads(file.read_text())
    manifest["config"][name] = "here"
    file.write_text(json.dumps(manifest).replace('"here"', text))
    with pytest.raises(ValueError, match="draft_config.json") as error:
        draftsmith.load(folder, tiny_target("llama"))
    assert "\n" not in str(error.value)


def test_save_writes_no_number_that_is_not_finite(tmp_path: Path) -> None:
    target = tiny_target("llama")
    with pytest.raises(ValueError, match="not JSON compliant"):
        draftsmith.save(lookup.Drafter(lookup.Config(), target), tmp_path / "a", target, record={"loss": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_make_config_checks_types() -> None:
    for values, message in (
        ({"num_draft": "5"}, "num_draft is '5'; expected a value of type int"),
        ({"num_draft": 5.0}, "num_draft is 5.0"),
        ({"max_ngram": True}, "max_ngram is True"),
        ([1], "it must be an object of settings"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(lookup.Config, values, "here")  # type: ignore[arg-type]
    assert make_config(trigram.Config, {"explore": 32, "maker": "full"}, "here").explore == 32
    with pytest.raises(ValueError, match="here: the setting 'model' is missing"):
        make_config(find("lm").Config, {}, "here")
    with pytest.raises(ValueError, match="num_hidden_layers is 1000000000; it must be at most"):
        make_config(find("lm").Config, {"model": {"model_type": "llama", "num_hidden_layers": 10**9}}, "here")


def test_json_rejects_what_is_not_json() -> None:
    for text in ("NaN", "[Infinity]", '{"a": -Infinity}', "1e400", "[" * 100_000, "", "{"):
        with pytest.raises(ValueError, match="finite|nested|Expecting"):
            json_text.parse(text)
    assert json_text.parse('{"a": [1, 2.5, -0.0, 1e-400]}') == {"a": [1, 2.5, 0, 0]}
    assert json_text.without_nan({"a": [math.nan, 1.5], "b": math.inf}) == {"a": [None, 1.5], "b": None}
