"""Decoding in tiles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wadi_core import decoding


def latent(height: int, width: int, channels: int = 4) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(3))


def local_decoder(latents: Tensor) -> Tensor:
    """A decoder whose pixels depend on a few cells around them."""
    weight = torch.randn(3, latents.shape[1], 3, 3, generator=torch.Generator().manual_seed(0))
    return F.interpolate(F.conv2d(latents, weight, padding=1), scale_factor=8, mode="bilinear")


@pytest.mark.parametrize("size", [(40, 40), (17, 64), (24, 33)])
def test_tiles_leave_no_trace_where_a_decoder_is_local(size: tuple[int, int]) -> None:
    z = latent(*size)
    whole = local_decoder(z)
    found = decoding.decode_tiled(local_decoder, z, tile=16, overlap=8)
    assert found.shape == whole.shape and found.dtype == torch.float32
    assert (found - whole).abs().mean() < 0.02 * whole.abs().mean()
    inner = (found - whole).abs()[..., 0:8, 0:8]
    assert inner.max() < 1e-4  # far from every seam


def test_small_latents_are_decoded_at_once() -> None:
    z = latent(16, 12)
    calls: list[torch.Size] = []

    def decoder(part: Tensor) -> Tensor:
        calls.append(part.shape)
        return local_decoder(part)

    assert torch.equal(decoding.decode_tiled(decoder, z, tile=16, overlap=4), local_decoder(z))
    assert calls == [z.shape]
    decoding.decode_tiled(decoder, latent(40, 12), tile=16, overlap=4)
    assert [shape[-2:] for shape in calls[1:]] == [(16, 12)] * 3
    with pytest.raises(ValueError, match="at most half of a tile"):
        decoding.decode_tiled(decoder, z, tile=16, overlap=9)
