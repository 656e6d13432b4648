"""How the processes of a run agree with each other and end together.

All communication goes through the store at MASTER_ADDR:MASTER_PORT, so it also works before a process group
exists and while a collective hangs. A single process (no torchrun) is a team of one, which exchanges nothing
and waits for nobody. A user's mistake on one rank ends every rank with status 2; any other failure ends them
with status 1, to which torchrun responds with a restart.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from nanogpt.errors import UserError
from nanogpt.meeting import (
    World,
    agent_has_store,
    host,
    ignore_torchrun,
    meet,
    meeting_point,
    missing_after,
    own_connection,
    stop_restarts,
)

Result = TypeVar("Result")

MEETING_TIMEOUT_S = 60.0
"""torchrun starts the processes once all machines have joined, so this only has to cover importing torch."""
CHECKS_TIMEOUT_S = 600.0
"""For the ranks' work before training starts, such as rank 0 tokenizing the bundled text."""
POLL_S = 0.25
"""How often a rank checks whether another one has given up: four small queries to the store a second."""
ANSWER_S = 2.0
"""How long a rank that noticed a broken collective waits for the others to report that they are alive."""
GRACE_S = 3.0
"""How long ranks wait for each other to end, and the watching thread for the main one."""

STALLED = 0.9
"""Fraction of the collectives' timeout after which an unfinished step is worth a warning."""

DOCTOR = "python -m nanogpt.doctor"
BROKEN_COLLECTIVE = re.compile(
    r"gloo|NCCL|nccl|Connection (closed|reset|refused)|[Tt]imed? ?out|timeout|Broken pipe|[Ss]ocket"
)
"""What torch's messages have in common: gloo raises plain RuntimeErrors, some of which do not mention it."""


class LostRank(RuntimeError):
    """Another rank is gone, hangs, or stopped with a bug; the sentence says which. A restart may help."""


class Ending(NamedTuple):
    """The exit status and reason with which a rank gives up, as it tells the others."""

    status: int
    sentence: str
    absent: list[int]
    """Ranks that nobody needs to wait for."""


def flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Prints nothing of what Python code prints; yields where it goes instead."""
    unheard = io.StringIO()
    with contextlib.redirect_stdout(unheard), contextlib.redirect_stderr(unheard):
        yield unheard


def code_hashes() -> dict[str, str]:
    """A short hash of each .py file of this package and of the program's file, for `Team.agree`."""
    root = Path(__file__).parent
    files = {str(path.relative_to(root.parent)): path for path in root.rglob("*.py")}
    program = sys.modules["__main__"].__dict__.get("__file__")
    if program is not None and Path(program).is_file():
        files.setdefault(Path(program).name, Path(program))
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for name, path in sorted(files.items())}


