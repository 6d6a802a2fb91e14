"""How many operations per second a device can do at most, for MFU (model FLOPs utilisation)."""

from __future__ import annotations

# Dense products in TFLOP/s: by tensor cores in 16 bits and in TF32 (0: it has no TF32), and in
# float32. From NVIDIA's data sheets; where one gives the figure for sparse matrices, half of it.
# The first name that a device's own name contains counts.
PEAKS: dict[str, tuple[float, float, float]] = {
    "GB200": (2500, 1250, 80),
    "B200": (2250, 1100, 75),
    "GH200": (989, 495, 67),
    "H200 NVL": (835, 418, 60),
    "H200": (989, 495, 67),
    "H100 PCIe": (756, 378, 51),
    "H100 NVL": (835, 418, 60),
    "H100": (989, 495, 67),
    "H800 PCIe": (756, 378, 51),
    "H800": (989, 495, 67),
    "H20": (148, 74, 44),
    "A100": (312, 156, 19.5),
    "A800": (312, 156, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165, 82, 10.3),
    "A10G": (70, 35, 35),
    "A10": (125, 62.5, 31.2),
    "RTX A6000": (154.8, 77.4, 38.7),
    "RTX 6000 Ada": (364.2, 182.1, 91.1),
    "L40S": (362, 183, 91.6),
    "L40": (181, 90.5, 90.5),
    "L4": (121, 60, 30.3),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 5080": (112.6, 56.3, 56.3),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 4080": (97.5, 48.7, 48.7),
    "RTX 3090 Ti": (80, 40, 40),
    "RTX 3090": (71, 35.6, 35.6),
    "T4": (65, 0, 8.1),
    "V100-PCIE": (112, 0, 14),
    "V100": (125, 0, 15.7),
}

# In names of GPUs that are a part or a variant of one in the table.
OTHERS = ("MIG", "Laptop", "SUPER", "D")


def of_gpu(name: str, precision: str, tf32: bool) -> float | None:
    """Return a GPU's peak in operations per second; None if it is not in the table.

    Args:
        name: The name that the driver gives it, such as ``NVIDIA H100 80GB HBM3``.
        precision: fp32, bf16 or fp16.
        tf32: Whether float32 products may use TF32.
    """
    words = f" {name.replace('-', ' ')} "
    if any(f" {other} " in words for other in OTHERS):
        return None
    for known, (half, short, full) in PEAKS.items():
        if f" {known.replace('-', ' ')} " in words:
            return 1e12 * (half if precision != "fp32" else (tf32 and short) or full)
    return None
