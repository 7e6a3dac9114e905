"""Train the multi-step teacher of wadi-mini: text encoder and U-Net together, on latents made beforehand.

    python -m trainer.mini.teacher --config trainer/configs/mini-teacher.yaml

One step from t = 999 multiplies an error of eps by sigma/alpha = 14.6, so the teacher must be accurate there
before it can be distilled. Therefore a good part of the timesteps is drawn from the noisy end, and the error is
weighted like that of v = (eps error) / alpha, up to a cap.
"""

from __future__ import annotations

import copy
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wadi_core import pictures
from wadi_core.pipeline import noise

from .. import config as settings
from ..state import Checkpoints, random_state, restore_random_state
from ..watch import LossTable, contact_sheet
from . import scenes
from .init import CentredSteps, freeze_samplers, start_as_identity
from .latents import read_shards
from .muon import MuonWithAdamW
from .sampling import decode, make_scheduler, many_steps, tokenize

SHEET_CAPTIONS = (
    "a red apple",
    "a cat and a bicycle",
    "a frog on top of a pizza",
    "a rocket on a black background",
    "a big fox",
    "a guitar",
    "a penguin above a birthday cake",
    "a tulip on a light blue background",
    "an alarm clock and a key",
    "a small red car on a green background",
)


@dataclass
class TeacherConfig:
    """Settings of the teacher's training."""

    vae: str = "runs/mini-vae/vae"
    latents: str = "runs/mini-latents"
    tokenizer: str = "wadi_core/configs/tokenizer"
    output: str = "runs/mini-teacher"
    seed: int = 0
    channels: tuple[int, ...] = (96, 192, 192)
    heads: int = 2
    text_width: int = 128
    text_layers: int = 3
    steps: int = 40000
    batch: int = 64
    learning_rate: float = 1e-3  # of Muon
    adam_rate: float = 5e-4
    warmup: int = 300
    decay_steps: int = 4000  # the learning rate falls to a twentieth over this many last steps
    noisy_share: float = 0.3  # of the timesteps: drawn from 900 to 999
    last_share: float = 0.05  # of the timesteps: exactly 999
    weight_cap: float = 40.0  # of 1 / alpha_t^2
    null_share: float = 0.1  # of the captions: empty
    mirror: bool = True  # mirror latents at random (the autoencoder was trained to allow it)
    ema: float = 0.999
    save_every: int = 250
    sheet_every: int = 1000


def make_unet(config: TeacherConfig) -> nn.Module:
    """A U-Net laid out as Stable Diffusion 1.5's, in small, that begins as eps = x_t."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=config.channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=config.text_width,
        attention_head_dim=config.heads,  # diffusers' historical name for the number of heads
        norm_num_groups=32,
    )
    start_as_identity(unet)
    return unet


def make_text_encoder(config: TeacherConfig) -> nn.Module:
    """An untrained CLIP text encoder in small, with the standard vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            projection_dim=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=2,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            pad_token_id=49407,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )


def draw_timesteps(count: int, config: TeacherConfig) -> Tensor:
    """(count,) timesteps: uniform, with shares of 900 to 999 and of exactly 999."""
    t = torch.randint(0, 1000, (count,))
    lot = torch.rand(count)
    t = torch.where(lot < config.noisy_share, torch.randint(900, 1000, (count,)), t)
    return torch.where(lot > 1 - config.last_share, torch.full_like(t, 999), t)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """One step of an exponential moving average of the parameters."""
    averaged, current = list(average.parameters()), list(model.parameters())
    torch._foreach_mul_(averaged, decay)
    torch._foreach_add_(averaged, current, alpha=1 - decay)


