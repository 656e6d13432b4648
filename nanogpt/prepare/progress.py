"""How far a run has come: a live line on a terminal, a plain line now and then elsewhere."""

import os
import sys
import time
from typing import TextIO

from nanogpt.prepare.shards import Record
from nanogpt.units import format_bytes, format_count, format_seconds

OPENWEBTEXT_TOKENS = 9_035_582_198 + 4_434_897
ESTIMATE_AFTER_S = 3.0
PLAIN_LINE_EVERY_S = 10.0
BAR_WIDTH = 24


class Progress:
    """Counts records and reports progress on `stream`; `source_bytes` is None if the total is unknown."""

    def __init__(
        self, source_bytes: int | None, *, engine: str, kept: dict[int, Record], stream: TextIO | None = None
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._source_bytes = source_bytes
        self._engine = engine
        self._kept = set(kept)
        self._start = self._last_line = time.monotonic()
        self._documents = self._tokens = self._read = 0
        self._new_tokens = self._new_text_bytes = self._new_read = 0
        self._estimated = False
        self._steady: tuple[float, int] | None = None  # time and number of the first new tokens
        self._show()

    def add(self, record: Record) -> None:
        self._documents += record.documents
        self._tokens += record.tokens
        self._read += record.source_bytes
        if record.index not in self._kept:
            self._new_tokens += record.tokens
            self._new_text_bytes += record.text_bytes
            self._new_read += record.source_bytes
        now = time.monotonic()
        self._estimate(now)
        if self._live:
            self._show()
        elif now - self._last_line >= PLAIN_LINE_EVERY_S:
            self._say(self._line())

    def _estimate(self, now: float) -> None:
        """Says once how long OpenWebText would take, at the rate after the first record: without start-up."""
        if self._steady is None and self._new_tokens:
            self._steady = (now, self._new_tokens)
        if self._estimated or self._steady is None:
            return
        seconds, tokens = now - self._steady[0], self._new_tokens - self._steady[1]
        if seconds >= ESTIMATE_AFTER_S and tokens:
            whole = format_seconds(OPENWEBTEXT_TOKENS * seconds / tokens)
            self._say(f"at this rate all of OpenWebText would take {whole}")
            self._estimated = True

    def finish(self) -> None:
        """Writes the last line, in any case."""
        self._say(self._counts())

    def _show(self) -> None:
        """Rewrites the live line, cut to the terminal's width: a line that wraps could not be erased."""
        if self._live:
            self._stream.write(f"\r\x1b[K{self._line()[: columns(self._stream) - 1]}")
            self._stream.flush()

    def _say(self, line: str) -> None:
        self._stream.write(f"\r\x1b[K{line}\n" if self._live else f"{line}\n")
        self._stream.flush()
        self._last_line = time.monotonic()

    def _rate(self) -> float:
        """New tokens per second."""
        return self._new_tokens / max(time.monotonic() - self._start, 1e-9)

    def _counts(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        counts = f"{self._documents:,} documents, {format_count(self._tokens)} tokens, {self._engine}"
        if not self._new_tokens:
            return counts
        bytes_per_second = format_bytes(self._new_text_bytes / seconds)
        return f"{counts} {format_count(self._rate())} tokens/s, {bytes_per_second}/s"

    def _line(self) -> str:
        if not self._source_bytes or not self._new_read:
            return self._counts()
        done = min(1.0, self._read / self._source_bytes)
        bar = "#" * round(done * BAR_WIDTH)
        left_s = (self._source_bytes - self._read) * (time.monotonic() - self._start) / self._new_read
        return f"[{bar:<{BAR_WIDTH}}] {done:4.0%} {self._counts()}, {format_seconds(max(left_s, 0))} left"


def columns(stream: TextIO) -> int:
    """Width of the terminal behind `stream`; 80 if it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80
