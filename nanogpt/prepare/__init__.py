"""Text to token files: train.bin, val.bin and the manifest that describes them.

Imports nothing, so that `python -m nanogpt.prepare` can start its workers' server before any heavy import.
"""
