"""`hopper-moe eval` against a stub endpoint: kills and resumption, errors, retries, refusals. The process under test is real."""

import json
import multiprocessing
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from stub_server import Stub, write_questions

from hopper_moe.eval.asking import Asking
from hopper_moe.eval.benchmark_cli import run_benchmark
from hopper_moe.eval.cli import main
from hopper_moe.eval.journal import RunLock
from hopper_moe.eval.paired import load_run
from hopper_moe.eval.sampler import Sampler
from hopper_moe.eval.serving import fingerprint
from hopper_moe.quantization.errors import Refusal

QUESTIONS, REPEATS = 40, 3
PROCESSES = multiprocessing.get_context("forkserver")  # starts each without the seconds that imports take
PROCESSES.set_forkserver_preload([main.__module__])


def arguments(stub: Stub, folder: Path, out: Path, *more: str) -> list[str]:
    data = folder / "questions.jsonl"
    if not data.exists():
        write_questions(data, QUESTIONS)
    return ["gsm8k", "--base-url", stub.url, "--data", str(data), "--out", str(out), "--temperature", "1", *more]


def run(*args: str):
    """In-process run; a `Refusal` is raised to the test."""
    result = CliRunner().invoke(main, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def evaluate(args: list[str]) -> None:
    """For a process of its own, which cannot be handed click's objects."""
    main(args)


def numbers(out: Path) -> dict:
    """Everything reported that must not depend on interruptions: all but the clock."""
    metrics = json.loads((out / "metrics.json").read_text())
    del metrics["timing"], metrics["settings"]["base_url"]
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    for record in records:
        del record["start"], record["end"]
    return {"metrics": metrics, "records": records}


@pytest.mark.one_seed_in(4)
def test_killed_at_any_point_and_resumed_gives_the_same_numbers(tmp_path: Path, seed: int) -> None:
    r = random.Random(seed)
    with Stub() as stub:
        assert run(*arguments(stub, tmp_path, tmp_path / "whole", "--n-repeats", str(REPEATS))).exit_code == 0
    whole = numbers(tmp_path / "whole")
    assert 0.5 < whole["metrics"]["pass@1"] < 1
    with Stub(silent_after=0) as stub:
        out = tmp_path / "killed"
        args = arguments(stub, tmp_path, out, "--n-repeats", str(REPEATS), "--concurrency", "4")
        finished = [0]
        for _ in range(3):  # three SIGKILLs at random points, each after some new answers, behind which the server is silent
            goal = finished[-1] + r.randint(1, 30)
            stub.change(silent_after=stub.requests + goal - finished[-1])
            process = PROCESSES.Process(target=evaluate, args=(args,))
            process.start()
            while journal_lines(out) < goal and process.is_alive():
                time.sleep(0.005)
            process.kill()
            process.join()
            finished.append(journal_lines(out))
        assert 0 < finished[1] < finished[2] < finished[3] < QUESTIONS * REPEATS, "three kills in the middle"
        recorded = journal_keys(out)
        stub.speak()
        asked_before = len(stub.bodies)
        assert run(*args).exit_code == 0
        asked_after = [(b["messages"][-1]["content"], b["seed"]) for b in stub.bodies[asked_before:]]
    assert numbers(out) == whole
    assert len(asked_after) == QUESTIONS * REPEATS - len(recorded), "nothing twice, nothing lost"
    assert not {seed for _, seed in asked_after} & recorded


def journal_lines(out: Path) -> int:
    path = out / "answers.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def journal_keys(out: Path) -> set[int]:
    content = (out / "answers.jsonl").read_bytes()
    return {json.loads(line)["seed"] for line in content[: content.rfind(b"\n") + 1].splitlines()}


def test_half_written_last_line_is_asked_again(tmp_path: Path) -> None:
    with Stub() as stub:
        out = tmp_path / "run"
        args = arguments(stub, tmp_path, out)
        assert run(*args).exit_code == 0
        whole = numbers(out)
        journal = (out / "answers.jsonl").read_bytes()
        (out / "answers.jsonl").write_bytes(journal[:-25])
        before = stub.requests
        assert run(*args).exit_code == 0
        assert stub.requests == before + 1
        assert numbers(out) == whole


def test_finished_run_asks_nothing_and_fresh_asks_everything(tmp_path: Path) -> None:
    with Stub() as stub:
        args = arguments(stub, tmp_path, tmp_path / "run")
        first = run(*args)
        assert run(*args).exit_code == first.exit_code == 0
        assert stub.requests == QUESTIONS
        assert run(*args, "--fresh").exit_code == 0
        assert stub.requests == 2 * QUESTIONS


def test_five_percent_failed_requests_are_errors_and_not_wrong_answers(tmp_path: Path) -> None:
    asked = 200
    write_questions(tmp_path / "questions.jsonl", asked)
    with Stub(fail_share=0.05, accuracy=1.0) as stub:
        args = arguments(stub, tmp_path, tmp_path / "run", "--tries", "1")
        result = run(*args)
        metrics = numbers(tmp_path / "run")["metrics"]
        failed = asked - len(stub.answered)
        assert 0.01 < failed / asked < 0.1
        assert result.exit_code == 3, "a run with errors must not look like success"
        assert metrics["pass@1"] == 1.0
        assert metrics["errors"] == failed
        assert metrics["error_rate"] == pytest.approx(failed / asked)
        assert "stub was told to fail" in result.output
        assert run(*args, "--allow-errors", "0.5").exit_code == 0
        stub.change(fail_share=0.0)  # the server is mended: the same command asks only what is missing
        before = stub.requests
        assert run(*args).exit_code == 0
        assert stub.requests == before + failed
        assert numbers(tmp_path / "run")["metrics"]["error_rate"] == 0


def test_passing_errors_are_tried_again_and_counted(tmp_path: Path) -> None:
    with Stub(fail_first=2) as stub:
        result = run(*arguments(stub, tmp_path, tmp_path / "run", "--concurrency", "1"))
        assert result.exit_code == 0
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert metrics["error_rate"] == 0
        assert metrics["timing"]["failed_requests_this_session"] == 2
        assert stub.requests == QUESTIONS + 2
        assert f"2 of {QUESTIONS + 2} in this session" in result.output


def test_server_that_never_answers_ends_the_run_early(tmp_path: Path) -> None:
    with Stub(fail_share=1.0) as stub:
        result = run(*arguments(stub, tmp_path, tmp_path / "run", "--concurrency", "4", "--tries", "1"))
        assert result.exit_code == 4
        assert stub.requests < 30, "gives up after 20, and what is in flight then"
        assert "20 questions in a row got no answer" in result.output
        assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_server_of_our_own_may_come_back_on_another_port(tmp_path: Path) -> None:
    write_questions(tmp_path / "q.jsonl", 10)
    how, into = Asking(data=tmp_path / "q.jsonl"), {"out": tmp_path / "run", "recorded_url": "own"}
    with Stub() as stub:
        assert run_benchmark("gsm8k", stub.url, how, **into) == (0, tmp_path / "run")
    with Stub() as stub:
        assert run_benchmark("gsm8k", stub.url, how, **into) == (0, tmp_path / "run")
        assert stub.requests == 0


def test_client_errors_are_not_tried_again(tmp_path: Path) -> None:
    with Stub(fail_share=0.1, status=422) as stub:
        assert run(*arguments(stub, tmp_path, tmp_path / "run")).exit_code == 3
        assert stub.requests == QUESTIONS


def test_truncated_answers_are_counted(tmp_path: Path) -> None:
    with Stub(truncate_share=0.3) as stub:
        assert run(*arguments(stub, tmp_path, tmp_path / "run")).exit_code == 0
    metrics = numbers(tmp_path / "run")["metrics"]
    assert 0 < metrics["truncated_rate"] < 1
    assert metrics["truncated_rate"] + metrics["stop_rate"] == pytest.approx(1)
    assert metrics["no_answer"] == pytest.approx(metrics["truncated_rate"])


@pytest.mark.parametrize(
    ("silent", "number"),
    [(False, signal.SIGINT), (True, signal.SIGINT), (True, signal.SIGTERM)],
    ids=["answering", "silent", "term"],
)
def test_interrupt_ends_at_once_keeps_answers_and_says_how_to_go_on(tmp_path: Path, silent: bool, number: int) -> None:
    """Also while the server is busy for hours with what it was asked: nobody waits for that after Ctrl-C."""
    with Stub(delay=0.05, silent_after=5 if silent else QUESTIONS - 5) as stub:  # however late the signal is, it is not done
        out = tmp_path / "run"
        args = arguments(stub, tmp_path, out, "--concurrency", "2")
        command = [sys.executable, "-c", f"from hopper_moe.eval.cli import main; main({args!r})"]
        # A test run started in the background passes an ignored SIGINT on; a user's terminal does not.
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        )
        while process.poll() is None and (journal_lines(out) < 5 or (silent and stub.requests < 7)):
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "the same command carries on" in errors
        before = journal_lines(out)
        assert before < QUESTIONS and (before == 5 or not silent)
        stub.speak()
        assert run(*args).exit_code == 0
        assert len(stub.answered) == QUESTIONS
        assert journal_lines(out) == QUESTIONS