class Teacher(nn.Module):
    """Text encoder and U-Net as one module: token ids to eps."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.text_encoder = make_text_encoder(config)
        self.unet = make_unet(config)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        # Rows repeat (the empty caption above all): each different caption is encoded once.
        rows, back = ids.unique(dim=0, return_inverse=True)
        text = self.text_encoder(rows).last_hidden_state[back]
        return self.unet(x, t, text).sample


def sheet(teacher: Teacher, vae: nn.Module, tokenizer: object, guidance: float) -> object:
    """Pictures of fixed captions and seeds: 25 guided steps (two seeds) and one step."""
    ids = tokenize(tokenizer, [*SHEET_CAPTIONS, ""])
    with torch.no_grad():
        text = teacher.text_encoder(ids).last_hidden_state
        rows = []
        for seed in (0, 100):
            z = noise(range(seed, seed + len(SHEET_CAPTIONS)), scenes.SIZE, scenes.SIZE)
            rows.append(decode(vae, many_steps(teacher.unet, z, text[:-1], text[-1:], guidance=guidance)))
        alpha_bar = make_scheduler().alphas_cumprod[999]
        eps = teacher.unet(z, 999, text[:-1]).sample
        rows.append(decode(vae, (z - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()))
    return contact_sheet(rows)


def run(config: TeacherConfig) -> None:
    """Train to the end, going on from the newest checkpoint of ``config.output``."""
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTokenizer

    torch.manual_seed(config.seed)
    output = Path(config.output)
    latents, captions = read_shards(Path(config.latents))
    tokenizer = CLIPTokenizer.from_pretrained(config.tokenizer)
    vae = AutoencoderKL.from_pretrained(config.vae).eval()
    ids = tokenize(tokenizer, captions)
    null = tokenize(tokenizer, [""])[0]
    teacher = Teacher(config).train()
    # At 16x16 latents plain attention trains a third faster on a CPU than the fused kernel.
    teacher.unet.set_attn_processor(AttnProcessor())
    freeze_samplers(teacher.unet)
    centred = CentredSteps(teacher.unet)
    average = copy.deepcopy(teacher).eval().requires_grad_(False)
    optimizer = MuonWithAdamW(teacher, config.learning_rate, config.adam_rate)
    checkpoints = Checkpoints(output)
    step = 0
    if state := checkpoints.latest():
        teacher.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        restore_random_state(state["random"])
        step = state["step"]
    table = LossTable(output / "losses.csv", step)
    alpha_bar = make_scheduler().alphas_cumprod
    weights = (1 / alpha_bar).clamp(max=config.weight_cap)

    def checkpoint() -> None:
        checkpoints.save(
            step,
            {
                "step": step,
                "model": teacher.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "random": random_state(),
            },
        )

    stop: list[bool] = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.append(True))
    sums: dict[str, list[float]] = {"eps_loss": [], "eps_loss_999": [], "weighted": []}
    with tqdm(total=config.steps, initial=step, unit="step", mininterval=10) as bar:
        while step < config.steps and not stop:
            left = (config.steps - step) / max(1, config.decay_steps)
            rate = min(1, (step + 1) / config.warmup) * max(0.05, min(1, left))
            chosen = torch.randint(0, len(latents), (config.batch,))
            x0 = latents[chosen].float()
            if config.mirror:
                x0 = torch.where((torch.rand(config.batch) < 0.5).view(-1, 1, 1, 1), x0.flip(3), x0)
            rows = torch.where((torch.rand(config.batch) < config.null_share)[:, None], null, ids[chosen])
            t = draw_timesteps(config.batch, config)
            eps = torch.randn_like(x0)
            a = alpha_bar[t].view(-1, 1, 1, 1)
            with torch.autocast("cpu", torch.bfloat16):
                predicted = teacher(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, rows)
            errors = (predicted.float() - eps).square().mean(dim=(1, 2, 3))
            loss = (weights[t] * errors).mean()
            loss.backward()
            centred.before()
            optimizer.step(rate)
            centred.after()
            step += 1
            update_average(average, teacher, min(config.ema, (1 + step) / (10 + step)))
            bar.update()
            sums["weighted"].append(loss.item())
            sums["eps_loss"].append(errors.mean().item())
            sums["eps_loss_999"] += errors[t == 999].tolist()
            if step % 50 == 0:
                values = {name: sum(entries) / max(1, len(entries)) for name, entries in sums.items()}
                for entries in sums.values():
                    entries.clear()
                bar.set_postfix(values)
                table.add(step, values)
            if step % config.save_every == 0 or step == config.steps:
                checkpoint()
            if step % config.sheet_every == 0 or step == config.steps:
                table.plot(output / "losses.png", list(sums), "wadi-mini teacher")
                pictures.save(sheet(average, vae, tokenizer, 3.0), output / f"sheet-{step:06d}.png")
    checkpoint()
    average.unet.save_pretrained(output / "unet")
    average.text_encoder.save_pretrained(output / "text_encoder")


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    arguments = settings.parser(__doc__.splitlines()[0]).parse_args()
    run(settings.load(TeacherConfig, arguments.config, arguments.overrides))


if __name__ == "__main__":
    main()
