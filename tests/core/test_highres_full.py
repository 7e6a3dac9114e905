"""Pictures larger than native at the full size of Stable Diffusion."""

from __future__ import annotations

import resource
import sys
import time

import pytest
import torch
from lorad_networks import SD15, SD21, unet

from wadi_core import highres


def peak_memory() -> float:
    """Gigabytes, since the last call of :func:`forget_peak`."""
    with open("/proc/self/status", encoding="utf-8") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e9


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux tells it")
@pytest.mark.parametrize("size", [(128, 128), (224, 128)], ids=["1024x1024", "1024x1792"])
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_full_size(name: str, size: tuple[int, int], capsys: pytest.CaptureFixture[str]) -> None:
    """Shapes; and printed, peak memory and time against the same without (target: 1.05 and 1.15 times)."""
    config = {"sd15": SD15, "sd21": SD21}[name]
    torch.manual_seed(0)
    network = unet(config)
    z = torch.randn(1, 4, *size)
    told = torch.randn(1, 77, config["cross_attention_dim"])
    factors = highres.factors(size[1], size[0], (64, 64))
    native, lines = None, [""]
    for method in (None, *highres.METHODS):
        forget_peak()
        start = resource.getrusage(resource.RUSAGE_SELF).ru_utime, time.perf_counter()
        with torch.no_grad(), highres.attach(network, factors, method) if method else torch.no_grad():
            found = network(z, 999, encoder_hidden_states=told).sample
        spent = resource.getrusage(resource.RUSAGE_SELF).ru_utime - start[0], time.perf_counter() - start[1]
        assert found.shape == z.shape and torch.isfinite(found).all()
        peak = peak_memory()
        native = native or (peak, *spent)
        ratios = f"{peak / native[0]:.3f} memory, {spent[0] / native[1]:.3f} processor time"
        lines.append(f"{name} {size[1] * 8}x{size[0] * 8} {method or 'direct':9} {peak:6.2f} GB {spent[1]:7.1f} s  {ratios}")
    with capsys.disabled():
        sys.stdout.write("\n".join(lines) + "\n")
