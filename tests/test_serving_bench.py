"""eval/serving_bench as far as it needs no GPU: starting and ending a server, and everything that reads results."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from click.testing import CliRunner
from processes import SLEEPER, has_said, runs, wait_for
from stub_server import Stub

from hopper_moe.eval.serving_bench import bench, breakdown, compare, rebalance, report, serve, soak
from hopper_moe.eval.serving_bench.bench import decode_pace, first_round, loads
from hopper_moe.eval.serving_bench.random_checkpoint import mtp_shapes, random_state, tensor_shapes
from hopper_moe.eval.serving_bench.server import log_facts, start
from hopper_moe.launch.ports import free_port
from hopper_moe.launch.server_process import servers
from hopper_moe.quantization.checkpoint import write_checkpoint
from hopper_moe.quantization.checkpoint_names import QUANTIZATION_CONFIG
from hopper_moe.quantization.errors import Refusal

# Answers /health with 503 twice, then 200; a child of it sleeps, as SGLang's workers do. argv: ... --port N ...
FAKE = """
import http.server, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
child = subprocess.Popen(["sleep", "1000"])
print("child", child.pid, flush=True)
if "--crash" in sys.argv:
    sys.exit("out of memory")
calls = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global calls
        calls += 1
        self.send_response(200 if calls > 2 else 503)
        self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
LAUNCHER = (sys.executable, "-c", FAKE)


def test_a_server_is_waited_for_and_ended_with_its_children(tmp_path):
    log = tmp_path / "server.log"
    with servers() as group:
        server = start(group, "model", port=free_port(), log=log, launcher=LAUNCHER, ready_timeout=120, arguments=("--x",))
        assert server.is_alive() and 0 < server.seconds_to_ready < 120
        assert server.command[3:] == ["--model-path", "model", "--moe-runner-backend", "hopper_moe", "--host", "127.0.0.1",
                                      "--port", str(server.port), "--x"]  # fmt: skip
    assert not server.is_alive()
    wait_for(lambda: not runs(log))


def test_a_server_that_ends_is_reported_with_its_words(tmp_path):
    """Also while another server answers on its port. What it has started ends at once, whatever becomes of the others."""
    log, port, launcher = tmp_path / "server.log", free_port(), (sys.executable, "-c", FAKE)
    with servers() as group:
        crashes = group.start([*launcher, "--port", str(port), "--crash"], port=port, log=log)
        other = group.start([*launcher, "--port", str(port)], port=port, log=tmp_path / "other.log")
        other.wait_until_ready(120)
        crashes.process.wait()
        with pytest.raises(Refusal, match="(?s)the server ended with code 1; .*log ends with:.*out of memory"):
            crashes.wait_until_ready(120)
        wait_for(lambda: not runs(log))
        assert other.is_alive()


def test_a_port_that_another_server_has_is_refused(tmp_path):
    """That one answers /health as ours would."""
    with Stub() as stub, servers() as group, pytest.raises(Refusal, match=r"port \d+ of 127.0.0.1 cannot be used"):
        start(group, "model", port=stub.server.server_address[1], log=tmp_path / "log", launcher=LAUNCHER)


def test_of_two_servers_that_take_the_same_port_only_one_is_ready(tmp_path):
    """Both ports were free when they started: SGLang loads for a minute before it listens."""
    late = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.1)\n" + FAKE
    port, gates = free_port(), [tmp_path / "first", tmp_path / "second"]
    with servers() as group:
        first, second = (
            group.start([sys.executable, "-c", late, str(gate), "--port", str(port)], port=port, log=gate.with_suffix(".log"))
            for gate in gates
        )
        gates[0].touch()
        first.wait_until_ready(120)
        gates[1].touch()
        with pytest.raises(Refusal, match="ended with code 1(.|\n)*in use"):
            second.wait_until_ready(120)


def test_serve_gives_up_and_says_what_the_server_said(tmp_path, sglang):
    """The command line end to end."""
    sglang("import sys; sys.exit(f'{sys.argv[1:3]} is not my kind')")
    options = ["--log", str(tmp_path / "log"), "--ready-timeout", "120", "--port", str(free_port())]
    result = CliRunner().invoke(serve.main, [*options, "/no/such/model", "--", "--nope"])
    assert result.exit_code == 2 and result.output.startswith("serve: the server ended with code 1; ")
    assert result.output.endswith("ends with:\n['--model-path', '/no/such/model'] is not my kind\n")


