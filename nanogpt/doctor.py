"""Finds what is wrong with this machine, or under torchrun with all machines, before a run does.

    python -m nanogpt.doctor [--data-path data/openwebtext] [--run-dir runs/gpt2_124m]
    torchrun --nproc-per-node=8 -m nanogpt.doctor

Exit status: 0 all is well, 1 there is a warning, 2 there is an error.
"""

import json
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch.cuda import nccl as cuda_nccl

import nanogpt
from nanogpt import command, folders, perf, tracker
from nanogpt.data import open_tokens
from nanogpt.dataset import BUNDLED, find_folder
from nanogpt.errors import UserError
from nanogpt.meeting import host, world
from nanogpt.processes import Team
from nanogpt.units import format_bytes, format_count

LOW_MEMORY_BYTES, LOW_DISK_BYTES = 2 * 10**9, 20 * 10**9
"""Below these a run of 124M may not start: its parameters and AdamW state are 1.5 GB, as is a checkpoint."""
BUSY_GPU = 0.1
"""If more than this fraction of a GPU's memory is taken, somebody else is computing there."""
CLOCK_SKEW_S = 1.0
"""Clocks are read within some 0.05 s of each other, so less than this may be no skew."""

Level = Literal["ok", "warning", "error"]
STATUS: dict[Level, int] = {"ok": 0, "warning": 1, "error": 2}


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What to look at besides the machine."""

    data_path: str | None = None
    """Data folder to open, as --data.path of a run; None takes the one that a run would take."""
    run_dir: Path = Path("runs")
    """Where a run would write: only its disk is checked, nothing is written."""


class Finding(NamedTuple):
    """One line of the table."""

    level: Level
    subject: str
    text: str


class Gpu(NamedTuple):
    """A GPU that a rank sees."""

    index: int
    name: str
    capability: str
    precision: str
    """The one that runs take here if none is asked for."""
    total_bytes: int
    available_bytes: int


class Facts(NamedTuple):
    """What one rank sees, without judging it."""

    rank: int
    host: str
    local_size: int
    versions: dict[str, str]
    gpus: list[Gpu]
    cpu: str
    bf16_fast: bool
    memory_bytes: int
    disk_bytes: int | None
    """Free bytes for the run directory; None if it cannot be written."""
    clock_s: float
    """Seconds since the epoch, read on all ranks at the same moment."""


def main() -> None:
    """Prints the table on rank 0 and exits with the status of the worst finding."""
    with command.mistakes_in_a_sentence(), Team(world()) as team:
        config = team.together(lambda: command.parse(DoctorConfig, default=DoctorConfig()))
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        every = gather(team, device_type, config.run_dir)
        own = [*compiler_findings(device_type), *wandb_findings(), *data_findings(config.data_path)]
        found = findings(every) + of_all_ranks(every, team.gather(json.dumps(own)))
        if team.world.size > 1:
            found += all_reduce_findings(team, device_type)
        if team.world.rank == 0:
            print(table(found), flush=True)
        sys.exit(status_of(found))


def preflight(team: Team, device_type: str, run_dir: Path) -> list[Finding]:
    """The findings worth reporting in the first second of a distributed run: the same list on every rank.

    The team must be connected. Raises UserError if a rank does not answer.
    """
    found = findings(gather(team, device_type, run_dir))
    team.small_all_reduce(device_type)
    return [finding for finding in found if finding.level != "ok"]


def status_of(found: Sequence[Finding]) -> int:
    return max((STATUS[finding.level] for finding in found), default=0)


def table(found: Sequence[Finding]) -> str:
    """The findings in columns, and a line that counts them."""
    width = max(len(finding.subject) for finding in found)
    lines = [f"{finding.level:<7}  {finding.subject:<{width}}  {finding.text}" for finding in found]
    counts = Counter(finding.level for finding in found)
    return "\n".join([*lines, ", ".join(f"{counts[level]} {level}" for level in STATUS)])


def gather(team: Team, device_type: str, run_dir: Path) -> list[Facts]:
    """The facts of every rank, by rank."""
    own = facts(team, device_type, run_dir)
    texts = team.gather(json.dumps(own))
    every = [Facts(*json.loads(text)) for text in texts]
    return [each._replace(gpus=[Gpu(*gpu) for gpu in each.gpus]) for each in every]


def facts(team: Team, device_type: str, run_dir: Path) -> Facts:
    """What this rank sees; of GPUs only its own, since querying one costs memory on it.

    A rank that is alone sees all GPUs, or none if the CPU trains.
    """
    place, count = team.world, torch.cuda.device_count() if device_type == "cuda" else 0
    indices = range(count) if place.size == 1 else [index for index in [place.local_rank] if index < count]
    here = perf.detect(torch.device("cpu"))
    gpus = []
    for index in indices:
        seen = perf.detect(torch.device("cuda", index))
        capability = "{}.{}".format(*torch.cuda.get_device_capability(index))
        precision = perf.default_precision(seen)
        gpus.append(Gpu(index, seen.name, capability, precision, seen.total_bytes, seen.available_bytes))
    existing = folders.nearest(run_dir)
    can_write = existing.is_dir() and os.access(existing, os.W_OK)
    team.gather("")  # all ranks get past this at the same moment, to within a query to the store
    clock_s = time.time()
    return Facts(
        rank=place.rank,
        host=host(),
        local_size=place.local_size,
        versions=versions(),
        gpus=gpus,
        cpu=here.name,
        bf16_fast=here.bf16_fast,
        memory_bytes=here.available_bytes,
        disk_bytes=shutil.disk_usage(existing).free if can_write else None,
        clock_s=clock_s,
    )


def versions() -> dict[str, str]:
    """Versions of whatever has to be the same on every machine."""
    nccl = ".".join(map(str, cuda_nccl.version())) if torch.cuda.is_available() else "none"
    return {
        "nanogpt": nanogpt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "NCCL": nccl,
    }


def findings(every: Sequence[Facts]) -> list[Finding]:
    """What the facts of all ranks say, in the order of the table."""
    kinds = (
        version_findings,
        gpu_findings,
        precision_findings,
        memory_findings,
        disk_findings,
        clock_findings,
    )
    return [finding for kind in kinds for finding in kind(every)]


def of_all_ranks(every: Sequence[Facts], texts: Sequence[str]) -> list[Finding]:
    """Merges what each rank found by itself (JSON): all of rank 0's, then what only others found, and who."""
    first, *others = ([Finding(*finding) for finding in json.loads(text)] for text in texts)
    more = [
        finding._replace(text=f"{where(each)}: {finding.text}")
        for each, found in zip(every[1:], others, strict=True)
        for finding in found
        if finding not in first
    ]
    return first + more


