"""Where records go: the terminal, JSON lines, Weights & Biases, and the picture of the loss."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from nanogpt import tracker
from nanogpt.errors import UserError
from nanogpt.plot import draw_loss, moving_mean
from nanogpt.tracker import Console, JsonLines, Trackers, read_metrics

Report = dict[str, Any]


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class AsciiPipe(io.StringIO):
    encoding = "ascii"


def training(step: int, **changes: Any) -> dict[str, Any]:
    record = {"step": step, "loss": 6.12345, "learning_rate": 6e-4, "grad_norm": 1.5}
    return record | {"tokens_per_second": 12345.6, "mfu": 0.412, "seconds": 0.5} | changes


def printed_steps(console_output: str) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in console_output.splitlines()]


# The console


def test_a_run_goes_on_when_nobody_reads_it_any_more():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as stream:
        console = Console(2, stream=stream)
        for step in (1, 2):
            console.log(training(step))
        console.message("the end")


def test_a_pipe_gets_one_plain_line_a_step_with_the_time_left():
    stream, clock = io.StringIO(), Clock()
    console = Console(40, stream=stream, clock=clock)
    for step in (1, 2, 3):
        console.log(training(step))
        clock.now += 6
    console.close()
    assert stream.getvalue() == (
        "step  1/40  loss 6.1235  rate 6.00e-04  12,346 tok/s  MFU 41.2%\n"
        "step  2/40  loss 6.1235  rate 6.00e-04  12,346 tok/s  MFU 41.2%  left 3:48\n"
        "step  3/40  loss 6.1235  rate 6.00e-04  12,346 tok/s  MFU 41.2%  left 3:42\n"
    )


def test_a_pipe_shows_every_step_of_a_short_run():
    stream = io.StringIO()
    console = Console(100, stream=stream, clock=Clock())
    for step in range(1, 101):
        console.log(training(step))
    assert printed_steps(stream.getvalue()) == list(range(1, 101))


def test_a_pipe_shows_a_long_run_by_its_first_ten_steps_each_percent_and_the_last():
    stream = io.StringIO()
    console = Console(995, stream=stream, clock=Clock())
    for step in range(1, 996):
        console.log(training(step))
    assert printed_steps(stream.getvalue()) == [*range(1, 11), *range(20, 991, 10), 995]


def test_a_pipe_shows_a_step_after_ten_seconds():
    stream, clock = io.StringIO(), Clock()
    console = Console(100_000, stream=stream, clock=clock)
    for step in range(1, 41):
        console.log(training(step))
        clock.now += 1
    assert printed_steps(stream.getvalue()) == [*range(1, 11), 20, 30, 40]


def test_a_terminal_rewrites_one_line():
    stream, clock = Terminal(), Clock()
    console = Console(40, stream=stream, clock=clock)
    console.log(training(1))
    clock.now += 6
    console.log(training(2))
    console.close()
    first, second = stream.getvalue().split(tracker.CLEAR_LINE)[1:]
    assert first == " 1/40  loss 6.1235  rate 6.00e-04  12,346 tok/s  MFU 41.2%"
    assert second == " 2/40  loss 6.1235  rate 6.00e-04  12,346 tok/s  MFU 41.2%  left 3:48\n"


def test_the_live_line_is_rewritten_at_most_ten_times_a_second_and_at_the_end():
    stream, clock = Terminal(), Clock()
    console = Console(100, stream=stream, clock=clock)
    for step in range(1, 101):
        console.log(training(step))
        clock.now += 0.01
    shown = [int(part.split("/")[0]) for part in stream.getvalue().split(tracker.CLEAR_LINE)[1:]]
    assert len(shown) <= 12
    assert shown[-1] == 100


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (20, " 1/40  loss 6.1235"),
        (19, " 1/40  loss 6.1235"),
        (18, " 1/40"),
        (40, " 1/40  loss 6.1235  rate 6.00e-04"),
        (5, ""),
    ],
)
def test_the_live_line_is_cut_to_the_terminal_but_no_number_is(
    monkeypatch: pytest.MonkeyPatch, columns: int, shown: str
):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    Console(40, stream=stream).log(training(1))
    assert stream.getvalue() == f"{tracker.CLEAR_LINE}{shown}"


def test_a_line_of_a_full_run_fits_eighty_columns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream, clock = Terminal(), Clock()
    console = Console(17234, stream=stream, clock=clock)
    console.log(training(1, tokens_per_second=612345))
    clock.now += 2
    console.log(training(2, tokens_per_second=612345))
    assert stream.getvalue().endswith("left 9:34:24")


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    Console(40, stream=stream).log(training(1))
    assert stream.getvalue().endswith("MFU 41.2%\n")


def test_messages_stay_above_the_live_line():
    stream = Terminal()
    console = Console(40, stream=stream)
    console.log(training(1))
    live = stream.getvalue()
    console.message("micro-batch halved")
    assert (
        stream.getvalue()
        == f"{live}{tracker.CLEAR_LINE}micro-batch halved\n{live.removeprefix(tracker.CLEAR_LINE)}"
    )


def test_evaluations_and_samples_are_lines_of_their_own():
    stream = io.StringIO()
    console = Console(40, stream=stream)
    console.log({"step": 10, "val_loss": 5.43219})
    console.log({"step": 10, "sample": "To be\nor not"})
    assert stream.getvalue() == "step 10  val loss 5.4322\nstep 10  sample:\n  To be\n  or not\n"


def test_a_sample_cannot_control_the_terminal_or_break_an_ascii_pipe():
    stream = AsciiPipe()
    Console(40, stream=stream).message("a\x1b[2Jb\rc é\tz")
    assert stream.getvalue() == "a?[2Jb?c ?\tz\n"


def test_a_loss_that_is_no_number_is_shown():
    stream = io.StringIO()
    Console(40, stream=stream).log(training(1, loss=math.nan))
    assert "loss nan" in stream.getvalue()


# JSON lines


def test_numbers_come_back_exactly(tmp_path: Path):
    lines = JsonLines(tmp_path / "metrics.jsonl", from_step=0)
    record = training(1, loss=0.1 + 0.2)
    lines.log(record)
    assert read_metrics(tmp_path / "metrics.jsonl") == [record]  # before close: a kill would lose nothing
    lines.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_become_null(tmp_path: Path, value: float):
    lines = JsonLines(tmp_path / "metrics.jsonl", from_step=0)
    lines.log({"step": 1, "loss": value})
    lines.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'


def write_steps(path: Path, steps: range) -> None:
    path.write_text("".join(f'{{"step": {step}, "loss": {step}.5}}\n' for step in steps))


def steps_in(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_a_resumed_run_drops_the_steps_that_it_will_do_again(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    lines = JsonLines(path, from_step=4)
    lines.log({"step": 5, "loss": 5.0})
    lines.close()
    assert steps_in(path) == [1, 2, 3, 4, 5]


def test_a_run_from_step_zero_starts_the_file_anew(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(0, 8))
    JsonLines(path, from_step=0).close()
    assert steps_in(path) == []


def test_a_last_line_that_a_crash_cut_is_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    path.write_bytes(path.read_bytes()[:-9])
    lines = JsonLines(path, from_step=3)
    lines.log({"step": 3, "loss": 3.0})
    lines.close()
    assert steps_in(path) == [1, 2, 3]


def test_a_crash_while_resuming_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    before = path.read_bytes()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        JsonLines(path, from_step=4)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "nonsense",
            "line 2 is not JSON (Expecting value: line 1 column 1 (char 0)); correct or delete the line",
        ),
        ('{"loss": 1}', 'line 2 has no "step"; correct or delete the line'),
        ("[1]", 'line 2 has no "step"; correct or delete the line'),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError) as caught:
        read_metrics(path)
    assert str(caught.value) == f"{path} {message}"


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        JsonLines(tmp_path / "no such folder" / "metrics.jsonl", from_step=0)
    path = tmp_path / "no such folder" / "metrics.jsonl"
    assert str(caught.value) == f"cannot write {path}: No such file or directory; choose another --run-dir"


def test_trackers_hand_each_record_to_all(tmp_path: Path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    both = Trackers(*(JsonLines(path, from_step=0) for path in paths))
    both.log({"step": 1, "val_loss": 2.0})
    both.close()
    assert [json.loads(path.read_text()) for path in paths] == [{"step": 1, "val_loss": 2.0}] * 2


# Weights & Biases: one process goes through all of it, as wandb is slow to start and keeps its settings

WANDB_SCENARIO = """
import json, os, signal, subprocess, sys
from pathlib import Path
from nanogpt import tracker

