"""What adapter files look like: the names of their tensors, and how other files are told apart from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .layers import SUPPORTED, UNET_BLOCKS, adapter_key, unet_architecture

# Ending of a tensor's name -> 0 for theta_a, 1 for theta_b.
LORAD_ENDINGS = {".lorad_a": 0, ".lorad_b": 1}
AUTHORS_ENDINGS = {".theta_a": 0, ".theta_b": 1}

_AUTHORS_PREFIXES = ("module.", "unet.", "transformer.")
LORA_MARKS = ("lora_up", "lora_down", "lora_A", "lora_B", "lora.up", "lora.down", "lora_linear_layer")
_OTHER_ADAPTER_MARKS = ("hada_w", "lokr_w", "oft_blocks", "oft_diag", "dora_scale", "ia3_", "glora", "boft_")
_BESIDES = (".diff", ".diff_b")
_NETWORK_PREFIXES = ("model.diffusion_model.", "unet.", "transformer.", "module.")
_NETWORK_BLOCKS = ("down_blocks.", "transformer_blocks.", "input_blocks.", "blocks.")


def classify(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The endings of the two factors' names in a file of these tensors.

    Raises:
        ValueError: it is no LoRaD; the message says what it is, where that is known.
    """
    if any(name.endswith(tuple(LORAD_ENDINGS)) and _is_of_peft(name) for name in shapes):
        raise ValueError(
            "this is a LoRaD in peft's form: turn the folder that it lies in into a LoRaD file with "
            "wadi_core.peft.from_peft(FOLDER).save(FILE)"
        )
    for endings in (LORAD_ENDINGS, AUTHORS_ENDINGS):
        if any(name.endswith(tuple(endings)) for name in shapes):
            return endings
    if any(mark in name for name in shapes for mark in LORA_MARKS):
        raise ValueError("this is an ordinary LoRA, not a LoRaD: use it with what your program has for LoRA")
    if any(mark in name for name in shapes for mark in _OTHER_ADAPTER_MARKS):
        raise ValueError("this is an adapter of another kind (LyCORIS or like it), not a LoRaD")
    if any(_without(_NETWORK_PREFIXES, name).startswith(_NETWORK_BLOCKS) and len(s) == 2 for name, s in shapes.items()):
        raise ValueError(
            "this is a complete network, not an adapter: turn it into one with "
            "'python -m wadi_core extract --base BASE --student THIS_FILE -o OUT'"
        )
    raise ValueError("there is no LoRaD in this file: no tensor is named *.lorad_a or *.lorad_b")


def _is_of_peft(name: str) -> bool:
    """Whether peft or diffusers' save_lora_adapter wrote a tensor: with the module's path, and not as a key of a LoRaD.

    ComfyUI's own training writes paths too, below the name that it has for the network.
    """
    return not name.startswith(("transformer.", "diffusion_model.")) and name.count(".") > 1


def pairs_of_names(names: Iterable[str], endings: Mapping[str, int]) -> dict[str, tuple[str, str]]:
    """Key of a layer -> the names of its two tensors.

    Raises:
        ValueError: a tensor that is none of a layer's two, or a layer with one of them.
    """
    found: dict[str, dict[int, str]] = {}
    for name in names:
        ending = next((ending for ending in endings if name.endswith(ending)), None)
        if name.endswith(_BESIDES):
            raise ValueError(
                "it changes biases and norms besides, as ComfyUI's Train LoRA does: use ComfyUI's Load LoRA for it"
            )
        if ending is None or name == ending:
            raise ValueError(f"{name[:80]!r} is no part of a LoRaD: expected names that end in {' or '.join(endings)}")
        found.setdefault(name[: -len(ending)], {})[endings[ending]] = name
    for key, pair in found.items():
        if len(pair) < 2:
            raise ValueError(f"the layer {key[:80]!r} has only one of its two tensors")
    return {key: (pair[0], pair[1]) for key, pair in found.items()}


def architecture_of(names: Mapping[str, tuple[str, str]], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The architecture that an adapter's keys and shapes speak of."""
    if all(key.startswith("transformer.") for key in names):
        return "pixart-alpha"
    if any(len(shapes[name]) != 2 for pair in names.values() for name in pair):
        raise ValueError("a LoRaD has tensors of two dimensions only")
    layers = {key: (shapes[a][0], 2 * shapes[b][1]) for key, (a, b) in names.items()}
    return unet_architecture(layers) or "unet-custom"


def architecture_of_paths(names: Mapping[str, tuple[str, str]], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The architecture that the layers of an adapter speak of, by path of a layer -> the names of its two tensors.

    Raises:
        ValueError: no layers of a network that LoRaD is made for; one line.
    """
    if any(path.startswith("transformer_blocks.") for path in names):
        return "pixart-alpha"
    if not any(path.startswith(UNET_BLOCKS) for path in names):
        raise ValueError(f"{next(iter(names), 'nothing')[:80]!r} is no layer of a network that LoRaD knows: {SUPPORTED}")
    return architecture_of({adapter_key(path, "unet-custom"): pair for path, pair in names.items()}, shapes)


def layer_path(name: str) -> str:
    """A tensor's name in the authors' factors without what their wrappers put before it."""
    return _without(_AUTHORS_PREFIXES, name)


def _without(prefixes: tuple[str, ...], name: str) -> str:
    while (prefix := next((p for p in prefixes if name.startswith(p)), None)) is not None:
        name = name.removeprefix(prefix)
    return name
