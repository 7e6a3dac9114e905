"""PixArt-alpha with random weights as a diffusers folder, small or with its transformer at full size."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from wadi_core.lorad.checkpoint import write_safetensors

# The transformer of PixArt-XL-2-256x256.
XL = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152}
XL |= {"caption_channels": 4096, "sample_size": 32}
SMALL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 24, "cross_attention_dim": 48}
SMALL |= {"caption_channels": 24, "sample_size": 32}
COMMON = {"in_channels": 4, "out_channels": 8, "patch_size": 2, "norm_type": "ada_norm_single", "interpolation_scale": 1}
COMMON |= {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False, "norm_eps": 1e-6}
PARTS = {
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "red", "apple", "boat", "on", "the", "sea"]


def write_pixart(folder: Path, full_size: bool = False, **changes: object) -> Path:
    """The folder; ``changes`` are to the transformer's settings."""
    from diffusers import AutoencoderKL, PixArtTransformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    settings = {**COMMON, **(XL if full_size else SMALL), **changes}
    transformer = PixArtTransformer2DModel(**settings)
    with torch.no_grad():  # a fresh one predicts nearly nothing
        for parameter in transformer.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 64), layers_per_block=1, latent_channels=4, sample_size=256,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(WORDS), d_model=settings["caption_channels"], d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "tokenizer")
    vae.save_pretrained(folder / "vae")
    encoder.save_pretrained(folder / "text_encoder")
    transformer.save_config(folder / "transformer")
    weights = {name: tensor.half() if full_size else tensor for name, tensor in transformer.state_dict().items()}
    write_safetensors(folder / "transformer" / "diffusion_pytorch_model.safetensors", weights, {"format": "pt"})
    schedule = {"_class_name": "DPMSolverMultistepScheduler", "beta_start": 0.0001, "beta_end": 0.02}
    schedule |= {"beta_schedule": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon"}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline", **PARTS}))
    return folder
