"""Ranks meet, agree and end together: real processes, gloo, and what each of them leaves behind.

Run as a program this file is the parent of ranks: it has imported torch once and forks them, all scenarios
side by side.
"""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from experiments.launch import torchrun
from nanogpt import command
from nanogpt.errors import UserError
from nanogpt.meeting import World, world
from nanogpt.processes import Team, code_hashes

ROOT = Path(__file__).parent.parent
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
Outcome = dict[str, Any]


# What a rank does in each scenario. Rank 1 is the odd one.


def agrees(team: Team) -> None:
    team.agree({"a": "1"})
    assert team.together(lambda: team.world.rank) == team.world.rank
    assert team.gather(str(team.world.rank)) == [str(rank) for rank in range(team.world.size)]
    print("all agree")


def has_other_code(team: Team) -> None:
    team.agree({"a.py": "same", "b.py": "new" if team.world.rank == 1 else "old"})


def finds_no_data(team: Team) -> None:
    def check() -> None:
        print("looking")
        if team.world.rank == 1:
            raise UserError("no data; set --data.path")

    team.together(check)


def has_a_bad_flag(team: Team) -> None:
    def check() -> None:
        raise UserError("the seed is -1; set --train.seed")

    team.together(check)


def asks_for_help(team: Team) -> None:
    def check() -> None:
        print("usage")
        sys.exit(0)

    team.together(check)


def mistypes_a_flag(team: Team) -> None:
    def check() -> None:
        if team.world.rank:
            print("no flag --sede", file=sys.stderr)
            sys.exit(2)

    team.together(check)


def steps(team: Team, odd: Callable[[], object], timeout_s: float = 60) -> None:
    """Five collectives, of which rank 1 reaches three."""
    with team.connected("cpu", timeout_s=timeout_s):
        team.small_all_reduce("cpu", timeout_s=20)
        for step in range(5):
            team.step(step)
            if step == 3:
                time.sleep(0.5)  # the watching thread publishes the step
                if team.world.rank == 1:
                    odd()
            dist.all_reduce(torch.ones(3))


def full_disk() -> None:
    raise UserError("no more room; free some")


def trains(team: Team) -> None:
    steps(team, lambda: None)


def loses_its_disk(team: Team) -> None:
    steps(team, full_disk)


def is_killed(team: Team) -> None:
    steps(team, lambda: os.kill(os.getpid(), signal.SIGKILL))


def loses_the_store(team: Team) -> None:
    team.gather("")
    if team.world.rank == 0:  # which has the store
        time.sleep(0.5)  # until the others have read what was gathered
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def loses_the_store_in_a_collective(team: Team) -> None:
    with team.connected("cpu", timeout_s=60):
        team.small_all_reduce("cpu", timeout_s=20)
        if team.world.rank == 0:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(3))


def sleeps(team: Team) -> None:
    steps(team, lambda: time.sleep(60), timeout_s=6)  # in which all have to meet, on a busy machine


def has_a_bug(team: Team) -> None:
    steps(team, lambda: {}["x"])


def has_a_bug_in_a_check(team: Team) -> None:
    team.together(lambda: {0: "all is well"}[team.world.rank])


def lose_reader() -> None:
    for number in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def has_no_reader(team: Team) -> None:
    if team.world.rank == 0:
        lose_reader()
    has_a_bad_flag(team)


def has_a_bug_and_no_log(team: Team) -> None:
    steps(team, lambda: {}[lose_reader()])


def does_not_join(team: Team) -> None:
    with team.connected("cpu", timeout_s=60):
        if team.world.rank == 1:
            time.sleep(60)
        team.small_all_reduce("cpu", timeout_s=6)


SCENARIOS: dict[str, tuple[Callable[[Team], None], int]] = {
    function.__name__: (function, size)
    for function, size in [
        *((agrees, 3), (has_other_code, 3), (finds_no_data, 2), (has_a_bad_flag, 2), (asks_for_help, 2)),
        (mistypes_a_flag, 3),
        *((trains, 2), (loses_its_disk, 3), (is_killed, 3), (sleeps, 3), (has_a_bug, 2), (does_not_join, 3)),
        *((has_a_bug_in_a_check, 2), (has_no_reader, 2), (has_a_bug_and_no_log, 2)),
        *((loses_the_store, 3), (loses_the_store_in_a_collective, 3)),
    ]
}


