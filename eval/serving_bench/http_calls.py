"""Requests to a server that may be gone: a failure is one sentence."""

from __future__ import annotations

from typing import Any

import httpx

from hopper_moe.quantization.errors import Refusal


def get(url: str, timeout: float) -> httpx.Response:
    """The reply, whatever its status."""
    return _send("GET", url, timeout=timeout)


def post(url: str, body: dict[str, Any], timeout: float) -> httpx.Response:
    reply = post_anyhow(url, body, timeout)
    if reply.status_code != 200:
        raise Refusal(f"{url} answered with HTTP {reply.status_code}: {reply.text[:300]}")
    return reply


def post_anyhow(url: str, body: dict[str, Any], timeout: float) -> httpx.Response:
    """The reply, whatever its status."""
    return _send("POST", url, json=body, timeout=timeout)


def _send(method: str, url: str, **how: Any) -> httpx.Response:
    how |= {"trust_env": False, "verify": url.startswith("https:")}  # servers of our own: no proxy; reading certificates is slow
    try:
        return httpx.request(method, url, **how)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Refusal(f"{url} does not answer ({str(error) or type(error).__name__}): is the server up?") from error
