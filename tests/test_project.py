"""The Makefile's targets and the lock: what a newcomer types first."""

import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

from experiments.launch import gpus
from nanogpt.loss import next_token_loss

ROOT = Path(__file__).parent.parent
NVIDIA_SMI = """#!/bin/bash
case "$1" in
  --query-gpu=*) printf '%s\\n' {gpus} ;;
  --query-compute-apps=*) printf '%s\\n' {processes} ;;
esac
"""
TORCHRUN = """
import signal, subprocess, sys

was_told = []
signal.signal(signal.SIGTERM, lambda number, frame: (was_told.append(number), rank.terminate()))
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(rank.pid, flush=True)
print("the rank ended with", rank.wait(), end=", as it was told\\n" if was_told else " and starts again\\n")
"""
FakeSmi = Callable[..., dict[str, str]]


@pytest.fixture
def no_gpu(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has python3 and nothing of NVIDIA's."""
    (tmp_path / "python3").symlink_to(sys.executable)
    return {"PATH": str(tmp_path)}


@pytest.fixture
def fake_smi(tmp_path: Path, no_gpu: dict[str, str]) -> FakeSmi:
    """Puts an nvidia-smi on that PATH that lists the given GPUs and processes."""

    def install(*, gpus: int, processes: dict[int, str]) -> dict[str, str]:
        rows = [f"'{pid}, 512, {name}'" for pid, name in processes.items()]
        script = tmp_path / "nvidia-smi"
        script.write_text(NVIDIA_SMI.format(gpus=" ".join(map(str, range(gpus))), processes=" ".join(rows)))
        script.chmod(0o755)
        return no_gpu

    return install


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours that would live for a minute."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def make(*arguments: str, environment: dict[str, str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run make with what `environment` adds; the GPU targets' own environment is taken to be set up."""
    executable = shutil.which("make")
    assert executable, "make is not on the PATH"
    command = [executable, "--silent", "--old-file=environment", f"PYTHON={sys.executable}", *arguments]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "CUDA_"))}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited, **environment},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def first_line(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.splitlines()[0]


def test_shapes_are_checked_while_tests_run() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        next_token_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3))


def test_a_checked_function_still_compiles_to_one_graph() -> None:
    compiled = torch.compile(next_token_loss, fullgraph=True, backend="eager")
    loss = compiled(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long))
    torch.testing.assert_close(loss, torch.tensor(5.0).log())


def test_help_lists_every_target() -> None:
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = [line.split()[0] for line in make(environment={}).stdout.splitlines()]
    assert sorted(listed) == sorted(targets)
    assert {"environment", "train", "test", "lint", "ddp-train", "gpu-status"} <= set(listed)


