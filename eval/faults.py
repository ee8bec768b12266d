"""What went wrong with a request, in words that lead out, and whether asking again can help."""

from __future__ import annotations

import json
import math
import re
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime

import httpx
import openai

from hopper_moe.eval.answers import BadAnswer, error_words
from hopper_moe.launch.proxies import proxy_for
from hopper_moe.launch.secrets import NO_KEY, redact

LONGEST_WAIT = 120.0  # seconds that a Retry-After may ask for; a question whose server asks for more is given up
_AGAIN = (408, 409, 425, 429)  # of the 4xx
_ONE_QUESTION = (400, 413, 422)  # says nothing about the next question
_LONGEST_WORDS = 300  # characters of the server's own

_ADVICE = {
    400: "the server does not take this request: look at its words, and at options that send fields beyond OpenAI's protocol",
    403: "the API key is not allowed to do this: ask whoever runs the server, or give another --api-key",
    404: "there is no such address or model: check --base-url, which mostly ends in /v1, and --model",
    405: "this address takes no questions: check --base-url, which mostly ends in /v1",
    407: "the proxy asks for a name and password: put them into its address, or the server's host into NO_PROXY",
    413: "the question is too long for the server",
    429: "the server takes no more requests now: give a lower --concurrency, or the same command later",
}
_ADVICE[422] = _ADVICE[400]


class RequestFailed(Exception):
    """A request without an answer. The text is one sentence without secrets.

    `again`: asking again may help. `wait`: seconds that the server asks to wait before. `replied`: there was a whole HTTP reply,
    `status` its status when that, or an error inside it, says what is wrong.
    """

    def __init__(self, what: str, *, again: bool, replied: bool, wait: float | None = None, status: int | None = None) -> None:
        super().__init__(what)
        self.again, self.replied, self.wait, self.status = again, replied, wait, status

    @property
    def of_this_question_only(self) -> bool:
        return self.status in _ONE_QUESTION


def request_failed(error: Exception, api_key: str, longest: float) -> RequestFailed:
    """Any exception of a request as a sentence; `longest` is the seconds that it had."""
    for cause in _causes(error):  # under whatever OpenAI's client makes of a body that it cannot decode
        if isinstance(cause, (openai.APIStatusError, httpx.HTTPStatusError)):
            return _of_status(cause.response, api_key)
    if isinstance(error, BadAnswer):
        again = error.status is None or asking_again_helps(error.status)
        return RequestFailed(f"it sent {plain(str(error), api_key)}", again=again, replied=True, status=error.status)
    return RequestFailed(plain(_connection_words(error, longest), api_key), again=True, replied=False)


def asking_again_helps(status: int) -> bool:
    return status >= 500 or status in _AGAIN


def plain(words: str, *secrets: str) -> str:
    """A server's words on one line of a few hundred printable characters, without secrets."""
    line = " ".join(redact(words, *secrets).split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= _LONGEST_WORDS else line[:_LONGEST_WORDS] + "..."


def page_words(content: bytes) -> str:
    """What a body that is no JSON looks like."""
    text = content[:4096].decode("utf-8", "replace").strip()
    if not text:
        return "nothing"
    if re.match(r"<(!doctype|html|head|body)", text, re.IGNORECASE):
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        return f"an HTML page ({' '.join(title[1].split())})" if title else "an HTML page"
    return f"text that is no JSON: {text[:80]!r}"


def _of_status(response: httpx.Response, api_key: str) -> RequestFailed:
    status = response.status_code
    advice = _key_advice(api_key) if status == 401 else _ADVICE.get(status)
    what = f"HTTP {status} from {response.request.url}: {plain(_words_of(response), api_key)}"
    wait, again = _retry_after(response.headers), asking_again_helps(status)
    if again and wait is not None and wait > LONGEST_WAIT:
        again = False
        advice = f"it asks to wait {wait:.0f} s, more than the {LONGEST_WAIT:.0f} s that a run waits: repeat the command then"
    if 300 <= status < 400:
        advice = "a redirect that leads nowhere: check --base-url"
    return RequestFailed(
        redact(f"{what} ({advice})" if advice else what, api_key), again=again, replied=True, wait=wait, status=status
    )


def _key_advice(api_key: str) -> str:
    known = "the API key is missing" if api_key == NO_KEY else "the API key is not accepted"
    return f"{known}: give --api-key or set OPENAI_API_KEY"


def _words_of(response: httpx.Response) -> str:
    with suppress(ValueError, RecursionError):
        return error_words(json.loads(response.content)) or response.reason_phrase or "no reason given"
    return page_words(response.content)


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds, from a number or an HTTP date; the date is compared with the server's own clock where it tells it."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,12}(\.\d*)?", value):
        return float(value)
    then, now = _date(value), _date(headers.get("date", ""))
    return None if then is None else max(0.0, then - (time.time() if now is None else now))


def _date(value: str) -> float | None:
    with suppress(ValueError, TypeError, IndexError, OverflowError):
        seconds = parsedate_to_datetime(value).timestamp()
        return seconds if math.isfinite(seconds) else None
    return None


def _connection_words(error: Exception, longest: float) -> str:
    chain = list(_causes(error))
    where = _where(chain)
    for cause in chain:  # the kinds of a connection that was never there, deepest facts first
        if isinstance(cause, socket.gaierror):
            return f"the name of {where} is not known (DNS: {cause.strerror})"
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"TLS: the certificate of {where} is not trusted ({cause.verify_message}): SSL_CERT_FILE may name its issuer"
        if isinstance(cause, ssl.SSLError):
            return f"TLS: {where} and this client do not understand each other ({cause.reason or cause}): is it https?"
        if isinstance(cause, ConnectionRefusedError):
            return f"{where} refused the connection: nothing listens there"
        if isinstance(cause, (ConnectionResetError, BrokenPipeError)):
            return f"{where} reset the connection"
    for cause in chain:
        if isinstance(cause, httpx.ConnectTimeout):
            return f"no connection to {where} in time: a firewall may be between"
        if isinstance(cause, httpx.TimeoutException):
            return f"no whole answer from {where} within {longest:g} s"
        if isinstance(cause, httpx.TooManyRedirects):
            return f"{where} redirects in a circle: check --base-url"
        if isinstance(cause, httpx.ProxyError):
            return f"the proxy on the way to {where} failed ({cause}): put the host into NO_PROXY if it needs none"
        if isinstance(cause, httpx.DecodingError):
            return f"the body from {where} is compressed wrongly ({cause})"
        if isinstance(cause, httpx.RemoteProtocolError):
            return f"{where} closed the connection within its answer or speaks no HTTP ({cause})"
    last = chain[-1]
    return f"the request to {where} failed ({type(last).__name__}: {last})"


def _where(chain: list[BaseException]) -> str:
    """Whom the request was sent to: after a redirect not the endpoint itself."""
    for cause in reversed(chain):
        with suppress(RuntimeError):  # httpx raises it for an exception without its request
            request = getattr(cause, "request", None)
            if request is None:
                continue
            url = request.url
            proxy = proxy_for(url)
            return f"{url.host}:{url.port or url.scheme}" + (f" (through the proxy {proxy})" if proxy else "")
    return "the server"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it was raised from, without circles."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__