@pytest.mark.parametrize("stagger", [[], ["--stagger", "0.1"]])
def test_a_benchmark_that_is_ended_leaves_no_server_behind(tmp_path, sglang, stagger):
    sglang(SLEEPER)
    options = ["--backends", "a,b", "--port", str(free_port()), "--out", str(tmp_path), *stagger]
    command = [sys.executable, "-m", "hopper_moe.eval.serving_bench.bench", "model", *options]
    logs = [tmp_path / f"server-{backend}.log" for backend in ("ab" if stagger else "a")]
    process = subprocess.Popen(command)
    try:
        wait_for(lambda: all(map(has_said, logs)))
        process.terminate()
        assert process.wait(120) == 143
        assert not any(map(runs, logs))
    finally:
        process.kill()
        for log in logs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(log.read_text()), signal.SIGKILL)


def test_a_server_that_does_not_start_costs_the_benchmark_its_backend_only(tmp_path, sglang):
    sglang(FAKE.replace('"--crash" in sys.argv', 'sys.argv[4] == "bad"'))
    with ThreadPoolExecutor(2) as pool, servers() as group:
        started, problems = bench.start_all(group, pool, "model", ["good", "bad"], tmp_path, free_port(), None, [])
        assert list(started) == ["good"] and started["good"].is_alive()
        assert len(problems) == 1 and problems[0].startswith("bad: the server ended") and "out of memory" in problems[0]
    assert not started["good"].is_alive()


