"""Published tests of what a model knows: HellaSwag's right ending out of four, and LAMBADA's last word.

    python -m nanogpt.tasks hellaswag --run-dir runs/gpt2_124m
    python -m nanogpt.tasks lambada --run-dir runs/gpt2_124m --data lambada_test.jsonl --limit 1000

Without `--data` the rows come from the Hugging Face hub. Nothing is trained, and no examples are shown first:
the model reads a text with an ending, and only the loss of the ending's tokens counts. On HellaSwag llm.c,
which also leaves the texts unprocessed, reports 28.6 % for OpenAI's GPT-2 124M, and 29.6 % by the mean loss
per token.
"""

import glob
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import datasets
import datasets.exceptions
import httpx2
import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nanogpt import command, perf
from nanogpt.checkpoint import CHECKPOINTS, load_params
from nanogpt.errors import UserError
from nanogpt.loss import IGNORED
from nanogpt.model import GPT2Config, Params, apply_trunk
from nanogpt.tokenizer import Tokenizer, tokenizer_from
from nanogpt.train import DTYPES, EMBEDDINGS, Precision

ITEMS_AT_A_TIME = 8
T_MULTIPLE = 32
"""Batches are as wide as their longest text, rounded up: few shapes, little padding."""


class Item(NamedTuple):
    """A text and the endings to compare, as token ids."""

    context: list[int]
    endings: list[list[int]]
    answer: int
    """Which ending is right."""


class Score(NamedTuple):
    """What the model made of one ending."""

    loss: float
    """Sum over its tokens, in nats."""
    tokens: int
    is_likeliest: bool
    """Whether each of its tokens is the likeliest after those before."""


def hellaswag_item(row: dict[str, Any], tokenizer: Tokenizer) -> Item:
    """The unprocessed text and its endings, each after a blank. Source: Zellers et al. 2019."""
    endings = [tokenizer.encode(f" {ending}") for ending in row["endings"]]
    answer = range(len(endings)).index(int(row["label"]))  # raises for -1, a hidden label
    return Item(tokenizer.encode(row["ctx"]), endings, answer)


def lambada_item(row: dict[str, Any], tokenizer: Tokenizer) -> Item:
    """The text up to its last word, and that word with the blank before it. Source: Paperno et al. 2016."""
    context, _, word = row["text"].strip().rpartition(" ")
    return Item(tokenizer.encode(context), [tokenizer.encode(f" {word}")], 0)


def scores(
    params: Params, config: GPT2Config, items: Sequence[Item], *, device: torch.device
) -> Iterator[list[Score]]:
    """The scores of each item's endings, computed for a few items at a time.

    If a text is longer than the model's positions, its first tokens are left out.
    """
    for start in range(0, len(items), ITEMS_AT_A_TIME):
        batch = items[start : start + ITEMS_AT_A_TIME]
        pairs = [(item.context, ending) for item in batch for ending in item.endings]
        inputs, targets = (part.to(device) for part in rows_of(pairs, config.block_size))
        losses, hits = ending_losses(params, config, inputs, targets)
        found = (
            Score(loss, len(ending), hit)
            for (_, ending), loss, hit in zip(pairs, losses.tolist(), hits.tolist(), strict=True)
        )
        for item in batch:
            yield list(itertools.islice(found, len(item.endings)))


