"""Drives stock SGLang on a CPU machine: simulated SM90, real argument resolution, real layers, real loaders and forwards.

Nothing of SGLang is replaced. `get_platform()` facts are overridden through SGLang's own `override_platform`, and parallel ranks
through `override_permanently`: both exist for this purpose.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import queue
import struct
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hopper_moe.kernels.device import SM90
from hopper_moe.quantization.checkpoint_names import QUANTIZATION_CONFIG

torch.set_num_threads(1)  # a forked child would wait forever for the threads of a pool that stayed in its parent

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, FACTOR, LIMIT = 384, 256, 16, 4, 1.5, 1.0
SIZES = {"w1": (INTERMEDIATE, HIDDEN), "w3": (INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE)}  # of one expert
SHARED = [f"model.layers.0.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")]  # BF16: FP8 linears need a GPU


def config_dict(**changes: Any) -> dict[str, Any]:
    """A small DeepSeek-V4 config.json; field names as in the released ones."""
    attention = {
        "attention_bias": False, "attention_dropout": 0.0, "head_dim": 512, "num_attention_heads": 64, "num_key_value_heads": 1,
        "o_groups": 8, "o_lora_rank": 1024, "q_lora_rank": 1024, "qk_rope_head_dim": 64, "sliding_window": 128,
        "index_head_dim": 128, "index_n_heads": 64, "index_topk": 512, "compress_ratios": [0, 0, 4, 128, 0],
        "compress_rope_theta": 160000, "rope_theta": 10000, "max_position_embeddings": 65536,
        "rope_scaling": {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096},
    }  # fmt: skip
    experts = {
        "moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K, "n_shared_experts": 1,
        "num_hash_layers": 0, "norm_topk_prob": True, "routed_scaling_factor": FACTOR, "scoring_func": "sqrtsoftplus",
        "swiglu_limit": LIMIT, "topk_method": "noaux_tc", "expert_dtype": "fp4", "quantization_config": QUANTIZATION_CONFIG,
    }  # fmt: skip
    rest = {
        "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "torch_dtype": "bfloat16", "vocab_size": 1280,
        "bos_token_id": 0, "eos_token_id": 1, "hidden_size": HIDDEN, "hidden_act": "silu", "initializer_range": 0.02,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hc_eps": 1e-6, "hc_mult": 4, "hc_sinkhorn_iters": 20,
        "num_hidden_layers": 4, "num_nextn_predict_layers": 1, "use_cache": True,
    }  # fmt: skip
    return attention | experts | rest | changes


def write_model(folder: Path, expert_dtype: str = "I8", **changes: Any) -> Path:
    """config.json and one safetensors header: all that argument resolution reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_dict(**changes)))
    name = "layers.0.ffn.experts.0.w1.weight"
    header = json.dumps({name: {"dtype": expert_dtype, "shape": [2, 2], "data_offsets": [0, 4]}}).encode()
    (folder / "model-00001.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: "model-00001.safetensors"}}))
    return folder


# ---- resolution


def simulate_sm90() -> None:
    """From now on SGLang takes this machine for one with a Hopper GPU."""
    from sglang.srt.layers.moe.token_dispatcher import standard
    from sglang.srt.models import deepseek_v2
    from sglang.srt.runtime_context import override_platform

    facts = dict.fromkeys(("is_sm100", "is_sm120", "is_blackwell", "is_hip"), False) | {
        "device_sm": 90,
        "device_capability": SM90,
    }
    override_platform(is_cuda=True, is_sm90=True, **facts).install()
    deepseek_v2._is_cuda = (
        True  # computed at import from the real machine: elsewhere it multiplies the routed factor in by itself
    )
    standard.get_device = lambda: "cpu"  # where the dispatcher puts its table


def forget_settings() -> None:
    """Our process-wide caches: a test changes the environment, a server does not."""
    from hopper_moe.moe_backends import env
    from hopper_moe.moe_backends.sglang import hooks

    env.settings.cache_clear()
    hooks.chosen_kernel.cache_clear()


def resolve(model: Path, *argv: str, backend: str = "hopper_moe") -> Any:
    """Stock parser and resolution of `--moe-runner-backend backend`; returns ServerArgs. Raises what they raise."""
    from sglang.srt.server_args import prepare_server_args

    forget_settings()
    args = prepare_server_args(
        ["--model-path", str(model), "--device", "cuda", "--log-level", "error", "--moe-runner-backend", backend, *argv]
    )
    args.resolve_once()
    return args


def publish(args: Any, rank: int = 0) -> None:
    """Become worker `rank` of this launch: published arguments, every parallel rank, the MoE configuration. Groups: `join`."""
    from sglang.srt import runtime_context
    from sglang.srt.layers.moe.utils import initialize_moe_config

    runtime_context.reset_context()
    runtime_context.publish(args, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=rank))
    initialize_moe_config()


