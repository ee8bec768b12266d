"""The Markdown pages: length and wrapping, links, every command parsed by the program that it calls, the Python example."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import click
import pytest
import torch
import yaml

from hopper_moe.kernels import jit, reference
from hopper_moe.kernels.mega_moe import MegaMoE
from hopper_moe.launch.cli import main as hopper_moe
from hopper_moe.moe_backends.sglang import seams

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / name for name in subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
] or [path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
README = (ROOT / "README.md").read_text()
MAX_LINES, MAX_WORDS, MAX_COLUMNS = 120, 1000, 100
PROGRAMS = ("hopper-moe", "make", "pip", "pytest", "python", "sh", "sglang")


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= MAX_LINES and len(README.split()) <= MAX_WORDS


def test_the_readme_has_neither_hashes_nor_second_numbers():
    hashes = [word for word in re.findall(r"\b[0-9a-f]{7,40}\b", README) if re.search("[a-f]", word) and re.search("[0-9]", word)]
    assert hashes == []
    assert re.findall(r"[0-9]\**\s*\([0-9][0-9.,]*\s*[),]", README) == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_wrapped(page):
    """Tables and blocks between fences may be wider."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    wide = [line for line in text.splitlines() if len(line) > MAX_COLUMNS and not line.lstrip().startswith("|")]
    assert wide == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links(page):
    """Files exist, and so do the headings that are named behind a #."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            found = [
                re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in file.read_text().splitlines()
            ]
            assert heading in found, f"{page.name} links to {target}"


# ---- commands


def commands_of(page: Path) -> list[list[str]]:
    """Every command in code blocks and inline code that begins with one of PROGRAMS. SGLang's own arguments, which `serve` and
    `doctor` leave alone, are read in `tests/stock_sglang/test_recipes.py`."""
    text = page.read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"^ {4}(\S.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    lines = [line.strip() for line in lines]
    found = [line for line in lines if line.split(" ")[0] in PROGRAMS and " " in line and "..." not in line]
    return [shlex.split(line, comments=True) for line in dict.fromkeys(found)]


COMMANDS = [(page, command) for page in PAGES for command in commands_of(page)]


def parse_click(command: click.Command, arguments: list[str]) -> None:
    """Read the arguments as the program would, and run nothing. Raises what the program would say of a wrong one.

    A command that a text names without any argument has to exist, no more.
    """
    name = "hopper-moe"
    while isinstance(command, click.Group) and arguments:
        name, *arguments = arguments
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"no command {name}"
        command = found
    if arguments:
        command.make_context(name, list(arguments))


def check_pytest(arguments: list[str], config: pytest.Config) -> None:
    for argument in arguments:
        if argument.startswith("tests/"):
            assert (ROOT / argument).exists(), argument
        elif argument.startswith("--"):
            config.getoption(argument)  # raises for an option that nobody has added


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for argument in arguments[1:]:
        assert set(re.findall(r"[\w-]+", argument.partition("[")[2])) <= set(extras), argument


def check_module(name: str, arguments: list[str], is_read: bool) -> None:
    """The module's own click command reads its arguments (`is_read`); else its source has to name the flags: importing some of
    these modules takes longer than all tests here."""
    found = importlib.util.find_spec(name)
    assert found is not None, f"no module {name}"
    if found.submodule_search_locations:
        found = importlib.util.find_spec(f"{name}.__main__")
    if is_read:
        parse_click(importlib.import_module(found.name).main, arguments)
    source = Path(found.origin).read_text()
    assert [flag for flag in arguments if flag.startswith("-") and f'"{flag}"' not in source] == []


@pytest.mark.parametrize(
    ("page", "command"), COMMANDS, ids=[f"{page.relative_to(ROOT)}: {' '.join(command)}" for page, command in COMMANDS]
)
def test_command(page, command, pytestconfig):
    program, *arguments = command
    if program == "hopper-moe":
        parse_click(hopper_moe, arguments)
    elif program == "make":
        assert subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True).returncode == 0
    elif program == "pytest":
        check_pytest(arguments, pytestconfig)
    elif program == "pip":
        check_pip(arguments)
    elif program == "sh":
        assert subprocess.run(["sh", "-n", arguments[0]], cwd=ROOT, capture_output=True).returncode == 0
    elif program == "python":
        assert arguments[0] == "-m"
        check_module(arguments[1], arguments[2:], page == ROOT / "README.md")
    else:
        assert command[:2] == ["sglang", "serve"]  # tests/stock_sglang/test_recipes.py


def test_the_readme_shows_its_commands():
    """What the tests above look at is not nothing: the first screen has the demo and a launch."""
    found = [" ".join(command) for page, command in COMMANDS if page == ROOT / "README.md"]
    assert "make demo" in found and any(line.startswith("hopper-moe serve") for line in found) and len(found) >= 9


# ---- recipes that are no launches

RECIPES = ROOT / "launch" / "recipes"


def test_the_dockerfile():
    """It builds on the SGLang that the plugin is pinned to, from files that exist, with commands that exist."""
    lines = (RECIPES / "Dockerfile").read_text().splitlines()
    steps = [line.partition(" ")[::2] for line in lines if line and not line.startswith("#")]
    assert ("ARG", f"SGLANG_IMAGE=lmsysorg/sglang:v{seams.VERSION}") in steps
    assert [rest.split(" ")[0] for name, rest in steps if name == "FROM"] == ["${SGLANG_IMAGE}"] * 2
    copied = [rest.split()[:-1] for name, rest in steps if name == "COPY" and not rest.startswith("--from")]
    assert all((ROOT / source).exists() for sources in copied for source in sources)
    assert {"kernels", "launch", "eval", "moe_backends", "quantization"} <= {source for sources in copied for source in sources}
    runs = [shlex.split(rest) for name, rest in steps if name == "RUN"]
    (build,) = [run for run in runs if run[0] == "hopper-moe"]
    assert set(jit.LIBRARIES) <= set(build) and Path(build[-1]) == jit.PREBUILT_DIR.relative_to(ROOT)
    entry, command = (json.loads(rest) for name, rest in steps if name in ("ENTRYPOINT", "CMD"))
    for arguments in (build[1:], [*entry[1:], *command]):
        parse_click(hopper_moe, arguments)


def test_the_gpqa_run_has_the_settings_of_sgl_evals_preset():
    package = Path(importlib.util.find_spec("sgl_eval").origin).parent
    preset = yaml.safe_load((package / "model_presets.yaml").read_text())["models"]["deepseek-ai/DeepSeek-V4-Flash-0731"][
        "sampling"
    ]
    (command,) = [run for run in commands_of(RECIPES / "evaluate.md") if run[:3] == ["hopper-moe", "eval", "gpqa"]]
    given = dict(zip(command, command[1:], strict=False))
    assert float(given["--temperature"]) == preset["temperature"] and float(given["--top-p"]) == preset["top_p"]
    assert int(given["--max-tokens"]) == preset["max_tokens"] and "--thinking" in command and preset["thinking"]


# ---- the Python example

SMALL = {"4096": "256", "2048": "128", "32": "8", '"cuda"': '"cpu"'}


class OnPaper(MegaMoE):
    """A `MegaMoE` whose arguments are bound to the real signatures and whose result is the reference's."""

    def __init__(self, *args, **kwargs):
        self.shard = inspect.signature(MegaMoE.__init__).bind(self, *args, **kwargs).arguments["shard"]

    def __call__(self, *args, **kwargs):
        given = inspect.signature(MegaMoE.__call__).bind(self, *args, **kwargs).arguments
        x, ids, weights, packed = (given[name] for name in ("hidden_states", "topk_ids", "topk_weights", "packed"))
        assert (ids.dtype, weights.dtype, x.dtype) == (torch.int32, torch.float32, torch.bfloat16)
        return reference.moe_layer(x, ids, weights, packed, swiglu_limit=self.shard.swiglu_limit)


def test_the_python_example(monkeypatch):
    """Executed on the CPU with small sizes; the kernel call itself is the reference's."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "kernels" / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    for full, small in SMALL.items():
        code = re.sub(rf"(?<![\w.]){full}(?![\w.])", small, code)
    monkeypatch.setattr("hopper_moe.kernels.mega_moe.MegaMoE", OnPaper)
    scope: dict = {}
    exec(compile(code, "kernels/README.md", "exec"), scope)
    assert scope["y"].shape == (64, 256) and not scope["y"].isnan().any() and bool(scope["y"].any())
