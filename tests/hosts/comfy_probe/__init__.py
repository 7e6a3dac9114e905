"""A node pack for the tests alone: conditioning out of a file, calls of the network counted, weights as they are in use."""

from __future__ import annotations

import json
import os

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import safetensors.torch
import torch
from comfy_api.latest import ComfyExtension, io

_counters: dict[int, object] = {}


def _output(name: str) -> str:
    return os.path.join(folder_paths.get_output_directory(), os.path.basename(name))


class Conditioning(io.ComfyNode):
    """A prompt's embedding out of a file in the input folder, in place of a text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema("Probe_Conditioning", inputs=[io.String.Input("name")], outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        path = os.path.join(folder_paths.get_input_directory(), os.path.basename(name))
        return io.NodeOutput([[safetensors.torch.load_file(path)["conditioning"], {}]])


class Count(io.ComfyNode):
    """Every call of the network: timesteps, shape, kept in a file of the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Model.Input("model"), io.String.Input("name")]
        return io.Schema("Probe_Count", inputs=inputs, outputs=[io.Model.Output()], not_idempotent=True)

    @classmethod
    def fingerprint_inputs(cls, **kwargs: object) -> float:
        return float("nan")

    @classmethod
    def execute(cls, model: object, name: str) -> io.NodeOutput:
        network, calls = model.model.diffusion_model, []
        if id(network) in _counters:
            _counters[id(network)].remove()

        def note(_: object, args: tuple, kwargs: dict) -> None:
            x, t = args[0], args[1] if len(args) > 1 else kwargs["timesteps"]
            calls.append({"timesteps": [float(one) for one in t.flatten()], "shape": list(x.shape)})
            with open(_output(name), "w") as file:
                json.dump(calls, file)

        _counters[id(network)] = network.register_forward_pre_hook(note, with_kwargs=True)
        with open(_output(name), "w") as file:
            json.dump(calls, file)
        return io.NodeOutput(model)


class DumpWeights(io.ComfyNode):
    """The weights of a MODEL as it computes with them, kept in a file of the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Model.Input("model"), io.String.Input("name")]
        return io.Schema("Probe_DumpWeights", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def fingerprint_inputs(cls, **kwargs: object) -> float:
        return float("nan")

    @classmethod
    def execute(cls, model: object, name: str) -> io.NodeOutput:
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        weights = {}
        for key, _ in model.model.diffusion_model.named_parameters(prefix="diffusion_model"):
            weight, _, convert = comfy.model_patcher.get_key_weight(model.model, key)
            weight = weight.detach() if convert is None else convert(weight.detach().to(torch.float32, copy=True))
            weights[key] = weight.to("cpu", copy=True).contiguous()
        safetensors.torch.save_file(weights, _output(name))
        return io.NodeOutput()


class DumpImage(io.ComfyNode):
    """Pictures as numbers, kept in a file of the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Image.Input("image"), io.String.Input("name")]
        return io.Schema("Probe_DumpImage", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, image: torch.Tensor, name: str) -> io.NodeOutput:
        safetensors.torch.save_file({"image": image.contiguous()}, _output(name))
        return io.NodeOutput()


class DumpLatent(io.ComfyNode):
    """Latents, kept in a file of the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Latent.Input("latent"), io.String.Input("name")]
        return io.Schema("Probe_DumpLatent", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, latent: dict, name: str) -> io.NodeOutput:
        safetensors.torch.save_file({"samples": latent["samples"].contiguous()}, _output(name))
        return io.NodeOutput()


class Probe(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [Conditioning, Count, DumpWeights, DumpImage, DumpLatent]


async def comfy_entrypoint() -> ComfyExtension:
    return Probe()
