"""Train a LoRaD with a plain training loop of diffusers, the adapter put on by peft, and draw with it in one step."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image

from wadi_core import OneStepPipeline, mini
from wadi_core.lorad.layers import student_layers
from wadi_core.peft import LoRaDConfig, from_peft

PICTURES = [(Image.new("RGB", (128, 128), "red"), "a sks square")]  # yours, with their captions
STEPS = 60  # a few hundred for a real subject

torch.manual_seed(0)
pipe = StableDiffusionPipeline.from_pretrained(mini.folder())
pipe.unet.add_adapter(LoRaDConfig(r=8, target_modules=student_layers(pipe.unet)))
optimizer = torch.optim.AdamW([p for p in pipe.unet.parameters() if p.requires_grad], lr=1e-3)
noising = DDPMScheduler.from_config(pipe.scheduler.config)
for step in range(STEPS):
    picture, caption = PICTURES[step % len(PICTURES)]
    with torch.no_grad():
        latents = pipe.vae.encode(pipe.image_processor.preprocess(picture)).latent_dist.sample()
        text, _ = pipe.encode_prompt(caption, "cpu", 1, False)
    noise, timestep = torch.randn_like(latents), torch.randint(1000, (1,))
    noisy = noising.add_noise(latents * pipe.vae.config.scaling_factor, noise, timestep)
    torch.nn.functional.mse_loss(pipe.unet(noisy, timestep, text).sample, noise).backward()
    optimizer.step()
    optimizer.zero_grad()

Path("outputs").mkdir(exist_ok=True)
pipe.unet.save_lora_adapter("outputs/square")
from_peft("outputs/square").save("outputs/square.safetensors")
one_step = OneStepPipeline.from_pretrained("mini", lorad=[mini.lorad_path(), "outputs/square.safetensors"])
one_step("a sks square", seed=7).save("outputs/square.png")
