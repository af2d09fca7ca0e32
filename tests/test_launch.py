"""launch.sh: the commands it runs and rejects, and environments that are made once, renewed and never left half made.

Most tests run a copy of launch.sh with a stand-in for Python that records how it is called.
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


class Checkout:
    """A copy of the front door in a folder of its own, with a recipe that does nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root / "a checkout"
        self.calls = root / "calls"
        self.stand_in = root / "python"
        self.stand_in.write_text(STAND_IN)
        self.stand_in.chmod(0o755)
        (self.root / "recipes").mkdir(parents=True)
        for name in (
            "launch.sh",
            "constraints.txt",
            "requirements-serving.txt",
            "requirements-llamacpp.txt",
            "requirements-openvino.txt",
            "pyproject.toml",
        ):
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
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_scripts_are_executable_and_parse() -> None:
    for script in ("launch.sh", ".ci/run"):
        assert os.access(ROOT / script, os.X_OK)
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


# --- Commands ----------------------------------------------------------------------------------------------------


def test_help_lists_every_recipe_and_makes_no_environment(checkout: Checkout) -> None:
    done = checkout("--help")
    assert done.returncode == 0
    assert "some_recipe          Does nothing, in one line.\n" in done.stdout
    assert not (checkout.root / ".venv").exists()
    real = subprocess.run([str(ROOT / "launch.sh"), "--help"], capture_output=True, text=True).stdout
    for recipe in (ROOT / "recipes").glob("*.py"):
        assert f"  {recipe.stem} " in real


def test_missing_command_prints_the_help_and_fails(checkout: Checkout) -> None:
    done = checkout()
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: ./launch.sh" in done.stderr


@pytest.mark.parametrize(("typed", "meant"), [("sum_recipe", "some_recipe"), ("tset", "test"), ("steup", "setup")])
def test_unknown_command_names_the_nearest_spelling(checkout: Checkout, typed: str, meant: str) -> None:
    done = checkout(typed)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"launch.sh: unknown command or recipe '{typed}'; did you mean '{meant}'? ./launch.sh --help lists them"
    ]
    assert not (checkout.root / ".venv").exists()


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
def test_launcher_flags_are_checked_before_the_environment_is_made(
    checkout: Checkout, flags: list[str], sentence: str
) -> None:
    done = checkout("some_recipe", *flags)
    assert (done.returncode, done.stderr) == (2, f"launch.sh: {sentence}\n")
    assert not (checkout.root / ".venv").exists()


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
def test_launcher_gets_the_recipe_and_all_other_arguments(checkout: Checkout, flags: list[str], runner: str) -> None:
    done = checkout("some-recipe", "--key", "a value", *flags, "--other=1")
    assert done.returncode == 0, done.stderr
    assert checkout.called("")[-1] == f"{runner}{checkout.root}/recipes/some_recipe.py --key a value --other=1"


def test_ranks_on_cpu_share_the_cores(checkout: Checkout) -> None:
    no_gpu = {"PATH": "/usr/bin:/bin"}
    if subprocess.run(["bash", "-c", "nvidia-smi -L || rocminfo"], env=no_gpu, capture_output=True).returncode == 0:
        pytest.skip("this machine has a GPU")
    assert "threads 1 accelerator cpu" in checkout("some_recipe", "--nproc", "4096", **no_gpu).stdout
    assert "threads 3 accelerator cpu" in checkout("some_recipe", "--nproc", "2", OMP_NUM_THREADS="3", **no_gpu).stdout
    assert "threads free accelerator cpu" in checkout("some_recipe", **no_gpu).stdout


def test_exit_code_is_that_of_the_recipe(checkout: Checkout) -> None:
    assert checkout("some_recipe", RECIPE_FAILS="7").returncode == 7


def test_test_command_passes_all_arguments_to_pytest(checkout: Checkout) -> None:
    assert checkout("test", "tests/test_x.py", "-k", "one or two").returncode == 0
    assert (
        checkout.called("")[-1]
        == "-m pytest -q --numprocesses logical --maxprocesses 4 --dist loadfile tests/test_x.py -k one or two"
    )


# --- Environments ------------------------------------------------------------------------------------------------


def test_serving_test_makes_an_environment_of_its_own(checkout: Checkout) -> None:
    """Packages built for CUDA and draftsmith's own requirements are left out: the servers require other versions."""
    assert checkout("serving-test", "-x").returncode == 0
    assert (checkout.root / ".venv-serving" / "made").exists() and not (checkout.root / ".venv").exists()
    added, removed, own = checkout.called("-m uv")
    assert "--requirements requirements-serving.txt" in added and "uninstall" in removed and "torchvision" in removed
    assert own.endswith("--no-deps --editable .")
    last = checkout.called("")[-1]
    ignored = "--ignore tests/serving/test_llama_cpp.py --ignore tests/serving/test_openvino.py"
    assert last == f"-m pytest -q -m not slow {ignored} tests/serving tests/export/test_export_speculators.py -x"
    checkout("serving-test")
    assert not checkout.called("-m uv"), "it is there"