def test_a_venv_whose_python_is_gone_is_made_again(tmp_path: Path) -> None:
    for name in ("requirements.lock", "pyproject.toml", ".venv/pyvenv.cfg", ".venv/.installed"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    command = ["make", "--dry-run", f"--makefile={ROOT / 'Makefile'}", "environment"]
    (tmp_path / ".venv/bin").mkdir()
    python = tmp_path / ".venv/bin/python"
    for there, steps in ((sys.executable, False), ("/nowhere/python", True)):
        python.unlink(missing_ok=True)
        python.symlink_to(there)
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
        assert ("venv --quiet" in said.stdout) == steps
        assert ("--editable ." in said.stdout) == steps


def test_every_line_of_the_lock_is_a_plain_pin() -> None:
    plain = re.compile(r"[a-z0-9][a-z0-9.-]*==[0-9]+(\.[0-9]+)*((a|b|rc)[0-9]+|\.post[0-9]+)?( ; [^:@]+)?")
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert [line for line in lines if not plain.fullmatch(line)] == []


def test_the_lock_pins_no_prerelease() -> None:
    pins = re.findall(r"^\S+==\S+", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert [pin for pin in pins if re.search(r"[0-9](a|b|rc|\.dev)[0-9]", pin)] == []


def test_the_lock_pins_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = project["dependencies"] + project["optional-dependencies"]["dev"]
    pinned = {line.partition("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert {re.split(r"[\[<>=!~ ]", name)[0] for name in direct} <= pinned


def test_gpu_status_succeeds_where_there_is_no_gpu(no_gpu: dict[str, str]) -> None:
    result = make("gpu-status", environment=no_gpu)
    assert (result.returncode, result.stdout) == (0, "No GPU here: nvidia-smi is not on the PATH.\n")


def test_gpu_status_tells_whose_a_process_is(fake_smi: FakeSmi) -> None:
    result = make("gpu-status", environment=fake_smi(gpus=1, processes={os.getpid(): "python, or so"}))
    assert f"pid {os.getpid()} (yours): python, or so, 512 MiB" in result.stdout


def test_kill_gpu_has_nothing_to_do_where_there_is_no_gpu(no_gpu: dict[str, str]) -> None:
    result = make("kill-gpu", environment=no_gpu)
    assert (result.returncode, result.stdout) == (
        0,
        "No GPU here, so nothing to end: nvidia-smi is not on the PATH.\n",
    )


@pytest.mark.parametrize("answer", ["", "n\n", "what?\n"])
def test_kill_gpu_ends_nothing_without_a_yes(
    fake_smi: FakeSmi, sleeper: subprocess.Popen[bytes], answer: str
) -> None:
    result = make("kill-gpu", environment=fake_smi(gpus=1, processes={sleeper.pid: "python"}), stdin=answer)
    assert f"pid {sleeper.pid}: python, 512 MiB\nEnd it? [y/N] Nothing was ended.\n" == result.stdout
    assert sleeper.poll() is None


def test_kill_gpu_ends_the_callers_processes_after_a_yes(
    fake_smi: FakeSmi, sleeper: subprocess.Popen[bytes]
) -> None:
    result = make("kill-gpu", environment=fake_smi(gpus=1, processes={sleeper.pid: "python"}), stdin="y\n")
    assert result.stdout.endswith(f"Ended {sleeper.pid}.\n")
    assert sleeper.wait(timeout=5) == -15


def test_kill_gpu_ends_the_torchrun_that_would_start_its_ranks_again(
    fake_smi: FakeSmi, tmp_path: Path
) -> None:
    """One that hands the signal on to its rank and says so, as torchrun does."""
    torchrun = tmp_path / "torchrun.py"
    torchrun.write_text(TORCHRUN)
    with subprocess.Popen([sys.executable, torchrun], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        result = make("kill-gpu", environment=fake_smi(gpus=1, processes={pid: "python"}), stdin="y\n")
        assert starter.stdout.read() == "the rank ended with -15, as it was told\n"
    assert result.stdout.endswith(f"Ended {pid}.\n")


def test_kill_gpu_leaves_another_users_processes_alone(
    fake_smi: FakeSmi,
    sleeper: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", fake_smi(gpus=1, processes={sleeper.pid: "python"})["PATH"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    caller = os.getuid() + 1  # only root can start another user's process; anybody can be another caller
    monkeypatch.setattr(os, "getuid", lambda: caller)
    gpus.kill()
    assert capsys.readouterr().out == "No GPU process of yours is running.\n"
    assert sleeper.poll() is None


def test_ddp_train_says_that_there_is_no_gpu(no_gpu: dict[str, str]) -> None:
    result = make("ddp-train", "NGPUS=2", environment=no_gpu)
    assert result.returncode == 2
    assert first_line(result) == (
        "ddp-train needs a GPU and there is none here: nvidia-smi is not on the PATH; "
        "add ARGS='--train.device cpu' for processes on the CPU"
    )


@pytest.mark.parametrize(
    ("ngpus", "visible", "sentence"),
    [
        ("3", None, "NGPUS is 3, and 2 are visible here; set NGPUS=2 or less"),
        ("2", "1", "NGPUS is 2, and 1 is visible here; set NGPUS=1 or less"),
        (
            "1",
            "",
            "ddp-train needs a GPU and none is visible here (nvidia-smi lists 2, CUDA_VISIBLE_DEVICES is '')",
        ),
        ("3", "0,-1,1", "NGPUS is 3, and 1 is visible here; set NGPUS=1 or less"),
        (
            "2",
            "-1",
            "ddp-train needs a GPU and none is visible here (nvidia-smi lists 2, "
            "CUDA_VISIBLE_DEVICES is '-1')",
        ),
        ("0", None, "NGPUS is '0', expected a number from 1"),
        ("two", None, "NGPUS is 'two', expected a number from 1"),
        ("$(shell echo 1)", None, "NGPUS is '$(shell echo 1)', expected a number from 1"),
    ],
)
def test_ddp_train_refuses_more_gpus_than_are_visible(
    fake_smi: FakeSmi, ngpus: str, visible: str | None, sentence: str
) -> None:
    environment = fake_smi(gpus=2, processes={})
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    result = make("ddp-train", f"NGPUS={ngpus}", environment=environment)
    assert (result.returncode, first_line(result)) == (2, sentence)


def test_what_nvidia_smi_says_without_a_number_is_neither_a_gpu_nor_a_process(
    fake_smi: FakeSmi, tmp_path: Path
) -> None:
    environment = fake_smi(gpus=0, processes={})
    said = "No devices were found\n[N/A], [N/A], [Insufficient Permissions]"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/bash\nprintf '%s\\n' '{said}'\n")
    assert first_line(make("ddp-train", "NGPUS=9", environment=environment)) == (
        "ddp-train needs a GPU and none is visible here (nvidia-smi lists 0)"
    )
    result = make("gpu-status", environment=environment)
    assert (result.returncode, result.stdout) == (0, f"{said}\n")
    result = make("kill-gpu", environment=environment)
    assert (result.returncode, result.stdout) == (0, "No GPU process of yours is running.\n")


def test_arguments_reach_the_launcher_as_they_were_typed(no_gpu: dict[str, str], tmp_path: Path) -> None:
    odd = "'--run-dir=a b;echo' $(shell echo 1) $(echo 2) `echo 3` $$HOME * \"q\" \\ ünï"
    launcher = tmp_path / "launcher"
    launcher.write_text("#!/bin/bash\nprintf '%s' \"$ARGS\"\n")
    launcher.chmod(0o755)
    assert make("ddp-train", f"ARGS={odd}", f"PYTHON={launcher}", environment=no_gpu).stdout == odd


def test_arguments_are_split_at_blanks_and_nothing_in_them_is_expanded() -> None:
    assert gpus.split("--eval.interval 5 '--run-dir=a b;ls' $HOME *") == [
        *("--eval.interval", "5", "--run-dir=a b;ls", "$HOME", "*")
    ]


def test_ddp_train_names_an_open_quote(no_gpu: dict[str, str]) -> None:
    result = make("ddp-train", "ARGS='open", environment=no_gpu)
    assert first_line(result) == (
        'ARGS is "\'open", which cannot be split into words (No closing quotation); close the quotes'
    )


@pytest.mark.parametrize(
    ("gpus", "sentence"),
    [
        ("2", "GPUS is 2, and the GPUs here are 0 to 1; leave out 2"),
        ("0;ls", "GPUS is '0;ls', expected numbers such as 0,1,2"),
        ("", "GPUS is '', expected numbers such as 0,1,2"),
    ],
)
def test_gpu_hot_refuses_gpus_that_are_not_there(fake_smi: FakeSmi, gpus: str, sentence: str) -> None:
    result = make("gpu-hot", f"GPUS={gpus}", environment=fake_smi(gpus=2, processes={}))
    assert (result.returncode, first_line(result)) == (2, sentence)


def test_gpu_hot_says_that_there_is_no_gpu(no_gpu: dict[str, str]) -> None:
    result = make("gpu-hot", environment=no_gpu)
    assert first_line(result) == "gpu-hot needs a GPU and there is none here: nvidia-smi is not on the PATH"