folder, report = Path(sys.argv[1]), {}

def follow(name, mode, from_step=0, directory=folder, break_it=None):
    said = report[name] = []
    config = {"model": {"n_layer": 2}}
    settings = dict(config=config, project="experiments-with-wandb")
    run = tracker.WandB(mode, directory=directory, from_step=from_step, say=said.append, **settings)
    run.log({"step": from_step + 1, "loss": 1.5, "mfu": float("nan")})
    if break_it:
        break_it()
    for step in range(from_step + 1, from_step + 11):
        run.log({"step": step, "val_loss": 1.25})
    run.close()

follow("disabled", "disabled")
os.environ["WANDB_MODE"] = "disabled"
follow("disabled by its variable", None)
del os.environ["WANDB_MODE"]
report["imported by disabled"] = "wandb" in sys.modules
import wandb

init, report["starts"] = wandb.init, []

def noted(**arguments):
    report["starts"].append([arguments.get(name) for name in ("mode", "resume", "id")])
    return init(**arguments)

wandb.init = noted
os.environ["WANDB_MODE"] = ""  # as if it were not set
follow("offline", None)
report["id"] = (folder / "wandb_id.txt").read_text().strip()
follow("resumed", None, from_step=3)
follow("not logged in", "online")
(folder / "file").write_text("")
follow("no place", "offline", directory=folder / "file")

