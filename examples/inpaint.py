"""Draw one half of a picture anew in one call; strength=1.0, because one step starts from noise and knows no less."""

from pathlib import Path

import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image

from wadi_core import mini
from wadi_core.scheduler import load_lorad, make_one_step

pipe = StableDiffusionPipeline.from_pretrained(mini.folder())
load_lorad(pipe, mini.lorad_path())
picture = pipe("a cat", generator=torch.Generator().manual_seed(1)).images[0]

mask = Image.new("L", picture.size)  # white is drawn anew
mask.paste(255, (0, 0, picture.width // 2, picture.height))

inpaint = StableDiffusionInpaintPipeline.from_pipe(pipe)  # the same networks, with the LoRaD on them
make_one_step(inpaint, pipe.scheduler)
size = {"width": picture.width, "height": picture.height}
generator = torch.Generator().manual_seed(7)
changed = inpaint("a red apple", image=picture, mask_image=mask, strength=1.0, generator=generator, **size).images[0]

Path("outputs").mkdir(exist_ok=True)
picture.save("outputs/inpaint-before.png")
changed.save("outputs/inpaint-after.png")
