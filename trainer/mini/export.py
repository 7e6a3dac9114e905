"""Put trained parts where the package keeps wadi-mini, in float16.

python -m trainer.mini.export --vae runs/mini-vae/vae --teacher runs/mini-teacher [--lorad runs/mini/one-step.safetensors]
                              [--controlnet runs/mini-controlnet/controlnet] [--word runs/invert-mini/left-of.safetensors]
                              [--adapter runs/relation-mini/left-of.safetensors]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from wadi_core import configs, mini
from wadi_core.files import atomic_write
from wadi_core.lorad.checkpoint import write_safetensors
from wadi_core.output import take_any_text

from . import scenes

# What training and loading leave in a config and nobody reads.
LEFT_OUT = ("_name_or_path", "_diffusers_version", "transformers_version", "dtype", "torch_dtype")


def words_that_occur() -> set[int]:
    """Token ids that a caption of a scene can hold, with start and end."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(configs.TOKENIZER)
    texts = [*scenes.SINGLE_PHRASES, *scenes.PAIR_PHRASES, *scenes.ABOVE_PHRASES, *scenes.COLOURS]
    texts += [thing.phrase for thing in scenes.things()] + [thing.name for thing in scenes.things()]
    texts += ["a big small one an on the background of picture emoji"]
    return {token for ids in tokenizer(texts).input_ids for token in ids}


def export_part(source: Path, part: str, target: Path) -> None:
    """Copy one network's weights as float16 and its config, without what nobody reads."""
    control = {"controlnet": f"{mini.CONTROL}/diffusion_pytorch_model.safetensors"}
    weights = target / (mini.WEIGHTS | control)[part]
    (stored,) = source.glob("*.safetensors")
    tensors = {name: tensor.half().contiguous() for name, tensor in load_file(stored).items()}
    if part == "text_encoder":
        tensors = mini.usual_names(tensors)
        # Rows of words that never occur were never trained: as zeros they take next to no room in a package.
        (name,) = (name for name in tensors if name.endswith("token_embedding.weight"))
        kept = torch.zeros(len(tensors[name]), 1, dtype=torch.float16)
        kept[sorted(words_that_occur())] = 1
        tensors[name] = tensors[name] * kept
    weights.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(weights, tensors, {"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in sorted(config.items()) if key not in LEFT_OUT and value is not None}
    text = json.dumps(config, indent=2) + "\n"
    with atomic_write(weights.parent / "config.json") as file:
        file.write(text.encode())


def main() -> None:
    take_any_text()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vae", type=Path, help="folder of the autoencoder")
    parser.add_argument("--teacher", type=Path, help="folder with unet/ and text_encoder/")
    parser.add_argument("--lorad", type=Path, help="the one-step LoRaD file")
    parser.add_argument("--controlnet", type=Path, help="folder of the ControlNet")
    parser.add_argument("--word", type=Path, help="file of a learned word")
    parser.add_argument("--adapter", type=Path, help="a LoRaD file that was learned on it: a subject, or beside a word")
    parser.add_argument("--output", type=Path, default=mini.FOLDER)
    arguments = parser.parse_args()
    if arguments.vae:
        export_part(arguments.vae, "vae", arguments.output)
    if arguments.teacher:
        for part in ("unet", "text_encoder"):
            export_part(arguments.teacher / part, part, arguments.output)
    if arguments.controlnet:
        export_part(arguments.controlnet, "controlnet", arguments.output)
    if arguments.lorad:
        shutil.copyfile(arguments.lorad, arguments.output / mini.LORAD)
    for file, folder, prefix in ((arguments.word, mini.EMBEDDINGS, ""), (arguments.adapter, mini.ADAPTERS, "wadi-mini-")):
        if file:
            (arguments.output / folder).mkdir(exist_ok=True)
            shutil.copyfile(file, arguments.output / folder / f"{prefix}{file.name}")


if __name__ == "__main__":
    main()
