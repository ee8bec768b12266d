"""Request bodies of the CPU host: supported fields, refused fields, and the text of answers."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from jinja2 import meta
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError
from transformers.utils.chat_template_utils import _compile_jinja_template

from hopper_moe.launch.cpu_host.engine import Completion, Engine, Request
from hopper_moe.launch.cpu_host.errors import BadRequest

END_THINK = "</think>"
START_THINK = "<think>"
MIN_TEMPERATURE = 1e-5  # logits divided by less may overflow, which would fail the whole batch

# OpenAI and SGLang fields that would change the answer and are not implemented; only their neutral values pass.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "min_tokens": (0,),
    "ignore_eos": (False,),
}
_WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "separate_reasoning"}


def check_model(asked: str | None, served: str) -> None:
    """Raises `BadRequest` (404) for another model's name; None stands for the one that is served."""
    if asked is not None and asked != served:
        raise BadRequest(
            f"model {asked!r} is not served here: ask for {served!r}.", status=404, code="model_not_found", param="model"
        )


class TextBody(BaseModel):
    """Fields that both endpoints support. Unknown fields are refused."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None

    @field_validator("temperature")
    @classmethod
    def _not_tiny(cls, value: float | None) -> float | None:
        if value and value < MIN_TEMPERATURE:
            raise PydanticCustomError("temperature", f"{value} is too small: give 0 or at least {MIN_TEMPERATURE}")
        return value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: str | list[str] | None) -> str | list[str] | None:
        if "" in ([value] if isinstance(value, str) else value or []):
            raise PydanticCustomError("stop", "an empty string would stop every answer: leave it out")
        return value

    def prompt_ids(self, tokenizer) -> list[int]:
        raise NotImplementedError

    def token_limit(self) -> int | None:
        return self.max_tokens


class CompletionBody(TextBody):
    """/v1/completions: one prompt, as text or as token ids."""

    prompt: str | list[int]

    def prompt_ids(self, tokenizer) -> list[int]:
        return _tokens(tokenizer, self.prompt) if isinstance(self.prompt, str) else self.prompt


class ChatBody(TextBody):
    """/v1/chat/completions. `chat_template_kwargs` reach the template; one it does not use is refused."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, Any] | None = None

    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def prompt_ids(self, tokenizer) -> list[int]:
        template = tokenizer.chat_template
        if not template:
            raise BadRequest("this checkpoint's tokenizer has no chat template: use /v1/completions with the whole prompt.")
        options = self.chat_template_kwargs or {}
        for key in options:
            if key not in _template_options(template) or key in _reserved(tokenizer):
                raise BadRequest(f"chat_template_kwargs {key!r} has no meaning to this model's chat template: leave it out.")
        messages = [{"role": m.get("role"), "content": _plain_text(m.get("content"))} for m in self.messages]
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        except Exception as error:  # a template is a program of the checkpoint and may raise anything for unusual messages
            raise BadRequest(f"this model's chat template refuses these messages: {error}") from error
        return _tokens(tokenizer, text)


def _tokens(tokenizer, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"the prompt holds half a surrogate pair at character {error.start}: leave it out.") from error
    return tokenizer(text, add_special_tokens=False).input_ids


@lru_cache
def _template_options(template: str) -> frozenset[str]:
    """Undeclared variables of the template."""
    environment = _compile_jinja_template(template).environment
    return frozenset(meta.find_undeclared_variables(environment.parse(template)) - set(environment.globals))


def _reserved(tokenizer) -> set[str]:
    """Names that a client may not set: the messages, arguments of `apply_chat_template`, special tokens."""
    return {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map}


def _plain_text(content: Any) -> str:
    """Message content as text: a string, or a list of OpenAI text parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
    ):
        return "".join(p["text"] for p in content)
    raise BadRequest("message content must be a string or text parts: this host serves text only.")


def engine_request(body: TextBody, engine: Engine) -> Request:
    """Check `body` and turn it into a generation request. Raises `BadRequest` naming field and value."""
    for name, value in (body.model_extra or {}).items():
        if name in _WITHOUT_EFFECT or value is None:
            continue
        if name not in _NEUTRAL:
            raise BadRequest(f"field {name!r} is unknown to the CPU host: leave it out.", param=name)
        if value not in _NEUTRAL[name]:
            raise BadRequest(f"{name}={value!r} is not implemented by the CPU host: leave it out.", param=name)
    prompt = body.prompt_ids(engine.tokenizer)
    context = engine.model.config.max_position_embeddings
    room = context - len(prompt)
    if not prompt or room < 1:
        code = "context_length_exceeded" if prompt else None
        raise BadRequest(f"the prompt has {len(prompt)} tokens, and this model takes 1 to {context - 1}.", code=code)
    if any(not 0 <= token < engine.model.config.vocab_size for token in prompt):
        raise BadRequest(f"the prompt has token ids outside 0..{engine.model.config.vocab_size - 1}.")
    limit = body.token_limit()
    if limit is not None and limit > room:
        raise BadRequest(
            f"max_tokens {limit} and a prompt of {len(prompt)} tokens exceed this model's context of {context}.",
            code="context_length_exceeded",
        )
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Request(
        prompt=tuple(prompt),
        max_tokens=limit or room,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=min(max(body.top_k or 0, 0), engine.model.config.vocab_size),  # slices accept no number beyond 64 bits
        min_p=body.min_p or 0.0,
        seed=body.seed,
        stop=stop,
    )


def choice_text(body: TextBody, request: Request, completion: Completion, tokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """(choice without index, usage). A chat answer that opened in thinking mode is split at `</think>`."""
    tokens, reasoning = list(completion.tokens), []
    thinking = isinstance(body, ChatBody) and request.prompt[-1] == tokenizer.convert_tokens_to_ids(START_THINK)
    if thinking:
        end = tokenizer.convert_tokens_to_ids(END_THINK)
        cut = tokens.index(end) if end in tokens else len(tokens)
        reasoning, tokens = tokens[:cut], tokens[cut + 1 :]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    for stop in request.stop:
        text = text.split(stop, 1)[0]
    usage = {
        "prompt_tokens": len(request.prompt),
        "completion_tokens": len(completion.tokens),
        "total_tokens": len(request.prompt) + len(completion.tokens),
        "completion_tokens_details": {"reasoning_tokens": len(reasoning)},
    }
    if not isinstance(body, ChatBody):
        return {"text": text, "finish_reason": completion.finish_reason}, usage
    message = {"role": "assistant", "content": text}
    if thinking:
        message["reasoning_content"] = tokenizer.decode(reasoning, skip_special_tokens=True)
    return {"message": message, "finish_reason": completion.finish_reason}, usage