def join(args: Any, store: Path, rank: int = 0, world_size: int = 1) -> None:
    """Build SGLang's own process groups over gloo, meeting in the file `store`; after `publish`."""
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel

    os.environ["SGLANG_NCCL_SO_PATH"] = "/no/nccl/on/a/machine/without/gpu"  # SGLang then leaves NCCL out
    init_distributed_environment(world_size, rank, f"file://{store}", rank, "gloo")
    initialize_model_parallel(backend="gloo")


def in_ranks(work: Callable[[int], Any], args: Any, world_size: int, folder: Path) -> list[Any]:
    """`work(rank)` in forked processes that are the workers of this launch, groups joined; returns what each returned, by rank.

    Forked, so that ranks cost no second import of SGLang. An exception in a rank fails the test with that rank's traceback.
    """
    store = Path(tempfile.mktemp(dir=folder))
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def run(rank: int) -> None:
        try:
            publish(args, rank)
            join(args, store, rank, world_size)
            # As in SGLang's scheduler. Else torch.compile begins autograd's threads, and in a fork two of them at a time can end
            # the process ("Invalid thread pool").
            with torch.no_grad():
                found, problem = work(rank), None
        except BaseException:
            found, problem = None, traceback.format_exc()
        results.put((rank, pickle.dumps(found), problem))

    processes = [context.Process(target=run, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, result, problem = _next_result(results, processes, found)
            assert problem is None, f"rank {rank}:\n{problem}"
            found[rank] = pickle.loads(result)
    finally:
        for process in processes:  # they have said all they had to say; leaving gloo in good order takes seconds
            process.kill()
            process.join()
    return [found[rank] for rank in range(world_size)]


def _next_result(results: Any, processes: list[Any], found: dict[int, Any]) -> tuple[int, bytes, str | None]:
    """What the next rank has to say. Fails for a rank that died without a word, and when none says anything for five minutes."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        silent = {rank: process for rank, process in enumerate(processes) if rank not in found}
        died = [f"rank {rank} died with exit code {p.exitcode}" for rank, p in silent.items() if not p.is_alive()]
        try:
            return results.get(timeout=1)
        except queue.Empty:
            assert not died, "; ".join(died)
    raise AssertionError(f"ranks {', '.join(map(str, silent))} said nothing for 300 s")


# ---- layers


def quant_config(is_fp4: bool = True, **changes: Any) -> Any:
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    return Fp8Config(
        is_checkpoint_fp8_serialized=True,
        activation_scheme="dynamic",
        weight_block_size=[128, 128],
        is_fp4_experts=is_fp4,
        **changes,
    )


def fused_moe(num_experts: int = EXPERTS, **changes: Any) -> Any:
    """Stock FusedMoE for the place that `publish` gave this process."""
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    with _bf16():
        given = dict(
            num_experts=num_experts,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            layer_id=0,
            top_k=TOP_K,
            quant_config=quant_config(),
            routed_scaling_factor=FACTOR,
            swiglu_limit=LIMIT,
            prefix="model.layers.0.mlp.experts",
        )
        return FusedMoE(**given | changes)


class _bf16:
    def __enter__(self) -> None:
        torch.set_default_dtype(torch.bfloat16)

    def __exit__(self, *exc: object) -> None:
        torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Checkpoint:
    """One layer's experts in the original naming, and the same as float64 for independent arithmetic."""

    tensors: dict[str, torch.Tensor]
    gate: torch.Tensor  # float32 [E, H]
    bias: torch.Tensor  # float32 [E]
    shared: tuple[torch.Tensor, torch.Tensor]  # bf16 [2I, H] (gate, up) and [H, I]

    def dense(self, expert: int, shard: str) -> torch.Tensor:
        """float64 weights, decoded here without the package's codecs."""
        packed = self.tensors[f"layers.0.ffn.experts.{expert}.{shard}.weight"].view(torch.uint8).long()
        scale = self.tensors[f"layers.0.ffn.experts.{expert}.{shard}.scale"].view(torch.uint8).long()
        codes = torch.stack((packed % 16, packed // 16), -1).flatten(-2)
        magnitude = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)[codes % 8]
        return magnitude * torch.where(codes >= 8, -1.0, 1.0) * torch.exp2((scale - 127).double()).repeat_interleave(32, -1)


def whole_experts(checkpoint: Checkpoint) -> Any:
    """All experts of a layer as the reference kernel reads them."""
    from hopper_moe.kernels.reference_weights import Mxfp4Experts

    def stacked(part: str, *shards: str) -> torch.Tensor:
        names = [[f"layers.0.ffn.experts.{e}.{shard}.{part}" for shard in shards] for e in range(EXPERTS)]
        return torch.stack([torch.cat([checkpoint.tensors[n].view(torch.uint8) for n in group]) for group in names])

    return Mxfp4Experts(
        stacked("weight", "w1", "w3"), stacked("scale", "w1", "w3"), stacked("weight", "w2"), stacked("scale", "w2")
    )


def random_checkpoint(seed: int, exponents: tuple[int, int] = (120, 123)) -> Checkpoint:
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for expert in range(EXPERTS):
        for shard, (rows, k) in SIZES.items():
            name = f"layers.0.ffn.experts.{expert}.{shard}"
            tensors[f"{name}.weight"] = torch.randint(0, 256, (rows, k // 2), generator=rng, dtype=torch.uint8).view(torch.int8)
            scale = torch.randint(exponents[0], exponents[1] + 1, (rows, k // 32), generator=rng, dtype=torch.uint8)
            tensors[f"{name}.scale"] = scale.view(torch.float8_e8m0fnu)
    gate = torch.randn(EXPERTS, HIDDEN, generator=rng) / HIDDEN**0.5
    shared = [torch.randn(shape, generator=rng).bfloat16() / 32 for shape in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))]
    return Checkpoint(tensors, gate, torch.randn(EXPERTS, generator=rng) / 8, tuple(shared))


def random_fp8_tensors(seed: int) -> dict[str, torch.Tensor]:
    """A layer's experts in the original naming: E4M3 and one FP32 scale per 128 x 128."""
    rng, found = torch.Generator().manual_seed(seed), {}
    for expert in range(EXPERTS):
        for shard, (rows, columns) in SIZES.items():
            name = f"layers.0.ffn.experts.{expert}.{shard}"
            found[f"{name}.weight"] = torch.randn(rows, columns, generator=rng).to(torch.float8_e4m3fn)
            found[f"{name}.scale"] = torch.rand(rows // 128, columns // 128, generator=rng) + 0.5
    return found


def load(experts: Any, tensors: dict[str, torch.Tensor]) -> None:
    """What stock `DeepseekV4ForCausalLM.load_weights` does with expert tensors, with its name table and its parameters'
    loaders."""
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.models.deepseek_v4 import DeepseekV4ForCausalLM

    mapping = FusedMoE.make_expert_params_mapping("gate_proj", "down_proj", "up_proj", num_experts=EXPERTS)
    params = {f"model.layers.0.mlp.experts.{name}": param for name, param in experts.named_parameters()}
    for name, tensor in tensors.items():
        name = DeepseekV4ForCausalLM.remap_weight_name_to_dpsk_hf_format(name)
        param_name, weight_name, expert_id, shard_id = next(entry for entry in mapping if entry[1] in name)
        name = name.replace(weight_name, param_name)
        params[name].weight_loader(params[name], tensor, name, shard_id=shard_id, expert_id=expert_id)


def moe_block(checkpoint: Checkpoint, **changes: Any) -> Any:
    """Stock DeepseekV2MoE (as DeepSeek-V4 builds it) with gate and experts loaded and packed."""
    from sglang.srt.models.deepseek_v2 import DeepseekV2MoE
    from transformers import PretrainedConfig

    config = PretrainedConfig.from_dict(config_dict(n_group=1, topk_group=1, **changes))
    with _bf16():
        block = DeepseekV2MoE(
            config=config,
            layer_id=0, quant_config=quant_config(ignored_layers=SHARED), prefix="model.layers.0.mlp", is_deepseek_v4=True,
        )  # fmt: skip
    _load_shared(block.shared_experts, checkpoint)
    block.gate.weight.data = checkpoint.gate.clone()
    block.gate.e_score_correction_bias.data = checkpoint.bias.clone()
    load(block.experts, checkpoint.tensors)
    block.experts.quant_method.process_weights_after_loading(block.experts)
    return block


def _load_shared(mlp: Any, checkpoint: Checkpoint) -> None:
    from sglang.srt.runtime_context import get_parallel

    mlp.swiglu_limit = None  # the clamping activation is a CUDA kernel; the shared expert is not what is tested
    ranks = INTERMEDIATE // mlp.down_proj.weight.shape[1]
    mine = slice(*(INTERMEDIATE // ranks * (get_parallel().tp_rank % ranks + edge) for edge in (0, 1)))
    gate, up = checkpoint.shared[0].chunk(2)
    mlp.gate_up_proj.weight.data.copy_(torch.cat((gate[mine], up[mine])))
    mlp.down_proj.weight.data.copy_(checkpoint.shared[1][:, mine])


# ---- independent arithmetic


def route(checkpoint: Checkpoint, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V4 routing in float64: (ids [M, K], weights [M, K] with the routed scaling factor)."""
    scores = torch.nn.functional.softplus(x.double() @ checkpoint.gate.double().T).sqrt()
    ids = (scores + checkpoint.bias.double()).topk(TOP_K, dim=-1).indices
    weights = scores.gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) * FACTOR


def expected(
    checkpoint: Checkpoint, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: range = range(EXPERTS)
) -> torch.Tensor:
    """The routed experts in float64, nothing rounded, over a range of experts: [M, H]."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for expert in experts:
        token, slot = (ids == expert).nonzero(as_tuple=True)
        rows = x[token].double()
        gate = (rows @ checkpoint.dense(expert, "w1").T).clamp(max=LIMIT)
        up = (rows @ checkpoint.dense(expert, "w3").T).clamp(-LIMIT, LIMIT)
        y.index_add_(
            0, token, weights[token, slot, None].double() * ((gate * gate.sigmoid() * up) @ checkpoint.dense(expert, "w2").T)
        )
    return y


def expected_shared(checkpoint: Checkpoint, x: torch.Tensor) -> torch.Tensor:
    """The shared expert in float64: [M, H]."""
    gate, up = (x.double() @ checkpoint.shared[0].double().T).chunk(2, -1)
    return (gate * gate.sigmoid() * up) @ checkpoint.shared[1].double().T


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


ROUNDING = 0.1
"""Relative error that E4M3 activations and BF16 results may make (0.05 is usual); a wrong factor, id or matrix makes 0.25 or
more."""
