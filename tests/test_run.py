"""A run as its user meets it: flags in, files and lines out, and a sentence for each mistake."""

import ctypes
import dataclasses
import fcntl
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import ALPHABET, EAGER, arguments, contents, write_tokens
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.gpt2_124m import config as gpt2_124m
from nanogpt import hf, loop, optim, perf, run, run_dir, tree
from nanogpt.checkpoint import Checkpointer, load_params
from nanogpt.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from nanogpt.data import Batch, BatchSpec
from nanogpt.dataset import Dataset
from nanogpt.errors import UserError
from nanogpt.loop import RunResult, check_finite
from nanogpt.model import GPT2Config, init
from nanogpt.optim import warmup_cosine
from nanogpt.run import check_attention, cut_in_words, fit, main, make_optimizer, smaller_microsteps
from nanogpt.sample import generate
from nanogpt.tracker import read_metrics
from nanogpt.train import init_state

ROOT = Path(__file__).parent.parent
Go = Callable[..., RunResult]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of 32 characters with a pattern that a model can learn."""
    path = tmp_path_factory.mktemp("tokens")
    write_tokens(path, np.cumsum(np.random.default_rng(0).integers(1, 3, 4000)) % 32)
    return path


@pytest.fixture
def go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Go:
    """Runs the experiment's command line in this process and returns what the run returns."""

    def start(run_dir: Path, *switches: str, **changes: Any) -> RunResult:
        line = arguments(*switches, **{"data__path": folder, "run_dir": run_dir} | changes)
        monkeypatch.setattr(sys, "argv", ["experiment", *line])
        return main(gpt2_124m)

    return start


@pytest.fixture
def refused(go: Go, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """The one sentence that a command line ends in, with status 2 and nothing compiled or written."""

    def start(*switches: str, run_dir: Path = tmp_path / "run", **changes: Any) -> str:
        before, graphs = contents(tmp_path), counters["stats"]["unique_graphs"]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            go(run_dir, *switches, **changes)
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert contents(tmp_path) == before
        assert counters["stats"]["unique_graphs"] == graphs
        return said

    return start


def differing_leaves(a: RunResult, b: RunResult) -> list[str]:
    """Names of the leaves of the states that are not equal bit for bit."""
    right = tree.paths(b.state)
    return [name for name, leaf in tree.paths(a.state).items() if not torch.equal(leaf, right[name])]


def steps_logged(run_dir: Path, name: str = "loss") -> list[int]:
    return [record["step"] for record in read_metrics(run_dir / "metrics.jsonl") if name in record]


# Must-hold 4 and 6 of the project's first issue.


def test_twenty_steps_equal_ten_a_stop_and_ten_more(go: Go, tmp_path: Path) -> None:
    whole = go(tmp_path / "whole", *EAGER)
    first = go(tmp_path / "halves", *EAGER, train__stop_after=10)
    second = go(tmp_path / "halves", *EAGER)
    assert (first.step, second.step) == (10, 20)
    assert differing_leaves(whole, second) == []
    assert second.val_loss == whole.val_loss
    assert steps_logged(tmp_path / "halves") == list(range(1, 21))
    assert read_losses(tmp_path / "halves") == read_losses(tmp_path / "whole")


def read_losses(run_dir: Path) -> list[tuple[int, float]]:
    records = read_metrics(run_dir / "metrics.jsonl")
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def test_compiled_once_and_resumed_bit_for_bit(go: Go, tmp_path: Path) -> None:
    torch.compiler.reset()
    before = counters["stats"]["unique_graphs"]
    quick = {"model__dropout": 0}  # compiled masks are another test's
    whole = go(tmp_path / "whole", **quick)
    graphs = counters["stats"]["unique_graphs"] - before
    # a block, a chunk of the head, AdamW of a leaf; for evaluation the first two once more
    assert graphs == 3 + 2, f"{graphs} graphs were compiled in a run, expected 5"
    go(tmp_path / "halves", train__stop_after=10, **quick)
    torch.compiler.reset()  # as in a new process
    second = go(tmp_path / "halves", **quick)
    assert differing_leaves(whole, second) == []
    assert read_losses(tmp_path / "halves") == read_losses(tmp_path / "whole")


def test_same_seed_same_bits_and_another_seed_others(go: Go, tmp_path: Path) -> None:
    short = {"train__max_steps": 3, "eval__interval": None, "sample__interval": None}
    first, again = go(tmp_path / "a", *EAGER, **short), go(tmp_path / "b", *EAGER, **short)
    other = go(tmp_path / "c", *EAGER, **short, train__seed=1)
    assert differing_leaves(first, again) == []
    assert differing_leaves(first, other) != []


# What a run writes and says.


def test_a_run_leaves_config_metrics_picture_checkpoints_and_samples(go: Go, tmp_path: Path) -> None:
    result = go(tmp_path, *EAGER)
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["config"]["model"]["n_embd"] == 16
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"].keys() == {"nanogpt", "python", "torch", "git_commit"}
    assert about.keys() >= {"precision", "data", "data_hash", "data_sha256", "tokenizer", "command"}
    record = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert list(record) == [
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "mfu",
        "seconds",
        "batch_hash",
    ]
    assert steps_logged(tmp_path, "val_loss") == steps_logged(tmp_path, "sample") == [5, 10, 15, 20]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    assert checkpointer.latest() == 20
    assert checkpointer.metadata(20)["tokenizer"]["name"] == "char"
    assert result.loss < math.log(32)


def test_a_record_adds_up(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an evaluation that takes an hour takes none of the steps' time."""
    monkeypatch.setattr(perf, "peak_flops", lambda hardware, precision: (1e12, "a test"))
    validation_loss, hours = loop.validation_loss, []

    def slow(*arguments: Any, **options: Any) -> float:
        hours.append(3600.0)
        return validation_loss(*arguments, **options)

    monkeypatch.setattr(loop, "validation_loss", slow)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + sum(hours)))
    go(tmp_path, *EAGER, train__max_steps=3, eval__interval=1, sample__interval=None, optim__warmup_steps=2)
    records = read_metrics(tmp_path / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    rate = warmup_cosine(6e-4, final=6e-5, warmup_steps=2, total_steps=3)
    flops = perf.flops_per_token(GPT2Config(32, 16, 1, 2, 16), 16)
    for record in steps:
        assert record["learning_rate"] == pytest.approx(float(rate(torch.tensor(record["step"] - 1))))
        assert record["tokens_per_second"] == pytest.approx(128 / record["seconds"])
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * flops / 1e12)
    assert len(hours) == 3
    assert all(record["seconds"] < 1800 for record in steps)
    assert len({record["batch_hash"] for record in steps}) == 3