def version_findings(every: Sequence[Facts]) -> list[Finding]:
    first = every[0].versions
    odd = [
        Finding(
            "error",
            "versions",
            f"{name} is {each.versions[name]} on {where(each)} and {first[name]} on rank 0",
        )
        for name in first
        for each in every
        if each.versions[name] != first[name]
    ]
    same = ", ".join(f"{name} {version}" for name, version in first.items())
    return odd or [Finding("ok", "versions", same)]


def gpu_findings(every: Sequence[Facts]) -> list[Finding]:
    """Whether each rank has a GPU, all are of one model, and nobody else fills them."""
    named = [(each, gpu) for each in every for gpu in each.gpus]
    if not named:
        return [Finding("ok", "GPUs", f"none visible; the CPU trains ({every[0].cpu})")]
    found = [
        Finding(
            "error", "GPUs", f"{where(each)} has no GPU, others do; set --nproc-per-node to the GPUs there"
        )
        for each in every
        if not each.gpus
    ]
    (usual, _), *_ = Counter(gpu.name for _, gpu in named).most_common(1)
    for each, gpu in named:
        place = f"GPU {gpu.index} of {where(each)}"
        if gpu.name != usual:
            text = f"{place} is a {gpu.name}, the others are {usual}: every step waits for the slowest"
            found.append(Finding("warning", "GPUs", text))
        used = gpu.total_bytes - gpu.available_bytes
        if used > BUSY_GPU * gpu.total_bytes:
            text = f"{format_bytes(used)} of {place} are taken; see who computes there with make gpu-status"
            found.append(Finding("warning", "GPUs", text))
    return found or [Finding("ok", "GPUs", f"{len(named)} x {usual}")]


def precision_findings(every: Sequence[Facts]) -> list[Finding]:
    """Whether bfloat16, the default, is multiplied by the hardware."""
    named = [(f"GPU {gpu.index} of {where(each)}", gpu) for each in every for gpu in each.gpus]
    slow = [
        f"{place} (compute capability {gpu.capability}; runs there take {gpu.precision})"
        for place, gpu in named
        if gpu.precision != "bfloat16"
    ]
    if slow:
        return [Finding("warning", "bfloat16", f"slow on {', '.join(slow)}")]
    if named:
        capabilities = ", ".join(sorted({gpu.capability for _, gpu in named}))
        return [Finding("ok", "bfloat16", f"in hardware, compute capability {capabilities}")]
    text = "in hardware" if every[0].bf16_fast else "not in this CPU's hardware; runs take float32"
    return [Finding("ok", "bfloat16", text)]


