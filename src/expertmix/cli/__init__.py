"""The command line: one file per command, no logic of its own.

Nothing heavy is imported before a command runs, so that help is instant.
"""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """Entry point of `expertmix`."""
    # Must be set before torch is loaded. Threads that spin while they wait make two threads on busy
    # cores five times slower than one; asleep they cost nothing. The user's own setting wins.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that knows ASCII only gets a ? for a letter: results must not be lost to it.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    from expertmix.cli.app import app

    app()
