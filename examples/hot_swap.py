"""One adapter after another into the same tensors: a network that torch.compile has compiled is not compiled anew."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from wadi_core import LoRaD, mini
from wadi_core.scheduler import hotswap_lorad, load_lorad

pipe = StableDiffusionPipeline.from_pretrained(mini.folder())
student = LoRaD.load(mini.lorad_path())
load_lorad(pipe, student)  # the largest rank first
# pipe.unet = torch.compile(pipe.unet) would go here

# Stand-ins for files of your own: the same adapter with smaller angles.
styles = {"half": 0.5, "most": 0.8, "all": 1.0}
Path("outputs").mkdir(exist_ok=True)
for name, share in styles.items():
    angles = {key: (a * share, b) for key, (a, b) in student.factors.items()}
    hotswap_lorad(pipe, LoRaD(angles, student.metadata))
    picture = pipe("a red apple", generator=torch.Generator().manual_seed(7)).images[0]
    picture.save(f"outputs/hot-swap-{name}.png")
