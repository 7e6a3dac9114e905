"""What PixArt-alpha 256 needs in ComfyUI, which takes it for PixArt-Sigma.

- its latents are scaled as Stable Diffusion 1.5's (0.18215), not as SDXL's (0.13025);
- its position table is fixed: at 256 pixels ComfyUI derives a table of size 0 and divides by it;
- its text is 120 tokens long, and ComfyUI passes on however many a prompt has.

Models that know their size by micro-conditions (1024 pixels) are recognised by ComfyUI and left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comfy.latent_formats
import comfy.model_base
import torch
from comfy.ldm.pixart.pixartms import get_2d_sincos_pos_embed_torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

if TYPE_CHECKING:
    from comfy.ldm.pixart.pixartms import PixArtMS
    from comfy.model_patcher import ModelPatcher

NATIVE_SIZE = 256  # pixels, of the released one-step network
TOKENS = 120
FORWARD = "diffusion_model.forward_orig"
_KEY = "wadi.pixart"


def is_pixart(model: ModelPatcher) -> bool:
    """Whether this is a PixArt without micro-conditions."""
    return isinstance(model.model, comfy.model_base.PixArt) and not model.model.diffusion_model.micro_conditioning


def prepare(model: ModelPatcher, native_size: int) -> None:
    """Patch a MODEL so that it computes what PixArt-alpha computes.

    Args:
        native_size: pixels that it was trained at; positions are counted in units of this size.
    """

    def patch(original: Any, patched: ModelPatcher) -> None:
        patched.add_object_patch(FORWARD, forward_with(patched.model.diffusion_model, native_size))

    model.add_object_patch("latent_format", comfy.latent_formats.SD15())
    patch(None, model)
    # For hooks ComfyUI can load the network a second time: the copy of the MODEL must not call the first one's layers.
    model.remove_callbacks_with_key(CallbacksMP.ON_CLONE, _KEY)
    model.add_callback_with_key(CallbacksMP.ON_CLONE, _KEY, patch)


def forward_with(network: PixArtMS, native_size: int) -> Callable[..., Tensor]:
    """PixArt's forward pass with positions of a fixed table and a text of at most 120 tokens.

    Args:
        network: ComfyUI's PixArtMS.
        native_size: pixels.

    Returns:
        A function of x (n, c, h, w), timestep (n,) and text (n, 1, tokens, width) -> (n, c or 2c, h, w).
    """
    patch = network.patch_size
    base_size = native_size // 8 // patch

    def forward(x: Tensor, timestep: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        height, width = x.shape[-2:]
        rows, columns = height // patch, width // patch
        places = get_2d_sincos_pos_embed_torch(
            network.hidden_size,
            w=columns,
            h=rows,
            pe_interpolation=1.0,
            base_size=base_size,
            device=x.device,
            dtype=torch.float32,
        )
        tokens = network.x_embedder(x) + places.to(x.dtype)[None]
        time = network.t_embedder(timestep, x.dtype)
        modulation = network.t_block(time)
        text = network.y_embedder(y[:, :, :TOKENS], False).reshape(1, -1, network.hidden_size)
        for block in network.blocks:
            tokens = block(tokens, text, modulation, None, (height, width))
        return network.unpatchify(network.final_layer(tokens, time), height, width)

    return forward
