"""Frames in, pictures out, one network call each: frame -> edges (canny) -> picture, from the same noise every time.

    python -m examples.webcam FOLDER      # frames of a film, in the order of their names

With a camera: cv2.VideoCapture(0).read() in the place of the files.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from wadi_core import OneStepPipeline, preprocess

pipe = OneStepPipeline.from_pretrained("mini", control="mini")
width, height = pipe.native_size
noise = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(7))

Path("outputs").mkdir(exist_ok=True)
for number, file in enumerate(sorted(Path(sys.argv[1]).glob("*.png"))):
    frame = Image.open(file).convert("RGB").resize((width, height))
    edges = preprocess.canny(frame)
    made = pipe("a red apple", latents=noise, control_image=edges, control_scale=0.8)
    made.images[0].save(f"outputs/frame-{number:04d}.png")
