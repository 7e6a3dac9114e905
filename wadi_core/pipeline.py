"""From a prompt to a picture in one call of the network.

    z ~ N(0, I);  x0 = (z - sigma_T * eps(z, T, prompt)) / alpha_T;  picture = decode(x0 / scaling_factor)

No guidance, no second branch, no loop: the U-Net is called once for each batch of pictures. ControlNets may steer it,
and pictures may be larger than those it was trained on.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from . import base as bases
from . import control as controls
from . import decoding, highres, hub, mini, pictures, settings
from .control import ControlImages, ControlNet, Controls, Steered, Steering
from .devices import find_device, find_dtype
from .embeddings import Embeddings, Vocabulary, load_embeddings
from .lorad.adapter import Fused, check_together, fuse
from .schedule import OneStep, check_latents
from .settings import PictureSettings, Settings
from .stack import Adapters, Stacked, load_adapters

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("wadi")

File: TypeAlias = "str | os.PathLike[str]"


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
    settings: list[PictureSettings] = field(default_factory=list)
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
        control: the ControlNets, in the order in which control images are given.
        vocabulary: what prompts may say.
    """

    def __init__(
        self,
        base: bases.Base,
        device: torch.device,
        dtype: torch.dtype,
        alpha_T_squared: float | None = None,
        control: Controls = None,
    ) -> None:
        self.base = base
        self.device = device
        self.dtype = dtype
        self.control: tuple[ControlNet, ...] = ()
        self.set_control(control)
        self.vocabulary = Vocabulary(base)
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
        control: Controls = None,
        embeddings: Embeddings = None,
    ) -> OneStepPipeline:
        """Load a base and fuse adapters into it. Nothing is downloaded but what a name of the hub asks for (:mod:`.hub`).

        Args:
            base: ``mini``, a folder in diffusers layout, a single-file SD1.5 or SD2.1-base checkpoint, or a name of the
                model hub: ``org/name``, ``org/name@revision`` or ``org/name:file``. So with adapters and the others.
            lorad: as for :meth:`set_lorad`. By default what ``mini`` comes with, and nothing for another base.
            strength: of the adapters that name none of their own.
            device: by default a GPU if there is one.
            dtype: float32, bfloat16 or float16; by default float16 on a GPU and float32 on the CPU.
            alpha_T_squared: says that the base is a one-step network itself, with its LoRaD merged into it, and at
                which share of signal it was trained (0.0047 in the released ones).
            config: for a single file of unknown shape: a folder with its settings in diffusers layout.
            keep_base: keep the weights that are turned, so that :meth:`set_lorad` can be called again.
            control: as for :meth:`set_control`.
            embeddings: as for :meth:`set_embeddings`.

        Raises:
            OSError, ValueError: a file is missing, damaged or of another kind; one line.
        """
        device = find_device(device)
        dtype = find_dtype(dtype, device)
        if lorad is None and str(base) == "mini":
            lorad = mini.lorad_path()
        stack = load_adapters(lorad, strength)
        place = hub.local(base, hub.BASE, dtype == torch.float16, bases.find)
        loaded = bases.load(place, device, dtype, config)
        if wanted := hub.parse(base):
            loaded.name = str(wanted)
        pipe = cls(loaded, device, dtype, alpha_T_squared, control)
        pipe._check(stack)
        pipe.set_embeddings(embeddings)
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

    def set_control(self, control: Controls = None) -> None:
        """Replace the ControlNets; ``None`` is none.

        Args:
            control: one or several, each loaded or to be loaded from a folder in diffusers layout or a single file.
                They are made for the multi-step base. ``mini`` is the one (canny) that comes with the base ``mini``.

        Raises:
            OSError, ValueError: one is missing, damaged or made for another network; one line, and the pipeline is as
                it was.
        """
        self.control = controls.load_all(control, self.base, self.device, self.dtype)

    def set_embeddings(self, embeddings: Embeddings = None) -> None:
        """Replace the learned words that prompts may say; ``None`` is none.

        Args:
            embeddings: one or several textual inversions or their ``.safetensors`` files; or word -> file, where
                they are to have other words than their own. Prompts may also say ``embedding:NAME`` with a file's name.
                ``mini`` stands for those that come with the base ``mini``.

        Raises:
            OSError, ValueError: one is missing, damaged, made for another text encoder, or its word is taken; one line,
                and the pipeline is as it was.
        """
        self.vocabulary.learn(load_embeddings(embeddings))

    def _check(self, stack: list[Stacked]) -> None:
        """Raises ValueError if these adapters cannot be used here; changes nothing."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.base.unet.state_dict().items()}
        for adapter, _ in stack:
            adapter.matched(shapes).check()
        schedule = check_together(adapter for adapter, kept in stack if kept.strength)
        returns = self.base.prediction_type if self.base.says_prediction else None
        if schedule is not None and returns not in (None, schedule.prediction_type):
            said = f"predicts {returns} by its own settings"
            raise ValueError(f"{self.base.name} {said}, and the one-step weights are for {schedule.prediction_type}")
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
        steering = (one.network for one in self.control)
        for network in (self.base.unet, self.base.vae, self.base.text_encoder, *steering):
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
        control_image: ControlImages = None,
        control_scale: float | Sequence[float] = 1.0,
        hires: bool | str = False,
    ) -> Pictures:
        """Make pictures.

        Args:
            prompts: one or many, one picture each; a single prompt is repeated for each of ``seeds``.
            seed: picture i has the seed ``seed + i``.
            seeds: instead of ``seed``, one for each picture.
            width, height: in pixels, divisible by 8; by default the control image's, or else the network's native size.
            batch: how many pictures share a network call.
            return_latents: keep the latents as well.
            progress: called after each network call with the pictures made so far and all there will be.
            control_image: for each ControlNet a control map of the picture's size, or a list of one for each picture.
                For a single ControlNet it need not be in a list.
            control_scale: how strongly they steer, one for all ControlNets or one for each; 0 is not at all.
            hires: keep a picture that is larger than native in one piece; ``True``, or one of ``highres.METHODS``.

        Raises:
            ValueError: no prompt, a size not divisible by 8, a seed out of range, control images that do not fit; one
                line, before any work.
        """
        wanted = self.plan(prompts, seed, seeds, width, height, control_image, control_scale, hires)
        made, latents = Pictures(), []
        for part in self.run(wanted, batch, control_image):
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
        control_image: ControlImages = None,
        control_scale: float | Sequence[float] = 1.0,
        hires: bool | str = False,
    ) -> list[PictureSettings]:
        """The settings of each picture of a call, checked; arguments as there."""
        settings.check("seed", seed)
        prompts = self._listed(prompts)
        if seeds is None:
            seeds = range(seed, seed + len(prompts))
        elif len(prompts) == 1:
            prompts = prompts * len(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts and {len(seeds)} seeds: one seed for each is needed")
        images = controls.images_for(self.control, control_image, len(prompts))
        default_width, default_height = images[0][0].size if images else self.native_size
        asked = Settings(
            width=width,
            height=height,
            base=self.base.name,
            lorad=self.adapters,
            embeddings=self.vocabulary.settings,
            control=controls.describe(self.control, images, control_scale),
            hires=highres.METHODS[0] if hires is True else hires or None,
        )
        common = asked.resolved(
            width=default_width,
            height=default_height,
            alpha_T_squared=self.one_step.alpha_T_squared,
            timestep=self.one_step.timestep,
            prediction_type=self.one_step.prediction_type,
            dtype=str(self.dtype).removeprefix("torch."),
        )
        self._factors(common)
        for image in (image for own in images for image in own):
            controls.to_map(image, common.width, common.height)
        pairs = zip(prompts, seeds, strict=True)
        return [dataclasses.replace(common, prompt=prompt, seed=one) for prompt, one in pairs]

    @staticmethod
    def _listed(prompts: str | Sequence[str]) -> list[str]:
        """One or many prompts as a list; ValueError if there is none, or one that is no text."""
        if isinstance(prompts, (bytes, bytearray, Mapping)) or not isinstance(prompts, Iterable):
            raise ValueError(f"prompts must be a text or a list of texts, not {type(prompts).__name__}")
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        if not listed:
            raise ValueError("a picture needs a prompt")
        for prompt in listed:
            settings.check("prompt", prompt)
        return listed

    def _factors(self, one: PictureSettings) -> tuple[float, float]:
        """How much larger than native a picture is, as far as that is to be seen to."""
        return highres.factors(one.width, one.height, self.native_size) if one.hires else (1.0, 1.0)

    def run(self, wanted: Sequence[PictureSettings], batch: int = 4, control_image: ControlImages = None) -> Iterator[Pictures]:
        """Make the pictures of a :meth:`plan`, all of one size, yielding those of each network call with their latents.

        Args:
            wanted: from :meth:`plan`.
            batch: how many pictures share a network call.
            control_image: the same that the plan was made with.

        Raises:
            ValueError: ``batch`` is less than 1.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        images = controls.images_for(self.control, control_image, len(wanted))
        for start in range(0, len(wanted), batch):
            part = slice(start, start + batch)
            yield self._one_call(wanted[part], [own if len(own) == 1 else own[part] for own in images])

    @torch.no_grad()
    def _one_call(self, wanted: Sequence[PictureSettings], images: list[list[Image]]) -> Pictures:
        one = wanted[0]
        maps = [torch.cat([controls.to_map(image, one.width, one.height) for image in own]) for own in images]
        parts = zip(self.control, maps, one.control, strict=True)
        steerings = [Steering(net.network, map.to(self.device, self.dtype), kept.scale) for net, map, kept in parts]
        unet = Steered(self.base.unet, steerings)
        networks = [self.base.unet, *(steering.network for steering in unet.steerings)]
        text = self.encode([one.prompt for one in wanted])
        # The network's own number format, for the formula too: what it sees is what must be taken away again.
        z = noise([its.seed for its in wanted], one.width, one.height).to(self.device, self.dtype)
        self._wait()
        start = time.perf_counter()
        with highres.attach(networks, self._factors(one), one.hires or highres.METHODS[0]):
            prediction = unet(z, self.one_step.timestep, encoder_hidden_states=text).sample
        self._wait()
        seconds = time.perf_counter() - start
        x0 = check_latents(self.one_step.x0(z.float(), prediction), self.dtype)
        return Pictures(self.decode(x0), list(wanted), x0.cpu(), seconds, 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image]:
        """(n, 4, h/8, w/8) clean latents as n pictures, in pieces where the memory asks for it."""
        return pictures.to_pictures(decoding.decode(self.base.vae, latents, self.device, self.dtype))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(n, 77, width of the text encoder): what the network is told. Longer prompts are cut with a warning."""
        return self.base.text_encoder(self.vocabulary.ids(self._listed(prompts)).to(self.device))[0]

    def _wait(self) -> None:
        """Until the device has done what it was told: otherwise only the telling would be timed."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


def noise(seeds: Iterable[int], width: int, height: int) -> Tensor:
    """z (n, 4, height/8, width/8), float32 on the CPU: each picture's own generator, whatever the batch or device."""
    shape = (1, 4, height // bases.FACTOR, width // bases.FACTOR)
    return torch.cat([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])
