"""A pipeline stage whose peer on another node is gone: gloo's own error, one sentence, and the parent is told."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from hopper_moe.launch.ports import free_port
from hopper_moe.moe_backends.sglang.launch_view import LaunchView
from hopper_moe.moe_backends.sglang.lost_node import lost

CLOSED = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:43210"

# A server of two nodes: the parent of each waits for its scheduler as SGLang's does. argv: port, which node dies.
NODES = textwrap.dedent("""
    import multiprocessing, os, signal, sys
    from types import SimpleNamespace
    import torch, torch.distributed as dist
    from hopper_moe.moe_backends.sglang.lost_node import watch
    port, dying = int(sys.argv[1]), int(sys.argv[2])

    def loop(scheduler):
        while True:  # as SGLang's idle stages: requests go round
            if scheduler.pp_group.rank_in_group == 0:
                dist.send(torch.zeros(1), 1)
                dist.recv(torch.zeros(1), 1)
            else:
                dist.recv(torch.zeros(1), 0)
                dist.send(torch.zeros(1), 0)
            if scheduler.server_args.node_rank == dying:
                os._exit(9)

    def scheduler(node):
        import logging
        logging.basicConfig(format="%(name)s: %(message)s")
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=node, world_size=2)
        args = SimpleNamespace(nnodes=2, node_rank=node, pp_size=2)
        watch(loop, SimpleNamespace(server_args=args, pp_group=SimpleNamespace(rank_in_group=node)))

    def node(number, told):
        signal.signal(signal.SIGQUIT, lambda *_: told.put(number))
        process = multiprocessing.get_context("fork").Process(target=scheduler, args=(number,))
        process.start()
        process.join()
        print(f"scheduler {number} ended with {process.exitcode}", flush=True)

    if __name__ == "__main__":
        context = multiprocessing.get_context("fork")
        told = context.Queue()
        nodes = [context.Process(target=node, args=(number, told)) for number in range(2)]
        [process.start() for process in nodes]
        [process.join() for process in nodes]
        print("told", told.get(timeout=10), flush=True)
""")


@pytest.mark.parametrize("dying", [0, 1])
def test_the_other_node_names_the_one_that_died(dying, tmp_path):
    script = tmp_path / "nodes.py"
    script.write_text(NODES)
    done = subprocess.run(
        [sys.executable, str(script), str(free_port()), str(dying)], capture_output=True, text=True, timeout=120
    )
    living = 1 - dying
    assert f"scheduler {dying} ended with 9" in done.stdout and f"scheduler {living} ended with 1" in done.stdout, done.stderr
    assert f"told {living}" in done.stdout
    said = [line for line in done.stderr.splitlines() if line.startswith("hopper_moe: ")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith(
        f"hopper_moe: node {dying} (pipeline stage {dying}) of 2 nodes has ended or cannot be reached: Conn"
    )
    assert "Traceback" not in done.stderr


def launch(nodes: int, node: int, stages: int) -> LaunchView:
    return LaunchView(SimpleNamespace(nnodes=nodes, node_rank=node, pp_size=stages), is_resolved=True)


def test_which_node_is_named():
    assert "node 1 (pipeline stage 2) of 2 nodes" in (lost(CLOSED, launch(2, 0, 4), 1) or "")
    assert "node 1 (pipeline stage 3) of 2 nodes" in (lost(CLOSED, launch(2, 0, 4), 0) or "")
    both = lost(CLOSED, launch(3, 1, 3), 1) or ""
    assert (
        both.startswith("node 0 (pipeline stage 0) or node 2 (pipeline stage 2) of 3 nodes has ended") and "those nodes" in both
    )
    assert "Connection closed by peer [127.0.0.1]:43210. Node 1 ends, too." in both


@pytest.mark.parametrize(("node", "stage", "named"), [(0, 0, 2), (1, 0, 3), (2, 1, 0), (3, 1, 1)])
def test_of_a_stage_on_two_nodes_the_one_with_the_same_ranks_is_named(node, stage, named):
    """Four nodes, two stages: rank r of a stage talks to rank r of the other."""
    assert (lost(CLOSED, launch(4, node, 2), stage) or "").startswith(f"node {named} (pipeline stage {1 - stage}) of 4 nodes")


@pytest.mark.parametrize(
    ("error", "nodes", "node", "stages", "stage"),
    [("CUDA out of memory", 2, 0, 2, 0), (CLOSED, 1, 0, 2, 0), (CLOSED, 2, 0, 6, 1)],
    ids=["another error", "one node", "both neighbours are here"],
)
def test_other_errors_are_left_to_sglang(error, nodes, node, stages, stage):
    assert lost(error, launch(nodes, node, stages), stage) is None
