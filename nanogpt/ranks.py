"""How the ranks of a run agree on values and on failures.

A failure on one rank is raised on all, so none goes on alone or waits for one that has given up.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from nanogpt.errors import UserError

TIMEOUT_S = 1800.0
"""How long ranks wait for each other: one that ends is noticed at once, one that hangs only after this."""

T = TypeVar("T")


class _Outcome(NamedTuple):
    value: Any
    failure: str | None
    is_user_error: bool


class Ranks:
    """The ranks of torch.distributed in a gloo group of their own, or this process alone.

    No other collective shares the group, so a thread may use it whatever other threads do; each thread needs
    its own `Ranks`. Every rank must call the same methods in the same order.
    """

    def __init__(self, *, timeout_s: float = TIMEOUT_S):
        """Must be called on all ranks, after `init_process_group`."""
        self.joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.joined else 0
        self.size = dist.get_world_size() if self.joined else 1
        self._timeout_s = timeout_s
        self._group: Any = None
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def agree(self, action: Callable[[], T]) -> list[T]:
        """Runs `action` on every rank and returns the results of all, by rank.

        If it raises UserError, OSError or ValueError on some, all raise the error of the first such rank: its
        UserError, or for the latter two an OSError that names the rank. Raises RuntimeError, as torch's
        collectives do, if a rank has ended or does not answer: not the user's mistake; a restart may help.
        """
        if self.size == 1:
            return [action()]
        error = None
        try:
            mine = _Outcome(action(), None, is_user_error=False)
        except (OSError, ValueError) as caught:
            error = caught
            mine = _Outcome(None, str(caught).partition("\n")[0], isinstance(caught, UserError))
        outcomes = self._exchange(mine)
        for rank, outcome in enumerate(outcomes):
            if outcome.failure is not None and outcome.is_user_error:
                raise UserError(outcome.failure) from error
            if outcome.failure is not None:
                raise OSError(f"rank {rank}: {outcome.failure}") from error
        return [outcome.value for outcome in outcomes]

    def decide(self, action: Callable[[], T]) -> T:
        """What `action` returned on rank 0, the only one to run it. Raises as `agree` does."""
        of_this_rank: Callable[[], Any] = action if self.rank == 0 else lambda: None
        return self.agree(of_this_rank)[0]

    def _exchange(self, mine: _Outcome) -> list[_Outcome]:
        outcomes: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(outcomes, mine, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} did not hear from all {self.size} ranks: one has ended, or hung for "
                f"{self._timeout_s:,.0f} s; look at the end of each rank's log, and resume (gloo: {error})"
            ) from error
        return outcomes