def memory_findings(every: Sequence[Facts]) -> list[Finding]:
    lowest = min(every, key=lambda each: each.memory_bytes)
    free = f"{format_bytes(lowest.memory_bytes)} free"
    if lowest.memory_bytes < LOW_MEMORY_BYTES * lowest.local_size:
        need = format_bytes(LOW_MEMORY_BYTES * lowest.local_size)
        return [Finding("warning", "memory", f"{free} on {where(lowest)}, expected {need} for its processes")]
    return [Finding("ok", "memory", free if len(every) == 1 else f"{free} on {where(lowest)}, the least")]


def disk_findings(every: Sequence[Facts]) -> list[Finding]:
    locked = [each for each in every if each.disk_bytes is None]
    if locked:
        text = f"the run directory cannot be written on {where(locked[0])}; choose another --run-dir"
        return [Finding("error", "disk", text)]
    least, place = min((each.disk_bytes or 0, each.rank) for each in every)
    if least < LOW_DISK_BYTES:
        need = format_bytes(LOW_DISK_BYTES)
        text = f"{format_bytes(least)} free on {where(every[place])}, expected {need} for checkpoints"
        return [Finding("warning", "disk", text)]
    return [Finding("ok", "disk", f"{format_bytes(least)} free")]


def clock_findings(every: Sequence[Facts]) -> list[Finding]:
    """Whether clocks agree: if not, the ranks' logs cannot be put in order, and certificates may fail."""
    first = every[0]
    odd = [each for each in every if abs(each.clock_s - first.clock_s) > CLOCK_SKEW_S]
    if odd:
        skew = odd[0].clock_s - first.clock_s
        text = f"{where(odd[0])} is {skew:+.1f} s from rank 0; let its machine take the time from the network"
        return [Finding("warning", "clocks", text)]
    return [Finding("ok", "clocks", f"within {CLOCK_SKEW_S:.0f} s")] if len(every) > 1 else []


def compiler_findings(device_type: str) -> list[Finding]:
    """Whether torch.compile finds the compiler it calls: for launchers on GPUs, for everything on a CPU."""
    names = ["gcc", "clang"] if device_type == "cuda" else ["clang++" if sys.platform == "darwin" else "g++"]
    chosen = os.environ.get("CC" if device_type == "cuda" else "CXX")
    paths = [path for name in ([chosen] if chosen else names) if (path := shutil.which(name))]
    if paths:
        return [Finding("ok", "compiler", paths[0])]
    return [
        Finding("warning", "compiler", f"no {' or '.join(names)} on the PATH; runs are eager, and slower")
    ]


def wandb_findings() -> list[Finding]:
    """How a run without --track.wandb would be tracked."""
    if mode := tracker.wandb_mode():
        return [Finding("ok", "W&B", f"WANDB_MODE is {mode}")]
    try:
        if tracker.is_logged_in():
            return [Finding("ok", "W&B", "logged in; runs are online")]
    except ImportError as error:
        return [Finding("warning", "W&B", f"cannot be imported ({error}); runs are not tracked there")]
    return [Finding("ok", "W&B", "not logged in; runs are offline until `wandb login`")]


def data_findings(path: str | None) -> list[Finding]:
    """Whether the data folder is there and its files can be opened."""
    try:
        if path in BUNDLED and not Path(path).is_dir():
            return [Finding("ok", "data", f"{path}, bundled")]
        folder, note = find_folder(path)
        counts = [
            f"{split} {format_count(len(open_tokens(folder / f'{split}.bin')))}" for split in ("train", "val")
        ]
    except UserError as mistake:
        return [Finding("error", "data", str(mistake))]
    return [Finding("ok", "data", f"{folder}: {', '.join(counts)} tokens{f' ({note})' if note else ''}")]


def all_reduce_findings(team: Team, device_type: str) -> list[Finding]:
    """Whether a number can be added over all ranks."""
    with team.connected(device_type, timeout_s=60):
        try:
            start = time.perf_counter()
            team.small_all_reduce(device_type)
        except UserError as mistake:
            return [Finding("error", "all-reduce", str(mistake))]
        seconds = time.perf_counter() - start
    return [
        Finding("ok", "all-reduce", f"over {team.world.size} ranks in {seconds * 1000:.0f} ms, the first one")
    ]


def where(each: Facts) -> str:
    return f"rank {each.rank} ({each.host})"


if __name__ == "__main__":
    main()
