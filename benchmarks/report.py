"""`python -m benchmarks.report`: measures this machine, writes benchmarks/reports/NAME.md, .html and .json.

Every number comes from one of `COMMANDS`, which run one after the other and are named beside their results.
One that fails is named in its result's place, and the exit status is then 1. `--render NAME.json` writes the
pages again from what was measured.
"""

import html
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import data, limit, parts, peers, predict, prepare, sharding, throughput
from benchmarks.measure import (
    choose_device,
    ended_with_us,
    facts,
    finish,
    flags_set,
    one_line_errors,
    read_json,
    require_some,
    say,
    whole_results,
    write_whole,
)
from benchmarks.pictures import has_rows, pictures_of
from nanogpt.command import parse
from nanogpt.errors import UserError
from nanogpt.units import format_bytes

REPORTS = Path(__file__).parent / "reports"
COMMAND_LIMIT_S = 3 * 3600
MISTAKE = 2
"""The exit status of a program that refuses its arguments."""
TABLES = {
    "throughput": throughput.table_of,
    "peers": peers.table_of,
    "data": data.table_of,
    "limit": limit.table_of,
    "parts": parts.table_of,
    "prepare": prepare.table_of,
    "sharding": sharding.table_of,
    "predict": predict.table_of,
}
TITLES = {
    "throughput": "The training step",
    "peers": "Beside others, turn by turn",
    "limit": "How near to the floor",
    "data": "The loader",
    "prepare": "Text to token files",
    "parts": "The parts around the step",
    "sharding": "Several processes on this machine's CPU",
    "predict": "Published and predicted GPUs",
}
COMMANDS = {
    "cpu": {
        "throughput": "--batch-size 1 2 4 --block-size 512 1024 --compile True False --steps 5 --starts",
        "peers": "--batch-size 4 --block-size 1024 --turns 10",
        "limit": "--batch-size 4 --block-size 1024",
        "data": "",
        "prepare": "",
        "parts": "",
        "sharding": "",
        "predict": "",
    },
    "cpu without fast bfloat16": {  # where a token takes ten times as long
        "throughput": "--batch-size 1 2 --block-size 512 --compile True False --steps 3 --starts",
        "peers": "--batch-size 4 --block-size 1024 --turns 5",
        "limit": "--batch-size 4 --block-size 1024 --steps 2",
        "data": "",
        "prepare": "--workers 2 --rounds 2",
        "parts": "--repeats 3 --new-tokens 16",
        "sharding": "",
        "predict": "",
    },
    "cuda": {
        "throughput": "--batch-size {batches} --attention auto flash --steps 20 --starts",
        "peers": "--batch-size {batch} --block-size 1024 --turns 10",
        "limit": "--batch-size {batch} --block-size 1024",
        "data": "",
        "prepare": "",
        "parts": "--tokens {tokens}",
        "sharding": "",
        "predict": "--measured {json}",
    },
}
"""Arguments of each benchmark by device; --device is put before them. {json} is the report so far, {batch}
what `batch_for` returns, {tokens} its tokens, and {batches} this batch, half and a quarter of it."""
LARGEST_BATCH, SMALLEST_BATCH = 64, 4
BYTES_A_SEQUENCE = 1.25e9
"""GPU memory for a sequence of 1,024 tokens: more than twice what the largest peer's step takes in the report
of an H100, since the other peers' states are in memory as well."""
SAME_MACHINE = ("device", "hardware", "cores", "threads", "bf16_fast", "torch")
"""Facts that all measurements in a report have in common."""
ON_A_DEVICE = ("throughput", "peers", "limit", "parts")
"""Benchmarks that have --device; the others run on the CPU."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Measure everything and write a report."""

    name: str | None = None
    """Name of the files; None makes one from the hardware, with -bf16 where a CPU multiplies that fast, and
    -quick where --quick is set."""
    out: Path = REPORTS
    """Folder to write to."""
    only: tuple[str, ...] = tuple(TITLES)
    """Benchmarks to run; the results of the others stay as they are in an older report of this name."""
    arguments: tuple[str, ...] = ()
    """Benchmarks with other arguments than their usual ones: --arguments "peers --batch-size 1"."""
    render: Path | None = None
    """Only write the pages again, from this JSON and beside it."""
    device: str | None = None
    """cpu or cuda; None takes the GPU if there is one."""
    quick: bool = False
    """Small models and files, to see that everything works."""

    def __post_init__(self) -> None:
        require_some(only=self.only)
        for option, names in {"only": self.only, "arguments": self.own_arguments}.items():
            for name in names:
                if name not in TITLES:
                    known = ", ".join(TITLES)
                    raise UserError(
                        f"no benchmark is called {name!r}, expected some of {known}; set --{option}"
                    )
        for text in self.arguments:
            try:
                shlex.split(text)
            except ValueError as error:
                raise UserError(
                    f"{text!r} is not one command ({error}), expected quotes in pairs; set --arguments"
                ) from error
        if self.render is not None and (others := flags_set(self, *(asdict(self).keys() - {"render"}))):
            raise UserError(
                f"--render with {others}, expected it alone, since it writes the pages of its JSON again, "
                f"beside it; leave the others out, or render a copy"
            )

    @property
    def own_arguments(self) -> dict[str, str]:
        """`arguments` by benchmark."""
        return {name: rest for name, _, rest in (text.partition(" ") for text in self.arguments)}