def test_servers_that_fill_the_gpus_run_in_turn(tmp_path, sglang, monkeypatch):
    sglang(FAKE)
    alive: list[tuple[list[str], list[bool]]] = []
    seen = []

    def measure_all(started, *_) -> list[str]:
        seen.extend(started.values())
        alive.append((list(started), [server.is_alive() for server in seen]))
        return []

    monkeypatch.setattr(bench, "measure_all", measure_all)
    monkeypatch.setattr(bench, "gpus_held", lambda _: {"gpus": 2})
    options = ["model", "--backends", "a,b", "--port", str(free_port()), "--out", str(tmp_path), "--in-turn"]
    result = CliRunner().invoke(bench.main, options)
    assert result.exit_code == 0, result.output
    assert alive == [(["a"], [True]), (["b"], [False, True])] and not any(server.is_alive() for server in seen)
    assert [entry["gpus"] for entry in json.loads((tmp_path / "servers.json").read_text()).values()] == [2, 2]
    result = CliRunner().invoke(bench.main, [*options, "--then", "true"])
    assert result.exit_code == 2 and "--in-turn runs one at a time" in result.output


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (soak.main, ["URL", "--out", "OUT"], "URL/generate does not answer"),
        (rebalance.main, ["URL", "--log", "LOG", "--out", "OUT"], "URL/generate does not answer"),
        (compare.main, ["ask", "URL", "OUT"], "URL/generate does not answer"),
        (breakdown.main, ["URL", "--concurrency", "1", "--out", "OUT"], "URL/start_profile does not answer"),
        (report.main, ["FOLDER"], "lacks serving.jsonl or servers.json"),
        (bench.main, ["model", "--concurrency", "x", "--out", "OUT"], "--concurrency 'x' is not a list of positive numbers"),
        (bench.main, ["model", "--also", "8192", "--out", "OUT"], "--also '' is not a list of positive numbers"),
        (bench.main, ["model", "--concurrency", "8,0", "--out", "OUT"], "--concurrency '8,0' is not a list of positive numbers"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(tmp_path, sglang, command, arguments, said):
    url = f"http://127.0.0.1:{free_port()}"
    places = {"URL": url, "OUT": str(tmp_path / "out"), "FOLDER": str(tmp_path), "LOG": __file__}
    result = CliRunner().invoke(command, [places.get(argument, argument) for argument in arguments])
    assert result.exit_code == 2 and said.replace("URL", url) in result.output
    assert len(result.output.splitlines()) == 1 and not (tmp_path / "out").exists()


LOG = """
[2026-11-21 11:54:45] start-up: memory   3.19 GiB of experts a layer, 0.93 GiB of workspace for 8192 tokens a call
[2026-11-21 11:54:45] Load weight end. elapsed=8.66 s, type=DeepseekV4ForCausalLM, quant=fp8, fmt=e4m3, avail mem=104.24 GB, mem usage=34.83 GB.
[2026-11-21 11:54:46] Memory pool end. avail mem=104.18 GB
[2026-11-21 11:54:47] start-up: ready    4 layers, 12.76 GiB of packed experts on this rank, self-check 6.0e-03 in 0.4 s
[2026-11-21 11:54:50] Capture target decode CUDA graph end. elapsed=3.67 s, mem usage=1.58 GB, avail mem=102.58 GB.
[2026-11-21 11:54:50] max_total_num_tokens=262144, chunked_prefill_size=8192, max_prefill_tokens=16384
"""  # noqa: E501


def test_facts_of_a_log():
    """Lines of a real server (on an H200)."""
    assert log_facts(LOG) == {
        "weights_gib": 34.83, "available_after_load_gib": 104.24, "available_after_pool_gib": 104.18, "kv_tokens": 262144,
        "graph_gib": 1.58, "workspace_gib": 0.93, "packed_gib": 12.76,
    }  # fmt: skip
    assert log_facts("nothing") == {}


def answer(token_ids: list[int], logprobs: list[float], second: float) -> dict:
    return {"prompt_tokens": 3, "tokens": token_ids, "logprobs": logprobs, "second_logprobs": [second] * len(token_ids)}


def test_the_first_difference_of_two_answers():
    ours, theirs = answer([5, 6, 7], [-1.0, -2.0, -3.0], -9.0), answer([5, 6, 8], [-1.1, -2.0, -3.5], -3.6)
    found = compare.difference(ours, theirs)
    assert (found["first_difference"], found["tokens_there"]) == (2, [7, 8])
    assert found["gap"] == pytest.approx(0.1) and found["logprob_change"] == pytest.approx(0.1)
    assert compare.difference(ours, ours)["first_difference"] is None
    ended, longer = answer([5, 6], [-1.0, -2.0], -9.0), answer([5, 6, 8], [-1.5, -2.0, -3.5], -3.6)
    assert compare.difference(ended, longer) | {"gap": 0.1} == compare.difference(ended, longer) | {
        "length": 3, "first_difference": 2, "tokens_there": [None, 8], "gap": 0.1
    }  # fmt: skip
    assert "gap" not in compare.difference(longer, ended)
    told = compare.summary([ours, ours, ended], [theirs, ours, longer])
    assert (told["answers"], told["same"], told["tokens_compared"]) == (3, 1, 7)
    assert told["largest_gap_where_they_part"] == pytest.approx(0.1) and told["median_logprob_change"] == 0
    scores = compare.score_difference([-1.0, -2.0, -4.0], [-1.0, -2.5, -3.0])
    assert scores["median_change"] == 0.5 and scores["mean_shift"] == pytest.approx(-1 / 6) and 0.8 < scores["correlation"] < 1


def test_a_step_is_added_up_by_what_kernels_do():
    def kernel(name: str, ts: float, dur: float) -> dict:
        return {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur}

    events = [
        kernel("void hopper_moe::mega_moe_kernel<128>(Params)", 0, 100), kernel("nvjet_tst_64x8_64x16", 50, 20),
        kernel("flash_fwd_splitkv_mla", 100, 50), kernel("something new", 200, 10),
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 999},
    ]  # fmt: skip
    found = breakdown.summarize(events, 2)
    assert (found["step_us"], found["busy_us"]) == (105, 80)
    assert found["groups_us"] == {"routed experts": 50, "attention": 25, "dense linears": 10, "other": 5}
    shares = {"routed experts": 45, "attention": 25, "no kernel": 25, "dense linears": 5, "other": 5}
    assert found["shares_us"] == shares and sum(shares.values()) == found["step_us"]
    assert found["kernels"][0] == {"us_a_step": 50, "calls_a_step": 0.5, "name": events[0]["name"]}


METRICS = """# HELP hopper_moe:kernel_launches_total launches
hopper_moe:kernel_launches_total{kernel="mxfp4_mega",rank="0"} 4245.0
hopper_moe:kernel_launches_total{kernel="mxfp4_mega",rank="1"} 5.0
sglang:num_running_reqs{model_name="m"} 0.0
"""


def test_what_a_soak_concludes():
    assert soak.metric(METRICS, "hopper_moe:kernel_launches_total") == 4250 and soak.metric(METRICS, "nothing") is None
    idle = {"gpu_mib": 1000.0, "sglang:num_running_reqs": 0.0, "sglang:num_queue_reqs": 0.0}
    assert soak.verdict([], [idle] * 4, True, "all well", []) == []
    leaked = [idle, idle, idle, {**idle, "gpu_mib": 1000.0 + soak.GROWTH_MIB + 1}]
    for said, problems in {
        "requests failed": soak.verdict(["burst 5+5: 3"], [idle] * 4, True, "", []),
        "answer changed": soak.verdict([], [idle] * 4, False, "", []),
        "memory grew": soak.verdict([], leaked, True, "", []),
        "num_queue_reqs is 2": soak.verdict([], [idle, {**idle, "sglang:num_queue_reqs": 2.0}], True, "", []),
        "Traceback": soak.verdict([], [idle] * 4, True, "x\nTraceback (most recent call last)\n", []),
        "compiled after": soak.verdict([], [idle] * 4, True, "", ["mega_moe.so"]),
    }.items():
        assert len(problems) == 1 and said in problems[0], problems


