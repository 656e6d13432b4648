"""Which of torchrun's processes this one is, and how they find each other."""

import functools
import os
import re
import signal
import socket
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from nanogpt.errors import UserError

POLL_S = 0.02
LATER_S = 5.0
"""How much longer the others wait than rank 0, which then tells them who is missing."""


class World(NamedTuple):
    """This process's place among all processes, and among those on its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


ALONE = World(0, 1, 0, 1)


def world() -> World:
    """This process's place according to torchrun's environment; `ALONE` without one.

    Raises UserError if the environment is incomplete or contradicts itself.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    said = {name: os.environ[name] for name in names if name in os.environ}
    if not said:
        return ALONE
    expected = f"expected all of {', '.join(names)} as torchrun sets them; start with torchrun, or unset them"
    if len(said) < len(names) or not all(text.isdecimal() for text in said.values()):
        raise UserError(f"the environment has {said}, {expected}")
    here = World(*(int(said[name]) for name in names))
    if not (here.rank < here.size and here.local_rank < here.local_size <= here.size):
        raise UserError(f"the environment has {said}, expected ranks below sizes; start with torchrun")
    if here.size > 1 and not (
        os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT", "").isdecimal()
    ):
        raise UserError(
            "MASTER_ADDR and MASTER_PORT are not both set, expected where rank 0 is; use torchrun"
        )
    return here


def restart_count() -> int:
    """How often torchrun has restarted its ranks; only the machine that failed counts, the others say 0."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def meet(world: World, *, timeout_s: float) -> Store:
    """A store shared by all processes of this start, and by none of an earlier one, once all have arrived.

    Raises UserError on every rank that has arrived, naming those that have not.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_host = world.rank == 0 and not agent_has_store()
    deadline = time.monotonic() + timeout_s
    if not is_host:
        wait_for_port(address, port, deadline)
    connect = functools.partial(
        dist.TCPStore,  # pyright: ignore[reportPrivateImportUsage]  documented, but not re-exported
        address,
        port,
        is_master=is_host,
        wait_for_workers=False,  # it would not say which one is missing
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        # In a thread, since TCPStore's timeout does not cover another program that listens but never answers.
        store = ThreadPoolExecutor(1).submit(connect).result(max(deadline - time.monotonic(), LATER_S))
    except (dist.DistError, ValueError, TimeoutError) as error:
        if not is_host:
            raise unanswered(world) from error
        raise UserError(
            f"rank 0 cannot listen on {meeting_point()}, expected a free port of this machine for ranks "
            f"to meet at; set another --master-port or --rdzv-endpoint, or start with torchrun --standalone"
        ) from error
    try:
        return PrefixStore(_session_of(store, world, deadline), store)
    except dist.DistError as error:
        raise unanswered(world) from error


def wait_for_port(
    address: str, port: int, deadline: float, *, whom: str = "rank 0", poll_s: float = POLL_S
) -> None:
    """Returns once something listens there. TCPStore waits too, but writes a C++ stack for each attempt."""
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((address, port), timeout=max(left, POLL_S)).close()
            return
        except OSError as error:
            if left < 0:
                raise UserError(
                    f"{host()} cannot reach {whom} at {address}:{port} ({error}); check that {whom}'s "
                    f"machine was started, the address, the port, and the firewall between them"
                ) from error
        time.sleep(poll_s)


def unanswered(world: World) -> UserError:
    return UserError(
        f"rank {world.rank} on {host()} reached {meeting_point()} but rank 0 did not answer; look at rank "
        f"0's output there, or at what else listens on that port"
    )


def missing_after(store: Store, keys: list[str], seconds: float) -> list[str]:
    """The keys that are still missing after `seconds`; returns as soon as there are none.

    Polls, since Store.wait cannot say which are missing, and warns on stderr from C++.
    """
    deadline = time.monotonic() + seconds
    while not store.check(keys):
        if time.monotonic() > deadline:
            return [key for key in keys if not store.check([key])]
        time.sleep(POLL_S)
    return []


def _session_of(store: Store, world: World, deadline: float) -> str:
    """A prefix for keys in the store that only the ranks of this start know.

    After a restart torchrun's store still has the keys of the previous attempt, and
    TORCHELASTIC_RESTART_COUNT differs between machines, since only the one that failed counts. So each rank
    posts a random number, and rank 0 answers each number with the prefix: nobody reads answers to dead ranks.
    """
    if world.rank > 0:
        left = deadline - time.monotonic() + LATER_S
        number = uuid.uuid4().hex
        store.set(f"hello/{world.rank}", number)
        if missing_after(store, [f"welcome/{number}"], left):
            raise unanswered(world)
        session = store.get(f"welcome/{number}").decode()
        store.set(f"{session}/host/{world.rank}", host())
        if missing_after(store, [f"{session}/missing"], left):
            raise unanswered(world)
        if missing := store.get(f"{session}/missing").decode():
            raise UserError(missing)
        return session
    session, answered, missing = uuid.uuid4().hex, {}, set(range(1, world.size))
    store.set(f"{session}/host/0", host())
    while missing and time.monotonic() < deadline:
        for rank in sorted(missing):
            if store.check([f"{session}/host/{rank}"]):
                missing.discard(rank)
            elif store.check([f"hello/{rank}"]) and answered.get(rank) != (
                number := store.get(f"hello/{rank}")
            ):
                answered[rank] = number
                store.set(f"welcome/{number.decode()}", session)
        time.sleep(POLL_S)
    sentence = ""
    if missing:
        who = ", ".join(map(str, sorted(missing)))
        sentence = (
            f"of {world.size} ranks these did not come to {meeting_point()} in time: {who}; look at their "
            f"output, and whether every machine was started for the same number of machines"
        )
    store.set(f"{session}/missing", sentence)
    if missing:
        raise UserError(sentence)
    return session


def own_connection(store: Store) -> Store:
    """A second connection to the store, for another thread: a waiting call blocks all others on its own."""
    return store.clone()  # pyright: ignore[reportAttributeAccessIssue]  torch's stub does not have it


def meeting_point() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def agent_has_store() -> bool:
    """Whether torchrun's own process hosts the store, rather than rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def host() -> str:
    return socket.gethostname()


def ignore_torchrun() -> None:
    """Ignores torchrun's signals, all but SIGKILL, from here on. Does nothing outside the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)


def stop_restarts() -> None:
    """Ends the torchrun that started this process, which would restart it up to --max-restarts times.

    torchrun restarts whatever ends with a nonzero status; no status means "do not restart". SIGQUIT ends it,
    with status 1, which experiments.launch.torchrun turns into 2. Does nothing unless the parent is known to
    be a torchrun.
    """
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return
    handled = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
    if re.search(rb"torchrun|torch\.distributed\.run", command) and "SIGQUIT" in handled:
        ignore_torchrun()  # it forwards the signal to its ranks
        os.kill(os.getppid(), signal.SIGQUIT)
