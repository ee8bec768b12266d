"""Redaction of secrets (API keys, passwords), for all code that prints or writes text that may contain one."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from urllib.parse import quote, quote_plus

HIDDEN = "***"
NO_KEY = "EMPTY"  # sent by clients to a server without keys; not a secret
LONG_ENOUGH = 8  # characters; shorter secrets are hidden as whole words only: "1" stays in "HTTP 401"
_SECRET_FLAG = re.compile(r"-(key|password|secret|token)$")
_PASSWORD_FLAG = "--ssl-keyfile-password"  # of SGLang, and its shortened forms; --ssl-keyfile itself is a path
_KEY_FLAGS = ("--api-key", "--admin-api-key")
_IN_ADDRESS = re.compile(r"(?<=://)[^/?#\s]*@")


def redact(text: str, *secrets: str | None) -> str:
    """`text` with `***` for every secret, plain or escaped for JSON or an address, and for passwords in addresses."""
    for secret in secrets:
        if not secret or secret == NO_KEY:
            continue
        forms = {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], quote(secret, "", errors="replace")}
        forms.add(quote_plus(secret, errors="replace"))
        for form in sorted(forms, key=len, reverse=True):
            pattern = re.escape(form) if len(form) >= LONG_ENOUGH else rf"(?<!\w){re.escape(form)}(?!\w)"
            text = re.sub(pattern, HIDDEN, text)
    return _IN_ADDRESS.sub(f"{HIDDEN}@", text)


def shown_command(command: Sequence[str]) -> str:
    """A command as one line, quoted for a shell, with the values of secret flags hidden."""
    shown, hide_next = [], False
    for word in command:
        flag, equals, _ = word.partition("=")
        if hide_next:
            shown.append(HIDDEN)
        elif equals and _takes_secret(flag):
            shown.append(f"{flag}={HIDDEN}")
        else:
            shown.append(shlex.quote(redact(word)))
        hide_next = not hide_next and not equals and _takes_secret(word)
    return " ".join(shown)


def _takes_secret(flag: str) -> bool:
    """Whether the flag's value is a secret. argparse accepts abbreviations: --api is --api-key."""
    flag = flag.lower().replace("_", "-")
    if not flag.startswith("--") or len(flag) < 4:
        return False
    shortened = any(name.startswith(flag) for name in _KEY_FLAGS) or (_PASSWORD_FLAG.startswith(flag) and flag > "--ssl-keyfile")
    return shortened or bool(_SECRET_FLAG.search(flag))
