"""What the Makefile's GPU targets do. `status` and `kill` run without the project's environment.

NGPUS, MAX_RESTARTS, GPUS and ARGS come through the environment, so that no shell interprets what was typed.
Exit status 0: done. 2: it cannot be done here, and one sentence says why.
"""

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

GRACE_S = 30.0
"""Seconds that a process has between being asked to end, when a run saves, and being forced to."""


class Process(NamedTuple):
    """A process that computes on a GPU, as nvidia-smi reports it."""

    pid: int
    name: str
    memory_mib: str


def status() -> None:
    """Print each GPU's use and memory, and the processes on it; or say that there is no GPU."""
    if not shutil.which("nvidia-smi"):
        print("No GPU here: nvidia-smi is not on the PATH.")
        return
    print(query("gpu", "index,name,utilization.gpu,memory.used,memory.total,temperature.gpu", units=True))
    for process in processes():
        print(f"pid {process.pid} ({owner(process.pid)}): {process.name}, {process.memory_mib} MiB")


def kill() -> None:
    """List the caller's own GPU processes, ask, then end them: SIGTERM first, SIGKILL after GRACE_S."""
    if not shutil.which("nvidia-smi"):
        print("No GPU here, so nothing to end: nvidia-smi is not on the PATH.")
        return
    own = [process for process in processes() if uid(process.pid) == os.getuid()]
    if not own:
        print("No GPU process of yours is running.")
        return
    for process in own:
        print(f"pid {process.pid}: {process.name}, {process.memory_mib} MiB")
    print(f"End {'it' if len(own) == 1 else f'these {len(own)}'}? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        print("Nothing was ended.")
        return
    end([process.pid for process in own])


def end(pids: list[int]) -> None:
    """Ask all to end, wait up to GRACE_S for them, and force those that are left.

    For the ranks of a torchrun, torchrun itself is asked, since it would start them again.
    """
    asked = list({starter(pid): None for pid in pids})
    send(asked, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while (left := [pid for pid in {*asked, *pids} if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    send(left, signal.SIGKILL)
    forced = f" ({', '.join(map(str, left))} only by force)" if left else ""
    print(f"Ended {', '.join(map(str, pids))}{forced}.")


def starter(pid: int) -> int:
    """The torchrun that started a process, if it is the caller's; else the process itself."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return pid
    # Matches a whole argument, with or without a path, but not a shell whose command line only mentions it.
    is_torchrun = re.search(rb"(^|[\0/.])torchrun(\.py)?\0|torch\.distributed\.run\0", command)
    return parent if is_torchrun and uid(parent) == os.getuid() else pid


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def hot() -> NoReturn:
    """Become experiments.launch.hot on the GPUs that GPUS names."""
    wanted = os.environ["GPUS"]
    if not re.fullmatch(r"\d+(,\d+)*", wanted):
        fail(f"GPUS is {wanted!r}, expected numbers such as 0,1,2")
    indices = [int(index) for index in wanted.split(",")]
    if max(indices) >= (available := gpu_count("gpu-hot")):
        fail(f"GPUS is {wanted}, and the GPUs here are 0 to {available - 1}; leave out {max(indices)}")
    os.execv(sys.executable, [sys.executable, "-m", "experiments.launch.hot", wanted])


def ddp_train() -> NoReturn:
    """Become torchrun with NGPUS processes of experiments.gpt2_124m; on the CPU (gloo) if ARGS says so."""
    wanted, arguments = os.environ["NGPUS"], split(os.environ["ARGS"])
    if not re.fullmatch(r"[1-9]\d*", wanted):
        fail(f"NGPUS is {wanted!r}, expected a number from 1")
    on_cpu = "--train.device=cpu" in arguments or ("--train.device", "cpu") in itertools.pairwise(arguments)
    if not on_cpu and int(wanted) > (available := gpu_count("ddp-train")):
        fail(
            f"NGPUS is {wanted}, and {available} {'is' if available == 1 else 'are'} visible here; "
            f"set NGPUS={available} or less"
        )
    restarts = os.environ.get("MAX_RESTARTS") or "3"
    if not restarts.isdecimal():
        fail(f"MAX_RESTARTS is {restarts!r}, expected a number from 0")
    # torchrun would give each process one thread. --standalone takes a free port.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(wanted))))
    launcher = [sys.executable, "-m", "experiments.launch.torchrun", "--standalone"]
    flags = [f"--nproc-per-node={wanted}", f"--max-restarts={restarts}", "-m", "experiments.gpt2_124m"]
    os.execv(sys.executable, [*launcher, *flags, *arguments])


def doctor() -> NoReturn:
    """Become nanogpt.doctor with the flags in ARGS."""
    os.execv(sys.executable, [sys.executable, "-m", "nanogpt.doctor", *split(os.environ["ARGS"])])


def split(text: str) -> list[str]:
    """The words of ARGS, with quotes as in a shell and nothing expanded."""
    try:
        return shlex.split(text)
    except ValueError as error:
        fail(f"ARGS is {text!r}, which cannot be split into words ({error}); close the quotes")


def gpu_count(target: str) -> int:
    """How many GPUs a program started here would see; ends this program if there is none."""
    if not shutil.which("nvidia-smi"):
        hint = "; add ARGS='--train.device cpu' for processes on the CPU" if target == "ddp-train" else ""
        fail(f"{target} needs a GPU and there is none here: nvidia-smi is not on the PATH{hint}")
    listed = len(re.findall(r"^\d+$", query("gpu", "index"), re.MULTILINE))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [] if visible is None else re.findall(r"[^,\s]+", visible)
    shown = list(itertools.takewhile(lambda name: not name.startswith("-"), named))  # as CUDA reads it
    count = listed if visible is None else min(listed, len(shown))
    if count == 0:
        hidden = "" if visible is None else f", CUDA_VISIBLE_DEVICES is {visible!r}"
        fail(f"{target} needs a GPU and none is visible here (nvidia-smi lists {listed}{hidden})")
    return count


def processes() -> list[Process]:
    """Everybody's processes that compute on a GPU, each once."""
    answer = query("compute-apps", "pid,used_memory,process_name")  # or a sentence, or [N/A] for a pid
    rows = re.findall(r"^(\d+), (.*?), (.*)$", answer, re.MULTILINE)
    return list({int(pid): Process(int(pid), name, memory) for pid, memory, name in rows}.values())


def query(what: str, fields: str, *, units: bool = False) -> str:
    """nvidia-smi's answer, one row per line; ends the program if the driver does not answer."""
    form = "csv" if units else "csv,noheader,nounits"
    command = ["nvidia-smi", f"--query-{what}={fields}", f"--format={form}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        fail(f"nvidia-smi ended with status {answer.returncode}: {(answer.stdout + answer.stderr).strip()}")
    return answer.stdout.strip()


def uid(pid: int) -> int | None:
    """The user a process belongs to; None if it is gone or outside this container."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except FileNotFoundError:
        return None


def owner(pid: int) -> str:
    return {None: "not visible from here", os.getuid(): "yours"}.get(uid(pid), f"user {uid(pid)}")


def running(pid: int) -> bool:
    """Whether a process still holds anything: a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def fail(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    {"status": status, "kill": kill, "hot": hot, "ddp-train": ddp_train, "doctor": doctor}[sys.argv[1]]()