# The parent of ranks.


def main(folder: Path) -> None:
    """Runs every scenario and prints what came of each rank: {scenario: [outcome of rank 0, ...]}."""
    running = {}
    for name, (function, size) in SCENARIOS.items():
        for rank in range(size):
            running[fork(folder / name, function, rank, size, timeout_s=20)] = (name, rank)
    running |= hard_meetings(folder)
    outcomes: dict[str, list[Outcome]] = {}
    started = time.monotonic()
    while running:
        pid, status, _ = os.wait4(-1, 0)
        name, rank = running.pop(pid)
        place, log = folder / name, folder / name / f"logs/rank-{rank}.log"
        outcome = {
            "rank": rank,
            "status": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - started,
            "terminal": (place / str(rank)).read_text(),
            "log": log.read_text() if log.exists() else "",
        }
        outcomes.setdefault(name, []).append(outcome)
    print(
        json.dumps({name: sorted(ranks, key=lambda rank: rank["rank"]) for name, ranks in outcomes.items()})
    )


def hard_meetings(folder: Path) -> dict[int, tuple[str, int]]:
    """A rank that never comes; a port that is taken; and a restart in the store of earlier attempts."""
    # Time enough to listen, while all others start as well.
    running = {fork(folder / "alone", agrees, 0, 2, timeout_s=20): ("alone", 0)}
    port_of(folder / "taken")
    PORTS[folder / "taken"].listen()
    running[fork(folder / "taken", agrees, 0, 2, timeout_s=2)] = ("taken", 0)
    store, agent = store_after_an_attempt(folder / "before")
    store.delete_key("hello/1")
    dead = fork(folder / "dead", agrees, 1, 2, timeout_s=20, **agent)
    store.wait(["hello/1"])  # which nobody answers
    os.kill(dead, signal.SIGKILL)
    os.waitpid(dead, 0)
    for rank in range(2):
        running[fork(folder / "restarted", agrees, rank, 2, timeout_s=20, **agent)] = ("restarted", rank)
    _, agent = store_after_an_attempt(folder / "before half")
    running[fork(folder / "half restarted", agrees, 0, 2, timeout_s=20, **agent)] = ("half restarted", 0)
    return running


def store_after_an_attempt(folder: Path) -> tuple[Any, dict[str, str]]:
    """The store of a torchrun under which two ranks have met, and what it tells the ranks it starts next."""
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    STORES.append(store)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}
    for pid in [fork(folder, agrees, rank, 2, timeout_s=20, **agent) for rank in range(2)]:
        os.waitpid(pid, 0)
    return store, agent


PORTS: dict[Path, socket.socket] = {}
STORES: list[Any] = []


def port_of(folder: Path) -> int:
    """A free port for the ranks of a scenario. It stays bound here, so that no other scenario gets it."""
    if folder not in PORTS:
        PORTS[folder] = socket.socket()
        PORTS[folder].bind(("127.0.0.1", 0))
        # Afterwards: a socket that may share its port is given one that another such socket has.
        PORTS[folder].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return PORTS[folder].getsockname()[1]


def free_port() -> int:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        return port.getsockname()[1]


def fork(
    folder: Path, function: Callable[[Team], None], rank: int, size: int, timeout_s: float, **environment: str
) -> int:
    """Starts a rank whose terminal is `folder`/`rank`, and returns its process id."""
    folder.mkdir(parents=True, exist_ok=True)
    values = (str(rank), str(size), str(rank), str(size), "127.0.0.1", str(port_of(folder)))
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(dict(zip(NAMES, values, strict=True)) | environment)
    terminal = os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    try:
        with command.mistakes_in_a_sentence(), Team(world(), timeout_s=timeout_s) as team:
            rank_of(team, function, folder / "logs")
        os._exit(0)
    finally:
        os._exit(1)


