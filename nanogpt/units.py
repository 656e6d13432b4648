"""Numbers as people read them: counts, bytes and durations."""


def format_count(count: int | float) -> str:
    """A count with one decimal and a suffix of thousands: 999, 524.3K, 124.4M, 9.0B, 1.5T."""
    return _scaled(count, ("", "K", "M", "B", "T"))


def format_bytes(size: int | float) -> str:
    """A size in decimal units (1 GB = 10^9 bytes): 512 bytes, 1.5 GB."""
    return _scaled(size, (" bytes", " KB", " MB", " GB", " TB"))


def format_seconds(seconds: int | float) -> str:
    """A duration as minutes:seconds, or hours:minutes:seconds from one hour on: 0:07, 3:12, 28:00:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _scaled(value: int | float, suffixes: tuple[str, ...]) -> str:
    if abs(value) < 999.5:
        return f"{value:.0f}{suffixes[0]}"
    power = 1
    while abs(value) >= 999.95 * 1000**power and power < len(suffixes) - 1:  # 999.95 would round to 1000.0
        power += 1
    return f"{value / 1000**power:.1f}{suffixes[power]}"
