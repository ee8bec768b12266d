"""Pipeline stages on several nodes: when one node is gone, the others say which and end, instead of a traceback of gloo's.

SGLang's stages send requests and outputs to each other over gloo. A peer that is gone is a RuntimeError there, which leaves the
scheduler's loop; SGLang logs its traceback and ends the server.
"""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Callable
from typing import Any

import psutil

from hopper_moe.moe_backends.sglang.launch_view import LaunchView

logger = logging.getLogger("hopper_moe")

MIXIN = "sglang.srt.managers.scheduler_pp_mixin.SchedulerPPMixin"
LOOPS = ("event_loop_pp", "event_loop_pp_disagg_prefill", "event_loop_pp_disagg_decode")

_GONE = re.compile(
    r"Connection (?:closed|reset|refused)[^\n]*|Broken pipe|Socket closed|Timed out waiting[^\n]*"
    r"|ncclRemoteError|remote process exited"
)


def watch(loop: Callable[..., None], scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Run one of SGLang's pipeline loops. Where another node is gone: one sentence in the log, SIGQUIT to the parent, as SGLang
    itself ends a server, and SystemExit."""
    try:
        loop(scheduler, *args, **kwargs)
    except RuntimeError as error:
        view = LaunchView(scheduler.server_args, is_resolved=True)
        sentence = lost(str(error), view, scheduler.pp_group.rank_in_group)
        if sentence is None:
            raise
        logger.error("%s", sentence)
        parent = psutil.Process().parent()
        if parent is not None:
            parent.send_signal(signal.SIGQUIT)
        raise SystemExit(1) from error


def lost(error: str, view: LaunchView, stage: int) -> str | None:
    """The sentence for an error of stage `stage` on this node; None where it speaks of no lost connection, or the stages around
    are here. Stages talk to the one before and the one behind, in a ring."""
    gone, num_nodes, node = _GONE.search(error), view.args.nnodes, view.args.node_rank
    around = {(stage + step) % view.args.pp_size for step in (-1, 1)}
    others = sorted((view.node_of(other), other) for other in around if other not in view.local_stages)
    if gone is None or not others:
        return None
    named = " or ".join(f"node {other} (pipeline stage {its})" for other, its in others)
    return (
        f"{named} of {num_nodes} nodes has ended or cannot be reached: {gone[0].strip()}. Node {node} ends, too. Read the log "
        f"of {'that node' if len(others) == 1 else 'those nodes'}, then start all {num_nodes} again."
    )
