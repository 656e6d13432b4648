"""Text to token files: train.bin, val.bin and the manifest that says what they are."""

from nanogpt.prepare.bundled import cache_directory, ensure_bundled

__all__ = ["cache_directory", "ensure_bundled"]
