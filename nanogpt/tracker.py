"""Where a run's records go: the terminal, a file of JSON lines, Weights & Biases.

A record is a flat dict of plain Python values with a "step", the number of finished steps, and one of
training     loss, learning_rate, grad_norm, tokens_per_second, mfu (a fraction), seconds, batch_hash
evaluation   val_loss
sample       sample (text)
"""

import errno
import functools
import io
import json
import math
import netrc
import os
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, runtime_checkable
from urllib.parse import urlsplit

from nanogpt.errors import UserError
from nanogpt.units import format_seconds

Record = dict[str, Any]
Mode = Literal["online", "offline", "disabled"]
Stream = TextIO | io.TextIOBase

CLEAR_LINE = "\r\x1b[K"
LIVE_INTERVAL_S = 0.1
PLAIN_INTERVAL_S = 10.0
WANDB_START_TIMEOUT_S = 20.0
WANDB_FINISH_TIMEOUT_S = 30.0


@runtime_checkable
class Tracker(Protocol):
    """Takes records while a run lasts."""

    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Passes each record to several trackers, in order."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log(self, record: Record) -> None:
        for tracker in self._trackers:
            tracker.log(record)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class Console:
    """Progress for a person: a live line on a terminal, plain lines in a pipe or a file.

    On a terminal the last line is rewritten in place, at most ten times a second; everything else stays
    above. Elsewhere a training record is printed if it is one of the first 10 or the last, or if 10 s or 1 %
    of `total_steps` have passed since the last printed one: that is every step if a run has up to 100 steps,
    or slow ones. `total_steps` is the step at which this run ends. The time left is estimated from the mean
    step of this run after the first, including whatever happens between steps. The run goes on even if nobody
    reads the stream any more.
    """

    def __init__(
        self, total_steps: int, *, stream: Stream | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total_steps = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        self._is_live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._live_line = ""
        self._seen = 0
        self._first = self._shown = (0, -math.inf)  # step and time of the first record and the last shown

    def log(self, record: Record) -> None:
        """Shows the record; a training record only if it is due."""
        if "loss" in record:
            self._log_training(record)
        elif "sample" in record:
            self.message(f"step {record['step']}  sample:\n{textwrap.indent(record['sample'], '  ')}")
        else:
            values = (
                f"{name.replace('_', ' ')} {value:.4f}" for name, value in record.items() if name != "step"
            )
            self.message("  ".join([f"step {record['step']}", *values]))

    def message(self, text: str) -> None:
        """Prints `text` on lines of its own, above the live line."""
        above = CLEAR_LINE if self._live_line else ""
        self._write(f"{above}{printable(text, self._stream)}\n{self._live_line}")

    def close(self) -> None:
        """Ends the live line and leaves it on the terminal."""
        if self._live_line:
            self._write("\n")
        self._live_line = ""

    def _log_training(self, record: Record) -> None:
        step, now = record["step"], self._clock()
        self._seen += 1
        if self._seen == 1:
            self._first = (step, now)
        if not self._is_due(step, now):
            return
        self._shown = (step, now)
        line = _progress(record, self._total_steps, self._seconds_left(step, now))
        if self._is_live:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be rewritten
            # Cut between two values, since the first digits of a number are another one.
            self._live_line = line[: width + 2].rpartition("  ")[0] if len(line) > width else line
            self._write(f"{CLEAR_LINE}{self._live_line}")
        else:
            self._write(f"step {line}\n")

    def _is_due(self, step: int, now: float) -> bool:
        shown_step, shown_time = self._shown
        if step == self._total_steps:
            return True
        if self._is_live:
            return now - shown_time >= LIVE_INTERVAL_S
        one_percent = self._total_steps / 100
        return self._seen <= 10 or step - shown_step >= one_percent or now - shown_time >= PLAIN_INTERVAL_S

    def _seconds_left(self, step: int, now: float) -> float | None:
        first_step, first_time = self._first
        if step == first_step:
            return None
        return (now - first_time) / (step - first_step) * (self._total_steps - step)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # the reader or the terminal is gone
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class JsonLines:
    """Appends each record to a file as one line of JSON, which is in the file once `log` returns.

    Numbers keep full precision; NaN and infinities, which JSON lacks, become null. A run that starts at step
    0 starts the file anew; one that resumes at `from_step` first drops the records of later steps that an
    earlier run wrote. Raises UserError if the file cannot be written, or is not one that this class wrote.
    """

    def __init__(self, path: Path, *, from_step: int) -> None:
        try:
            if path.exists():
                kept = [record for record in read_metrics(path) if from_step and record["step"] <= from_step]
                _write_atomically(path, "".join(map(_json_line, kept)).encode())
            self._file = path.open("ab", buffering=0)  # unbuffered: one write per line, so a kill loses none
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another --run-dir") from error

    def log(self, record: Record) -> None:
        line = _json_line(record).encode()
        while line:  # a nearly full disk takes only part of it, and the next write raises why
            line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a file that `JsonLines` wrote, without a last line that a crash has cut short.

    Raises UserError if any other line is not a record, and OSError if the file cannot be read.
    """
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline comes nothing, or a cut line
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path} line {number} is not JSON ({error}); correct or delete the line"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UserError(f'{path} line {number} has no "step"; correct or delete the line')
        records.append(record)
    return records


def _write_atomically(path: Path, content: bytes) -> None:
    """Replaces the file in one move: whenever the program stops, the old or the new content is there."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


class WandB:
    """Sends records to Weights & Biases; a failure there is reported in one line and never stops the run.

    `mode` None means WANDB_MODE or, if that is empty or not set, online when logged in and offline otherwise.
    Nothing ever prompts for a key. If online does not start within WANDB_START_TIMEOUT_S, records go to files
    (offline), which `wandb sync` uploads. Files are in `directory`/wandb; `directory`/wandb_id.txt holds the
    run's id at W&B, under which a resumed run (`from_step` > 0) continues. `say` prints the line.
    """

    def __init__(
        self,
        mode: Mode | None,
        *,
        directory: Path,
        config: dict[str, Any],
        from_step: int,
        say: Callable[[str], None],
        project: str = "nanogpt",
    ) -> None:
        self._say = say
        self._run: Any = None
        wanted = mode or wandb_mode()
        if wanted == "disabled":
            return
        with _Attempt() as attempt:
            id_path = directory / "wandb_id.txt"
            run_id = id_path.read_text().strip() if from_step and id_path.exists() else None
            start = functools.partial(_start_wandb, project=project, id=run_id, dir=directory, config=config)
            why = (
                self._try_online(start, is_required=wanted == "online") if wanted in (None, "online") else ""
            )
            if self._run is None:
                self._run = start(mode="offline")
            id_path.write_text(f"{self._run.id}\n")
            own = shlex.quote(str(Path(self._run.dir).parent))
            where = self._run.url or f"offline{why}; `wandb sync {own}` uploads it"
            self._say(f"Weights & Biases: {where}")
        self._give_up_if(attempt)

    def log(self, record: Record) -> None:
        if self._run is None:
            return
        with _Attempt() as attempt:
            self._run.log(
                {name: value for name, value in record.items() if name != "step"}, step=record["step"]
            )
        self._give_up_if(attempt)

    def close(self) -> None:
        """Ends the run at W&B; waits at most WANDB_FINISH_TIMEOUT_S for uploads to finish."""
        if self._run is None:
            return
        with _Attempt() as attempt:
            self._run.finish()
        self._give_up_if(attempt)
        self._run = None

    def _try_online(self, start: Callable[..., Any], *, is_required: bool) -> str:
        """Starts the run online if possible; returns why it could not, or "" if nobody needs to know."""
        if not is_logged_in():
            return " (not logged in: run `wandb login`)" if is_required else ""
        with _Attempt() as attempt:
            self._run = start(mode="online", resume="allow")
        if attempt.error is None:
            return ""
        import wandb

        wandb.teardown()  # or its server process keeps claiming the run's id
        return f" (online failed: {_in_short(attempt.error)})"

    def _give_up_if(self, attempt: "_Attempt") -> None:
        if attempt.error is not None:
            self._run = None
            self._say(f"Weights & Biases is off from here on: {_in_short(attempt.error)}")


class _Attempt:
    """A block of wandb's code; if wandb, the network or the disk fails, it ends and `error` says why.

    wandb's errors have no common base class and come from private modules, so they are recognized by the name
    of their module.
    """

    error: BaseException | None = None

    def __enter__(self) -> "_Attempt":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self.error = error
        if kind is None:
            return False
        is_theirs = kind.__module__.partition(".")[0] == "wandb"
        return is_theirs or issubclass(kind, (OSError, ValueError, RuntimeError, ImportError))


def _start_wandb(**arguments: Any) -> Any:
    """wandb.init, printing nothing."""
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=WANDB_START_TIMEOUT_S, finish_timeout=WANDB_FINISH_TIMEOUT_S
    )
    wandb.setup(settings=settings)
    return wandb.init(settings=settings, **arguments)


