"""Scripts that measure and judge; each prints a table and takes ``--json FILE``."""
