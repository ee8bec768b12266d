"""What gateways, proxies and strict endpoints do to an evaluation: graded answers, or one sentence that leads out.

H2 to H9 are the field cases of design/field_cases.md.
"""

import json
import os
import socket
import threading
import time
import zlib
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from stub_server import Stub, write_questions

from hopper_moe.eval import demo
from hopper_moe.eval.cli import main
from hopper_moe.launch.proxies import own_servers_direct, proxy_for
from hopper_moe.launch.secrets import redact, shown_command
from hopper_moe.quantization.errors import Refusal

QUESTIONS = 6
ALLOWED = {"model", "messages", "temperature", "top_p", "max_tokens", "seed"}  # of OpenAI's protocol, as far as we use it


@pytest.fixture(autouse=True)
def no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("OPENAI_API_KEY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


def evaluate(url: str, folder: Path, *more: str, questions: int = QUESTIONS) -> tuple[int, str]:
    """(exit code, everything said); a `Refusal` is code 2 and its sentence, as the command line prints it."""
    write_questions(folder / "q.jsonl", questions)
    args = ["gsm8k", "--base-url", url, "--data", str(folder / "q.jsonl"), "--out", str(folder / "run"), *more]
    result = CliRunner().invoke(main, args)
    if isinstance(result.exception, Refusal):
        return 2, str(result.exception)
    assert isinstance(result.exception, (type(None), SystemExit)), repr(result.exception)
    return result.exit_code, result.output


def answers(folder: Path) -> dict[str, str]:
    return {r["id"]: r["text"] for r in map(json.loads, (folder / "run" / "answers.jsonl").read_bytes().splitlines())}


def chat(content: object, **more: object) -> dict:
    return {"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content, **more}}]}


def on_chat(status: int, body: object, headers: dict | None = None):
    return lambda method, *_: (status, headers or {}, body) if method == "POST" else None


def on_models(status: int, body: object, headers: dict | None = None):
    return lambda method, *_: (status, headers or {}, body) if method == "GET" else None


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"])
def test_h2_own_servers_are_reached_without_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    with Stub() as stub:
        assert demo.ask(stub.url, "What is 1 plus 2?")
        assert evaluate(stub.url, tmp_path)[0] == 0


def test_other_hosts_are_reached_through_the_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Stub() as stub:
        monkeypatch.setenv("http_proxy", f"http://name:hidden-word@127.0.0.1:{stub.server.server_address[1]}")
        assert evaluate("http://model.invalid/v1", tmp_path)[0] == 0
        assert stub.requests == QUESTIONS
    code, said = evaluate("http://model.invalid/v1", tmp_path, "--fresh")
    assert code == 2 and "(through the proxy http://***@127.0.0.1" in said and "hidden-word" not in said


@pytest.mark.parametrize("value", ["localhost,127.0.0.1,fd00::/8", "fd00::/8", "[", "http://[::1", "10.0.0.0/8 , *.svc,::1", "*"])
def test_h3_every_form_of_no_proxy_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NO_PROXY", value)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Stub() as stub:
        assert demo.ask(stub.url, "What is 1 plus 2?")
        assert evaluate(stub.url, tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("no_proxy", "host", "direct"),
    [
        ("fd00::/8", "[fd00::1]", True),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        (".corp", "a.corp", True),
        ("corp", "notcorp", False),
        ("a:8000", "a:8000", True),
        ("a:8000", "a:8001", False),
        ("b, *", "a", True),
        ("", "[::1]", True),
        ("", "localhost:30000", True),
        ("", "a", False),
    ],
)
def test_which_hosts_need_no_proxy(monkeypatch: pytest.MonkeyPatch, no_proxy: str, host: str, direct: bool) -> None:
    monkeypatch.setenv("http_proxy", "proxy:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    assert proxy_for(httpx.URL(f"http://{host}/v1")) == (None if direct else "http://proxy:3128")


def test_a_server_that_we_start_reaches_itself_without_a_proxy() -> None:
    assert own_servers_direct({"NO_PROXY": "a, ::1"}) == dict.fromkeys(("no_proxy", "NO_PROXY"), "a,::1,localhost,127.0.0.1")


@pytest.mark.parametrize("proxy", ["ftp://x", "http://x:y", "socks9://x:1"])
def test_a_proxy_address_that_is_none_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    code, said = evaluate("http://model.invalid/v1", tmp_path)
    assert code == 2 and "check --base-url and the proxy variables" in said


@pytest.mark.parametrize("models_too", [False, True])
def test_h4_a_router_that_comes_up_late_loses_no_question(tmp_path: Path, models_too: bool) -> None:
    first: list[float] = []

    def late(method: str, *_: object):
        if method == "GET" and not models_too:
            return None
        first.append(time.monotonic())
        return (503, {}, {"error": "no worker"}) if first[-1] < first[0] + 3 else None

    with Stub(reply=late) as stub:
        code, said = evaluate(stub.url, tmp_path, questions=40)
    assert code == 0 and len(answers(tmp_path)) == 40, said


def test_retry_after_is_obeyed_by_every_question(tmp_path: Path) -> None:
    asked: list[float] = []

    def busy(method: str, *_: object):
        if method == "GET":
            return None
        asked.append(time.monotonic())
        now = time.time()
        dates = {"date": formatdate(now, usegmt=True), "retry-after": formatdate(now + 2, usegmt=True)}
        return (429, dates, {}) if len(asked) == 1 else (429, {"retry-after": "2"}, {}) if len(asked) == 2 else None

    with Stub(reply=busy) as stub:
        assert evaluate(stub.url, tmp_path, "--concurrency", "1")[0] == 0
    assert asked[1] - asked[0] >= 2 and asked[2] - asked[1] >= 2
    assert len(asked) == QUESTIONS + 2


def test_a_retry_after_beyond_the_limit_is_no_endless_wait(tmp_path: Path) -> None:
    with Stub(reply=on_chat(429, {"error": {"message": "quota"}}, {"retry-after": "86400"})) as stub:
        code, said = evaluate(stub.url, tmp_path)
    assert code == 3 and "it asks to wait 86400 s, more than the 120 s" in said


@pytest.mark.parametrize("text", ["half \ud83d", "\udc00\\boxed{1}", "\\boxed{\ud83d}"])
def test_h5_half_surrogate_pairs_are_journalled_read_back_and_graded(tmp_path: Path, text: str) -> None:
    with Stub(reply=on_chat(200, chat(text))) as stub:
        assert evaluate(stub.url, tmp_path)[0] == 0
        path = tmp_path / "run" / "answers.jsonl"
        path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:3]) + b"\n")
        assert evaluate(stub.url, tmp_path)[0] == 0
    assert list(answers(tmp_path).values()) == [text] * QUESTIONS
    path.read_text(encoding="utf-8")
    (tmp_path / "run" / "records.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("status", [307, 308])
def test_h6_redirects_are_followed_and_the_key_stays_home(tmp_path: Path, status: int) -> None:
    with Stub() as behind:

        def to_other_host(_method: str, path: str, *_: object):
            return status, {"location": behind.url.removesuffix("/v1") + path}, b""

        with Stub(reply=to_other_host) as gateway:
            assert evaluate(gateway.url, tmp_path, "--api-key", "sk-0123456789")[0] == 0
        assert all("Authorization" in headers for headers in gateway.headers) and len(behind.bodies) == QUESTIONS
        assert not any("Authorization" in headers for headers in behind.headers)

    def to_other_path(_method: str, path: str, *_: object):
        return None if path.startswith("/real") else (status, {"location": f"/real{path}"}, b"")

    with Stub(reply=to_other_path) as gateway:
        assert evaluate(gateway.url, tmp_path, "--fresh", "--api-key", "sk-0123456789")[0] == 0
        assert all("Authorization" in headers for headers in gateway.headers) and len(gateway.bodies) == QUESTIONS


@pytest.mark.parametrize(
    "body", [b"<!doctype html><title>Log in</title>", b"", b"null", b'{"data": 1}', b'{"error": "x"}', b"[" * 10**5]
)
def test_h7_models_that_is_no_list_is_one_sentence(tmp_path: Path, body: bytes) -> None:
    with Stub(reply=on_models(200, body)) as stub:
        code, said = evaluate(stub.url, tmp_path)
        assert code == 2 and said.startswith(f"{stub.url} does not list its models: it sent ") and "\n" not in said
        assert ("HTML page (Log in)" in said) == (b"html" in body)
        assert evaluate(stub.url, tmp_path, "--model", "stub")[0] == 0, "an endpoint without /models"


@pytest.mark.parametrize(
    ("status", "way_out"), [(401, "--api-key"), (403, "--api-key"), (404, "ends in /v1"), (405, "ends in /v1")]
)
def test_h8_each_refusal_leads_out(tmp_path: Path, status: int, way_out: str) -> None:
    with Stub(reply=on_models(status, {"error": {"message": "no"}})) as stub:
        code, said = evaluate(stub.url, tmp_path)
        assert code == 2 and f"HTTP {status}" in said and way_out in said and ("key is missing" in said) == (status == 401)
        assert "with --model" not in said or status > 403
    with Stub(reply=on_chat(status, {"error": {"message": "no"}})) as stub:
        code, said = evaluate(stub.url, tmp_path, questions=40)
        assert code == 4 and f"HTTP {status}" in said and way_out in said and "20 questions in a row" in said


def test_h9_only_fields_of_the_protocol_are_sent_unless_asked_for(tmp_path: Path) -> None:
    def strict(method: str, _path: str, _headers: object, body: dict | None):
        unknown = set(body or ()) - ALLOWED
        return (422, {}, {"detail": f"unknown fields {sorted(unknown)}"}) if unknown else None

    with Stub(reply=strict) as stub:
        assert evaluate(stub.url, tmp_path)[0] == 0
        for flag, name in (("--min-p", "min_p"), ("--repetition-penalty", "repetition_penalty"), ("--top-k", "top_k")):
            code, said = evaluate(stub.url, tmp_path, flag, "1", "--fresh")
            assert code == 3 and name in said and "fields beyond OpenAI's protocol" in said


def test_questions_that_the_server_refuses_do_not_end_a_run_that_works(tmp_path: Path) -> None:
    def long_ones(_method: str, _path: str, _headers: object, body: dict | None):
        return (400, {}, {"error": "too long"}) if body and "What is 0 " not in body["messages"][-1]["content"] else None

    with Stub(reply=long_ones) as stub:
        for _ in range(2):  # the resumed run has its one answer in the journal only
            assert evaluate(stub.url, tmp_path, "--concurrency", "1", questions=30)[0] == 3


def test_a_server_that_dies_during_a_run_ends_it_and_keeps_the_answers(tmp_path: Path) -> None:
    with Stub() as stub:
        stub_answer, stub.answer = stub.answer, lambda body: stub_answer(body) if stub.requests < 5 else (500, {"error": "gone"})
        code, said = evaluate(stub.url, tmp_path, "--tries", "1", "--concurrency", "1", questions=60)
    assert code == 4 and "5 of 60 answers are in" in said and len(answers(tmp_path)) == 5


def test_reasoning_without_content_gets_a_hint(tmp_path: Path) -> None:
    for name in ("reasoning", "reasoning_content"):
        with Stub(reply=on_chat(200, chat(None, **{name: "so \\boxed{1}"}))) as stub:
            code, said = evaluate(stub.url, tmp_path, "--fresh")
        assert code == 0 and f"hint: {QUESTIONS} answers have no content" in said and "--reasoning-parser" in said


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"message": "out of memory", "code": 400}}, "an error inside a reply with status 200: out of memory"),
        ({"error": "busy"}, "an error inside a reply with status 200: busy"),
        (b"<html>portal", "an HTML page"),
        ({"choices": []}, "JSON without choices"),
        ({"choices": [{"message": {"content": 5}}]}, "content that is a JSON number"),
        ([1], "a JSON array instead of an object"),
    ],
)
def test_status_200_without_an_answer_says_what_came(tmp_path: Path, body: object, words: str) -> None:
    with Stub(reply=on_chat(200, body)) as stub:
        code, said = evaluate(stub.url, tmp_path, "--tries", "1")
    assert code == 3 and f"it sent {words}" in said


