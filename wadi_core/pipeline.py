"""From a prompt to a picture in one call of the network.

    z ~ N(0, I);  x0 = (z - sigma_T * eps(z, T, prompt)) / alpha_T;  picture = decode(x0 / scaling_factor)

No guidance, no second branch, no loop: the U-Net is called once for each batch of pictures. ControlNets may steer it,
and pictures may be larger than those it was trained on.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from . import base as bases
from . import control as controls
from . import diffusers_api, diffusers_folder, guidance, highres, hub, mini, negative, results, settings
from . import precision as precisions
from .control import ControlImages, Controls, Steered, Steering
from .devices import find_device, find_dtype
from .diffusers_api import Generators, Prompts, listed
from .embeddings import Embeddings
from .lorad.adapter import Fused, check_together, fuse
from .negative import Guidance, Negatives
from .networks import Networks
from .results import Pictures
from .schedule import OneStep, check_latents
from .seeds import noise, seed_of
from .settings import PictureSettings, Settings
from .stack import Adapters, Stacked, load_adapters
from .stages import Clock, Timings

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("wadi")

File: TypeAlias = "str | os.PathLike[str]"


class OneStepPipeline(Networks):
    """A base network with LoRaD adapters fused into it, called once for a batch of pictures.

        pipe = OneStepPipeline.from_pretrained("sd15-folder", lorad="one-step.safetensors")
        pipe("a red apple", seed=3).save("apple.png")

    It also speaks diffusers: ``prompt=``, ``generator=``, ``output_type=``, ``.to(device, dtype)``, ``.unet`` and so on.

    Attributes:
        one_step: the schedule in use.
        is_one_step: whether the network was trained for it.
        adapters: what is fused into the U-Net, as it is written into a picture's settings.
    """

    def __init__(
        self,
        base: bases.Base,
        device: torch.device,
        dtype: torch.dtype,
        alpha_T_squared: float | None = None,
        control: Controls = None,
    ) -> None:
        super().__init__(base, device, dtype, control)
        self.adapters: tuple[settings.Adapter, ...] = ()
        self._own_one_step = base.one_step
        if alpha_T_squared is not None:
            self._own_one_step = OneStep(alpha_T_squared, prediction_type=base.prediction_type)
        self._fused = Fused()
        self.is_one_step = self._own_one_step is not None
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
        torch_dtype: torch.dtype | None = None,
        precision: str | None = None,
        vae: File | None = None,
        backend: str = "eager",
    ) -> OneStepPipeline:
        """Load a base and fuse adapters into it. Nothing is downloaded but what a name of the hub asks for (:mod:`.hub`).

        Args:
            base: ``mini``, a folder in diffusers layout, a single-file SD1.5 or SD2.1-base checkpoint, or a name of the
                model hub: ``org/name``, ``org/name@revision`` or ``org/name:file``. So with adapters and the others.
            lorad: as for :meth:`set_lorad`. By default what ``mini`` comes with, and nothing for another base.
            strength: of the adapters that name none of their own.
            device: by default a GPU if there is one.
            dtype: float32, bfloat16 or float16 for all parts alike, instead of ``precision``.
            alpha_T_squared: says that the base is a one-step network itself, with its LoRaD merged into it, and at
                which share of signal it was trained (0.0047 in the released ones).
            config: for a single file of unknown shape: a folder with its settings in diffusers layout.
            keep_base: keep the weights that are turned, so that :meth:`set_lorad` can be called again.
            control, embeddings, vae, backend: as for :meth:`set_control` and so on.
            torch_dtype: diffusers' name for ``dtype``.
            precision: ``exact`` (float32), ``balanced`` (default) or ``fast``; see :mod:`.precision`.

        Raises:
            OSError, ValueError: a file is missing, damaged or of another kind; one line.
        """
        if dtype is not None and torch_dtype is not None:
            raise ValueError("dtype and torch_dtype are two names for the same: give one of them")
        dtype = torch_dtype if dtype is None else dtype
        device = find_device(device)
        if dtype is not None and precision is not None:
            raise ValueError("dtype and precision both say how numbers are kept: give one of them")
        chosen = precisions.check(precisions.DEFAULT if precision is None else precision)
        number = precisions.find_format(chosen, device) if dtype is None else find_dtype(dtype, device)
        if lorad is None and str(base) == "mini":
            lorad = mini.lorad_path()
        stack = load_adapters(lorad, strength)
        place = hub.local(base, hub.BASE, number == torch.float16, bases.find)
        loaded = bases.load(place, device, number, config)
        if wanted := hub.parse(base):
            loaded.name = str(wanted)
        pipe = cls(loaded, device, number, alpha_T_squared, control)
        pipe._check(stack)
        pipe.set_embeddings(embeddings)
        pipe.set_vae(vae)
        pipe._fuse(stack, keep_base)
        if dtype is None:
            pipe.set_precision(chosen)
        pipe.set_backend(backend)
        return pipe

    def warm_up(self, prompt: str = "", batch: int = 1, **options: Any) -> Timings:
        """Do all that only a first picture has to wait for, by making one with these options; returns how long it took."""
        return self([prompt] * batch, batch=batch, **options).timings

    @property
    def scheduler(self) -> Any:
        """The schedule in use, as stock pipelines of diffusers take it: a new object."""
        from .scheduler import OneStepScheduler

        return OneStepScheduler.of(self.one_step)

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
        self.base.check_one_step(schedule)
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
        self.is_one_step = found is not None
        self.one_step = found or OneStep(prediction_type=self.base.prediction_type)
        if found is None:
            logger.warning("no one-step weights are loaded: one call of a multi-step network gives a blurred picture")
        elif found.prediction_type != self.base.prediction_type:
            said = f"{found.prediction_type}, not {self.base.prediction_type} as this base by its settings"
            logger.warning("the one-step weights are for a network that returns %s; they are followed", said)

    def save_pretrained(self, folder: File) -> None:
        """Write the networks as a folder in diffusers layout, which :meth:`from_pretrained` and stock pipelines load.

        Its U-Net has the adapters rotated into its weights, and its scheduler is a ``OneStepScheduler``: give stock
        pipelines ``guidance_scale=1.0``. ControlNets and learned words are not part of it.

        Raises:
            OSError: it cannot be written, or the folder is there and not empty; one line.
        """
        learned = self.vocabulary.learned
        self.vocabulary.learn(())
        try:
            diffusers_folder.write(folder, self.base, self.one_step, self.is_one_step)
        finally:
            self.vocabulary.learn(learned)

    def __call__(
        self,
        prompts: Prompts = None,
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
        *,
        prompt: Prompts = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        negative_prompt: Negatives = None,
        negative_scale: float | None = None,
        negative_method: str | Guidance = negative.DEFAULT,
        num_inference_steps: int = 1,
        guidance_scale: float | None = None,
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
            prompt: diffusers' name for ``prompts``.
            num_images_per_prompt: how many pictures of each prompt, one after the other.
            generator: instead of seeds: draws the noise as diffusers does, one for all pictures or one for each.
            latents: (n, 4, h/8, w/8) instead of seeds: the noise itself.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``; see :func:`~.results.gathered`.
            negative_prompt: what the pictures are not to show: a text, or one for each prompt. An entry of a list may
                itself be several texts. It works inside the one call (:mod:`.guidance`).
            negative_scale: how strongly; 0 is not at all. By default what the method's preset says.
            negative_method: one of ``negative.PRESETS``, or numbers of one's own.
            num_inference_steps, guidance_scale: what a stock pipeline may be given in one step: 1, and 1 or 0.

        Raises:
            ValueError: no prompt, a size not divisible by 8, a seed out of range, control images that do not fit; one
                line, before any work.
        """
        diffusers_api.check_guidance(num_inference_steps, guidance_scale)
        results.check_output_type(output_type)
        asked = diffusers_api.prompts_of(prompts, prompt, num_images_per_prompt)
        if latents is not None:
            width, height = diffusers_api.size_of(latents, width, height, bases.FACTOR)
        unwanted = diffusers_api.negatives_of(negative_prompt, num_images_per_prompt)
        away = (unwanted, negative_scale, negative_method)
        wanted = self.plan(asked, seed, seeds, width, height, control_image, control_scale, hires, *away)
        z = None
        if generator is not None or latents is not None:
            if seed or seeds is not None:
                raise ValueError("seeds, a generator and latents are three sources of noise: give one of them")
            z, wanted = self._noise(wanted, generator, latents)
        made, clean = Pictures(), []
        for part in self.run(wanted, batch, control_image, z, output_type):
            made.add(part)
            clean.append(part.latents)
            if progress:
                progress(len(made.images), len(wanted))
        made.images = results.gathered(made.images, output_type)
        if return_latents:
            made.latents = torch.cat(clean)
        return made

    def _noise(
        self, wanted: list[PictureSettings], generator: Generators, latents: Tensor | None
    ) -> tuple[Tensor, list[PictureSettings]]:
        """The noise that is not drawn from seeds, and the settings with what is true of it."""
        width, height = wanted[0].width, wanted[0].height
        shape = (len(wanted), 4, height // bases.FACTOR, width // bases.FACTOR)
        z = diffusers_api.draw(generator, latents, shape, self.device, self.dtype)
        drawn = None if latents is not None else generator
        return z, diffusers_api.with_true_seeds(wanted, z, drawn, lambda seed: noise([seed], width, height))

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
        negative_prompt: Negatives = None,
        negative_scale: float | None = None,
        negative_method: str | Guidance = negative.DEFAULT,
    ) -> list[PictureSettings]:
        """The settings of each picture of a call, checked; arguments as there."""
        if seed is None:
            raise ValueError("seed must be of type int, not NoneType")
        settings.check("seed", seed)
        prompts = listed(prompts)
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
            vae=self.tiny[0] if self.tiny else None,
            hires=highres.METHODS[0] if hires is True else hires or None,
        )
        common = asked.resolved(
            width=default_width,
            height=default_height,
            alpha_T_squared=self.one_step.alpha_T_squared,
            timestep=self.one_step.timestep,
            prediction_type=self.one_step.prediction_type,
            input_scale=self.one_step.input_scale,
            dtype=str(self.dtype).removeprefix("torch."),
            precision=self.precision,
        )
        for image in (image for own in images for image in own):
            controls.to_map(image, common.width, common.height)
        away = negative.of_each(negative_prompt, negative.preset(negative_method, negative_scale), len(prompts))
        self._check_backend(enlarged=self._factors(common) != (1.0, 1.0), steered=any(away))
        each = zip(prompts, seeds, away, strict=True)
        return [dataclasses.replace(common, prompt=prompt, seed=one, negative=its) for prompt, one, its in each]

    def _factors(self, one: PictureSettings) -> tuple[float, float]:
        """How much larger than native a picture is, as far as that is to be seen to."""
        return highres.factors(one.width, one.height, self.native_size) if one.hires else (1.0, 1.0)

    def run(
        self,
        wanted: Sequence[PictureSettings],
        batch: int = 4,
        control_image: ControlImages = None,
        z: Tensor | None = None,
        output_type: str = "pil",
    ) -> Iterator[Pictures]:
        """Make the pictures of a :meth:`plan`, all of one size, yielding those of each network call with their latents.

        Args:
            wanted: from :meth:`plan`.
            batch: how many pictures share a network call.
            control_image: the same that the plan was made with.
            z: (n, 4, h/8, w/8) the noise, where it is not to be drawn from the seeds.
            output_type: form of the pictures, a list of single ones.

        Raises:
            ValueError: ``batch`` is less than 1, or a picture has no seed and no noise.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        images = controls.images_for(self.control, control_image, len(wanted))
        for start in range(0, len(wanted), batch):
            part = slice(start, start + batch)
            steering = [own if len(own) == 1 else own[part] for own in images]
            yield self._one_call(wanted[part], steering, None if z is None else z[part], output_type)

    @torch.no_grad()
    def _one_call(
        self, wanted: Sequence[PictureSettings], images: list[list[Image]], z: Tensor | None, output_type: str
    ) -> Pictures:
        one = wanted[0]
        maps = [torch.cat([controls.to_map(image, one.width, one.height) for image in own]) for own in images]
        parts = zip(self.control, maps, one.control, strict=True)
        steerings = [Steering(net.network, map.to(self.device, self.dtype), kept.scale) for net, map, kept in parts]
        unet = Steered(self._acting()[0], steerings)
        networks = [self.base.unet, *(steering.network for steering in unet.steerings)]
        clock = Clock(self.device)
        text = self._told([one.prompt for one in wanted])
        clock.mark("text")
        # The network's own number format, for the formula too: what it sees is what must be taken away again.
        z = noise([seed_of(its) for its in wanted], one.width, one.height) if z is None else z
        x = self.one_step.network_input(z.to(self.device, self.dtype))
        larger = highres.attach(networks, self._factors(one), one.hires or highres.METHODS[0])
        with larger, guidance.attach_each(self.base.unet, [its.negative for its in wanted], self.encode_whole):
            prediction = unet(x, self.one_step.timestep, encoder_hidden_states=text).sample
        x0 = self.one_step.x0(x.float(), prediction)
        clock.mark("network")
        pixels = x0 if output_type == "latent" else self._pixels(x0)
        clock.mark("decode")
        x0 = check_latents(x0, self.dtype)  # only now: the answer has to be waited for
        made = list(x0.to(self.dtype)) if output_type == "latent" else results.each(pixels, output_type)
        clock.mark("pictures")
        return Pictures(made, list(wanted), x0.cpu(), clock.read(), 1)
