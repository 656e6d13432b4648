"""Text to token files: train.bin, val.bin and the manifest that says what they are.

Nothing is imported here: `python -m nanogpt.prepare` starts its workers' server before all that is heavy.
"""
