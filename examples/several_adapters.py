"""Several LoRaDs at once: their angles add, each with a strength of its own; 0 switches one off, bit for bit."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from wadi_core import mini
from wadi_core.scheduler import load_lorad, set_strengths, unload_lorad

SUBJECT = mini.folder() / "adapters" / "wadi-mini-sks-hibiscus.safetensors"  # learned from a few pictures

pipe = StableDiffusionPipeline.from_pretrained(mini.folder())
load_lorad(pipe, mini.lorad_path(), adapter_name="one-step")
load_lorad(pipe, SUBJECT, adapter_name="subject")

Path("outputs").mkdir(exist_ok=True)
for strength in (0.0, 0.5, 1.0):
    set_strengths(pipe, {"subject": strength})
    picture = pipe("a sks hibiscus", generator=torch.Generator().manual_seed(3)).images[0]
    picture.save(f"outputs/subject-{strength}.png")

unload_lorad(pipe, "subject")  # the one-step LoRaD and its schedule stay
