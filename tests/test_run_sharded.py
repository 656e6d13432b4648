"""Runs of the command line on several ranks: the numbers of one process, on any layout and after any end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sharded_run import CHAINS, STEPS

from nanogpt import perf
from nanogpt.model import GPT2Config
from nanogpt.tracker import read_metrics

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "tests/sharded_run.py"
PROGRESS = re.compile(
    r" *(model|device|data|step|epoch|memory|compute|files|mesh) |--- |$"
    r"|\[W.*The hostname of the client socket cannot be retrieved"  # PyTorch's, when a resolver is slow
)
"""How each line begins that a run has to say: none is a warning of torch."""


def environment(bytecode: Path) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    if clean.pop("PYTHONDONTWRITEBYTECODE", ""):  # or each process compiles all of torch's Python code
        clean["PYTHONPYCACHEPREFIX"] = str(bytecode)
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all chains left."""
    path = tmp_path_factory.mktemp("chains")
    run = subprocess.run(
        [sys.executable, PROGRAM, path],
        env=environment(tmp_path_factory.mktemp("bytecode")),
        cwd=path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    return path


def outcomes(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{name}.json").read_text())


def numbers(run_dir: Path) -> dict[int, dict[str, Any]]:
    """What metrics.jsonl says of each step, but for times."""
    steps: dict[int, dict[str, Any]] = {}
    for record in read_metrics(run_dir / "metrics.jsonl"):
        kept = {
            name: record[name] for name in ("loss", "grad_norm", "val_loss", "batch_hash") if name in record
        }
        steps.setdefault(record["step"], {}).update(kept)
    return steps


def check_same_run(run_dir: Path, alone: Path) -> None:
    """Losses within 1e-5 of those of one process, and the same tokens."""
    got, expected = numbers(run_dir), numbers(alone)
    assert list(got) == list(expected) == list(range(1, STEPS + 1))
    assert expected[1]["loss"] - expected[STEPS]["loss"] > 0.01  # it learns, or an update would not show
    for step, record in expected.items():
        assert got[step].pop("batch_hash") == record.pop("batch_hash")
        assert got[step] == pytest.approx(record, rel=1e-5, abs=0)


@pytest.mark.parametrize("name", ["2", "3", "4", "2 x 2", "2 replicas", "moved"])
def test_a_run_on_any_layout_has_the_losses_and_the_tokens_of_one_process(folder: Path, name: str) -> None:
    """Also the one that moves from 2 processes to 1, 3, 4 and back to 2."""
    assert [outcome["statuses"] for outcome in outcomes(folder, name)] == [
        [0] * start.size for start in CHAINS[name]
    ]
    check_same_run(folder / name, folder / "1")


def test_the_mfu_of_a_run_is_that_of_all_its_devices(folder: Path) -> None:
    (outcome,) = outcomes(folder, "2")
    peak = float(re.findall(r" at (\S+) TFLOP/s", outcome["said"])[0]) * 1e12  # three digits of one's
    flops = perf.flops_per_token(GPT2Config(33, 9, 1, 2, 14), 9)
    records = [record for record in read_metrics(folder / "2/metrics.jsonl") if "mfu" in record]
    assert len(records) == STEPS
    for record in records:
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * flops / (2 * peak), rel=0.01)


def saved_state(run_dir: Path) -> dict[str, Any]:
    """The leaves of the last checkpoint, as Orbax reads them."""
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointer().restore(run_dir / f"checkpoints/{STEPS}/state")


def check_same_bits(run_dir: Path, undisturbed: Path) -> None:
    assert numbers(run_dir) == numbers(undisturbed)
    got, expected = saved_state(run_dir), saved_state(undisturbed)
    assert got.keys() == expected.keys()
    assert [name for name in expected if got[name].tobytes() != expected[name].tobytes()] == []


def test_a_run_that_stops_and_goes_on_with_as_many_ranks_has_the_same_bits(folder: Path) -> None:
    assert [outcome["statuses"] for outcome in outcomes(folder, "again")] == [[0, 0], [0, 0]]
    check_same_bits(folder / "again", folder / "2")


def test_a_terminal_shows_rank_0_each_log_another_rank_and_none_a_warning(folder: Path) -> None:
    (outcome,) = outcomes(folder, "3")
    terminal, sample = outcome["said"].split("step 20  sample:\n")
    assert len(sample.strip()) in (2, 3)  # letters; a new line may be at an end
    logs = [(folder / f"3/logs/rank-{rank}.log").read_text() for rank in (1, 2)]
    assert len(list((folder / "3/logs").iterdir())) == 2
    for said in (terminal, *logs):
        assert [row for row in said.splitlines() if not PROGRESS.match(row)] == []
        assert "\nstep 20/20  loss " in said


HERE = socket.gethostname()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "mesh",
            "--mesh.shard 3 cannot make a mesh of 2 processes; set --mesh.shard and --mesh.replicate to "
            "numbers whose product is 2",
        ),
        ("batch", "a total batch of 81 tokens does not divide into microsteps of 54 (2 devices x 3 seq"),
        (
            "flag",
            f"rank 1 ({HERE}): --optim.warmup-steps is 3 here and 2 on rank 0, expected the same; start",
        ),
        ("code", f"rank 1 ({HERE}): sharded_job.py is "),
        ("data", f"rank 1 ({HERE}): no data folder at nowhere; set --data.path to a folder with train.bin"),
    ],
)
def test_a_mistake_is_one_sentence_of_rank_0_and_ends_all_with_status_2(
    folder: Path, name: str, sentence: str
) -> None:
    check_refused(outcomes(folder, name)[-1], sentence)
    assert not (folder / name / "metrics.jsonl").exists()