def rank_of(team: Team, function: Callable[[Team], None], logs: Path) -> None:
    with team.rank_output(logs):
        function(team)
        print("done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))


# The tests.


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    folder = tmp_path_factory.mktemp("ranks")
    run = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env={name: value for name, value in os.environ.items() if name not in NAMES}
        | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def statuses(ranks: list[Outcome]) -> list[int]:
    return [rank["status"] for rank in ranks]


def errors(rank: Outcome, where: str = "terminal") -> list[str]:
    return [line for line in rank[where].splitlines() if line.startswith("error: ")]


def the_sentence(ranks: list[Outcome]) -> str:
    """The one error on all terminals together, and in every log."""
    sentence, *more = [error for rank in ranks for error in errors(rank)]
    assert not more
    return sentence


def test_ranks_that_agree_go_on_and_end_well(outcomes: dict[str, list[Outcome]]) -> None:
    assert statuses(outcomes["agrees"]) == [0, 0, 0]


def test_a_rank_above_0_prints_to_its_log_alone(outcomes: dict[str, list[Outcome]]) -> None:
    first, *others = outcomes["agrees"]
    assert first["terminal"] == "all agree\ndone\n"
    for rank in others:
        assert rank["terminal"] == ""
        assert rank["log"].splitlines()[1:] == ["all agree", "done"]


def test_a_rank_with_other_code_ends_all_and_what_differs_is_named(
    outcomes: dict[str, list[Outcome]],
) -> None:
    ranks = outcomes["has_other_code"]
    assert statuses(ranks) == [2, 2, 2]
    assert the_sentence(ranks) == (
        f"error: rank 1 ({socket.gethostname()}): b.py is new here and old on rank 0, expected the same; "
        "start the same code and flags on every machine"
    )


def test_a_mistake_that_one_rank_finds_ends_all_and_names_it(outcomes: dict[str, list[Outcome]]) -> None:
    ranks = outcomes["finds_no_data"]
    assert statuses(ranks) == [2, 2]
    assert the_sentence(ranks) == f"error: rank 1 ({socket.gethostname()}): no data; set --data.path"


def test_a_mistake_of_all_ranks_names_none_and_is_said_once(outcomes: dict[str, list[Outcome]]) -> None:
    ranks = outcomes["has_a_bad_flag"]
    assert statuses(ranks) == [2, 2]
    assert the_sentence(ranks) == "error: the seed is -1; set --train.seed"


def test_what_checks_print_is_printed_by_rank_0_alone(outcomes: dict[str, list[Outcome]]) -> None:
    first, second = outcomes["asks_for_help"]
    assert (first["status"], second["status"]) == (0, 0)
    assert first["terminal"] == "usage\n"
    assert "usage" not in second["log"]


def test_a_flag_mistyped_on_some_ranks_is_explained_once_and_ends_all_with_status_2(
    outcomes: dict[str, list[Outcome]],
) -> None:
    first, second, third = outcomes["mistypes_a_flag"]
    assert statuses([first, second, third]) == [2, 2, 2]
    host = socket.gethostname()
    sentence = (
        f"error: rank 1 ({host}), rank 2 ({host}) ended at the command line, which the other ranks could "
        "read; start the same flags on every machine\n"
    )
    assert [rank["terminal"] for rank in (first, second, third)] == [sentence, "no flag --sede\n", ""]
    assert all(rank["log"].endswith(sentence) for rank in (second, third))


def test_collectives_run_and_the_group_is_closed(outcomes: dict[str, list[Outcome]]) -> None:
    assert statuses(outcomes["trains"]) == [0, 0]


def test_a_mistake_in_the_middle_reaches_ranks_that_wait_in_a_collective(
    outcomes: dict[str, list[Outcome]],
) -> None:
    ranks = outcomes["loses_its_disk"]
    assert statuses(ranks) == [2, 2, 2]
    assert the_sentence(ranks) == f"error: rank 1 ({socket.gethostname()}): no more room; free some"


def test_a_killed_rank_is_named_with_its_step(outcomes: dict[str, list[Outcome]]) -> None:
    ranks = outcomes["is_killed"]
    assert statuses(ranks) == [1, -signal.SIGKILL, 1]
    sentence = the_sentence(ranks)
    assert f"gave up a collective in step 3 since rank 1 ({socket.gethostname()}) is gone" in sentence
    assert "(last heard of in step 3)" in sentence
    assert "python -m nanogpt.doctor" in sentence


def test_a_rank_that_does_not_come_to_a_collective_is_named_after_the_timeout(
    outcomes: dict[str, list[Outcome]],
) -> None:
    ranks = outcomes["sleeps"]
    assert statuses(ranks) == [1, 1, 1]
    assert f"since rank 1 ({socket.gethostname()}) lives but did not arrive" in the_sentence(ranks)


def test_a_step_that_lasts_is_warned_of_before_the_timeout(outcomes: dict[str, list[Outcome]]) -> None:
    lines = outcomes["sleeps"][0]["terminal"].splitlines()
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    # At nine tenths of 6 s, rounded.
    assert re.match(r"warning: step 3 has lasted [56] s on rank 0, all ranks are in step 3; ", warning)


def test_a_bug_of_one_rank_ends_all_and_its_traceback_is_in_its_log(
    outcomes: dict[str, list[Outcome]],
) -> None:
    ranks = outcomes["has_a_bug"]
    assert statuses(ranks) == [1, 1]
    assert f"rank 1 ({socket.gethostname()}): stopped with KeyError: 'x'" in the_sentence(ranks)
    assert "Traceback (most recent call last)" in ranks[1]["log"]


def test_an_error_of_the_program_in_a_check_leaves_its_traceback(outcomes: dict[str, list[Outcome]]) -> None:
    ranks = outcomes["has_a_bug_in_a_check"]
    assert statuses(ranks) == [1, 1]
    assert f"rank 1 ({socket.gethostname()}) stopped with KeyError" in the_sentence(ranks)
    assert "Traceback (most recent call last)" in ranks[1]["log"]


def test_a_mistake_that_nobody_reads_ends_all_with_status_2(outcomes: dict[str, list[Outcome]]) -> None:
    assert statuses(outcomes["has_no_reader"]) == [2, 2]


def test_a_bug_is_named_where_its_traceback_cannot_be_written(outcomes: dict[str, list[Outcome]]) -> None:
    ranks = outcomes["has_a_bug_and_no_log"]
    assert statuses(ranks) == [1, 1]
    assert f"rank 1 ({socket.gethostname()}): stopped with KeyError: None" in the_sentence(ranks)


@pytest.mark.parametrize(
    ("scenario", "sentence"),
    [
        ("loses_the_store", "error: the store at 127.0.0.1:{} is gone, with torchrun or rank 0; look"),
        ("loses_the_store_in_a_collective", "since the store at 127.0.0.1:{} is gone with its process; look"),
    ],
)
def test_ranks_whose_store_is_gone_say_so_and_end_within_seconds(
    outcomes: dict[str, list[Outcome]], scenario: str, sentence: str
) -> None:
    ranks = outcomes[scenario]
    assert statuses(ranks) == [-signal.SIGKILL, 1, 1]
    assert sentence.split("{}")[0] in the_sentence(ranks)
    assert sentence.split("{}")[1] in the_sentence(ranks)
    assert ranks[1]["seconds"] - ranks[0]["seconds"] < 15


def test_a_small_all_reduce_names_the_silent_rank(outcomes: dict[str, list[Outcome]]) -> None:
    ranks = outcomes["does_not_join"]
    assert statuses(ranks) == [2, 2, 2]
    assert f"rank 1 ({socket.gethostname()}) did not join a small all-reduce within 6 s" in the_sentence(
        ranks
    )


def test_a_rank_that_never_comes_is_named(outcomes: dict[str, list[Outcome]]) -> None:
    assert statuses(outcomes["alone"]) == [2]
    assert "of 2 ranks these did not come to 127.0.0.1:" in the_sentence(outcomes["alone"])
    assert " in time: 1; look at" in the_sentence(outcomes["alone"])


def test_a_port_that_is_taken_is_said(outcomes: dict[str, list[Outcome]]) -> None:
    assert statuses(outcomes["taken"]) == [2]
    assert "rank 0 cannot listen on 127.0.0.1:" in the_sentence(outcomes["taken"])


def test_a_restart_is_not_misled_by_what_the_attempt_before_left_in_the_store(
    outcomes: dict[str, list[Outcome]],
) -> None:
    assert statuses(outcomes["restarted"]) == [0, 0]
    assert statuses(outcomes["half restarted"]) == [2]
    assert " in time: 1; look at" in the_sentence(outcomes["half restarted"])


def test_all_ranks_of_a_team_end_within_seconds_of_each_other(outcomes: dict[str, list[Outcome]]) -> None:
    for name, ranks in outcomes.items():
        ends = [rank["seconds"] for rank in ranks if rank["status"] >= 0]
        assert max(ends) - min(ends) < 8, name


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets torchrun's variables to the given ones, and no others."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def test_without_torchrun_a_process_is_one_of_one(environment: Callable[..., None]) -> None:
    environment()
    assert world() == World(rank=0, size=1, local_rank=0, local_size=1)


def test_the_place_of_a_rank_is_what_torchrun_says(environment: Callable[..., None]) -> None:
    environment(**dict(zip(NAMES, ["3", "4", "1", "2", "a", "29500"], strict=True)))
    assert world() == World(rank=3, size=4, local_rank=1, local_size=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["3", "4"], "expected all of RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE as torchrun sets them"),
        (["0", "two", "0", "2"], "'WORLD_SIZE': 'two'.*expected all of RANK"),
        (["4", "4", "0", "2"], "'RANK': '4'.*expected ranks below sizes; start with torchrun"),
        (["1", "2", "2", "2"], "'LOCAL_RANK': '2'.*expected ranks below sizes"),
        (["1", "2", "1", "3"], "'LOCAL_WORLD_SIZE': '3'.*expected ranks below sizes"),
        (["0", "2", "0", "2"], "MASTER_ADDR and MASTER_PORT are not both set"),
        (["0", "2", "0", "2", "a", "b"], "MASTER_ADDR and MASTER_PORT are not both set"),
    ],
)
def test_a_broken_environment_is_named(
    environment: Callable[..., None], values: list[str], message: str
) -> None:
    environment(**dict(zip(NAMES, values, strict=False)))
    with pytest.raises(UserError, match=message):
        world()


