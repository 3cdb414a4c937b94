"""Peak dense TFLOP/s of devices, for the model FLOPs utilization (MFU, arXiv 2204.02311)."""

from __future__ import annotations

import re

import torch

# Of dense (not sparse) 16-bit tensor operations, by the makers' data sheets.
_PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
    "T4": 65.0,
}


def peak_flops(tflops: float, half_precision: bool) -> float | None:
    """Returns the peak floating-point operations per second of this process's device, None if unknown.

    Args:
        tflops: ``SOLVER.PEAK_TFLOPS``; used as it is if above 0.
        half_precision: whether the run uses 16-bit types; the table holds no others.
    """
    if tflops > 0:
        return tflops * 1e12
    if not (half_precision and torch.cuda.is_available()):
        return None
    name = torch.cuda.get_device_name()
    return next((1e12 * peak for part, peak in _PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)