def test_on_a_gpu_a_step_lasts_as_long_as_the_gpu_works_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever Python reads it: before an evaluation it waits for two steps at once."""
    ends = iter([0.5, 1.5, 3.5])

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing  # or it could not be asked

        def record(self, stream: str) -> None:
            self.at = {"of cuda:1": next(ends)}[stream]

        def elapsed_time(self, end: "Event") -> float:
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", "of {}".format)
    now, seconds_between = loop.now.__wrapped__, loop.seconds_between.__wrapped__  # no types of fakes
    began, first, second = (now(torch.device("cuda", 1)) for _ in range(3))
    assert (seconds_between(began, first), seconds_between(first, second)) == (1.0, 2.0)
    begin = time.perf_counter()
    assert begin < now(torch.device("cpu")) < time.perf_counter()
    assert seconds_between(2.0, 3.5) == 1.5


def test_signals_get_their_handlers_back_unless_they_are_ignored_by_then() -> None:
    """As by a rank that says why it gives up, while torchrun wants to end it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with loop.catch_signals() as caught:
            os.kill(os.getpid(), signal.SIGINT)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGINT]
        after = {number: signal.getsignal(number) for number in numbers}
        assert after == before | {signal.SIGTERM: signal.SIG_IGN}
    finally:
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])


