"""The processes that do the work, and the server that they are forked from. Cheap to import."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker


def start_server(engine: str) -> None:
    """Start, once, the process that workers are forked from; it is deaf to Ctrl-C from its first instruction.

    Call it early: its imports and its tokenizer take longer than what the caller does before it encodes.
    """
    multiprocessing.set_forkserver_preload([f"nanogpt.prepare.warm_{engine}"])
    resource_tracker.ensure_running()  # first, because it unblocks Ctrl-C at its end
    with without_ctrl_c():
        forkserver.ensure_running()


@contextlib.contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Delays a Ctrl-C until the end of the block; processes that are started within it never see one.

    They inherit the signal mask. For this process the mask is not enough: another thread, such as one of
    OpenBLAS, may receive the signal, and Python would raise within the block after all.
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
    """Makes a worker ignore Ctrl-C, and end when its parent does, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
