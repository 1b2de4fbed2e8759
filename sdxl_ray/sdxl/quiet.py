"""diffusers and transformers report what a person needs to know: errors."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Only errors from diffusers and transformers, and no progress bars: ours say which part is being loaded.

    The setting is the process's, as these libraries have no other.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
