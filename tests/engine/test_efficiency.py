"""Peak TFLOP/s by the names that devices report."""

import pytest
import torch

from wsl_d2.engine.efficiency import peak_flops


def test_a_given_peak_counts_for_any_device_and_type():
    assert peak_flops(2.5, half_precision=False) == 2.5e12


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
        # Names that begin with or hold that of another device
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_common_devices_are_known_by_their_whole_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops(0.0, half_precision=True) == (None if tflops is None else tflops * 1e12)
    assert peak_flops(0.0, half_precision=False) is None  # the table is of 16-bit types


def test_without_a_gpu_the_peak_is_unknown(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_flops(0.0, half_precision=True) is None
