"""Fetch the model tests that transformers ships in its sdist, and only there.

They are unpacked below the environment (`.venv/transformers-tests/VERSION`) and never committed.
Run by the Makefile; without a network it says so and fails nothing: their tests are then skipped.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

WANTED = "test_modeling_common.py"


def folder_of_tests() -> Path:
    """Where the tests of the installed transformers are, once fetched."""
    return Path(sys.prefix) / "transformers-tests" / version("transformers")


def fetch() -> Path:
    """Fetch them where they are not there yet.

    Raises:
        subprocess.CalledProcessError: pip cannot get the sdist.
    """
    folder = folder_of_tests()
    if (folder / WANTED).exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        wanted = f"transformers=={version('transformers')}"
        options = ["--quiet", "--no-deps", "--no-binary", "transformers", "--dest", scratch]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, wanted], check=True)
        (archive,) = Path(scratch).glob("transformers-*.tar.gz")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as packed:
            for member in packed.getmembers():
                path = Path(member.name)
                if path.parent.name == "tests" and path.name == WANTED:
                    source = packed.extractfile(member)
                    assert source is not None
                    (folder / path.name).write_bytes(source.read())
    return folder


if __name__ == "__main__":
    try:
        fetch()
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"transformers' own model tests will be skipped: no sdist ({error})\n")
