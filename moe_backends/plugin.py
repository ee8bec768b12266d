"""Entry point of group `sglang.srt.plugins`: SGLang calls `register()` first thing in each of its processes.

SGLang logs and swallows whatever a plugin raises. So the choice `--moe-runner-backend hopper_moe` is registered last, after
everything that can fail: a launch that asks for it then stops at the command line (or a worker at start-up) instead of serving
something else. Nothing here touches CUDA, and nothing changes for launches that do not ask.
"""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("hopper_moe")


@functools.cache
def register() -> None:
    """Check the installed SGLang against the pinned seams (`Refusal` if it differs), then register hooks, name and choice."""
    from hopper_moe.moe_backends import compat, seams, sglang_hooks
    from hopper_moe.moe_backends.errors import Refusal

    version = compat.table_version()
    if problems := seams.check(seams.LAUNCHER[version]):
        raise Refusal(
            f"SGLang {compat.installed_version()} differs from {version} where hopper_moe hooks in, so it is not registered: "
            f"{'; '.join(problems)}."
        )
    if compat.installed_version() != version:
        logger.warning(
            "SGLang %s is newer than %s, which hopper_moe was tested with; its hooks still fit.",
            compat.installed_version(),
            version,
        )
    sglang_hooks.install()
