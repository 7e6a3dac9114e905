"""The base of a distillation: a network that predicts noise, and how to talk to it, whichever kind it is.

Stable Diffusion's U-Nets are read by the core, from a diffusers folder or a single file; PixArt-alpha from a diffusers
folder. Everything is read on the CPU in float32; where and how the network's weights are kept after that is
:mod:`.placing`'s business.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wadi_core import base as bases
from wadi_core import configs, hub
from wadi_core.files import one_line, refusal
from wadi_core.lorad import declared
from wadi_core.lorad.folders import STEM, TEXT_STEM, weight_files
from wadi_core.lorad.layers import detect_architecture, network_sha256
from wadi_core.lorad.stored import is_finite
from wadi_core.pictures import to_pictures
from wadi_core.pipeline import OneStepPipeline
from wadi_core.thirdparty import DiffusersNetwork, Tokenizer

from .condition import Condition

if TYPE_CHECKING:
    from PIL.Image import Image

T5_TOKENS = 120  # PixArt-alpha's, padding included
LATENT_CHANNELS = 4
CPU = torch.device("cpu")


def call_unet(network: DiffusersNetwork, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The output (n, 4, h, w) of a Stable Diffusion U-Net for x (n, 4, h, w) at timesteps t (n,)."""
    return network(x, t, condition.text).sample


def call_pixart(network: DiffusersNetwork, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The output (n, 4, h, w) of a PixArt transformer; the half that predicts a variance is left out."""
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if network.config.sample_size == 128:  # only the 1024 px network is told the size of its pictures
        height, width = (side * bases.FACTOR for side in x.shape[2:])
        added = {
            "resolution": x.new_tensor([[height, width]]).expand(len(x), 2),
            "aspect_ratio": x.new_tensor([[height / width]]).expand(len(x), 1),
        }
    output = network(
        x, encoder_hidden_states=condition.text, encoder_attention_mask=condition.mask, timestep=t, added_cond_kwargs=added
    ).sample
    return output[:, : x.shape[1]]


class Model:
    """A base model.

    Attributes:
        network: predicts noise (or v); frozen.
        architecture: one of the core's names.
        call: how the network is called, as :func:`call_unet`.
        base_sha256: by which an adapter will know this base again.
        alphas_cumprod: (1000,) float64, of the base's own schedule.
        native_size: width and height in pixels.
        device: where embeddings are wanted and pictures are decoded.
    """

    call = staticmethod(call_unet)

    def __init__(self, network: DiffusersNetwork, folder: Path, native_size: tuple[int, int], vae: DiffusersNetwork) -> None:
        self.network = network.requires_grad_(False)
        self.architecture = detect_architecture(network)
        self.base_sha256 = network_sha256(network, self.architecture)
        self.alphas_cumprod = bases.alphas_cumprod(folder)
        self.native_size = native_size
        self.vae = vae.requires_grad_(False).eval()
        self.device, self.dtype, self.offload = CPU, torch.float32, False

    @property
    def encoder_key(self) -> str:
        """Two models with the same key say the same of a prompt."""
        raise NotImplementedError

    def skip_layers(self, count: int) -> None:
        """Leave out the last layers of the text encoder; its last norm stays.

        Raises:
            ValueError: it has no such layers; one line.
        """
        if count:
            raise ValueError("clip_skip: this base has no CLIP text encoder")

    def helpers(self) -> list[DiffusersNetwork]:
        """The networks beside the one that is distilled, as far as they are loaded."""
        raise NotImplementedError

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts as tensors of (n, ...), named ``text`` and, where there is one, ``mask``."""
        raise NotImplementedError

    def place_helpers(self, device: torch.device, dtype: torch.dtype, offload: bool) -> None:
        """Put text encoder and autoencoder where they are to be; with ``offload`` only while they are used."""
        self.device, self.dtype, self.offload = device, dtype, offload and device.type != "cpu"
        for helper in self.helpers():
            helper.to(CPU if self.offload else device, dtype)

    @contextmanager
    def on_device(self, helper: DiffusersNetwork) -> Iterator[DiffusersNetwork]:
        """A text encoder or autoencoder on the device, for the time that it is used."""
        if self.offload:
            helper.to(self.device)
        try:
            yield helper
        finally:
            if self.offload:
                helper.to(CPU)

    def condition(self, embedded: dict[str, Tensor]) -> Condition:
        """What :meth:`embed` returned, on the device."""
        mask = embedded.get("mask")
        return Condition(embedded["text"].to(self.device), None if mask is None else mask.to(self.device))

    def encode(self, prompts: Sequence[str]) -> Condition:
        """What the network is told for these prompts, on the device."""
        return self.condition(self.embed(prompts))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image]:
        """(n, 4, h, w) clean latents as pictures."""
        scaled = latents.to(self.device, self.dtype) / self.vae.config.scaling_factor
        with self.on_device(self.vae) as vae:
            return [picture for one in scaled.split(1) for picture in to_pictures(vae.decode(one).sample)]


