"""The experiments: published shapes, budgets for a machine, and a command line that does not change
unseen."""

import dataclasses
import importlib
import io
import math
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import EAGER, arguments, contents, write_tokens

from experiments import finetune, quickstart, shakespeare
from experiments.gpt2_124m import config as gpt2_124m
from nanogpt import command, perf, sample
from nanogpt.config import InitConfig, RunConfig
from nanogpt.dataset import open_dataset
from nanogpt.errors import UserError
from nanogpt.model import GPT2Config
from nanogpt.run import main, make_schedule, shaped
from nanogpt.run_dir import to_json
from nanogpt.tracker import read_metrics

ROOT = Path(__file__).parent.parent
HELP = ROOT / "tests/golden/help.txt"
REGENERATE = "python tests/test_experiments.py"
NAMES = ["gpt2_124m", "gpt2_350m", "gpt2_774m", "gpt2_1558m", "shakespeare", "finetune", "quickstart"]
GIB = 2**30


def config_of(name: str) -> RunConfig:
    return importlib.import_module(f"experiments.{name}").config


def hardware(device: str, *, bf16_fast: bool) -> perf.Hardware:
    return perf.Hardware(torch.device(device), "a machine", 2, 32 * GIB, 30 * GIB, bf16_fast, False)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2_124m", 124_439_808),
        ("gpt2_350m", 354_823_168),
        ("gpt2_774m", 774_030_080),
        ("gpt2_1558m", 1_557_611_200),
    ],
)
def test_the_named_sizes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert perf.parameter_count(config_of(name).model) == parameters


def test_the_experiments_are_those_of_the_readme() -> None:
    rows = re.findall(
        r"^\| `experiments\.(\w+)` \| (.+) \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert [name for name, *_ in rows] == [name for name in NAMES if name != "quickstart"]
    for name, parameters, peak in rows:
        config = config_of(name)
        assert config.optim.max_learning_rate == float(peak)
        if re.fullmatch(r"[\d,]+", parameters):
            assert f"{perf.parameter_count(config.model):,}" == parameters
            assert config.optim.min_learning_rate == pytest.approx(float(peak) / 10)


def test_the_default_is_the_published_setting_of_gpt2() -> None:
    optim, train, data = gpt2_124m.optim, gpt2_124m.train, gpt2_124m.data
    assert (optim.max_learning_rate, optim.min_learning_rate, optim.warmup_steps) == (6e-4, 6e-5, 715)
    assert (optim.weight_decay, optim.gradient_clip_norm, optim.betas) == (0.1, 1.0, (0.9, 0.95))
    assert (train.max_steps, data.batch_size, data.total_batch_size) == (17234, 64, 524288)


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_without_flags_is_its_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["experiment"])
    assert command.parse(RunConfig, default=config_of(name)) == config_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_divides_and_has_a_schedule_and_a_directory_of_its_own(name: str) -> None:
    config = config_of(name)
    assert config.data.total_batch_size % (config.data.batch_size * config.model.block_size) == 0
    assert float(make_schedule(config)(torch.tensor(0))) > 0
    others = {config_of(other).run_dir for other in NAMES if other not in (name, "quickstart")}
    assert name in ("quickstart", "gpt2_124m") or config.run_dir not in others


def test_the_help_is_the_pinned_one() -> None:
    assert help_text() == HELP.read_text(), f"flags or their help changed; where it is meant: {REGENERATE}"


