"""An OpenAI endpoint through OpenAI's own client: its address and key, what it lists, what it answers."""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any

import httpx
import openai
from sgl_eval.types import Sample

from hopper_moe.eval.answers import BadAnswer, error_words, read_answer
from hopper_moe.eval.faults import page_words, request_failed
from hopper_moe.eval.interruptible import InterruptibleClient
from hopper_moe.launch.proxies import proxy_for
from hopper_moe.launch.secrets import LONG_ENOUGH, NO_KEY, redact
from hopper_moe.quantization.errors import Refusal

LISTING_TIMEOUT = 30.0  # seconds for /models, which needs no generation


class Endpoint:
    """Sends one request at a time per thread. Raises `Refusal` for an address, key or proxy that no request can be sent with."""

    def __init__(self, base_url: str, api_key: str, longest: float) -> None:
        url = _checked_address(base_url)
        _check_key(api_key)
        _check_variables(url)
        self._api_key, self._longest = api_key, longest
        self.shown_url = self.shown(base_url)
        try:
            self._http = InterruptibleClient(longest)
            if proxy := proxy_for(url):
                httpx.Proxy(proxy)  # refuses here what no request could use
            self._client = openai.OpenAI(base_url=str(url), api_key=api_key, http_client=self._http, max_retries=0)
        except (openai.OpenAIError, httpx.InvalidURL, ValueError, ImportError, OSError) as error:
            words = redact(str(error), api_key)
            raise Refusal(f"{self.shown_url} cannot be reached ({words}): check --base-url and the proxy variables.") from error

    def shown(self, text: str) -> str:
        """`text` without this endpoint's secrets, for whatever is printed or written."""
        return redact(text, self._api_key)

    def models(self) -> list[dict[str, Any]]:
        """The entries of /models that have a name. Raises `RequestFailed`."""
        longest = min(LISTING_TIMEOUT, self._longest)
        try:
            body = _json(self._client.models.with_raw_response.list(timeout=longest).http_response)
            entries = body.get("data") if isinstance(body, dict) else body
            if not isinstance(entries, list):
                raise BadAnswer(f"no list of models: {error_words(body) or 'JSON of another form'}")
        except Exception as error:  # whatever a server can make openai, httpx, ssl, h11 and json raise
            raise request_failed(error, self._api_key, longest) from error
        return [entry for entry in entries if isinstance(entry, dict) and _is_name(entry.get("id"))]

    def ask(self, **request: Any) -> Sample:
        """One answer; `request` as `openai.OpenAI().chat.completions.create` takes it. Raises `RequestFailed`."""
        start = time.time()
        try:
            reply = self._client.chat.completions.with_raw_response.create(**request)
            sample = read_answer(_json(reply.http_response), start, time.time())
        except Exception as error:  # as above
            raise request_failed(error, self._api_key, self._longest) from error
        if len(self._api_key) >= LONG_ENOUGH:  # a shorter one may be somebody's right answer
            sample.text = self.shown(sample.text)
            sample.reasoning_content = sample.reasoning_content and self.shown(sample.reasoning_content)
        return sample

    def interrupt(self) -> None:
        """Requests in flight fail now, and every later one. Safe in a signal handler."""
        self._http.interrupt()


def _json(response: httpx.Response) -> Any:
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(page_words(response.content)) from error


def _is_name(name: Any) -> bool:
    """A model's name that can be sent back: text, without half surrogate pairs."""
    return isinstance(name, str) and bool(name) and name.isprintable()


def _checked_address(base_url: str) -> httpx.URL:
    shown = redact(base_url)
    if not re.match(r"https?://", base_url, re.IGNORECASE):
        raise Refusal(f"--base-url {shown} does not begin with http:// or https://: write http://HOST:PORT/v1.")
    authority, slash, path = base_url.split("://", 1)[1].partition("/")
    if authority.count(":") > 1 and "[" not in authority and "@" not in authority:
        host, port = authority.rsplit(":", 1)
        raise Refusal(f"--base-url {shown} has an IPv6 address without brackets: write http://[{host}]:{port}{slash}{path}.")
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise Refusal(f"--base-url {shown} is no address ({redact(str(error))}): write http://HOST:PORT/v1.") from error
    if not url.host or url.port is not None and not 0 < url.port < 65536:
        raise Refusal(f"--base-url {shown} has no host, or a port beyond 65535: write http://HOST:PORT/v1.")
    if url.query or url.fragment:
        raise Refusal(f"--base-url {shown} has a query or fragment: give what comes before it, mostly http://HOST:PORT/v1.")
    for tail in ("/chat/completions", "/completions", "/models"):
        if url.path.rstrip("/").endswith(tail):
            raise Refusal(f"--base-url {shown} names one of the endpoint's functions: leave {tail} out.")
    return url


def _check_key(api_key: str) -> None:
    if not api_key:
        raise Refusal(f"--api-key is empty: leave it out, and {NO_KEY} is sent, which servers without keys take.")
    if bad := [i for i, c in enumerate(api_key) if not "!" <= c <= "~"]:
        raise Refusal(
            f"the API key (--api-key or OPENAI_API_KEY) has a space, line break or non-ASCII character at position {bad[0] + 1} "
            "of its characters: HTTP cannot send that; take it out."
        )


def _check_variables(url: httpx.URL) -> None:
    """What OpenAI's client and TLS read from the environment, and fail at with every request."""
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        value = os.environ.get(name, "")
        if not (value.isascii() and value.isprintable()):
            raise Refusal(f"{name} has a line break or non-ASCII character, which HTTP cannot send: mend or unset it.")
    if url.scheme == "https":
        try:
            httpx.create_ssl_context()
        except OSError as error:
            names = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
            said = ", ".join(f"{name}={os.environ[name]}" for name in names)
            raise Refusal(
                f"the certificates of {said or 'this machine'} cannot be read ({error.strerror}): mend or unset it."
            ) from None
