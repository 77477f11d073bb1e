"""What accelerators can do at most, by the names that JAX gives them."""

import re

# Dense bfloat16 products, FLOP/s a device, from the makers' data sheets; T4 and V100, which have none: float16. The
# first pattern that is found in `device_kind` counts.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"B200", 2250e12),
    (r"H200|H100 80GB HBM3|GH200", 989.4e12),
    (r"H100 NVL", 835e12),
    (r"H100", 756e12),
    (r"A100", 312e12),
    (r"A10G", 70e12),
    (r"L40S", 362e12),
    (r"L4\b", 121e12),
    (r"RTX 4090", 165.2e12),
    (r"V100", 125e12),
    (r"T4\b", 65e12),
    (r"TPU ?7x|TPU v7", 2307e12),
    (r"TPU v6", 918e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v4", 275e12),
)


def peak_flops(device_kind: str) -> float | None:
    """A device's peak of bfloat16 products, FLOP/s; None where it is not known (CPUs)."""
    return next((peak for pattern, peak in PEAK_FLOPS if re.search(pattern, device_kind)), None)
