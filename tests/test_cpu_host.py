"""The CPU host: its experts against transformers' own, batching, the OpenAI endpoints, and what it refuses."""

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from processes import wait_for
from small_checkpoint import CONFIG, make_state

from hopper_moe.eval.demo import tiny_model
from hopper_moe.eval.tiny_model.config import build_model
from hopper_moe.launch.cpu_host.api import _NEUTRAL, ChatBody, CompletionBody
from hopper_moe.launch.cpu_host.app import create_app
from hopper_moe.launch.cpu_host.engine import Engine, Request
from hopper_moe.launch.cpu_host.experts import use_kernel
from hopper_moe.launch.cpu_host.model import load
from hopper_moe.launch.ports import free_port
from hopper_moe.quantization.checkpoint import write_checkpoint
from hopper_moe.quantization.checkpoint_names import original_config, to_original_names
from hopper_moe.quantization.errors import Refusal

CHAT = [{"role": "user", "content": "Mia has 7 apples and buys 5 more. How many apples does Mia have now?"}]


@pytest.fixture(scope="module")
def packed():
    """The committed model, its experts running through packed weights and the w4a16 kernel."""
    return load(tiny_model(), "w4a16")


@pytest.fixture(scope="module")
def own():
    """The committed model with transformers' own dequantised experts."""
    return load(tiny_model(), "transformers")


@pytest.fixture(scope="module")
def client(packed):
    model, tokenizer = load(tiny_model(), "reference")
    with TestClient(create_app(Engine(model, tokenizer), "tiny", "reference")) as client:
        yield client


