"""An IP-Adapter beside the LoRaD: the picture follows an image's embedding, in one call.

There is no IP-Adapter for wadi-mini, so this one has RANDOM weights and shows how the parts go together, not what a
trained one draws. With Stable Diffusion 1.5: pipe.load_ip_adapter("h94/IP-Adapter", "models", "ip-adapter_sd15.bin").
"""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from wadi_core import mini
from wadi_core.scheduler import load_lorad

pipe = StableDiffusionPipeline.from_pretrained(mini.folder())
load_lorad(pipe, mini.lorad_path())

torch.manual_seed(0)
text, image = pipe.unet.config.cross_attention_dim, 32  # widths of what the network reads
proj = {"proj.weight": torch.randn(4 * text, image) * 0.1, "proj.bias": torch.zeros(4 * text)}
proj |= {"norm.weight": torch.ones(text), "norm.bias": torch.zeros(text)}
weights = {}
for place, name in enumerate(pipe.unet.attn_processors):
    if name.endswith("attn2.processor"):  # every second one: attention to what the network is told
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        weights |= {f"{place}.{one}.weight": torch.randn(width, text) * 0.1 for one in ("to_k_ip", "to_v_ip")}
pipe.unet._load_ip_adapter_weights([{"image_proj": proj, "ip_adapter": weights}])
pipe.set_ip_adapter_scale(0.6)

Path("outputs").mkdir(exist_ok=True)
for value in (0.0, 3.0):
    embeds = [torch.full((1, 1, image), value)]  # of a reference picture
    generator = torch.Generator().manual_seed(7)
    picture = pipe("a red apple", ip_adapter_image_embeds=embeds, generator=generator).images[0]
    picture.save(f"outputs/ip-adapter-{value:g}.png")
