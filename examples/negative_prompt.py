"""What a picture is not to show, inside the same network call: a stock pipeline of diffusers with a one-step LoRaD."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from wadi_core import mini
from wadi_core.avoid import avoid
from wadi_core.scheduler import load_lorad

BASE, LORAD = mini.folder(), mini.lorad_path()  # or your Stable Diffusion 1.5 or 2.1-base, and a LoRaD made for it
PROMPT, UNWANTED = "a cat and a bicycle", "a bicycle"

pipe = StableDiffusionPipeline.from_pretrained(BASE)
load_lorad(pipe, LORAD)


def draw(**more: str):
    return pipe(PROMPT, generator=torch.Generator().manual_seed(7), **more).images[0]


pictures = {"with-both": draw(), "without": draw(negative_prompt=UNWANTED)}
with avoid(pipe, UNWANTED, scale=1.0, method="nasa"):  # another strength, another method
    pictures["subtracted"] = draw()

Path("outputs").mkdir(exist_ok=True)
for name, picture in pictures.items():
    picture.save(f"outputs/negative-{name}.png")
