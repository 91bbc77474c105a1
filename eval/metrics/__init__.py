"""Metrics of the report, one file each; see `registry` and, for the list of them, `all`."""