@torch.inference_mode()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def test_logits_equal_those_of_transformers_own_experts(packed, own, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for length in (1, 7, 40, 150):
        ids = torch.randint(7, 450, (3, length), generator=generator)
        torch.testing.assert_close(logits(packed[0], ids), logits(own[0], ids), rtol=1e-3, atol=1e-4)


def test_logits_equal_on_a_fresh_random_model(tmp_path: Path, seed: int) -> None:
    model = build_model(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".experts." in name:
                p.mul_(8)  # so that the clamp binds and the routed experts matter
    write_checkpoint(
        tmp_path / "ck", to_original_names(model.state_dict()), original_config(model.config), tokenizer_dir=tiny_model()
    )
    ids = torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(seed))
    ours, theirs = (logits(load(tmp_path / "ck", kernel)[0], ids) for kernel in ("w4a16", "transformers"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_reference_differs_only_by_activation_quantisation(packed, own, seed: int) -> None:
    model, _ = load(tiny_model(), "reference")
    ids = torch.randint(7, 450, (2, 60), generator=torch.Generator().manual_seed(seed))
    exact, quantised = logits(own[0], ids), logits(model, ids)
    error = (quantised - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.15


def test_experts_really_come_from_the_packed_layout(packed, seed: int) -> None:
    model, _ = load(tiny_model(), "w4a16")
    experts = model.model.layers[1].mlp.experts
    assert experts.gate_up_proj.numel() == experts.down_proj.numel() == 0
    ids = torch.randint(7, 450, (1, 20), generator=torch.Generator().manual_seed(seed))
    before = logits(model, ids)
    torch.testing.assert_close(before, logits(packed[0], ids))
    experts.hopper_experts.w13.cache_clear()
    experts.hopper_experts.packed.w13_packed.bitwise_xor_(0x44)  # another magnitude in every word
    assert (logits(model, ids) - before).abs().max() > 1e-2


def test_batch_of_equal_lengths_gives_the_answers_of_single_requests(packed, seed: int) -> None:
    engine = Engine(*packed)
    generator = torch.Generator().manual_seed(seed)
    requests = [Request(tuple(torch.randint(7, 450, (30,), generator=generator).tolist()), 12, temperature=0) for _ in range(6)]
    assert engine.generate(requests) == [engine.generate([r])[0] for r in requests]
    with pytest.raises(ValueError, match="one length only"):
        engine.generate([requests[0], Request((7, 8), 3, temperature=0)])


def test_a_request_whose_client_went_away_leaves_the_others_alone(packed) -> None:
    engine, gate = Engine(*packed), threading.Event()
    generate = engine.generate
    engine.generate = lambda requests: gate.wait() and generate(requests)
    engine.submit(Request((7, 8), 3, temperature=0))  # of another length: it goes first, and takes until the gate opens
    gone, stays = (engine.submit(Request((7, 8, 9), 3, temperature=0)) for _ in range(2))
    assert gone.cancel()
    gate.set()
    assert len(stays.result(timeout=60).tokens) <= 3
    assert engine.submit(Request((7, 8, 9), 3, temperature=0)).result(timeout=60) == stays.result()


# A server whose model never finishes an answer.
SLOW = """
import sys, time
from hopper_moe.launch.cpu_host import server
server.Engine.generate = lambda *_: (print("asked", flush=True), time.sleep(1000))
server.serve(sys.argv[1], port=int(sys.argv[2]), kernel="transformers")
"""


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_ctrl_c_does_not_wait_for_the_queue() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    host = subprocess.Popen([sys.executable, "-c", SLOW, str(tiny_model()), str(port)], stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: is_healthy(url))
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(httpx.post, f"{url}/v1/completions", json={"prompt": "Mia"}, timeout=300)
            assert "asked\n" in iter(host.stdout.readline, "")  # reads until it has said so
            assert not asked.done()
            host.send_signal(signal.SIGINT)
            host.wait(120)  # the answer would take 1000 s
    finally:
        host.kill()


def test_a_bad_command_line_is_one_sentence() -> None:
    command = [sys.executable, "-m", "hopper_moe.launch.cpu_host", str(tiny_model()), "--kernel", "foo", "--port", "abc"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "is not" in ended.stderr and "Traceback" not in ended.stderr


def test_many_clients_with_prompts_of_different_lengths(client) -> None:
    def ask(n: int) -> str:
        content = f"{'Mia has' if n % 2 else 'Olga had'} {n} apples and {'buys' if n % 2 else 'found'} 2 more. How many apples?"
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}
        return client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]

    alone = [ask(n) for n in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == alone


def test_chat_answer(client) -> None:
    reply = client.post("/v1/chat/completions", json={"messages": CHAT, "temperature": 0, "max_tokens": 40, "min_p": 0}).json()
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "7+5=12. \\boxed{12}"}
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"] == reply["usage"]["total_tokens"]
    assert client.get("/v1/models").json()["data"][0] | {"created": 0} == {
        "id": "tiny", "object": "model", "created": 0, "owned_by": "hopper-moe", "kernel": "reference", "max_model_len": 16384,
    }  # fmt: skip
    assert client.get("/health").status_code == 200


def test_thinking_answer_is_split(client) -> None:
    body = {"messages": CHAT, "temperature": 0, "max_tokens": 40, "chat_template_kwargs": {"thinking": True}}
    reply = client.post("/v1/chat/completions", json=body).json()
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "\\boxed{12}", "reasoning_content": "7+5=12."}
    assert 0 < reply["usage"]["completion_tokens_details"]["reasoning_tokens"] < reply["usage"]["completion_tokens"]


def test_length_limit_and_stop_strings(client) -> None:
    short = client.post("/v1/chat/completions", json={"messages": CHAT, "temperature": 0, "max_tokens": 3}).json()
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 3
    stopped = client.post("/v1/chat/completions", json={"messages": CHAT, "temperature": 0, "stop": ["=", "zzz"]}).json()
    assert stopped["choices"][0]["message"]["content"] == "7+5"
    assert stopped["choices"][0]["finish_reason"] == "stop"


def test_seeds(client) -> None:
    def sample(seed: int) -> str:
        body = {"prompt": "Mia had 3", "temperature": 3.0, "max_tokens": 20, "seed": seed}
        return client.post("/v1/completions", json=body).json()["choices"][0]["text"]

    assert sample(1) == sample(1)
    assert len({sample(n) for n in range(5)}) > 1
    greedy = {"prompt": "Mia had 3", "max_tokens": 20}
    texts = [client.post("/v1/completions", json=greedy | extra).json()["choices"][0]["text"] for extra in
             ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-50}, {"temperature": 1e-5})]  # fmt: skip
    assert len(set(texts)) == 1


