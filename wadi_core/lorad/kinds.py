"""What files and folders hold that are none of the supported networks: each called what it is.

Two things give a network away: the class that a diffusers folder names, and parts of its tensors' names. What follows
from shapes alone (input channels, widths) is seen where the network is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Class in a folder's model_index.json, as a pattern -> what it is. The first that matches counts.
_PIPELINES = (
    (r".*Wuerstchen|StableCascade", "Stable Cascade or Wuerstchen"),
    (r"StableDiffusionXLImg2Img", "the refiner of Stable Diffusion XL"),
    (r"(Stable.*XL|.*XLPipeline|KolorsPipeline)", "Stable Diffusion XL or a relative of it"),
    (r"StableDiffusion3", "Stable Diffusion 3"),
    (r"StableUnCLIP|UnCLIP|Karlo", "unCLIP, which is told pictures besides words"),
    (r"StableDiffusionLDM3D", "LDM3D, which draws a depth map beside each picture"),
    (r"StableDiffusion.*Upscale", "an upscaler of Stable Diffusion, which starts from a picture"),
    (r"StableDiffusionInstructPix2Pix", "InstructPix2Pix, which edits a picture (8 input channels)"),
    (r"StableDiffusionDepth2Img", "Stable Diffusion 2 with depth (5 input channels)"),
    (r"PaintByExample", "Paint by Example, which is told a picture instead of words"),
    (r"StableDiffusionImageVariation", "a network for variations of pictures, which reads no prompt"),
    (r"StableDiffusionGLIGEN", "GLIGEN, which is told boxes besides words"),
    (r"StableVideoDiffusion|.*Video|AnimateDiff|I2VGen|TextToVideo|.*Zero.*Video|CogVideo|Wan|LTX|Mochi", "a video network"),
    (r"StableAudio|AudioLDM|MusicLDM|AudioDiffusion|SpectrogramDiffusion|DanceDiffusion", "a network for sound"),
    (r"LatentConsistencyModel", "a latent consistency model (LCM), which is told the guidance scale"),
    (r"AltDiffusion", "AltDiffusion, whose text encoder is not CLIP's"),
    (r"Flux", "Flux"),
    (r"PixArtSigma", "PixArt-sigma; of PixArt only alpha is known, by the trainer and to merge"),
    (r"PixArtAlpha", "PixArt-alpha, which the trainer and merge read, not this command"),
    (r"Kandinsky", "Kandinsky"),
    (r"IFPipeline|IF.*Pipeline", "DeepFloyd IF"),
    (
        r"HunyuanDiT|Lumina|Sana|AuraFlow|QwenImage|OmniGen|Chroma|HiDream|DiTPipeline|ZImage",
        "a diffusion transformer",
    ),
    (r"LDMTextToImage|LatentDiffusion|DDPMPipeline|DDIMPipeline|ScoreSde|VQDiffusion", "an older kind of diffusion model"),
)

# Part of a tensor's name -> what has it. The first that occurs counts, so what is special stands first.
_MARKS: tuple[tuple[str, str], ...] = (
    ("time_stack.", "a video network"),
    ("time_mixer.", "a video network"),
    ("temporal_transformer", "a video network"),
    ("temporal_res_block", "a video network"),
    ("motion_modules", "a video network"),
    ("lora_controlnet", "a Control-LoRA"),
    ("input_hint_block.", "a ControlNet"),
    ("zero_convs.", "a ControlNet"),
    ("controlnet_", "a ControlNet"),
    ("joint_blocks.", "a Stable Diffusion 3 transformer"),
    ("context_embedder", "a Stable Diffusion 3 or Flux transformer"),
    ("double_blocks.", "a Flux transformer"),
    ("low_scale_model.", "the x4 upscaler of Stable Diffusion 2"),
    ("noise_augmentor.", "unCLIP, which is told pictures besides words"),
    ("embedder.model.visual.", "unCLIP, which is told pictures besides words"),
    ("depth_model.", "Stable Diffusion 2 with depth"),
    ("cond_stage_model.mapper.", "a network for variations of pictures, which reads no prompt"),
    ("cond_stage_model.model.mapper", "a network for variations of pictures, which reads no prompt"),
    ("cond_stage_model.roberta", "AltDiffusion, whose text encoder is not CLIP's"),
    ("mel_filter", "a network for sound"),
    ("clap.", "a network for sound"),
    ("vocoder", "a network for sound"),
    ("conditioner.embedders.1.", "a Stable Diffusion XL checkpoint"),
    ("add_embedding.", "a Stable Diffusion XL U-Net"),
    ("edm_mean", "a network of the EDM kind (Playground 2.5), whose noise levels are others"),
    ("edm_vpred.", "a network of the EDM kind (CosXL), whose noise levels are others"),
    ("time_embed.cond_proj", "a latent consistency model (LCM), which is told the guidance scale"),
    ("time_embedding.cond_proj", "a latent consistency model (LCM), which is told the guidance scale"),
    ("position_net.", "GLIGEN, which is told boxes besides words"),
    ("encoder_hid_proj.", "a U-Net with an image prompt (IP-Adapter)"),
    ("label_emb.", "a Stable Diffusion XL (or unCLIP) U-Net"),
    ("class_embedding.", "a U-Net with a class embedding (unCLIP, an upscaler, a network for sound)"),
)

# Settings of a U-Net that say it is told more than a prompt and a timestep, and what it is then.
_TOLD_MORE = {
    "time_cond_proj_dim": "a latent consistency model (LCM), which is told the guidance scale",
    "class_embed_type": "a U-Net with a class embedding (unCLIP, or a network for sound)",
    "num_class_embeds": "a U-Net with classes (an upscaler)",
    "addition_embed_type": "a U-Net of Stable Diffusion XL, or one that is told a picture",
    "encoder_hid_dim_type": "a U-Net with an image prompt (IP-Adapter)",
}
_INPUTS = {
    5: "with depth (5 input channels)",
    7: "of the x4 upscaler (7 input channels)",
    8: "that edits pictures, such as InstructPix2Pix's or a sound network's (8 input channels)",
    9: "for inpainting (9 input channels)",
}


def of_pipeline(class_name: str) -> str | None:
    """What a diffusers pipeline of this class is, where it is none of Stable Diffusion 1 and 2's own; None where it is."""
    for pattern, what in _PIPELINES:
        if re.match(pattern, class_name):
            return what
    return None if class_name.startswith("StableDiffusion") else "another kind of model"


def of_names(names: Iterable[str]) -> str | None:
    """What a state dict is, by its tensors' names, where they show that it is none of the supported networks."""
    names = list(names)
    return next((what for part, what in _MARKS if any(part in name for name in names)), None)


def of_settings(unet: Mapping[str, Any]) -> str | None:
    """What a U-Net of these settings is, where it has to be told more than a prompt and a timestep."""
    return next((f"{what} ({name} in its settings)" for name, what in _TOLD_MORE.items() if unet.get(name)), None)


def of_inputs(channels: int) -> str:
    """What a U-Net with another number of input channels than 4 is, to be read after "a U-Net" or "a checkpoint"."""
    return _INPUTS.get(channels, f"of another kind ({channels} input channels)")
