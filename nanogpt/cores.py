"""How many cores a process has. Light to import, so that `prepare` can ask as well."""

import os


def usable_cores() -> int:
    """Cores that this process may use, or all of the machine's where nobody can say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
