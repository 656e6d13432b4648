"""loss.png: a run's losses as a picture."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.tracker import Record, read_metrics

SMOOTH_FROM = 50
"""From this number of training records on, a moving mean is drawn over the raw line."""

LARGEST = float(np.finfo(np.float32).max)


def draw_loss(metrics_path: Path, image_path: Path, *, title: str) -> None:
    """Draws training and validation loss by step from a metrics.jsonl into a PNG, replaced in one move.

    Without records the axes are empty. Raises UserError if the file is not what `JsonLines` wrote.
    """
    from matplotlib.figure import Figure

    records = read_metrics(metrics_path)
    train, validation = _points(records, "loss"), _points(records, "val_loss")
    # Unlike pyplot, `Figure` needs no window system.
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        is_long = len(train) >= SMOOTH_FROM
        width, alpha = (0.7, 0.4) if is_long else (1.6, 1.0)
        style: dict[str, Any] = dict(linewidth=width, alpha=alpha, label="training")
        style["marker"] = "o" if len(train) == 1 else None  # a line of one point is nothing
        axes.plot(steps, losses, color="tab:blue", **style)
        if is_long:
            smooth = moving_mean(np.array(losses), reach=len(losses) // 200 + 1)
            axes.plot(steps, smooth, color="tab:blue", linewidth=1.8, label="training, moving mean")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="tab:orange", markersize=4, label="validation")
    axes.set_title(title, parse_math=False)  # it is a directory's name, in which $ is no formula
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # which draws a box instead
        figure.savefig(buffer, format="png")
    part = image_path.with_name(image_path.name + ".part")
    part.write_bytes(buffer.getvalue())
    os.replace(part, image_path)


def moving_mean(values: np.ndarray, *, reach: int) -> np.ndarray:
    """Each value's mean with up to `reach` neighbours on either side; those at the ends have fewer."""
    window = np.ones(2 * reach + 1)
    counts = np.convolve(np.ones(len(values)), window)
    return (np.convolve(values, window) / counts)[reach : reach + len(values)]


def _points(records: list[Record], name: str) -> list[tuple[int, float]]:
    """(step, value) of the records that have a `name` which float32 can hold: matplotlib needs some room."""
    found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [(step, value) for step, value in found if abs(value) <= LARGEST]
