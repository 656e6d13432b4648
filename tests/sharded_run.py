"""Runs of the command line on several ranks, for test_run_sharded.py: a program that imports everything once
and forks the ranks of all of them, each chain of runs beside the others.

    python sharded_run.py FOLDER          all chains; what came of the starts of each is in FOLDER/CHAIN.json
    torchrun sharded_run.py rank FLAGS    a rank of a run that is disturbed
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_run import EAGER, arguments, write_tokens

from experiments.gpt2_124m import config as gpt2_124m
from nanogpt.processes import Team
from nanogpt.run import main
from nanogpt.tracker import Trackers

STEPS = 20
LITTLE = {
    "model__vocab_size": 33,
    "model__block_size": 9,
    "model__n_embd": 14,
    "model__dropout": 0,
    "optim__gradient_clip_norm": 0.3,
    "data__batch_size": 3,
    "data__total_batch_size": 12 * 9,
    "train__max_steps": STEPS,
    "eval__interval": 10,
    "eval__tokens": 63,  # seven windows: not full on two ranks, and empty rows on four
    "checkpoint__interval": None,
    "sample__interval": None,
    "sample__tokens": 3,
}
"""Sizes that neither 3 nor 4 divide; on four ranks the last one has none of the nine positions."""


@dataclass(frozen=True)
class Start:
    """A command line on some ranks."""

    size: int
    changes: dict[str, Any] = field(default_factory=dict)
    odd: Callable[[], None] = lambda: None
    """What rank 1 does before it runs."""
    run_dir: str | None = None
    """By default that of the chain."""
    under_torchrun: bool = False
    """One of its own, disturbed as `be_disturbed` says."""


def has_another_flag() -> None:
    sys.argv[sys.argv.index("--optim.warmup-steps") + 1] = "3"


def has_another_program() -> None:
    sys.modules["__main__"].__file__ = __file__.replace("sharded_run", "sharded_job")


def has_no_data() -> None:
    sys.argv[sys.argv.index("--data.path") + 1] = "nowhere"


def sees_other_files() -> None:
    os.mkdir("elsewhere")
    os.chdir("elsewhere")


def hangs() -> None:
    at_step(3, lambda: time.sleep(60))


def is_interrupted() -> None:
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT))


def at_step(number: int, action: Callable[[], None]) -> None:
    """Does something when this rank begins a step."""
    note = Team.step

    def step(self: Team, now: int) -> None:
        note(self, now)
        if now == number:
            time.sleep(0.5)  # the watching thread publishes the step
            action()

    Team.step = step


def stop(step: int) -> dict[str, Any]:
    return {"train__stop_after": step}


SHORT = {"train__max_steps": 4, "eval__interval": None}
OFTEN = {"checkpoint__interval": 5}
CHAINS = {
    "1": [Start(1)],
    "2": [Start(2)],
    "3": [Start(3, {"data__batch_size": 2})],
    "4": [Start(4)],
    "2 x 2": [Start(4, {"mesh__replicate": 2, "mesh__shard": 2})],
    "2 replicas": [Start(2, {"mesh__shard": 1})],
    "again": [Start(2, stop(10)), Start(2)],
    "moved": [
        Start(2, stop(5)),
        Start(1, stop(9)),
        Start(3, stop(13) | {"data__batch_size": 2}),
        Start(4, stop(16)),
        Start(2),
    ],
    "disturbed": [Start(2, {"resume": "never"} | OFTEN, under_torchrun=True), Start(2, OFTEN)],
    "one under torchrun": [Start(1, {"data__path": "nowhere"}, under_torchrun=True)],
    "mesh": [Start(2, {"mesh__shard": 3})],
    "batch": [Start(2, {"data__total_batch_size": 9 * 9})],
    "flag": [Start(2, odd=has_another_flag)],
    "code": [Start(2, odd=has_another_program)],
    "data": [Start(2, odd=has_no_data)],
    "apart": [Start(2, SHORT, odd=sees_other_files, run_dir="here/apart")],
    "other": [
        Start(1, SHORT),
        Start(2, SHORT | {"train__seed": 1}),
        Start(2, SHORT | {"model__n_embd": 16, "init__run_dir": "other"}, run_dir="fresh"),
    ],
    "signal": [Start(2, SHORT, odd=is_interrupted)],
    "hang": [Start(2, SHORT | {"mesh__timeout_s": 5}, odd=hangs)],
}


def line(folder: Path, name: str, start: Start) -> list[str]:
    """The command line of a start."""
    paths = {"data__path": folder / "tokens", "run_dir": folder / (start.run_dir or name)}
    changes = {
        key: folder / value if key == "init__run_dir" else value for key, value in start.changes.items()
    }
    return arguments(*EAGER, **LITTLE | paths | changes)


def go_through(folder: Path, name: str) -> list[dict[str, Any]]:
    """Runs a chain and returns what came of each start: statuses, terminals and seconds."""
    outcomes = []
    for number, start in enumerate(CHAINS[name]):
        begun, terminal = time.monotonic(), folder / f"{name}-{number}"
        if start.under_torchrun:
            status = under_torchrun(start.size, line(folder, name, start), terminal)
            outcomes.append(dict(statuses=[status], said=terminal.read_text()))
            continue
        with socket.socket() as port:
            port.bind(("127.0.0.1", 0))
            port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            pids = [fork(folder, name, start, rank, terminal, port) for rank in range(start.size)]
            statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        seconds = time.monotonic() - begun
        outcomes.append(dict(statuses=statuses, said=terminal.read_text(), seconds=seconds))
    return outcomes


def under_torchrun(size: int, flags: list[str], terminal: Path) -> int:
    """The status of a real torchrun."""
    torchrun = ["-m", "experiments.launch.torchrun", "--standalone", "--max-restarts=1"]
    with terminal.open("w") as said:
        command = [sys.executable, *torchrun, f"--nproc-per-node={size}", __file__, "rank", *flags]
        return subprocess.run(command, stdout=said, stderr=said, timeout=200, check=False).returncode


def fork(folder: Path, name: str, start: Start, rank: int, terminal: Path, port: socket.socket) -> int:
    """Starts a rank and returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, start.size, rank, start.size, "127.0.0.1", port.getsockname()[1])
    os.environ.update({key: str(value) for key, value in zip(names, values, strict=True)})
    for number in (1, 2):
        os.dup2(os.open(terminal, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["experiment", *line(folder, name, start)]
    if rank == 1:
        start.odd()
    end_with(lambda: main(gpt2_124m))


def end_with(action: Callable[[], object]) -> None:
    """Ends the process as Python would: with the status of a SystemExit, or 1."""
    status = 1
    try:
        action()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def go_through_all(folder: Path) -> None:
    """Runs the chains side by side and writes what came of them."""
    (folder / "here").symlink_to("/proc/self/cwd")  # not the same for a process that moves elsewhere
    write_tokens(folder / "tokens", np.cumsum(np.random.default_rng(0).integers(1, 3, 4000)) % 32)
    pids = []
    for name in CHAINS:
        pid = os.fork()
        if not pid:
            path = folder / f"{name}.json"
            end_with(lambda name=name, path=path: path.write_text(json.dumps(go_through(folder, name))))
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)


def be_disturbed() -> None:
    """Rank 1 is killed in step 8 of the first attempt, and rank 0 closes its trackers slowly, as W&B may;
    torchrun is told to stop in step 13 of the next."""

    def stop_torchrun() -> None:
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(2)  # until it has told this rank

    def close_slowly(self: Trackers) -> None:
        time.sleep(2)
        close(self)

    close = Trackers.close
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
        if os.environ["RANK"] == "0":
            at_step(13, stop_torchrun)
    elif os.environ["RANK"] == "1":
        at_step(8, lambda: os.kill(os.getpid(), signal.SIGKILL))
    else:
        Trackers.close = close_slowly


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "rank":
        sys.argv.pop(1)
        be_disturbed()
        main(gpt2_124m)
    else:
        for name in ("matplotlib.pyplot", "torch._dynamo", "nanogpt.orbax_edge"):
            importlib.import_module(name)  # before ranks are forked, for all of them
        warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")  # jax's; it is not in use yet
        go_through_all(Path(sys.argv[1]))
