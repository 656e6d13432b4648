"""`python -m benchmarks.compare A.json B.json`: what got faster or slower beyond noise, from A to B.

A and B are results of the same benchmark, or two reports. A difference counts if the quartiles of the two do
not overlap and the medians differ by more than 2 %. With fewer than ten measurements on a side, quartiles lie
apart by chance (for five against five of the same thing, in a fifth of cases), so the ranges must not overlap
instead. With fewer than five, ranges lie apart by chance too, so the medians must differ by more than 10 %. A
memory peak is a single measurement, and a difference of up to 5 MB does not count.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.measure import finish, one_line_errors, read_json, say, spread, table, whole_results
from nanogpt.command import parse
from nanogpt.errors import UserError
from nanogpt.units import format_bytes

SMALLEST_CHANGE = 0.02
FEW, SMALLEST_CHANGE_OF_FEW = 5, 0.10
ENOUGH_FOR_QUARTILES = 10
SMALLEST_CHANGE_BYTES = 5e6  # what a process's memory varies by itself
HIGHER_IS_BETTER = ("tokens_per_second", "speedup", "share_of_product")
WORK_KEYS = ("contender", "work", "versions", "mesh", "layout", "file_bytes", "megabytes")
MEMORY_KEYS = ("memory/steps", "peak_growth_bytes", "peak_bytes")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Say what changed between two results."""

    before: Annotated[Path, tyro.conf.Positional]
    """JSON of a benchmark or of a report."""
    after: Annotated[Path, tyro.conf.Positional]
    """The same, later."""


def spreads(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    """(path, spread) of whatever was measured several times, and of peak memory (a single point)."""
    if isinstance(value, dict):
        if {"median", "low", "high"} <= set(value):
            yield path, value
            return
        for key, part in value.items():
            if f"{path}/{key}".endswith(MEMORY_KEYS) and isinstance(part, int):
                yield f"{path}/{key}", spread([part])._asdict()
            yield from spreads(part, f"{path}/{' '.join(filter(None, [key, label_of(part)]))}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from spreads(part, f"{path}/{label_of(part) or number}")


def label_of(part: Any) -> str:
    """The work that a part is of, so that a row is found again in any position; "" if it does not say."""
    if isinstance(part, dict) and "engine" in part:
        return f"{part['engine']} {part['workers']} workers"
    work = part.get("work") if isinstance(part, dict) else None
    if not isinstance(work, dict) or "batch_size" not in work:
        return ""
    model, compiled = work["model"], "compiled" if work["compile"] else "eager"
    return (
        f"{model['n_layer']}x{model['n_embd']} {work['batch_size']}x{model['block_size']} "
        f"{work['precision']} {work['attention']} {compiled}"
        + (f" x {work['accumulation']}" if work.get("accumulation", 1) > 1 else "")
        + (f" on {part['ranks']} ranks" if part.get("ranks", 1) > 1 else "")
        + (" and all keep memory" if work.get("all_keep_memory") else "")
    )


def verdict(path: str, before: dict[str, float], after: dict[str, float]) -> str:
    """ "better", "worse" or "same"."""
    count, change = min(before["count"], after["count"]), abs(after["median"] - before["median"])
    smallest = SMALLEST_CHANGE_OF_FEW if count < FEW else SMALLEST_CHANGE
    if change <= smallest * abs(before["median"]):
        return "same"
    if path.endswith(MEMORY_KEYS) and change <= SMALLEST_CHANGE_BYTES:
        return "same"
    low, high = ("low", "high") if count >= ENOUGH_FOR_QUARTILES else ("min", "max")
    if before[low] <= after[high] and after[low] <= before[high]:
        return "same"
    grew = after["median"] > before["median"]
    return "better" if grew == any(word in path for word in HIGHER_IS_BETTER) else "worse"


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each number that both have."""
    if before.get("benchmark") != after.get("benchmark"):
        kinds = f"a result of {before.get('benchmark')} and one of {after.get('benchmark')}"
        raise UserError(f"{kinds}, expected two of the same benchmark")
    old, new = dict(spreads(before)), dict(spreads(after))
    if not old and not new:
        raise UserError(
            "neither has a number that was measured several times, as predictions and dry runs have none; "
            "give results that were measured"
        )
    if not old.keys() & new.keys():
        raise UserError("the two have no number in common: they measured different work; compare equal runs")
    for path in sorted(old.keys() ^ new.keys()):
        say(f"only in one of them: {path.lstrip('/')}")
    return [
        {
            "number": path.lstrip("/"),
            "before": old[path]["median"],
            "after": new[path]["median"],
            "verdict": verdict(path, old[path], new[path]),
        }
        for path in old
        if path in new
    ]


def main() -> None:
    with one_line_errors():
        config = parse(CompareConfig)
        before, after = read_json(config.before), read_json(config.after)
        with whole_results(config.before, config.after):
            entries = compare(before, after)
            if hardware_of(before) != hardware_of(after):
                say(f"not the same machine: {hardware_of(before)} and {hardware_of(after)}")
            for name, values in other_work(before, after):
                say(f"not the same work of {name}: {values}")
        rows = [
            [
                entry["number"],
                *(shown(entry["number"], entry[when]) for when in ("before", "after")),
                f"{entry['after'] / entry['before'] - 1:+.1%}" if entry["before"] else "",
                entry["verdict"],
            ]
            for entry in entries
        ]
        print(table(["number", "before", "after", "change", "beyond noise"], rows))
        counts = {
            word: sum(entry["verdict"] == word for entry in entries) for word in ("better", "worse", "same")
        }
        finish({"benchmark": "compare", "counts": counts, "entries": entries})


def shown(path: str, value: float) -> str:
    """A number in the form that people read."""
    return format_bytes(value) if path.endswith(MEMORY_KEYS) else f"{value:.5g}"


def other_work(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(benchmark, what differs) wherever both results measured something, but not the same work."""
    old, new = (result.get("results", {result["benchmark"]: result}) for result in (before, after))
    for name in sorted(old.keys() & new.keys()):
        for key in WORK_KEYS:
            one, other = (result[name].get(key) for result in (old, new))
            if one is None or other is None:
                continue
            if not isinstance(one, dict) or not isinstance(other, dict):
                one, other = {key: one}, {key: other}
            for word in sorted(one.keys() & other.keys()):
                if one[word] != other[word]:
                    yield name, f"{word} {one[word]} and {other[word]}"


def hardware_of(result: dict[str, Any]) -> str:
    """Where a result was measured."""
    facts = result.get("facts", {})
    named = {key: facts.get(key) for key in ("hardware", "cores", "threads", "bf16_fast", "torch")}
    return ", ".join(f"{key} {value}" for key, value in named.items())


if __name__ == "__main__":
    main()
