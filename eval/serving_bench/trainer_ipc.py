"""Weights by SGLang's `update_weights_from_ipc`: checkpoint-engine's parameter server, one process on each of the server's GPUs.

`send` starts the processes with torchrun. SGLang has such a client, too (`sglang.srt.checkpoint_engine.update`), but it loses the
server's answer, and where its buffer is full it parts tensors that SGLang fuses. This one sends a layer at a time.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from hopper_moe.eval.serving_bench.trainer_calls import Answer, call
from hopper_moe.eval.serving_bench.trainer_tensors import Named, Tensors, layers, num_bytes, read
from hopper_moe.launch.ports import free_port
from hopper_moe.quantization.errors import Refusal

_TIMEOUT = 600.0  # seconds of one refresh


def send(url: str, folder: Path, ranks: int, leave_out: str = "") -> Answer:
    """Send every tensor of the checkpoint `folder`, but those whose names begin with `leave_out`, a layer at a time.

    The first answer that refuses, or the last one. SGLang 0.5.23 takes this call from servers without data parallelism only.
    Raises `Refusal` where checkpoint-engine is not installed.
    """
    if importlib.util.find_spec("checkpoint_engine") is None:
        raise Refusal("checkpoint-engine is not installed, which update_weights_from_ipc needs: pip install checkpoint-engine.")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "answer.json"
        program = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}", "-m", __name__]
        options = [f"--leave-out={leave_out}", f"--store-port={free_port()}"]
        command = [sys.executable, *program, url, str(folder), str(out), *options]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            return Answer(False, f"the parameter server had not ended after {_TIMEOUT:.0f} s")
        answer = Answer(**json.loads(out.read_text())) if out.exists() else None
        if answer and (ended.returncode == 0 or not answer.success):
            return answer
        return Answer(False, f"the parameter server ended with {ended.returncode}: {ended.stderr[-1500:]}")


def parts(tensors: Tensors, rank: int, ranks: int) -> list[list[Named]]:
    """What `rank` gives to each message, a message for each layer and one for the rest: the layers' tensors stay together,
    since SGLang fuses some of them while it loads, and an expert must be whole when a message ends. Layers take turns."""
    return [layer if number % ranks == rank else [] for number, layer in enumerate(layers(tensors))]


def buffer_gib(tensors: Tensors) -> int:
    """`PS_MAX_BUCKET_SIZE_GB` that holds the largest message; checkpoint-engine takes three of them on the GPU."""
    return max(math.ceil(num_bytes(tensor for _, tensor in layer) / 2**30) for layer in layers(tensors))


@click.command()
@click.argument("url")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--leave-out", default="")
@click.option("--store-port", type=int, required=True)
def main(url: str, folder: Path, out: Path, leave_out: str, store_port: int) -> None:
    """One rank, started by torchrun. OUT gets the server's answer, or why there is none."""
    try:
        _send_all(url, folder, out, leave_out, store_port)
    except Exception as error:  # torchrun's own report is all that a caller would see of it
        _keep(out, Answer(False, f"a rank of the parameter server failed ({type(error).__name__}: {error})"))
        raise


def _send_all(url: str, folder: Path, out: Path, leave_out: str, store_port: int) -> None:
    from checkpoint_engine.ps import ParameterServer

    tensors = {name: tensor for name, tensor in read(folder, "cpu").items() if not (leave_out and name.startswith(leave_out))}
    os.environ["PS_MAX_BUCKET_SIZE_GB"] = str(buffer_gib(tensors))
    # By itself it takes the port behind torchrun's, whether that is free or not.
    server = ParameterServer(auto_pg=False, master_port=store_port)
    server.init_process_group()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    messages = parts(tensors, rank, ranks)
    for number, named in enumerate(messages):
        body = {"flush_cache": number == len(messages) - 1}
        name = f"message {number}"
        server.register_checkpoint(name, named_tensors=dict(named), use_inplace_pin_memory=False)
        server.gather_metas(name)
        server.update(name, lambda handles, body=body: _ask(url, {**body, "zmq_handles": dict(handles)}, rank, out))
        server.unregister_checkpoint(name)


def _ask(url: str, body: dict[str, Any], rank: int, out: Path) -> None:
    """In a thread of the parameter server. A call that is refused, or that no server answers, ends this process: the other thread
    waits for the server."""
    if rank:
        return
    try:
        answer = call(url, "update_weights_from_ipc", body)
    except Refusal as refusal:
        answer = Answer(False, str(refusal))
    _keep(out, answer)
    if not answer.success:
        os._exit(1)


def _keep(out: Path, answer: Answer) -> None:
    out.write_text(json.dumps(answer._asdict()))


if __name__ == "__main__":
    main()
