"""What a run will need, before anything is loaded: parameters, memory and steps, from the settings of its networks.

The activations are not guessed: the network runs once on the meta device, where tensors have shapes and no numbers,
and what autograd keeps for backward is counted. What a GPU's allocator and libraries add is not in it, nor is the
difference between kernels, so the sum is an estimate.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wadi_core import base as bases
from wadi_core import configs, hub
from wadi_core.lorad.layers import detect_architecture, fake_score_layers, linear_shapes, student_layers
from wadi_core.lorad.linear import attach, rotated_layers
from wadi_core.pipeline import find_device
from wadi_core.thirdparty import DiffusersNetwork

from ..engine.logs import step_seconds
from ..models.adapters import oft_parameters
from ..models.base_models import (
    LATENT_CHANNELS,
    T5_TOKENS,
    call_pixart,
    call_unet,
    is_pixart,
    local_base,
    shape_folder,
)
from ..models.condition import Condition
from ..models.placement import set_attention
from ..settings.distillation import TrainConfig
from ..settings.fields import load
from .hours import hours_of_run
from .resuming import HARMLESS

GB = 1e9
STORED = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "nf4": 0.5625, "fp64": 8.0}  # bytes a number
COMPUTED = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
CUDA = 0.6e9  # bytes: the driver's context and the libraries' workspaces, as a rule of thumb


@dataclass(frozen=True)
class Estimate:
    """The figures of one run, memory in bytes."""

    architecture: str
    network: int
    student: int
    student_layers: int
    fake: int
    fake_layers: int
    frozen_bytes: float
    trained_bytes: float
    kept_bytes: float
    other_bytes: float
    steps: int
    pictures: int
    calls: int
    seconds: float | None
    source: str
    hours: dict[str, float]

    @property
    def total_bytes(self) -> float:
        """Everything together."""
        return self.frozen_bytes + self.trained_bytes + self.kept_bytes + self.other_bytes

    def __str__(self) -> str:
        shared = f"{self.pictures // self.steps} pictures in {self.calls} calls"
        rows = [
            ("base", f"{self.architecture}, {self.network:,} parameters, frozen"),
            ("student", f"{self.student:,} parameters in {self.student_layers} layers"),
            ("fake score", f"{self.fake:,} parameters in {self.fake_layers} layers"),
            ("steps", f"{self.steps:,} of {shared} each: {self.pictures:,} pictures"),
            ("time", self._time()),
            ("memory, estimated", f"{self.total_bytes / GB:.1f} GB on each device"),
            ("  frozen weights", f"{self.frozen_bytes / GB:.2f} GB"),
            ("  trained, with moments", f"{self.trained_bytes / GB:.2f} GB"),
            ("  kept for backward", f"{self.kept_bytes / GB:.2f} GB"),
            ("  everything else", f"{self.other_bytes / GB:.2f} GB"),
        ]
        return "\n".join(f"{name:<26}{text}" for name, text in rows)

    def _time(self) -> str:
        if self.seconds is None:
            known = ", ".join(f"{name} {hours:.3g}" for name, hours in self.hours.items())
            return f"hours on one GPU, calculated to a factor of two: {known} ({self.source})"
        return f"{self.steps * self.seconds / 3600:.3g} hours, {self.seconds:.3g} s a step ({self.source})"


def measured_seconds(config: TrainConfig) -> tuple[float | None, str]:
    """Seconds of a step as a run in the output folder took them, and where that is from; or None, and why."""
    folder = Path(config.output)
    if not (folder / "losses.csv").is_file():
        return None, f"no step was measured yet; a run of some steps in {folder} tells"
    try:
        before, seconds = load(TrainConfig, folder / "config.yaml"), step_seconds(folder)
    except (OSError, ValueError):
        return None, f"the log of the run in {folder} cannot be read"
    now, then = dataclasses.asdict(config), dataclasses.asdict(before)
    changed = [name for name in now if now[name] != then[name] and (name not in HARMLESS or name == "device")]
    if changed:
        return None, f"the run in {folder} had {changed[0]}={then[changed[0]]}, not {now[changed[0]]}"
    if seconds is None:
        return None, f"the run in {folder} has too few steps in its log"
    return seconds, f"measured in {folder}"


def empty_network(config: TrainConfig) -> tuple[DiffusersNetwork, Path]:
    """The network of a base on the meta device, and the folder of its settings; no weight is read.

    Raises:
        OSError, ValueError: there is no such base; one line.
    """
    from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

    if config.base == "mini":
        folder = configs.folder("wadi-mini")
    elif not config.base:
        shape = shape_folder(config.base_config)
        if shape is None:
            raise ValueError(
                "base: name the model to distil, a diffusers folder or a .safetensors checkpoint: base=PATH; for an estimate "
                f"the name of its shape is enough: base_config=NAME, one of {', '.join(configs.SHAPES)}"
            )
        folder = shape
    else:
        base = local_base(config.base, hub.SETTINGS)  # the shapes are enough: no weights are fetched
        folder = Path(base) if is_pixart(base) else bases.find(base, shape_folder(config.base_config)).settings
    kinds: dict[str, Any] = {"transformer": PixArtTransformer2DModel, "unet": UNet2DConditionModel}
    part = "transformer" if is_pixart(folder) else "unet"
    with torch.device("meta"):
        return kinds[part].from_config(configs.read(folder / part / "config.json")), folder


def trained_parameters(network: nn.Module, layers: list[str], kind: str, rank: int) -> int:
    """How many numbers a role trains."""
    if kind == "full":
        return sum(parameter.numel() for parameter in network.parameters())
    shapes = linear_shapes(network)
    counts = {"lorad": lambda out, into: rank * (out + into // 2)}
    counts["lora"] = lambda out, into: rank * (out + into)
    counts["oft"] = lambda out, into: oft_parameters(into, rank)
    counts["dora"] = lambda out, into: rank * (out + into) + out
    return sum(counts[kind](*shapes[path]) for path in layers)


def kept_for_backward(network: DiffusersNetwork, config: TrainConfig, layers: list[str]) -> int:
    """Bytes that autograd keeps of one call of the student, its rotated weights among them."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.bfloat16, "fp64": torch.float64}.get(
        config.student_precision or config.precision, torch.float32
    )
    network = network.to(dtype).requires_grad_(False).train()
    shapes = linear_shapes(network)
    rank = min(config.student_rank, 8)  # factors are counted elsewhere; their rank changes nothing here
    factors = {
        path: (torch.empty(out, rank, device="meta"), torch.empty(rank, into // 2, device="meta"))
        for path, (out, into) in ((path, shapes[path]) for path in layers)
    }
    attach(network, factors, "student", trainable=True)
    for _, layer in rotated_layers(network):
        layer.recompute = config.recompute_rotation
    owned = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
    seen: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in owned:
            seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    count = config.micro_batch or max(1, config.batch // processes)
    side = config.resolution // bases.FACTOR or network.config.sample_size
    x = torch.empty(count, LATENT_CHANNELS, side, side, device="meta", dtype=dtype)
    t = torch.zeros(count, device="meta", dtype=torch.long)
    pixart = hasattr(network, "transformer_blocks")
    tokens, width = (
        (T5_TOKENS, network.config.caption_channels) if pixart else (bases.TOKENS, network.config.cross_attention_dim)
    )
    text = torch.empty(count, tokens, width, device="meta", dtype=dtype)
    mask = torch.empty(count, tokens, device="meta") if pixart else None
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    set_attention(network, config.attention, planned_device(config), side * side)
    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (call_pixart if pixart else call_unet)(network, x, t, Condition(text, mask))
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


class _Attention(torch.autograd.Function):
    """Attention without numbers: its result, and what a fused kernel keeps for backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result


class _FusedAttention(TorchFunctionMode):
    """On the meta device torch takes attention apart into products that no GPU keeps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def planned_device(config: TrainConfig) -> torch.device:
    """Where a run would be: the device of the settings, also one that is not here; without it what is here.

    Raises:
        ValueError: there is no such kind of device; one line.
    """
    try:
        return torch.device(config.device) if config.device else find_device(None)
    except RuntimeError:
        return find_device(config.device)


def estimate(config: TrainConfig) -> Estimate:
    """The figures of a run with these settings.

    Raises:
        OSError, ValueError: there is no such base; one line.
    """
    network, folder = empty_network(config)
    architecture = detect_architecture(network)
    layers = {"student": student_layers(network, architecture), "fake": fake_score_layers(network, architecture)}
    size = sum(parameter.numel() for parameter in network.parameters())
    inside = sum(linear_shapes(network)[path][0] * linear_shapes(network)[path][1] for path in layers["student"])
    computed = COMPUTED[config.precision]
    quantised = config.base_weights in ("fp8", "nf4")
    stored = STORED[config.base_weights]
    frozen = inside * stored + (size - inside) * (computed if quantised else stored)
    student = trained_parameters(network, layers["student"], config.adapter, config.student_rank)
    fake = trained_parameters(network, layers["fake"], config.fake_adapter, config.fake_rank)
    # The parameter, its gradient and two moments; float32, or a byte for each moment. Muon has one.
    each = 4 + 4 + {"adamw8bit": 2, "muon": 4}.get(config.optimizer, 8)
    trained = (student + fake) * each + (student * 4 if config.ema else 0)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    calls = config.batch // (config.micro_batch * processes) if config.micro_batch else 1
    # A rotated copy of the fake score's layers, and guidance's double batch, pass through while the student's is kept.
    passing = inside * computed
    hours = hours_of_run(network, config)
    kept = kept_for_backward(network, config, layers["student"])
    on_cpu = planned_device(config).type == "cpu"
    # On a CPU text encoder and autoencoder have nowhere else to be.
    helpers = helper_parameters(folder) * (4 if on_cpu else computed) if on_cpu or not config.offload else 0
    return Estimate(
        architecture, size, student, len(layers["student"]), fake, len(layers["fake"]), frozen, trained, kept,
        passing + helpers + (0 if on_cpu else CUDA), config.steps, config.steps * config.batch, calls,
        *measured_seconds(config), hours,
    )  # fmt: skip


def helper_parameters(folder: Path) -> int:
    """Parameters of text encoder and autoencoder, which stay on the device unless they are sent off it."""
    from diffusers import AutoencoderKL
    from transformers import AutoConfig, CLIPTextModel, T5EncoderModel

    with torch.device("meta"):
        networks: list[DiffusersNetwork] = [AutoencoderKL.from_config(configs.read(folder / "vae" / "config.json"))]
        if (folder / "text_encoder" / "config.json").is_file():
            settings = AutoConfig.from_pretrained(folder / "text_encoder", local_files_only=True)
            kind: Any = T5EncoderModel if settings.model_type == "t5" else CLIPTextModel
            networks.append(kind(settings))
    return sum(parameter.numel() for network in networks for parameter in network.parameters())
