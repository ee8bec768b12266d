"""Entry point of group `sglang.srt.plugins`: SGLang calls `register()` at the start of each of its processes.

SGLang logs and swallows exceptions of a plugin. The choice `--moe-runner-backend hopper_moe` is therefore registered last, after
everything that can fail: a launch that selects it then stops at the command line (or a worker at start-up) instead of serving
with another backend. Registration does not initialise CUDA and does not affect other launches.
"""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("hopper_moe")


@functools.cache
def register() -> None:
    """Check the installed SGLang against the pinned seams (`Refusal` if it differs), then register hooks, name and choice."""
    from hopper_moe.kernels.home import ensure_home
    from hopper_moe.moe_backends.sglang import compat, hooks, seams
    from hopper_moe.quantization.errors import Refusal

    ensure_home()  # the seams import FlashInfer, which a user without a home folder cannot
    installed = compat.installed_version()
    seams.require_supported(installed)
    if problems := seams.check(seams.LAUNCHER):
        raise Refusal(seams.difference(installed, problems))
    if installed != seams.VERSION:
        logger.warning(
            "SGLang %s is newer than %s, which hopper_moe was tested with; its hooks still fit.", installed, seams.VERSION
        )
    hooks.install()