def test_connection_faults_say_what_happened(tmp_path: Path) -> None:
    def serve_once(behave) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=lambda: behave(listener), daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def silent(listener: socket.socket) -> None:
        with listener.accept()[0] as connection:
            connection.recv(10**6)
            connection.recv(1)  # until the client hangs up

    def hangs_up(listener: socket.socket) -> None:
        with listener.accept()[0] as connection:
            connection.recv(10**6)

    def greets(listener: socket.socket) -> None:
        with listener.accept()[0] as connection:
            connection.sendall(b"SSH-2.0-OpenSSH_9\r\n\r\n")
            connection.recv(10**6)

    for url, words in (
        ("http://127.0.0.1:9/v1", "127.0.0.1:9 refused the connection: nothing listens there"),
        ("http://no-such-host.invalid/v1", "is not known (DNS"),
        (f"https://{serve_once(greets)}/v1", "TLS: "),
        (f"http://{serve_once(silent)}/v1", "no whole answer from 127.0.0.1"),
        (f"http://{serve_once(hangs_up)}/v1", "closed the connection within its answer"),
        (f"http://{serve_once(greets)}/v1", "or speaks no HTTP"),
    ):
        code, said = evaluate(url, tmp_path, "--timeout", "3")
        assert code == 2 and words in said and "does not answer /models" in said, (url, said)


