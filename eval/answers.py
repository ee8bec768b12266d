"""From the JSON of /chat/completions to one answer. Nothing in it is trusted to have its type."""

from __future__ import annotations

from typing import Any

from sgl_eval.types import Sample

_LARGEST_COUNT = 1 << 53  # tokens; what JSON's numbers carry exactly


class BadAnswer(ValueError):
    """A reply with status 200 without an answer; the text says what it holds. `status`: what an error inside says of itself."""

    def __init__(self, what: str, status: int | None = None) -> None:
        super().__init__(what)
        self.status = status


def read_answer(body: Any, start: float, end: float) -> Sample:
    """The answer in a decoded reply; `start` and `end` in seconds since 1970. Raises `BadAnswer`."""
    if not isinstance(body, dict):
        raise BadAnswer(f"a JSON {_kind(body)} instead of an object")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        if words := error_words(body):
            raise BadAnswer(f"an error inside a reply with status 200: {words}", _error_status(body))
        raise BadAnswer("JSON without choices")
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise BadAnswer("choices without a message")
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length", None):
        raise BadAnswer(f"an answer that the server ended with finish_reason {reason!r}")
    reasoning = next((text for name in ("reasoning_content", "reasoning") if (text := _text(message, name))), None)
    if "content" not in message and reasoning is None:
        raise BadAnswer("a message without content")
    usage = body.get("usage")
    return Sample(
        text=_text(message, "content") or "",
        reasoning_content=reasoning,
        completion_tokens=_count(usage, "completion_tokens"),
        prompt_tokens=_count(usage, "prompt_tokens"),
        reasoning_tokens=_reasoning_tokens(usage),
        finish_reason=reason,
        generation_start_time=start,
        generation_end_time=end,
    )


def error_words(body: Any) -> str | None:
    """What an error reply says of itself: OpenAI's {"error": {"message"}}, and the forms of FastAPI, vLLM and gateways."""
    if not isinstance(body, dict):
        return None
    for name in ("error", "message", "detail", "errors"):
        found = body.get(name)
        if isinstance(found, dict):
            found = found.get("message") or found
        if found:
            return found if isinstance(found, str) else str(found)
    return None


def _error_status(body: dict[str, Any]) -> int | None:
    error = body.get("error")
    for holder in (error, body):
        code = holder.get("code", holder.get("status")) if isinstance(holder, dict) else None
        if isinstance(code, int) and 400 <= code < 600:
            return code
    return None


def _text(message: dict[str, Any], name: str) -> str | None:
    """A text, or a list of parts with text. Whole characters: two halves that meet at the border of two parts become one."""
    value = message.get(name)
    if isinstance(value, list):
        parts = [part.get("text", "") if isinstance(part, dict) else part for part in value]
        if all(isinstance(part, str) for part in parts):
            joined = "".join(parts)
            return joined.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    if value is None or isinstance(value, str):
        return value
    if name == "content":
        raise BadAnswer(f"content that is a JSON {_kind(value)}, not text")
    return None  # an extension that means something else here


def _reasoning_tokens(usage: Any) -> int | None:
    details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
    inside = _count(details, "reasoning_tokens")
    return _count(usage, "reasoning_tokens") if inside is None else inside


def _count(holder: Any, name: str) -> int | None:
    value = holder.get(name) if isinstance(holder, dict) else None
    return value if type(value) is int and 0 <= value < _LARGEST_COUNT else None


def _kind(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")
