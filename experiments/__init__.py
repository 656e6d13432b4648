"""Experiments, one per file: a named default instance of `RunConfig` and the result to expect."""
