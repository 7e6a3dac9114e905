"""The base of a pipeline: U-Net, autoencoder, text encoder and tokenizer, from a folder or a single file.

Everything is read from the disk: settings come from the folder or from those that ship with this package, weights
are put straight into networks that were built without any, and nothing is ever fetched. A file that is not what it
should be is refused in one line before a network exists.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import configs, mini, single_file
from .answer import answer_to_noise
from .building import SUPPORTED, empty_network, fill
from .files import known_name, one_line, refusal
from .lorad import checkpoint, declared, kinds
from .lorad.folders import STEM, TEXT_STEM, weight_files
from .lorad.layers import detect_architecture
from .lorad.leftovers import wanted
from .lorad.metadata import Metadata
from .lorad.stored import Stored, open_files
from .schedule import OneStep
from .single_file import LDM_CONTEXT, LDM_UNET
from .thirdparty import DiffusersNetwork, Tokenizer

logger = logging.getLogger("wadi")

TOKENS = 77  # of a prompt, with its start and end
FACTOR = 8  # pixels per latent
PARTS = ("unet", "vae", "text_encoder")
STEMS = {"unet": STEM, "vae": STEM, "text_encoder": TEXT_STEM}

# What the autoencoder's attention was called in folders written by diffusers before 0.18.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# The schedule that Stable Diffusion 1 and 2 were trained with ends at this share of signal.
_LAST_ALPHA_SQUARED = 0.0046601


@dataclass
class Base:
    """A latent diffusion model, ready to use.

    Attributes:
        name: how it was asked for, without the folders above it.
        architecture: one of :data:`~.lorad.layers.ARCHITECTURES`.
        unet, vae, text_encoder: diffusers' and transformers' own modules, without gradients.
        tokenizer: CLIP's; ``pad`` is the token that fills up short prompts.
        prediction_type: what the network returns; noise, where neither the base nor its answer says.
        one_step: the schedule, where the file says that it is a one-step network itself.
        prediction_by: how the prediction type is known, to be read after "predicts v_prediction"; empty where it is
            only what is usual.
    """

    name: str
    architecture: str
    unet: DiffusersNetwork
    vae: DiffusersNetwork
    text_encoder: DiffusersNetwork
    tokenizer: Tokenizer
    pad: int
    prediction_type: str
    one_step: OneStep | None
    prediction_by: str = ""

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height in pixels that the network was trained at."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return width * FACTOR, height * FACTOR

    def check_one_step(self, schedule: OneStep | None) -> None:
        """Do nothing if one-step weights of this schedule are for a network that returns what this one does.

        Raises:
            ValueError: they are not, as far as the base says; one line.
        """
        if schedule is not None and self.prediction_by and self.prediction_type != schedule.prediction_type:
            said = f"predicts {self.prediction_type} {self.prediction_by}"
            raise ValueError(f"{self.name} {said}, and the one-step weights are for {schedule.prediction_type}")


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
        why = "a link to a file that is not there" if path.is_symlink() else "there is no such file or folder"
        raise FileNotFoundError(one_line(f"{path}: {why} (nothing is downloaded; a base is {wanted})"))
    if path.suffix.lower() in checkpoint.PICKLE_ENDINGS:
        raise refusal(path, "checkpoints are read as .safetensors only: convert this one first")
    shapes = checkpoint.read_header(path).shapes
    _check_file(path, shapes)
    source = Source(path, Path(config) if config else configs.folder(_architecture_of_file(path, shapes)))
    prediction_type(source)
    single_file.check_names(path, shapes)
    return source


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
    said = prediction_type(source)
    opened = {part: _open(part, source) for part in PARTS}
    networks: dict[str, DiffusersNetwork] = {}
    for part, stored in opened.items():
        network = empty_network(part, source.settings / part / "config.json")
        networks[part] = fill(network, _tensors(part, source, stored, network), Path(stored.source), device, dtype)
    try:
        architecture = detect_architecture(networks["unet"])
    except ValueError as error:
        raise refusal(source.path, str(error)) from None
    _check_parts(source.path, networks)
    tokenizer, pad = _load_tokenizer(source.settings / "tokenizer")
    one_step = _merged_one_step(source, opened["unet"])
    said = said or (one_step.prediction_type if one_step else None)
    loaded = Base(
        name="mini" if str(base) == "mini" else known_name(source.path),
        architecture=architecture,
        tokenizer=tokenizer,
        pad=pad,
        prediction_type=said or "epsilon",
        prediction_by="by its own settings" if said else "",
        one_step=one_step,
        **networks,
    )
    if said is None:
        _ask(loaded)
    return loaded


def unet_shapes(base: str | os.PathLike[str], config: str | os.PathLike[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of a base's U-Net, in diffusers' names; weights are not read.

    Raises:
        OSError, ValueError: as :func:`find`; one line.
    """
    source = find(base, config)
    if source.single_file:
        shapes = checkpoint.read_header(source.path).shapes
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if name.startswith(LDM_UNET)}
        converted = single_file.convert_unet(tensors, configs.read(source.settings / "unet" / "config.json"))
    else:
        converted = empty_network("unet", source.path / "unet" / "config.json").state_dict()
    return {name: tuple(tensor.shape) for name, tensor in converted.items()}


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if index.exists():
        name = str(configs.read(index).get("_class_name"))
        if what := kinds.of_pipeline(name):
            raise refusal(folder, f"this folder is for {name}: {what}; supported are {SUPPORTED}")
    for part in PARTS:
        if not (folder / part / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: this is no Stable Diffusion in diffusers layout: {part}/config.json is missing")
    declared.of_folder(folder)
    _check_schedule(folder)


def _check_schedule(folder: Path) -> None:
    """Raises ValueError if a folder's noise schedule is not the one that one-step networks are made for."""
    if declared.scheduler_settings(folder):
        last = math.sqrt(float(alphas_cumprod(folder)[-1]))
        if abs(last - math.sqrt(_LAST_ALPHA_SQUARED)) > 1e-3:
            wanted = 'Stable Diffusion\'s is "scaled_linear" from 0.00085 to 0.012'
            raise refusal(folder, f"its scheduler's betas end at alpha_T^2 {last**2:.3g}: another schedule; {wanted}")


def alphas_cumprod(folder: Path) -> Tensor:
    """The noise schedule (1000,) in float64, from a folder's scheduler settings.

    Raises:
        OSError, ValueError: they cannot be read, or are none of a diffusion model; one line.
    """
    from diffusers import DDPMScheduler

    declared.of_folder(folder)
    path = folder / "scheduler" / "scheduler_config.json"
    read = configs.read(path)
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    try:
        found = DDPMScheduler(**{name: read[name] for name in names if name in read}).alphas_cumprod
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise refusal(path, f"no noise schedule can be made of these settings: {why}") from error
    if len(found) != 1000:
        raise refusal(path, f"a schedule of 1000 timesteps is needed, not of {len(found)}")
    return found.double()


def _check_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError if a single file is something else than a whole checkpoint of Stable Diffusion 1 or 2."""
    if not any(name.startswith(LDM_UNET) for name in shapes):
        if any(name.endswith((".lorad_a", ".theta_a", ".lora_down.weight", ".lora_A.weight")) for name in shapes):
            raise refusal(path, "this is an adapter, not a base network")
        if any(name.startswith(("down_blocks.", "unet.down_blocks.")) for name in shapes):
            raise refusal(path, "this is a U-Net alone (diffusers layout): a base needs its text encoder and autoencoder too")
        what = kinds.of_names(shapes) or "no checkpoint of Stable Diffusion"
        raise refusal(path, f"this is {what}; supported are {SUPPORTED}")
    if what := kinds.of_names(shapes):
        raise refusal(path, f"this is {what}; supported are {SUPPORTED}")
    entry = shapes.get(LDM_UNET + "input_blocks.0.0.weight", ())
    if entry[1:2] not in ((), (4,)):
        raise refusal(path, f"this is a checkpoint {kinds.of_inputs(entry[1])}; supported are {SUPPORTED}")


def _architecture_of_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    """Which of the shipped settings a single file is for, by the widths of its U-Net."""
    entry = shapes.get(LDM_UNET + "input_blocks.0.0.weight", ())
    context = shapes.get(LDM_CONTEXT, ())
    for architecture, folder in configs.FOLDERS.items():
        settings = configs.read(folder / "unet" / "config.json")
        width, channels = settings["block_out_channels"][0], settings["in_channels"]
        if entry[:2] == (width, channels) and context[1:2] == (settings["cross_attention_dim"],):
            return architecture
    raise refusal(path, f"no settings are known for a U-Net of these widths; supported are {SUPPORTED}")


def _open(part: str, source: Source) -> Stored:
    """What holds the tensors of a part; of a single file that of all parts."""
    if source.single_file:
        return Stored(*open_files([source.path]), source.path)
    folder = source.path / part
    return Stored(*open_files(weight_files(folder, STEMS[part]).files), folder)


def _tensors(part: str, source: Source, stored: Stored, network: DiffusersNetwork) -> dict[str, Tensor]:
    """The tensors of a part in today's diffusers names, as plain numbers."""
    names = wanted(stored.names)
    if source.single_file:
        names = [name for name in names if name.startswith(single_file.BEGINNINGS[part])]
        if not names:
            raise refusal(source.path, f"this checkpoint holds no {part.replace('_', ' ')}")
    tensors = {name: stored.values(name) for name in names}
    if source.single_file:
        settings = network.config.to_dict() if part == "text_encoder" else network.config
        return single_file.in_diffusers_names(part, source.path, tensors, settings)
    if part == "vae":
        tensors = {single_file.renamed(name, OLD_ATTENTION): tensor for name, tensor in tensors.items()}
    return tensors


def _check_parts(path: Path, networks: dict[str, DiffusersNetwork]) -> None:
    """Whether the parts fit together and are what the pipeline knows how to call."""
    unet, vae, text_encoder = (networks[part].config for part in PARTS)
    if unet.in_channels != 4:
        raise refusal(path, f"this is a U-Net {kinds.of_inputs(unet.in_channels)}; supported are {SUPPORTED}")
    if unet.out_channels != 4:
        raise refusal(path, f"this U-Net returns {unet.out_channels} channels, where 4 are needed")
    if vae.in_channels != 3 or vae.out_channels != 3:
        channels = f"{vae.out_channels} channels"
        raise refusal(path, f"this autoencoder makes pictures of {channels} (LDM3D has 6, sound 1), where 3 are needed")
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


def _load_tokenizer(folder: Path) -> tuple[Tokenizer, int]:
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


def prediction_type(source: Source) -> str | None:
    """What the network of a base returns, as the base itself says it; None where it does not.

    Raises:
        OSError, ValueError: something that this package cannot follow; one line.
    """
    if not source.single_file:
        return declared.of_folder(source.settings)
    header = checkpoint.read_header(source.path)
    said, settings = declared.of_file(source.path, header.places, header.metadata), declared.of_folder(source.settings)
    # Settings that stand for many files say only what is usual; another kind has been written there on purpose.
    return said or (settings if settings != "epsilon" else None)


def _ask(base: Base) -> None:
    """Note what a network predicts that does not say it, as far as its answer to noise tells."""
    answer = answer_to_noise(base.unet, base.tokenizer, base.text_encoder)
    if answer is not None:
        base.prediction_type, base.prediction_by = answer, "by its answer to noise"
    if answer == "v_prediction":
        logger.warning("%s: this base predicts %s %s; it does not say so itself", base.name, answer, base.prediction_by)


def _merged_one_step(source: Source, unet: Stored) -> OneStep | None:
    """What the file with the U-Net's weights says of itself, in the words of an adapter file."""
    try:
        return Metadata.from_strings(unet.metadata).one_step
    except ValueError as error:
        raise refusal(unet.files[0] if unet.files else source.path, str(error)) from None
