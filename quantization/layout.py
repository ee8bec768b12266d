"""The constants of `kernels/CONTRACT.md`.

The CUDA sources receive the integer constants as `-D` defines (`as_defines`); Python sources import them from here. Sizes are in
elements unless the name says bytes. This module imports neither torch nor anything else that is slow, so that the command line
can use it.
"""

from hopper_moe.quantization.errors import Refusal

# Activations (contract section 1). x has one FP32 scale a token.
H_GROUP = 128  # features of the intermediate h that share one FP32 scale
COMBINE_GROUP = 128  # features of a combine slot that share one FP32 scale, only when slots travel as E4M3
E4M3_MAX = 448
AMAX_FLOOR_EXPONENT = -100  # amax of a group is never below 2**-100, so 448 / amax stays finite

# Checkpoint types (contract section 2).
MXFP4_GROUP = 32  # features of one row that share one UE8M0 scale
UE8M0_BIAS = 127
UE8M0_NAN = 255
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the three magnitude bits; bit 3 is the sign
FP8_BLOCK = 128  # block-scaled E4M3 weights have one scale per 128 x 128 block

# Packed weights (contract section 3).
UNIT_ROWS = 64
UNIT_K = 128
UNIT_NIBBLE_BYTES = UNIT_ROWS * UNIT_K // 2  # 4096
UNIT_DELTA_BYTES = UNIT_ROWS * UNIT_K // MXFP4_GROUP  # 256
UNIT_BYTES = UNIT_NIBBLE_BYTES + UNIT_DELTA_BYTES  # 4352
ROW_BLOCK = 128  # packed rows per row block: two units
UNITS_PER_BLOCK = ROW_BLOCK // UNIT_ROWS
GATE_UP_INTERLEAVE = 8  # rows of w1, then as many of w3, alternating
MAX_DELTA = 11  # octaves between a row's smallest and largest scale that E4M3 still represents exactly
BASE_SHIFT = 5  # the decoded weight is e2m1 * 2**(delta - BASE_SHIFT), its row factor 2**(base + BASE_SHIFT - 127)
MAX_BASE = 254 - BASE_SHIFT  # above it the row factor is not a finite FP32 number
WIDE_MAX_DELTA = 28  # the same three where weights are decoded to E5M2
WIDE_BASE_SHIFT = 15
WIDE_MAX_BASE = 254 - WIDE_BASE_SHIFT

# Packed FP8 weights (contract section 5): units in the 128-byte swizzle of WGMMA's shared-memory operands.
FP8_UNIT_BYTES = UNIT_ROWS * UNIT_K
FP8_SCALES_PER_BLOCK = 4  # FP32 a row tile of 128 and k block: low rows' scale, high rows', two zeros (a bulk copy is 16 bytes)

# Limits.
DIM_MULTIPLE = 128
MAX_TOP_K = 16
MAX_RANKS = 8  # that exchange tokens inside the fused kernel
MAX_EXPERTS = 1024  # ids of all ranks together, redundant experts included: the fused kernel's table of counts
MAX_LOCAL_EXPERTS = 400  # experts of one rank: its tables of first rows; with that of counts they fill shared memory


def wgmma_position(k: int) -> int:
    """Position 0..127 of feature `k` of a block of 128 in the rows that the products read (contract section 3).

    Of every k32 step of a WGMMA the lanes q = 0..3 of a row read columns 4q..4q+3 and 16+4q..16+4q+3. In this order these are
    always features of MXFP4 block q, so that a lane needs one scale a row.
    """
    return k // 8 % 4 * 32 + k // 4 % 2 * 16 + k // 32 * 4 + k % 4


def as_defines() -> dict[str, int]:
    """The integer constants of this module by name, for `-D` defines of the CUDA compiler."""
    return {name: value for name, value in globals().items() if name.isupper() and type(value) is int}


