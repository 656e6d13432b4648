"""A report's results as SVG: speed by micro-batch, memory by kind, step breakdown, roofline, scaling."""

import io
import itertools
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import Work
from benchmarks.limit import products_of
from nanogpt import perf
from nanogpt.loss import chunk_tokens_of
from nanogpt.model import GPT2Config

Result = dict[str, Any]
KIND_COLORS = {"published": "#9aa5b1", "claimed": "#d8dde3", "predicted": "#ffffff", "measured": "#2a6fdb"}


def pictures_of(results: dict[str, Result]) -> dict[str, list[tuple[str, str]]]:
    """(caption, SVG) of each picture, by the benchmark that it belongs to."""
    drawings: list[tuple[str, Callable[[Axes, Result], None], str]] = [
        ("throughput", draw_speed, "Tokens a second by sequences in a microstep."),
        (
            "throughput",
            draw_memory,
            "Memory of a step: planned by kind (hatched), and measured (marks; on a CPU with torch itself).",
        ),
        ("peers", draw_peers, "A step of each contender in every turn (dots), and the median (bars)."),
        ("limit", draw_breakdown, "Seconds of a step: the floor, and what was profiled."),
        ("limit", draw_roofline, "The model's products on the measured roofline."),
        ("sharding", draw_ranks, "Memory of a rank: predicted by kind (hatched), and measured (marks)."),
        ("predict", draw_scaling, "White bars are predictions, not measurements."),
    ]
    found: dict[str, list[tuple[str, str]]] = {}
    for name, draw, caption in drawings:
        result = results.get(name)
        if result is not None and "error" not in result and has_rows(result):
            pictures = found.setdefault(name, [])
            pictures.append((caption, with_names(svg_of(draw, result), f"{name}-{len(pictures)}")))
    return found


def has_rows(result: Result) -> bool:
    """Whether one of its rows was measured, or it has no rows to begin with."""
    return "rows" not in result or any("error" not in row for row in result["rows"])


def svg_of(draw: Callable[[Axes, Result], None], result: Result) -> str:
    """The drawing as an SVG element."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes, result)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "nanogpt"}):  # the same numbers give the same file
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def with_names(svg: str, whose: str) -> str:
    """The SVG with names of its own: a page has several, and may have a name once."""
    return re.sub(r'( id="|href="#|url\(#)', rf"\1{whose}-", svg)


def model_of(row: Result) -> str:
    """The row's model as the table calls it."""
    return f"{row['work']['model']['n_layer']} x {row['work']['model']['n_embd']}"


def draw_speed(axes: Axes, result: Result) -> None:
    """Tokens/s against the micro-batch, with a line for each combination of the other options."""
    lines: dict[str, list[tuple[int, Result]]] = {}
    rows = [row for row in result["rows"] if "error" not in row]
    several_models = len(set(map(model_of, rows))) > 1
    for row in rows:
        work = row["work"]
        how = "compiled" if work["compile"] else "eager"
        label = ", ".join(
            [
                *([model_of(row)] if several_models else []),
                f"T = {work['model']['block_size']}",
                work["precision"],
                f"{work['attention']} attention",
                how,
            ]
        )
        lines.setdefault(label, []).append((work["batch_size"], row))
    for label, points in lines.items():
        sizes = [size for size, _ in points]
        rates = [row["tokens_per_second"] for _, row in points]
        spreads = [row["step_s"] for _, row in points]
        slowest = [rate * step["median"] / step["max"] for rate, step in zip(rates, spreads, strict=True)]
        fastest = [rate * step["median"] / step["min"] for rate, step in zip(rates, spreads, strict=True)]
        (line,) = axes.plot(sizes, rates, marker="o", label=label)
        axes.vlines(sizes, slowest, fastest, linewidth=1, alpha=0.6, color=line.get_color())
    measured = sorted({size for points in lines.values() for size, _ in points})
    axes.margins(y=0.2)  # or the highest mark would be cut
    axes.set(xlabel="sequences in a microstep", xticks=measured, ylabel="tokens/s", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)


def draw_memory(axes: Axes, result: Result) -> None:
    """The plan's kinds stacked, and the measured peak of the process as a mark."""
    rows = [row for row in result["rows"] if "error" not in row]
    several_models = len(set(map(model_of, rows))) > 1
    several_precisions = len({row["work"]["precision"] for row in rows}) > 1
    labels = []
    bottoms = [0.0] * len(rows)
    plans = []
    for row in rows:
        work = row["work"]
        here = chunk_tokens_of(work["device"], work["precision"])  # for older reports, which do not say
        plans.append(
            perf.memory_plan(
                GPT2Config(**work["model"]),
                batch_size=work["batch_size"],
                block_size=work["model"]["block_size"],
                precision=work["precision"],
                loss_chunk_tokens=row.get("loss_chunk_tokens", here),
                accumulation=work["accumulation"],
                compile=work["compile"],
                device_type=work["device"],
            )
        )
        how = "" if work["compile"] else " eager"
        how += "" if work["attention"] == "auto" else f" {work['attention']}"
        how += f" {work['precision']}" if several_precisions else ""
        how += f" of {model_of(row)}" if several_models else ""
        labels.append(f"{work['batch_size']} x {work['model']['block_size']}{how}")
    for kind in [kind for kind in plans[0] if kind != "total" and any(plan[kind] for plan in plans)]:
        sizes = [plan[kind] / 1e9 for plan in plans]
        axes.bar(range(len(rows)), sizes, 0.6, bottoms, label=kind, hatch="///", alpha=0.7)
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    measured = [row["memory"]["steps"] / 1e9 for row in rows]
    axes.plot(range(len(rows)), measured, "k_", markersize=20, label="measured peak")
    axes.set_xticks(range(len(rows)), labels, fontsize=7, rotation=30, ha="right")
    axes.set(ylabel="GB")
    axes.margins(y=0.3)  # for the legend
    axes.legend(frameon=False, fontsize=7, ncols=4, loc="upper left")


