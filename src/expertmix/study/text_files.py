"""Reading a text file that a user named. Knows nothing of what is in it."""

from __future__ import annotations

from pathlib import Path

from expertmix.errors import ConfigError


def read_text(path: Path, kind: str = "file") -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Args:
        path: The file.
        kind: What to call it where there is none.

    Raises:
        ConfigError: There is no such file, it is not UTF-8, or it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as problem:
        raise ConfigError(f"there is no {kind} {path}") from problem
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{path} is not UTF-8 text: {problem}") from problem
    except OSError as problem:
        raise ConfigError(f"cannot read {path}: {problem.strerror or problem}") from problem
