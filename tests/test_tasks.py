"""HellaSwag and LAMBADA are scored as reading each text alone would score them."""

import dataclasses
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from local_hub import Repository, serving
from reference import hugging_face

from nanogpt import tasks, tree
from nanogpt.checkpoint import CHECKPOINTS, Checkpointer
from nanogpt.errors import UserError
from nanogpt.model import GPT2Config, Params, init
from nanogpt.sample import generate
from nanogpt.tasks import (
    TASKS,
    Item,
    Score,
    TaskCommand,
    hellaswag_item,
    hellaswag_result,
    lambada_item,
    lambada_result,
    main,
    scores,
)
from nanogpt.tokenizer import characters

ALPHABET = "abcdefghijklmnopqrstuvwxyz ."
LETTERS = characters(ALPHABET)
TINY = GPT2Config(vocab_size=30, block_size=40, n_layer=2, n_head=2, n_embd=16)
CPU = torch.device("cpu")
HELLASWAG = {"ctx": "a man sits.", "endings": ["he", "he eats.", "it", "the end."], "label": 1}


@pytest.fixture(scope="module")
def params() -> Params:
    """Weights large enough for probabilities far from equal."""
    generator = torch.Generator().manual_seed(0)
    return tree.map(
        lambda leaf: leaf + 0.3 * torch.randn(leaf.shape, generator=generator), init(TINY, generator)
    )


def some_items(count: int) -> list[Item]:
    """Of all lengths, some of them longer than the model's positions."""
    generator = torch.Generator().manual_seed(1)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(1, most, (), generator=generator))
        return torch.randint(28, (length,), generator=generator).tolist()

    return [Item(ids(60), [ids(12) for _ in range(4)], 0) for _ in range(count)]


def test_scores_are_those_of_each_text_read_alone_by_hugging_face(params: Params):
    items = some_items(tasks.ITEMS_AT_A_TIME + 3)
    assert max(len(item.context) for item in items) > TINY.block_size
    model = hugging_face(TINY, params).eval()
    for item, found in zip(items, scores(params, TINY, items, device=CPU), strict=True):
        for ending, score in zip(item.endings, found, strict=True):
            text = torch.tensor([*item.context, *ending])[-TINY.block_size - 1 :]
            with torch.no_grad():
                logits = model(text[None, :-1], use_cache=False).logits[0, -len(ending) :]
            expected = F.cross_entropy(logits, torch.tensor(ending), reduction="sum")
            assert score.loss == pytest.approx(float(expected), rel=1e-5, abs=1e-5)  # fp32 rounding
            assert score.tokens == len(ending)
            assert score.is_likeliest == (logits.argmax(-1).tolist() == ending)


def test_logits_are_not_rounded_to_the_precision_of_the_blocks(params: Params):
    """OpenAI's are far from 0, by the same for all tokens, which a loss does not see."""

    def losses(offset: float) -> list[float]:
        """With a last feature that is always `offset` and that each token's embedding has once."""
        changed = {name: params[name].clone() for name in ("wte.weight", "ln_f.weight", "ln_f.bias")}
        changed["wte.weight"][:, -1], changed["ln_f.weight"][-1], changed["ln_f.bias"][-1] = 1, 0, offset
        narrow = tasks.placed(params | changed, CPU, "bfloat16")
        return [score.loss for row in scores(narrow, TINY, some_items(3), device=CPU) for score in row]

    assert losses(-100.0) == pytest.approx(losses(0.0), rel=1e-4)  # rounding of fp32 at 100


def test_what_greedy_decoding_writes_is_the_likeliest(params: Params):
    context = LETTERS.encode("once upon a")
    written = generate(params, TINY, torch.tensor([context]), max_new_tokens=5, temperature=0.0)[
        0, -5:
    ].tolist()
    others = [[*written[:i], (written[i] + 1) % 28, *written[i + 1 :]] for i in range(5)]
    (found,) = scores(params, TINY, [Item(context, [written, *others], 0)], device=CPU)
    assert [score.is_likeliest for score in found] == [True, False, False, False, False, False]


def test_a_hellaswag_item_is_its_text_and_its_endings():
    item = hellaswag_item(HELLASWAG, LETTERS)
    texts = [LETTERS.decode(item.context + ending) for ending in item.endings]
    assert texts == ["a man sits. he", "a man sits. he eats.", "a man sits. it", "a man sits. the end."]
    assert item.answer == 1


def test_a_lambada_item_ends_in_one_word():
    item = lambada_item({"text": "to be or not to be\n"}, LETTERS)
    assert LETTERS.decode(item.context) == "to be or not to"
    assert [LETTERS.decode(ending) for ending in item.endings] == [" be"]


def test_the_lowest_loss_is_chosen_by_sum_and_by_mean():
    items = [Item([0], [[0], [0]], answer) for answer in (0, 1, 1, 1)]
    short_wins_by_sum = [Score(2.0, 1, False), Score(3.0, 2, False)]
    long_wins_by_both = [Score(4.0, 1, False), Score(3.0, 2, False)]
    found = [short_wins_by_sum, short_wins_by_sum, long_wins_by_both, short_wins_by_sum]
    assert hellaswag_result(items, found) == {"accuracy": 0.5, "accuracy_by_mean": 0.75}


