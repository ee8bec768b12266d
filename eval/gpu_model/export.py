"""Write the trained GPU model as a checkpoint in the original DeepSeek-V4 naming and types, and its question file.

python -m hopper_moe.eval.gpu_model.export --trained DIR --out eval/data/gpu_dsv4
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from hopper_moe.eval.gpu_model.config import CONFIG, MIX
from hopper_moe.eval.gpu_model.state import whole_state
from hopper_moe.eval.gpu_model.train import read_state
from hopper_moe.eval.tiny_model.config import build_model
from hopper_moe.eval.tiny_model.export import write_questions
from hopper_moe.eval.tiny_model.tokenizer import build_tokenizer
from hopper_moe.quantization.checkpoint import write_checkpoint
from hopper_moe.quantization.checkpoint_names import original_config, to_original_names

QUESTIONS = "word_problems_hard.jsonl"  # beside the checkpoint's folder


def export(trained: Path, out: Path) -> None:
    """Quantise the state in `trained` (experts to MXFP4, linears to FP8) into the new folder `out`."""
    model = build_model(**CONFIG)
    state = whole_state(read_state(trained), model.state_dict())
    with tempfile.TemporaryDirectory() as tokenizer_dir:
        build_tokenizer().save_pretrained(tokenizer_dir)
        write_checkpoint(out, to_original_names(state), original_config(model.config), tokenizer_dir=tokenizer_dir)
    (out / "training.json").write_text((trained / "training.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="new checkpoint folder")
    args = parser.parse_args()
    export(args.trained, args.out)
    write_questions(args.out.parent / QUESTIONS, MIX)


if __name__ == "__main__":
    main()