def test_one_process_alone_is_a_team_for_which_nothing_changes(tmp_path: Path) -> None:
    with (
        Team(World(0, 1, 0, 1)) as team,
        team.rank_output(tmp_path / "logs"),
        team.connected("cpu", timeout_s=1.0),
    ):
        assert team.gather("a") == ["a"]
        team.agree({"a": "b"})
        team.small_all_reduce("cpu")
        assert team.together(lambda: 3) == 3
    assert not (tmp_path / "logs").exists()
    assert not dist.is_initialized()


COMPILES = """
import time
from nanogpt.graph import compiling_threads
from nanogpt.meeting import ALONE
from nanogpt.processes import Team

with Team(ALONE):
    compiling_threads(1).submit(time.sleep, 1000)
    raise KeyboardInterrupt
"""


def test_a_ctrl_c_does_not_wait_for_a_compiler() -> None:
    """As the second one, of which the first says that it stops at once."""
    done = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_the_hashes_of_the_code_are_of_every_file_and_change_with_it() -> None:
    hashes = code_hashes()
    assert {"nanogpt/processes.py", "nanogpt/prepare/build.py"} <= hashes.keys()
    assert hashes["nanogpt/processes.py"] != hashes["nanogpt/errors.py"]


# The scripts.


@pytest.mark.parametrize("name", ["two_nodes.sh", "slurm.sh"])
def test_a_launch_script_is_bash(name: str) -> None:
    subprocess.run(["bash", "-n", ROOT / "experiments/launch" / name], check=True, timeout=10)


