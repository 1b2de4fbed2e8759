"""Exit codes and last lines of the command, in processes that only pretend to work."""

import subprocess
import sys

import pytest

from sdxl_ray import cli
from sdxl_ray.errors import ConfigError

PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from sdxl_ray import cli, __main__
def check(config: str) -> None:
    {work}
for command in cli.app.registered_commands:
    if command.callback is cli.check:
        command.callback = check
sys.argv = ["sdxl-ray", "check", "my.toml"]
__main__.main()
"""
KEPT = "interrupted; what is finished is kept: run again to go on\n"


def ended(work: str) -> tuple[int, str]:
    """Exit code and standard error of a command that does `work`."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(work=work)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(20)", (130, KEPT)),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)", (143, KEPT)),
        ("raise __import__('sdxl_ray.errors').errors.Interrupted('all is saved.')", (130, "error: all is saved.\n")),
        ("raise __import__('sdxl_ray.errors').errors.ConfigError('no.')", (2, "error: no.\n")),
        ("pass", (0, "")),
    ],
)
def test_exit_codes_and_what_is_said(work, expected):
    assert ended(work) == expected


def test_what_is_not_foreseen_is_called_a_bug_with_its_traceback():
    code, said = ended("1 / 0")
    assert code == 1
    assert said.startswith("Traceback")
    assert said.splitlines()[-2:] == [
        "error: ZeroDivisionError: division by zero",
        "This is a bug in sdxl-ray: please report the text above.",
    ]


def test_what_a_terminal_would_obey_is_written_out():
    assert ended(r"raise __import__('sdxl_ray.errors').errors.DatasetError('\x1b[2Jcat.png: no.')") == (
        2,
        "error: \\x1b[2Jcat.png: no.\n",
    )


def test_own_warnings_are_one_line_and_others_tell_where_they_are_from():
    code, said = ended("import warnings; warnings.warn_explicit('no answer yet', UserWarning, cli.__file__, 93)")
    assert (code, said) == (0, "note: no answer yet\n")
    assert ended("import warnings; warnings.warn('from elsewhere')")[1].startswith("<string>:")


@pytest.mark.parametrize("options", [{"yes": True}, {"keep_days": 7.0}, {"stats": True, "yes": True}])
def test_options_of_prune_alone_are_refused(tmp_path, options):
    """Else `--yes` would begin to encode."""
    with pytest.raises(ConfigError, match="--yes and --keep-days belong to --prune, which is not given"):
        cli.cache(tmp_path / "my.toml", **options)