def test_stream(client) -> None:
    body = {"messages": CHAT, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    events = [line[6:] for line in client.post("/v1/chat/completions", json=body).text.splitlines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(e) for e in events[:-1]]
    assert chunks[0]["choices"][0]["delta"]["content"] == "7+5=12. \\boxed{12}"
    assert chunks[-1]["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"n": 2}, "n=2 is not implemented"),
        ({"logprobs": True}, "logprobs=True"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 20000}, "context of 16384"),
        ({"nonsense": 1}, "'nonsense' is unknown"),
        ({"chat_template_kwargs": {"enable_magic": True}}, "'enable_magic' has no meaning"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text only"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text only"),
        ({"chat_template_kwargs": {"e": 1}}, "'e' has no meaning"),  # a letter of the template's text
        ({"chat_template_kwargs": {"messages": []}}, "'messages' has no meaning"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "'bos_token' has no meaning"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
        ({"seed": 2**64}, "seed"),
        ({"temperature": 1e-40}, "give 0 or at least 1e-05"),
        ({"stop": ""}, "empty string"),
        ({"stop": ["=", ""]}, "empty string"),
        ({"messages": [{"role": "user", "content": "7 " * 20000}]}, "this model takes 1 to 16383"),
    ],
)
def test_requests_that_are_refused(client, change: dict, complaint: str) -> None:
    client = TestClient(client.app, raise_server_exceptions=False)
    body = json.dumps({"messages": CHAT, "max_tokens": 2, **change})  # httpx itself cannot send half a surrogate pair
    reply = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert complaint in reply.json()["error"]["message"]


def test_an_unknown_model_and_paths_are_404_in_openai_form(client) -> None:
    for reply in (
        client.post("/v1/chat/completions", json={"messages": CHAT, "model": "gpt"}),
        client.get("/v1/models/gpt"),
    ):
        assert reply.status_code == 404
        error = reply.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "model_not_found", "model")
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    for reply, status in ((client.post("/v1/nothing", json={}), 404), (client.get("/v1/completions"), 405)):
        assert reply.status_code == status and set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_an_api_key_is_required_but_for_health(packed) -> None:
    with TestClient(create_app(Engine(*packed), "tiny", "w4a16", "s\u00e9cret")) as client:
        key = "s\u00e9cret".encode()
        body = {"messages": CHAT, "temperature": 0, "max_tokens": 2}
        assert client.get("/health").status_code == 200
        for header in (None, b"Bearer wrong", key, b"Basic " + key, b"Bearer", b"Bearer \xff"):
            headers = {} if header is None else {b"authorization": header}
            for reply in (
                client.get("/v1/models", headers=headers),
                client.post("/v1/chat/completions", json=body, headers=headers),
            ):
                assert reply.status_code == 401
                assert reply.json()["error"]["code"] == "invalid_api_key" and "cret" not in reply.text
        right = {b"authorization": b"Bearer " + key}
        assert client.post("/v1/chat/completions", json=body, headers=right).status_code == 200


def anything(rng: random.Random, depth: int = 0):
    """A random JSON value, extremes included."""
    leaves = [None, True, 0, -1, 1, 2, 10**40, -(2**63), 2**64, 0.5, -0.1, 1e-40, 1e300, float("nan"), float("inf"), "", "x",
              "\ud800", "</think>", "7 " * 50]  # fmt: skip
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind < 6:
        return rng.choice(leaves)
    if kind == 6:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(3))]
    names = ("role", "content", "type", "text", "thinking", "include_usage", "\ud800", "x")
    return {rng.choice(names): anything(rng, depth + 1) for _ in range(rng.randrange(4))}


