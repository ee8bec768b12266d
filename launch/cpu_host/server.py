"""Start the CPU host: load the checkpoint, listen, stop on a signal."""

from __future__ import annotations

import time
from pathlib import Path

import click
import uvicorn

from hopper_moe.launch.cpu_host.app import create_app
from hopper_moe.launch.cpu_host.engine import Engine
from hopper_moe.launch.cpu_host.model import load
from hopper_moe.launch.ports import http_address, port_problem
from hopper_moe.moe_backends.env import settings
from hopper_moe.quantization.errors import Refusal

STOP = 5  # seconds for running answers when the server stops; without a limit it would finish its whole queue


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 30000,
    kernel: str | None = None,
    api_key: str | None = None,
    served_model_name: str | None = None,
    log_level: str = "warning",
) -> None:
    """Load MODEL (a checkpoint folder) and serve it until stopped.

    Args:
        kernel: one of `CPU_KERNELS`. None: HOPPER_MOE_KERNEL, `reference` for auto.
        api_key: bearer token that requests must carry; never printed. None: no key is needed.
        served_model_name: what requests call the model. None: the folder's name.

    Raises:
        Refusal: an option, the address, the checkpoint or the kernel cannot be served. No weight is read before.
    """
    for flag, value in (("--api-key", api_key), ("--served-model-name", served_model_name)):
        if value is not None and not value.strip():
            raise Refusal(f"{flag} is empty: give a value or leave it out.")
    if problem := port_problem(host, port):
        raise Refusal(f"--host {host} --port {port} cannot be used ({problem}): choose a free one.")
    if kernel is None:
        chosen = settings().kernel
        kernel = "reference" if chosen == "auto" else chosen
    started = time.time()
    loaded, tokenizer = load(model, kernel)
    name = served_model_name or Path(model).resolve().name
    app = create_app(Engine(loaded, tokenizer), name, kernel, api_key)
    click.echo(
        f"CPU host: {model} with kernel {kernel} on {http_address(host, port)}/v1 (loaded in {time.time() - started:.1f} s)"
    )
    uvicorn.run(app, host=host, port=port, log_level=log_level, timeout_graceful_shutdown=STOP)
