"""A trained autoencoder with more channels in its deep blocks that still computes the very same.

    python -m trainer.mini.widen --vae runs/mini-vae/vae --channels 96 96 192 192 --output runs/mini-vae-wide

Every channel becomes several neighbours with the same values (Net2Net, Chen et al., ICLR 2016), so the groups of a
GroupNorm keep their statistics. What reads them takes shares that differ at random and sum to the old weight: equal
shares would keep the copies equal for ever.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from wadi_core.output import take_any_text
from wadi_core.thirdparty import DiffusersNetwork

from .vae import make_vae

UNEVEN = 0.5  # standard deviation of the shares around their mean, relative


def expand(weight: Tensor, shape: Sequence[int], uneven: float, generator: torch.Generator) -> Tensor:
    """Repeat a weight's outputs (dimension 0), and share out its inputs (dimension 1) among their copies."""
    if weight.shape[0] != shape[0]:
        weight = weight.repeat_interleave(shape[0] // weight.shape[0], 0)
    if weight.ndim > 1 and weight.shape[1] != shape[1]:
        copies = shape[1] // weight.shape[1]
        parts = weight[:, :, None].expand(-1, -1, copies, *weight.shape[2:]) / copies
        uneven_by = uneven * torch.randn(parts.shape, generator=generator)
        shares = 1 + uneven_by - uneven_by.mean(2, keepdim=True)
        weight = (parts * shares).flatten(1, 2)
    return weight.contiguous()


@torch.no_grad()
def widen(narrow: DiffusersNetwork, channels: Sequence[int], seed: int = 0) -> DiffusersNetwork:
    """An ``AutoencoderKL`` with ``channels`` that computes what ``narrow`` does.

    Args:
        narrow: an autoencoder of :func:`~.vae.make_vae` with the same number of channels in all blocks.
        channels: of the blocks, multiples of the narrow one's.

    Raises:
        ValueError: they are no multiples.
    """
    width = narrow.config.block_out_channels[0]
    if set(narrow.config.block_out_channels) != {width} or any(wide % width for wide in channels):
        raise ValueError(f"{tuple(channels)} are no multiples of the autoencoder's {narrow.config.block_out_channels}")
    generator = torch.Generator().manual_seed(seed)
    wide = make_vae(tuple(channels))
    wide.register_to_config(scaling_factor=narrow.config.scaling_factor)
    known, state = narrow.state_dict(), wide.state_dict()
    for name, target in state.items():
        if name in known:
            found = expand(known[name], target.shape, 0.0 if "samplers" in name else UNEVEN, generator)
            # Copies of channels make the products of queries and keys so much larger, and the scale goes with the root.
            factor = (known[name].shape[0] / target.shape[0]) ** 0.5 if ".to_q." in name else 1.0
            target.copy_(found * factor)
        elif name.endswith("conv_shortcut.weight"):  # where the width changes; it was nothing but a copy before
            target.copy_(expand(torch.eye(width)[:, :, None, None], target.shape, 0.0, generator))
        else:
            target.zero_()  # the bias of such a one
    return wide


def main() -> None:
    take_any_text()
    from diffusers import AutoencoderKL

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vae", required=True, help="the autoencoder's folder")
    parser.add_argument("--channels", required=True, type=int, nargs=4, help="of the blocks, from the picture inwards")
    parser.add_argument("--output", required=True, help="folder of the wider one")
    arguments = parser.parse_args()
    widen(AutoencoderKL.from_pretrained(arguments.vae), arguments.channels).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
