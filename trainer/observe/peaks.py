"""What devices can compute at most, and what a model needs for a token: the two sides of MFU.

Pure figures with their sources; loads no torch. A device that is not in the table has no peak, and no MFU is reported
for it: a guess would look like a measurement.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["DevicePeak", "known_peak", "mfu", "peak_flops"]

_TERA = 1e12


@dataclass(frozen=True)
class DevicePeak:
    """Dense peak of one device, without structured sparsity."""

    name: str
    """Part of what the driver calls the device, in lower case."""
    bf16: float
    """TFLOP/s of bf16 (and fp16) matrix products with fp32 accumulation."""
    fp32: float
    """TFLOP/s of fp32 products; TF32 is not used."""
    memory_gb: float
    """Memory as sold, in GB."""
    link_gb_s: float
    """One direction to peers on the same node, in GB/s: half of what NVLink or PCIe is sold with."""
    source: str


_PEAKS = (
    # the more exact name first: the first that is part of the driver's counts
    DevicePeak("b200", 2250.0, 75.0, 180, 900, "NVIDIA DGX B200 data sheet, an eighth of the system"),
    DevicePeak("h200", 989.4, 66.9, 141, 450, "NVIDIA H200 data sheet, SXM"),
    DevicePeak("h100 pcie", 756.4, 51.2, 80, 64, "NVIDIA H100 Tensor Core GPU architecture paper, table 3, PCIe"),
    DevicePeak("h100 nvl", 835.5, 60.3, 94, 300, "NVIDIA H100 NVL data sheet"),
    DevicePeak("h100", 989.4, 66.9, 80, 450, "NVIDIA H100 Tensor Core GPU architecture paper, table 3, SXM5"),
    DevicePeak("a100-pcie", 312.0, 19.5, 40, 32, "NVIDIA A100 data sheet, PCIe"),
    DevicePeak("a100 80gb pcie", 312.0, 19.5, 80, 32, "NVIDIA A100 data sheet, PCIe"),
    DevicePeak("a100-sxm4-80gb", 312.0, 19.5, 80, 300, "NVIDIA A100 data sheet, SXM"),
    DevicePeak("a100", 312.0, 19.5, 40, 300, "NVIDIA A100 data sheet, SXM"),
    DevicePeak("l40s", 362.05, 91.6, 48, 32, "NVIDIA L40S data sheet"),
    DevicePeak("nvidia l4", 121.0, 30.3, 24, 32, "NVIDIA L4 data sheet, half of the figure with sparsity"),
    DevicePeak("v100-sxm2", 125.0, 15.7, 16, 150, "NVIDIA V100 data sheet, fp16; it has no bf16"),
    DevicePeak("tesla t4", 65.0, 8.1, 16, 16, "NVIDIA T4 data sheet, fp16; it has no bf16"),
)


def known_peak(device_name: str) -> DevicePeak | None:
    """The entry of a device by the driver's name for it, such as `NVIDIA H100 80GB HBM3`; None where unknown."""
    name = device_name.lower()
    return next((peak for peak in _PEAKS if peak.name in name), None)


def peak_flops(
    device_name: str, precision: Literal["fp32", "bf16", "fp16"], stated_tflops: float | None
) -> float | None:
    """FLOP/s of one device at most: what was stated, else what is known; None where neither is there."""
    if stated_tflops is not None:
        return stated_tflops * _TERA
    found = known_peak(device_name)
    if found is None:
        return None
    return (found.fp32 if precision == "fp32" else found.bf16) * _TERA


def mfu(tokens_per_s: float, flops_per_token: float, num_devices: int, peak: float) -> float:
    """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B), from 0 to 1.

    Args:
        tokens_per_s: of the whole run.
        flops_per_token: what the model needs for a token, forward and backward; recomputation does not count.
        num_devices: that train.
        peak: FLOP/s of one of them.
    """
    return tokens_per_s * flops_per_token / (num_devices * peak)