class Team:
    """The processes of a run, as one of them sees them: a context in which all end when one fails.

    with Team(world()) as team:
        config = team.together(parse)               # a mistake of one rank is raised on all
        with team.rank_output(run_dir / "logs"), team.connected("cuda", timeout_s=600):
            team.agree(code_hashes())
            team.step(n)                            # in the loop, for the message when it hangs

    If the ranks do not meet within `timeout_s`, entering the context ends the process with one sentence. If
    there are several, leaving it with an exception ends the process by os._exit: threads of a broken group, a
    tracker or a checkpoint may wait for ranks that are gone, and a regular exit would wait for those threads.
    So does a Ctrl-C in any process: a regular exit would wait for all that the compiler has been asked for.
    """

    def __init__(self, world: World, *, timeout_s: float = MEETING_TIMEOUT_S) -> None:
        self.world = world
        self.step_now = 0
        self._timeout_s = timeout_s
        self._store: Store | None = None
        self._farewell: Store | None = None
        self._hosts: list[str] = []
        self._rounds = 0
        self._ended = threading.Event()
        self._is_ending = threading.Lock()
        self._limit: tuple[float, str] | None = None
        self._patience_s = math.inf
        self._terminal = 2
        self._log: Path | None = None

    def __enter__(self) -> "Team":
        if self.world.size > 1:
            try:
                self._store = meet(self.world, timeout_s=self._timeout_s)
            except UserError as mistake:  # __exit__ is not called when __enter__ raises
                self._end(Ending(2, str(mistake), []))
            self._store.set(f"step/{self.world.rank}", str(self.step_now))
            keys = [f"host/{rank}" for rank in range(self.world.size)]
            self._hosts = [name.decode() for name in self._store.multi_get(keys)]
            # For the ending. Made now, since connecting to a store that is gone takes the whole timeout.
            self._farewell = own_connection(self._store)
            threading.Thread(target=self._watch, args=(own_connection(self._store),), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world.size == 1:
            if isinstance(error, KeyboardInterrupt):
                self._end(self._ending_of(error))
            if isinstance(error, UserError) or (isinstance(error, SystemExit) and error.code == 2):
                stop_restarts()
            return
        if error is not None:
            self._end(self._ending_of(error))
        self._ended.set()
        with contextlib.suppress(dist.DistError):
            self._store_of().set(f"left/{self.world.rank}", "")
            if self.world.rank == 0 and not agent_has_store():  # this process hosts the store for the others
                self._wait_for_all(self._store_of(), seconds=10 * GRACE_S, but=[])

    def gather(self, text: str, *, timeout_s: float = CHECKS_TIMEOUT_S) -> list[str]:
        """Every rank's text, in rank order. Raises UserError naming the ranks that stay silent."""
        if self.world.size == 1:
            return [text]
        self._rounds += 1
        store, keys = self._store_of(), [f"gather/{self._rounds}/{rank}" for rank in range(self.world.size)]
        store.set(keys[self.world.rank], text)
        if silent := [keys.index(key) for key in missing_after(store, keys, timeout_s)]:
            raise UserError(
                f"{self._names(silent)} did not finish the checks before training within {timeout_s:.0f} s; "
                f"look at the log of that rank, and run {DOCTOR} on that machine"
            )
        return [value.decode() for value in store.multi_get(keys)]

    def together(self, function: Callable[[], Result], *, timeout_s: float = CHECKS_TIMEOUT_S) -> Result:
        """What `function` returns on this rank, once it has returned on every rank.

        If it raises UserError on any rank, every rank raises one with the same sentence. Any other error is
        raised on its own rank, and LostRank on the others. Ranks above 0 print nothing meanwhile, so that
        what every rank would print, such as --help, appears once. If some ranks exit, such as for a flag that
        tyro has explained, and others do not, all raise UserError after the first of them has printed why.
        """
        if self.world.size == 1:
            return function()
        mistake = bug = ""
        is_exit = False
        with quiet() if self.world.rank else contextlib.nullcontext(io.StringIO()) as unheard:
            try:
                return function()
            except UserError as error:
                mistake = str(error)
                raise
            except SystemExit:  # --help, or a flag that tyro has explained
                is_exit = True
                raise
            except BaseException as error:
                where = self._log or "the terminal"
                bug = f"{type(error).__name__} in a check before training; its traceback is in {where}"
                raise
            finally:
                told = self.gather(json.dumps([mistake, bug, is_exit]), timeout_s=timeout_s)
                mistakes, bugs, exits = zip(*map(json.loads, told), strict=True)
                if not bug:  # this rank's own is already being raised
                    self._raise_first(mistakes)
                    self._raise_lost(bugs)
                    self._raise_odd_exit(exits, unheard.getvalue())

    def _raise_first(self, mistakes: Sequence[str]) -> None:
        ranks = [rank for rank, mistake in enumerate(mistakes) if mistake]
        if not ranks:
            return
        first = mistakes[ranks[0]]
        everywhere = all(mistake == first for mistake in mistakes)
        raise UserError(first if everywhere else f"{self._names(ranks[:1])}: {first}") from None

    def _raise_lost(self, bugs: Sequence[str]) -> None:
        for rank, bug in enumerate(bugs):
            if bug:
                raise LostRank(f"{self._names([rank])} stopped with {bug}", [])

    def _raise_odd_exit(self, exits: Sequence[bool], unheard: str) -> None:
        odd = [rank for rank, is_exit in enumerate(exits) if is_exit]
        if not odd or all(exits):
            return
        if self.world.rank == odd[0]:
            with contextlib.suppress(OSError):
                os.write(self._terminal, unheard.encode())
        raise UserError(
            f"{self._names(odd)} ended at the command line, which the other ranks could read; start the same "
            "flags on every machine"
        ) from None

    def agree(self, what: dict[str, str]) -> None:
        """Raises UserError on every rank, naming the first item that differs, unless all equal rank 0's."""
        # Only rank 0 sends its text: every rank reads all that are sent.
        shared = self.gather(json.dumps(what) if self.world.rank == 0 else "")[0]
        first = json.loads(shared)

        def compare() -> None:
            odd = [name for name in sorted({*first, *what}) if first.get(name) != what.get(name)]
            if odd:
                more = f" (and {len(odd) - 1} more differ)" if odd[1:] else ""
                raise UserError(
                    f"{odd[0]} is {what.get(odd[0], 'missing')} here and {first.get(odd[0], 'missing')} on "
                    f"rank 0{more}, expected the same; start the same code and flags on every machine"
                )

        self.together(compare)

    @contextlib.contextmanager
    def connected(self, device_type: str, *, timeout_s: float) -> Iterator[None]:
        """A process group of all ranks (gloo, on GPUs also NCCL), whose collectives wait at most `timeout_s`.

        Raises UserError if it cannot be made, and LostRank inside it if a rank is gone or does not arrive.
        """
        if self.world.size == 1:
            yield
            return
        device = None
        if device_type == "cuda":
            if self.world.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"{self.world.local_size} processes on a machine with {torch.cuda.device_count()} "
                    f"visible GPUs, expected a GPU for each; set --nproc-per-node or CUDA_VISIBLE_DEVICES"
                )
            device = torch.device("cuda", self.world.local_rank)
            torch.cuda.set_device(device)
        failed = (
            f"the ranks met at {meeting_point()} but cannot connect to each other; set GLOO_SOCKET_IFNAME "
            f"and NCCL_SOCKET_IFNAME to the interface between the machines, and look at the firewall"
        )
        try:
            with self._deadline(self._timeout_s, failed):
                dist.init_process_group(
                    "cuda:nccl,cpu:gloo" if device else "gloo",
                    store=self._store,
                    rank=self.world.rank,
                    world_size=self.world.size,
                    timeout=timedelta(seconds=timeout_s),
                    device_id=device,
                )
        except RuntimeError as error:
            raise UserError(f"{failed} ({_in_short(error)})") from error
        self._patience_s = STALLED * timeout_s
        with self.hangs_explained():
            yield
        self._patience_s = math.inf
        # Not after an error: NCCL's shutdown waits for communication that dead ranks will never take part in.
        dist.destroy_process_group()

    def small_all_reduce(self, device_type: str, *, timeout_s: float = 20.0) -> None:
        """Adds one number over all ranks. Raises UserError within `timeout_s`, naming the silent ranks."""
        if self.world.size == 1:
            return
        self._rounds += 1
        store, keys = self._store_of(), [f"reduce/{self._rounds}/{rank}" for rank in range(self.world.size)]
        store.set(keys[self.world.rank], "")
        number = torch.ones((), device=device_type)
        try:
            # Given a timeout, `wait` blocks the host until the sum is there, even on GPUs; else it does not.
            work = dist.all_reduce(number, async_op=True)
            assert work is not None, "this rank is in the group of all"
            work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            silent = [keys.index(key) for key in missing_after(store, keys, 0)]
            who = (
                f"{self._names(silent)} did not join" if silent else "the ranks all joined but did not finish"
            )
            raise UserError(
                f"{who} a small all-reduce within {timeout_s:.0f} s ({_in_short(error)}); look at that "
                f"rank's log and at the interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO)"
            ) from error
        if float(number) != self.world.size:
            raise UserError(
                f"ones over {self.world.size} ranks add up to {float(number)}; test these devices"
            )

    def step(self, number: int) -> None:
        """Notes the step that this rank is in: a plain assignment, which the watching thread publishes."""
        self.step_now = number

    @contextlib.contextmanager
    def hangs_explained(self) -> Iterator[None]:
        """Raises LostRank, naming the missing ranks, for a collective that broke or timed out.

        If another rank has given up for a reason of its own, that is raised instead. From then on this
        process ignores torchrun's signals, so whatever is closed outside this context is closed undisturbed.
        """
        try:
            yield
        except LostRank:  # already explained
            raise
        except RuntimeError as error:
            if self.world.size == 1 or not BROKEN_COLLECTIVE.search(str(error)):
                raise
            raise self._explain(error) from error

    def _explain(self, error: RuntimeError) -> Exception:
        """The error to raise, naming the ranks that are gone or, if none is, those that did not notice.

        A rank that did not notice the failure was not in the collective.
        """
        ignore_torchrun()  # it ends this machine's ranks 0.1 s after one was killed
        store, size, me = self._store_of(), self.world.size, self.world.rank
        try:
            store.set(f"noticed/{me}", "")
            store.set("alarm", "")
            away = missing_after(store, [f"noticed/{rank}" for rank in range(size)], ANSWER_S)
            if store.check(["ending"]):
                ending = Ending(*json.loads(store.get("ending")))
                return (
                    UserError(ending.sentence)
                    if ending.status == 2
                    else LostRank(ending.sentence, ending.absent)
                )
            away = [int(key.partition("/")[2]) for key in away]
            gone = [rank for rank in away if not store.check([f"alive/{rank}"])]
            # If one is gone, the others may not have noticed yet: they still wait for it.
            found = [
                f"{self._names([rank])} {'is gone' if gone else 'lives but did not arrive'} "
                f"(last heard of in step {store.get(f'step/{rank}').decode()})"
                for rank in gone or away
            ]
        except dist.DistError:
            gone, found = self._unheard(), [f"the store at {meeting_point()} is gone with its process"]
        who = ", ".join(found) or "all ranks live, so it is the network between them"
        return LostRank(
            f"{self._names([me])} gave up a collective in step {self.step_now} since {who}; look at the log "
            f"of that rank and run {DOCTOR} (torch says: {_in_short(error)})",
            gone,
        )

    @contextlib.contextmanager
    def rank_output(self, folder: Path) -> Iterator[Path | None]:
        """Sends whatever a rank above 0 prints, from C++ too, to `folder`/rank-N.log; yields that path.

        torchrun's --redirects and --log-dir could do this, but only if the user types them, and in a new
        folder of torchrun's for each start; with --tee rank 0's terminal becomes a pipe without a live line.
        Appends, so that a restart does not erase why it was needed. After an error, output stays redirected.
        """
        if self.world.rank == 0:
            yield None
            return
        path = folder / f"rank-{self.world.rank}.log"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}); choose another --run-dir") from error
        flush()
        before = [os.dup(1), os.dup(2)]
        self._terminal, self._log = before[1], path
        for number in (1, 2):
            os.dup2(log, number)
        os.close(log)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)
        place = f"rank {self.world.rank} of {self.world.size} on {host()}, process {os.getpid()}"
        print(f"--- {time.strftime('%F %T')} {place}", flush=True)
        yield path
        flush()
        for number, file in zip((1, 2), before, strict=True):
            os.dup2(file, number)
            os.close(file)
        self._terminal, self._log = 2, None

    @contextlib.contextmanager
    def _deadline(self, seconds: float, sentence: str) -> Iterator[None]:
        """Has the watching thread end all ranks with `sentence` if the block takes longer."""
        self._limit = (time.monotonic() + seconds, sentence)
        try:
            yield
        finally:
            self._limit = None

    def _watch(self, store: Store) -> None:
        """Publishes the step, answers that this rank is alive, and ends the process if another has given up.

        Runs in a thread with its own connection, since the main thread may be inside a collective, which no
        Python exception reaches. A main thread that notices by itself has GRACE_S to end the process.
        """
        published, since, answered = self.step_now, time.monotonic(), False
        try:
            while not self._ended.wait(POLL_S):
                if published != self.step_now:
                    published, since = self.step_now, time.monotonic()
                    store.set(f"step/{self.world.rank}", str(published))
                if time.monotonic() - since > self._patience_s:
                    self._warn_of_stall(store, time.monotonic() - since)
                    since = math.inf
                if not answered and store.check(["alarm"]):
                    store.set(f"alive/{self.world.rank}", "")
                    answered = True
                if self._limit is not None and time.monotonic() > self._limit[0]:
                    self._end(Ending(2, self._limit[1], []))
                if store.check(["ending"]):
                    ending = Ending(*json.loads(store.get("ending")))
                    break
            else:
                return
        except dist.DistError:
            gone = f"the store at {meeting_point()} is gone, with torchrun or rank 0; look at their output"
            ending = Ending(1, gone, self._unheard())
        if not self._ended.wait(GRACE_S):
            self._end(ending)

    def _warn_of_stall(self, store: Store, seconds: float) -> None:
        """Says which ranks are behind, before NCCL ends this process in C++, without a Python exception."""
        keys = [f"step/{rank}" for rank in range(self.world.size)]
        steps = [int(step) for step in store.multi_get(keys)]
        behind = [rank for rank, step in enumerate(steps) if step < max(steps)]
        who = f"{self._names(behind)} behind" if behind else f"all ranks are in step {max(steps)}"
        print(
            f"warning: step {self.step_now} has lasted {seconds:.0f} s on rank {self.world.rank}, {who}; if "
            f"a collective hangs it ends soon: look at the logs of ranks, and run {DOCTOR}",
            file=sys.stderr,
            flush=True,
        )

    def _ending_of(self, error: BaseException) -> Ending:
        match error:
            case UserError():
                return Ending(2, str(error), [])
            case LostRank():
                return Ending(1, error.args[0], error.args[1])
            case SystemExit():
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
                return Ending(code, "", [])
            case KeyboardInterrupt():
                return Ending(130, "", [])
        with contextlib.suppress(OSError):  # nobody may read any more
            traceback.print_exception(error)
        kind = type(error).__name__
        where = self._log or "the terminal"
        return Ending(1, f"stopped with {kind}: {_in_short(error)}; its traceback is in {where}", [])

    def _end(self, ending: Ending) -> NoReturn:
        """Tells the others, lets one rank print the sentence, waits for the others to end too, and exits.

        It waits because torchrun ends all ranks of a machine 0.1 s after the first one, which could be before
        they have exited with status 2, or have said why.
        """
        self._is_ending.acquire()  # never released: only one of our two threads may end the process
        self._ended.set()
        ignore_torchrun()
        world, sentence = self.world, ending.sentence
        speaker = world.rank - world.local_rank  # if ranks never met, the first of each machine speaks
        if self._store is not None:
            speaker = min(rank for rank in range(world.size) if rank not in ending.absent)
        self._say(sentence, is_speaker=world.rank == speaker)
        store = self._farewell  # the main thread may be waiting in the other one
        if store is not None:
            with contextlib.suppress(dist.DistError):
                if sentence:  # a requested exit has none: others may still be busy saving
                    known = sentence.startswith("rank ")  # a mistake that all raise already names its rank
                    named = sentence if known else f"{self._names([world.rank])}: {sentence}"
                    store.compare_set("ending", "", json.dumps(ending._replace(sentence=named)))
                store.set(f"left/{world.rank}", "")
                self._wait_for_all(store, seconds=2 * GRACE_S, but=ending.absent)
        if ending.status == 2 and world.local_rank == 0:
            stop_restarts()
        with contextlib.suppress(OSError):
            flush()
        os._exit(ending.status)

    def _unheard(self) -> list[int]:
        """Ranks of unknown state once the store is gone: other machines', and rank 0 if it hosted it."""
        first = self.world.rank - self.world.local_rank
        here = range(first, first + self.world.local_size)
        dead = set() if agent_has_store() else {0}
        return [rank for rank in range(self.world.size) if rank not in here or rank in dead]

    def _say(self, sentence: str, *, is_speaker: bool) -> None:
        """Writes the sentence once on the terminal, if it is still there, and in every rank's log."""
        with contextlib.suppress(OSError):
            if sentence and is_speaker:
                os.write(self._terminal, f"error: {sentence}\n".encode())
            if sentence and self._log is not None:
                print(f"error: {sentence}", file=sys.stderr)

    def _wait_for_all(self, store: Store, *, seconds: float, but: list[int]) -> None:
        keys = [f"left/{rank}" for rank in range(self.world.size) if rank not in but]
        missing_after(store, keys, seconds)
        if self.world.rank == 0 and not agent_has_store():
            time.sleep(POLL_S)  # this process hosts the store: let the others query it one last time

    def _names(self, ranks: list[int]) -> str:
        """rank 1 (host), rank 5 (other host)"""
        return ", ".join(f"rank {rank} ({self._hosts[rank]})" for rank in ranks)

    def _store_of(self) -> Store:
        assert self._store is not None, "a Team is a context: enter it first"
        return self._store


def _in_short(error: BaseException) -> str:
    first_line = re.sub(r"^\[/\S+\] ", "", str(error).partition("\n")[0])  # without torch's file and line
    return textwrap.shorten(first_line or type(error).__name__, 160)