def two_nodes(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    script = str(ROOT / "experiments/launch/two_nodes.sh")
    own = {*NAMES, "TORCH_CPP_LOG_LEVEL"}  # this process has set the latter by importing the launcher
    clean = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.Popen(
        [script, *arguments],
        env=clean | {"PYTHON": sys.executable} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        ([], {}, "the first argument is '', expected head or other"),
        (
            ["head"],
            {},
            "no address was given, expected the one of the head machine; two_nodes.sh head ADDRESS",
        ),
        (["other", "a"], {"NGPUS": "two"}, "NGPUS is 'two', expected a number"),
        (["head", "a"], {"PYTHON": "/nowhere"}, "no Python at /nowhere; run make environment, or set PYTHON"),
    ],
)
def test_two_nodes_names_what_is_wrong(
    arguments: list[str], environment: dict[str, str], sentence: str
) -> None:
    with two_nodes(*arguments, **environment) as process:
        _, said = process.communicate(timeout=20)
    assert (process.returncode, said.splitlines()[-1]) == (2, f"error: {sentence}")


def test_a_machine_that_nobody_joins_says_so_in_time() -> None:
    with two_nodes("head", "127.0.0.1", PORT=str(port := free_port()), JOIN_TIMEOUT="1") as process:
        _, said = process.communicate(timeout=60)
    meeting, end = said.splitlines()
    assert process.returncode == 2
    assert meeting.endswith(f": the machines meet at 127.0.0.1:{port}, within 1 s")
    assert end.startswith(
        "error: the machines did not meet (nobody else came in time); start the same command"
    )


