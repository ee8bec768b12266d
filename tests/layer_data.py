"""Random small layers and routings, shared by the tests of the reference and of the kernels."""

from dataclasses import dataclass

import torch

from hopper_moe.kernels.reference_weights import Mxfp4Experts
from hopper_moe.quantization.codecs import quantize_mxfp4


@dataclass
class Layer:
    """Checkpoint bytes of all experts of a layer (uint8, w13 rows `[w1; w3]`) and a batch routed to them."""

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    x: torch.Tensor  # bf16 [M, H]
    topk_ids: torch.Tensor  # int32 [M, K], global, distinct per token
    topk_weights: torch.Tensor  # float32 [M, K]

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        return self.w13, self.w13_scale, self.w2, self.w2_scale

    def rank_weights(self, rank: int, num_ranks: int) -> tuple[torch.Tensor, ...]:
        """The checkpoint bytes of the experts of one rank."""
        share = self.w13.shape[0] // num_ranks
        return tuple(tensor[rank * share : (rank + 1) * share] for tensor in self.weights)

    def rank_experts(self, num_ranks: int) -> list[Mxfp4Experts]:
        return [Mxfp4Experts(*self.rank_weights(rank, num_ranks)) for rank in range(num_ranks)]


def make_layer(
    seed: int,
    *,
    num_tokens: int = 6,
    num_experts: int = 4,
    top_k: int = 3,
    hidden_size: int = 640,
    intermediate_size: int = 128,
    device: str = "cpu",
) -> Layer:
    """Gaussian weights quantised as a checkpoint's; activations of a few units with outlier features, so that clamps and scales
    matter.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    w13, w13_scale = quantize_mxfp4(normal(num_experts, 2 * intermediate_size, hidden_size) * 2 / hidden_size**0.5)
    w2, w2_scale = quantize_mxfp4(normal(num_experts, hidden_size, intermediate_size) / intermediate_size**0.5)
    x = (normal(num_tokens, hidden_size) * torch.exp(normal(hidden_size) * 0.7)).bfloat16()
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k].to(torch.int32)
    weights = torch.rand(num_tokens, top_k, generator=generator) + 0.1
    return Layer(*(tensor.to(device) for tensor in (w13, w13_scale, w2, w2_scale, x, ids, weights)))
