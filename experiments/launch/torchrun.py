"""torchrun, with an exit status that says how the ranks ended, and a sentence instead of a traceback.

Takes torchrun's flags: --standalone --nproc-per-node=8 -m experiments.gpt2_124m
Exit status: 0 done. 2 a user's mistake, which is not tried again. 128 + N ended by signal N. Otherwise that
of the first rank that failed after all restarts were used up.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from argparse import Namespace
from datetime import timedelta

# Before torch is imported, here and in the ranks: it would warn, with a C++ stack, of each attempt to connect
# and, where a machine ends last, also after a run that went well.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from torch.distributed import (
    DistError,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]  documented, but not re-exported
    run,
)
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from nanogpt.errors import UserError
from nanogpt.meeting import wait_for_port

ANSWER_S = 10.0
"""Seconds that a listener at the meeting point has to answer as a store would."""
JOIN_TIMEOUT_S = 600
"""torchrun's default for how long machines wait for each other."""


def main(arguments: list[str]) -> int:
    """Runs the ranks of this machine to their end and returns the exit status for it."""
    # torchrun would set one thread too, but warn about it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Time for the checkpoint that ranks save after a signal; torchrun's default is 30 s.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    # Ranks say themselves why they ended; torchrun would only add its signals and that a status was not 0.
    logging.disable(logging.ERROR)
    try:
        check(arguments)
        run.main(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        if status != 2:  # the ranks have explained a mistake
            print(
                f"error: rank {rank} ended with status {failure.exitcode}, and no restart is left",
                file=sys.stderr,
            )
        return status
    except SignalException as stop:
        # A rank ends this process with SIGQUIT after a mistake of the user: nanogpt.meeting.stop_restarts.
        return 2 if stop.sigval == signal.SIGQUIT else 128 + stop.sigval
    except (RendezvousError, DistError) as error:  # the latter if --master-port is taken
        reason = str(error.__cause__ or error).partition("\n")[0] or "nobody else came in time"
        print(
            f"error: the machines did not meet ({reason}); start the same command on each, and look at the "
            f"address, the port (it may be taken) and the firewall",
            file=sys.stderr,
        )
        return 2
    return 0


def check(arguments: list[str]) -> None:
    """Raises UserError for what torchrun would answer with a traceback, or not at all: if another program
    listens at its port, it waits forever. A machine that is not the host waits here for it to start, which
    torchrun would do for a minute or two instead of its join_timeout."""
    flags = run.parse_args(arguments)
    try:
        config, *_ = run.config_from_args(flags)
        place = meeting_point(flags)
        names = (config.rdzv_backend, config.rdzv_endpoint, config.run_id, config.min_nodes, config.max_nodes)
        meeting = RendezvousParameters(*names, **config.rdzv_configs)
        is_guest = place is not None and meeting.get_as_bool("is_host") is False
        wait_s = meeting.get_as_int("join_timeout", JOIN_TIMEOUT_S)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"torchrun refuses its flags ({error}), expected what its --help lists") from error
    if config.nproc_per_node < 1:
        raise UserError(f"--nproc-per-node is {config.nproc_per_node}, expected a number from 1")
    if place is not None and is_guest:
        wait_for_port(*place, time.monotonic() + (wait_s or 0), whom="the head", poll_s=1.0)
    if place is not None and is_taken(*place):
        raise UserError(
            f"what listens on {place[0]}:{place[1]} is no torchrun, expected a free port for machines to "
            "meet at; set another --rdzv-endpoint or --master-port on each, or --standalone on one machine"
        )


def meeting_point(flags: Namespace) -> tuple[str, int] | None:
    """Host and port of the store that the flags name; None if torchrun takes a free port or no such store."""
    endpoint = flags.rdzv_endpoint or (flags.master_port and f"{flags.master_addr}:{flags.master_port}")
    if flags.standalone or not endpoint or "store_type" in flags.rdzv_conf:
        return None
    if flags.rdzv_backend not in ("static", "c10d"):
        return None
    return parse_rendezvous_endpoint(endpoint, default_port=29400)


def is_taken(host: str, port: int) -> bool:
    """Whether something listens there that does not answer like a torchrun's store."""
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except OSError:
        return False
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(DistError):
            TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=ANSWER_S))
            answered.set()

    # In a thread, since TCPStore's timeout does not cover a program that listens but never answers.
    threading.Thread(target=ask, daemon=True).start()
    return not answered.wait(ANSWER_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