def test_serving_test_of_llama_cpp_runs_in_the_main_environment(checkout: Checkout) -> None:
    """Its own environment holds llama.cpp alone, which the tests start."""
    for arguments in (("--engine", "llama.cpp", "-x"), ("--engine=llama.cpp", "-x")):
        assert checkout("serving-test", *arguments).returncode == 0
        assert (checkout.root / ".venv-llamacpp" / "made").exists() and (checkout.root / ".venv" / "made").exists()
        assert checkout.called("")[-1] == "-m pytest -q -n 0 -m serving tests/serving/test_llama_cpp.py -x"
    done = checkout("serving-test", "--engine", "mlx")
    assert done.returncode == 2 and "--engine is vllm, llama.cpp or openvino, not 'mlx'" in done.stderr


def test_serving_test_of_openvino_runs_in_the_main_environment(checkout: Checkout) -> None:
    """Its own environment converts and runs exports for the tests, without torch for CUDA and without draftsmith."""
    assert checkout("serving-test", "--engine", "openvino", "-x").returncode == 0
    assert (checkout.root / ".venv-openvino" / "made").exists() and (checkout.root / ".venv" / "made").exists()
    added, removed = checkout.called("-m uv pip")[-2:]
    assert "--requirements requirements-openvino.txt" in added and "uninstall" in removed and "torchvision" in removed
    assert checkout.called("")[-1] == "-m pytest -q -n 0 -m serving tests/serving/test_openvino.py -x"


def test_environment_is_made_once_and_renewed_when_versions_change(checkout: Checkout) -> None:
    assert checkout("setup").returncode == 0
    assert checkout.called("-m venv")
    (install,) = checkout.called("-m uv pip install")
    assert "--constraints constraints.txt" in install
    assert install.endswith("--editable . --group train --group dev")
    assert checkout("setup").returncode == 0
    assert checkout.called("") == ["--version"]
    with (checkout.root / "constraints.txt").open("a") as constraints:
        constraints.write("something==1.0\n")
    assert checkout("setup").returncode == 0
    assert checkout.called("-m uv pip install")
    assert not checkout.called("-m venv")


def test_environment_is_not_renewed_for_settings_of_tools(checkout: Checkout) -> None:
    checkout("setup")
    project = checkout.root / "pyproject.toml"
    project.write_text(project.read_text() + "\n[tool.something]\nkey = 1\n")
    checkout("setup")
    assert not checkout.called("-m uv pip install")


def test_uv_gets_the_index_and_links_of_pip(checkout: Checkout) -> None:
    checkout("setup", PIP_FIND_LINKS="/wheels /more", PIP_INDEX_URL="https://index.example/simple")
    (install,) = checkout.called("-m uv pip install")
    assert "--find-links /wheels --find-links /more --default-index https://index.example/simple" in install


def test_killed_setup_is_made_again(checkout: Checkout) -> None:
    assert checkout("some_recipe", KILLED="1").returncode != 0
    assert not checkout.called(str(checkout.root / "recipes"))
    (checkout.root / ".venv" / "half-made").touch()
    assert checkout("some_recipe").returncode == 0
    assert checkout.called("-m venv")
    assert not (checkout.root / ".venv" / "half-made").exists()


def test_setup_falls_back_to_pip_if_uv_fails(checkout: Checkout) -> None:
    done = checkout("setup", UV_FAILS="1")
    assert done.returncode == 0
    assert "uv did not succeed; trying pip" in done.stdout
    assert checkout.called("-m pip install --constraint constraints.txt --editable . --group train --group dev")


def test_failed_setup_prints_one_sentence_and_continues_in_place(checkout: Checkout) -> None:
    done = checkout("some_recipe", UV_FAILS="1", PIP_FAILS="1")
    assert (done.returncode, done.stderr) == (2, "launch.sh: the environment could not be made; see above\n")
    assert checkout("some_recipe").returncode == 0
    assert checkout.called("-m uv pip install")
    assert not checkout.called("-m venv")


def test_environment_made_by_hand_is_kept(checkout: Checkout) -> None:
    folder = checkout.root / ".venv" / "bin"
    folder.mkdir(parents=True)
    shutil.copy(checkout.stand_in, folder)
    assert checkout("setup").returncode == 0
    assert checkout.called("-m uv pip install")
    assert not checkout.called("-m venv")


def test_old_pythons_are_rejected_in_one_sentence(checkout: Checkout) -> None:
    done = checkout("setup", TOO_OLD="1")
    assert (done.returncode, done.stderr) == (
        2,
        "launch.sh: needs Python 3.11 or newer, found Python 3.11.0; "
        "install one, or name it: PYTHON=/path/to/python3.11 ./launch.sh setup\n",
    )
    assert "found none;" in checkout("setup", PYTHON="/nowhere/python").stderr


# --- The real environment ----------------------------------------------------------------------------------------


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="these tests run in another environment")
def test_recipe_from_another_folder_gets_its_arguments(tmp_path: Path) -> None:
    command = [str(ROOT / "launch.sh"), "pocket", "--max-stpes", "3", "--kind", "casual"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "pocket.py: unknown setting '--max-stpes' on the command line; did you mean --max-steps?",
        "pocket.py: --kind takes one of causal, seq2seq, both, not 'casual'; did you mean causal?",
    ]
    assert not list(tmp_path.iterdir())
