"""Strength x Seed Grid: what LoRaDs do at several strengths, for several seeds, in one labelled picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..wadi_core.pictures import ContactSheet
from .loaders import put_on
from .notices import Notice, message
from .sampling import is_one_step, made_one_step, picture_size, sample, seeds_from, with_one_step
from .schema import LORAD, schema, seed_input, size_input
from .sizes import notices_on

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

    from ..wadi_core.lorad import LoRaD

MORE = ("lorad_2", "lorad_3", "lorad_4")
STRENGTHS = 16
LARGEST = 4.0  # as far as the loaders' strength goes
CELL = 512  # pixels: pictures are not shown larger


class StrengthSeedGrid(io.ComfyNode):
    """A row of pictures for each LoRaD and strength, a column for each seed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WaDi_StrengthSeedGrid",
            display_name="Strength x Seed Grid",
            category="WaDi/tools",
            description="Compares LoRaDs and strengths: a labelled row for each, a column for each seed. One network call "
            "draws a whole row.",
            search_aliases=["xy plot", "x/y/z plot", "grid", "compare", "strength", "contact sheet", "wadi"],
            inputs=[
                io.Model.Input("model", tooltip="The model without the LoRaDs that are compared; others may be on it."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Vae.Input("vae", tooltip="The decoder."),
                LORAD.Input("lorad", tooltip="The LoRaD that is compared, from Open LoRaD or wadi-mini."),
                io.String.Input(
                    "strengths",
                    default="0, 0.5, 1, 1.5",
                    tooltip="Strengths with commas between them, up to 16; a row for each.",
                ),
                size_input("width"),
                size_input("height"),
                io.Int.Input("seeds", default=4, min=1, max=16, tooltip="Number of columns: seed, seed + 1 and so on."),
                seed_input(),
                *(LORAD.Input(name, optional=True, tooltip="Another LoRaD, compared in further rows.") for name in MORE),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="All pictures in one, labelled, each 512 pixels at most."),
                io.Image.Output(display_name="images", tooltip="The pictures themselves, row by row."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list[Any],
        vae: VAE,
        lorad: LoRaD,
        strengths: str,
        width: int,
        height: int,
        seeds: int,
        seed: int,
        **more: LoRaD | None,
    ) -> io.NodeOutput:
        lorads = [lorad, *(one for name in MORE if (one := more.get(name)) is not None)]
        rows = [(one, strength) for one in lorads for strength in strengths_of(strengths)]
        columns, sheet, images = seeds_from(seed, seeds), ContactSheet(CELL), []
        notices: list[Notice] = []
        bar = comfy.utils.ProgressBar(len(rows))
        for one, strength in rows:
            comfy.model_management.throw_exception_if_processing_interrupted()
            turned, report = put_on(model, one, strength, one_step=True)
            if one.one_step and not is_one_step(turned):  # at strength 0: the base, called as the student is
                turned = with_one_step(turned, one.one_step)
            turned, found = made_one_step(turned)
            size = picture_size(turned, width, height)
            notices += [*report.applied.notices, *found, *notices_on(turned, *size)]
            latents = sample(turned, positive, size, columns)
            pictures = vae.decode(latents)
            images.append(pictures)
            name = name_of(one, lorads)
            for picture, its_seed in zip(pictures, columns, strict=True):
                sheet.add(as_pil(picture), f"{name}{strength:g}, seed {its_seed}")
            bar.update(1)
        drawn = np.asarray(sheet.draw(seeds), dtype=np.float32) / 255
        return io.NodeOutput(torch.from_numpy(drawn)[None], torch.cat(images), ui=message(notices=notices))


def strengths_of(text: str) -> list[float]:
    """The numbers in a text, with commas, semicolons or spaces between them.

    Raises:
        ValueError: none, too many, or something that is no strength; one line.
    """
    words = text.replace(",", " ").replace(";", " ").split()
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= STRENGTHS or not all(math.isfinite(one) and abs(one) <= LARGEST for one in numbers):
        wanted = f"1 to {STRENGTHS} numbers from {-LARGEST:g} to {LARGEST:g} with commas between them"
        raise ValueError(f"strengths are {wanted}, such as '0, 0.5, 1', not {text[:80]!r}")
    return numbers


def name_of(lorad: LoRaD, lorads: list[LoRaD]) -> str:
    """What stands before the strength in a label: which LoRaD it is, where there are several."""
    if len(lorads) == 1:
        return "strength "
    return f"{lorad.metadata.title or f'LoRaD {lorads.index(lorad) + 1}'}: "


def as_pil(picture: Tensor) -> Image.Image:
    """(h, w, 3) from 0 to 1 as a picture of PIL's."""
    return Image.fromarray(picture.mul(255).round().clamp(0, 255).to("cpu", torch.uint8).numpy())
