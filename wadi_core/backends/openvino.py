"""OpenVINO: networks converted once from PyTorch, whose weights they share, and compiled for this processor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..files import new_folder
from ..packages import missing
from ..precision import fast_bfloat16
from ..stages import state_of
from ..thirdparty import DiffusersNetwork

MODEL = "openvino_model.xml"
# Its bfloat16 is one for a whole network, so a U-Net that hides its errors stays in float32 unless it must be fast.
FORMATS = {"exact": ("f32", "f32"), "balanced": ("f32", "bf16"), "fast": ("bf16", "bf16")}


class OpenVino:
    """The backend, with what it has converted."""

    def __init__(self) -> None:
        self._openvino = _import()
        self._made: dict[str, _Compiled] = {}

    def unet(self, network: DiffusersNetwork, precision: str) -> Any:
        made = self._get("unet", network, FORMATS[precision][0])

        def call(x: Tensor, t: Tensor | int, encoder_hidden_states: Tensor) -> Any:
            return SimpleNamespace(sample=made(x, torch.tensor([int(t)]), encoder_hidden_states))

        return call

    def decoder(self, network: DiffusersNetwork, precision: str) -> Any:
        made = self._get("decoder", network, FORMATS[precision][1])
        return SimpleNamespace(config=network.config, decode=lambda latents: SimpleNamespace(sample=made(latents)))

    def _get(self, part: str, network: DiffusersNetwork, number: str) -> _Compiled:
        found = self._made.get(part)
        if found is None or found.network is not network:
            found = self._made[part] = _Compiled(self._openvino, network, PARTS[part])
        found.number = number if fast_bfloat16(torch.device("cpu")) else "f32"
        return found


class _Compiled:
    """One network, converted and compiled when it is first called and whenever it has changed."""

    def __init__(self, openvino: Any, network: DiffusersNetwork, part: _Part) -> None:
        self.network, self.number = network, "f32"
        self._openvino, self._part = openvino, part
        self._model: Any = None
        self._compiled: Any = None
        self._places: tuple[Any, ...] = ()
        self._state: tuple[Any, ...] = ()

    def __call__(self, *inputs: Tensor) -> Tensor:
        state = state_of(self.network)
        places = tuple(place for place, *_ in state)
        if places != self._places:  # the weights lie elsewhere now: nothing is shared with them any more
            self._model, self._places = convert(self._openvino, self.network, self._part), places
        if (self.number, state) != self._state:
            options = {"INFERENCE_PRECISION_HINT": self.number, "PERFORMANCE_HINT": "LATENCY"}
            options["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
            self._compiled = self._openvino.Core().compile_model(self._model, "CPU", options)
            self._state = self.number, state
        return torch.from_numpy(self._compiled([one.contiguous().numpy() for one in inputs])[0])


class _Part:
    """How a network is called, for the conversion: names of inputs and outputs, and an example."""

    def __init__(
        self, inputs: tuple[str, ...], output: str, call: Callable[..., Tensor], example: Callable[[Any], tuple[Tensor, ...]]
    ) -> None:
        self.inputs, self.output, self.call, self.example = inputs, output, call, example


class _Called(nn.Module):
    """A network with plain inputs and one plain output."""

    def __init__(self, network: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network = network
        self._call = call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._call(self.network, *inputs)


def _unet_example(network: Any) -> tuple[Tensor, ...]:
    # Of a size that cannot be halved without rest: only then the way up is drawn for any size.
    return torch.zeros(2, 4, 17, 18), torch.tensor([999]), torch.zeros(2, 77, network.config.cross_attention_dim)


PARTS = {
    "unet": _Part(
        ("sample", "timestep", "encoder_hidden_states"),
        "out_sample",
        lambda network, x, t, text: network(x, t, encoder_hidden_states=text, return_dict=False)[0],
        _unet_example,
    ),
    "decoder": _Part(
        ("latent_sample",),
        "sample",
        lambda network, latents: network.decode(latents).sample,
        lambda network: (torch.zeros(2, 4, 16, 16),),
    ),
    "text_encoder": _Part(
        ("input_ids",),
        "last_hidden_state",
        lambda network, ids: network(ids)[0],
        lambda network: (torch.zeros(2, 77, dtype=torch.int64),),
    ),
}
FOLDERS = {"unet": "unet", "decoder": "vae_decoder", "text_encoder": "text_encoder"}


@torch.no_grad()
def convert(openvino: Any, network: DiffusersNetwork, part: _Part) -> Any:
    """A network as OpenVINO's model, for any size and batch. It shares the weights: they can be changed in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, on sizes that it takes for fixed, and which are looked at alone
        model = openvino.convert_model(_Called(network, part.call), example_input=part.example(network))
    for tensor, name in zip(model.inputs, part.inputs, strict=True):
        tensor.get_tensor().set_names({name})
    model.outputs[0].get_tensor().set_names({part.output})
    return model


def export(folder: str | os.PathLike[str], networks: dict[str, DiffusersNetwork], more: Callable[[Any], None]) -> None:
    """Write networks as OpenVINO's files in float16, whole or not at all: ``unet/openvino_model.xml`` and so on.

    Args:
        folder: one that does not exist yet, or an empty one.
        networks: ``unet``, ``decoder`` and ``text_encoder``, in float32.
        more: writes what belongs to them, into a folder.

    Raises:
        OSError: it cannot be written, or there is something of this name; one line.
    """
    openvino = _import()
    with new_folder(folder) as temporary:
        for part, network in networks.items():
            place = temporary / FOLDERS[part]
            place.mkdir(exist_ok=True)
            openvino.save_model(convert(openvino, network, PARTS[part]), place / MODEL, compress_to_fp16=True)
        more(temporary)


def _import() -> Any:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise ValueError(f"the backend openvino: {missing(error, 'openvino')}") from error
    return openvino
