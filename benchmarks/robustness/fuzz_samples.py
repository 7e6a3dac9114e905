"""The good files that the fuzz damages: small ones of every kind and form, the same on every machine."""

from __future__ import annotations

import functools
import io
import json
import random
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from wadi_core import base, mini, pictures
from wadi_core.lorad import LoRaD, Metadata
from wadi_core.lorad.checkpoint import read_header, write_safetensors
from wadi_core.lorad.metadata import FORMAT
from wadi_core.mini import ldm
from wadi_core.settings import PictureSettings

from .damage import ANY, SAFETENSORS, Damage, json_text
from .damage_files import PICTURES, TEXTS, TORCH

UNET = "model.diffusion_model."
SETTINGS = PictureSettings(
    "a cat", 1, width=512, height=512, alpha_T_squared=0.0047, timestep=999, prediction_type="epsilon", dtype="float32"
)


@dataclass(frozen=True)
class Sample:
    """A good file: its name, its bytes, the ways to damage it, and files that lie beside it."""

    name: str
    content: bytes
    damages: Mapping[str, Damage]
    beside: Mapping[str, bytes] = field(default_factory=dict)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], **options: Any) -> Sample:
    """A .safetensors sample of these tensors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        write_safetensors(path, tensors, metadata)
        return Sample(name, path.read_bytes(), ANY | SAFETENSORS, **options)


def pickled(name: str, table: Any, **options: Any) -> Sample:
    """The same as torch saves it."""
    written = io.BytesIO()
    torch.save(table, written)
    return Sample(name, written.getvalue(), ANY | TORCH, **options)


def pickled_of_old(name: str, tensors: Mapping[str, Tensor], more: Mapping[str, Any], **options: Any) -> Sample:
    """The same in torch's older format, which sorts and names storages by where they lie in memory: so there is one."""
    parts = torch.cat([tensor.flatten() for tensor in tensors.values()]).split([tensor.numel() for tensor in tensors.values()])
    table = {key: part.reshape(tensor.shape) for (key, tensor), part in zip(tensors.items(), parts, strict=True)}
    written = io.BytesIO()
    torch.save({**more, **table}, written, _use_new_zipfile_serialization=False)
    content = re.sub(rb"X.\x00\x00\x00\d{7,20}", b"X\x09\x00\x00\x00123456789", written.getvalue(), flags=re.DOTALL)
    return Sample(name, content, ANY | TORCH, **options)


# Adapters, on networks of a few layers


def network_of(paths: Mapping[str, tuple[int, int]]) -> nn.Module:
    """A network of these linear layers, (out, in) each."""
    network = nn.Module()
    for number, (path, (out_features, in_features)) in enumerate(paths.items()):
        parent = network
        *inner, last = path.split(".")
        for name in inner:
            if name not in dict(parent.named_children()):
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        linear = nn.Linear(in_features, out_features, bias=False)
        linear.weight.data = drawn(out_features, in_features, seed=number).to(linear.weight.device)
        parent.add_module(last, linear)
    return network.requires_grad_(False)


_BLOCK = "attentions.0.transformer_blocks.0"
UNET_LAYERS = {
    "down_blocks.0.resnets.0.time_emb_proj": (6, 8),
    f"down_blocks.0.{_BLOCK}.attn1.to_q": (6, 6),
    f"mid_block.{_BLOCK}.attn2.to_k": (6, 10),
    f"up_blocks.0.{_BLOCK}.attn1.to_v": (6, 6),
}
_PIXART_LAYERS = {"adaln_single.linear": (12, 6), "transformer_blocks.0.attn1.to_q": (6, 6), "proj_out": (4, 6)}


@functools.cache
def networks() -> dict[str, nn.Module]:
    """The networks that adapters are tried on, by architecture."""
    return {"unet": network_of(UNET_LAYERS), "pixart": network_of(_PIXART_LAYERS)}


def _factors(architecture: str) -> LoRaD:
    lorad = LoRaD.create(networks()[architecture], 2, generator=torch.Generator().manual_seed(0))
    for number, (key, (a, b)) in enumerate(lorad.factors.items()):
        lorad.factors[key] = drawn(*a.shape, seed=number) * 0.3, b
    return lorad