def test_a_second_signal_has_its_usual_effect_and_what_nohup_ignores_none() -> None:
    usual: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: usual.append(number))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with loop.catch_signals() as caught:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
        assert (caught, usual) == ([signal.SIGTERM], [signal.SIGTERM])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_run_in_a_thread_leaves_signals_to_the_main_one() -> None:
    def catch() -> list[int]:
        with loop.catch_signals() as caught:
            return caught

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(catch).result() == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_the_last_checkpoint_is_written_does_not_lose_it(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Checkpointer.close

    def close_signalled(self: Checkpointer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        close(self)

    def would_end(number: int, frame: object) -> None:
        raise AssertionError("the process would have ended here")

    monkeypatch.setattr(Checkpointer, "close", close_signalled)
    before = signal.signal(signal.SIGTERM, would_end)
    try:
        go(tmp_path, *EAGER, train__stop_after=1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert Checkpointer(tmp_path / "checkpoints").latest() == 1


def test_a_kernel_without_float32_is_refused_on_a_gpu() -> None:
    config = RunConfig(train=TrainConfig(attention="flash"))
    check_attention(config, "cuda", "bfloat16")
    with pytest.raises(UserError, match="flash attention has no float32, expected auto, efficient or math"):
        check_attention(config, "cuda", "float32")


def test_samples_of_two_steps_are_two_draws_by_the_settings(go: Go, tmp_path: Path) -> None:
    still = {"optim__max_learning_rate": 1e-9, "optim__min_learning_rate": 0, "eval__interval": None}
    wanted = {"sample__temperature": 5, "sample__top_k": 9, "sample__tokens": 30, "sample__prompt": "AB"}
    result = go(tmp_path, *EAGER, train__max_steps=3, sample__interval=1, **still, **wanted)
    samples = [record["sample"] for record in read_metrics(tmp_path / "metrics.jsonl") if "sample" in record]
    assert len(set(samples)) == 3
    tokens = generate(
        result.state.params,
        GPT2Config(32, 16, 1, 2, 16),
        torch.tensor([[1, 2]]),
        max_new_tokens=30,
        temperature=5.0,
        top_k=9,
        generator=torch.Generator().manual_seed(RunConfig().train.seed + 3),
    )
    assert samples[-1] == "".join(ALPHABET[token] for token in tokens[0])


def test_the_best_checkpoint_stays_and_is_one_that_was_evaluated(go: Go, tmp_path: Path) -> None:
    """A step without an evaluation has no part in the loss of the one before, which was better."""
    rising = {"optim__max_learning_rate": 1, "optim__warmup_steps": 3, "sample__interval": None}
    often = {"eval__interval": 2, "checkpoint__interval": 1, "checkpoint__keep": 1}
    go(tmp_path, *EAGER, train__max_steps=4, **rising, **often)
    records = read_metrics(tmp_path / "metrics.jsonl")
    first, last = (record["val_loss"] for record in records if "val_loss" in record)
    assert first < last
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "4"]
    assert Checkpointer(tmp_path / "checkpoints").best() == 2


def test_the_seed_decides_dropped_features(go: Go, tmp_path: Path) -> None:
    """Of the same tokens and first parameters."""
    write_tokens(tmp_path / "data", np.zeros(400, dtype=int))
    same = {"data__path": tmp_path / "data", "train__stop_after": 1, "init__run_dir": tmp_path / "first"}
    go(tmp_path / "first", *EAGER, **same | {"init__run_dir": None})
    one, other = (go(tmp_path / f"{seed}", *EAGER, **same, train__seed=seed).loss for seed in (1, 2))
    assert one != other


class Names(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kernel", "is_called"), [("flash", True), ("math", False)])
def test_the_attention_of_a_flag_is_that_of_the_steps(
    go: Go, tmp_path: Path, kernel: str, is_called: bool
) -> None:
    with Names() as names:
        go(tmp_path, *EAGER, train__attention=kernel, train__stop_after=1, model__dropout=0)
    assert any("flash_attention" in name for name in names.found) == is_called


def test_the_plan_comes_first_and_alone_writes_nothing(go: Go, tmp_path: Path, capsys: Any) -> None:
    assert go(tmp_path / "run", "--plan", train__precision="bfloat16") is None
    assert list(tmp_path.iterdir()) == []
    go(tmp_path / "run", *EAGER, train__stop_after=1)
    said = capsys.readouterr().out
    assert said.lstrip().startswith("model")
    assert said.index("compute") < said.index("step 1/1")


def test_the_plan_says_why_there_will_be_no_samples(go: Go, tmp_path: Path, capsys: Any) -> None:
    """Of characters that nanoGPT has numbered, which only its meta.pkl names: a program, not data."""
    write_tokens(tmp_path / "data", np.arange(400) % 32)
    go(tmp_path / "run", "--plan", data__path=tmp_path / "data")
    assert "no samples" not in capsys.readouterr().out
    (tmp_path / "data/manifest.json").unlink()
    go(tmp_path / "run", "--plan", data__path=tmp_path / "data")
    assert "(no samples: without a manifest" in capsys.readouterr().out


def test_a_finished_run_says_so_and_computes_nothing(go: Go, tmp_path: Path, capsys: Any) -> None:
    go(tmp_path / "run", *EAGER, train__max_steps=3)
    before = contents(tmp_path)
    again = go(tmp_path / "run", *EAGER, train__max_steps=3)
    assert again.state is None
    assert contents(tmp_path) == before
    assert "is at step 3, and this run ends at step 3; see its loss.png" in capsys.readouterr().out
    go(tmp_path / "run", *EAGER, train__max_steps=3, train__stop_after=2)
    assert contents(tmp_path) == before
    assert "is at step 3, and this run ends at step 2; see its loss.png" in capsys.readouterr().out


def test_what_decides_no_number_may_change_between_starts(go: Go, folder: Path, tmp_path: Path) -> None:
    """And a run's directory may be moved; it is made with the folders above it."""
    go(tmp_path / "runs/mine", *EAGER, train__stop_after=2)
    (tmp_path / "runs").rename(tmp_path / "moved")
    other = {"data__path": shutil.copytree(folder, tmp_path / "copy"), "data__batch_size": 2}
    other |= {"sample__tokens": 1, "eval__tokens": 16, "train__stop_after": 3}
    result = go(tmp_path / "moved/mine", *EAGER, **other)
    assert result.step == 3


BELONG_TO_A_RUN = {
    *(f"model.{field.name}" for field in dataclasses.fields(GPT2Config)),
    *(f"optim.{field.name}" for field in dataclasses.fields(OptimConfig)),
    *("data.total_batch_size", "train.max_steps", "train.seed", "train.precision"),
}
"""The flags that decide which tokens a run sees or what it computes with them."""


@pytest.fixture
def dataset(folder: Path) -> Dataset:
    tokens = np.arange(9, dtype=np.uint16)
    return Dataset(folder, tokens, tokens, None, "a hash", {"train.bin": "12ab"}, "")


def test_a_run_goes_on_with_other_flags_unless_they_decide_its_numbers(dataset: Dataset) -> None:
    config = RunConfig(train=TrainConfig(precision="float32"))
    about = run_dir.describe(config, dataset, "float32")
    refused = set()
    for group, values in about["config"].items():
        for name in values if isinstance(values, dict) else [None]:
            other = json.loads(json.dumps(about))
            if name is None:
                other["config"][group] = "other"
            else:
                other["config"][group][name] = "other"
            if (group, name) == ("train", "precision"):
                other["precision"] = "other"
            try:
                run_dir.check_same_run(other, config, dataset)
            except UserError:
                refused.add(f"{group}.{name}")
    assert refused == BELONG_TO_A_RUN
    del about["config"]["optim"]  # as of a program that had no such settings
    with pytest.raises(UserError, match=r"holds a run with --optim.max-learning-rate None, now 0\.0006"):
        run_dir.check_same_run(about, config, dataset)


def test_data_is_another_if_what_is_known_of_both_differs(dataset: Dataset) -> None:
    about = run_dir.describe(RunConfig(), dataset, "float32")
    run_dir.check_same_run(about, RunConfig(), dataset._replace(sha256=None))
    for other in (dataset._replace(hash="another"), dataset._replace(sha256={"train.bin": "34cd"})):
        with pytest.raises(UserError, match="was trained on other data than"):
            run_dir.check_same_run(about, RunConfig(), other)


def test_a_run_without_its_config_json_or_its_checkpoints_is_still_that_run(
    go: Go, refused: Callable[..., str], tmp_path: Path
) -> None:
    """The file may be moved away, for each checkpoint holds the same; before the first there is only it."""
    home = tmp_path / "run"
    go(home, *EAGER, train__stop_after=1)
    (home / "config.json").unlink()
    assert "holds a run with --train.seed 1337, now 1" in refused(train__seed=1)
    assert "holds a run (at step 1), expected none with --resume never" in refused(resume="never")
    assert go(home, *EAGER, train__stop_after=2).step == 2
    assert json.loads((home / "config.json").read_text())["config"]["train"]["stop_after"] == 2
    shutil.rmtree(home / "checkpoints")
    assert "holds a run with --train.seed 1337, now 1" in refused(train__seed=1)
    assert "holds a run (at step 0), expected none with --resume never" in refused(resume="never")
    assert go(home, *EAGER, train__stop_after=1).step == 1


def test_a_resumed_run_can_be_demanded(go: Go, tmp_path: Path) -> None:
    go(tmp_path, *EAGER, train__stop_after=2, resume="never")
    assert go(tmp_path, *EAGER, train__stop_after=3, resume="must").step == 3


def test_a_run_goes_on_in_its_own_precision_on_another_device(
    go: Go, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perf, "default_precision", lambda hardware: "bfloat16")
    go(tmp_path / "run", *EAGER, train__precision=None, train__stop_after=1)
    monkeypatch.setattr(perf, "default_precision", lambda hardware: "float16")
    go(tmp_path / "run", *EAGER, train__precision=None, train__stop_after=2)
    assert json.loads((tmp_path / "run/config.json").read_text())["precision"] == "bfloat16"
    assert go(tmp_path / "run", *EAGER, train__precision="bfloat16", train__stop_after=3).step == 3
    assert "holds a run with --train.precision bfloat16, now float32" in refused(*EAGER)


def test_a_sample_leaves_out_ids_that_the_tokenizer_lacks(go: Go, tmp_path: Path) -> None:
    go(tmp_path, *EAGER, model__vocab_size=4096, train__max_steps=3, sample__tokens=50)
    (sample,) = [r["sample"] for r in read_metrics(tmp_path / "metrics.jsonl") if "sample" in r]
    assert set(sample) <= set(ALPHABET)


# Bad input: one sentence, status 2, nothing compiled, nothing written.


def test_a_missing_data_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no data folder at" in refused(data__path=tmp_path / "nowhere")


def test_a_text_in_the_place_of_the_data_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    text = tmp_path / "two plays.txt"
    text.write_text("To be")
    said = refused(data__path=text)
    assert "plays.txt is a file, expected a folder with train.bin and val.bin; set --data.path" in said
    assert f"python -m nanogpt.prepare '{text}' --out 'data/two plays'" in said


def test_a_data_folder_that_the_system_does_not_show(refused: Callable[..., str]) -> None:
    """As below a folder of somebody else, which a test of root would see: a name is too long for root too."""
    assert "cannot be looked at (File name too long), expected" in refused(data__path="x" * 300)


def test_a_cache_directory_that_the_system_does_not_show(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_CACHE", "x" * 300)
    said = refused(data__path="shakespeare-char")
    assert "(File name too long), expected a writable cache directory; set NANOGPT_CACHE" in said


def test_an_empty_data_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no token file at" in refused(data__path=tmp_path / "empty")


def test_an_odd_number_of_bytes(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.bin").write_bytes(bytes(4001))
    assert "an odd number of bytes (4,001)" in refused(data__path=tmp_path / "data")


def test_a_token_id_beyond_the_vocabulary(refused: Callable[..., str], tmp_path: Path) -> None:
    write_tokens(tmp_path / "data", np.arange(400) % 40)
    said = refused(data__path=tmp_path / "data")
    assert "token id 32 at position 32, expected ids below 32" in said


def test_a_file_shorter_than_one_window(refused: Callable[..., str], tmp_path: Path) -> None:
    write_tokens(tmp_path / "data", np.arange(16))
    assert "has 16 tokens, expected at least 17" in refused(data__path=tmp_path / "data")


def test_a_file_that_is_not_what_its_manifest_says(refused: Callable[..., str], tmp_path: Path) -> None:
    write_tokens(tmp_path / "data", np.arange(400) % 32)
    np.zeros(399, "<u2").tofile(tmp_path / "data/val.bin")
    assert "has 399 tokens, its manifest says 400" in refused(data__path=tmp_path / "data")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"data__total_batch_size": 100},
            "a total batch of 100 tokens does not divide into microsteps of 64",
        ),
        (
            {"data__total_batch_size": 64 * 10**12},
            "the tokens of a step, 64,000,000,000,000, need 2560.0 TB of this machine's memory, ",
        ),
        (
            {"data__batch_size": 10**12, "data__total_batch_size": 16 * 10**12},
            "the tokens of a step, 16,000,",
        ),
        ({"model__n_layer": 10**12}, "one sequence of 16 tokens needs"),
        ({"model__n_head": 3}, "n_embd 16 does not divide into 3 heads"),
        ({"model__n_layer": 0}, "model.n_layer is 0, expected at least 1"),
        ({"optim__warmup_steps": 20}, "warmup takes 20 of 20 steps, expected fewer"),
        ({"optim__min_learning_rate": 1.0}, "learning rates from 0.0006 down to 1.0"),
        ({"optim__weight_decay": -1}, "weight decay is -1.0, expected a number of at least 0"),
        ({"optim__gradient_clip_norm": "nan"}, "gradient_clip_norm is nan, expected above 0"),
        ({"data__batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"train__max_steps": 1, "optim__warmup_steps": 1}, "max steps is 1, expected from 2 to"),
        ({"train__stop_after": 0}, "stop after is 0, expected at least 1"),
        ({"train__seed": -1}, "the seed is -1, expected from 0 to"),
        ({"eval__interval": 0}, "the eval interval is 0 steps, expected at least 1"),
        ({"eval__tokens": 0}, "an evaluation of 0 tokens, expected at least 1"),
        ({"checkpoint__interval": 0}, "the checkpoint interval is 0 steps"),
        ({"checkpoint__keep": 0}, "keeping 0 checkpoints, expected at least 1"),
        ({"sample__tokens": 0}, "a sample of 0 tokens"),
        ({"sample__prompt": "é"}, "got the character 'é'"),
        ({"train__device": "gpu"}, "no device is called 'gpu', expected cuda, cpu or mps"),
        ({"train__device": "cpu:1"}, "no device cpu:1 on this machine, expected one of"),
        ({"train__device": "cuda:99"}, "no device cuda:99 on this machine"),
        ({"resume": "must"}, "has no checkpoint, expected one with --resume must"),
    ],
)
def test_a_value_out_of_range(refused: Callable[..., str], changes: dict[str, Any], sentence: str) -> None:
    assert sentence in refused(**changes)


def test_betas_out_of_range(refused: Callable[..., str]) -> None:
    said = refused("--optim.betas", "0.9", "1.0")
    assert "betas are (0.9, 1.0), expected each at least 0 and below 1; set --optim.betas" in said


def test_a_prompt_beyond_the_models_vocabulary(refused: Callable[..., str], tmp_path: Path) -> None:
    write_tokens(tmp_path / "data", np.arange(400) % 8)
    said = refused(data__path=tmp_path / "data", model__vocab_size=8, sample__prompt="Z")
    assert "the prompt 'Z' has the token ids [26], expected at least one and all below" in said


def test_a_prompt_of_a_character_that_the_text_has_not(refused: Callable[..., str]) -> None:
    assert "--sample.prompt 'q': got the character 'q', expected one of the 32" in refused(sample__prompt="q")


@pytest.mark.parametrize(("flag", "value"), [("--train.precision", "int8"), ("--modle.n-layer", "1")])
def test_a_flag_that_is_misspelled_is_named_with_what_was_expected(
    go: Go, tmp_path: Path, capsys: Any, flag: str, value: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        go(tmp_path / "run", flag, value)
    said = " ".join(re.sub("[─│╭╮╰╯]", "", capsys.readouterr().err).split())
    assert stop.value.code == 2
    assert ("'bfloat16'" if value == "int8" else "Perhaps you meant: --model.n-layer") in said
    assert "Traceback" not in said


def test_a_run_directory_with_another_config(refused: Callable[..., str], go: Go, tmp_path: Path) -> None:
    go(tmp_path / "run", *EAGER, train__stop_after=1)
    assert "holds a run with --model.n-head 2, now 4" in refused(model__n_head=4)
    assert "holds a run with --train.max-steps 20, now 30" in refused(train__max_steps=30)
    assert "holds a run (at step 1), expected none with --resume never" in refused(resume="never")


def test_a_run_directory_with_other_data(refused: Callable[..., str], go: Go, tmp_path: Path) -> None:
    go(tmp_path / "run", *EAGER, train__stop_after=1)
    write_tokens(tmp_path / "data", np.arange(400) % 32)
    assert "was trained on other data than" in refused(data__path=tmp_path / "data")


def test_a_run_directory_with_data_that_the_manifest_says_is_other(
    refused: Callable[..., str], go: Go, tmp_path: Path
) -> None:
    """As where the files differ only between the blocks that are looked at. Older runs have noted nothing."""
    data, manifest = tmp_path / "data", tmp_path / "data/manifest.json"
    write_tokens(data, np.arange(400) % 32)
    about = json.loads(manifest.read_text())
    for step, hashes in enumerate(({}, {"sha256": {"train.bin": "12ab"}}), 1):
        manifest.write_text(json.dumps(about | hashes))
        go(tmp_path / "run", *EAGER, train__stop_after=step, data__path=data)
    manifest.write_text(json.dumps(about | {"sha256": {"train.bin": "34cd"}}))
    assert "was trained on other data than" in refused(data__path=data)


@pytest.mark.parametrize(
    "damage",
    [
        *("", "{", "[]", "[" * 200_000),
        *('{"config": {"model": {}}}', '{"config": {"model": {}}, "data_hash": ""}'),
        *('{"config": 1, "data_hash": "a"}', '{"config": {}, "data_hash": "a"}'),
    ],
)
def test_a_damaged_config_json(refused: Callable[..., str], tmp_path: Path, damage: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(damage)
    assert "config.json is not what a run wrote" in refused()


def test_a_config_json_that_cannot_be_read(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run/config.json").mkdir(parents=True)
    assert "config.json is not what a run wrote (IsADirectoryError" in refused()


def test_a_directory_that_is_no_runs(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("mine")
    assert "holds metrics.jsonl but no config.json, so it is not a run's directory" in refused()


def test_imported_parameters_are_to_start_from_and_no_run(
    refused: Callable[..., str], go: Go, tmp_path: Path
) -> None:
    model = GPT2Config(vocab_size=32, block_size=16, n_layer=1, n_head=2, n_embd=16)
    params = init(model, torch.Generator().manual_seed(3))
    hf.save_pretrained(tmp_path / "theirs", params, model)
    hf.Import(source=str(tmp_path / "theirs"), run_dir=tmp_path / "run")()
    said = refused()
    assert "holds parameters from" in said
    assert f"start from them with --init.run-dir {tmp_path / 'run'}" in said
    go(tmp_path / "mine", *EAGER, init__run_dir=tmp_path / "run", train__stop_after=1)
    moved, _ = load_params(tmp_path / "mine/checkpoints")
    fresh = init(model, torch.Generator().manual_seed(RunConfig().train.seed))
    near, far = (tree.global_norm({n: moved[n] - p[n] for n in p}) for p in (params, fresh))
    assert near < far / 10  # one step of warmup is short


def test_a_checkpoint_of_another_shape(
    refused: Callable[..., str], go: Go, folder: Path, tmp_path: Path
) -> None:
    go(tmp_path / "run", *EAGER, train__stop_after=1)
    about = json.loads((tmp_path / "run/config.json").read_text())
    state = init_state(
        GPT2Config(32, 16, 1, 2, 24), make_optimizer(RunConfig(), "float32"), torch.Generator()
    )
    checkpointer = Checkpointer(tmp_path / "run/checkpoints")
    checkpointer.save(2, state, metadata=about)
    checkpointer.close()
    said = refused()
    assert "the checkpoint of step 2" in said
    assert "params/wte.weight is float32[32, 24], expected float32[32, 16]" in said


def test_parameters_of_fewer_positions_than_asked_for(
    refused: Callable[..., str], go: Go, tmp_path: Path
) -> None:
    go(tmp_path / "source", *EAGER, train__stop_after=1)
    said = refused(init__run_dir=tmp_path / "source", model__block_size=32)
    assert "holds a model with --model.block-size 16, now 32; repeat its flag" in said


def test_parameters_from_a_run_that_has_none(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "holds no checkpoint" in refused(init__run_dir=tmp_path / "nowhere")


def test_a_directory_in_which_another_process_trains(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    descriptor = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "another process trains in" in refused()
    os.close(descriptor)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_file_that_was_damaged_after_it_was_checked(
    go: Go, tmp_path: Path, capsys: Any, split: str
) -> None:
    write_tokens(tmp_path / "data", np.arange(4000) % 32)
    with (tmp_path / f"data/{split}.bin").open("r+b") as file:
        file.seek(2000 if split == "train" else 20)
        file.write(b"\xff\xff" * 1000)
    with pytest.raises(SystemExit) as stop:
        go(tmp_path / "run", *EAGER, data__path=tmp_path / "data", train__max_steps=9)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "has token id 65535, expected ids below 32" in said
    assert f"nanogpt.prepare verify {tmp_path / 'data'}" in said


def test_a_sample_that_fails_costs_no_state(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no text today")

    monkeypatch.setattr("nanogpt.loop.generate", fail)
    with pytest.raises(RuntimeError, match="no text today"):
        go(tmp_path, *EAGER, train__max_steps=3, sample__interval=None)
    assert Checkpointer(tmp_path / "checkpoints").latest() == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sample__temperature": "nan"}, "a sample of 20 tokens at temperature nan"),
        ({"optim__weight_decay": "nan"}, "weight decay is nan"),
        ({"optim__max_learning_rate": "inf"}, "learning rates from inf"),
        ({"train__seed": 2**63}, "the seed is 9223372036854775808"),
        ({"train__max_steps": 10**20}, "max steps is 100000000000000000000"),
        ({"train__attention": "cudnn"}, "a CPU has no cudnn attention"),
        ({"train__attention": "flash"}, "flash attention has no dropout and --model.dropout is 0.1"),
        ({"run_dir": Path("/tmp") / ("x" * 300)}, "File name too long"),
    ],
)
def test_values_that_nothing_can_be_computed_with(
    refused: Callable[..., str], changes: dict[str, Any], sentence: str
) -> None:
    assert sentence in refused(**changes)


def test_a_full_disk_before_the_start(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert "has 1.0 KB free and checkpoints need" in refused()


def test_a_full_disk_on_the_way(go: Go, tmp_path: Path, capsys: Any) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))  # a few lines of metrics, no checkpoint
    try:
        with pytest.raises(SystemExit) as stop:
            go(
                tmp_path / "run",
                *EAGER,
                checkpoint__interval=None,
                eval__interval=None,
                sample__interval=None,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stop.value.code == 2
    assert re.fullmatch(
        r"error: no more room to write in \S+ \(File too large\).*\n", capsys.readouterr().err
    )


def test_a_run_directory_that_is_moved_away_on_the_way(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def save(*arguments: Any, **options: Any) -> None:
        (tmp_path / "run").rename(tmp_path / "elsewhere")

    monkeypatch.setattr(Checkpointer, "save", save)
    with pytest.raises(SystemExit) as stop:
        go(tmp_path / "run", *EAGER, train__max_steps=4)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/run/metrics.jsonl cannot be used any more (No such file")
    assert said.endswith("start the same command again, which goes on from the last checkpoint there\n")


def test_a_lost_run_directory_is_known_by_its_absolute_name_too() -> None:
    run_dir = Path("runs/mine")
    gone = FileNotFoundError(2, "No such file", str(Path.cwd() / run_dir / "checkpoints/4"))
    with pytest.raises(UserError, match="expected runs/mine to stay"), run.lost_disk_in_a_sentence(run_dir):
        raise gone


def test_a_run_directory_that_cannot_be_made(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is not a folder that you may write to" in refused(run_dir=tmp_path / "file/run")
    assert "is a file, expected a directory" in refused(run_dir=tmp_path / "file")


# What goes wrong while it runs.


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(go: Go, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        go(tmp_path, *EAGER, optim__max_learning_rate=1e30, optim__warmup_steps=1, checkpoint__interval=1)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    step = int(re.match(r"error: the \w+ of step (\d+) is (nan|inf), expected a number", said)[1])
    assert (Checkpointer(tmp_path / "checkpoints").latest() or 0) < step
    assert steps_logged(tmp_path)[-1] == step


def test_a_gradient_that_is_no_number_is_fatal_unless_the_loss_is_scaled() -> None:
    lost = {"loss": 1.0, "grad_norm": math.inf}
    check_finite(RunConfig(), 1, lost, "float16")
    with pytest.raises(UserError, match="the grad_norm of step 1 is inf, expected a number"):
        check_finite(RunConfig(), 1, lost, "bfloat16")


class SmallMemory(TorchDispatchMode):
    """A device on which no tensor of integers may have more than `limit` numbers: that bounds the
    sequences."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.embedding.default and result.numel() > self.limit:
            raise torch.OutOfMemoryError("no more memory")
        return result


def test_the_microstep_is_halved_until_its_memory_is_there(go: Go, tmp_path: Path, capsys: Any) -> None:
    with SmallMemory(16 * 16):  # one sequence of 16 tokens and 16 features
        result = go(tmp_path / "a", *EAGER, train__stop_after=2)
    said = capsys.readouterr().out
    assert "with 4 sequences in a microstep: 2 at a time and 4 microsteps from here on" in said
    assert "with 2 sequences in a microstep: 1 at a time and 8 microsteps from here on" in said
    assert differing_leaves(result, go(tmp_path / "b", *EAGER, data__batch_size=1, train__stop_after=2)) == []


def test_memory_for_not_even_one_sequence_ends_in_a_sentence(go: Go, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop, SmallMemory(0):
        go(tmp_path, *EAGER, data__batch_size=1)
    assert stop.value.code == 2
    assert "out of memory after 0 steps with 1 sequences in a microstep" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "smaller"), [(64, 32), (6, 3), (15, 5), (2, 1), (7, 1)])
def test_smaller_microsteps_keep_the_tokens_of_a_step(size: int, smaller: int) -> None:
    spec = BatchSpec(block_size=8, batch_size=size, total_batch_size=8 * size * 3, seed=0)
    halved = smaller_microsteps(spec, steps_done=0, error=MemoryError())
    assert halved.batch_size == smaller
    assert halved.batch_size * halved.accumulation == 3 * size


def test_memory_that_is_gone_after_the_first_step_is_not_answered_by_halving() -> None:
    spec = BatchSpec(block_size=8, batch_size=4, total_batch_size=32, seed=0)
    with pytest.raises(UserError, match=r"out of memory after 3 steps .* set a smaller --data.batch-size"):
        smaller_microsteps(spec, steps_done=3, error=MemoryError())


def test_microsteps_are_cut_to_what_the_device_has_free() -> None:
    config = RunConfig(model=GPT2Config.named("gpt2"), data=DataConfig(batch_size=64))
    spec = BatchSpec(block_size=1024, batch_size=64, total_batch_size=524288, seed=0)
    gpu = perf.Hardware(
        torch.device("cpu"), "a GPU", 8, 24 * 10**9, 15 * 10**9, bf16_fast=True, fp16_fast=True
    )
    cut = fit(config, spec, gpu, "bfloat16")
    assert cut.batch_size < 64
    assert cut.batch_size * cut.accumulation == 64 * 8
    assert cut_in_words(spec, cut, "a GPU") == (
        f"64 sequences in a microstep do not fit a GPU: {cut.batch_size} at a time and {cut.accumulation} "
        "microsteps instead of 8"
    )


def keeping(slots: int) -> Callable[..., optim.Transform]:
    """A `make_optimizer` whose state is so many times the parameters."""
    update = optim.clip_by_global_norm(1.0).update
    return lambda config, precision: optim.Transform(lambda params: [params] * slots, update)


def test_the_plan_counts_what_another_optimizer_keeps(
    go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "make_optimizer", keeping(3))
    go(tmp_path, *EAGER, "--plan")
    sizes = re.search(r"parameters (\S+) KB, optimizer state (\S+) KB", capsys.readouterr().out)
    assert sizes is not None
    assert float(sizes[2]) == pytest.approx(3 * float(sizes[1]), abs=0.3)  # both are rounded to a tenth


def test_microsteps_leave_room_for_what_another_optimizer_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = BatchSpec(block_size=1024, batch_size=64, total_batch_size=524288, seed=0)
    gpu = perf.Hardware(
        torch.device("cpu"), "a GPU", 8, 24 * 10**9, 15 * 10**9, bf16_fast=True, fp16_fast=True
    )
    usual = fit(RunConfig(), spec, gpu, "bfloat16").batch_size
    monkeypatch.setattr(run, "make_optimizer", keeping(20))
    assert fit(RunConfig(), spec, gpu, "bfloat16").batch_size < usual


@pytest.mark.parametrize("environment", [{"CXX": "/nowhere/g++"}, {"PATH": "/nowhere"}])
def test_without_a_compiler_a_line_says_so_and_the_run_is_eager(
    go: Go, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = counters["stats"]["unique_graphs"]
    result = go(tmp_path, train__max_steps=3)
    assert result.step == 3
    assert counters["stats"]["unique_graphs"] == before
    said = capsys.readouterr().out
    assert said.count("no compiler found (") == 1
    assert "float32, eager" in said


# Signals.


class RaiseSignal(TorchDispatchMode):
    """Raises a signal inside the n-th look-up of token embeddings."""

    def __init__(self, number: int, at_call: int) -> None:
        super().__init__()
        self.number, self.calls_left = number, at_call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            self.calls_left -= 1
            if self.calls_left == 0:
                signal.raise_signal(self.number)
        return func(*args, **(kwargs or {}))


def test_a_terminal_that_closes_stops_a_run_with_a_checkpoint(go: Go, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop, RaiseSignal(signal.SIGHUP, at_call=3):  # 4 calls a step
        go(tmp_path, *EAGER, train__max_steps=4)
    assert stop.value.code == 128 + signal.SIGHUP
    assert Checkpointer(tmp_path / "checkpoints").latest() == 1


def test_sigterm_in_a_step_saves_that_step_and_the_same_command_goes_on(go: Go, tmp_path: Path) -> None:
    whole = go(tmp_path / "whole", *EAGER, train__max_steps=4)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    with pytest.raises(SystemExit) as stop, RaiseSignal(signal.SIGTERM, at_call=7):  # 4 calls a step
        go(tmp_path / "cut", *EAGER, train__max_steps=4)
    assert stop.value.code == 128 + signal.SIGTERM
    assert Checkpointer(tmp_path / "cut/checkpoints").latest() == 2
    assert [signal.getsignal(number) for number in numbers] == handlers
    assert differing_leaves(whole, go(tmp_path / "cut", *EAGER, train__max_steps=4)) == []


@pytest.mark.parametrize(("split", "saved"), [("train", 7), ("val", 10)])
def test_tokens_that_break_in_a_run_lose_no_step(
    go: Go, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, split: str, saved: int
) -> None:
    """The file is cut before the batch of step 8 is read; the next evaluation is that of step 10."""
    write_tokens(tmp_path / "data", np.arange(4000) % 32)
    file, batch_at = tmp_path / f"data/{split}.bin", loop.batch_at
    whole_file = file.read_bytes()

    def cut(tokens: Any, step: int, spec: BatchSpec) -> Batch:
        if step == 7:
            os.truncate(file, 100)
        return batch_at(tokens, step, spec)

    rare = {"data__path": tmp_path / "data", "checkpoint__interval": None, "sample__interval": None}
    whole = go(tmp_path / "whole", *EAGER, **rare)
    monkeypatch.setattr(loop, "batch_at", cut)
    with pytest.raises(SystemExit) as stop:
        go(tmp_path / "cut", *EAGER, **rare)
    monkeypatch.setattr(loop, "batch_at", batch_at)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert f"stopped at step {saved}, saved, since" in said.out
    assert f"{split}.bin ends at byte 100, before where it ended when it was opened" in said.err
    assert Checkpointer(tmp_path / "cut/checkpoints").latest() == saved
    file.write_bytes(whole_file)
    assert differing_leaves(whole, go(tmp_path / "cut", *EAGER, **rare)) == []


def test_tokens_that_break_after_a_checkpoint_are_the_mistake_and_nothing_is_saved_again(
    go: Go, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokens(tmp_path / "data", np.arange(4000) % 32)
    file, batch_at = tmp_path / "data/train.bin", loop.batch_at

    def cut(tokens: Any, step: int, spec: BatchSpec) -> Batch:
        if step == 2:
            os.truncate(file, 100)
        return batch_at(tokens, step, spec)

    monkeypatch.setattr(loop, "batch_at", cut)
    with pytest.raises(SystemExit):
        go(tmp_path / "run", *EAGER, data__path=tmp_path / "data", train__max_steps=9, checkpoint__interval=2)
    said = capsys.readouterr()
    assert "train.bin ends at byte 100" in said.err
    assert "saved, since" not in said.out
    assert Checkpointer(tmp_path / "run/checkpoints").latest() == 2


def test_tokens_that_break_after_a_lost_step_do_not_save_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a step's numbers are read while the next one runs, so nobody has seen them yet."""
    lost = {"loss": math.nan, "grad_norm": 1.0}

    def report(self: loop.Loop, step: int, metrics: dict[str, float], ended: float) -> None:
        check_finite(RunConfig(), step, metrics, "bfloat16")

    monkeypatch.setattr(loop.Loop, "report", report)
    ahead = loop.Loop.__new__(loop.Loop)  # without a checkpointer that could save
    ahead.step, ahead.mesh = 3, None
    config = GPT2Config(32, 16, 1, 2, 16)
    state = init_state(config, make_optimizer(RunConfig(), "bfloat16"), torch.Generator())
    with (
        pytest.raises(UserError, match="the loss of step 3 is nan"),
        ahead.saving(state, lambda: (lost, 0.0)),
    ):
        raise UserError("the file was cut")


def test_a_signal_in_the_last_step_does_not_spoil_the_end(go: Go, tmp_path: Path) -> None:
    with RaiseSignal(signal.SIGTERM, at_call=9):
        assert go(tmp_path, *EAGER, train__max_steps=3).step == 3
    assert steps_logged(tmp_path, "val_loss") == [3]


# As a process.


def command(*line: str) -> list[str]:
    return [sys.executable, "-m", "experiments.gpt2_124m", *line]


def test_ctrl_c_ends_with_130_a_checkpoint_and_no_traceback(folder: Path, tmp_path: Path) -> None:
    line = arguments(
        *EAGER, data__path=folder, run_dir=tmp_path, train__max_steps=10**6, eval__interval=10**6
    )
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command(*line), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            for shown in process.stdout:
                if shown.startswith("step") and " 3/" in shown:
                    process.send_signal(signal.SIGINT)
                    break
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "stopping after this step, with a checkpoint" in err
    stopped = int(re.search(r"stopped at step (\d+), saved; the same command goes on", out)[1])
    assert Checkpointer(tmp_path / "checkpoints").latest() == stopped


def test_a_mistake_ends_with_2_one_line_on_stderr_and_nothing_on_stdout(tmp_path: Path) -> None:
    done = subprocess.run(
        command("--data.path", "nowhere", "--run-dir", str(tmp_path / "run")),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: no data folder at nowhere; .*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


FILLS = """
import resource, sys
import torch
from nanogpt.run import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def fill():
    return [torch.ones(64 << 20, dtype=torch.uint8) for _ in range(4)]

for _ in range(10):  # the C library's search for a place has settled by then
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept_for_what_is_asked_for_next() -> None:
    """Where the C library can be told to: elsewhere (macOS, musl) the same program only has to run."""

    def faults(memory: str) -> int:
        command = [sys.executable, "-c", FILLS, memory]
        return int(subprocess.run(command, capture_output=True, check=True, timeout=100).stdout)

    kept, handed_back = faults("kept"), faults("handed back")
    if hasattr(ctypes.CDLL(None), "mallopt"):
        assert kept < 10
        assert handed_back > 100  # 65,536 pages, or 128 huge ones


def test_the_commit_is_read_without_a_write_to_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *who, *arguments], capture_output=True, text=True, check=True
        ).stdout

    monkeypatch.setattr(run_dir, "__file__", str(tmp_path / "code.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run_dir.git_commit.__wrapped__() is None  # no repository
    git("init")
    assert run_dir.git_commit.__wrapped__() is None  # a repository without a commit
    (tmp_path / "code.py").write_text("a")
    git("add", ".")
    git("commit", "-m", "a")
    commit = git("rev-parse", "HEAD").strip()
    os.utime(tmp_path / "code.py", (0, 0))  # git would like to note that
    index = (tmp_path / ".git/index").read_bytes()
    assert run_dir.git_commit.__wrapped__() == commit
    assert (tmp_path / ".git/index").read_bytes() == index
    (tmp_path / "code.py").write_text("b")
    assert run_dir.git_commit.__wrapped__() == commit + "+"
    monkeypatch.setenv("PATH", "/nowhere")
    assert run_dir.git_commit.__wrapped__() is None  # no git