class StableDiffusion(Model):
    """SD1.5, SD2.1-base, wadi-mini, and fine-tunes of them."""

    def __init__(self, base: bases.Base, settings: Path) -> None:
        super().__init__(base.unet, settings, base.native_size, base.vae)
        self.pipeline = OneStepPipeline(base, CPU, torch.float32)
        self.base = base

    @property
    def encoder_key(self) -> str:
        return f"{weights_key(self.base.text_encoder)} pad {self.base.pad} {self.dtype}"

    def skip_layers(self, count: int) -> None:
        modules = dict(self.base.text_encoder.named_modules())
        layers = next(module for name, module in modules.items() if name.endswith("encoder.layers"))
        if count >= len(layers):
            raise ValueError(f"clip_skip: this text encoder has {len(layers)} layers, and one has to stay")
        del layers[len(layers) - count :]
        self.base.text_encoder.config.num_hidden_layers = len(layers)

    def helpers(self) -> list[DiffusersNetwork]:
        return [self.base.text_encoder, self.vae]

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        with self.on_device(self.base.text_encoder):
            self.pipeline.device = self.device
            return {"text": self.pipeline.encode(prompts)}


class PixArt(Model):
    """PixArt-alpha. Its T5 text encoder is large, and is loaded only when a prompt has to be encoded."""

    call = staticmethod(call_pixart)

    def __init__(self, folder: Path) -> None:
        from diffusers import AutoencoderKL, PixArtTransformer2DModel

        network = read_part(PixArtTransformer2DModel, folder / "transformer")
        side = network.config.sample_size * bases.FACTOR
        super().__init__(network, folder, (side, side), read_part(AutoencoderKL, folder / "vae"))
        self.folder = folder
        self._text_encoder: DiffusersNetwork = None
        self._tokenizer: Tokenizer = None

    @property
    def encoder_key(self) -> str:
        config = self.folder / "text_encoder" / "config.json"
        text = json.dumps(configs.read(config), sort_keys=True) if config.is_file() else ""
        return f"{self.folder.resolve()} {hashlib.sha256(text.encode()).hexdigest()} {self.dtype}"

    def helpers(self) -> list[DiffusersNetwork]:
        return [self.vae] if self._text_encoder is None else [self._text_encoder, self.vae]

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        if self._text_encoder is None:
            self._load_text_encoder()
        words = [prompt.lower().strip() for prompt in prompts]  # as PixArt's own pipeline writes them
        ids = self._tokenizer(words, padding="max_length", max_length=T5_TOKENS, truncation=True, return_tensors="pt")
        with self.on_device(self._text_encoder) as encoder:
            mask = ids.attention_mask.to(self.device)
            return {"text": encoder(ids.input_ids.to(self.device), attention_mask=mask)[0], "mask": mask}

    def _load_text_encoder(self) -> None:
        from transformers import AutoTokenizer, T5EncoderModel

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)
        except Exception as error:  # a tokenizer that is missing, damaged or lacks its library can raise nearly anything
            raise refusal(self.folder / "tokenizer", f"no T5 tokenizer can be read here: {first_line(error)}") from error
        encoder = read_part(T5EncoderModel, self.folder / "text_encoder", TEXT_STEM, self.dtype)
        width, wanted = encoder.config.d_model, self.network.config.caption_channels
        if width != wanted:
            raise refusal(self.folder, f"text encoder and transformer do not belong together: widths {width} and {wanted}")
        self._text_encoder = encoder.requires_grad_(False).eval().to(CPU if self.offload else self.device)