def adapters() -> list[Sample]:
    """LoRaDs of both networks in all types, with checksum and without, and the authors' factors in all their forms."""
    made = []
    for architecture in ("unet", "pixart"):
        lorad = _factors(architecture)
        known = Metadata(lorad.metadata.architecture, 0.0047, 999, base_sha256="ab" * 32, title="Ein Test", extra={"note": "ü"})
        tensors = {f"{key}.lorad_{part}": t for key, pair in lorad.factors.items() for part, t in zip("ab", pair, strict=True)}
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "a.safetensors"
                LoRaD(lorad.factors, known).save(path, dtype)
                made.append(Sample("a.safetensors", path.read_bytes(), ANY | SAFETENSORS))
            cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
            made.append(stored("a.safetensors", cast, known.to_strings(2, "a")))
        made.append(stored("a.safetensors", tensors, {"wadi.format": str(FORMAT)}))
    layers = {path: pair for path, pair in zip(UNET_LAYERS, _factors("unet").factors.values(), strict=True)}
    authors = {f"module.{path}.theta_{part}": t for path, pair in layers.items() for part, t in zip("ab", pair, strict=True)}
    made.append(stored("a.safetensors", authors, {}))
    return [*made, pickled("a.pth", authors), pickled_of_old("a.pth", authors, {})]


# Checkpoints: single files of whole networks, and what one network is filled from


@functools.cache
def _mini_names() -> dict[str, tuple[int, ...]]:
    """The names of wadi-mini as one checkpoint has them, with shapes of a few numbers each."""
    settings = {part: base.configs.read(mini.FOLDER / part / "config.json") for part in ldm.PREFIXES}
    weights = {
        part: {name: torch.empty(shape, device="meta") for name, shape in read_header(mini.FOLDER / file).shapes.items()}
        for part, file in mini.WEIGHTS.items()
    }
    weights["text_encoder"] = mini.usual_names(weights["text_encoder"])
    return {name: tuple(tensor.shape) for name, tensor in ldm.checkpoint(weights, settings).items()}