def help_text() -> str:
    """What --help says of the flags, without the frame that tyro draws to the width of the terminal."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(sys, "argv", ["experiment", "--help"])
        patch.setenv("COLUMNS", "80")  # a wide terminal gets several columns of boxes
        with pytest.raises(SystemExit):
            command.parse(RunConfig, default=gpt2_124m)
    words = " ".join(re.sub("[│╭╮╰╯]", " ", said.getvalue()).split())
    words = re.sub("( ?[─-]{5,})+ ?", "\n", words)
    lines = re.sub(r"(?<!,) (?=--[a-z]+[.a-z-]*,? )", "\n", words[words.index("--resume") :])
    return re.sub(r" (\w+ options)\n", r"\n\n\1: ", lines) + "\n"


def test_a_flag_with_an_equals_sign_means_the_home_directory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "argv", ["experiment", "--run-dir=~/runs/a", "--sample.prompt", "~/b=~/c"])
    config = command.parse(RunConfig, default=gpt2_124m)
    assert config.run_dir == Path("/home/me/runs/a")
    assert config.sample.prompt == "~/b=~/c"


@pytest.mark.parametrize("words", [["--run-dir", ""], ["--init.run_dir="], ["--plan", "--data.path", ""]])
def test_a_folder_without_a_name_is_not_the_current_one(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["experiment", *words])
    with pytest.raises(UserError, match=r"^--\S+ has an empty value, expected one that is not"):
        command.parse(RunConfig, default=gpt2_124m)


def test_a_program_that_nobody_reads_any_more_ends_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    program = "from nanogpt import command\nwith command.mistakes_in_a_sentence():\n    print('a' * 10**6)"
    for text in (program, program.replace("10**6", "10")):  # that fills the pipe, or is flushed at the end
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "wb") as pipe:
            done = subprocess.run(
                [sys.executable, "-c", text], cwd=ROOT, stdout=pipe, stderr=PIPE, timeout=60, check=False
            )
        assert (done.returncode, done.stderr) == (1, b"")


def test_every_field_of_the_config_has_a_flag_with_help_and_a_default() -> None:
    flags = [line for line in help_text().splitlines() if line.startswith("--")]
    values = to_json(gpt2_124m).values()
    assert len(flags) == sum(len(value) if isinstance(value, dict) else 1 for value in values)
    for flag in flags:
        assert re.search(r" \S.{15,} \(default: .*\)$", flag), flag


# What `make train` does.


def test_a_cpu_gets_forty_steps_of_as_many_tokens_as_its_arithmetic_allows() -> None:
    fast, slow = (quickstart.budget(hardware("cpu", bf16_fast=fast)) for fast in (True, False))
    assert (fast.train.max_steps, slow.train.max_steps) == (40, 40)
    assert (fast.data.total_batch_size, slow.data.total_batch_size) == (4096, 640)
    assert fast.model == gpt2_124m.model == dataclasses.replace(slow.model, block_size=1024)


def test_a_gpu_gets_the_real_batch() -> None:
    config = quickstart.budget(hardware("cuda", bf16_fast=True))
    assert config.data.total_batch_size == gpt2_124m.data.total_batch_size
    assert config.train.compile


def test_what_to_do_next_names_targets_and_modules_that_are_there() -> None:
    text = quickstart.NEXT
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", text)) <= targets
    for module in re.findall(r"-m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module
    assert max(map(len, text.splitlines())) <= 110


def test_the_quickstart_may_be_started_twice_and_says_what_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_tokens(tmp_path / "data", np.arange(400) % 32)
    line = arguments(*EAGER, data__path=tmp_path / "data", run_dir=tmp_path / "a run", train__max_steps=3)
    monkeypatch.setattr(sys, "argv", ["quickstart", *line])
    for times in (1, 2):
        quickstart.quickstart(gpt2_124m)
        said = capsys.readouterr().out
        assert f"{tmp_path}/a run is at step 3. What next:" in said
        command = f"-m nanogpt.sample --run-dir '{tmp_path}/a run' --prompt"  # as a shell wants it
        assert said.count(command) == times
        assert said.count("nothing to do") == times - 1
    monkeypatch.setattr(sys, "argv", ["quickstart", *line, "--plan"])
    quickstart.quickstart(gpt2_124m)
    assert "What next" not in capsys.readouterr().out


# The others.


def test_a_folder_that_happens_to_be_called_shakespeare_is_not_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shakespeare").mkdir()
    monkeypatch.chdir(tmp_path)
    dataset = open_dataset(RunConfig())
    assert dataset.note == "bundled, since data/openwebtext is not prepared"
    assert (dataset.folder / "train.bin").exists()


def test_the_characters_of_the_bundled_text_fit_the_shakespeare_model() -> None:
    dataset = open_dataset(shakespeare.config)
    assert dataset.tokenizer.vocab_size == shakespeare.config.model.vocab_size


def test_finetuning_starts_where_the_other_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_tokens(tmp_path / "data", np.arange(4000) % 32)
    quiet = {
        "data__path": tmp_path / "data",
        "eval__interval": 100,
        "sample__interval": 100,
        "model__dropout": 0,
    }
    line = arguments(*EAGER, **quiet, run_dir=tmp_path / "source", optim__max_learning_rate=0.02)
    monkeypatch.setattr(sys, "argv", ["gpt2_124m", *line])
    source = main(gpt2_124m)
    before = contents(tmp_path / "source")
    line = arguments(
        *EAGER, **quiet, run_dir=tmp_path / "tuned", init__run_dir=tmp_path / "source", train__max_steps=3
    )
    monkeypatch.setattr(sys, "argv", ["finetune", *line])
    main(finetune.config)
    first = read_metrics(tmp_path / "tuned/metrics.jsonl")[0]["loss"]
    assert source.val_loss < math.log(32) - 0.3, "the source has learnt nothing that could be lost"
    assert abs(first - source.val_loss) < 0.1
    assert contents(tmp_path / "source") == before


def test_the_shape_is_that_of_the_run_to_start_from_unless_a_flag_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokens(tmp_path / "data", np.arange(400) % 32)
    line = arguments(*EAGER, data__path=tmp_path / "data", run_dir=tmp_path / "source", train__max_steps=3)
    monkeypatch.setattr(sys, "argv", ["gpt2_124m", *line])
    main(gpt2_124m)
    default = finetune.config
    started = dataclasses.replace(default, init=InitConfig(run_dir=tmp_path / "source"))
    assert shaped(started, default).model == GPT2Config(32, 16, 1, 2, 16)  # the dropout is its own
    flagged = dataclasses.replace(started, model=GPT2Config(n_layer=3))
    assert shaped(flagged, default) == flagged
    nowhere = dataclasses.replace(default, init=InitConfig(run_dir=tmp_path / "nowhere"))
    assert shaped(nowhere, default) == nowhere


def test_the_sample_command_writes_the_same_texts_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_tokens(tmp_path / "data", np.arange(400) % 32)
    line = arguments(*EAGER, data__path=tmp_path / "data", run_dir=tmp_path / "run", train__max_steps=3)
    monkeypatch.setattr(sys, "argv", ["gpt2_124m", *line])
    main(gpt2_124m)
    wanted = sample.SampleCommand(run_dir=tmp_path / "run", prompt="AB", count=2, max_new_tokens=5)

    def said(**settings: Any) -> str:
        capsys.readouterr()
        sample.main(dataclasses.replace(wanted, **settings))
        return capsys.readouterr().out

    assert said() == said() != said(seed=1)
    assert said(temperature=0.0) == said(top_k=1) == said(top_p=1e-9)  # the likeliest
    texts = said().removesuffix("\n").split(f"\n{'-' * 80}\n")
    assert [text[:2] for text in texts] == ["AB", "AB"]
    assert [len(text) for text in texts] == [7, 7]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--run-dir", "nowhere"), "holds no checkpoint"),
        (
            ("--prompt", ""),
            "--prompt has an empty value, expected one that is not; set or leave out --prompt",
        ),
        (("--seed", "1", "--run-dir="), "--run-dir has an empty value, expected one that is not"),
        (("--temperature", "inf"), "the temperature is inf, expected a number of at least 0; set --temp"),
        (("--count", "0"), "count is 0, expected at least 1; set --count"),
        (("--max-new-tokens", "0"), "max_new_tokens is 0, expected at least 1; set --max-new-tokens"),
    ],
)
def test_a_mistake_at_the_sample_command_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, flags: tuple[str, ...], sentence: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["sample", *flags])
    with pytest.raises(SystemExit) as stop, command.mistakes_in_a_sentence():
        sample.main(command.parse(sample.SampleCommand, default=sample.SampleCommand()))
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ")
    assert sentence in said
    assert said.count("\n") == 1


if __name__ == "__main__":
    HELP.write_text(help_text())
