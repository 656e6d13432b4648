"""Folders that may not exist yet."""

import os
from pathlib import Path


def nearest(path: Path) -> Path:
    """What there is of `path`: itself, or the nearest folder above it."""
    places = [path, *path.absolute().parents]
    return next(place for place in places if os.path.exists(place))  # Path's own refuses long names
