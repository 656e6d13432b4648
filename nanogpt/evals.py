"""How good a model is: its loss on the validation text."""

from collections.abc import Iterator

import torch

from nanogpt.data import Batch, Tokens, window_count
from nanogpt.loss import IGNORED
from nanogpt.model import Params
from nanogpt.train import EvalStep


def validation_loss(
    eval_step: EvalStep, params: Params, batches: Iterator[Batch], *, count: int | None = None
) -> float:
    """Mean loss in nats over all targets of `batches` that are not -100.

    If `batches` are one process's part and `eval_step` sums over all processes, pass as `count` the number of
    targets of all processes.
    """
    total, own = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        total += eval_step(params, batch).cpu()  # where the sum is: MPS has no float64
        own += int((batch.targets != IGNORED).sum())
    return float(total) / (own if count is None else count)


def validation_windows(tokens: Tokens, *, token_count: int, block_size: int) -> int:
    """The number of windows in an evaluation on about `token_count` tokens."""
    return min(max(token_count // block_size, 1), window_count(len(tokens), block_size))


def validation_batches(
    tokens: Tokens,
    *,
    token_count: int,
    batch_size: int,
    block_size: int,
    device: torch.device,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The first windows of the text, about `token_count` tokens, in batches [1, B, T] of one shape.

    The tokens are the same for any batch size and number of processes: each process yields as many batches,
    and the rows that pad the last ones have targets of -100.
    """
    windows = validation_windows(tokens, token_count=token_count, block_size=block_size)
    for start in range(0, windows, batch_size * process_count):
        first = start + batch_size * process_index
        inputs = torch.zeros(1, batch_size, block_size, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORED)
        for row, window in enumerate(range(first, min(first + batch_size, windows))):
            both = torch.from_numpy(
                tokens[window * block_size : (window + 1) * block_size + 1].astype("int64")
            )
            inputs[0, row], targets[0, row] = both[:-1], both[1:]
        yield Batch(inputs.to(device), targets.to(device))