def test_requests_carry_what_was_asked_for(tmp_path: Path) -> None:
    with Stub() as stub:
        more = ("--top-p", "0.9", "--max-tokens", "77", "--thinking", "--n-repeats", "2", "--num-examples", "3")
        assert run(*arguments(stub, tmp_path, tmp_path / "run", *more)).exit_code == 0
        assert len(stub.bodies) == 6
        for body in stub.bodies:
            assert (body["temperature"], body["top_p"], body["max_tokens"]) == (1.0, 0.9, 77)
            assert body["chat_template_kwargs"] == {"thinking": True}
            assert "inside \\boxed{}" in body["messages"][0]["content"]  # sgl-eval's own maths prompt
        assert len({body["seed"] for body in stub.bodies}) == 6


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    with Stub() as stub:
        args = arguments(stub, tmp_path, tmp_path / "run")
        assert run(*args).exit_code == 0
        with pytest.raises(Refusal, match="top_p=0.95, not 0.5"):
            run(*args, "--top-p", "0.5")


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ('{"problem": "a", "expected_answer": "1"}\n{"problem": "b"}\n', "line 2: expected_answer is missing"),
        ('{"problem": "a", "expected_answer": "1"}\nnonsense\n', "line 2: no valid JSON"),
        (
            '{"id": "x", "problem": "a", "expected_answer": "1"}\n{"id": "x", "problem": "b", "expected_answer": "1"}\n',
            "id 'x' is used",
        ),
        ("[1]\n", "a list, not an object"),
        ("\n", "has no rows"),
        (None, "is no file"),
        ('{"problem": "half \\ud83d", "expected_answer": "1"}', "line 1: problem holds half a surrogate pair"),
        ('{"problem": ["a"], "expected_answer": "1"}', r"line 1: problem is \['a'\], but a text is needed"),
        ('{"problem": "a", "expected_answer": {}}', "line 1: expected_answer is {}, but a text or a number is needed"),
        ('{"problem": "a", "expected_answer": NaN}', "line 1: expected_answer is nan, but a text or a number"),
        ('{"problem": "a", "expected_answer": "1", "id": [1]}', r"line 1: id is \[1\], but a text or a whole number"),
        ('{"question": "a", "answer": "1"}', "line 1: a row of gsm8k's own form needs"),
        ("9" * 5000, "line 1: no valid JSON"),
        ("[" * 100_000, "line 1: no valid JSON"),
    ],
)
def test_bad_question_files_are_refused_before_anything_is_asked(tmp_path: Path, rows: str | None, complaint: str) -> None:
    data = tmp_path / "data.jsonl"
    if rows is not None:
        data.write_text(rows)
    with Stub() as stub:
        with pytest.raises(Refusal, match=complaint):
            run("gsm8k", "--base-url", stub.url, "--data", str(data), "--out", str(tmp_path / "run"))
        assert stub.requests == 0


