"""What every benchmark shares: statistics, tables, facts about a machine, and the JSON line at the end."""

import contextlib
import datetime
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanogpt import perf
from nanogpt.command import mistakes_in_a_sentence
from nanogpt.errors import UserError
from nanogpt.run_dir import git_commit

FIRST_STEP = "a first step finds whatever compile cache earlier processes have left"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class Spread(NamedTuple):
    """Timings or ratios, summed up."""

    median: float
    min: float
    max: float
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""
    count: int


def spread(values: Iterable[float]) -> Spread:
    """The median of `values` and how far they spread around it."""
    values = sorted(values)
    if len(values) == 1:
        return Spread(*[values[0]] * 5, 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, values[0], values[-1], low, high, len(values))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[str] = ()) -> str:
    """Aligned columns: the first and those of `words` to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    to_the_left = [column == 0 or name in words for column, name in enumerate(header)]

    def aligned(line: list[str]) -> str:
        columns = zip(line, widths, to_the_left, strict=True)
        return "  ".join(
            cell.ljust(width) if left else cell.rjust(width) for cell, width, left in columns
        ).rstrip()

    return "\n".join(
        [aligned(lines[0]), "  ".join("-" * width for width in widths), *map(aligned, lines[1:])]
    )


def facts(device: str) -> dict[str, Any]:
    """What one must know to interpret a number: hardware, versions, commit, command, date, load."""
    hardware = perf.detect(torch.device(device))
    return {
        "device": device,
        "hardware": hardware.name,
        "cores": hardware.cpu_cores,
        "memory_bytes": hardware.total_bytes,
        "bf16_fast": hardware.bf16_fast,
        "driver": driver_version() if hardware.device.type == "cuda" else None,
        "cuda": torch.version.cuda if hardware.device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "command": shlex.join(["python", "-m", command_name(), *sys.argv[1:]]),
    }


def driver_version(path: Path = NVIDIA_DRIVER) -> str | None:
    """The version of NVIDIA's kernel module; None if it is not readable, as in some containers."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(\.\d+)+)\s", path.read_text())
    except OSError:
        return None
    return found[1] if found else None


def command_name() -> str:
    """The module that was started, as `python -m` wants it."""
    spec = sys.modules["__main__"].__dict__.get("__spec__")
    return spec.name if spec else os.path.basename(sys.argv[0])


def versions_line(versions: dict[str, str | None]) -> list[str]:
    """The note below a table that names the versions that ran; no line if none is known."""
    known = [f"{name} {version}" for name, version in versions.items() if version]
    return [", ".join(known)] if known else []


def say(text: str) -> None:
    """Prints progress on stderr: it is not part of the result."""
    print(text, file=sys.stderr, flush=True)


def finish(result: dict[str, Any]) -> None:
    """The JSON line that ends a benchmark's output."""
    print(json.dumps(result), flush=True)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON of a file: all of it, or its last line, as a benchmark prints it."""
    try:
        text = path.read_text().strip()
        found = json.loads(text if text.startswith("{") else text.splitlines()[-1], parse_constant=refuse)
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} cannot be read as a result ({error}); give a benchmark's output") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, no result; give a benchmark's output")
    if not isinstance(found.get("benchmark"), str):
        raise UserError(f"{path} names no benchmark, so it is no result of one; give a benchmark's output")
    if found["benchmark"] == "report" and not isinstance(found.get("results"), dict):
        raise UserError(
            f"{path} is a report without results; give another, or run python -m benchmarks.report"
        )
    return found


def refuse(constant: str) -> None:
    """Raises ValueError: no benchmark measures NaN or Infinity."""
    raise ValueError(f"{constant} is no number")


def write_whole(path: Path, text: str) -> None:
    """Puts `text` into the file, which keeps what it had until all of the text is written."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


@contextlib.contextmanager
def whole_results(*paths: Path) -> Iterator[None]:
    """Raises UserError if a result from one of `paths` lacks a part, or has something else in its place."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        files = " or ".join(map(str, paths))
        raise UserError(
            f"{files} is not as a benchmark writes it ({type(error).__name__}: {error}), expected every part "
            f"of a result; give one that was not edited, or measure again"
        ) from error


def flags_set(config: Any, *names: str) -> str:
    """Those of a config's fields `names`, as flags, that are not as usual: "--batch-size, --starts"."""
    values, usual = asdict(config), asdict(type(config)())
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names) if values[name] != usual[name])


def say_what_quick_leaves_out(config: Any, *names: str) -> None:
    """Names the flags that are not used because of --quick; nothing if none of them was set."""
    if config.quick and (unused := flags_set(config, *names)):
        say(f"--quick has sizes of its own, so {unused} is not used")


def require_at_least(least: int, **values: int | tuple[int, ...] | None) -> None:
    """Raises UserError for a value below `least`, naming its flag; None leaves the choice to the program."""
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (least if value is None else value,)
        if min(numbers, default=least - 1) < least:
            got, words = " ".join(map(str, numbers)) or "not given", name.split("_")
            raise UserError(f"{' '.join(words)} is {got}, expected at least {least}; set --{'-'.join(words)}")


def require_at_most(most: int, **values: int | tuple[int, ...]) -> None:
    """Raises UserError, naming the flag, for a value above `most`."""
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if max(numbers, default=most) > most:
            got, words = " ".join(map(str, numbers)), name.split("_")
            raise UserError(f"{' '.join(words)} is {got}, expected at most {most}; set --{'-'.join(words)}")


def require_some(**values: tuple[object, ...] | None) -> None:
    """Raises UserError for a flag of several values without any; None leaves the choice to the program."""
    for name, value in values.items():
        if value == ():
            words = name.split("_")
            raise UserError(
                f"{' '.join(words)} is not given, expected at least one value; set --{'-'.join(words)}"
            )


def choose_device(device: str | None) -> str:
    """`device`, "cpu" or "cuda"; for None the GPU if there is one, else the CPU.

    Raises UserError for any other device, and for "cuda" if there is no GPU.
    """
    if device not in (None, "cpu", "cuda"):
        raise UserError(
            f"device is {device!r}, expected cpu or cuda; set --device, and CUDA_VISIBLE_DEVICES to the "
            "number of one of several GPUs"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no device cuda on this machine; set --device cpu")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def ended_with_us(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """Waits for the process; ends it before that if the body is left early."""
    with process:
        try:
            yield process
        except BaseException:
            process.terminate()
            raise


@contextlib.contextmanager
def sigterm_as_an_error() -> Iterator[None]:
    """Makes SIGTERM end the body as an error does: it removes its files and ends its processes on the way."""

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # one is enough
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:  # not if meeting.ignore_torchrun has replaced it
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program as a run ends; every ValueError and OSError counts as the user's mistake."""
    with mistakes_in_a_sentence(), sigterm_as_an_error():
        try:
            yield
        except BrokenPipeError:  # nobody reads what is printed
            raise
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from error
