"""A stock pipeline of diffusers draws in one network call: put a one-step LoRaD on it and call it as ever."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from wadi_core import mini
from wadi_core.scheduler import load_lorad

BASE, LORAD = mini.folder(), mini.lorad_path()  # or your Stable Diffusion 1.5 or 2.1-base, and a LoRaD made for it

pipe = StableDiffusionPipeline.from_pretrained(BASE)
load_lorad(pipe, LORAD)  # also sets the schedule and switches guidance off

generator = torch.Generator().manual_seed(7)
pictures = pipe(["a red apple", "a cat"], generator=generator).images

Path("outputs").mkdir(exist_ok=True)
for number, picture in enumerate(pictures):
    picture.save(f"outputs/text-to-image-{number}.png")