os.environ["NETRC"] = str(folder / "netrc")
for machine in ("api.wandb.ai", "api.wandb.example"):
    (folder / "netrc").write_text(f"machine {machine} login user password {'a' * 40}")
    report[f"login at {machine}"] = tracker.is_logged_in()

os.environ["WANDB_API_KEY"] = "short"
follow("bad key", None)
wandb.teardown()
tracker.WANDB_START_TIMEOUT_S = 1.0
os.environ |= {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}  # nobody listens there
follow("no network", None, from_step=3)
wandb.teardown()
os.environ["WANDB_MODE"] = "bogus"
follow("bad mode", None)
del os.environ["WANDB_MODE"]

def kill_server():
    children = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True)
    for child in children.stdout.split():
        os.kill(int(child), signal.SIGKILL)

follow("killed", "offline", break_it=kill_server)
print(json.dumps(report), flush=True)
os._exit(0)  # wandb's exit handler would complain of its dead server
"""


@pytest.fixture(scope="module")
def wandb(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What each of the scenario's runs said; its process prints nothing else and sees no login."""
    folder = tmp_path_factory.mktemp("wandb")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", WANDB_SCENARIO, str(folder)],
        env=inherited | {"HOME": str(folder), "NETRC": str(folder / "none")},
        cwd=Path(tracker.__file__).parents[1],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout) | {"folder": folder}


def test_wandb_disabled_is_silent_and_not_imported(wandb: Report):
    assert wandb["disabled"] == wandb["disabled by its variable"] == []
    assert not wandb["imported by disabled"]


def test_wandb_without_a_login_keeps_the_run_offline(wandb: Report):
    (said,) = wandb["offline"]
    assert said.startswith(f"Weights & Biases: offline; `wandb sync {wandb['folder']}/wandb/offline-run-")
    assert said.endswith(f"-{wandb['id']}` uploads it")
    (written, *_) = wandb["folder"].glob(f"wandb/offline-run-*/run-{wandb['id']}.wandb")
    assert b"experiments-with-wandb" in written.read_bytes()


def test_a_run_that_resumes_keeps_its_id_at_wandb_and_one_from_step_zero_does_not(wandb: Report):
    assert f"-{wandb['id']}" in wandb["resumed"][0]
    assert f"-{wandb['id']}" not in wandb["not logged in"][0]


