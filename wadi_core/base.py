"""The base of a pipeline: U-Net, autoencoder, text encoder and tokenizer, from a folder or a single file.

Everything is read from the disk: settings come from the folder or from those that ship with this package, weights
are put straight into networks that were built without any, and nothing is ever fetched. A file that is not what it
should be is refused in one line before a network exists.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import configs, mini
from .files import name_of, refusal
from .lorad import checkpoint
from .lorad.layers import detect_architecture
from .lorad.metadata import Metadata
from .lorad.weights import network_files
from .schedule import OneStep

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TOKENS = 77  # of a prompt, with its start and end
FACTOR = 8  # pixels per latent
PARTS = ("unet", "vae", "text_encoder")
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
SUPPORTED = 'Stable Diffusion 1.5, 2.1-base and "mini"'

# Where the parts of a single-file (LDM) checkpoint begin. The two text encoders are OpenAI's CLIP and OpenCLIP.
LDM_UNET, LDM_VAE = "model.diffusion_model.", "first_stage_model."
LDM_CLIP, LDM_OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
LDM_CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"

# OpenCLIP's names of a text encoder and CLIP's; query, key and value are one tensor in the former.
OPEN_CLIP_TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
OPEN_CLIP_LAYER = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
}
# What the autoencoder's attention was called in folders written by diffusers before 0.18.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass
class Base:
    """A latent diffusion model, ready to use.

    Attributes:
        name: how it was asked for, without the folders above it.
        architecture: one of :data:`~.lorad.layers.ARCHITECTURES`.
        unet, vae, text_encoder: diffusers' and transformers' own modules, without gradients.
        tokenizer: CLIP's; ``pad`` is the token that fills up short prompts.
        prediction_type: what the base's own schedule says.
        one_step: the schedule, where the file says that it is a one-step network itself.
    """

    name: str
    architecture: str
    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    tokenizer: CLIPTokenizer
    pad: int
    prediction_type: str
    one_step: OneStep | None

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height in pixels that the network was trained at."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return width * FACTOR, height * FACTOR


@dataclass(frozen=True)
class Source:
    """Where the parts of a base lie: a folder in diffusers layout, or a single file and the settings for it."""

    path: Path
    settings: Path

    @property
    def single_file(self) -> bool:
        return self.path != self.settings


def find(base: str | os.PathLike[str], config: str | os.PathLike[str] | None = None) -> Source:
    """Look at a base without loading it.

    Args:
        base: a folder in diffusers layout, a ``.safetensors`` checkpoint in the single-file (LDM) layout, or ``mini``.
        config: for a single file of another shape than those known, a folder with its settings in diffusers layout.

    Raises:
        OSError: there is no such file or folder, or a part of it is missing.
        ValueError: it is something else. Both with a message of one line.
    """
    if str(base) == "mini":
        folder = mini.folder()
        return Source(folder, folder)
    path = Path(base)
    if path.is_dir():
        _check_folder(path)
        return Source(path, path)
    if not path.exists():
        wanted = 'a diffusers folder, a .safetensors checkpoint, or "mini"'
        raise FileNotFoundError(f"{path}: there is no such file or folder (nothing is downloaded; a base is {wanted})")
    if path.suffix.lower() in checkpoint.PICKLE_ENDINGS:
        raise refusal(path, "checkpoints are read as .safetensors only: convert this one first")
    shapes = checkpoint.read_header(path).shapes
    return Source(path, Path(config) if config else configs.folder(_architecture_of_file(path, shapes)))


def load(
    base: str | os.PathLike[str],
    device: torch.device,
    dtype: torch.dtype,
    config: str | os.PathLike[str] | None = None,
) -> Base:
    """Load a base as :func:`find` describes it, its networks on ``device`` in ``dtype``.

    Raises:
        OSError, ValueError: as :func:`find`, or a part is damaged or does not fit its settings; one line.
    """
    source = find(base, config)
    networks = {}
    for part in PARTS:
        network = _empty_network(part, source.settings / part / "config.json")
        tensors, where = _weights(part, source, network)
        networks[part] = fill(network, tensors, where, device, dtype)
    try:
        architecture = detect_architecture(networks["unet"])
    except ValueError as error:
        raise refusal(source.path, str(error)) from None
    _check_parts(source.path, networks)
    tokenizer, pad = _load_tokenizer(source.settings / "tokenizer")
    return Base(
        name="mini" if str(base) == "mini" else name_of(source.path.resolve()),
        architecture=architecture,
        tokenizer=tokenizer,
        pad=pad,
        prediction_type=_prediction_type(source),
        one_step=_merged_one_step(source),
        **networks,
    )


def unet_shapes(base: str | os.PathLike[str], config: str | os.PathLike[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of a base's U-Net, in diffusers' names; weights are not read.

    Raises:
        OSError, ValueError: as :func:`find`; one line.
    """
    source = find(base, config)
    if source.single_file:
        shapes = checkpoint.read_header(source.path).shapes
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if name.startswith(LDM_UNET)}
        converted = _convert_unet(tensors, configs.read(source.settings / "unet" / "config.json"))
    else:
        converted = _empty_network("unet", source.path / "unet" / "config.json").state_dict()
    return {name: tuple(tensor.shape) for name, tensor in converted.items()}


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if index.exists():
        name = str(configs.read(index).get("_class_name"))
        if not name.startswith("StableDiffusion") or "XL" in name or "StableDiffusion3" in name:
            raise refusal(folder, f"this folder is for {name}; supported are {SUPPORTED}")
    for part in PARTS:
        if not (folder / part / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: this is no Stable Diffusion in diffusers layout: {part}/config.json is missing")


def _architecture_of_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    """Which of the shipped settings a single file is for, by the widths of its U-Net."""
    if not any(name.startswith(LDM_UNET) for name in shapes):
        if any(name.endswith((".lorad_a", ".theta_a", ".lora_down.weight", ".lora_A.weight")) for name in shapes):
            raise refusal(path, "this is an adapter, not a base network")
        if any(name.startswith(("down_blocks.", "unet.down_blocks.")) for name in shapes):
            raise refusal(path, "this is a U-Net alone (diffusers layout): a base needs its text encoder and autoencoder too")
        raise refusal(path, f"this is no checkpoint of Stable Diffusion; supported are {SUPPORTED}")
    if any(name.startswith(LDM_UNET + "label_emb.") for name in shapes):
        raise refusal(path, f"this is a checkpoint of Stable Diffusion XL; supported are {SUPPORTED}")
    entry = shapes.get(LDM_UNET + "input_blocks.0.0.weight", ())
    if entry[1:2] == (9,):
        raise refusal(path, f"this is a checkpoint for inpainting, with 9 input channels; supported are {SUPPORTED}")
    context = shapes.get(LDM_CONTEXT, ())
    for architecture, folder in configs.FOLDERS.items():
        settings = configs.read(folder / "unet" / "config.json")
        width, channels = settings["block_out_channels"][0], settings["in_channels"]
        if entry[:2] == (width, channels) and context[1:2] == (settings["cross_attention_dim"],):
            return architecture
    raise refusal(path, f"no settings are known for a U-Net of these widths; supported are {SUPPORTED}")


def _empty_network(part: str, config: Path) -> nn.Module:
    """A network without weights, on the meta device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = configs.read(config)
    if part == "text_encoder" and settings.get("model_type") != "clip_text_model":
        raise refusal(config, f"a text encoder of the kind {settings.get('model_type')}, where CLIP's is needed")
    try:
        with torch.device("meta"):
            if part == "text_encoder":
                return CLIPTextModel(CLIPTextConfig.from_dict(settings))
            return (UNet2DConditionModel if part == "unet" else AutoencoderKL).from_config(settings)
    except Exception as error:  # senseless settings can raise nearly anything, and all of it means this one thing
        raise refusal(config, f"no network can be built from these settings: {error}") from error


def _weights(part: str, source: Source, network: nn.Module) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a part in today's diffusers names, and the file or folder they come from."""
    if source.single_file:
        return _weights_of_file(part, source, network), source.path
    folder = source.path / part
    tensors = _weights_of_folder(folder, STEMS[part])
    if part == "vae":
        tensors = {_renamed(name, OLD_ATTENTION): tensor for name, tensor in tensors.items()}
    return tensors, folder


def _weights_of_folder(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of one network: from one .safetensors file, from several with an index, or from a pickle."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return checkpoint.read_tensors(checkpoint.read_header(folder / name))
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        places = configs.read(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise refusal(index, "this index does not say which file holds which tensor")
        tensors: dict[str, Tensor] = {}
        for name in sorted(set(places.values())):
            tensors |= checkpoint.read_tensors(checkpoint.read_header(folder / Path(name).name))
        return tensors
    pickle = folder / ("pytorch_model.bin" if stem == "model" else f"{stem}.bin")
    if pickle.is_file():
        return checkpoint.read_pickle(pickle)
    raise FileNotFoundError(f"{folder}: {stem}.safetensors is missing")


def _weights_of_file(part: str, source: Source, network: nn.Module) -> dict[str, Tensor]:
    header = checkpoint.read_header(source.path)
    beginnings = {"unet": (LDM_UNET,), "vae": (LDM_VAE,), "text_encoder": (LDM_CLIP, LDM_OPEN_CLIP)}[part]
    tensors = checkpoint.read_tensors(header, [name for name in header.places if name.startswith(beginnings)])
    if not tensors:
        raise refusal(source.path, f"this checkpoint holds no {part.replace('_', ' ')}")
    settings = configs.read(source.settings / part / "config.json")
    if part == "unet":
        return _convert_unet(tensors, settings)
    if part == "vae":
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        return convert_ldm_vae_checkpoint(tensors, settings)
    if any(name.startswith(LDM_OPEN_CLIP) for name in tensors):
        return _convert_open_clip(tensors, network.config.num_hidden_layers)
    return {name.removeprefix(LDM_CLIP): tensor for name, tensor in tensors.items()}


def _convert_unet(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return convert_ldm_unet_checkpoint(tensors, settings)


def _convert_open_clip(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """OpenCLIP's text encoder in CLIP's names.

    Stable Diffusion 2 reads the output of the last layer but one, so the last layer is in the file and not wanted.
    """
    converted = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(LDM_OPEN_CLIP)
        if name in OPEN_CLIP_TOP:
            converted[OPEN_CLIP_TOP[name]] = tensor
        if not name.startswith("transformer.resblocks."):
            continue
        number, _, inner = name.removeprefix("transformer.resblocks.").partition(".")
        if not number.isdigit() or int(number) >= layers:
            continue
        layer = f"encoder.layers.{number}."
        if inner.startswith("attn.in_proj_"):
            kind = inner.removeprefix("attn.in_proj_")
            for which, share in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{layer}self_attn.{which}_proj.{kind}"] = share
        else:
            converted[layer + _renamed(inner, OPEN_CLIP_LAYER)] = tensor
    return converted


def _renamed(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def fill(network: nn.Module, tensors: dict[str, Tensor], where: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Give a network built on the meta device its weights.

    Raises:
        ValueError: a tensor is missing, has another shape, or there is one too many; one line.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    # transformers 5.6 dropped the "text_model." of its CLIP text encoder; files have it or not.
    prefix = "text_model."
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    bare.pop("embeddings.position_ids", None)  # a constant that older files store
    names = {name.removeprefix(prefix): name for name in shapes}
    _refuse_names(where, "is missing", names.keys() - bare.keys())
    _refuse_names(where, "has no place in the network of these settings", bare.keys() - names.keys())
    wrong = [name for name, full in names.items() if tuple(bare[name].shape) != shapes[full]]
    _refuse_names(where, "has another shape than the settings say", wrong)
    network.load_state_dict({full: bare.pop(name).to(device, dtype) for name, full in names.items()}, assign=True)
    for name, buffer in list(network.named_buffers()):
        if buffer.is_meta:  # no file stores CLIP's position_ids, and on the meta device they have no values
            parent, _, attribute = name.rpartition(".")
            values = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
            network.get_submodule(parent).register_buffer(attribute, values, persistent=False)
    return network.eval().requires_grad_(False)


def _refuse_names(where: Path, what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise refusal(where, f"these weights do not fit: {names[0]} {what}{more}")


def _check_parts(path: Path, networks: dict[str, nn.Module]) -> None:
    """Whether the parts fit together and are what the pipeline knows how to call."""
    unet, vae, text_encoder = (networks[part].config for part in PARTS)
    if unet.in_channels != 4 or unet.out_channels != 4:
        raise refusal(path, f"a U-Net with {unet.in_channels} input channels (inpainting or the like) is not supported")
    if vae.latent_channels != 4 or 2 ** (len(vae.block_out_channels) - 1) != FACTOR:
        raise refusal(path, "an autoencoder of 4 channels that shrinks eightfold is needed")
    size = unet.sample_size if isinstance(unet.sample_size, (list, tuple)) else [unet.sample_size] * 2
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise refusal(path, f"the U-Net's settings name no native size: sample_size is {unet.sample_size}")
    if not isinstance(vae.scaling_factor, (int, float)) or not vae.scaling_factor > 0:
        raise refusal(path, f"the autoencoder's settings need a scaling_factor above 0, not {vae.scaling_factor}")
    if unet.cross_attention_dim != text_encoder.hidden_size:
        widths = f"{text_encoder.hidden_size} and {unet.cross_attention_dim}"
        raise refusal(path, f"text encoder and U-Net do not belong together: widths {widths}")


def _load_tokenizer(folder: Path) -> tuple[CLIPTokenizer, int]:
    """The tokenizer of a folder, or the shipped one with that folder's settings; and the token that pads.

    The padding token is not given to the tokenizer: Stable Diffusion 2.1 pads with "!", which must stay an ordinary
    word in a prompt.
    """
    from transformers import CLIPTokenizer

    settings = folder / "tokenizer_config.json"
    pad = configs.read(settings).get("pad_token") if settings.is_file() else None
    if isinstance(pad, dict):  # tokens with their spacing rules, as older files write them
        pad = pad.get("content")
    if not isinstance(pad or "", str):
        raise refusal(settings, f"pad_token must be a word, not {pad}")
    own = any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    place = folder if own else configs.TOKENIZER
    end = "<|endoftext|>"
    try:
        tokenizer = CLIPTokenizer.from_pretrained(place, pad_token=end, model_max_length=TOKENS, local_files_only=True)
    except Exception as error:  # of a damaged vocabulary, too, nearly anything can come
        raise refusal(place, f"this is no CLIP tokenizer: {error}") from error
    return tokenizer, tokenizer.convert_tokens_to_ids(pad or end)


def _prediction_type(source: Source) -> str:
    path = source.settings / "scheduler" / "scheduler_config.json"
    kind = configs.read(path).get("prediction_type", "epsilon") if path.is_file() else "epsilon"
    return kind if kind == "v_prediction" else "epsilon"


def _merged_one_step(source: Source) -> OneStep | None:
    """What the file with the U-Net's weights says of itself, in the words of an adapter file."""
    path = source.path if source.single_file else network_files(source.path)[0]
    if path.suffix.lower() in checkpoint.PICKLE_ENDINGS:  # which say nothing of themselves
        return None
    try:
        return Metadata.from_strings(checkpoint.read_header(path).metadata).one_step
    except ValueError as error:
        raise refusal(path, str(error)) from None
