"""Write the trained tiny model as a checkpoint in the original DeepSeek-V4 naming and types, with model card and question file.

python -m hopper_moe.eval.tiny_model.export --trained DIR --out eval/data/tiny_dsv4
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import torch

from hopper_moe.eval.tiny_model.config import build_model
from hopper_moe.eval.tiny_model.tokenizer import build_tokenizer
from hopper_moe.eval.word_problems import question_set
from hopper_moe.quantization.checkpoint import write_checkpoint
from hopper_moe.quantization.checkpoint_names import original_config, to_original_names

QUESTION_SEED, QUESTION_COUNT = 2026, 1200


def export(trained: Path, out: Path) -> None:
    """Quantise `trained/model.pt` (experts to MXFP4, linears to FP8) into the new folder `out`."""
    model = build_model()
    model.load_state_dict(torch.load(trained / "model.pt", weights_only=True))
    with tempfile.TemporaryDirectory() as tokenizer_dir:
        build_tokenizer().save_pretrained(tokenizer_dir)
        write_checkpoint(out, to_original_names(model.state_dict()), original_config(model.config), tokenizer_dir=tokenizer_dir)
    (out / "training.json").write_text((trained / "training.json").read_text())


def write_questions(path: Path, mix: str = "standard") -> None:
    """The committed held-out questions of a mix, one JSON object a line, and beside them their provenance."""
    rows = [
        {"id": f"wp-{i:04d}", "problem": p.question, "expected_answer": str(p.answer), "kind": p.kind}
        for i, p in enumerate(question_set(QUESTION_SEED, QUESTION_COUNT, mix))
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(content)
    provenance = {
        "generator": "hopper_moe.eval.word_problems.question_set",
        "seed": QUESTION_SEED,
        "mix": mix,
        "count": QUESTION_COUNT,
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
    }
    path.with_suffix(".provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trained", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="new checkpoint folder")
    args = parser.parse_args()
    export(args.trained, args.out)
    write_questions(args.out.parent / "word_problems.jsonl")


if __name__ == "__main__":
    main()
