"""Random tensors in the types of released checkpoints, for the writers of random checkpoints beside this file.

Every weight of [rows, k] has a standard deviation of about k**-0.5, so that activations keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import click
import torch

_E2M1_RMS = 2.926  # of the 16 codes, each as likely
_PAIR_RMS = 1.581  # of the factors 1 and 2, each as likely
_FREE = 16  # one token id in so many has no link


class RandomTensors:
    """Draws tensors on one device and collects them on the CPU, in `found` by name."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.found: dict[str, torch.Tensor] = {}

    def keep(self, name: str, tensor: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        self.found[name] = tensor.to(dtype).cpu()

    def normal(self, *shape: int) -> torch.Tensor:
        """FP32, mean 0, standard deviation 1, on the device."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def spread(self, name: str, *shape: int, std: float, dtype: torch.dtype = torch.float32) -> None:
        self.keep(name, self.normal(*shape) * std, dtype)

    def ones(self, name: str, *shape: int) -> None:
        self.keep(name, torch.ones(shape))

    def bf16(self, name: str, rows: int, k: int) -> None:
        self.keep(name, self.normal(rows, k) * k**-0.5)

    def _exponents(self, rms: float, *shape: int) -> tuple[torch.Tensor, float]:
        """(UE8M0 bytes of two neighbouring powers of two whose RMS is `rms` or up to two times less, what is missing)."""
        low = math.floor(math.log2(rms / _PAIR_RMS))
        scale = torch.randint(127 + low, 129 + low, shape, generator=self.generator, device=self.device, dtype=torch.uint8)
        return scale.view(torch.float8_e8m0fnu), rms / (_PAIR_RMS * 2.0**low)

    def fp4(self, prefix: str, rows: int, k: int) -> None:
        """`.weight` int8 [rows, k/2] of E2M1 pairs and `.scale` UE8M0 [rows, k/32]."""
        codes = torch.randint(256, (rows, k // 2), generator=self.generator, device=self.device, dtype=torch.uint8)
        scale, _ = self._exponents(math.sqrt(2) * k**-0.5 / _E2M1_RMS, rows, k // 32)  # codes cannot carry what is missing
        self.found[f"{prefix}.weight"], self.found[f"{prefix}.scale"] = codes.cpu().view(torch.int8), scale.cpu()

    def fp8_ue8m0(self, prefix: str, rows: int, k: int, block: tuple[int, int] = (32, 32), rms: float | None = None) -> None:
        """`.weight` E4M3 [rows, k] and `.scale` UE8M0, one per block; `rms` of the values, k**-0.5 unless told."""
        shape = -(-rows // block[0]), -(-k // block[1])
        scale, rest = self._exponents((rms or k**-0.5) / 24, *shape)
        self.keep(f"{prefix}.weight", self.normal(rows, k) * (24 * rest), torch.float8_e4m3fn)  # below 48 * 6.5: never above 448
        self.found[f"{prefix}.scale"] = scale.cpu()

    def fp8_fp32(self, prefix: str, rows: int, k: int, block: int = 128) -> None:
        """`.weight` E4M3 [rows, k] and `.weight_scale_inv` FP32, one per block."""
        shape = -(-rows // block), -(-k // block)
        factors = 0.7 + 0.6 * torch.rand(shape, generator=self.generator, device=self.device)
        self.keep(f"{prefix}.weight", self.normal(rows, k) * 32, torch.float8_e4m3fn)
        self.keep(f"{prefix}.weight_scale_inv", factors * (k**-0.5 / 32), torch.float32)

    def linked_vocabulary(self, embed: str, head: str, vocab_size: int, hidden_size: int, share: float) -> torch.Tensor:
        """Embeddings and a head by which most tokens have a likely successor; returns the successors' ids, int64 [vocab_size].

        A head without links leaves greedy tokens to near ties. Here the row of `successor[t]` points along the embedding of t, of
        which the last hidden state keeps `share` of its length: that logit stands out by about log(vocab_size) + 1 standard
        deviations, so that its probability is about a half, and the others still show in it. Ids of 15 modulo 16 have no link.
        """
        rows = self.normal(vocab_size, hidden_size)
        self.keep(embed, rows)
        successor = torch.randperm(vocab_size, generator=self.generator, device=self.device)
        link = min(0.95, (math.log(vocab_size) + 1) / (share * hidden_size**0.5))
        ids = torch.arange(vocab_size, device=self.device)
        links = torch.where(ids % _FREE == _FREE - 1, 0.0, link)[:, None]
        rows = (links * rows + (1 - links**2).sqrt() * self.normal(vocab_size, hidden_size)) * hidden_size**-0.5
        self.keep(head, torch.empty_like(rows).index_copy_(0, successor, rows))
        return successor


def checkpoint_arguments(experts: int, about_experts: str) -> Callable[[Callable], Callable]:
    """What the commands that write a checkpoint take: tokenizer_dir, out_dir, experts, seed."""
    given = (
        click.argument("tokenizer_dir", type=click.Path(exists=True, file_okay=False, path_type=Path)),
        click.argument("out_dir", type=click.Path(path_type=Path)),
        click.option("--experts", default=experts, show_default=True, help=about_experts),
        click.option("--seed", default=0, show_default=True),
    )

    def decorate(function: Callable) -> Callable:
        for add in reversed(given):
            function = add(function)
        return function

    return decorate


def free_token(vocab_size: int) -> int:
    """The largest id without a link."""
    return (vocab_size - _FREE) // _FREE * _FREE + _FREE - 1


def device() -> torch.device:
    """Where tensors are drawn: the same seed gives others on another kind of device."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def folder_size(tensors: dict[str, torch.Tensor]) -> str:
    return f"{len(tensors)} tensors, {sum(t.nbytes for t in tensors.values()) / 2**30:.2f} GiB"