def test_random_bodies_are_answered_or_refused_in_openai_form(client, seed: int) -> None:
    """Any 500 fails: the client raises the server's exceptions."""
    rng = random.Random(seed)
    fields = [*ChatBody.model_fields, *CompletionBody.model_fields, *_NEUTRAL, "user", "nonsense", "\ud800"]
    outcomes = set()
    for _ in range(150):
        body = {"messages": CHAT, "prompt": "Mia has", "max_tokens": 2}
        chat = rng.random() < 0.5
        del body["prompt" if chat else "messages"]
        body |= {rng.choice(fields): anything(rng) for _ in range(rng.randrange(3))}
        if body.get("max_tokens") is None and not body.get("max_completion_tokens"):
            body["max_tokens"] = 2  # or it generates to the end of the context
        text = json.dumps(anything(rng) if rng.random() < 0.1 else body).encode()
        if rng.random() < 0.1:
            text = text[: rng.randrange(len(text))] + bytes([rng.randrange(256)])
        path = "/v1/chat/completions" if chat else "/v1/completions"
        reply = client.post(path, content=text, headers={"content-type": "application/json"})
        outcomes.add(reply.status_code)
        assert reply.status_code in (200, 400, 404), (text, reply.text)
        if reply.status_code != 200:
            error = reply.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"], (text, error)
    assert {200, 400} <= outcomes


def copy_of_tiny_model(folder: Path, **config_changes: object) -> Path:
    shutil.copytree(tiny_model(), folder)
    config = json.loads((folder / "config.json").read_text()) | config_changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_checkpoints_and_kernels_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="mxfp4_mega does not run on a CPU"):
        load(tiny_model(), "mxfp4_mega")
    with pytest.raises(Refusal, match="is no folder"):
        load(tmp_path / "nothing", "reference")
    with pytest.raises(Refusal, match=r"w1\.scale of expert 0 has shape \[128, 4\], but config\.json's .* need \[192, 4\]"):
        load(copy_of_tiny_model(tmp_path / "other", moe_intermediate_size=192), "reference")
    odd = write_checkpoint(tmp_path / "odd", make_state(0, moe_intermediate_size=192), CONFIG | {"moe_intermediate_size": 192})
    with pytest.raises(Refusal, match="intermediate_size 192 is not a positive multiple of 128"):
        load(odd, "reference")
    bare = copy_of_tiny_model(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(Refusal, match=r"its tokenizer cannot be read .*fetch tokenizer\.json"):
        load(bare, "reference")
    with pytest.raises(Refusal, match=r"layers\.0 has no tensors for expert 8 of 0\.\.15"):
        load(copy_of_tiny_model(tmp_path / "many", n_routed_experts=16), "reference")
    with pytest.raises(Refusal, match="says expert_dtype=fp8, but the expert weights are fp4"):
        load(copy_of_tiny_model(tmp_path / "fp8", expert_dtype="fp8"), "reference")


def test_a_config_without_expert_dtype_is_served_by_what_the_weights_are(tmp_path: Path, packed, own) -> None:
    folder = copy_of_tiny_model(tmp_path / "undeclared")
    config = json.loads((folder / "config.json").read_text())
    del config["expert_dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    ids = torch.arange(7, 40)[None]
    torch.testing.assert_close(logits(load(folder, "w4a16")[0], ids), logits(packed[0], ids), rtol=0, atol=0)
    torch.testing.assert_close(logits(load(folder, "transformers")[0], ids), logits(own[0], ids), rtol=0, atol=0)


def test_an_experts_function_of_another_kind_can_take_over(packed, seed: int) -> None:
    """The seam that the sabotage table uses: what is put in is what runs."""
    model, _ = packed
    ids = torch.randint(7, 450, (1, 12), generator=torch.Generator().manual_seed(seed))
    before = logits(model, ids)
    use_kernel(model, "zero", lambda x, ids, weights, experts, *, swiglu_limit: torch.zeros_like(x))
    zero = logits(model, ids)
    use_kernel(model, "w4a16")
    torch.testing.assert_close(logits(model, ids), before)
    assert (zero - before).abs().max() > 0.1
