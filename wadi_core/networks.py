"""The networks of a pipeline: the base's and those that steer it, where they are and in which number format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from . import backends, catalog, decoding, diffusers_api, hub, pictures, precision, tiny
from . import base as bases
from . import control as controls
from .control import ControlNet, Controls
from .devices import find_device, find_dtype
from .diffusers_api import Place, listed
from .embeddings import Embeddings, Vocabulary, load_embeddings
from .files import known_name
from .stages import Encoded
from .thirdparty import DiffusersNetwork

if TYPE_CHECKING:
    from PIL.Image import Image

N = TypeVar("N", bound="Networks")


class Networks:
    """A base's networks, ControlNets and vocabulary on one device.

    Attributes:
        base: the networks.
        control: the ControlNets, in the order in which control images are given.
        vocabulary: what prompts may say.
        tiny: the decoder that draws instead of the base's own, after the name it was asked for; None is the base's own.
        backend: who computes the networks, one of :data:`.backends.BACKENDS`.
        precision: one of :data:`.precision.PRECISIONS`, as it is in use; None where all are in a format that was asked for.
    """

    def __init__(self, base: bases.Base, device: torch.device, dtype: torch.dtype, control: Controls = None) -> None:
        self.base = base
        self.device = device
        self.dtype = dtype
        self.precision: str | None = None
        self.tiny: tuple[str, DiffusersNetwork] | None = None
        self.backend = backends.EAGER
        self._backend: backends.Backend | None = None
        self.control: tuple[ControlNet, ...] = ()
        self.vocabulary = Vocabulary(base)
        self._encoded = Encoded(base.text_encoder)
        self.set_control(control)

    @property
    def unet(self) -> Any:
        return self.base.unet

    @property
    def vae(self) -> Any:
        return self.base.vae

    @property
    def text_encoder(self) -> Any:
        return self.base.text_encoder

    @property
    def tokenizer(self) -> Any:
        return self.base.tokenizer

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height in pixels that the network was trained at."""
        return self.base.native_size

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
        self._compute()

    def set_vae(self, vae: str | os.PathLike[str] | None = None) -> None:
        """Decode with a tiny network instead of the base's own autoencoder; ``None`` is the base's own.

        Args:
            vae: in TAESD's layout (see :mod:`.tiny`): a file or folder, a name of the hub, or ``taesd``.

        Raises:
            OSError, ValueError: it is missing, damaged or something else; one line, and the pipeline is as it was.
        """
        if vae is None:
            self.tiny = None
            return
        name = catalog.DECODERS.get(str(vae), vae)
        network = tiny.load(hub.local(name), self.device, self.dtype)
        self.tiny = str(name) if hub.parse(name) else known_name(Path(name)), network
        self._compute()

    def set_backend(self, name: str) -> None:
        """Choose who computes U-Net and decoder: ``eager`` (PyTorch) or ``openvino``, on a CPU in float32.

        Converting and compiling happen with the first picture (see ``warm_up``); after other adapters only compiling.

        Raises:
            ValueError: there is none of this name, it is not installed, or is not for this device; one line.
        """
        made = backends.make(name, self.device)
        if made and self.dtype != torch.float32:
            raise ValueError(f"the backend {name} needs networks in float32: choose a precision instead of a dtype")
        self.backend, self._backend = name, made
        self._compute()

    def _check_backend(self, enlarged: bool, steered: bool = False) -> None:
        """Raises ValueError for pictures that a backend cannot draw: those that need hooks in the networks."""
        if self._backend is not None and (self.control or enlarged or steered):
            raise ValueError(
                f"the backend {self.backend} draws without ControlNets, High Resolution and negative prompts: choose eager"
            )

    def _acting(self) -> tuple[Any, Any]:
        """U-Net and decoder, or what stands in for them."""
        decoder = self.tiny[1] if self.tiny else self.base.vae
        if self._backend is None:
            return self.base.unet, decoder
        how = self.precision or "exact"
        return self._backend.unet(self.base.unet, how), self._backend.decoder(decoder, how)

    def set_precision(self, name: str) -> None:
        """Choose how exactly the parts compute; on a CPU at any time, without loading anything again.

        Args:
            name: ``exact``, ``balanced`` or ``fast``. A CPU that does not multiply bfloat16 in hardware is always exact.

        Raises:
            ValueError: there is no such precision, or the networks were rounded to a smaller format; one line.
        """
        precision.check(name)
        if name == "exact" and self.dtype != torch.float32:
            rounded = str(self.dtype).removeprefix("torch.")
            raise ValueError(f"the networks have been rounded to {rounded}: load them with precision exact")
        self.precision = precision.used(name, self.device, self.dtype)
        self._compute()

    def _compute(self) -> None:
        """Let the layers compute as the precision says."""
        eager = self.dtype == torch.float32 and self._backend is None
        rules = precision.RULES[self.precision or "exact"] if eager else {}
        parts = [(getattr(self.base, part), rules.get(part)) for part in bases.PARTS]
        tinies = [(self.tiny[1], rules.get("vae"))] if self.tiny else []
        for network, rule in [*parts, *tinies, *((one.network, rules.get("unet")) for one in self.control)]:
            precision.attach(network, rule)
        self._encoded.forget()

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

    def to(self: N, *places: Place, device: Place = None, dtype: Place = None) -> N:
        """Move the networks to another device, give their numbers another format, or both; returns itself.

        As in diffusers: ``to("cuda")``, ``to(torch.float16)``, ``to("cuda", torch.float16)``, ``to(dtype=torch.float16)``.
        Weights that have been rounded to a smaller format stay rounded.

        Raises:
            ValueError: no such device or format, or none that the backend can follow to; one line, and nothing has been
                moved.
        """
        place, kind = diffusers_api.device_and_dtype(places, device, dtype)
        if self._backend is not None:
            raise ValueError(f"the backend {self.backend} stays where it is: set the backend eager first")
        found = self.device if place is None else find_device(place)
        self.dtype = self.dtype if kind is None else find_dtype(kind, found)
        self.device = found
        steering = [*(one.network for one in self.control), *([self.tiny[1]] if self.tiny else [])]
        for network in (self.base.unet, self.base.vae, self.base.text_encoder, *steering):
            network.to(self.device, self.dtype)
        if kind is not None:
            self.precision = None
        elif self.precision is not None:
            self.precision = precision.used(self.precision, self.device, self.dtype)
        self._compute()
        return self

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image]:
        """(n, 4, h/8, w/8) clean latents as n pictures, in pieces where the memory asks for it."""
        return pictures.to_pictures(self._pixels(latents))

    def _pixels(self, latents: Tensor) -> Tensor:
        return decoding.decode(self._acting()[1], latents, self.device, self.dtype)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(n, 77, width of the text encoder): what the network is told. Longer prompts are cut with a warning."""
        return self._read(self.vocabulary.ids(listed(prompts)))

    @torch.no_grad()
    def encode_whole(self, text: str) -> Tensor:
        """(77 n, width of the text encoder): a text of any length, in parts that the text encoder can read."""
        return self._read(self.vocabulary.pages(text)).flatten(0, 1)

    def _told(self, prompts: Sequence[str]) -> Tensor:
        """As :meth:`encode`, but what was encoded lately is not encoded again."""
        return self._encoded.get(self.vocabulary.ids(prompts), self._read)

    def _read(self, ids: Tensor) -> Tensor:
        return self.base.text_encoder(ids.to(self.device))[0].to(self.dtype)
