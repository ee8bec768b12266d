"""The experts that one rank holds: the description of a layer's sizes that kernels are built from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import torch.distributed as dist

DEFAULT_TIMEOUT_S = 300  # a peer may still be compiling or capturing graphs


class LayerSizes(Protocol):
    """One whole MoE layer: of a model's config, or of the benchmark catalogue."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def swiglu_limit(self) -> float | None: ...


@dataclass(frozen=True)
class ExpertShard:
    """The experts that one rank holds, and the sizes that its kernel is built for.

    Expert ids everywhere in this package are *global* (physical ids under EPLB). This rank holds the ids
    `first_expert .. first_expert + num_local_experts - 1`. Only where DeepEP has brought the rows to this rank's experts are ids
    local: then the shard is a layer of these experts alone (`alone`).
    """

    num_experts: int  # over all ranks
    first_expert: int
    num_local_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int  # of this rank: already divided by the tensor-parallel size of the experts
    swiglu_limit: float | None  # None: no clamp
    max_tokens_per_rank: int
    group: dist.ProcessGroup | None = None  # ranks that exchange tokens inside the kernel; None: SGLang moves them
    fp8_combine: bool = False  # options of that exchange (contract section 1)
    fp4_dispatch: bool = False
    timeout_s: float = DEFAULT_TIMEOUT_S  # how long to wait for a rank of the group
    layer: int = field(default=-1, compare=False)  # its number, for messages

    @classmethod
    def of(
        cls,
        layer: LayerSizes,
        max_tokens_per_rank: int,
        *,
        num_experts: int | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        **fields: Any,
    ) -> Self:
        """Rank `rank`'s equal share of a layer, rounded down where experts do not divide.

        Args:
            num_experts: physical ones of all ranks; None: as many as the layer has.
            fields: any other field of the shard, instead of what follows from the layer and the share.
        """
        num_experts = layer.num_experts if num_experts is None else num_experts
        num_local_experts = num_experts // num_ranks
        share = {
            "num_experts": num_experts,
            "first_expert": rank * num_local_experts,
            "num_local_experts": num_local_experts,
            "top_k": layer.top_k,
            "hidden_size": layer.hidden_size,
            "intermediate_size": layer.intermediate_size,
            "swiglu_limit": layer.swiglu_limit,
            "max_tokens_per_rank": max_tokens_per_rank,
        }
        return cls(**{**share, **fields})

    def alone(self) -> Self:
        """This rank's experts with ids from 0, nothing of other ranks. As many ids as a token has slots, in multiples of the
        experts, so that kernels keep their rule that a token's experts may all differ; the ids beyond belong to nobody."""
        ids = self.num_local_experts * -(-self.top_k // max(self.num_local_experts, 1))
        return replace(self, num_experts=max(ids, self.num_local_experts), first_expert=0, group=None)

    @property
    def num_ranks(self) -> int:
        """Expert-parallel ranks that share the layer equally."""
        return self.num_experts // max(self.num_local_experts, 1)

    @property
    def num_exchanging_ranks(self) -> int:
        """Those that exchange tokens inside the kernel; 1: none do."""
        return 1 if self.group is None else self.num_ranks
