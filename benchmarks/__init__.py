"""Measurements: each prints a table, then one JSON line; its report states hardware, versions and commit."""