def checkpoints() -> list[Sample]:
    """A U-Net of a few layers as LDM and diffusers name them, whole checkpoints of small tensors, and one network's file."""
    entry = UNET + "input_blocks.0.0.weight"

    def small(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of what an architecture is known by only the widths that count."""
        keep = 2 if name == entry else 1 if "attn2.to_k" in name else 0
        return tuple(side if keep and place in (0, 1)[-keep:] else min(side, 2) for place, side in enumerate(shape))

    whole = {
        name: drawn(*small(name, shape), seed=number).half()
        for number, (name, shape) in enumerate(_mini_names().items())
        if name.startswith(UNET) or number % 40 == 0
    }
    some = {name: tensor for name, tensor in whole.items() if ".1.transformer_blocks.0.attn" in name or "emb_layers" in name}
    some[entry] = whole[entry]
    scaled = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for name, tensor in some.items()}
    scaled |= {f"{name.removesuffix('weight')}weight_scale": torch.ones(1) for name, t in scaled.items() if t.ndim == 2}
    own = {f"{path}.weight": drawn(*shape) for path, shape in UNET_LAYERS.items()}
    pixart = {f"{path}.weight": drawn(*shape) for path, shape in _PIXART_LAYERS.items()}
    one_step = Metadata("wadi-mini", 0.0047, 999).to_strings(2, "a")
    bare = {name.removeprefix(UNET): tensor.float() for name, tensor in some.items()}
    return [
        stored("a.safetensors", some, {"format": "pt"}),
        stored("a.safetensors", some, one_step),
        stored("a.safetensors", scaled, {}),
        stored("a.safetensors", bare, {}),
        stored("a.safetensors", own, one_step),
        stored("a.safetensors", pixart, {}),
        pickled("a.pth", own),
        pickled("a.bin", some),
        stored("a.safetensors", whole, {}),
    ]


def filled_files() -> list[Sample]:
    """A file that one network is filled from."""
    states = {name: tensor for name, tensor in networks()["unet"].state_dict().items()}
    return [stored("a.safetensors", states, {}), stored("a.safetensors", {n: t.half() for n, t in states.items()}, {})]


def settings_files() -> list[Sample]:
    """The JSON files of a folder in diffusers layout, which say what network it is."""
    names = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "tokenizer/tokenizer_config.json")
    return [
        Sample("a.json", (mini.FOLDER / name).read_bytes(), ANY | {"JSON": json_text, "JSON ": json_text}) for name in names
    ]


# Embeddings


def embeddings() -> list[Sample]:
    """Learned words as this project, diffusers and others write them."""
    vectors, width = drawn(2, 8), 8
    own = {"wadi.embedding": "1", "wadi.token": "<a-word>", "wadi.architecture": "sd15", "format": "pt"}
    return [
        stored("kx-word.safetensors", {"<a-word>": vectors}, own),
        stored("kx-word.safetensors", {"<a-word>": vectors}, {}),
        stored("kx-word.safetensors", {"emb_params": vectors.half()}, {"format": "pt"}),
        stored("kx-word.safetensors", {"*": drawn(width).bfloat16()}, {}),
    ]


# Pictures


def picture_samples() -> list[Sample]:
    """Small pictures in every format and mode that people have."""
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 4), np.uint8), "RGBA")
    rgb, grey, palette = colours.convert("RGB"), colours.convert("L"), colours.convert("RGB").quantize(16)
    turned = Image.Exif()
    turned[0x0112] = 6
    settings = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        pictures.save(rgb, Path(folder) / "a.png", SETTINGS)
        settings = (Path(folder) / "a.png").read_bytes()
    frames = [palette, palette.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    made: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("png", colours, {}),
        ("png", rgb, {"exif": turned}),
        ("png", palette, {"transparency": 3}),
        ("png", grey.convert("I;16"), {}),
        ("png", frames[0], {"save_all": True, "append_images": frames[1:]}),
        ("jpg", rgb, {"exif": turned}),
        ("jpg", rgb.convert("CMYK"), {}),
        ("jpg", grey, {"progressive": True}),
        ("webp", colours, {"exif": turned}),
        ("webp", rgb, {"lossless": True}),
        ("gif", frames[0], {"save_all": True, "append_images": frames[1:], "transparency": 0}),
        ("bmp", rgb, {}),
        ("tiff", rgb, {"compression": "tiff_lzw"}),
        ("tiff", grey.convert("F"), {}),
    ]
    samples = [Sample("a.png", settings, ANY | PICTURES)]
    for ending, picture, options in made:
        written = io.BytesIO()
        picture.save(written, {"jpg": "jpeg"}.get(ending, ending), **options)
        samples.append(Sample(f"a.{ending}", written.getvalue(), ANY | PICTURES))
    return samples


def settings_samples() -> list[Sample]:
    """Pictures that say how they were made: the text itself is damaged as well."""
    with tempfile.TemporaryDirectory() as folder:
        pictures.save(Image.new("RGB", (8, 8)), Path(folder) / "a.png", SETTINGS)
        return [Sample("a.png", (Path(folder) / "a.png").read_bytes(), ANY | PICTURES)]


# Prompt files


def prompt_samples() -> list[Sample]:
    """Prompts in every format; a table's columns of several types."""
    import pyarrow
    from pyarrow import parquet

    prompts = ["a cat", 'a dog, "sitting" on a mat', "ein Bär im Wald", "猫", ""]
    records = [{"id": number, "prompt": prompt, "tags": ["x"]} for number, prompt in enumerate(prompts)]
    rows = "".join(f"{number},{json.dumps(prompt, ensure_ascii=False)}\n" for number, prompt in enumerate(prompts[2:]))
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    journey = {"img_path": "a.jpg", "prompt": "a cat --ar 3:2", "Task2": {"Caption": "A cat."}}
    table = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": [1, 2], "prompt": prompts[:2], "n": [[1], None]}), table)
    return [
        Sample("a.txt", "\n".join(prompts).encode(), ANY | TEXTS),
        Sample("a.csv", f"id,prompt\n{rows}".encode(), ANY | TEXTS),
        Sample("a.csv", b"prompt\na cat\n" + b'"a ""big"" dog"\n', ANY | TEXTS),
        Sample("a.tsv", b"prompt\tid\na cat\t1\na dog\t2\n", ANY | TEXTS),
        Sample("a.jsonl", lines, ANY | TEXTS),
        Sample("a.jsonl", b'"a cat"\n"a dog"\n', ANY | TEXTS),
        Sample("a.ndjson", (json.dumps(journey) + "\n").encode() * 2, ANY | TEXTS),
        Sample("a.parquet", table.getvalue(), ANY | TEXTS),
    ]


# Checkpoints of runs


def _run_state(step: int) -> dict[str, Any]:
    version, internal, gauss = random.Random(step).getstate()
    optimizer = {"state": {0: {"step": 3, "exp_avg": drawn(3, 4)}}, "param_groups": [{"lr": 0.1}]}
    return {
        "step": step,
        "settings": {"steps": 100, "name": "a", "lr": 1e-4},
        "student": {"a.weight": drawn(3, 4, seed=step)},
        "updaters": {"student": {"optimizer": optimizer}},
        "random": [{"python": [version, list(internal), gauss], "torch": torch.Generator().manual_seed(step).get_state()}],
        "prompts": {"place": 3},
    }


def run_samples() -> list[Sample]:
    """The newest checkpoint of a run; the one before it is whole."""
    older = pickled("step-00000010.pt", _run_state(10))
    return [pickled("step-00000020.pt", _run_state(20), beside={older.name: older.content})]
