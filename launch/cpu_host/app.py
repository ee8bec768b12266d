"""HTTP endpoints of the CPU host: /health, /v1/models, /v1/chat/completions, /v1/completions."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from hopper_moe.launch.cpu_host.api import ChatBody, CompletionBody, TextBody, check_model, choice_text, engine_request
from hopper_moe.launch.cpu_host.engine import Engine
from hopper_moe.launch.cpu_host.errors import add_error_handlers, require_key


def create_app(engine: Engine, model_name: str, kernel: str, api_key: str | None = None) -> FastAPI:
    """The endpoints over `engine`. With `api_key`, every request but /health must carry it."""
    app = FastAPI(title="hopper-moe CPU host")
    add_error_handlers(app)
    if api_key is not None:
        require_key(app, api_key)
    entry = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "hopper-moe", "kernel": kernel}
    entry["max_model_len"] = engine.model.config.max_position_embeddings

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok", "kernel": kernel}

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, object]:
        check_model(name, model_name)
        return entry

    async def answer(body: TextBody, kind: str):
        check_model(body.model, model_name)
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


async def _events(reply: dict[str, Any], body: TextBody):
    """The finished answer as server-sent events: one chunk of text, then (if asked for) the usage, then the end mark."""
    usage, choice = reply.pop("usage"), reply["choices"][0]
    if "message" in choice:
        choice["delta"] = choice.pop("message")
        reply["object"] = "chat.completion.chunk"
    yield f"data: {json.dumps(reply)}\n\n"
    if (body.stream_options or {}).get("include_usage"):
        yield f"data: {json.dumps({**reply, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"