@pytest.mark.parametrize(
    ("variable", "value", "scheme", "words"),
    [
        ("OPENAI_ORG_ID", "\u00e9", "http", "OPENAI_ORG_ID has a line break or non-ASCII character"),
        ("OPENAI_PROJECT_ID", "a\nb", "http", "OPENAI_PROJECT_ID has a line break"),
        ("SSL_CERT_FILE", "/nonexistent", "https", "the certificates of SSL_CERT_FILE=/nonexistent cannot be read (No such file"),
    ],
)
def test_variables_that_no_request_survives_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, scheme: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    status, said = evaluate(f"{scheme}://127.0.0.1:1/v1", tmp_path)
    assert status == 2 and words in said


def compressed(encoding: str, body: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=31 if encoding == "gzip" else 15)
    return packer.compress(body) + packer.flush()


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_answers_are_read(tmp_path: Path, encoding: str) -> None:
    body = compressed(encoding, json.dumps(chat("\\boxed{3}")).encode())
    with Stub(reply=on_chat(200, body, {"content-encoding": encoding})) as stub:
        status, said = evaluate(stub.url, tmp_path)
    assert status == 0 and set(answers(tmp_path).values()) == {"\\boxed{3}"}, said


@pytest.mark.parametrize(
    ("encoding", "body", "words"),
    [
        ("gzip", b'{"choices": []}', "is compressed wrongly"),
        ("zstd", b"\x28\xb5\x2f\xfd", r"is compressed wrongly (as zstd, which was not asked for)"),
        ("gzip, br", b"x", r"is compressed wrongly (as br, which was not asked for)"),
        ("gzip", compressed("gzip", b" " * (80 << 20)), "the answer is larger than 64 MiB"),
    ],
    ids=["none of it", "zstd", "two", "bomb"],
)
@pytest.mark.parametrize("of_models", [False, True])
def test_lying_and_bursting_encodings_are_one_sentence(
    tmp_path: Path, encoding: str, body: bytes, words: str, of_models: bool
) -> None:
    on = on_models if of_models else on_chat
    with Stub(reply=on(200, body, {"content-encoding": encoding})) as stub:
        status, said = evaluate(stub.url, tmp_path, "--tries", "1", questions=1)
    assert status in (2, 3, 4) and words in said, said


