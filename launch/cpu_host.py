"""Embedded OpenAI-compatible server for machines without a Hopper GPU: `python -m hopper_moe.launch.cpu_host MODEL`.

Slow but true: transformers runs the DeepSeek-V4 architecture, this project's reference kernels run the routed experts on the
packed weights. transformers' own server cannot serve this architecture (it fails on every DeepSeek-V4 request).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from pathlib import Path

import click
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse

from hopper_moe.launch.cpu_host_api import BadRequest, ChatBody, CompletionBody, TextBody, choice_text, engine_request
from hopper_moe.launch.cpu_host_engine import Engine
from hopper_moe.launch.cpu_host_kernels import CPU_KERNELS
from hopper_moe.launch.cpu_host_model import load
from hopper_moe.moe_backends.env import settings
from hopper_moe.moe_backends.errors import Refusal

STOP = 5  # seconds that a stopping server leaves to the answers under way; without a limit it would work off its whole queue


def create_app(engine: Engine, model_name: str, kernel: str) -> FastAPI:
    """The HTTP endpoints: /health, /v1/models, /v1/chat/completions, /v1/completions."""
    app = FastAPI(title="hopper-moe CPU host")
    created = int(time.time())

    @app.exception_handler(BadRequest)
    async def refuse(_request, error: BadRequest) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error", "code": 400}}, 400)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_request, error: RequestValidationError) -> JSONResponse:
        message = "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors())
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "code": 400}}, 400)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok", "kernel": kernel}

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        entry = {"id": model_name, "object": "model", "created": created, "owned_by": "hopper-moe", "kernel": kernel}
        return {"object": "list", "data": [{**entry, "max_model_len": engine.model.config.max_position_embeddings}]}

    async def answer(body: TextBody, kind: str):
        body.check_model(model_name)
        request = engine_request(body, engine)
        completion = await asyncio.wrap_future(engine.submit(request))
        choice, usage = choice_text(body, request, completion, engine.tokenizer)
        reply = {
            "id": f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model_name,
            "system_fingerprint": f"hopper-moe-cpu-{kernel}",
            "choices": [{"index": 0, **choice, "logprobs": None}],
            "usage": usage,
        }
        return StreamingResponse(_events(reply, body), media_type="text/event-stream") if body.stream else reply

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody):
        return await answer(body, "chat.completion")

    @app.post("/v1/completions")
    async def completions(body: CompletionBody):
        return await answer(body, "text_completion")

    return app


async def _events(reply: dict, body: TextBody):
    """The finished answer as server-sent events: one chunk of text, then (if asked for) the usage, then the end mark."""
    usage, choice = reply.pop("usage"), reply["choices"][0]
    if "message" in choice:
        choice["delta"] = choice.pop("message")
        reply["object"] = "chat.completion.chunk"
    yield f"data: {json.dumps(reply)}\n\n"
    if (body.stream_options or {}).get("include_usage"):
        yield f"data: {json.dumps({**reply, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


def serve(
    model: str, *, host: str = "127.0.0.1", port: int = 30000, kernel: str | None = None, log_level: str = "warning"
) -> None:
    """Load MODEL (a checkpoint folder) and serve it until stopped. Kernel None: HOPPER_MOE_KERNEL, `reference` for auto.

    Raises `Refusal` when the checkpoint or kernel cannot be served, before any weight is read.
    """
    if kernel is None:
        chosen = settings().kernel
        kernel = "reference" if chosen == "auto" else chosen
    started = time.time()
    loaded, tokenizer = load(model, kernel)
    app = create_app(Engine(loaded, tokenizer), Path(model).resolve().name, kernel)
    click.echo(f"CPU host: {model} with kernel {kernel} on http://{host}:{port}/v1 (loaded in {time.time() - started:.1f} s)")
    uvicorn.run(app, host=host, port=port, log_level=log_level, timeout_graceful_shutdown=STOP)


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=30000, show_default=True)
@click.option("--kernel", type=click.Choice(CPU_KERNELS), help="Default: HOPPER_MOE_KERNEL, else reference.")
def main(model: str, host: str, port: int, kernel: str | None) -> None:
    """Serve MODEL, a DeepSeek-V4 checkpoint folder with FP4 experts, on OpenAI endpoints of this CPU."""
    serve(model, host=host, port=port, kernel=kernel)


if __name__ == "__main__":
    try:
        main()
    except Refusal as refusal:
        sys.exit(f"cpu host: {refusal}")