def wandb_mode() -> str | None:
    """WANDB_MODE; None if it is empty, which wandb itself would refuse: so it is unset, as is meant."""
    mode = os.environ.get("WANDB_MODE", "").strip()
    if not mode:
        os.environ.pop("WANDB_MODE", None)
    return mode or None


def is_logged_in() -> bool:
    """Whether wandb would find a key for its server and so would not prompt for one; uses no network."""
    import wandb

    settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.api_key:
        return True
    server = urlsplit(settings.base_url).netloc
    # From wandb 0.31 on the public server has a new name, but a key stored under the old one is still taken.
    servers = {server, "api.wandb.ai"} if settings.base_url == wandb.Settings().base_url else {server}
    places = [
        Path(place).expanduser() for place in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc") if place
    ]
    path = next((place for place in places if place.exists()), None)
    try:
        return path is not None and any(netrc.netrc(path).authenticators(name) for name in servers)
    except (netrc.NetrcParseError, OSError):
        return False


def _in_short(error: BaseException) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 200)


def _json_line(record: Record) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite) + "\n"


def _progress(record: Record, total_steps: int, seconds_left: float | None) -> str:
    """One line, under 80 columns at GPT-2's size: step, loss, learning rate, tokens/s, MFU, time left."""
    parts = [
        f"{record['step']:>{len(str(total_steps))}}/{total_steps}",
        f"loss {record['loss']:.4f}",
        f"rate {record['learning_rate']:.2e}",
        f"{record['tokens_per_second']:,.0f} tok/s",
        f"MFU {record['mfu']:.1%}",
    ]
    return "  ".join(parts if seconds_left is None else [*parts, f"left {format_seconds(seconds_left)}"])


def printable(text: str, stream: Stream) -> str:
    """`text` as the stream can show it: a sample may hold control codes, and a stream may be ASCII."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    encoding = stream.encoding or "utf-8"
    return shown.encode(encoding, "replace").decode(encoding)
