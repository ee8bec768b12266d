"""The GPU model's training code: its forward pass is transformers', its quantisers are the checkpoint writer's."""

import hashlib
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from hopper_moe.eval.benchmarks import DATA
from hopper_moe.eval.gpu_model import fake_quant, train, widen
from hopper_moe.eval.gpu_model.config import CONFIG, MIX
from hopper_moe.eval.gpu_model.data import LENGTH, encode, held_out_questions
from hopper_moe.eval.gpu_model.forward import forward
from hopper_moe.eval.gpu_model.state import initial_state, is_trained, whole_state
from hopper_moe.eval.tiny_model.config import build_model
from hopper_moe.eval.tiny_model.tokenizer import build_tokenizer
from hopper_moe.eval.word_problems import is_held_out, problems, question_set
from hopper_moe.launch.cpu_host.engine import Engine, Request
from hopper_moe.launch.cpu_host.model import load
from hopper_moe.quantization import codecs
from hopper_moe.quantization.errors import Refusal

MODEL, QUESTIONS = DATA / "gpu_dsv4", DATA / "word_problems_hard.jsonl"


@pytest.fixture
def state(seed: int) -> dict[str, torch.Tensor]:
    """Random everywhere: nothing at a neutral value that would hide it."""
    generator = torch.Generator().manual_seed(seed)
    state = initial_state(seed)
    for name, tensor in state.items():
        if is_trained(name):
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05 if tensor.ndim > 1 else 0.3)
        elif name.endswith("bias"):
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return state


def test_forward_is_transformers(state: dict[str, torch.Tensor], seed: int) -> None:
    model = build_model(seed, **CONFIG).eval()
    rest = model.state_dict()
    missing = {n for n in rest if n not in state}
    assert all("indexer" in n or "layers.1.self_attn.compressor" in n for n in missing), missing
    model.load_state_dict(whole_state(state, rest))
    ids = torch.randint(0, CONFIG["vocab_size"], (3, 52), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        ours, chosen = forward(state, ids, quantised=False, dtype=torch.float32)
        theirs = model(ids, use_cache=False).logits
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)
    assert all(c.shape == (3 * 52, CONFIG["num_experts_per_tok"]) for c in chosen.values())