def test_a_bursting_redirect_is_bounded_too(tmp_path: Path) -> None:
    bomb = compressed("gzip", b" " * (80 << 20))
    with Stub(reply=on_chat(307, bomb, {"content-encoding": "gzip", "location": "/elsewhere"})) as stub:
        status, said = evaluate(stub.url, tmp_path, "--tries", "1", questions=1)
    assert status != 0 and "the answer is larger than 64 MiB" in said, said


def test_a_dripping_answer_ends_at_the_deadline(tmp_path: Path) -> None:
    stop = threading.Event()

    with Stub() as stub:

        def do_post(self) -> None:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            self.wfile.flush()
            while not stop.wait(0.05):
                self.wfile.write(b"x: y\r\n")
                self.wfile.flush()

        stub.server.RequestHandlerClass.do_POST = do_post
        begun = time.monotonic()
        code, said = evaluate(stub.url, tmp_path, "--timeout", "1", "--tries", "1")
        stop.set()
    assert code == 3 and "within 1 s" in said and time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://::1:30000", "write http://[::1]:30000"),
        ("http://::1:30000/v1", "write http://[::1]:30000/v1"),
        ("localhost:30000/v1", "does not begin with http:// or https://"),
        ("http://", "has no host"),
        ("http://a:99999/v1", "a port beyond 65535"),
        ("http://a b\n/v1", "is no address"),
        ("http://a/v1?key=1", "a query or fragment"),
        ("http://a/v1/chat/completions", "leave /chat/completions out"),
        ("http://me:hidden-word@a:x/v1", "is no address"),
    ],
)
def test_base_urls_that_are_none_are_one_sentence(tmp_path: Path, url: str, words: str) -> None:
    code, said = evaluate(url, tmp_path)
    assert code == 2 and words in said and "hidden-word" not in said


