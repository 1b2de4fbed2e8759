"""`python -m sdxl_ray` and the command `sdxl-ray`: exit codes and error texts for every subcommand."""

from __future__ import annotations

import sys
import traceback
import warnings
from pathlib import Path

_INTERRUPTED, _TERMINATED = 130, 143  # as shells have them: 128 + SIGINT, 128 + SIGTERM


def main() -> None:
    """0 done, 1 the run failed, 2 your input, 130 Ctrl-C, or either signal once training is saved, 143 SIGTERM. Known
    errors print message and cure, no traceback."""
    from sdxl_ray.cli import app
    from sdxl_ray.connection import filter_ray_noise, set_environment, sigterm_as_interrupt
    from sdxl_ray.errors import SdxlRayError

    set_environment()
    warnings.formatwarning = _note
    show_traceback = "--traceback" in sys.argv
    if show_traceback:
        sys.argv.remove("--traceback")
    else:
        filter_ray_noise()
    with sigterm_as_interrupt() as terminated:
        try:
            code = app(standalone_mode=False)  # _INTERRUPTED where it was left by a KeyboardInterrupt
        except SdxlRayError as error:
            if show_traceback:
                traceback.print_exc()
            print(f"error: {_shown(error)}", file=sys.stderr)
            code = error.exit_code
        except KeyboardInterrupt:  # a second one
            code = _TERMINATED if terminated.is_set() else _INTERRUPTED
        except Exception as error:
            code = _usage_error(error)
            if code is None:
                traceback.print_exc()
                print(
                    f"error: {type(error).__name__}: {_shown(error)}\n"
                    "This is a bug in sdxl-ray: please report the text above.",
                    file=sys.stderr,
                )
                code = 1
        else:
            if code == _INTERRUPTED:
                print("interrupted; what is finished is kept: run again to go on", file=sys.stderr)
                code = _TERMINATED if terminated.is_set() else _INTERRUPTED
        sys.exit(code or 0)


def _shown(message: object) -> str:
    from sdxl_ray.tracking.console import for_terminal

    return for_terminal(str(message))


_format_warning = warnings.formatwarning


def _note(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """Our own warnings are for the person who runs this: one line, without the place in our code."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent):
        return f"note: {_shown(message)}\n"
    return _format_warning(message, category, filename, lineno, line)


def _usage_error(error: Exception) -> int | None:
    """Wrong options and arguments, which the parser of the command line raises as exceptions of its own."""
    show, exit_code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if show is None or exit_code is None:
        return exit_code
    show()
    return int(exit_code)


if __name__ == "__main__":
    main()
