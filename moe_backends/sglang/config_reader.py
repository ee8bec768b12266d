"""Check that SGLang's own reader accepts the model's config.json, including keys that are not read here."""

from __future__ import annotations

import contextlib
import io

from hopper_moe.quantization.checkpoint_location import ModelSource


def reader_refusal(source: ModelSource, *, trust_remote_code: bool = False) -> str | None:
    """Why SGLang could not read config.json, as one sentence; None: it can."""
    from sglang.srt.utils.hf_transformers import get_config

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            get_config(source.model, trust_remote_code=trust_remote_code, revision=source.revision)
    except Exception as error:  # whatever SGLang, transformers or a checkpoint's own code raise: the server would not start
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:2] if line.strip())
        reason = "".join(character for character in reason if character.isprintable())[:300].rstrip(".:")
        return (
            f"SGLang cannot read config.json of {source.model} ({type(error).__name__}{': ' + reason if reason else ''}): fetch "
            "the file again."
        )
    return None