def draw_peers(axes: Axes, result: Result) -> None:
    """The seconds that a step of every contender took in every turn, and their median."""
    names = list(result["contenders"])
    for place, name in enumerate(names):
        row = result["contenders"][name]
        color = "#2a6fdb" if name == "ours" else "#9aa5b1"
        axes.barh(place, row["step_s"]["median"], height=0.5, color=color)
        axes.plot(row["seconds"], [place] * len(row["seconds"]), "k.", markersize=4, alpha=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="seconds a step", xlim=(0, None))


def draw_breakdown(axes: Axes, result: Result) -> None:
    """Floor and profile, stacked by group."""
    floor, profiled = result["floor"]["seconds"], result["breakdown"]["groups_s"]
    lefts = [0.0, 0.0]
    for group in [*floor, *(group for group in profiled if group not in floor)]:
        values = [floor.get(group, 0.0), profiled.get(group, 0.0)]
        axes.barh([0, 1], values, left=lefts, height=0.5, label=group)
        lefts = [left + value for left, value in zip(lefts, values, strict=True)]
    axes.set_yticks([0, 1], ["floor", "profiled"])
    axes.invert_yaxis()
    axes.set(xlabel="seconds a step")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.18))


def draw_roofline(axes: Axes, result: Result) -> None:
    """Measured FLOP/s of each product by its FLOPs per byte, under what memory and the best product allow."""
    work = Work(**{**result["work"], "model": GPT2Config(**result["work"]["model"])})
    rates = result["floor"]["product_flops_per_second"]
    bandwidth, best = result["floor"]["bandwidth_bytes_per_second"], max(rates.values())
    width = 4 if work.precision == "float32" else 2
    intensities = []
    for product in products_of(work.model, work.batch_size * work.model.block_size):
        moved = width * (product.m * product.k + product.k * product.n + product.m * product.n)
        intensities.append(2 * product.m * product.k * product.n / moved)
        label = None if intensities[1:] else "measured product"
        axes.plot(intensities[-1], rates[product.name] / 1e9, "o", color="#2a6fdb", label=label)
    ends = [min(*intensities, best / bandwidth) / 4, max(intensities) * 4]
    corner = best / bandwidth
    roof = [ends[0] * bandwidth / 1e9, best / 1e9, best / 1e9]
    label = "measured memory bandwidth, and the best product"
    axes.plot([ends[0], corner, ends[1]], roof, color="#888", label=label)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s")


def draw_ranks(axes: Axes, result: Result) -> None:
    """The dry run's kinds at the peak, stacked, and what real processes measured."""
    rows = result["memory"]
    bottoms, colors = [0.0] * len(rows), itertools.cycle(matplotlib.colormaps["tab20"].colors)
    for kind in rows[0]["peak_of_kind"]:
        sizes = [row["at_peak"].get(kind, 0) / 1e6 for row in rows]
        if max(sizes) > 0.001 * max(row["predicted_bytes"] for row in rows) / 1e6:
            color = next(colors)  # more kinds than the usual cycle has
            axes.bar(range(len(rows)), sizes, 0.5, bottoms, label=kind, color=color, hatch="///", alpha=0.7)
            bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    for place, row in enumerate(rows):
        measured = row.get("measured_bytes", [])
        label = "measured peak" if place == 0 and measured else None
        axes.plot(
            [place] * len(measured), [size / 1e6 for size in measured], "k_", markersize=20, label=label
        )
    names = ["resharded after forward" if row["reshard_after_forward"] else "kept" for row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.set(ylabel="MB", xlim=(-0.5, len(rows) + 0.8))
    axes.legend(frameon=False, fontsize=7)


def draw_scaling(axes: Axes, result: Result) -> None:
    """Tokens/s of each row; a prediction is hatched and white."""
    rows = result["rows"]
    for place, row in enumerate(rows):
        is_predicted = row["kind"] == "predicted"
        axes.barh(
            place,
            row["tokens_per_second"],
            height=0.6,
            color=KIND_COLORS[row["kind"]],
            edgecolor="#555",
            hatch="///" if is_predicted else None,
            linestyle="--" if is_predicted else "-",
        )
        axes.text(
            row["tokens_per_second"], place, f" {row['tokens_per_second']:,.0f}", va="center", fontsize=7
        )
    labels = [f"{row['machine']}: {row['who']} ({row['kind']})" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}")
    axes.set(xlabel="million tokens/s", xlim=(0, None))