def test_a_request_that_fails_is_counted():
    """Against a server that has no /generate: every request is a failure, none hangs or is lost."""
    import asyncio

    async def work(url: str) -> soak.Load:
        load = soak.Load(url, 1)
        await asyncio.gather(*(load.one("burst", 5, 5) for _ in range(3)))
        await load.close()
        return load

    with Stub() as stub:
        load = asyncio.run(work(stub.url.removesuffix("/v1")))
    assert load.counts["burst"] == 3 and len(load.failures) == 3


def row(backend: str, concurrency: int, tpot: float, output_len: int = 256) -> dict:
    return {
        "backend": backend, "concurrency": concurrency, "input_len": 1024, "output_len": output_len, "median_tpot_ms": tpot,
        "median_itl_ms": tpot, "median_ttft_ms": 20.0, "output_throughput": 1000 / tpot, "input_throughput": 5000 / tpot,
        "total_throughput": 6000 / tpot,
    }  # fmt: skip


def test_the_report_compares_with_the_better(tmp_path):
    rows = [row("hopper_moe", 64, 2.0), row("hopper_moe", 64, 2.2), row("marlin", 64, 3.0), row("flashinfer_mxfp4", 64, 2.5)]
    rows[0]["decode_pace"], rows[2]["decode_pace"] = 600.0, 400.0
    rows += [row("hopper_moe", 1, 1.0), row("marlin", 1, 1.0), row("hopper_moe", 1, 4.0, 1), row("marlin", 1, 5.0, 1)]
    servers = {
        b: {"gpu_gib": 20.0, "seconds_to_ready": 30.0, "weights_gib": 17.5, "gpus": 2}
        for b in ("hopper_moe", "marlin", "flashinfer_mxfp4")
    }
    servers["marlin"] |= {"available_after_load_gib": 90.0, "available_after_pool_gib": 50.5, "kv_tokens": 2097152.0}
    (tmp_path / "serving.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "servers.json").write_text(json.dumps(servers))
    result = CliRunner().invoke(report.main, [str(tmp_path)])
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "serving.md").read_text().splitlines()
    assert lines[2].startswith("| 1, 1024 |") and lines[3].startswith("| 64, 1024 | 2.10 (2.00-2.20), 2.10, 20; 477; 600 |")
    assert lines[3].endswith("| 1.19x | 1.50x |")  # median of 1000/2 and 1000/2.2, against 400; 600 against 400
    assert any(line.startswith("| 1024 | 20.0, 1250 | 20.0, 1000 |  | 1.25x |") for line in lines)
    assert {"| 64, 1024 | 1432 | 1000 | 1200 | 1.19x |", "| KV pool |  | 39.50 |  |", "| tokens in it |  | 2097152 |  |"} <= {
        *lines
    }
    assert (tmp_path / "serving.png").stat().st_size > 1000


def test_the_servers_own_pace_is_read_while_all_requests_decode():
    line = "[2026-11-21 15:18:12] Decode batch, #running-req: {}, #full token: 9, gen throughput (token/s): {}, #queue-req: 0\n"
    log = "".join(line.format(*pair) for pair in ((64, 90.5), (64, 16010.81), (64, 16011.54), (8, 7), (64, 16500.0)))
    assert decode_pace(log, 64) == pytest.approx((16010.81 + 16011.54) / 2) and decode_pace(log, 128) is None


def test_loads_are_prompts_alone_and_batches():
    planned = loads({1024: [1, 64], 8192: [1, 64]}, 256)
    assert [(load.concurrency, load.output_len) for load in first_round(planned)] == [(1, 1), (64, 32)]
    assert first_round(planned)[-1].input_len == 8192
    assert [load.num_prompts for load in loads({1024: [1, 64]}, 256, batches=1)[1:]] == [1, 64]
    assert bench.lengths("1024", "1,8", ["8192:1,64"]) == {1024: [1, 8], 8192: [1, 64]}
    assert [(p.concurrency, p.num_prompts, p.input_len, p.output_len) for p in planned] == [
        (1, 6, 8192, 1), (1, 4, 1024, 256), (64, 128, 1024, 256), (1, 4, 8192, 256), (64, 128, 8192, 256)
    ]  # fmt: skip


CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "expert_dtype": "fp4", "hidden_size": 256,
    "moe_intermediate_size": 128, "n_routed_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3, "num_hash_layers": 1,
    "vocab_size": 64, "head_dim": 64, "qk_rope_head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 1, "o_groups": 2,
    "o_lora_rank": 64, "q_lora_rank": 64, "index_head_dim": 32, "index_n_heads": 4, "index_topk": 8, "hc_mult": 2,
    "compress_ratios": [0, 4, 128], "num_nextn_predict_layers": 1, "quantization_config": QUANTIZATION_CONFIG,
    "rope_scaling": {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096},
    "rope_theta": 10000, "compress_rope_theta": 160000, "max_position_embeddings": 65536, "swiglu_limit": 10.0,
    "routed_scaling_factor": 1.5,
}  # fmt: skip


def test_a_random_checkpoint_is_whole_and_its_activations_keep_their_size(tmp_path):
    import torch

    shapes = tensor_shapes(CONFIG)
    shapes |= mtp_shapes(CONFIG, shapes)
    state = random_state(shapes, 4, torch.Generator().manual_seed(7), torch.device("cpu"))
    write_checkpoint(tmp_path / "ckpt", state, CONFIG)  # checks every tensor of every layer
    ids = state["layers.0.ffn.gate.tid2eid"]
    assert ids.shape == (64, 2) and bool((ids[:, 0] != ids[:, 1]).all()) and int(ids.max()) == 3
    assert state["mtp.0.e_proj.scale"].shape == (2, 2)
    assert float(state["layers.1.attn.wq_a.weight"].std()) == pytest.approx(256**-0.5, rel=0.05)


def test_the_scripts_say_what_they_are_for():
    package = "hopper_moe.eval.serving_bench"
    for name in ("serve", "random_checkpoint", "random_v41", "random_v3", "compare", "bench", "report", "breakdown", "soak"):
        program = f"from {package} import {name} as m; assert 'python -m {package}.{name}' in m.__doc__"
        subprocess.run([sys.executable, "-c", program], check=True)


def test_questions_are_asked_as_chats_with_log_probabilities(tmp_path):
    """In the form of SGLang's replies: the chosen token, its log probability, the two best."""

    class Chat(Stub):
        def answer(self, body: dict) -> tuple[int, dict]:
            assert (body["temperature"], body["logprobs"], body["top_logprobs"]) == (0, True, 2)
            digit = body["messages"][0]["content"][-2]
            running.append(1)
            most.append(len(running))
            time.sleep(0.05)
            running.pop()
            content = [
                {"token": token, "logprob": -0.1, "top_logprobs": [{"logprob": -0.1}, {"logprob": -0.1 - gap}]}
                for token, gap in ((digit, 2.0), ("<end>", 9.0))
            ]
            return 200, {"choices": [{"logprobs": {"content": content}}], "usage": {"prompt_tokens": 5}}

    questions, running, most = tmp_path / "questions.jsonl", [], []
    questions.write_text("".join(json.dumps({"problem": f"What is {n}?"}) + "\n" for n in range(5)))
    with Chat() as stub:
        arguments = ["ask", stub.url.removesuffix("/v1"), str(tmp_path / "a.json"), "--questions", str(questions)]
        result = CliRunner().invoke(compare.main, [*arguments, "--num-questions", "4", "--at-once", "2"])
    assert result.exit_code == 0 and max(most) <= 2, result.output
    found = json.loads((tmp_path / "a.json").read_text())["answers"]
    assert [entry["tokens"] for entry in found] == [[f"{n}", "<end>"] for n in range(4)]
    assert found[0]["second_logprobs"] == [pytest.approx(-2.1), pytest.approx(-9.1)]
    result = CliRunner().invoke(compare.main, ["diff", str(tmp_path / "a.json"), str(tmp_path / "a.json")])
    assert json.loads(result.output) == {
        "answers": 4, "same": 4, "tokens_compared": 8, "median_logprob_change": 0, "p99_logprob_change": 0,
        "largest_logprob_change": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "indices"), [(None, [0, 1, 2, 3]), ("1", [1]), ("0,2", [0, 2]), ("GPU-3e056f05", [0, 1, 2, 3]), ("", [0, 1, 2, 3])]
)
def test_the_gpus_whose_memory_is_watched(monkeypatch, given, indices):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert soak.visible(4) == indices
