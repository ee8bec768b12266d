"""`python -m hopper_moe.launch.cpu_host MODEL`: serve one checkpoint on this CPU."""

from __future__ import annotations

import sys
from typing import Any

import click

from hopper_moe.launch.cpu_host.kernels import CPU_KERNELS
from hopper_moe.quantization.errors import Refusal


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=30000, show_default=True)
@click.option("--kernel", type=click.Choice(CPU_KERNELS), help="Default: HOPPER_MOE_KERNEL, else reference.")
@click.option("--api-key", help="Key that every request but /health must carry. Default: none.")
@click.option("--served-model-name", help="Name that requests use. Default: the folder's name.")
def main(model: str, **options: Any) -> None:
    """Serve MODEL, a DeepSeek-V4 checkpoint folder with FP4 experts, on OpenAI endpoints of this CPU."""
    from hopper_moe.launch.cpu_host.server import serve  # imports transformers, which takes seconds

    serve(model, **options)


if __name__ == "__main__":
    try:
        main()
    except Refusal as refusal:
        sys.exit(f"cpu host: {refusal}")