def h_groups(intermediate_size: int) -> int:
    """Scales per (token, slot) of the intermediate h: ceil(intermediate_size / 128)."""
    return -(-intermediate_size // H_GROUP)


def packed_shape(num_rows: int, num_k: int) -> tuple[int, int, int, int]:
    """Shape of one expert's packed matrix of `num_rows` packed rows and `num_k` columns (uint8)."""
    return (num_rows // ROW_BLOCK, num_k // UNIT_K, UNITS_PER_BLOCK, UNIT_BYTES)


def w13_packed_shape(num_experts: int, hidden_size: int, intermediate_size: int) -> tuple[int, int, int, int, int]:
    """[E, 2I/128, H/128, 2, 4352]."""
    return (num_experts, *packed_shape(2 * intermediate_size, hidden_size))


def w2_packed_shape(num_experts: int, hidden_size: int, intermediate_size: int) -> tuple[int, int, int, int, int]:
    """[E, H/128, I/128, 2, 4352]."""
    return (num_experts, *packed_shape(hidden_size, intermediate_size))


def packed_expert_bytes(hidden_size: int, intermediate_size: int) -> int:
    """Bytes of one packed expert: units of both matrices plus one base byte a row."""
    units_w13 = (2 * intermediate_size // UNIT_ROWS) * (hidden_size // UNIT_K)
    units_w2 = (hidden_size // UNIT_ROWS) * (intermediate_size // UNIT_K)
    return (units_w13 + units_w2) * UNIT_BYTES + 2 * intermediate_size + hidden_size


def fp8_expert_bytes(hidden_size: int, intermediate_size: int) -> int:
    """Bytes of one packed FP8 expert: a byte a weight, and per row tile and k block the FP32 scales (w13: per two row tiles)."""
    blocks = (hidden_size // FP8_BLOCK) * (intermediate_size // FP8_BLOCK)
    return 3 * hidden_size * intermediate_size + 2 * blocks * 4 * FP8_SCALES_PER_BLOCK


def check_dims(hidden_size: int, intermediate_size: int) -> None:
    """Raises Refusal unless both sizes are positive multiples of 128."""
    for name, value in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if value <= 0 or value % DIM_MULTIPLE:
            raise Refusal(
                f"{name} {value} is not a positive multiple of {DIM_MULTIPLE}, which the packed FP4 format needs: "
                "use another MoE backend for this model."
            )


def check_num_experts(num_experts: int, num_local_experts: int) -> None:
    """Raises Refusal for more experts than the fused kernel's tables hold, over all ranks or on one rank."""
    if num_experts > MAX_EXPERTS:
        raise Refusal(
            f"num_experts {num_experts} is above {MAX_EXPERTS}, the limit of the fused kernel: use fewer redundant experts or "
            "another MoE backend."
        )
    if num_local_experts > MAX_LOCAL_EXPERTS:
        ep_size = next(n for n in range(2, num_experts + 1) if num_experts % n == 0 and num_experts // n <= MAX_LOCAL_EXPERTS)
        raise Refusal(
            f"{num_local_experts} experts on one rank are above {MAX_LOCAL_EXPERTS}, the limit of the fused kernel: use "
            f"--ep-size {ep_size} or more, or another MoE backend."
        )


def check_shape(hidden_size: int, intermediate_size: int, num_experts: int, top_k: int) -> None:
    """Raises Refusal unless the packed FP4 kernels can run a layer of this shape (`num_experts`: all experts of the layer)."""
    check_dims(hidden_size, intermediate_size)
    if num_experts < 1:
        raise Refusal(f"num_experts {num_experts} is below 1: give the number of routed experts of the layer.")
    if not 1 <= top_k <= MAX_TOP_K:
        raise Refusal(f"top_k {top_k} is outside 1..{MAX_TOP_K}, the limit of the fused kernel: use another MoE backend.")
    if top_k > num_experts:
        raise Refusal(f"top_k {top_k} is above num_experts {num_experts}: a token cannot choose more experts than there are.")
