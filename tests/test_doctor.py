"""The doctor: what it makes of the facts, and of this machine."""

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

import nanogpt
from nanogpt import doctor
from nanogpt.doctor import Facts, Finding, Gpu, findings
from nanogpt.meeting import ALONE, World
from nanogpt.processes import Team

GB = 10**9
H100 = Gpu(0, "NVIDIA H100 80GB HBM3", "9.0", "bfloat16", 80 * GB, 79 * GB)
T4 = Gpu(0, "Tesla T4", "7.5", "float16", 16 * GB, 16 * GB)
P100 = Gpu(0, "Tesla P100", "6.0", "float32", 16 * GB, 16 * GB)
VERSIONS = {"nanogpt": "0.1.0", "torch": "2.13.0", "NCCL": "2.27.5"}
HERE = Facts(0, "a", 1, VERSIONS, [], "EPYC", True, 64 * GB, 500 * GB, 1000.0)


def ranks(count: int, gpu: Gpu = H100) -> list[Facts]:
    """Two ranks a machine, each with a GPU like the others."""
    return [
        HERE._replace(rank=rank, host="ab"[rank // 2], local_size=2, gpus=[gpu._replace(index=rank % 2)])
        for rank in range(count)
    ]


def worrying(every: list[Facts]) -> list[Finding]:
    return [finding for finding in findings(every) if finding.level != "ok"]


def test_equal_machines_are_well() -> None:
    assert worrying(ranks(4)) == []
    assert Finding("ok", "GPUs", "4 x NVIDIA H100 80GB HBM3") in findings(ranks(4))
    assert Finding("ok", "bfloat16", "in hardware, compute capability 9.0") in findings(ranks(4))


def test_a_machine_without_gpus_is_well() -> None:
    assert worrying([HERE]) == []


def test_the_odd_gpu_is_named() -> None:
    every = ranks(4)
    every[3] = every[3]._replace(gpus=[H100._replace(index=1, name="NVIDIA A100-SXM4-80GB")])
    text = (
        "GPU 1 of rank 3 (b) is a NVIDIA A100-SXM4-80GB, the others are NVIDIA H100 80GB HBM3: every step "
        "waits for the slowest"
    )
    assert worrying(every) == [Finding("warning", "GPUs", text)]


def test_a_rank_without_a_gpu_among_others_is_an_error() -> None:
    every = ranks(4)
    every[2] = every[2]._replace(gpus=[])
    text = "rank 2 (b) has no GPU, others do; set --nproc-per-node to the GPUs there"
    assert worrying(every) == [Finding("error", "GPUs", text)]


def test_a_gpu_that_somebody_else_uses_is_named() -> None:
    every = ranks(2)
    every[1] = every[1]._replace(gpus=[H100._replace(index=1, available_bytes=40 * GB)])
    text = "40.0 GB of GPU 1 of rank 1 (a) are taken; see who computes there with make gpu-status"
    assert worrying(every) == [Finding("warning", "GPUs", text)]


@pytest.mark.parametrize("gpu", [T4, P100], ids=["T4", "P100"])
def test_a_gpu_that_is_slow_at_bfloat16_is_named_with_what_runs_take_there(gpu: Gpu) -> None:
    about = f"compute capability {gpu.capability}; runs there take {gpu.precision}"
    text = f"slow on GPU 0 of rank 0 (a) ({about})"
    assert worrying(ranks(1, gpu)) == [Finding("warning", "bfloat16", text)]


def test_a_program_on_the_path_that_is_not_installed_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata.Distribution, "discover", lambda **_: [])
    assert doctor.versions()["nanogpt"] == nanogpt.__version__


def test_another_version_on_one_rank_is_an_error() -> None:
    every = ranks(4)
    every[3] = every[3]._replace(versions=VERSIONS | {"NCCL": "2.21.5"})
    text = "NCCL is 2.21.5 on rank 3 (b) and 2.27.5 on rank 0"
    assert worrying(every) == [Finding("error", "versions", text)]


def test_a_clock_that_is_off_is_named_with_its_skew() -> None:
    every = ranks(4)
    every[1] = every[1]._replace(clock_s=1000.4)
    every[2] = every[2]._replace(clock_s=993.5)
    text = "rank 2 (b) is -6.5 s from rank 0; let its machine take the time from the network"
    assert worrying(every) == [Finding("warning", "clocks", text)]


def test_little_memory_counts_for_all_processes_of_a_machine() -> None:
    every = ranks(2)
    every[1] = every[1]._replace(memory_bytes=3 * GB)
    text = "3.0 GB free on rank 1 (a), expected 4.0 GB for its processes"
    assert worrying(every) == [Finding("warning", "memory", text)]


def test_a_full_disk_is_a_warning_and_one_that_cannot_be_written_an_error() -> None:
    full, locked = (HERE._replace(disk_bytes=room) for room in (GB, None))
    text = "1.0 GB free on rank 0 (a), expected 20.0 GB for checkpoints"
    assert worrying([full]) == [Finding("warning", "disk", text)]
    text = "the run directory cannot be written on rank 0 (a); choose another --run-dir"
    assert worrying([locked]) == [Finding("error", "disk", text)]


def test_the_table_is_aligned_and_counts() -> None:
    found = [Finding("ok", "GPUs", "none"), Finding("warning", "bfloat16", "slow")]
    assert doctor.table(found).splitlines() == [
        "ok       GPUs      none",
        "warning  bfloat16  slow",
        "1 ok, 1 warning, 0 error",
    ]


def test_no_compiler_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    text = "no gcc or clang on the PATH; runs are eager, and slower"
    assert doctor.compiler_findings("cuda") == [Finding("warning", "compiler", text)]
    (tmp_path / "clang").touch(mode=0o755)
    assert doctor.compiler_findings("cuda") == [Finding("ok", "compiler", str(tmp_path / "clang"))]


def test_a_missing_data_folder_is_an_error_and_a_bundled_one_is_not() -> None:
    (finding,) = doctor.data_findings("/nowhere")
    assert finding.level == "error"
    assert finding.text.startswith("no data folder at /nowhere; set --data.path")
    assert doctor.data_findings("shakespeare") == [Finding("ok", "data", "shakespeare, bundled")]


def test_what_another_rank_found_by_itself_is_said_with_its_place() -> None:
    compiler, data = Finding("ok", "compiler", "/usr/bin/g++"), Finding("ok", "data", "tokens")
    missing = Finding("error", "data", "no data folder at tokens")
    texts = [json.dumps(found) for found in ([compiler, data], [compiler, data], [compiler, missing])]
    more = Finding("error", "data", "rank 2 (b): no data folder at tokens")
    assert doctor.of_all_ranks(ranks(3), texts) == [compiler, data, more]


def test_the_mode_of_wandb_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert doctor.wandb_findings() == [Finding("ok", "W&B", "WANDB_MODE is disabled")]


def test_a_wandb_that_cannot_be_imported_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    (finding,) = doctor.wandb_findings()
    assert finding.level == "warning"
    assert finding.text.startswith("cannot be imported (import of wandb halted; ")


def test_what_is_well_is_not_in_the_preflight_of_a_run(tmp_path: Path) -> None:
    found = doctor.preflight(Team(World(0, 1, 0, 1)), "cpu", tmp_path / "a run")
    assert {finding.level for finding in found} <= {"warning", "error"}
    assert not (tmp_path / "a run").exists()


@pytest.mark.parametrize(
    ("levels", "status"), [([], 0), (["ok"], 0), (["warning", "ok"], 1), (["error", "ok", "warning"], 2)]
)
def test_the_exit_status_is_the_worst_finding(levels: list[doctor.Level], status: int) -> None:
    assert doctor.status_of([Finding(level, "a", "b") for level in levels]) == status


def test_the_program_prints_its_table_and_exits_with_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", ["doctor", "--data-path", "/nowhere"])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    assert stop.value.code == 2
    subjects = [line.split()[1] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert subjects == ["versions", "GPUs", "bfloat16", "memory", "disk", "compiler", "W&B", "data"]


def test_a_run_directory_whose_name_no_file_can_have_is_looked_at_too(tmp_path: Path) -> None:
    seen = doctor.facts(Team(ALONE), "cpu", tmp_path / ("x" * 300))
    assert seen.disk_bytes
