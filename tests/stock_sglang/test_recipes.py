"""Every launch of `launch/recipes/` and of README.md: accepted for its machine, refused in the right words for a smaller one."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import stock
import yaml
from small_v41 import FLASH_V41

from hopper_moe.launch.machine import GIB, Gpu, Machine
from hopper_moe.launch.model_facts import read_model
from hopper_moe.launch.preflight import Report, check
from hopper_moe.launch.sglang_args import parse
from hopper_moe.moe_backends.env import settings

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "launch" / "recipes"
GPUS = {
    "H100": Gpu(0, "NVIDIA H100 80GB HBM3", (9, 0), 79 * GIB, 79 * GIB, 132, 18),
    "H200": Gpu(0, "NVIDIA H200", (9, 0), 140 * GIB, 139 * GIB, 132, 18),
    "A100": Gpu(0, "NVIDIA A100-SXM4-80GB", (8, 0), 80 * GIB, 79 * GIB, 108, 12),
}
# What the released config.json files say of the routed experts.
MODELS = {
    "DeepSeek-V4-Flash": {"hidden_size": 4096, "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_hidden_layers": 43},
    "DeepSeek-V4-Pro": {"hidden_size": 7168, "moe_intermediate_size": 3072, "n_routed_experts": 384, "num_hidden_layers": 61},
    "DeepSeek-V4.1-Flash": {key: value for key, value in FLASH_V41["text_config"].items() if key != "model_type"},
}
PLACES = {"$NODE_RANK": "1", "$HEAD": "10.0.0.1"}

# (recipe, machine of its heading) -> (a smaller machine, words of the refusal there)
SMALLER = {
    ("v4-flash.md", "1 x H200"): ("1 x A100", "needs compute capability 9.0, here is compute capability 8.0"),
    ("v4-flash.md", "2 x H200"): ("2 x H100 with 70 GiB", "70.0 GiB free, but the weights need 68.6 GiB"),
    ("v4-flash.md", "4 x H200"): ("2 x H200", "--tp-size 4 needs 4 GPUs, but 2 are visible"),
    ("v4-flash.md", "4 x H100"): ("4 x H100 with 36 GiB", "36.0 GiB free, but the weights need 34.3 GiB"),
    ("v4-flash.md", "8 x H100"): ("4 x H100", "--tp-size 8 needs 8 GPUs, but 4 are visible"),
    ("v4-pro.md", "8 x H200"): ("8 x H100", "79.0 GiB free, but the weights need 95.7 GiB"),
    ("v4-pro.md", "2 hosts of 8 x H100"): (
        "2 hosts of 4 x H100",
        "--tp-size (8 x --pp-size 2|16) needs 8 GPUs on each of 2 hosts, but 4 are visible",
    ),
    ("v4.1-flash.md", "4 x H200"): ("4 x H100", "79.0 GiB free, but the weights need 114.5 GiB"),
    ("v4.1-flash.md", "8 x H200"): ("4 x H200", "--tp-size 8 needs 8 GPUs, but 4 are visible"),
    ("refresh.md", "4 x H200"): ("2 x H200", "--tp-size 4 needs 4 GPUs, but 2 are visible"),
    ("README.md", "4 x H200"): ("2 x H200", "--tp-size 4 needs 4 GPUs, but 2 are visible"),
    ("kubernetes.yaml", "8 x H100"): ("4 x H100", "--tp-size 8 needs 8 GPUs, but 4 are visible"),
}


@dataclass(frozen=True)
class Recipe:
    file: str
    machine: str
    model: str
    arguments: tuple[str, ...]


def serve_commands(text: str) -> list[list[str]]:
    """The arguments of every `hopper-moe serve` in the shell blocks of a Markdown text."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    for name, value in PLACES.items():
        blocks = blocks.replace(name, value)
    commands = [shlex.split(line) for line in blocks.splitlines() if line.strip()]
    return [command[2:] for command in commands if command[:2] == ["hopper-moe", "serve"]]


def in_markdown(file: Path) -> list[Recipe]:
    found = []
    for section in re.split(r"^## ", file.read_text(), flags=re.MULTILINE)[1:]:
        heading = section.partition("\n")[0].strip()
        found += [Recipe(file.name, heading, model, tuple(rest)) for model, *rest in serve_commands(section)]
    return found


def in_kubernetes() -> list[Recipe]:
    deployment, _ = yaml.safe_load_all((RECIPES / "kubernetes.yaml").read_text())
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    command, model, *arguments = container["args"]
    assert command == "serve"
    return [Recipe("kubernetes.yaml", f"{container['resources']['limits']['nvidia.com/gpu']} x H100", model, tuple(arguments))]


