"""wadi-mini in Forge and Forge Neo, which know a network by its widths: a kind of Stable Diffusion 1.5 with other ones."""

from __future__ import annotations

from typing import Any

from wadi_core import configs, mini

NAME = "WaDiMini"


def register() -> None:
    """Put wadi-mini among the kinds of networks that the program recognises; once, however often it is called."""
    from backend.diffusion_engine.sd15 import StableDiffusion
    from huggingface_guess import model_list

    unet, vae = (configs.read(mini.FOLDER / part / "config.json") for part in ("unet", "vae"))
    sd15: Any = model_list.SD15

    class Latents(sd15.latent_format):
        def __init__(self) -> None:
            super().__init__()
            self.scale_factor = vae["scaling_factor"]

    widths = {"context_dim": unet["cross_attention_dim"], "model_channels": unet["block_out_channels"][0]}
    members = {
        "huggingface_repo": str(mini.FOLDER),  # settings and tokenizer; joined to the program's own folder, it stays as it is
        "unet_config": {**sd15.unet_config, **widths},
        "unet_extra_config": {**sd15.unet_extra_config, "num_heads": unet["attention_head_dim"]},
        "latent_format": Latents,
    }
    kind = type(NAME, (sd15,), members)
    for known in (model_list.models, StableDiffusion.matched_guesses):
        known[:] = [other for other in known if other.__name__ != NAME] + [kind]
