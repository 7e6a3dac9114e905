"""wadi-mini, the model inside the pack, as ComfyUI's own objects.

ComfyUI recognises networks by their widths, so the small one is made known to it as a kind of Stable Diffusion 1.5.
Text encoder and autoencoder are ComfyUI's classes with the settings of wadi-mini. Shapes are read from its settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.controlnet
import comfy.latent_formats
import comfy.model_detection
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths

from ..wadi_core import configs, mini
from ..wadi_core.lorad import LoRaD

if TYPE_CHECKING:
    from comfy.controlnet import ControlNet
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

_TEXT_SETTINGS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "hidden_act")


def _settings(part: str) -> dict[str, Any]:
    return configs.read(mini.FOLDER / part / "config.json")


def latent_format() -> comfy.latent_formats.SD15:
    """wadi-mini's latents: four channels, scaled as its autoencoder's settings say."""
    return comfy.latent_formats.SD15(scale_factor=_settings("vae")["scaling_factor"])


class WadiMini(comfy.supported_models.SD15):
    """The kind of network that wadi-mini is, as ComfyUI lists kinds of networks."""

    latent_format = staticmethod(latent_format)


def register() -> None:
    """Make the network known, so that ComfyUI also loads what it saved of it; a second time it does nothing."""
    unet = _settings("unet")
    WadiMini.unet_config = {
        **comfy.supported_models.SD15.unet_config,
        "model_channels": unet["block_out_channels"][0],
        "context_dim": unet["cross_attention_dim"],
    }
    # In diffusers' settings of such networks attention_head_dim is the number of heads.
    WadiMini.unet_extra_config = {"num_heads": unet["attention_head_dim"], "num_head_channels": -1}
    kinds = comfy.supported_models.models
    if not any(kind.__name__ == WadiMini.__name__ for kind in kinds):
        kinds.insert(0, WadiMini)


def native_size() -> int:
    """Pixels on a side of its pictures."""
    return _settings("vae")["sample_size"]


def _unet_names() -> dict[str, str]:
    """Names in diffusers -> names in ComfyUI, of the parameters of its U-Net."""
    unet = _settings("unet")
    layers = unet["layers_per_block"]
    levels = [kind.startswith("CrossAttn") for kind in unet["down_block_types"]]
    return comfy.utils.unet_to_diffusers(
        {
            "num_res_blocks": [layers] * len(levels),
            "channel_mult": [width // unet["block_out_channels"][0] for width in unet["block_out_channels"]],
            "transformer_depth": [int(has) for has in levels for _ in range(layers)],
            "transformer_depth_output": [int(has) for has in levels for _ in range(layers + 1)],
            "transformer_depth_middle": 1,
        }
    )


def load_model(**options: Any) -> ModelPatcher:
    """The multi-step network (the teacher), to be used with :func:`load_lorad`.

    Args:
        options: how ComfyUI wants it, when it asks for a second copy (``disable_dynamic``).

    Raises:
        OSError: its weights are not in this installation; one line.
    """
    names = _unet_names()
    weights = mini.state_dicts()["unet"]
    model = comfy.sd.load_diffusion_model_state_dict({names[name]: tensor for name, tensor in weights.items()}, **options)
    model.cached_patcher_init = (load_model, ())
    return model


class WordFolders:
    """Where learned words are looked for: in the user's folders, and in the pack's unless the user has one of its words too.

    ComfyUI looks in no certain order, and a user's own word must not be mistaken for the pack's of the same name.
    """

    def __iter__(self) -> Iterator[str]:
        yield from folder_paths.get_folder_paths("embeddings")
        own = {Path(name).stem for name in folder_paths.get_filename_list("embeddings")}
        folder = mini.FOLDER / mini.EMBEDDINGS
        if own.isdisjoint(path.stem for path in folder.glob("*.safetensors")):
            yield str(folder)


def load_clip(**options: Any) -> CLIP:
    """The text encoder.

    Raises:
        OSError: its weights are not in this installation; one line.
    """
    settings = _settings("text_encoder")
    clip = comfy.sd.load_text_encoder_state_dicts(
        [mini.state_dicts()["text_encoder"]],
        embedding_directory=WordFolders(),
        model_options={"model_config": {name: settings[name] for name in _TEXT_SETTINGS}},
        **options,
    )
    clip.tokenizer.clip_l.embedding_size = settings["hidden_size"]  # of textual inversions that fit
    clip.patcher.cached_patcher_init = (_load_text_patcher, ())
    return clip


def _load_text_patcher(**options: Any) -> ModelPatcher:
    return load_clip(**options).patcher


def load_vae() -> VAE:
    """The autoencoder.

    Raises:
        OSError: its weights are not in this installation; one line.
    """
    settings = _settings("vae")
    widths = settings["block_out_channels"]
    shape = {
        "double_z": True,
        "z_channels": settings["latent_channels"],
        "resolution": settings["sample_size"],
        "in_channels": settings["in_channels"],
        "out_ch": settings["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": settings["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    config = {"params": {"ddconfig": shape, "embed_dim": settings["latent_channels"]}}
    return comfy.sd.VAE(sd=mini.state_dicts()["vae"], config=config)


def load_controlnet() -> ControlNet:
    """The ControlNet for edges.

    Raises:
        OSError: it is not in this installation; one line.
    """
    weights, names = mini.control_state(), _unet_names()
    hints = dict.fromkeys(name.rpartition(".")[0] for name in weights if name.startswith("controlnet_cond_embedding."))
    parts = {hint: f"input_hint_block.{2 * place}" for place, hint in enumerate(sorted(hints, key=_hint_order))}
    for name in weights:
        part = name.rpartition(".")[0]
        if part.startswith("controlnet_down_blocks."):
            parts[part] = f"zero_convs.{part.rpartition('.')[2]}.0"
    parts["controlnet_mid_block"] = "middle_block_out.0"
    names |= {f"{part}.{kind}": f"{ours}.{kind}" for part, ours in parts.items() for kind in ("weight", "bias")}
    return comfy.controlnet.load_controlnet_state_dict({names[name]: tensor for name, tensor in weights.items()})


def _hint_order(name: str) -> tuple[int, int]:
    """The place of a layer among those that look at the control map: conv_in, blocks, conv_out."""
    last = name.rpartition(".")[2]
    return (1, int(last)) if last.isdigit() else (0, 0) if last == "conv_in" else (2, 0)


def load_lorad() -> LoRaD:
    """The adapter that makes the network a one-step student.

    Raises:
        OSError, ValueError: it is not in this installation, or damaged; one line.
    """
    return LoRaD.load(mini.lorad_path())