def in_the_readme() -> list[Recipe]:
    """What the first screen serves and checks, with and without `hopper-moe`; on four H200."""
    lines = re.findall(r"^ {4}(\S.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    found = []
    for program, command, *arguments in map(shlex.split, lines):
        if program == "sglang":
            assert command == "serve" and arguments[0] == "--model-path"
            arguments = arguments[1:]
        elif program != "hopper-moe" or command not in ("serve", "doctor"):
            continue
        found.append(Recipe("README.md", "4 x H200", arguments[0], tuple(arguments[1:])))
    return found


ALL = [recipe for file in (*sorted(RECIPES.glob("v4*.md")), RECIPES / "refresh.md") for recipe in in_markdown(file)]
ALL += in_kubernetes() + in_the_readme()


def machine_of(text: str) -> Machine:
    """The machine that a heading names; of several hosts, one. "with N GiB": so much is free."""
    count, name, free = re.fullmatch(r"(?:\d+ hosts of )?(\d+) x ([AH]\d00)(?: with (\d+) GiB)?", text).groups()
    gpu = GPUS[name]
    gpu = replace(gpu, free_bytes=int(free) * GIB) if free else gpu
    return Machine(tuple(replace(gpu, index=index) for index in range(int(count))), driver="580.65")


def model_folder(recipe: Recipe, folder: Path) -> Path:
    """A folder that the launch rules read like the recipe's model."""
    if not recipe.model.startswith("/models/"):
        return ROOT / recipe.model
    sizes = MODELS[recipe.model.removeprefix("/models/")]
    ratios = [0, 0, *[4] * (sizes["num_hidden_layers"] - 1)]  # of the attention of every layer and of the draft's
    return stock.write_model(folder / "model", **{"num_experts_per_tok": 6, "compress_ratios": ratios} | sizes)


def preflight(recipe: Recipe, model: Path, machine: str) -> Report:
    stock.forget_settings()
    launch = parse(str(model), ["--device", "cuda", "--log-level", "error", *recipe.arguments])
    return check(launch, read_model(str(model)), machine_of(machine), settings())


def test_every_machine_has_a_smaller_one():
    assert {(recipe.file, recipe.machine) for recipe in ALL} == set(SMALLER) and len(ALL) >= 19


@pytest.mark.parametrize("recipe", ALL, ids=[f"{r.file} {r.machine} {i}" for i, r in enumerate(ALL)])
def test_recipe(tmp_path, recipe):
    os.environ["HOPPER_MOE_KERNEL"] = "mxfp4_mega"
    model = model_folder(recipe, tmp_path)
    report = preflight(recipe, model, recipe.machine)
    assert report.refusals == () and report.verdict.plan.kernel == "mxfp4_mega"
    smaller, words = SMALLER[recipe.file, recipe.machine]
    refusals = preflight(recipe, model, smaller).refusals
    assert refusals and all(re.search(words, sentence) for sentence in refusals), refusals
    before = dict(os.environ)
    stock.resolve(model, *recipe.arguments)  # what SGLang and the plugin's hooks say of it; refusals are raised
    os.environ.clear()
    os.environ.update(before)


def test_what_the_pages_call_refused_is_refused(tmp_path):
    """The sentences beside the recipes: V4-Flash on one H200, and sixteen ranks that exchange tokens over two hosts."""
    os.environ["HOPPER_MOE_KERNEL"] = "mxfp4_mega"
    flash = Recipe("v4-flash.md", "1 x H200", "/models/DeepSeek-V4-Flash", ())
    model = model_folder(flash, tmp_path / "flash")
    assert "the weights need 137.1 GiB" in preflight(flash, model, flash.machine).refusals[0]
    nodes = ("--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "10.0.0.1:5000")
    over_hosts = ("--tp-size", "16", "--attn-dp-size", "16", "--chunked-prefill-size", "16384", *nodes)
    pro = Recipe("v4-pro.md", "2 hosts of 8 x H100", "/models/DeepSeek-V4-Pro", over_hosts)
    report = preflight(pro, folder := model_folder(pro, tmp_path / "pro"), pro.machine)
    (exchange,) = (line for line in report.lines if line.startswith("exchange"))
    assert report.refusals == () and "deepep: the 16 ranks of a stage span 2 hosts" in exchange
    fused = replace(pro, arguments=(*over_hosts, "--moe-a2a-backend", "megamoe"))
    (sentence,) = preflight(fused, folder, pro.machine).refusals
    assert "--nnodes 2 spreads the 16 ranks that exchange tokens over hosts" in sentence
    sliced = Recipe("v4.1-flash.md", "8 x H200", "/models/DeepSeek-V4.1-Flash", ("--tp-size", "8"))
    (sentence,) = preflight(sliced, model_folder(sliced, tmp_path / "v41"), sliced.machine).refusals
    assert "2304 over 8 tensor-parallel slices is no multiple of 128" in sentence and "--ep-size 8" in sentence
