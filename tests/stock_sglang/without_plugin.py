"""Run with SGLANG_PLUGINS naming another plugin: prints as JSON what stock SGLang does when ours is not there. Argument: a model
folder."""

import contextlib
import io
import json
import sys

import stock

stock.simulate_sm90()
from sglang.srt.plugins import load_plugins  # noqa: E402

load_plugins()
from sglang.srt.layers.moe.utils import resolve_moe_runner_backend  # noqa: E402
from sglang.srt.server_args import prepare_server_args  # noqa: E402

found = {}
errors = io.StringIO()
with contextlib.redirect_stderr(errors):
    try:
        prepare_server_args(["--model-path", sys.argv[1], "--moe-runner-backend", "hopper_moe"])
        found["parser"] = "accepted"
    except SystemExit as exit:
        found["parser"] = f"exit {exit.code}: " + errors.getvalue().strip().splitlines()[-1]
try:
    resolve_moe_runner_backend("hopper_moe")
    found["worker"] = "accepted"
except ValueError as error:
    found["worker"] = str(error)
stock.publish(stock.resolve(sys.argv[1], backend="triton"))
found["quant_method"] = type(stock.fused_moe().quant_method).__name__
print(json.dumps(found))
