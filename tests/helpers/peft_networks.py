"""Small networks with LoRaD as adapters of peft."""

from __future__ import annotations

from typing import Any

import lorad_networks
import torch
from peft import get_peft_model
from torch import Tensor, nn

from wadi_core.peft import LoRaDConfig, LoRaDLinear


def small_unet(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return lorad_networks.unet(lorad_networks.SMALL)


def inputs(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor(5), torch.randn(2, 7, 24, generator=generator)


def drawn(network: Any) -> Tensor:
    with torch.no_grad():
        return network(*inputs()).sample


def layers(network: nn.Module) -> list[LoRaDLinear]:
    return [layer for layer in network.modules() if isinstance(layer, LoRaDLinear)]


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)


def random_config(**settings: Any) -> LoRaDConfig:
    return LoRaDConfig(**{"r": 2, "target_modules": ["0", "2"], "init_weights": False, **settings})


def two_adapters(dtype: torch.dtype = torch.float32) -> Any:
    model = get_peft_model(mlp(dtype=dtype), random_config(), adapter_name="one")
    model.add_adapter("two", random_config(r=3, target_modules=["2"]))
    return model


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
