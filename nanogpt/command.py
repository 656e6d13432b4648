"""A program's command line: flags become a config, a user's mistake one sentence and exit status 2."""

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Iterator
from typing import TypeVar

import tyro

from nanogpt.errors import UserError

Config = TypeVar("Config")


def parse(kind: type[Config], *, default: Config = tyro.MISSING_NONPROP) -> Config:
    """`default`, a `kind`, as changed by the command line; `--help` opens with the program's docstring.

    Raises the UserError that `kind` raises for values that do not fit together, one for a flag with an empty
    value, and SystemExit (status 2) after tyro has said what is wrong with a flag.
    """
    require_values(sys.argv)
    program = sys.modules["__main__"]
    module = program.__spec__.name if program.__spec__ else None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            prog = f"python -m {module}" if module else None
            args = [at_home(word) for word in sys.argv[1:]]
            return tyro.cli(kind, default=default, prog=prog, description=program.__doc__, args=args)
    except SystemExit as stop:
        # tyro catches a config's ValueError and prints it in a box of its own.
        mistake = stop.__context__
        while mistake is not None and not isinstance(mistake, UserError):
            mistake = mistake.__context__
        if mistake is not None:
            raise mistake from None
        print(said.getvalue(), end="", file=sys.stderr)
        raise


def require_values(words: list[str]) -> None:
    """Raises UserError for an empty word, which a shell makes of a variable that is not set: as a path it
    would mean the current folder."""
    for before, word in itertools.pairwise(words):
        flag, equals, value = word.partition("=") if word else (before, "=", "")
        if flag.startswith("--") and equals and not value:
            raise UserError(f"{flag} has an empty value, expected one that is not; set or leave out {flag}")


def at_home(word: str) -> str:
    """`word`, but `--flag=~/path` means the home directory, which a shell sees only in `--flag ~/path`."""
    flag, equals, value = word.partition("=")
    is_home = flag.startswith("--") and value.startswith("~/")
    return flag + equals + os.path.expanduser(value) if is_home else word


@contextlib.contextmanager
def mistakes_in_a_sentence() -> Iterator[None]:
    """Ends the program with one sentence on stderr and status 2 for a UserError.

    Ends it with status 130 for a Ctrl-C, and with 1 if nobody reads what it prints any more.
    """
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
