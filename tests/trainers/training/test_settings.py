"""Settings from the command line and YAML: accepted forms, error messages and --help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from trainers.training.settings import flat, from_flat, parse_settings


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of every kind."""

    max_steps: int = 10
    """Number of steps."""
    learning_rate: float = 1e-3
    name: str = "x"
    """Two lines
    of help."""
    bf16: bool = False
    shuffle: bool = True
    schedule: str = field(default="cosine", metadata={"choices": ["cosine", "linear"]})
    loss: Literal["ce", "kl"] = "ce"
    limit: int | None = None
    layers: tuple[int, ...] = ()
    tree: tuple[tuple[int, ...], ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path("runs")


@dataclass(frozen=True, kw_only=True)
class Required:
    """A required setting and one with a checked value."""

    target: str
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A drafter's configuration."""

    num_draft: int = 6
    """Tokens drafted per round."""
    num_nodes: int = 16
    num_blocks: int = 1
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_draft < 1:
            raise ValueError(f"num_draft is {self.num_draft}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A trainer's settings: a loss of its own beside the configuration of its drafter."""

    config: Config = field(
        default=Config(num_blocks=2), metadata={"omit": ("layers",), "flags": {"num_nodes": "tree_nodes"}}
    )
    loss: Literal["ce", "kl"] = "ce"


def parse(*argv: str) -> Run:
    (run,) = parse_settings(Run, description="Trains a drafter.", argv=list(argv))
    assert isinstance(run, Run)
    return run


def faults_of(capsys: pytest.CaptureFixture[str], *argv: str, classes: tuple[type, ...] = (Run,)) -> list[str]:
    """Returns the faults printed, one per line, without the program's name."""
    with pytest.raises(SystemExit) as exit_:
        parse_settings(*classes, description=None, argv=list(argv))
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return [line.split(": ", 1)[1] for line in captured.err.splitlines()]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", {}),
        ("--max-steps 3", {"max_steps": 3}),
        ("--max_steps=3", {"max_steps": 3}),
        ("--max-steps 3 --max_steps 4", {"max_steps": 4}),
        ("--learning-rate 3e-4", {"learning_rate": 3e-4}),
        ("--limit -1 --learning-rate -0.5", {"limit": -1, "learning_rate": -0.5}),
        ("--limit none", {"limit": None}),
        ("--name 12", {"name": "12"}),
        ("--name=a=b", {"name": "a=b"}),
        ("--name=", {"name": ""}),
        ("--bf16", {"bf16": True}),
        ("--bf16 --max-steps 3", {"bf16": True, "max_steps": 3}),
        ("--bf16=True --shuffle=False", {"bf16": True, "shuffle": False}),
        ("--bf16 true --shuffle no", {"bf16": True, "shuffle": False}),
        ("--no-shuffle --no_bf16", {"shuffle": False, "bf16": False}),
        ("--schedule linear --loss kl", {"schedule": "linear", "loss": "kl"}),
        ("--layers 4 8 --max-steps 3", {"layers": (4, 8), "max_steps": 3}),
        ("--layers=[4,8]", {"layers": (4, 8)}),
        ("--tree [[0],[0,1]]", {"tree": ((0,), (0, 1))}),
        ("--folder some/where", {"folder": Path("some/where")}),
        ("--local_rank=1 --max-steps 3", {"max_steps": 3}),
        ("--local-rank 0", {}),
    ],
)
def test_command_line_accepts(argv: str, expected: dict[str, Any]) -> None:
    assert parse(*argv.split()) == Run(**expected)


def test_mapping_is_read_as_yaml() -> None:
    assert parse("--model", "{hidden_size: 8, act: silu}").model == {"hidden_size": 8, "act": "silu"}