CONNECTS = """
from datetime import timedelta
from experiments.launch import torchrun
torchrun.TCPStore("127.0.0.1", 1, is_master=False, timeout=timedelta(seconds=2))
"""


def test_an_attempt_to_connect_leaves_no_warning_with_a_stack() -> None:
    clean = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", CONNECTS], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60
    )
    assert "DistNetworkError" in done.stderr
    assert "[W" not in done.stderr


def program(path: Path, line: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{line}\n")
    path.chmod(0o755)
    return path


def test_two_nodes_counts_gpus_and_not_their_slices_nor_errors(tmp_path: Path) -> None:
    says = program(tmp_path / "python", 'echo "$@"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    for listed, count in (("GPU 0: A100\n  MIG 1g.10gb Device 0:\nGPU 1: A100", 2), ("Failed:\nmismatch", 1)):
        program(tmp_path / "nvidia-smi", f"printf '{listed}\n'")
        with two_nodes("head", "a", PYTHON=str(says), PATH=path, NGPUS="") as process:
            said, _ = process.communicate(timeout=20)
        assert f"--nproc-per-node={count} " in said


def test_slurm_gives_each_torchrun_the_cores_of_its_job(tmp_path: Path) -> None:
    program(tmp_path / ".venv/bin/python", "")
    program(tmp_path / "bin/scontrol", "echo first; echo second")
    program(tmp_path / "bin/srun", 'echo "$OMP_NUM_THREADS" "$@"')
    job = {"JOB_ID": "7", "JOB_NODELIST": "all", "NNODES": "2", "GPUS_ON_NODE": "8", "CPUS_PER_TASK": "64"}
    done = subprocess.run(
        [ROOT / "experiments/launch/slurm.sh", "a_program", "--flag"],
        env={f"SLURM_{name}": value for name, value in job.items()}
        | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert done.stdout.startswith("8 --kill-on-bad-exit=1 --cpus-per-task=64 .venv/bin/python -m ")
    assert "--nnodes=2 --nproc-per-node=8 " in done.stdout
    assert done.stdout.endswith("--rdzv-endpoint=first:20007 --rdzv-id=7 -m a_program --flag\n")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:1", "--rdzv-conf=is_host=0,join_timeout=1"],
            f"{socket.gethostname()} cannot reach the head at 127.0.0.1:1 ([Errno 111] Connection refused); ",
        ),
        (["--nproc-per-node=0"], "--nproc-per-node is 0, expected a number from 1"),
        (
            ["--nproc-per-node=two"],
            "torchrun refuses its flags (Unsupported nproc_per_node value: two), exp",
        ),
        (["--nnodes=0"], "torchrun refuses its flags (min_nodes must be > 0 and <= max_nodes, got"),
        (["--max-restarts=-1"], "torchrun refuses its flags (max_restarts must be >= 0), expected what its"),
        (["--master-port=99999"], "torchrun refuses its flags (The port number of the rendezvous endpoint"),
        (["--master-port={}"], "what listens on 127.0.0.1:{} is no torchrun, expected a free port"),
        (["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:{}"], "what listens on 127.0.0.1:{} is no torc"),
    ],
)
def test_the_launcher_says_in_a_sentence_what_torchrun_does_not(
    flags: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torchrun, "ANSWER_S", 0.5)
    monkeypatch.setattr(logging, "disable", lambda level: None)
    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert torchrun.main([*(flag.format(port) for flag in flags), "a_program"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence.format(port)}")


PROGRAM = """
from nanogpt.errors import UserError
from nanogpt.meeting import world
from nanogpt.processes import Team

with Team(world()) as team, team.connected("cpu", timeout_s=60):
    team.small_all_reduce("cpu")
    print(f"rank {team.world.rank} of {team.world.size} is {team.world.local_rank} here", flush=True)
    if team.world.rank == 1:
        raise UserError("the disk is full; free some")
    team.small_all_reduce("cpu")
"""


def test_two_machines_meet_and_a_mistake_on_one_ends_both_torchruns_without_a_restart(tmp_path: Path) -> None:
    (tmp_path / "a_program.py").write_text(PROGRAM)
    settings = {"PORT": str(free_port()), "NGPUS": "1", "JOIN_TIMEOUT": "60", "PYTHONPATH": str(tmp_path)}
    with (
        two_nodes("head", "127.0.0.1", "a_program", **settings) as head,
        two_nodes("other", "127.0.0.1", "a_program", LOCAL_ADDRESS="127.0.0.1", **settings) as other,
    ):
        said = [process.communicate(timeout=100) for process in (head, other)]
    assert (head.returncode, other.returncode) == (2, 2), said
    out, err = ("".join(texts) for texts in zip(*said, strict=True))
    assert sorted(out.splitlines()) == ["rank 0 of 2 is 0 here", "rank 1 of 2 is 0 here"]
    assert [line for line in err.splitlines() if "the machines meet at" not in line] == [
        f"error: rank 1 ({socket.gethostname()}): the disk is full; free some"
    ]


LOST = """
import os, pathlib, signal, torch
from nanogpt.meeting import world
from nanogpt.processes import Team

with Team(world()) as team, team.connected("cpu", timeout_s=60):
    lost = pathlib.Path(os.environ["LOST"])
    if os.environ["MACHINE"] == "other" and not lost.exists():
        lost.touch()
        for pid in (os.getppid(), os.getpid()):
            os.kill(pid, signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(()))
"""


def test_a_machine_that_was_lost_joins_again_once_it_is_started_again(tmp_path: Path) -> None:
    (tmp_path / "a_program.py").write_text(LOST)
    settings = {"PORT": str(free_port()), "NGPUS": "1", "JOIN_TIMEOUT": "60", "PYTHONPATH": str(tmp_path)}
    settings |= {"LOCAL_ADDRESS": "127.0.0.1", "LOST": str(tmp_path / "lost")}

    def start(role: str) -> subprocess.Popen[str]:
        return two_nodes(role, "127.0.0.1", "a_program", MACHINE=role, **settings)

    with start("head") as head:
        with start("other") as other:
            assert other.wait(timeout=60) == -signal.SIGKILL
        with start("other") as again:
            said = [process.communicate(timeout=100) for process in (again, head)]
    assert (head.returncode, again.returncode) == (0, 0), said
