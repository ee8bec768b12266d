"""Times on the GPU: launches of a captured graph, kernels under the profiler, and the two ceilings of the chip."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch


def replay_times(run: Callable[[], object], num_calls: int, num_launches: int, graph: bool) -> list[float]:
    """us per call, one value per timed launch of `run`, which makes `num_calls` calls; as one CUDA graph or eagerly.

    Two untimed launches come first. Under a graph the launches queue up behind one another, so the host's time is not measured;
    eager calls include it where it is the longer one.
    """
    return interleaved_times({"run": run}, num_calls, num_launches, graph)["run"]


def interleaved_times(
    runs: Mapping[str, Callable[[], object]], num_calls: int, num_launches: int, graph: bool
) -> dict[str, list[float]]:
    """`replay_times` of several runs whose launches take turns, so that a clock that changes changes for all of them."""
    launches = {name: _launchable(run, graph) for name, run in runs.items()}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for turn in range(2 + num_launches):
        for name, launch in launches.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            launch()
            end.record()
            if turn >= 2:
                events[name].append((begin, end))
        if turn == 1:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) * 1e3 / num_calls for begin, end in pairs] for name, pairs in events.items()}


def _launchable(run: Callable[[], object], graph: bool) -> Callable[[], object]:
    run()
    torch.cuda.synchronize()
    if not graph:
        return run
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def kernel_time(run: Callable[[], None], kernel_name: str) -> float:
    """Median us of one kernel, over all its launches in `run`, from its start to its end as the profiler sees them.

    A kernel that starts before the one it depends on has ended (programmatic dependent launch) includes its waiting.
    """
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    times = [event.device_time for event in profiler.events() if kernel_name in event.name]
    if not times:
        raise RuntimeError(f"the profiler saw no kernel named {kernel_name}.")
    return statistics.median(times)


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """(median, 10th percentile, 90th percentile)."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return statistics.median(times), tenths[0], tenths[-1]


def _median_seconds(run: Callable[[], object], repeats: int = 15) -> float:
    return statistics.median(replay_times(run, 1, repeats, graph=False)) * 1e-6


def hbm_read_tbps(num_bytes: int = 4 << 30) -> float:
    """TB/s of reading `num_bytes` once: the fastest of three torch reductions, median of 15 each."""
    data = torch.zeros(num_bytes // 4, dtype=torch.float32, device="cuda").normal_()
    rows = data.view(-1, 1 << 16)
    reductions = (lambda: data.sum(), lambda: rows.sum(1), lambda: rows.amax(1))
    return num_bytes / min(map(_median_seconds, reductions)) / 1e12


def fp8_matmul_tflops(size: int = 8192) -> float:
    """TFLOP/s of torch._scaled_mm (cuBLAS), E4M3 random data, fast accumulation, BF16 out, size**3; median of 15."""
    a, b = (torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * size**3 / _median_seconds(multiply) / 1e12