def test_flags_override_the_preset_which_overrides_defaults(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(
        "max-steps: 5\nlearning_rate: 3e-4\nbf16: true\nlayers: [1, 2]\nlimit: null\nmodel: {a: 1}\nname: preset\n"
    )
    expected = Run(max_steps=5, learning_rate=3e-4, bf16=True, layers=(1, 2), model={"a": 1}, name="flag")
    assert parse("--name", "flag", "--config", str(preset)) == expected
    assert parse("--config", str(preset), "--no-bf16").bf16 is False


def test_several_dataclasses_share_the_command_line() -> None:
    run, needed = parse_settings(Run, Required, description=None, argv=["--target", "t", "--max-steps", "2"])
    assert (run, needed) == (Run(max_steps=2), Required(target="t"))


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        ("--max-stpes 3", "unknown setting '--max-stpes' on the command line; did you mean --max-steps?"),
        ("--max_stpes=3", "unknown setting '--max_stpes' on the command line; did you mean --max-steps?"),
        ("--qqqqq", "unknown setting '--qqqqq' on the command line; see --help"),
        ("--max 3", "unknown setting '--max' on the command line; did you mean --max-steps?"),
        ("stray", "unexpected argument 'stray'; settings are written --key value"),
        ("--max-steps 3 4", "unexpected argument '4'; settings are written --key value"),
        ("--max-steps abc", "--max-steps takes a whole number, not 'abc'"),
        ("--max-steps -1", "--max-steps takes a whole number of at least 0, not '-1'"),
        ("--max-steps 1.5", "--max-steps takes a whole number, not '1.5'"),
        ("--learning-rate fast", "--learning-rate takes a number, not 'fast'"),
        ("--layers 1 two", "--layers takes a whole number, not 'two'"),
        ("--layers [1,", "--layers is not valid YAML: '[1,'"),
        ("--model 3", "--model takes a mapping like {key: value}, not 3"),
        ("--bf16=maybe", "--bf16 takes true or false, not 'maybe'"),
        ("--no-name", "--no-name: only true/false settings have a --no- form"),
        ("--max-steps", "--max-steps needs a value"),
        ("--max-steps --bf16", "--max-steps needs a value"),
        ("--schedule linaer", "--schedule takes one of cosine, linear, not 'linaer'; did you mean linear?"),
        ("--loss mse", "--loss takes one of ce, kl, not 'mse'"),
        ("--config nowhere.yaml", "--config nowhere.yaml: no such file"),
    ],
)
def test_fault_on_the_command_line(capsys: pytest.CaptureFixture[str], argv: str, fault: str) -> None:
    assert faults_of(capsys, *argv.split()) == [fault]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("max_stpes: 3", "unknown setting 'max_stpes' in {path}; did you mean max_steps?"),
        ("max-steps: abc", "{path}: max-steps takes a whole number, not 'abc'"),
        ("max_steps: 1.5", "{path}: max-steps takes a whole number, not 1.5"),
        ("max_steps: true", "{path}: max-steps takes a whole number, not True"),
        ("name: [a]", "{path}: name takes text, not ['a']"),
        ("- max_steps", "--config {path}: must contain `key: value` lines"),
        ("max_steps: [1", "--config {path}: not valid YAML: "),
    ],
)
def test_fault_in_a_preset(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    (message,) = faults_of(capsys, "--config", str(path))
    expected = fault.format(path=path)
    assert message.startswith(expected) if fault.endswith(" ") else message == expected


def test_all_faults_are_reported_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "preset.yaml"
    path.write_text("sharr: 0.1\nmax_steps: many\n")
    argv = ["--bf61", "--config", str(path), "--learning-rate", "fast"]
    assert faults_of(capsys, *argv, classes=(Run, Required)) == [
        "unknown setting '--bf61' on the command line; did you mean --bf16?",
        f"unknown setting 'sharr' in {path}; did you mean share?",
        f"{path}: max-steps takes a whole number, not 'many'",
        "--learning-rate takes a number, not 'fast'",
        "--target is required",
    ]


def test_value_rejected_by_a_dataclass_is_reported_as_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    messages = faults_of(capsys, "--target", "t", "--share", "2", classes=(Run, Required))
    assert messages == ["share is 2.0; it must lie between 0 and 1"]


def test_two_settings_with_the_same_name_fail_an_assertion() -> None:
    with pytest.raises(AssertionError, match=r"two settings are called max_steps: Run.max_steps and Run.max_steps; "):
        parse_settings(Run, Run, description=None, argv=[])


def test_nested_dataclass_gives_settings_of_the_same_level(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text("num-draft: 3\ntree_nodes: 4\n")
    trainer, run = parse_settings(
        Trainer, Required, description=None, argv=f"--config {preset} --num-draft 5 --loss kl --target t".split()
    )
    assert trainer == Trainer(config=Config(num_draft=5, num_nodes=4, num_blocks=2), loss="kl")
    assert run == Required(target="t")


def test_flat_and_from_flat_are_inverse_and_use_the_names_of_flags() -> None:
    values = {"num_draft": 5, "tree_nodes": 4, "num_blocks": 2, "loss": "kl"}
    trainer = Trainer(config=Config(num_draft=5, num_nodes=4, num_blocks=2), loss="kl")
    assert flat(trainer) == values
    assert from_flat(Trainer, {**values, "target": "of another dataclass"}) == trainer
    assert from_flat(Trainer, {}) == Trainer()


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        ("--num-darft 3", "unknown setting '--num-darft' on the command line; did you mean --num-draft?"),
        ("--num-nodes 3", "unknown setting '--num-nodes' on the command line; did you mean --tree-nodes?"),
        ("--num-draft many", "--num-draft takes a whole number, not 'many'"),
        ("--num-draft 0", "num_draft is 0; it must be at least 1"),
    ],
)
def test_fault_in_a_nested_dataclass(capsys: pytest.CaptureFixture[str], argv: str, fault: str) -> None:
    assert faults_of(capsys, *argv.split(), classes=(Trainer,)) == [fault]


def test_nested_setting_with_the_name_of_another_fails_an_assertion() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Clash:
        num_draft: int = 1
        config: Config = field(default_factory=Config)

    with pytest.raises(
        AssertionError, match="called num_draft: Clash.num_draft and Config.num_draft; drop or rename one"
    ):
        parse_settings(Clash, description=None, argv=[])


def test_help_of_a_nested_dataclass(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_settings(Trainer, description=None, argv=["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert "  --num-draft N               Tokens drafted per round. [default 6]" in lines
    assert "  --num-blocks N              [default 2]" in lines


def test_help_shows_description_default_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_settings(
            Run, Required, description="Trains a drafter.\n\n    a command line   # kept as it is\n", argv=["--help"]
        )
    assert exit_.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert "    a command line   # kept as it is" in lines
    assert "  --max-steps N               Number of steps. [default 10]" in lines
    assert "  --name TEXT                 Two lines of help. [default 'x']" in lines
    assert "  --schedule {cosine,linear}  [default 'cosine']" in lines
    assert "  --layers N ...              [default ()]" in lines
    assert "  --target TEXT               [required]" in lines
    assert max(map(len, lines)) <= 120