def test_lambada_counts_words_and_gives_the_perplexity_of_one():
    found = [[Score(1.0, 3, True)], [Score(2.0, 1, False)], [Score(3.0, 2, False)], [Score(0.0, 1, False)]]
    items = [Item([0], [[0]], 0)] * 4
    assert lambada_result(items, found) == {"accuracy": 0.25, "perplexity": pytest.approx(2.718281828**1.5)}


# The command


@pytest.fixture(scope="module")
def run_dir(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    about = {"config": {"model": dataclasses.asdict(TINY)}, "tokenizer": LETTERS.describe()}
    checkpointer = Checkpointer(path / CHECKPOINTS)
    checkpointer.save(1, {"params": params}, metadata=about)
    checkpointer.close()
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_prints_what_is_right_and_one_line_of_json(
    params: Params, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [HELLASWAG | {"label": label} for label in (0, 1, 2, 3, 3)]
    (found,) = scores(params, TINY, [hellaswag_item(HELLASWAG, LETTERS)], device=CPU)
    chosen = min(range(4), key=lambda i: found[i].loss)
    data = tmp_path / "rows.jsonl.xz"
    data.write_bytes(lzma.compress(write(tmp_path / "rows.jsonl", rows).read_bytes()))
    main(
        TaskCommand(task="hellaswag", run_dir=run_dir, data=data, limit=4, precision="float32", device="cpu")
    )
    table, last = capsys.readouterr().out.rsplit("\n", 2)[:2]
    result = json.loads(last)
    assert (result["task"], result["rows"], result["precision"]) == ("hellaswag", 4, "float32")
    assert result["accuracy"] == 0.25  # each of four labels once, and one choice
    assert table.splitlines()[0] == "accuracy           25.0 +- 21.7 %"
    main(TaskCommand(task="hellaswag", run_dir=run_dir, data=data, precision="float32", device="cpu"))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["accuracy"] == (0.4 if chosen == 3 else 0.2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": "a b"}, r"has the fields words, expected text as well; set another --data$"),
        ({"text": 3}, r"^row 1 of the data cannot be used \(.*; leave that row out$"),
        (
            {"text": "one"},
            r"^row 1 of the data has 0 tokens before endings of \[4\], expected at least 1 each an",
        ),
        (
            {"text": "a " + 40 * "b"},
            r"before endings of \[41\], expected at least 1 each and 40 at most in an ",
        ),
        ({"text": "a B"}, r"^row 1 of the data cannot be used \(.*'B'"),
        (None, r"^cannot read .*none.jsonl \(.*\); set --data to a file of JSON lines with the fields text$"),
    ],
)
def test_data_of_something_else_is_a_sentence(
    row: dict[str, Any] | None, message: str, run_dir: Path, tmp_path: Path
):
    data = tmp_path / "none.jsonl" if row is None else write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError, match=message):
        main(TaskCommand(task="lambada", run_dir=run_dir, data=data))


def test_an_empty_file_is_a_sentence(run_dir: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"^cannot read .*rows.jsonl \(it is empty\); set --data to a file"):
        main(TaskCommand(task="lambada", run_dir=run_dir, data=write(tmp_path / "rows.jsonl", [])))


def test_a_file_may_have_a_name_with_brackets(tmp_path: Path):
    data = write(tmp_path / "rows [1].jsonl", [{"text": "to be"}])
    assert tasks.read_rows(TASKS["lambada"], data, None) == [{"text": "to be"}]


@pytest.mark.parametrize("label", [4, -1])
def test_a_label_that_is_no_ending_s_is_a_sentence(label: int):
    with pytest.raises(UserError, match=rf"^row 2 of the data cannot be used \({label} is not in range\)"):
        tasks.make_items(TASKS["hellaswag"], [HELLASWAG, HELLASWAG | {"label": label}], LETTERS, 40)


def test_without_a_hub_a_file_is_asked_for(run_dir: Path):
    with pytest.raises(
        UserError, match=r"^cannot read EleutherAI/lambada_openai \(.*, or check the network$"
    ):
        main(TaskCommand(task="lambada", run_dir=run_dir))


def test_a_data_set_that_is_a_program_is_a_sentence(run_dir: Path, tmp_path: Path):
    repository = Repository("datasets", "EleutherAI/lambada_openai", 40 * "a", {"lambada_openai.py": b""})
    command = [sys.executable, "-m", "nanogpt.tasks", "lambada", "--run-dir", str(run_dir)]
    with serving(repository, cache=tmp_path) as settings:
        done = subprocess.run(
            command, env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: cannot read EleutherAI/lambada_openai (Dataset scripts are no ")


def test_flags_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"^the limit is 0 rows, expected at least 1; set --limit$"):
        TaskCommand(task="lambada", limit=0)
    with pytest.raises(
        UserError, match=r"^no GPU is here that torch can use, expected one for cuda; leave out"
    ):
        TaskCommand(task="lambada", device="cuda")
