"""The accuracy table of the CUDA kernels: the GPU model in stock SGLang on one Hopper GPU, every row against `reference`.

\b
    python -m hopper_moe.eval.accuracy_table.gpu --out DIR [-- SGLANG_ARGUMENTS]

Serves `eval/data/gpu_dsv4` once per row and once per sabotaged checkpoint and asks the 1,200 held-out questions. Writes plot and
JSON here and the table into eval/README.md. The servers share the GPU: the model is small and nothing is timed. A server that
does not start costs its row only. Run again with the same DIR, it asks only what is missing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from hopper_moe.eval.accuracy_table.cpu_host import MARGIN, markdown, plot, write_table
from hopper_moe.eval.asking import Asking
from hopper_moe.eval.benchmark_cli import run_benchmark
from hopper_moe.eval.benchmarks import DATA
from hopper_moe.eval.compare_cli import compare_folders
from hopper_moe.eval.gpu_model import exact_experts
from hopper_moe.eval.sabotage import sabotaged_checkpoint, sabotages
from hopper_moe.eval.serving import fingerprint
from hopper_moe.eval.serving_bench.compare import answers, summary
from hopper_moe.eval.serving_bench.server import start
from hopper_moe.launch.ports import free_port
from hopper_moe.launch.server_process import ServerProcess, servers
from hopper_moe.moe_backends.env_table import EXPAND_FP4
from hopper_moe.moe_backends.kernel_specs import KERNELS, REGISTRY
from hopper_moe.moe_backends.sglang.hyper_connections import FUSE
from hopper_moe.moe_backends.sglang.low_latency_rules import BUDGET
from hopper_moe.moe_backends.sglang.plan import BACKEND
from hopper_moe.quantization.errors import Refusal

MODEL, QUESTIONS = DATA / "gpu_dsv4", DATA / "word_problems_hard.jsonl"
README = DATA.parent / "README.md"
EXACT = "exact"
COMPARED, NUM_TOKENS = 200, 64  # answers whose log probabilities are kept, and the most tokens of one
FEW, AT_ONCE = 64, 8  # answers that are asked again so many at a time: small decode batches, taking turns with prefills
EAGER = ("reference", EXACT)  # not asked again: a third of a second a step
MAX_CHANGE, MAX_GAP = 0.5, 1.0
"""What may differ between answers asked together and a few at a time: a chosen token's log probability (0.1 to 0.3 is rounding of
other batches), and how far its two best tokens are apart where answers part (a near tie)."""
CONCURRENCY = 400  # a step of the reference takes its third of a second for one answer as for 400
# Questions and answers take less than a page of 256 tokens each, and a tenth of the pool is for the sliding window. The pool is
# capped in tokens: with several servers on one GPU, SGLang's own sizing would read what the others leave it.
MOST_REQUESTS = 512
SGLANG_ARGUMENTS = (
    f"--context-length 4096 --mem-fraction-static 0.6 --max-total-tokens 1572864 --max-running-requests {MOST_REQUESTS} "
    "--chunked-prefill-size 8192 --cuda-graph-bs-decode 1 8 32 128 256 512 --mm-feature-transport cpu --watchdog-timeout 3600"
).split()


@dataclass(frozen=True)
class Row:
    """A line of the table and the server behind it. `environment`: variables of that server beside this process's; `arguments`:
    of SGLang, beside everybody's."""

    name: str
    model: Path
    backend: str
    environment: dict[str, str] = field(default_factory=dict)
    sabotage: bool = False
    arguments: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return self.name.replace(",", "").replace(" ", "-")