def read_part(kind: Any, folder: Path, stem: str = STEM, dtype: torch.dtype = torch.float32) -> DiffusersNetwork:
    """One network of a diffusers folder; nothing is fetched.

    Raises:
        OSError: it is not there. ValueError: it cannot be read. Both with one line.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder.parent}: {folder.name}/config.json is missing")
    found = weight_files(folder, stem)
    try:
        network, told = kind.from_pretrained(
            folder,
            local_files_only=True,
            torch_dtype=dtype,
            variant=found.variant or None,
            use_safetensors=found.files[0].suffix == ".safetensors",
            output_loading_info=True,
        )
    except Exception as error:  # of a damaged folder nearly anything can come
        raise refusal(folder, f"these weights cannot be read: {first_line(error)}") from error
    if missing := sorted(told["missing_keys"]):
        raise refusal(folder, f"these weights do not fit: {missing[0]} is missing")
    if broken := [name for name, tensor in network.state_dict().items() if not is_finite(tensor)]:
        raise refusal(folder, f"{broken[0]} holds NaN or Inf: take another copy of these weights")
    return network


def first_line(error: BaseException) -> str:
    """The beginning of a message."""
    return one_line(str(error).strip().partition("\n")[0] or type(error).__name__)


def weights_key(module: nn.Module) -> str:
    """A checksum of a network's weights as float16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        if tensor.is_floating_point():
            digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy())
    return digest.hexdigest()


def is_pixart(base: str | os.PathLike[str]) -> bool:
    """Whether a base is a diffusers folder of PixArt.

    Raises:
        ValueError: of another PixArt than alpha; one line.
    """
    index = Path(base) / "model_index.json"
    if not index.is_file():
        return (Path(base) / "transformer" / "config.json").is_file()
    name = str(configs.read(index).get("_class_name"))
    if name.startswith("PixArt") and not name.startswith("PixArtAlpha"):
        raise refusal(base, f"this folder is for {name}; of PixArt only alpha is supported")
    return name.startswith("PixArtAlpha")


def shape_folder(config: str) -> Path | None:
    """The folder that ``base_config`` names, by its path, as one that ships or on the model hub; None for an empty name.

    Raises:
        OSError, ValueError: there is none; one line.
    """
    if not config:
        return None
    folder = configs.folder(config) if config in configs.SHAPES else Path(hub.local(config, hub.SETTINGS))
    if not any((folder / part / "config.json").is_file() for part in ("unet", "transformer")):
        known = ", ".join(configs.SHAPES)
        raise FileNotFoundError(one_line(f"base_config: {config} is no folder with unet/config.json, and none of {known}"))
    return folder


def load(base: str, config: str, prediction_type: str) -> Model:
    """Read a base into main memory.

    Args:
        base: ``mini``, a folder in diffusers layout, a ``.safetensors`` checkpoint of a Stable Diffusion, or a name of
            the model hub.
        config: for a checkpoint of unknown shape a folder with its settings, or the name of one that ships; else empty.
        prediction_type: what the user says that it returns.

    Raises:
        OSError, ValueError: it is missing, damaged or of a kind that cannot be distilled; one line.
    """
    if not base:
        raise ValueError("base: name the model to distil, a diffusers folder or a .safetensors checkpoint: base=PATH")
    base = local_base(base)
    if base != "mini" and is_pixart(base):
        check_prediction(base, declared.of_folder(Path(base)), prediction_type)
        return PixArt(Path(base))
    shape = shape_folder(config)
    if shape is not None and is_pixart(shape):
        raise refusal(base, f"this is no folder of PixArt, whose shape base_config={config} is")
    source = bases.find(base, shape)
    check_prediction(base, bases.prediction_type(source), prediction_type)
    loaded = bases.load(base, CPU, torch.float32, shape)
    if loaded.one_step is not None:
        raise refusal(base, "this is a one-step network already; a multi-step one is needed to learn from")
    if loaded.prediction_by:
        check_prediction(base, loaded.prediction_type, prediction_type, loaded.prediction_by)
    return StableDiffusion(loaded, source.settings)


def local_base(base: str, kind: str = hub.BASE) -> str:
    """A base as its path on the disk, fetched if it is named as on the model hub.

    Raises:
        OSError, ValueError: it cannot be fetched, or is of a kind that cannot be distilled; one line.
    """
    return str(hub.local(base, kind, check=lambda folder: is_pixart(folder) or bases.find(folder)))


def check_prediction(base: str, said: str | None, wanted: str, how: str = "by its own settings") -> None:
    """Do nothing if the settings agree with the base.

    Raises:
        ValueError: they do not; one line that says what to set.
    """
    if said is not None and said != wanted:
        raise refusal(base, f"this base predicts {said} {how}: set prediction_type={said} if that is right")
