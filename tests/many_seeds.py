"""`pytest --seeds N`: every randomised CPU test with N seeds, and no other test (`make test-seeds`).

A test is randomised when it takes `seed`, directly or through another fixture, or `seed_block`. All seeds run in one process,
since importing torch takes longer than most of these tests. `--dist loadgroup` hands whole seeds to the workers, in order, and
each is named when it begins: a run that was stopped carries on with --first-seed.

Tests that take long do less with each seed: the markers `cases_per_seed` and `one_seed_in` say how much.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict

import pytest

BLOCK = 25  # seeds that a process started by a test goes through

MARKERS = (
    "cases_per_seed(n): under --seeds each seed runs n of the test's cases, in turn",
    "one_seed_in(n): under --seeds the test runs with every n-th seed",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, help="run every randomised CPU test with so many seeds, and no other test")
    parser.addoption("--first-seed", type=int, help="the first of --seeds; fresh if not given")


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if not config.getoption("seeds"):
        return
    if config.getoption("first_seed") is None:
        config.option.first_seed = random.SystemRandom().randrange(2**31)  # before xdist hands the options to its workers
    if config.getoption("scenarios") is None:
        config.option.scenarios = 1
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Progress(config))


def _seeds(config: pytest.Config) -> range:
    first = config.getoption("first_seed")
    return range(first, first + config.getoption("seeds"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not metafunc.config.getoption("seeds"):
        return
    seeds = _seeds(metafunc.config)
    if "seed" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("one_seed_in")
        seeds = [seed for seed in seeds if marker is None or seed % marker.args[0] == 0]
        values = [pytest.param(seed, marks=pytest.mark.xdist_group(str(seed)), id=f"seed={seed}") for seed in seeds]
        metafunc.parametrize("seed", values, scope="session")
    elif "seed_block" in metafunc.fixturenames:
        blocks = [seeds[start : start + BLOCK] for start in range(0, len(seeds), BLOCK)]
        metafunc.parametrize("seed_block", [pytest.param(block, id=f"seeds={block[0]}..{block[-1]}") for block in blocks])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("seeds"):
        return
    chosen = _cases_in_turn([item for item in items if _is_randomised(item) and not item.get_closest_marker("gpu")])
    config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
    items[:] = sorted(chosen, key=lambda item: _seed(item) or 0)  # blocks of seeds first: they take longest


def _is_randomised(item: pytest.Item) -> bool:
    """With a seed of this run: a test for every n-th seed may have none."""
    return hasattr(item, "callspec") and ("seed_block" in item.callspec.params or _seed(item) is not None)


def _seed(item: pytest.Item) -> int | None:
    seed = item.callspec.params.get("seed")
    return seed if isinstance(seed, int) else None


def _cases_in_turn(items: list[pytest.Item]) -> list[pytest.Item]:
    """All but the cases of `cases_per_seed` tests whose turn comes with another seed."""
    groups = defaultdict(list)
    for item in items:
        groups[item.path, item.originalname, _seed(item)].append(item)
    chosen = []
    for (_, _, seed), cases in groups.items():
        marker, rare = (cases[0].get_closest_marker(name) for name in ("cases_per_seed", "one_seed_in"))
        count = min(marker.args[0], len(cases)) if marker else len(cases)
        turn = seed // rare.args[0] if marker and rare else seed
        chosen += [cases[(turn * count + n) % len(cases)] for n in range(count)] if marker else cases
    return chosen


class _Progress:
    """What failed, at once, and each seed as it begins; no dot for each of the tens of thousands of passes."""

    def __init__(self, config: pytest.Config) -> None:
        self._config, self._begun, self._failures = config, set(), 0

    def _say(self, line: str) -> None:
        self._config.pluginmanager.get_plugin("terminalreporter").write_line(line)

    def pytest_sessionstart(self) -> None:
        seeds = _seeds(self._config)
        self._say(f"{len(seeds)} seeds from {seeds[0]}; one of them alone: TEST_SEED={seeds[0]} pytest")

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return ("passed" if report.when == "call" else "", "", "") if report.passed else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failures += 1
            self._say(f"FAILED {report.nodeid}\n{report.longreprtext[-4000:]}")
        if (found := re.search(r"\bseed=(\d+)", report.nodeid)) and found[1] not in self._begun:
            self._begun.add(found[1])
            count = len(_seeds(self._config))
            self._say(f"seed {found[1]}, the {len(self._begun)}. of {count}; failures so far: {self._failures}")
