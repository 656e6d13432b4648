"""Every command of the README runs, or says that it needs a GPU or a network."""

import dataclasses
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from nanogpt import run as run_module
from nanogpt.config import (
    DataConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrackConfig,
    TrainConfig,
)
from nanogpt.model import GPT2Config
from nanogpt.run import run
from nanogpt.units import format_bytes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NEEDS = ("# needs a GPU", "# needs a network")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [
    line for block in blocks("bash") for line in block.splitlines() if not any(need in line for need in NEEDS)
]
MAKE = [line for line in COMMANDS if line.startswith("make ")]
PYTHON = [line for line in COMMANDS if line.startswith(".venv/bin/python -m ")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this README and a run whose checkpoint `nanogpt.sample` can read."""
    home = tmp_path_factory.mktemp("home")
    shutil.copy(ROOT / "README.md", home)
    config = RunConfig(
        model=GPT2Config(block_size=16, n_layer=1, n_head=1, n_embd=8),
        optim=OptimConfig(warmup_steps=1),
        data=DataConfig(path="shakespeare", batch_size=1, total_batch_size=16),
        train=TrainConfig(max_steps=2, device="cpu", compile=False),
        eval=EvalConfig(tokens=16),
        sample=SampleConfig(tokens=1),
        track=TrackConfig(wandb="disabled"),
        run_dir=home / "runs/gpt2_124m",
    )
    run(config)
    return home


def test_every_command_is_of_a_kind_that_is_tried():
    assert sorted(MAKE + PYTHON) == sorted(COMMANDS)
    assert len(MAKE) >= 3
    assert len(PYTHON) >= 5


@pytest.mark.parametrize("command", MAKE)
def test_a_make_command_names_a_target(command):
    words = shlex.split(command, comments=True)
    finished = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


# runpy's word on a module that another test imported: it runs anew, which is what is wanted here.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_python_commands_run_in_their_order(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    for command in PYTHON:
        module, *flags = shlex.split(command, comments=True)[2:]
        monkeypatch.setattr(sys, "argv", [module, *flags])
        status = 0
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            status = stop.code
        assert not status, f"{command}: {capsys.readouterr().err}"
    out = capsys.readouterr().out
    assert "KING:" in out
    assert "124,439,808 parameters" in out


def test_the_programs_run_one_after_the_other(capsys):
    names = {}
    for program in blocks("python"):
        exec(compile(program, "README.md", "exec"), names)
    first, *mapped = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out))
    ln_64 = 4.16  # the loss of chance among 64 tokens
    assert first == pytest.approx(ln_64, abs=0.2)
    assert len(mapped) == 3
    assert first > mapped[0] > mapped[1] > mapped[2]


def test_every_function_to_change_is_one_of_the_run():
    (named,) = re.findall(r"goes into (.*?) of `nanogpt/run.py`", README)
    functions = re.findall(r"`(\w+)`", named)
    assert len(functions) == 3
    assert [name for name in functions if not callable(getattr(run_module, name))] == []


def test_every_flag_is_one_of_the_experiments(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(RunConfig, default=RunConfig(), args=["--help"])
    known = set(re.findall(r"--[a-z-]+(?:\.[a-z-]+)?", capsys.readouterr().out))
    named = set(re.findall(r"`(--[a-z-]+\.[a-z-]+|--resume|--run-dir|--plan)", README))
    assert named - known == set()
    assert len(named) > 15


def test_the_table_of_defaults_holds():
    rows = dict(re.findall(r"^\| (`--[^|]+) \| ([^|]+) \|", README, re.MULTILINE))
    defaults = dataclasses.asdict(RunConfig())
    for cell, values in rows.items():
        flags = re.findall(r"--(\w+)\.([\w-]+)", cell)
        texts = [text.strip(" `") for text in values.split(",")]
        numbers = [text for text in texts if re.fullmatch(r"[\d.e-]+( [\d.]+)?", text)]
        if len(numbers) != len(flags):
            continue
        for (group, name), text in zip(flags, numbers, strict=True):
            value = defaults[group][name.replace("-", "_")]
            expected = tuple(map(float, text.split())) if isinstance(value, tuple) else float(text)
            assert value == expected, f"--{group}.{name}"


@pytest.mark.parametrize(
    ("heading", "report", "columns"),
    [
        (
            "GPT-2 124M on one H100",
            "gpu-nvidia-h100-80gb-hbm3",
            ["{rate:,.0f}", "{mfu:.0f} %", "{ratio}", "{memory}", "{first:.0f} s"],
        ),
        (
            "GPT-2 124M on 2 CPU cores",
            "cpu-2-cores-amd-epyc-bf16",
            ["{rate:,.0f}", "{mfu:.0f} %", "{share}", "{ratio}", "{memory}"],
        ),
    ],
)
def test_the_speed_tables_are_those_of_the_reports(heading: str, report: str, columns: list[str]) -> None:
    table = README[README.index(f"| {heading} |") :].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in table]
    results = json.loads((ROOT / f"benchmarks/reports/{report}.json").read_text())["results"]
    expected = []
    for name, found in results["peers"]["contenders"].items():
        ratio, share = found["speedup_of_ours"], found.get("share_of_product")
        numbers = {
            "rate": found["tokens_per_second"],
            "mfu": 100 * found["mfu"],
            "ratio": "{median:.2f} ({low:.2f} - {high:.2f}) times as fast".format(**ratio),
            "memory": format_bytes(found["memory"]["steps"]),
            "first": found["started"]["first_step_s"],
        }
        numbers |= {"ratio": ""} if name == "ours" else {}
        if share:
            median, low, high = (100 * share[key] for key in ("median", "low", "high"))
            numbers |= {"share": f"{median:.1f} % ({low:.1f} - {high:.1f})"}
        expected.append([column.format(**numbers) for column in columns])
    assert rows == expected


def peers_of(report: str) -> dict[str, str]:
    """Our tokens a second in a report, and how many times as fast as the plain module that is."""
    results = json.loads((ROOT / f"benchmarks/reports/{report}.json").read_text())["results"]
    found = results["peers"]["contenders"]
    ratio = "{median:.2f} ({low:.2f} - {high:.2f})".format(**found["plain"]["speedup_of_ours"])
    return {"rate": f"{found['ours']['tokens_per_second']:.0f}", "ratio": ratio}


def test_the_figures_in_the_text_are_those_of_the_report():
    report = ROOT / "benchmarks/reports/cpu-2-cores-amd-epyc-bf16.json"
    results = json.loads(report.read_text())["results"]
    starts = next(row["starts"] for row in results["throughput"]["rows"] if row["starts"])
    rates = {
        (row["engine"], row["workers"]): {
            name: found["median"] for name, found in row["tokens_per_second"].items()
        }
        for row in results["prepare"]["rows"]
    }
    tiktoken = [found for (engine, _), found in rates.items() if engine == "tiktoken"]
    share = min(found[source] / found["bare"] for found in tiktoken for source in ("json", "parquet"))
    fast = min(rates["fastokens", 2][source] for source in ("json", "parquet"))
    read = results["data"]["readers"]["mapped"]["tokens_per_second"]
    text = " ".join(README.split())
    step = results["peers"]["contenders"]["ours"]["step_s"]
    xeon, zen3 = (peers_of(name) for name in ("cpu-2-cores-intel-r-xeon-r-processor", "cpu-2-cores-amd-epyc"))
    for phrase in (
        f"our steps took {step['min']:.1f} to {step['max']:.1f} s.",
        f"a step was {xeon['ratio']} times as fast as the plain module's, at {xeon['rate']} tokens/s",
        f"(`benchmarks/reports/cpu-2-cores-amd-epyc.md`) {zen3['ratio']} times, at {zen3['rate']}.",
        f"the first step is done {starts['cold_s']:.0f} seconds after torch is imported",
        f"finds the graphs in PyTorch's cache, after {starts['warm_s']:.0f}.",
        f"A token file is read at {read / 1e6:.0f} million tokens a second",
        f"made at {100 * share:.0f} % of the speed of tiktoken",
        f"(`nanogpt[fast]`), at {fast / 1e6:.0f} million tokens a second",
    ):
        assert phrase in text