def rows_of(
    pairs: Sequence[tuple[list[int], list[int]]], block_size: int
) -> tuple[Int[Tensor, "E T"], Int[Tensor, "E T"]]:
    """Inputs and targets, a row for each context and ending; targets are -100 outside the ending."""
    texts = [[*context, *ending][-block_size - 1 :] for context, ending in pairs]
    T = min(math.ceil(max(map(len, texts)) / T_MULTIPLE) * T_MULTIPLE, block_size)
    inputs = torch.zeros(len(texts), T, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    for row, (text, (_, ending)) in enumerate(zip(texts, pairs, strict=True)):
        ids, last = torch.tensor(text), len(text) - 1
        inputs[row, :last] = ids[:-1]
        targets[row, last - len(ending) : last] = ids[-len(ending) :]
    return inputs, targets


@torch.no_grad()
def ending_losses(
    params: Params, config: GPT2Config, inputs: Int[Tensor, "E T"], targets: Int[Tensor, "E T"]
) -> tuple[Float[Tensor, "E"], Bool[Tensor, "E"]]:
    """Summed loss of each row's targets in nats, and whether all are the likeliest; ignores -100."""
    counts = targets != IGNORED
    features, head = apply_trunk(params, inputs, config)[counts], params["wte.weight"]
    logits = F.linear(features.to(head.dtype), head).float()
    (rows, _), ids = counts.nonzero(as_tuple=True), targets[counts]
    losses = F.cross_entropy(logits, ids, reduction="none")
    misses = (logits.argmax(-1) != ids).float()
    zeros = torch.zeros(len(inputs), device=inputs.device)
    return zeros.index_add(0, rows, losses), zeros.index_add(0, rows, misses) == 0


def hellaswag_result(items: Sequence[Item], found: Sequence[Sequence[Score]]) -> dict[str, float]:
    """The share of items whose right ending has the lowest loss, by the sum and by the mean over tokens."""

    def share(key: Callable[[Score], float]) -> float:
        chosen = (min(range(len(row)), key=lambda i: key(row[i])) for row in found)
        return sum(a == item.answer for a, item in zip(chosen, items, strict=True)) / len(items)

    return {
        "accuracy": share(lambda score: score.loss),
        "accuracy_by_mean": share(lambda score: score.loss / score.tokens),
    }


def lambada_result(items: Sequence[Item], found: Sequence[Sequence[Score]]) -> dict[str, float]:
    """The share of last words that greedy decoding writes, and the perplexity of a word."""
    words = [row[item.answer] for row, item in zip(found, items, strict=True)]
    return {
        "accuracy": sum(word.is_likeliest for word in words) / len(words),
        "perplexity": math.exp(sum(word.loss for word in words) / len(words)),
    }


class Task(NamedTuple):
    """A published test."""

    hub: tuple[str, str]
    """Data set and split."""
    fields: tuple[str, ...]
    """The fields of a row that are used."""
    item: Callable[[dict[str, Any], Tokenizer], Item]
    result: Callable[[Sequence[Item], Sequence[Sequence[Score]]], dict[str, float]]


TASKS = {
    "hellaswag": Task(
        ("Rowan/hellaswag", "validation"), ("ctx", "endings", "label"), hellaswag_item, hellaswag_result
    ),
    "lambada": Task(("EleutherAI/lambada_openai", "test"), ("text",), lambada_item, lambada_result),
}


def read_rows(task: Task, path: Path | None, limit: int | None) -> list[dict[str, Any]]:
    """The first `limit` rows of a file of JSON lines, compressed or not, or else of the hub's data set.

    Raises UserError if they cannot be read or lack a field.
    """
    name, split = task.hub if path is None else (str(path), "train")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is in the exception
    try:
        if path is None:
            data = datasets.load_dataset(name, split=split)
        else:
            datasets.disable_progress_bars()
            data = datasets.load_dataset("json", data_files=glob.escape(name), split=split)
    except (
        OSError,
        ValueError,
        RuntimeError,  # for a data set that is a program
        StopIteration,  # for an empty file
        httpx2.HTTPError,
        datasets.exceptions.DatasetsError,
    ) as error:
        first_line = str(error.__cause__ or error).partition("\n")[0] or "it is empty"
        raise UserError(
            f"cannot read {name} ({first_line}); set --data to a file of JSON lines with the fields "
            f"{', '.join(task.fields)}" + ("" if path else ", or check the network")
        ) from error
    if missing := [field for field in task.fields if field not in data.column_names]:
        raise UserError(
            f"{name} has the fields {', '.join(data.column_names)}, expected {', '.join(missing)} as well; "
            "set another --data"
        )
    return data.select(range(min(limit or len(data), len(data)))).to_list()


def make_items(
    task: Task, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, block_size: int
) -> list[Item]:
    """The items to score. Raises UserError if a row is not what it should be, or too long to score."""
    items = []
    for number, row in enumerate(rows, 1):
        try:
            item = task.item(row, tokenizer)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(
                f"row {number} of the data cannot be used ({error}); leave that row out"
            ) from error
        lengths = [len(ending) for ending in item.endings]
        if not item.context or not all(0 < length <= block_size for length in lengths):
            raise UserError(
                f"row {number} of the data has {len(item.context)} tokens before endings of {lengths}, "
                f"expected at least 1 each and {block_size} at most in an ending; leave that row out"
            )
        items.append(item)
    return items


@dataclass(frozen=True, kw_only=True)
class TaskCommand:
    """Test a trained model."""

    task: Annotated[tyro.conf.Positional[Literal["hellaswag", "lambada"]], tyro.conf.arg(metavar="TASK")]
    """hellaswag (which of four endings) or lambada (the last word)."""
    run_dir: Path = Path("runs/gpt2_124m")
    """Run directory with a checkpoint."""
    data: Path | None = None
    """File of JSON lines, plain or compressed, with ctx, endings and label, or text. None takes the hub's."""
    limit: int | None = None
    """Number of rows to take from the beginning, at least 1; None takes all."""
    device: Literal["cuda", "cpu"] | None = None
    """None takes the GPU if there is one."""
    precision: Precision | None = None
    """What the blocks multiply in; None takes bfloat16 where the device is fast at it, else float32."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"the limit is {self.limit} rows, expected at least 1; set --limit")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("no GPU is here that torch can use, expected one for cuda; leave out --device")


def placed(params: Params, device: torch.device, precision: Precision) -> Params:
    """`params` on the device, with all but the embeddings in `precision`.

    The embeddings keep their dtype: OpenAI's logits are so far from 0 that bfloat16 has steps of 0.5 there.
    """
    return {
        name: leaf.to(device, leaf.dtype if name in EMBEDDINGS else DTYPES[precision])
        for name, leaf in params.items()
    }


def in_words(name: str, value: float, count: int) -> str:
    """A result's value as text; a share of `count` items in per cent, with its standard error."""
    if not name.startswith("accuracy"):
        return f"{value:.1f}"
    return f"{100 * value:.1f} +- {100 * math.sqrt(value * (1 - value) / count):.1f} %"


def main(wanted: TaskCommand) -> None:
    """Prints the result as a table, and then as one line of JSON."""
    task = TASKS[wanted.task]
    params, about = load_params(wanted.run_dir / CHECKPOINTS)
    config, tokenizer = GPT2Config(**about["config"]["model"]), tokenizer_from(about["tokenizer"])
    rows = read_rows(task, wanted.data, wanted.limit)
    items = make_items(task, rows, tokenizer, config.block_size)
    device = torch.device(wanted.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = wanted.precision or perf.default_precision(perf.detect(device))
    found = []
    for row in scores(placed(params, device, precision), config, items, device=device):
        found.append(row)
        if sys.stderr.isatty() and len(found) % ITEMS_AT_A_TIME == 0:
            print(f"\r{len(found):,} of {len(items):,} rows", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    result = task.result(items, found)
    for name, value in result.items():
        print(f"{name.replace('_', ' '):18} {in_words(name, value, len(items))}")
    print(json.dumps({"task": wanted.task, "rows": len(items), **result, "precision": precision}))


if __name__ == "__main__":
    with command.mistakes_in_a_sentence():
        main(command.parse(TaskCommand))