def test_ranks_that_do_not_see_the_same_run_directory_are_refused(folder: Path) -> None:
    (outcome,) = outcomes(folder, "apart")
    log = folder / "here/apart/logs/rank-1.log"
    check_refused(
        outcome, f"rank 0 ({HERE}): {log} of rank 1 is not to be seen here, expected that all ranks see"
    )
    assert not (folder / "apart/metrics.jsonl").exists()


def test_a_mistake_of_one_rank_under_torchrun_is_not_tried_again(folder: Path) -> None:
    (outcome,) = outcomes(folder, "one under torchrun")
    check_refused(outcome, "no data folder at nowhere; set --data.path to a folder with train.bin")


def check_refused(outcome: dict[str, Any], sentence: str, *, found_by_each: bool = False) -> None:
    """Where each rank finds the mistake by itself, the sentence is that of the first, which is named."""
    assert set(outcome["statuses"]) == {2}
    errors = [row for row in outcome["said"].splitlines() if not PROGRESS.match(row)]
    assert len(errors) == 1
    error = re.sub(r"^error: rank 1 \([^)]*\): ", "error: ", errors[0]) if found_by_each else errors[0]
    assert error.startswith(f"error: {sentence}")


def test_another_run_in_the_directory_and_another_model_to_start_from_are_refused(folder: Path) -> None:
    first, another_run, another_model = outcomes(folder, "other")
    assert first["statuses"] == [0]
    check_refused(another_run, f"{folder / 'other'} holds a run with --train.seed 1337, now 1; repeat")
    check_refused(
        another_model,
        f"{folder / 'other'} holds a model with --model.n-embd 14, now 16",
        found_by_each=True,
    )
    assert not (folder / "fresh/metrics.jsonl").exists()


def test_a_signal_that_one_rank_alone_gets_stops_all_with_a_checkpoint(folder: Path) -> None:
    (outcome,) = outcomes(folder, "signal")
    assert outcome["statuses"] == [128 + signal.SIGTERM, 128 + signal.SIGINT], outcome["said"]
    assert "stopped at step 2, saved; the same command goes on from there" in outcome["said"]
    assert os.listdir(folder / "signal/checkpoints") == ["2"]


def test_a_rank_that_hangs_is_named_with_its_step(folder: Path) -> None:
    (outcome,) = outcomes(folder, "hang")
    assert outcome["statuses"] == [1, 1]
    (error,) = [row for row in outcome["said"].splitlines() if row.startswith("error: ")]
    assert error.startswith(
        f"error: rank 0 ({HERE}) gave up a collective in step 3 since rank 1 ({HERE}) lives but did not "
        "arrive (last heard of in step 3); look at the log of that rank"
    )


def test_a_killed_rank_and_a_signal_to_torchrun_change_no_bit(folder: Path) -> None:
    """Torchrun starts both again, although --resume is never, and is told to stop; the command goes on."""
    disturbed, rest = outcomes(folder, "disturbed")
    said = disturbed["said"]
    assert disturbed["statuses"] == [128 + signal.SIGTERM], said
    assert f"gave up a collective in step 8 since rank 1 ({HERE}) is gone" in said
    assert said.count("gave up a collective") == 1
    (stopped,) = re.findall(r"stopped at step (\d+), saved; the same command goes on from there", said)
    assert 13 <= int(stopped) < STEPS
    assert f"this run is steps {stopped} to {STEPS}" in rest["said"]
    assert rest["statuses"] == [0, 0]
    check_same_bits(folder / "disturbed", folder / "2")
