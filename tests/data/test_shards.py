"""Sharing of shards by processes: each is written once, and those of a process that has ended are taken by others."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import data.shards
from data.folder_lock import CLAIM, claimed, locked
from data.pseudo_data import PseudoDataSettings, write_pseudo_data
from data.shards import Share, shards_to_write
from data.teacher_store import MARKER, TeacherStoreSettings
from data.writers import LocalWriter
from data.writers.teacher_outputs import StoreOfText
from tests.support.runs import ROOT, command, environment, run
from tests.support.text import save_target, some_prompts, text_target, write_prompts

NAMES = [f"part-{index}" for index in range(9)]
HOLD = """
import sys, time
from pathlib import Path
from data.folder_lock import claimed
with claimed(Path(sys.argv[1])) as is_own:
    print(is_own, flush=True)
    time.sleep(300)
"""


def write_from_threads(folder: Path, shares: list[Share]) -> dict[int, list[int]]:
    """Writes the shards from a thread for each share; returns the indices that each rank wrote, in order."""
    written: dict[int, list[int]] = {share.rank: [] for share in shares}

    def write(share: Share) -> None:
        for index in shards_to_write(folder, NAMES, share):
            written[share.rank].append(index)
            time.sleep(0.01)
            (folder / NAMES[index]).touch()

    threads = [threading.Thread(target=write, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return written


def test_each_shard_is_written_once_whatever_the_number_of_processes(tmp_path: Path) -> None:
    for number in (1, 2, 4):
        folder = tmp_path / str(number)
        folder.mkdir()
        written = write_from_threads(folder, [Share(rank=rank, num_ranks=number) for rank in range(number)])
        assert Counter(index for indices in written.values() for index in indices) == Counter(range(len(NAMES)))
        assert all(indices[0] == rank for rank, indices in written.items()), "each begins with its own"
        assert sorted(path.name for path in folder.iterdir()) == NAMES, "no claim is left"


def test_one_of_several_processes_writes_all_if_the_others_do_not_come(tmp_path: Path) -> None:
    (tmp_path / NAMES[4]).touch()
    (tmp_path / f".{NAMES[2]}.part-77").write_text("half")
    (tmp_path / CLAIM.format(NAMES[3])).touch()  # of a killed process
    assert write_from_threads(tmp_path, [Share(rank=1, num_ranks=3)])[1] == [1, 7, 0, 2, 3, 5, 6, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES


def test_the_shard_of_a_killed_process_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.shards, "WAIT_S", 0.01)
    words = [sys.executable, "-c", HOLD, str(tmp_path / NAMES[0])]
    holder = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    with claimed(tmp_path / NAMES[0]) as is_own:
        assert not is_own
    killer = threading.Timer(0.3, holder.kill)
    killer.start()
    written = write_from_threads(tmp_path, [Share(rank=0, num_ranks=2)])[0]
    holder.wait()
    assert written == [2, 4, 6, 8, 1, 3, 5, 7, 0]


def test_processes_of_one_run_share_a_folder_with_no_other_run(tmp_path: Path) -> None:
    faults: list[str] = []

    def lock(is_shared: bool) -> None:
        try:
            with locked(tmp_path, is_shared=is_shared):
                pass
        except ValueError as error:
            faults.append(str(error))

    with locked(tmp_path, is_shared=True):
        for is_shared in (True, False):
            thread = threading.Thread(target=lock, args=(is_shared,))
            thread.start()
            thread.join()
    assert len(faults) == 1 and f"in use by another run (process {os.getpid()} on" in faults[0]
    assert not list(tmp_path.iterdir())


def test_text_and_store_of_two_ranks_are_those_of_one(tmp_path: Path) -> None:
    target, prompts = text_target(), some_prompts(tmp_path, 14)
    settings = PseudoDataSettings(max_new_tokens=6, batch_size=2, shard_batches=1, temperature="0,1")
    stored = TeacherStoreSettings(layers=(1, 3), top_k=4)

    def write(folder: Path, share: Share) -> None:
        store = StoreOfText(folder=folder / "store", settings=stored)
        write_pseudo_data(
            LocalWriter(target, store=stored), prompts, folder / "text", settings, store=store, share=share
        )

    write(tmp_path / "one", Share())
    threads = [
        threading.Thread(target=write, args=(tmp_path / "two", Share(rank=rank, num_ranks=2))) for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).glob("*/*")}
        for name in ("one", "two")
    )
    assert one == two and sum(path.name.startswith("part-") for path in one) == 8
    assert Path("store") / MARKER in one


# --- Processes of their own --------------------------------------------------------------------------------------


def start(words: list[str], folder: Path, **env: str) -> subprocess.Popen[str]:
    """Starts a command whose output goes to a file of its own."""
    with (folder / f"output-{len(list(folder.glob('output-*')))}").open("w") as output:
        return subprocess.Popen(words, env=environment() | env, stdout=output, stderr=subprocess.STDOUT, text=True)


def shards_of(folder: Path) -> dict[str, bytes]:
    """Returns the files of text and store, without the manifests, which have the command in them."""
    return {path.name: path.read_bytes() for path in folder.glob("*/*") if path.suffix in (".parquet", ".safetensors")}


@pytest.mark.slow
def test_four_ranks_survive_a_kill_and_other_numbers_continue(tmp_path: Path) -> None:
    """One of four is killed and the others write its shard; all four are killed and two nodes of one rank continue."""
    source = str(write_prompts(tmp_path / "prompts.jsonl", 40))
    flags: dict[str, Any] = {"target": save_target(tmp_path / "target"), "data": source, "max_new_tokens": 64}
    flags |= {"batch_size": 2, "shard_batches": 1, "temperature": "0,1", "max_prompts": 0, "layers": 2}
    flags |= {"store_top_k": 5}

    def words(name: str, *launcher: str) -> list[str]:
        outputs = {"output": tmp_path / name / "text", "store_output": tmp_path / name / "store"}
        return command("pseudo_data", *launcher, **flags, **outputs)

    assert run(words("one"), tmp_path).returncode == 0
    whole = shards_of(tmp_path / "one")
    assert len(whole) == 40

    def start_four(name: str) -> list[subprocess.Popen[str]]:
        return [start(words(name), tmp_path, RANK=str(rank), WORLD_SIZE="4") for rank in range(4)]

    ranks = start_four("killed")
    claim = tmp_path / "killed" / "text" / CLAIM.format("part-00003.parquet")
    while not claim.exists():
        assert ranks[3].poll() is None
        time.sleep(0.002)
    ranks[3].kill()
    assert [rank.wait() for rank in ranks] == [0, 0, 0, -9]
    assert shards_of(tmp_path / "killed") == whole
    assert not claim.exists()

    ranks = start_four("stopped")
    while not (tmp_path / "stopped" / "text" / "part-00006.parquet").exists():
        assert None in [rank.poll() for rank in ranks]
        time.sleep(0.002)
    for rank in ranks:
        rank.kill()
    assert {rank.wait() for rank in ranks} == {-9}
    num_kept = len(list((tmp_path / "stopped" / "text").glob("part-*.parquet")))
    assert 0 < num_kept < 20
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *nodes]
    continued = [start(words("stopped", *torchrun, "--node-rank", str(node)), tmp_path) for node in range(2)]
    assert [node.wait() for node in continued] == [0, 0]
    assert shards_of(tmp_path / "stopped") == whole
    assert json.loads((tmp_path / "stopped" / "store" / MARKER).read_text())["num_tokens"] > 0


@pytest.mark.slow
def test_deepspeeds_ranks_of_a_hostfile_share_the_store(tmp_path: Path) -> None:
    path, source = save_target(tmp_path / "target"), str(write_prompts(tmp_path / "prompts.jsonl", 40))
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    flags = {"target": path, "data": source, "layers": 2, "top_k": 300, "shard_mb": 1, "batch_size": 1}
    assert run(command("teacher_store", **flags, output=tmp_path / "one" / "store"), tmp_path).returncode == 0
    # DeepSpeed would ask a single node, too, for its name and address through ssh.
    runner = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--no_ssh_check",
        "--hostfile",
        str(tmp_path / "hosts"),
    ]
    words = command(
        "teacher_store",
        *runner,
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        free_port(),
        **flags,
        output=tmp_path / "two" / "store",
    )
    done = subprocess.run(
        words, cwd=tmp_path, env=environment() | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert shards_of(tmp_path / "two") == shards_of(tmp_path / "one") and len(shards_of(tmp_path / "one")) > 2


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])