@pytest.mark.parametrize("room", [0, 100, 1500, 3000])
def test_a_full_disk_is_one_sentence_and_the_run_carries_on(tmp_path: Path, room: int) -> None:
    """As a limit of file size: the write that does not fit is cut short, the next one fails."""
    out = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Stub() as stub:
        args = arguments(stub, tmp_path, out, "--concurrency", "2")
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
            with pytest.raises(
                Refusal, match="(answers.jsonl cannot be written|cannot be used) .*the same command carries on"
            ) as caught:
                run(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "\n" not in str(caught.value)
        journal = out / "answers.jsonl"
        kept = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        asked = sum(stub.answered.values())
        assert kept <= asked <= kept + 2 * 2, "nothing is asked whose answer cannot be kept"
        assert (kept > 0) == (room > 1000), "settings.json takes less than that, an answer far less"
        if kept:
            assert journal.read_bytes().endswith(b"\n")
        assert run(*args).exit_code == 0
        assert len(journal.read_bytes().splitlines()) == QUESTIONS
        assert sum(stub.answered.values()) == asked + QUESTIONS - kept


def test_a_folder_that_takes_no_files_is_one_sentence(tmp_path: Path) -> None:
    with Stub() as stub:
        for out in ("/proc/run", "/dev/null", "/dev/null/run", str(tmp_path / ("x" * 300))):
            with pytest.raises(Refusal, match="cannot be a run folder .*give another --out"):
                run(*arguments(stub, tmp_path, Path(out)))
        assert not stub.answered


def test_other_checkpoint_under_the_same_name_is_refused(tmp_path: Path) -> None:
    write_questions(tmp_path / "q.jsonl", 3)
    how, into = Asking(data=tmp_path / "q.jsonl"), {"out": tmp_path / "run", "recorded_url": "own"}
    prints = []
    for parent, content in (("a", "1"), ("b", "1"), ("b", "22")):
        (tmp_path / parent / "ckpt").mkdir(parents=True, exist_ok=True)
        (tmp_path / parent / "ckpt" / "model.safetensors").write_text(content)
        prints.append(fingerprint(str(tmp_path / parent / "ckpt")))
    assert len(set(prints)) == 3
    with Stub() as stub:
        assert run_benchmark("gsm8k", stub.url, how, checkpoint=prints[0], **into)[0] == 0
        with pytest.raises(Refusal, match="holds a run with checkpoint="):
            run_benchmark("gsm8k", stub.url, how, checkpoint=prints[1], **into)


def test_fresh_takes_nothing_from_a_run_that_writes(tmp_path: Path) -> None:
    with Stub() as stub:
        args = arguments(stub, tmp_path, tmp_path / "run")
        assert run(*args).exit_code == 0
        before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        with closing(RunLock(tmp_path / "run")), pytest.raises(Refusal, match="another run is writing here"):
            run(*args, "--fresh")
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_damaged_runs_are_refused_and_line_separators_are_no_damage(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with Stub() as stub:
        args = arguments(stub, tmp_path, out)
        assert run(*args).exit_code == 0
        lines = (out / "records.jsonl").read_text().split("\n")
        lines[3] = json.dumps({**json.loads(lines[3]), "generation": "one\u2028two\u0085three"}, ensure_ascii=False)
        (out / "records.jsonl").write_text("\n".join(lines))
        assert len(load_run(out).ids) == QUESTIONS
        for content, complaint in (
            ("\n".join(lines[:-2]) + "\n", f"holds {QUESTIONS - 1} answers, not {QUESTIONS} x 1"),
            ("{", "damaged"),
        ):
            (out / "records.jsonl").write_text(content)
            with pytest.raises(Refusal, match=complaint):
                load_run(out)
        (out / "answers.jsonl").write_text('{"no": 1}\n')
        with pytest.raises(Refusal, match="line 1, is no answer of ours"):
            run(*args)
        (out / "settings.json").write_text("{")
        with pytest.raises(Refusal, match=r"settings.json is damaged"):
            run(*args)


def test_second_signal_inside_the_first_is_harmless(tmp_path: Path) -> None:
    with Stub() as stub:
        sampler = Sampler(stub.url, None, "EMPTY", 1)

        class Event(threading.Event):
            def set(self) -> None:
                with self._cond:  # where a second Ctrl-C may come
                    sampler.abort()
                super().set()

        sampler._abort_event = Event()
        thread = threading.Thread(target=sampler.abort, daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive() and sampler.aborted


def test_no_number_is_no_number(tmp_path: Path) -> None:
    with Stub() as stub:
        for option in ("--temperature", "--top-p", "--allow-errors"):
            result = run(*arguments(stub, tmp_path, tmp_path / "run", option, "nan"))
            assert result.exit_code == 2 and "not a finite number" in result.output


def test_absent_server_is_refused(tmp_path: Path) -> None:
    write_questions(tmp_path / "data.jsonl", 2)
    with pytest.raises(Refusal, match="does not answer /models"):
        run("gsm8k", "--base-url", "http://127.0.0.1:9/v1", "--data", str(tmp_path / "data.jsonl"))
    with pytest.raises(Refusal, match="does not answer /models"):
        run("gsm8k", "--base-url", "http://127.0.0.1:9/v1", "--data", str(tmp_path / "data.jsonl"), "--model", "x")


def test_kill_before_the_first_question_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.tmp").write_text("{")  # what a kill while the settings are written leaves
    with Stub() as stub:
        assert run(*arguments(stub, tmp_path, tmp_path / "run")).exit_code == 0


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with Stub() as stub, pytest.raises(Refusal, match="holds no run of ours"):
        run(*arguments(stub, tmp_path, tmp_path / "run"))
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


def test_no_answer_at_all_has_no_accuracy(tmp_path: Path) -> None:
    with Stub(fail_share=1.0) as stub:
        result = run(*arguments(stub, tmp_path, tmp_path / "run", "--num-examples", "3", "--tries", "1"))
    assert result.exit_code == 3
    assert numbers(tmp_path / "run")["metrics"]["pass@1"] is None
    assert "n/a" in result.output