def test_a_run_that_resumes_online_goes_on_there_under_its_id(wandb: Report):
    """Without "allow" the server starts a run of that id anew."""
    afresh, resumed = (start for start in wandb["starts"] if start[0] == "online")
    assert afresh == ["online", "allow", None]
    assert resumed[:2] == ["online", "allow"]
    assert resumed[2]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("not logged in", "not logged in: run `wandb login`"),
        ("bad key", "online failed: WANDB_API_KEY invalid: API key must have 40+ characters, has 5."),
        ("no network", "online failed: "),
    ],
)
def test_wandb_that_cannot_go_online_says_why_and_goes_offline(wandb: Report, name: str, why: str):
    (said,) = wandb[name]
    assert said.startswith(f"Weights & Biases: offline ({why}")
    assert said.endswith("` uploads it")


@pytest.mark.parametrize("name", ["no place", "bad mode", "killed"])
def test_wandb_that_fails_says_so_in_one_line_and_the_run_goes_on(wandb: Report, name: str):
    said = wandb[name][-1]
    assert said.startswith("Weights & Biases is off from here on: ")
    assert "\n" not in said
    assert len(wandb[name]) == (2 if name == "killed" else 1)


def test_a_netrc_entry_for_the_server_is_a_login(wandb: Report):
    assert wandb["login at api.wandb.ai"]
    assert not wandb["login at api.wandb.example"]


# The picture


def draw(tmp_path: Path, records: list[dict[str, Any]], title: str = "a run") -> bytes:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    draw_loss(path, tmp_path / "loss.png", title=title)
    return (tmp_path / "loss.png").read_bytes()


@pytest.mark.parametrize("steps", [0, 1, 40, 500])
def test_the_picture_of_a_run_of_any_length_is_a_png(tmp_path: Path, steps: int):
    records = [training(step, loss=None if step == 3 else 9 - step / 100) for step in range(1, steps + 1)]
    image = draw(tmp_path, records + [{"step": step, "val_loss": 8.5} for step in range(0, steps, 10)])
    assert image.startswith(b"\x89PNG")
    assert not (tmp_path / "loss.png.part").exists()


@pytest.mark.parametrize("loss", [1e308, 3e38, math.inf, math.nan])
@pytest.mark.filterwarnings("error")
def test_a_loss_beyond_all_numbers_of_a_run_spoils_no_picture(tmp_path: Path, loss: float):
    assert draw(tmp_path, [training(step, loss=loss) for step in range(1, 4)]).startswith(b"\x89PNG")


@pytest.mark.parametrize("title", ["a$_$b", "\u76ee"])
def test_any_name_of_a_directory_is_a_title(tmp_path: Path, title: str):
    assert draw(tmp_path, [training(1, loss=9.0)], title).startswith(b"\x89PNG")


def test_a_single_step_shows_in_the_picture(tmp_path: Path):
    draw(tmp_path, [training(1, loss=9.0)])
    height, width, _ = (pixels := imread(tmp_path / "loss.png")).shape
    middle = pixels[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3]  # without the legend
    assert (middle[..., 2] > middle[..., 0] + 0.3).any()  # blue


def test_validation_shows_in_the_picture(tmp_path: Path):
    records = [training(step) for step in range(1, 9)]
    assert draw(tmp_path, records) != draw(tmp_path, [*records, {"step": 8, "val_loss": 5.0}])


def test_a_moving_mean_is_that_of_the_neighbours_there_are():
    means = moving_mean(np.array([1.0, 2.0, 6.0, 3.0, 8.0]), reach=1)
    np.testing.assert_allclose(means, [1.5, 3.0, 11 / 3, 17 / 3, 5.5])


def test_a_line_that_a_nearly_full_disk_cuts_is_written_whole(tmp_path):
    class Nearly:
        written = b""

        def write(self, line: bytes) -> int:
            self.written += line[:7]
            return len(line[:7])

        def close(self) -> None: ...

    lines = JsonLines(tmp_path / "metrics.jsonl", from_step=0)
    lines.close()
    lines._file = disk = Nearly()
    for step in (1, 2):
        lines.log(training(step))
    assert [json.loads(line)["step"] for line in disk.written.splitlines()] == [1, 2]