def run_benchmark(name: str, arguments: str) -> dict[str, Any]:
    """The JSON of a benchmark, run as a user would run it; with an "error" if it failed."""
    say(f"python -m benchmarks.{name} {arguments}")
    command = [sys.executable, "-m", f"benchmarks.{name}", *shlex.split(arguments)]
    try:
        with ended_with_us(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as process:
            printed, _ = process.communicate(timeout=COMMAND_LIMIT_S)
    except subprocess.TimeoutExpired:
        error = f"python -m benchmarks.{name} {arguments} took more than {COMMAND_LIMIT_S} s"
        return {"benchmark": name, "error": error}
    if process.returncode:
        error = f"python -m benchmarks.{name} {arguments} ended with status {process.returncode}"
        return {"benchmark": name, "error": error, "status": process.returncode}
    return json.loads(printed.strip().splitlines()[-1])


def read_report(path: Path) -> dict[str, Any]:
    """The JSON of a report. Raises UserError for any other, which its pages would lie beside or replace."""
    found = read_json(path)
    if found.get("benchmark") != "report":
        raise UserError(
            f"{path} is a result of {found['benchmark']}, expected that of "
            f"benchmarks.report; set another --render or --name"
        )
    if not isinstance(found.get("facts"), dict):
        raise UserError(f"{path} does not say where it was measured; set another --render or --name")
    return found


def measure(config: ReportConfig, about: dict[str, Any], path: Path) -> dict[str, Any]:
    """The report's JSON: results by benchmark, on top of those that an older report has.

    It is written to `path` after each benchmark, for later ones that read it and for a user who stops early.
    Predictions measure nothing: made again elsewhere, alone, they leave the report that of the machine it was
    measured on. Raises UserError if another machine's results would stay beside this one's, or if a benchmark
    refuses the user's arguments; results from before stay.
    """
    old = read_report(path) if path.exists() else {}
    if config.only == ("predict",):
        about = old.get("facts", about)
    device = about["device"]
    kind = "cuda" if device != "cpu" else "cpu" if about["bf16_fast"] else "cpu without fast bfloat16"
    usual = dict.fromkeys(TITLES, "--quick") if config.quick else COMMANDS[kind]
    given, batch = usual | config.own_arguments, batch_for(about["memory_bytes"])
    filling = {
        "{json}": shlex.quote(os.path.relpath(path)),
        "{batch}": str(batch),
        "{tokens}": str(1024 * batch),
    }
    filling["{batches}"] = f"{batch} {batch // 2} {batch // 4}"
    results = results_of_the_same_machine(old, about, config, path)
    report = {"benchmark": "report", "facts": about, "results": results}
    check_folder(path.parent)
    for name in dict.fromkeys(config.only):  # each once
        arguments = given[name]
        for word, text in filling.items():
            arguments = arguments.replace(word, text)
        if name in ON_A_DEVICE:
            arguments = f"--device {device} {arguments}".strip()
        found = run_benchmark(name, arguments)
        if name in config.own_arguments and found.get("status") == MISTAKE:
            raise UserError(
                f"{found['error']} for the reason above, expected arguments that it takes; set --arguments, "
                f"and --only to what is still to be measured"
            )
        results[name] = found
        write_whole(path, json.dumps(report))
    return report


def check_folder(folder: Path) -> None:
    """Makes the folder if need be. Raises UserError if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}), expected a folder of yours with room; set another "
            f"--out"
        ) from error


def batch_for(memory_bytes: int) -> int:
    """Sequences in a microstep for which every contender has room on a GPU with this much memory."""
    batch = LARGEST_BATCH
    while batch > SMALLEST_BATCH and batch * BYTES_A_SEQUENCE > memory_bytes:
        batch //= 2
    return batch


def results_of_the_same_machine(
    old: dict[str, Any], about: dict[str, Any], config: ReportConfig, path: Path
) -> dict[str, Any]:
    """The results in an older report; none if it is of another machine, as all of them are measured anew.

    Raises UserError if some of another machine's results would not be measured anew.
    """
    results, facts_then = dict(old.get("results", {})), old.get("facts", about)
    differing = [key for key in SAME_MACHINE if facts_then.get(key) != about.get(key)]
    if not differing:
        return results
    if kept := results.keys() - set(config.only):
        raise UserError(
            f"{path} has {', '.join(f'{key} {facts_then.get(key)}' for key in differing)}, expected "
            f"{', '.join(f'{key} {about.get(key)}' for key in differing)} as here, since its "
            f"{', '.join(sorted(kept))} would stay; set another --name, or leave --only out"
        )
    return {}


def name_of(about: dict[str, Any], *, quick: bool = False) -> str:
    """A file name from the hardware: "cpu-2-cores-amd-epyc"."""
    is_cpu = about["device"] == "cpu"
    kind = f"cpu-{about['cores']}-cores" if is_cpu else "gpu"
    bf16 = "bf16" if is_cpu and about["bf16_fast"] else ""
    words = f"{kind} {about['hardware']} {bf16} {'quick' if quick else ''}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def sections_of(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(benchmark, what it was measured with, table) of each result."""
    sections = []
    for name in TITLES:
        result = report["results"].get(name)
        if result is None:
            continue
        if "error" in result:
            sections.append((name, "", result["error"]))
            continue
        about = result["facts"]
        measured = (
            f"`{about['command']}` · {about['date'][:10]} · commit {short(about['commit'])} · "
            f"load average {about['load_average']:.1f} on {about['cores']} cores"
        )
        sections.append((name, measured, TABLES[name](result)))
    return sections


def short(commit: str | None) -> str:
    """A commit in 12 digits, with the "+" of a tree that had changes."""
    return f"{commit[:12]}{'+' if commit.endswith('+') else ''}" if commit else "unknown"


def hardware_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What the report was measured on: (name, text) of each row."""
    about = report["facts"]
    memory = format_bytes(about["memory_bytes"])
    is_gpu = about["device"] == "cuda"
    slow = "no" if is_gpu else "no: everything here is in float32"  # such a GPU may have trained in float16
    versions = f", driver {about['driver'] or 'unknown'}, CUDA {about['cuda']}" if is_gpu else ""
    return [
        ("hardware", f"{about['hardware']}, {about['cores']} CPU cores, {memory}"),
        ("device", about["device"] + versions),
        ("fast bfloat16", "yes" if about["bf16_fast"] else slow),
        ("versions", f"torch {about['torch']}, Python {about['python']}, {about['system']}"),
        ("commit", str(about["commit"])),
        ("date", about["date"]),
    ]


HONESTY = (
    "Rows marked PUBLISHED or CLAIMED are other people's figures and PREDICTED ones come from a model, with "
    "its error on what could be measured; everything else was measured here by the command above it. Times "
    "are medians with their range: other programs' load makes absolute figures worse and leaves ratios of "
    "turns about right. The load named with each command is that at its end, its own threads included."
)


def markdown_of(report: dict[str, Any]) -> str:
    """The report as Markdown; only the HTML page has the pictures."""
    lines = ["# GPT-2 training speed on " + report["facts"]["hardware"], "", HONESTY, ""]
    lines += ["| | |", "|---|---|"]
    lines += [*(f"| {name} | {text} |" for name, text in hardware_rows(report)), ""]
    for name, measured, text in sections_of(report):
        lines += [f"## {TITLES[name]}", "", measured, "", "```", text, "```", ""]
    return "\n".join(lines)


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
pre { overflow-x: auto; background: var(--soft); padding: .8rem 1rem; border-radius: 6px; font-size: 12px; }
code { background: var(--soft); padding: .1em .3em; border-radius: 4px; overflow-wrap: anywhere; }
td { overflow-wrap: anywhere; }
th { text-align: left; padding-right: 1.5rem; font-weight: 600; vertical-align: top; }
figure { margin: 1.5rem 0; background: #fff; border: 1px solid var(--line); padding: .5rem; }
figure { overflow-x: auto; } figcaption { color: #333; padding: 0 .5rem .3rem; }
figure svg { width: 100%; min-width: 36rem; max-width: 60rem; height: auto; display: block; margin: auto; }
.measured { color: GrayText; font-size: 14px; }
"""


def page_of(report: dict[str, Any]) -> str:
    """The report as one self-contained HTML page."""
    title = html.escape("GPT-2 training speed on " + report["facts"]["hardware"])
    facts_rows = hardware_rows(report)
    rows = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in facts_rows)
    pictures = pictures_of(report["results"])
    body = []
    for name, measured, text in sections_of(report):
        command = re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(measured))
        figures = "".join(
            f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
            for caption, svg in pictures.get(name, [])
        )
        heading = f'<h2>{TITLES[name]}</h2><p class="measured">{command}</p>'
        body.append(f"{heading}{figures}<pre>{html.escape(text)}</pre>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{title}</h1><p>{html.escape(HONESTY)}</p><table>{rows}</table>{''.join(body)}</body></html>\n"
    )


