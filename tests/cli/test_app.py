from __future__ import annotations

import subprocess
import sys

import pytest

from expertmix import __version__
from expertmix.study import trace_job

COMMANDS = (
    "demo", "trace", "compose", "optimize", "spectra", "convert", "train", "report", "models",
    "doctor",
)  # fmt: skip


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "args", [["--help"], ["trace", "--help"], ["compose", "--help"], ["--version"], ["models"]]
)
def test_help_imports_nothing_heavy(args):
    """Neither torch nor transformers: help is instant."""
    code = (
        f"import sys; sys.argv = ['expertmix', *{args!r}]\n"
        "from expertmix.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = _python(code)
    assert result.returncode == 0, result.stderr


def test_letters_that_a_terminal_lacks_are_marks():
    """In a locale of ASCII only, results are shown all the same."""
    code = (
        "import io, sys\n"
        "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='ascii')\n"
        "sys.argv = ['expertmix', 'models']\n"
        "from expertmix.cli import main\n"
        "from expertmix.cli.screen import Screen\n"
        "try: main()\n"
        "except SystemExit: Screen().show('maths 50\\u202f% \\u00b7 poetry')\n"
    )
    result = _python(code)
    assert (result.returncode, result.stderr) == (0, "")
    assert "maths 50?% ? poetry" in result.stdout


def test_the_program_is_installed(expertmix):
    """`expertmix` is on the path, and `--version` says which."""
    assert expertmix("--version").out == f"expertmix {__version__}\n"


def test_help_names_every_command(expertmix):
    """With one line each."""
    answer = expertmix("--help")
    assert answer.code == 0
    assert all(f"│ {command} " in answer.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(expertmix, command):
    """`-h` works too."""
    assert expertmix(command, "-h").code == 0


def test_a_typing_error_is_told(expertmix):
    """By the parser, with exit code 2."""
    answer = expertmix("modles")
    assert answer.code == 2
    assert "models" in answer.err


@pytest.mark.parametrize("place", [0, 1, 2])
def test_json_may_stand_anywhere(expertmix, moe, place):
    """Before the command, after it, and at the end."""
    args: list[object] = ["models", moe]
    args.insert(place, "--json")
    assert expertmix(*args).out.startswith("{")


def test_after_two_dashes_nothing_is_a_flag(expertmix):
    """`--json` is then a name."""
    answer = expertmix("models", "--", "--json")
    assert answer.code == 2
    assert answer.err.startswith("error: --json")


def test_an_error_is_one_line_unless_debugging(expertmix):
    """The traceback is shown on demand only."""
    plain = expertmix("models", "./nothing")
    assert (plain.code, plain.out) == (2, "")
    assert plain.err.startswith("error: there is no model folder ./nothing.")
    assert plain.err.count("\n") == 1
    debug = expertmix("models", "./nothing", "--debug")
    assert debug.code == 2
    assert "Traceback" in debug.err
    assert debug.err.endswith(plain.err)


def test_an_interruption_keeps_nothing(expertmix, moe, prompts, tmp_path, monkeypatch):
    """Exit code 130, one line, no files."""

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trace_job, "write_json", interrupt)
    answer = expertmix("trace", moe, "--prompts", prompts, "--out", tmp_path / "out")
    assert answer.code == 130
    assert answer.err == "interrupted: nothing half-written was kept\n"
    assert not (tmp_path / "out").exists()