def row_of(name: str, model: Path, out: Path) -> Row:
    """A kernel of this package (KERNEL@N: on N GPUs, KERNEL@N/MODE: whose rows DeepEP moves), `exact`, or else one of SGLang's
    own MoE backends. A kernel of FP8 experts gets the model's FP4 ones expanded."""
    kernel, at, where = name.partition("@")
    if at:
        gpus, _, mode = where.partition("/")
        arguments = ("--tp", gpus, "--dp", gpus, "--enable-dp-attention", "--ep", gpus, "--disable-custom-all-reduce")
        row = Row(f"{kernel}, {gpus} GPUs", model, BACKEND, {"HOPPER_MOE_KERNEL": kernel}, arguments=arguments)
        return by_deepep(row, mode, -(-MOST_REQUESTS // int(gpus))) if mode else row
    if name in KERNELS:
        expanded = {EXPAND_FP4: "1"} if REGISTRY[name].expert_dtype == "fp8" else {}
        return Row(name, model, BACKEND, {"HOPPER_MOE_KERNEL": name, **expanded})
    if name != EXACT:
        return Row(name, model, name)
    path = os.pathsep.join((str(exact_experts.install(out / "exact_plugin")), os.environ.get("PYTHONPATH", "")))
    environment = {"HOPPER_MOE_KERNEL": "reference", "HOPPER_MOE_SELF_CHECK": "0", "PYTHONPATH": path}
    return Row(name, model, BACKEND, environment)


def by_deepep(row: Row, mode: str, requests: int) -> Row:
    """The same row with DeepEP's `mode` in place of the fused exchange. `requests`: of one rank, at most."""
    arguments = (*row.arguments, "--moe-a2a-backend", "deepep", "--deepep-mode", mode)
    environment = {**row.environment, BUDGET: str(requests)}
    return replace(row, name=f"{row.name}, DeepEP {mode}", arguments=arguments, environment=environment)


def sabotaged_row(name: str, model: Path, kernel: str, out: Path) -> Row:
    """The checkpoint with mistake `name`, served by an honest kernel."""
    folder = out / "checkpoints" / name.replace(" ", "-")
    checkpoint = folder if folder.exists() else sabotaged_checkpoint(model, folder, name)
    return Row(name, checkpoint, BACKEND, {"HOPPER_MOE_KERNEL": kernel}, sabotage=True)


def ask(
    url: str, out: Path, name: str, checkpoint: str, few: bool, *, num_examples: int | None, data: Path, compared: int
) -> str:
    """All questions to one server, in a process of its own: graders need the main thread. Returns what went wrong, or nothing.

    The first `compared` are asked once more, for the log probability of each token, and with `few` some of them in small batches.
    """
    how = Asking(data=data, num_examples=num_examples, concurrency=CONCURRENCY)
    status, _ = run_benchmark("word_problems", f"{url}/v1", how, out=out / name, recorded_url="own", checkpoint=checkpoint)
    if status:
        return f"asking ended with status {status}"
    if compared:
        problems = [json.loads(line)["problem"] for line in data.read_text().splitlines()[:compared]]
        folder = out / "log_probabilities"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(answers(url, problems, NUM_TOKENS)))
        if few:
            (folder / f"{name}-few.json").write_text(json.dumps(answers(url, problems[:FEW], NUM_TOKENS, AT_ONCE)))
    return ""


def ask_all(rows: list[Row], out: Path, timeout: float, arguments: tuple[str, ...], **what: Any) -> dict[str, str]:
    """Ask every server as soon as it answers. Row name -> what went wrong, for the rows that have no answers."""
    wrong: dict[str, str] = {}
    begun, rows = time.monotonic(), [row for row in rows if not (out / row.folder / "metrics.json").exists()]

    def say(row: Row, text: str) -> None:
        click.echo(f"[{time.monotonic() - begun:.0f} s] {row.name}: {text}")

    with (
        ProcessPoolExecutor(max(len(rows), 1), mp_context=multiprocessing.get_context("spawn")) as pool,
        ThreadPoolExecutor(max(len(rows), 1)) as threads,
        servers() as group,  # last: stopped servers end every wait and every question
    ):
        starts: dict[Future, Row] = {}
        for row in rows:
            starting = threads.submit(
                start,
                group,
                str(row.model),
                backend=row.backend,
                port=free_port(),
                log=out / "servers" / f"{row.folder}.log",
                ready_timeout=timeout,
                arguments=(*SGLANG_ARGUMENTS, *row.arguments, *arguments),
                environment={FUSE: "0", **row.environment},  # the model's hidden size is 128
            )
            starts[starting] = row
        asked: dict[Future, Row] = {}
        started: dict[str, ServerProcess] = {}
        for future in as_completed(starts):
            row = starts[future]
            try:
                server = future.result()
            except Refusal as refusal:
                wrong[row.name] = str(refusal)
                say(row, f"no server: {refusal}")
                continue
            started[row.name] = server
            say(row, f"ready after {server.seconds_to_ready:.0f} s")
            few = not row.sabotage and row.name not in EAGER
            asked[pool.submit(ask, server.url, out, row.folder, fingerprint(str(row.model)), few, **what)] = row
        for future in as_completed(asked):
            row, error = asked[future], future.exception()
            problem = f"{type(error).__name__}: {error}" if error else future.result()
            if problem:
                wrong[row.name] = problem
            say(row, problem or "asked")
            started[row.name].send(signal.SIGTERM)  # an idle scheduler keeps a core busy
    return wrong


def scored(row: Row, out: Path) -> dict[str, Any]:
    """A finished row; every one but `reference` is compared with it. `same_text`: answers with the reference's very words."""
    folder = out / row.folder
    metrics = json.loads((folder / "metrics.json").read_text())
    found = {"name": row.name, "sabotage": row.sabotage, "accuracy": metrics["pass@1"], "interval95": metrics["interval95"]}
    if row.name == "reference":
        return found
    compare_folders(out / "reference", folder, MARGIN, folder / "compare")
    ours, theirs = (texts(out / name) for name in (row.folder, "reference"))
    found["same_text"] = sum(ours[question] == theirs[question] for question in theirs)
    kept = out / "log_probabilities"
    if (kept / f"{row.folder}-few.json").exists():
        found["few_at_a_time"] = in_small_batches(kept, row.folder)
    given = [kept / f"{name}.json" for name in (row.folder, "reference")]
    if all(path.exists() for path in given):
        found["tokens"] = summary(*(json.loads(path.read_text()) for path in given))
    compared = json.loads((folder / "compare" / "compare.json").read_text())
    return found | {key: value for key, value in compared.items() if key not in ("a", "b")}  # paths of this machine


def in_small_batches(kept: Path, name: str) -> dict[str, Any]:
    """Answers asked a few at a time against the same server's asked all at once."""
    few, all_at_once = (json.loads((kept / f"{name}{end}.json").read_text()) for end in ("-few", ""))
    return summary(few, all_at_once[: len(few)])


def depends_on_its_batch(row: dict[str, Any]) -> bool:
    """Whether answers asked a few at a time are others than rounding explains; of a scored row."""
    found = row.get("few_at_a_time", {})
    changed = (found.get("largest_logprob_change") or 0.0) > MAX_CHANGE
    return changed or found.get("largest_gap_where_they_part", 0.0) > MAX_GAP


def texts(folder: Path) -> dict[str, str]:
    """Question id -> answer of a finished run."""
    with (folder / "records.jsonl").open(encoding="utf-8") as records:
        return {record["id"]: record["generation"] for record in map(json.loads, records)}


@click.command(help=__doc__)
@click.option(
    "--kernels",
    default="reference,exact,mxfp4_mega,fp8_mega,w4a16",
    show_default=True,
    help="Comma-separated, reference first: kernels (KERNEL@N: tokens and experts on N GPUs, KERNEL@N/MODE: moved by DeepEP in "
    "that mode), `exact` (FP64, nothing rounded), or SGLang's own backends, such as marlin.",
)
@click.option("--model", default=MODEL, type=click.Path(path_type=Path))
@click.option("--data", default=QUESTIONS, type=click.Path(path_type=Path))
@click.option("--sabotage-with", default="mxfp4_mega", show_default=True, help="Kernel that serves the sabotaged checkpoints.")
@click.option("--sabotages/--no-sabotages", "with_sabotages", default=True, show_default=True)
@click.option("--num-examples", type=click.IntRange(1), help="Only the first N questions.")
@click.option(
    "--log-probabilities/--no-log-probabilities",
    default=True,
    show_default=True,
    help=f"Compare {COMPARED} answers token by token.",
)
@click.option("--ready-timeout", default=900.0, show_default=True, help="Seconds until every server must answer.")
@click.option("--readme", default=README, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run folders and server logs.")
@click.argument("sglang_arguments", nargs=-1, type=click.UNPROCESSED)
def main(
    kernels: str,
    model: Path,
    data: Path,
    sabotage_with: str,
    with_sabotages: bool,
    num_examples: int | None,
    log_probabilities: bool,
    ready_timeout: float,
    readme: Path,
    out: Path,
    sglang_arguments: tuple[str, ...],
) -> None:
    rows = [row_of(name, model, out) for name in kernels.split(",")]
    rows += [sabotaged_row(name, model, sabotage_with, out) for name in (sabotages(1.0) if with_sabotages else ())]
    what = {"num_examples": num_examples, "data": data, "compared": COMPARED if log_probabilities else 0}
    wrong = ask_all(rows, out, ready_timeout, sglang_arguments, **what)
    if not (out / "reference" / "metrics.json").exists():
        sys.exit(f"no reference to compare with; went wrong: {wrong or 'nothing'}")
    found = [scored(row, out) for row in rows if (out / row.folder / "metrics.json").exists()]
    plots = readme.parent / "accuracy_table"
    plots.mkdir(exist_ok=True)
    (plots / "gpu_model_h200.json").write_text(json.dumps(found, indent=1) + "\n")
    table = markdown(found)
    click.echo(table)
    for row in found:
        if "same_text" in row:
            click.echo(f"{row['name']}: {row['same_text']} answers in the reference's very words; {row.get('tokens', '')}")
        if "few_at_a_time" in row:
            click.echo(f"{row['name']}, {AT_ONCE} at a time against all at once: {row['few_at_a_time']}")
    write_table(readme, "accuracy table, H200", table)
    plot(found, plots / "gpu_model_h200.png", "GPU model in stock SGLang, H200")
    bad = [row["name"] for row in found if "verdict" in row and (row["verdict"] == "worse") != row["sabotage"]]
    bad += [f"{row['name']} (answers depend on what runs beside them)" for row in found if depends_on_its_batch(row)]
    if bad or wrong:
        raise SystemExit(f"not as it should be: {', '.join(bad) or 'nothing'}; went wrong: {wrong or 'nothing'}")


if __name__ == "__main__":
    main()
