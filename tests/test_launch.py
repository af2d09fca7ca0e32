"""The front door: what it runs, what it refuses, and environments that are made once, renewed and never left half made.

Most tests run a copy of launch.sh with a stand-in for Python that writes down how it is called.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
    "-c import sys; sys.exit"*) exit "${TOO_OLD:-0}" ;;
    "-c import socket"*) echo 4321 ;;
    --version) echo "Python 3.11.0" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/made" ;;
    "-m uv "*) if [[ -n ${KILLED:-} ]]; then kill -9 "$PPID"; sleep 1; fi; exit "${UV_FAILS:-0}" ;;
    "-m pip install"*--editable*) exit "${PIP_FAILS:-0}" ;;
    */recipes/*)
        echo "threads ${OMP_NUM_THREADS:-free} accelerator ${DS_ACCELERATOR:-free}"
        exit "${RECIPE_FAILS:-0}"
        ;;
esac
"""


class House:
    """A copy of the front door in a folder of its own, with a recipe that does nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root / "a house"
        self.calls = root / "calls"
        self.stand_in = root / "python"
        self.stand_in.write_text(STAND_IN)
        self.stand_in.chmod(0o755)
        (self.root / "recipes").mkdir(parents=True)
        for name in ("launch.sh", "constraints.txt", "requirements-serving.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        (self.root / "recipes" / "some_recipe.py").write_text('"""Does nothing, in one line.\n\nMore.\n"""\n')

    def __call__(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.calls.unlink(missing_ok=True)
        kept = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "DS_ACCELERATOR")}
        return subprocess.run(
            [str(self.root / "launch.sh"), *arguments],
            env=kept | {"PYTHON": str(self.stand_in), "CALLS": str(self.calls)} | env,
            cwd=self.root.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def called(self, start: str) -> list[str]:
        """Returns the calls of Python in the last run that start so."""
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [call for call in calls if call.startswith(start)]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_scripts_parse() -> None:
    for script in ("launch.sh", ".ci/run"):
        assert os.access(ROOT / script, os.X_OK)
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


# --- Commands ----------------------------------------------------------------------------------------------------


def test_help_lists_every_recipe_and_makes_no_environment(house: House) -> None:
    done = house("--help")
    assert done.returncode == 0
    assert "some_recipe          Does nothing, in one line.\n" in done.stdout
    assert not (house.root / ".venv").exists()
    real = subprocess.run([str(ROOT / "launch.sh"), "--help"], capture_output=True, text=True).stdout
    for recipe in (ROOT / "recipes").glob("*.py"):
        assert f"  {recipe.stem} " in real


def test_no_command_prints_the_help_and_fails(house: House) -> None:
    done = house()
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: ./launch.sh" in done.stderr


@pytest.mark.parametrize(("typed", "meant"), [("sum_recipe", "some_recipe"), ("tset", "test"), ("steup", "setup")])
def test_unknown_command_is_refused_with_the_nearest_spelling(house: House, typed: str, meant: str) -> None:
    done = house(typed)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"launch.sh: unknown command or recipe '{typed}'; did you mean '{meant}'? ./launch.sh --help lists them"
    ]
    assert not (house.root / ".venv").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--nproc"], "--nproc needs a value"),
        (["--nproc", "two"], "--nproc takes a whole number of processes, not 'two'"),
        (["--nproc=0"], "--nproc takes a whole number of processes, not '0'"),
        (["--launcher", "mpi"], "--launcher is python, torchrun or deepspeed, not 'mpi'"),
        (
            ["--nproc", "2", "--launcher", "python"],
            "--launcher python runs one process; for 2 take torchrun or deepspeed",
        ),
    ],
)
def test_launcher_flags_are_checked_before_anything_is_made(house: House, flags: list[str], sentence: str) -> None:
    done = house("some_recipe", *flags)
    assert (done.returncode, done.stderr) == (2, f"launch.sh: {sentence}\n")
    assert not (house.root / ".venv").exists()


@pytest.mark.parametrize(
    ("flags", "runner"),
    [
        ([], ""),
        (["--nproc", "1"], ""),
        (["--nproc=2"], "-m torch.distributed.run --standalone --nproc-per-node 2 "),
        (["--nproc", "1", "--launcher=torchrun"], "-m torch.distributed.run --standalone --nproc-per-node 1 "),
        (["--launcher", "deepspeed", "--nproc", "3"], "-m deepspeed.launcher.runner --num_gpus 3 --master_port 4321 "),
    ],
)
def test_each_launcher_gets_the_recipe_and_all_other_arguments(house: House, flags: list[str], runner: str) -> None:
    done = house("some-recipe", "--key", "a value", *flags, "--other=1")
    assert done.returncode == 0, done.stderr
    assert house.called("")[-1] == f"{runner}{house.root}/recipes/some_recipe.py --key a value --other=1"


def test_ranks_on_cpu_share_the_cores(house: House) -> None:
    no_gpu = {"PATH": "/usr/bin:/bin"}
    if subprocess.run(["bash", "-c", "nvidia-smi -L || rocminfo"], env=no_gpu, capture_output=True).returncode == 0:
        pytest.skip("this machine has a GPU")
    assert "threads 1 accelerator cpu" in house("some_recipe", "--nproc", "4096", **no_gpu).stdout
    assert "threads 3 accelerator cpu" in house("some_recipe", "--nproc", "2", OMP_NUM_THREADS="3", **no_gpu).stdout
    assert "threads free accelerator cpu" in house("some_recipe", **no_gpu).stdout


def test_the_exit_code_is_the_recipes(house: House) -> None:
    assert house("some_recipe", RECIPE_FAILS="7").returncode == 7


def test_tests_are_run_last_and_get_all_arguments(house: House) -> None:
    assert house("test", "tests/test_x.py", "-k", "one or two").returncode == 0
    assert (
        house.called("")[-1]
        == "-m pytest -q --numprocesses logical --maxprocesses 4 --dist loadfile tests/test_x.py -k one or two"
    )


# --- Environments ------------------------------------------------------------------------------------------------


def test_servers_have_an_environment_of_their_own(house: House) -> None:
    """Without what is built for CUDA, and without what draftsmith asks for: the servers ask for other versions."""
    assert house("serving-test", "-x").returncode == 0
    assert (house.root / ".venv-serving" / "made").exists() and not (house.root / ".venv").exists()
    added, removed, own = house.called("-m uv")
    assert "--requirements requirements-serving.txt" in added and "uninstall" in removed and "torchvision" in removed
    assert own.endswith("--no-deps --editable .")
    last = house.called("")[-1]
    assert last == "-m pytest -q -m not slow tests/serving tests/export/test_export_speculators.py -x"
    house("serving-test")
    assert not house.called("-m uv"), "it is there"


def test_an_environment_is_made_once_and_renewed_when_versions_change(house: House) -> None:
    assert house("setup").returncode == 0
    assert house.called("-m venv")
    (install,) = house.called("-m uv pip install")
    assert "--constraints constraints.txt" in install
    assert install.endswith("--editable .[train,dev]")
    assert house.called("-m pip install")[-1].endswith("--constraint constraints.txt --no-deps sweeps")
    assert house("setup").returncode == 0
    assert house.called("") == ["--version"]
    with (house.root / "constraints.txt").open("a") as constraints:
        constraints.write("something==1.0\n")
    assert house("setup").returncode == 0
    assert house.called("-m uv pip install")
    assert not house.called("-m venv")


def test_settings_of_tools_do_not_renew_it(house: House) -> None:
    house("setup")
    project = house.root / "pyproject.toml"
    project.write_text(project.read_text() + "\n[tool.something]\nkey = 1\n")
    house("setup")
    assert not house.called("-m uv pip install")


def test_uv_is_told_what_pip_knows(house: House) -> None:
    house("setup", PIP_FIND_LINKS="/wheels /more", PIP_INDEX_URL="https://index.example/simple")
    (install,) = house.called("-m uv pip install")
    assert "--find-links /wheels --find-links /more --default-index https://index.example/simple" in install


def test_a_killed_setup_is_never_taken_for_a_whole_one(house: House) -> None:
    assert house("some_recipe", KILLED="1").returncode != 0
    assert not house.called(str(house.root / "recipes"))
    (house.root / ".venv" / "half-made").touch()
    assert house("some_recipe").returncode == 0
    assert house.called("-m venv")
    assert not (house.root / ".venv" / "half-made").exists()


def test_pip_takes_over_where_uv_fails(house: House) -> None:
    done = house("setup", UV_FAILS="1")
    assert done.returncode == 0
    assert "uv did not succeed; trying pip" in done.stdout
    assert house.called("-m pip install --disable-pip-version-check --constraint constraints.txt --editable")


def test_a_failed_setup_ends_with_a_sentence_and_is_tried_again_in_place(house: House) -> None:
    done = house("some_recipe", UV_FAILS="1", PIP_FAILS="1")
    assert (done.returncode, done.stderr) == (2, "launch.sh: the environment could not be made; see above\n")
    assert house("some_recipe").returncode == 0
    assert house.called("-m uv pip install")
    assert not house.called("-m venv")


def test_an_environment_made_by_hand_is_kept(house: House) -> None:
    folder = house.root / ".venv" / "bin"
    folder.mkdir(parents=True)
    shutil.copy(house.stand_in, folder)
    assert house("setup").returncode == 0
    assert house.called("-m uv pip install")
    assert not house.called("-m venv")


def test_old_pythons_are_refused_in_one_sentence(house: House) -> None:
    done = house("setup", TOO_OLD="1")
    assert (done.returncode, done.stderr) == (
        2,
        "launch.sh: needs Python 3.11 or newer, found Python 3.11.0; "
        "install one, or name it: PYTHON=/path/to/python3.11 ./launch.sh setup\n",
    )
    assert "found none;" in house("setup", PYTHON="/nowhere/python").stderr


# --- For real ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="these tests run in an environment of another making")
def test_a_real_recipe_from_another_folder_is_told_its_arguments(tmp_path: Path) -> None:
    command = [str(ROOT / "launch.sh"), "pocket", "--max-stpes", "3", "--kind", "casual"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "pocket.py: unknown setting '--max-stpes' on the command line; did you mean --max-steps?",
        "pocket.py: --kind takes one of causal, seq2seq, both, not 'casual'; did you mean causal?",
    ]
    assert not list(tmp_path.iterdir())