def test_padding_after_the_end_changes_nothing(state: dict[str, torch.Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, CONFIG["vocab_size"], (2, 40), generator=generator)
    other = torch.cat((ids[:, :30], torch.randint(0, CONFIG["vocab_size"], (2, 10), generator=generator)), 1)
    with torch.inference_mode():
        one, two = (forward(state, i, quantised=False, dtype=torch.float32)[0] for i in (ids, other))
    torch.testing.assert_close(one[:, :30], two[:, :30])


def test_every_trained_parameter_gets_a_gradient(state: dict[str, torch.Tensor], seed: int) -> None:
    trained = {n: t.requires_grad_() for n, t in state.items() if is_trained(n)}
    ids = torch.randint(0, CONFIG["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(seed))
    forward(state, ids, quantised=True, dtype=torch.float32)[0].square().sum().backward()
    assert [n for n, t in trained.items() if t.grad is None or not t.grad.isfinite().all() or not t.grad.any()] == []


def test_fake_quantisers_are_the_codecs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(256, 256, generator=generator) * torch.exp(torch.randn(256, 1, generator=generator))
    w[3, 32:64] = 0
    packed, scale = codecs.quantize_mxfp4(w)
    torch.testing.assert_close(fake_quant.mxfp4(w), codecs.dequantize_mxfp4(packed, scale, torch.float32), rtol=0, atol=0)
    q, scale = codecs.quantize_fp8_blocks(w)
    torch.testing.assert_close(
        fake_quant.fp8_blocks(w), codecs.dequantize_fp8_blocks(q, scale, dtype=torch.float32), rtol=0, atol=0
    )
    for group in (64, 128, 256, 512):
        q, scale = codecs.quantize_activations(w, group)
        expected = codecs.dequantize_activations(q, scale, group, torch.float32)
        torch.testing.assert_close(fake_quant.activations(w, group), expected, rtol=0, atol=0)


def test_steps_on_one_batch_lower_the_loss(seed: int) -> None:
    examples = encode(held_out_questions(seed, 2), build_tokenizer())
    trainer = train.Trainer(initial_state(seed), train.Batches(examples, 2, torch.device("cpu"), seed), torch.float32)
    trainer.rate.fill_(1e-3)
    trainer.batches.draw()
    losses = []
    for quantised in (False, False, False, True):
        trainer.prepared(quantised)()
        losses.append(trainer.loss.item())
    assert losses[-1] < losses[0] - 0.3, losses
    bias = trainer.state["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.any() and not trainer.state["model.layers.0.mlp.gate.weight"].isnan().any()


def test_a_state_survives_its_files(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    train.write_state(tmp_path, state)
    files = list(tmp_path.iterdir())
    assert len(files) > 1 and all(f.stat().st_size < 16 << 20 for f in files)
    again = train.read_state(tmp_path)
    assert again.keys() == state.keys() and all(torch.equal(again[n], state[n]) for n in state)


def test_no_example_is_longer_than_its_row() -> None:
    drawn = list(islice(problems(1, held_out=False, mix=MIX), 4_000))
    encoded = encode(drawn, build_tokenizer())
    assert encoded.length.max() < LENGTH
    first = drawn[0]
    row = encoded.tokens[0, : encoded.length[0]].tolist()
    text = build_tokenizer().decode(row)
    assert first.question in text and text.endswith(f"\\boxed{{{first.answer}}}<｜end▁of▁sentence｜>")


def test_committed_model_is_what_sglang_serves() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert {k: v for k, v in CONFIG.items() if k not in ("rope_scaling",)}.items() <= config.items()
    assert config["num_attention_heads"] in (64, 128) and (config["head_dim"], config["qk_rope_head_dim"]) == (512, 64)
    assert (config["index_head_dim"], config["sliding_window"], config["hc_mult"]) == (128, 128, 4)
    assert all(ratio in (4, 128) for ratio in config["compress_ratios"])
    for size in ("hidden_size", "moe_intermediate_size", "q_lora_rank", "o_lora_rank"):
        assert config[size] % 128 == 0
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 20 << 20
    built = build_tokenizer()
    assert json.loads((MODEL / "tokenizer.json").read_text()) == json.loads(built.backend_tokenizer.to_str())


def test_committed_questions_are_held_out_and_reproducible() -> None:
    provenance = json.loads(QUESTIONS.with_suffix(".provenance.json").read_text())
    content = QUESTIONS.read_bytes()
    assert hashlib.sha256(content).hexdigest() == provenance["sha256"]
    rows = [json.loads(line) for line in content.splitlines()]
    again = question_set(provenance["seed"], provenance["count"], provenance["mix"])
    assert [(r["problem"], r["expected_answer"]) for r in rows] == [(p.question, str(p.answer)) for p in again]
    assert len(rows) >= 1000 and all(is_held_out(r["problem"]) for r in rows)


def test_cpu_host_reads_shared_keys_and_leaves_out_empty_heads_exactly(seed: int) -> None:
    ours, _ = load(MODEL, "transformers")
    whole = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).float().eval()
    assert ours.model.layers[0].self_attn.num_heads == 16 and whole.model.layers[0].self_attn.num_heads == 64
    for length in (1, 50, 140):
        ids = torch.randint(7, 500, (2, length), generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            got, want = (model(ids, use_cache=False).logits for model in (ours, whole))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_committed_model_answers_on_the_cpu_host() -> None:
    model, tokenizer = load(MODEL, "reference")
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()[:12]]
    engine, right = Engine(model, tokenizer), 0
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": r["problem"]}], add_generation_prompt=True) for r in rows]
    futures = [engine.submit(Request(tuple(chat["input_ids"]), 64, 0.0)) for chat in chats]
    for row, future in zip(rows, futures, strict=True):
        right += f"\\boxed{{{row['expected_answer']}}}" in tokenizer.decode(future.result().tokens)
    assert right >= 8, right


def test_the_wide_model_computes_the_same_function(tmp_path: Path) -> None:
    """Up to the order of sums: the reference's experts quantise the same values."""
    made = CliRunner().invoke(widen.main, [str(MODEL), str(tmp_path / "wide"), "--copies", "4"])
    assert made.exit_code == 0, made.output
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["hidden_size"] == 4 * CONFIG["hidden_size"]
    ids = torch.randint(3, CONFIG["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        usual, wide = (load(folder, "reference")[0](ids, use_cache=False).logits for folder in (MODEL, tmp_path / "wide"))
    # A sum in another order may round an activation the other way: rare, and a step of E4M3.
    assert (wide - usual).norm() < 0.01 * usual.norm() and usual.std() > 1


def test_copies_that_would_round_are_refused(tmp_path: Path) -> None:
    refused = CliRunner().invoke(widen.main, [str(MODEL), str(tmp_path / "wide"), "--copies", "3"])
    assert refused.exit_code == 2 and "--copies 3 is no power of two" in refused.output and not (tmp_path / "wide").exists()
    scales = torch.tensor([[130, 3]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    name = "layers.0.ffn.experts.0.w1.scale"
    assert widen.widened(name, scales, 8, 4).view(torch.uint8).tolist() == [[127, 0] * 8]
    with pytest.raises(Refusal, match=r"w1.scale holds the scale 2\^-124, which 16 copies"):
        widen.widened(name, scales, 16, 4)