def write(report: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """The three files of a report."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"json": json.dumps(report, indent=1) + "\n", "md": markdown_of(report), "html": page_of(report)}
    paths = []
    for suffix, text in texts.items():
        paths.append(folder / f"{name}.{suffix}")
        write_whole(paths[-1], text)
    return paths


def rendered(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """The report at `path`, and its three files, written again. Raises UserError if it is damaged."""
    report = read_report(path)
    with whole_results(path):
        return report, write(report, path.parent, path.stem)


def failures_of(report: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """Those of the benchmarks `names` that failed, or none of whose rows could be measured."""
    results = {name: report["results"][name] for name in names}
    return [name for name, result in results.items() if "error" in result or not has_rows(result)]


def main() -> None:
    with one_line_errors():
        config = parse(ReportConfig, default=ReportConfig())
        if config.render is not None:
            report, paths = rendered(config.render)
        else:
            about, folder = facts(choose_device(config.device)), config.out
            name = config.name or name_of(about, quick=config.quick)
            report = measure(config, about, folder / f"{name}.json")
            paths = write(report, folder, name)
        for path in paths:
            print(f"wrote {path}")
        finish(report)
        if config.render is None and (failed := failures_of(report, config.only)):
            sys.exit(f"error: the report has no result of {', '.join(failed)}, for the reasons above")


if __name__ == "__main__":
    main()
