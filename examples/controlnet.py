"""A ControlNet steers the one call: edges in, picture out. ControlNets made for the multi-step base work as they are."""

from pathlib import Path

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image, ImageDraw

from wadi_core import mini
from wadi_core.scheduler import load_lorad

edges = Image.new("RGB", (128, 128))
ImageDraw.Draw(edges).ellipse((30, 30, 100, 100), outline="white", width=2)

controlnet = ControlNetModel.from_pretrained(mini.control_path())
pipe = StableDiffusionControlNetPipeline.from_pretrained(mini.folder(), controlnet=controlnet)
load_lorad(pipe, mini.lorad_path())

generator = torch.Generator().manual_seed(7)
picture = pipe("a red apple", image=edges, generator=generator, controlnet_conditioning_scale=0.8).images[0]

Path("outputs").mkdir(exist_ok=True)
edges.save("outputs/controlnet-edges.png")
picture.save("outputs/controlnet.png")