def test_base_url_with_a_slash_at_its_end_works(tmp_path: Path) -> None:
    with Stub() as stub:
        assert evaluate(stub.url + "/", tmp_path)[0] == 0


@pytest.mark.parametrize("key", ["", "sk-01234567\n", "sk-0123456 7", "sk-é0123456", "sk-\ud83d0123456"])
def test_a_key_that_http_cannot_send_is_refused_and_not_shown(tmp_path: Path, key: str) -> None:
    code, said = evaluate("http://127.0.0.1:9/v1", tmp_path, "--api-key", key)
    assert code == 2 and "key" in said and "sk-" not in said


@pytest.mark.parametrize("status", [200, 401, 500])
def test_keys_are_neither_said_nor_written(tmp_path: Path, status: int) -> None:
    """Also when the server repeats them."""
    key, password = "sk-0123456789abcdef", "hidden-word"

    def echo(method: str, _path: str, headers: dict, body: dict | None):
        words = f"{key} {headers['authorization']} \\boxed{{1}}"
        if method == "GET":
            return 200, {}, {"data": [{"id": "m", "owned_by": words, "root": f"http://me:{password}@x"}]}
        return status, {}, chat(words) if status == 200 else {"error": {"message": words}}

    with Stub(reply=echo) as stub:
        address = stub.url.replace("//", f"//me:{password}@")
        code, said = evaluate(address, tmp_path, "--api-key", key, "--tries", "1")
    assert code == (0 if status == 200 else 3)
    written = "".join(path.read_text() for path in (tmp_path / "run").iterdir())
    for secret in (key, password):
        assert secret not in said + written
    assert f"http://***@{stub.url.split('//')[1]}" in written


def test_printed_commands_hide_secrets_and_are_quoted() -> None:
    command = [
        "sglang",
        "serve",
        "--model-path",
        "my model",
        "--api-key",
        "K",
        "--api=K",
        "--admin-api-key=K",
        "--tokenizer-path",
        "t",
    ]
    command += ["--ssl-keyfile", "file", "--ssl-keyfile-password", "--K", "--json", '{"a": 1}', "--hf-token", "K"]
    assert shown_command(command) == (
        "sglang serve --model-path 'my model' --api-key *** --api=*** --admin-api-key=*** --tokenizer-path t "
        "--ssl-keyfile file --ssl-keyfile-password *** --json '{\"a\": 1}' --hf-token ***"
    )
    assert redact("HTTP 401: key 1 of http://a:b@c/", "1", "EMPTY") == "HTTP 401: key *** of http://***@c/"
    assert redact('{"k": "a\\"b c&d-long"} a%22b%20c%26d-long', 'a"b c&d-long') == '{"k": "***"} ***'
