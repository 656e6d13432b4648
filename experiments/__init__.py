"""Experiments: one file each, a named default instance of `RunConfig` and the result to expect."""
