"""The comparison that decides whether a kernel computes the layer: bounds of the kernel design, one function for all tests."""

import torch

MIN_COSINE = 0.9999
MAX_RELATIVE_L2 = 1e-3


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want| in FP64; 0 when both are all zeros."""
    difference, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def assert_layers_agree(
    got: torch.Tensor, want: torch.Tensor, max_relative_l2: float = MAX_RELATIVE_L2, min_cosine: float = MIN_COSINE
) -> None:
    """Fails unless shapes agree, everything is finite, and cosine and relative L2 are within bounds, over all and for every
    token.
    """
    assert got.shape == want.shape, f"shape {list(got.shape)}, wanted {list(want.shape)}"
    assert torch.isfinite(got.double()).all(), "the result holds NaN or infinity"
    error = relative_l2(got, want)
    assert error <= max_relative_l2, f"relative L2 {error:.3e} is above {max_relative_l2:.1e}"
    if want.numel():
        both = torch.stack((got.double().flatten(), want.double().flatten()))
        norms = both.norm(dim=1).prod().item()
        cosine = (both[0] @ both[1]).item() / norms if norms else 1.0
        assert cosine >= min_cosine, f"cosine {cosine:.6f} is below {min_cosine}"
    for token in range(want.shape[0]):
        error = relative_l2(got[token], want[token])
        assert error <= 4 * max_relative_l2, f"token {token}: relative L2 {error:.3e} is above {4 * max_relative_l2:.1e}"
