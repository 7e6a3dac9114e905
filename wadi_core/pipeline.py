"""From a prompt to a picture in one call of the network.

    z ~ N(0, I);  x0 = (z - sigma_T * eps(z, T, prompt)) / alpha_T;  picture = decode(x0 / scaling_factor)

No guidance, no second branch, no loop: the U-Net is called once for each batch of pictures.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from . import base as bases
from . import mini, pictures, settings
from .files import one_line, sha256_of_file
from .lorad.adapter import Fused, LoRaD, check_together, fuse
from .schedule import OneStep
from .settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("wadi")

DECODED_PIXELS = 1 << 20  # at once

File: TypeAlias = "str | os.PathLike[str]"
Stacked: TypeAlias = "tuple[LoRaD, settings.Adapter]"
Adapters: TypeAlias = "LoRaD | File | Sequence[LoRaD | File | tuple[LoRaD | File, float]] | None"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES |= {name: getattr(torch, name) for name in settings.DTYPES}


@dataclass
class Pictures:
    """What a call returns.

    Attributes:
        images: RGB pictures.
        settings: of each picture, all that is needed to make it again.
        latents: (n, 4, h/8, w/8) float32 on the CPU, x0 as the network made it, if they were asked for.
        seconds: time spent in the network calls.
        calls: how many there were.
    """

    images: list[Image] = field(default_factory=list)
    settings: list[Settings] = field(default_factory=list)
    latents: Tensor | None = None
    seconds: float = 0.0
    calls: int = 0

    def save(self, path: File) -> list[Path]:
        """Write the pictures as PNG files with their settings inside; several get numbers (``name-0001.png``).

        Raises:
            OSError, ValueError: a file cannot be written, or is not to be a PNG; one line.
        """
        paths = pictures.numbered(path, len(self.images))
        for one in paths:
            pictures.check_writable(one)
        for one, image, its_settings in zip(paths, self.images, self.settings, strict=True):
            pictures.save(image, one, its_settings)
        return paths


class OneStepPipeline:
    """A base network with LoRaD adapters fused into it, called once for a batch of pictures.

        pipe = OneStepPipeline.from_pretrained("sd15-folder", lorad="one-step.safetensors")
        pipe("a red apple", seed=3).save("apple.png")

    Attributes:
        base: the networks.
        one_step: the schedule in use.
        adapters: what is fused into the U-Net, as it is written into a picture's settings.
    """

    def __init__(
        self, base: bases.Base, device: torch.device, dtype: torch.dtype, alpha_T_squared: float | None = None
    ) -> None:
        self.base = base
        self.device = device
        self.dtype = dtype
        self.adapters: tuple[settings.Adapter, ...] = ()
        self._own_one_step = base.one_step
        if alpha_T_squared is not None:
            self._own_one_step = OneStep(alpha_T_squared, prediction_type=base.prediction_type)
        self._fused = Fused()
        self.one_step = self._own_one_step or OneStep(prediction_type=base.prediction_type)

    @classmethod
    def from_pretrained(
        cls,
        base: File = "mini",
        lorad: Adapters = None,
        strength: float = 1.0,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        alpha_T_squared: float | None = None,
        config: File | None = None,
        keep_base: bool = True,
    ) -> OneStepPipeline:
        """Load a base and fuse adapters into it. Nothing is downloaded.

        Args:
            base: ``mini``, a folder in diffusers layout, or a single-file SD1.5 or SD2.1-base checkpoint.
            lorad: as for :meth:`set_lorad`. By default what ``mini`` comes with, and nothing for another base.
            strength: of the adapters that name none of their own.
            device: by default a GPU if there is one.
            dtype: float32, bfloat16 or float16; by default float16 on a GPU and float32 on the CPU.
            alpha_T_squared: says that the base is a one-step network itself, with its LoRaD merged into it, and at
                which share of signal it was trained (0.0047 in the released ones).
            config: for a single file of unknown shape: a folder with its settings in diffusers layout.
            keep_base: keep the weights that are turned, so that :meth:`set_lorad` can be called again.

        Raises:
            OSError, ValueError: a file is missing, damaged or of another kind; one line.
        """
        device = find_device(device)
        dtype = find_dtype(dtype, device)
        if lorad is None and str(base) == "mini":
            lorad = mini.lorad_path()
        stack = load_adapters(lorad, strength)
        pipe = cls(bases.load(base, device, dtype, config), device, dtype, alpha_T_squared)
        pipe._check(stack)
        pipe._fuse(stack, keep_base)
        return pipe

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height in pixels that the network was trained at."""
        return self.base.native_size

    def set_lorad(self, lorad: Adapters = None, strength: float = 1.0) -> None:
        """Replace the adapters; the base's own bits come back first. ``None`` leaves the bare base.

        Args:
            lorad: a LoRaD or its file, or several of them, each on its own or as (LoRaD or file, strength). The
                angles of several are added.
            strength: of those that name none of their own; at 0 neither weights nor sampling are touched.

        Raises:
            OSError, ValueError: an adapter is missing, damaged or made for another network, or they do not belong
                together; one line, and the pipeline is as it was.
        """
        stack = load_adapters(lorad, strength)
        self._check(stack)
        self._fused.restore()
        self.adapters = ()
        self._fuse(stack, keep_base=True)

    def _check(self, stack: list[Stacked]) -> None:
        """Raises ValueError if these adapters cannot be used here; changes nothing."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.base.unet.state_dict().items()}
        for adapter, _ in stack:
            adapter.matched(shapes).check()
        schedule = check_together(adapter for adapter, kept in stack if kept.strength)
        if schedule is not None and self._own_one_step is not None:
            raise ValueError("a one-step LoRaD is made for a multi-step base, and this base is a one-step network already")

    def _fuse(self, stack: list[Stacked], keep_base: bool) -> None:
        active = [(adapter, kept) for adapter, kept in stack if kept.strength]
        if self.dtype != torch.bfloat16:  # in which no base is the one that an adapter remembers
            for adapter, kept in active:
                for note in adapter.matched(self.base.unet).notes:
                    logger.info("%s: %s", kept.file, note)
        self._fused = fuse(self.base.unet, [(adapter, kept.strength) for adapter, kept in active], keep_base)
        self.adapters = tuple(kept for _, kept in active)
        found = check_together(adapter for adapter, _ in active) or self._own_one_step
        self.one_step = found or OneStep(prediction_type=self.base.prediction_type)
        if found is None:
            logger.warning("no one-step weights are loaded: one call of a multi-step network gives a blurred picture")
        elif found.prediction_type != self.base.prediction_type:
            said = f"{found.prediction_type}, not {self.base.prediction_type} as this base by its settings"
            logger.warning("the one-step weights are for a network that returns %s; they are followed", said)

    def to(self, device: str | torch.device) -> OneStepPipeline:
        """Move the networks to another device; returns itself."""
        self.device = find_device(device)
        for network in (self.base.unet, self.base.vae, self.base.text_encoder):
            network.to(self.device)
        return self

    def __call__(
        self,
        prompts: str | Sequence[str],
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        width: int | None = None,
        height: int | None = None,
        batch: int = 4,
        return_latents: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Pictures:
        """Make pictures.

        Args:
            prompts: one or many, one picture each; a single prompt is repeated for each of ``seeds``.
            seed: picture i has the seed ``seed + i``.
            seeds: instead of ``seed``, one for each picture.
            width, height: in pixels, divisible by 8; by default the network's native size.
            batch: how many pictures share a network call.
            return_latents: keep the latents as well.
            progress: called after each network call with the pictures made so far and all there will be.

        Raises:
            ValueError: no prompt, a size not divisible by 8, a seed out of range; one line, before any work.
        """
        wanted = self.plan(prompts, seed, seeds, width, height)
        made, latents = Pictures(), []
        for part in self.run(wanted, batch):
            made.images += part.images
            made.settings += part.settings
            made.seconds += part.seconds
            made.calls += part.calls
            latents.append(part.latents)
            if progress:
                progress(len(made.images), len(wanted))
        if return_latents:
            made.latents = torch.cat(latents)
        return made

    def plan(
        self,
        prompts: str | Sequence[str],
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> list[Settings]:
        """The settings of each picture of a call, checked; arguments as there."""
        settings.check("seed", seed)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("a picture needs a prompt")
        if seeds is None:
            seeds = range(seed, seed + len(prompts))
        elif len(prompts) == 1:
            prompts = prompts * len(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts and {len(seeds)} seeds: one seed for each is needed")
        native_width, native_height = self.native_size
        common = Settings(
            width=width if width is not None else native_width,
            height=height if height is not None else native_height,
            base=self.base.name,
            lorad=self.adapters,
            alpha_T_squared=self.one_step.alpha_T_squared,
            timestep=self.one_step.timestep,
            prediction_type=self.one_step.prediction_type,
            dtype=str(self.dtype).removeprefix("torch."),
        )
        pairs = zip(prompts, seeds, strict=True)
        return [dataclasses.replace(common, prompt=prompt, seed=one) for prompt, one in pairs]

    def run(self, wanted: Sequence[Settings], batch: int = 4) -> Iterator[Pictures]:
        """Make the pictures of a :meth:`plan`, all of one size, yielding those of each network call with their latents.

        Raises:
            ValueError: ``batch`` is less than 1.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        for start in range(0, len(wanted), batch):
            yield self._one_call(wanted[start : start + batch])

    @torch.no_grad()
    def _one_call(self, wanted: Sequence[Settings]) -> Pictures:
        text = self.encode([one.prompt for one in wanted])
        # The network's own number format, for the formula too: what it sees is what must be taken away again.
        z = noise([one.seed for one in wanted], wanted[0].width, wanted[0].height).to(self.device, self.dtype)
        self._wait()
        start = time.perf_counter()
        prediction = self.base.unet(z, self.one_step.timestep, encoder_hidden_states=text).sample
        self._wait()
        seconds = time.perf_counter() - start
        x0 = self.one_step.x0(z.float(), prediction)
        return Pictures(self.decode(x0), list(wanted), x0.cpu(), seconds, 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image]:
        """(n, 4, h/8, w/8) clean latents as n pictures, about a megapixel at a time: the decoder is what takes memory."""
        pixels = latents.shape[2] * latents.shape[3] * bases.FACTOR**2
        images = []
        for part in (latents / self.base.vae.config.scaling_factor).split(max(1, DECODED_PIXELS // pixels)):
            images += pictures.to_pictures(self.base.vae.decode(part.to(self.device, self.dtype)).sample)
        return images

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(n, 77, width of the text encoder): what the network is told. Longer prompts are cut with a warning."""
        rows = []
        for prompt in prompts:
            # Padded here, because the tokenizer would take Stable Diffusion 2's padding "!" for a special token.
            ids = self.base.tokenizer(prompt, verbose=False).input_ids
            if len(ids) > bases.TOKENS:
                left_out = self.base.tokenizer.decode(ids[bases.TOKENS - 1 : -1])
                logger.warning("a prompt has more than %d tokens; left out is: %s", bases.TOKENS - 2, one_line(left_out))
                ids = ids[: bases.TOKENS - 1] + ids[-1:]
            rows.append(ids + [self.base.pad] * (bases.TOKENS - len(ids)))
        return self.base.text_encoder(torch.tensor(rows, device=self.device))[0]

    def _wait(self) -> None:
        """Until the device has done what it was told: otherwise only the telling would be timed."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


def noise(seeds: Iterable[int], width: int, height: int) -> Tensor:
    """z (n, 4, height/8, width/8), float32 on the CPU: each picture's own generator, whatever the batch or device."""
    shape = (1, 4, height // bases.FACTOR, width // bases.FACTOR)
    return torch.cat([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


def load_adapters(lorad: Adapters, strength: float = 1.0) -> list[Stacked]:
    """Adapters in any of the forms that :meth:`OneStepPipeline.set_lorad` takes, read and with their strengths.

    Raises:
        OSError, ValueError: a file is missing, damaged or no LoRaD, or a strength is not finite; one line.
    """
    if lorad is None:
        return []
    if isinstance(lorad, (LoRaD, str, os.PathLike)) or _is_pair(lorad):
        lorad = [lorad]
    stack = []
    for entry in lorad:
        adapter, its_strength = entry if _is_pair(entry) else (entry, strength)
        if isinstance(adapter, LoRaD):
            kept = settings.Adapter(adapter.metadata.title or "", its_strength)
        else:
            path = Path(adapter)
            adapter = LoRaD.load(path)
            kept = settings.Adapter(path.name, its_strength, sha256_of_file(path))
        stack.append((adapter, kept))
    return stack


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], (int, float))


def find_device(device: str | torch.device | None) -> torch.device:
    """The device of this name; without one a GPU if there is one, else the CPU.

    Raises:
        ValueError: no such kind of device, or none here; one line.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(one_line(f"the device {device} cannot be used: {str(error).splitlines()[0]}")) from error
    if device.type == "meta":
        raise ValueError("the device meta cannot be used: it computes nothing")
    return device


def find_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """float32, bfloat16 or float16, also by their short names (fp32, bf16, fp16); by default what suits the device.

    Raises:
        ValueError: another type; one line.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    found = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype)
    if found not in DTYPES.values():
        raise ValueError(f"the networks run in {', '.join(settings.DTYPES)}, not in {dtype}")
    return found
