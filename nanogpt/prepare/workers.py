"""The processes that do the work, and the server that they are forked from. Light to import."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker


def start_server(engine: str) -> None:
    """Start the process that workers are forked from, deaf to Ctrl-C from its first instruction on; once.

    Early, because its imports and its tokenizer take longer than what the caller does before it encodes.
    """
    multiprocessing.set_forkserver_preload([f"nanogpt.prepare.warm_{engine}"])
    resource_tracker.ensure_running()  # first, because it ends by letting Ctrl-C through again
    with without_ctrl_c():
        forkserver.ensure_running()


@contextlib.contextmanager
def without_ctrl_c() -> Iterator[None]:
    """A Ctrl-C within comes after it; processes that are started within never see one.

    They inherit the mask. It is not enough for this process, where another thread, as of OpenBLAS, may be
    given the signal, so that Python raises within after all.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python raises only in the main thread
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)


def prepare_worker() -> None:
    """No word about Ctrl-C, and no life after the parent's, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
