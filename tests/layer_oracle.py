"""The layer of kernels/CONTRACT.md written a second time, slowly, from the text alone: Python loops and numpy, nothing of ours
imported.
"""

import math

import numpy as np

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def _e4m3_values() -> list[float]:
    """The 127 finite magnitudes of E4M3 by their byte."""
    subnormal = [m * 2.0**-9 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return (subnormal + normal)[:127]


E4M3 = _e4m3_values()


def round_e4m3(value: float) -> float:
    """Nearest E4M3 value, ties to the even byte."""
    size = abs(value)
    best = min(range(127), key=lambda byte: (abs(E4M3[byte] - size), byte % 2))
    return math.copysign(E4M3[best], value)


def quant_e4m3(values: np.ndarray, group: int) -> np.ndarray:
    """quant and dequant: FP32 arithmetic as the contract orders it, float64 [N] result q * scale."""
    result = np.zeros(len(values))
    for start in range(0, len(values), group):
        part = values[start : start + group].astype(np.float32)
        amax = max(np.abs(part).max(), np.float32(2.0**-100))
        scale, inverse = np.float32(amax) / np.float32(448), np.float32(448) / np.float32(amax)
        for i, v in enumerate(part):
            result[start + i] = round_e4m3(float(np.float32(v * inverse))) * float(scale)
    return result


def weight(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[N, K/2] bytes and [N, K/32] scale bytes -> float64 [N, K]."""
    rows, half = packed.shape
    out = np.zeros((rows, 2 * half))
    for n in range(rows):
        for k in range(2 * half):
            byte = int(packed[n, k // 2])
            nibble = byte & 15 if k % 2 == 0 else byte >> 4
            out[n, k] = (-1 if nibble & 8 else 1) * E2M1[nibble & 7] * 2.0 ** (int(scale[n, k // 32]) - 127)
    return out


def bf16(value: np.ndarray) -> np.ndarray:
    """FP32 values rounded to BF16 (ties to even), as float32."""
    bits = np.atleast_1d(value.astype(np.float32)).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return rounded.astype(np.uint32).view(np.float32)


def layer(x, topk_ids, topk_weights, w13, w13_scale, w2, w2_scale, *, swiglu_limit, routed_scaling_factor) -> np.ndarray:
    """x float32 holding BF16 values [M, H], global ids [M, K], weights float32 [M, K], checkpoint bytes [E, ...] -> float32 [M,
    H].
    """
    size = w2.shape[2] * 2
    dense = {e: (weight(w13[e], w13_scale[e]), weight(w2[e], w2_scale[e])) for e in set(topk_ids.flatten().tolist()) if e >= 0}
    y = np.zeros(x.shape, dtype=np.float32)
    for t in range(x.shape[0]):
        xq = quant_e4m3(x[t], x.shape[1])
        for k in range(topk_ids.shape[1]):
            e = int(topk_ids[t, k])
            if e < 0:
                continue
            gate, up = dense[e][0][:size] @ xq, dense[e][0][size:] @ xq
            if swiglu_limit is not None:
                gate, up = np.minimum(gate, swiglu_limit), np.clip(up, -swiglu_limit, swiglu_limit)
            hq = quant_e4m3(bf16(gate / (1 + np.exp(-gate)) * up), 128)
            w = np.float32(topk_weights[t, k]) * np.float32(routed_scaling_factor)
            y[t] = y[t] + bf16(float(w) * (dense[e][1] @ hq))
    return bf16(y).reshape(x.shape)
