"""How many cores a process has. Cheap to import, so that `prepare` can use it too."""

import os


def usable_cores() -> int:
    """Cores that this process may use, or all of the machine's if the system cannot tell (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
