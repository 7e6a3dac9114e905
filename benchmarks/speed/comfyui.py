"""What the nodes cost in ComfyUI: Load LoRaD beside the stock LoRA loader, one-step sampling beside a stock KSampler, start.

    COMFYUI_PATH=/path/to/ComfyUI [COMFYUI_PYTHON=its/python] python benchmarks/speed/comfyui.py
    ... python benchmarks/speed/comfyui.py --size small --repeats 2        a look at whether it works

At SD1.5's size: 5 GB on the disk, 8 GB of memory. Weights are random: nothing here depends on what they are. LoRaD and
LoRA have rank 256 on the same layers. ComfyUI runs on the CPU, each measurement in a process of its own, so that its peak
memory is its own too; rounds go through all of them in turn, so that a busy minute hits all alike. Writes
``comfyui.json`` and ``comfyui.md``.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from benchmarks.speed import repeats
from benchmarks.speed.adapters import network_of, random_lorad
from benchmarks.speed.repeats import Target
from wadi_core import __version__
from wadi_core.lorad.checkpoint import read_header, read_tensors, write_safetensors
from wadi_core.lorad.layers import adapter_key, linear_shapes, student_layers
from wadi_core.lorad.weights import write_stream
from wadi_core.output import take_any_text

logger = logging.getLogger("benchmark")

ROOT = Path(__file__).resolve().parents[2]
PACK = "custom_nodes_wadi"
RANKS = {"sd15": 256, "small": 8}
SAMPLINGS = {"sd15": 20, "small": 4}  # of each kind in a process; the first of each warms up and is left out
PIXELS = {"sd15": 256, "small": 64}
PATCH, SAMPLE = "Load LoRaD against Load LoRA, time to patch", "One-Step Sampler against KSampler with one step, time"
TARGETS = (
    Target(PATCH, ("lorad", "seconds"), ("lora", "seconds"), 1.3),
    Target(f"{PATCH} (of the processor)", ("lorad", "cpu_seconds"), ("lora", "cpu_seconds"), 1.3),
    Target("Load LoRaD against Load LoRA, peak memory", ("lorad", "peak_bytes"), ("lora", "peak_bytes"), 1.1),
    Target(SAMPLE, ("sample", "seconds"), ("sample", "stock_seconds"), 1.02),
    Target(f"{SAMPLE} (of the processor)", ("sample", "cpu_seconds"), ("sample", "stock_cpu_seconds"), 1.02),
    Target("what the pack adds to ComfyUI's start, against 0.3 s", ("start", "seconds"), ("limits", "start"), 1.0),
)
LIMITS = {"limits": {"start": 0.3}}
# ComfyUI knows Stable Diffusion 1.5 by its widths 320 and 768, and counts the rest.
SMALL = {
    "block_out_channels": [320, 320],
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SMALL_SHAPE = {
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 1],
    "transformer_depth": [1, 0],
    "transformer_depth_output": [1, 1, 0, 0],
    "transformer_depth_middle": 1,
}


class Clock:
    """Time since it was made, on the wall and of the processor: others on the machine slow the former only."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def read(self, prefix: str = "") -> dict[str, float]:
        wall, processor = time.perf_counter() - self.wall, time.process_time() - self.processor
        return {f"{prefix}seconds": wall, f"{prefix}cpu_seconds": processor}


class Files:
    """The files of a run: the network in float16, a LoRaD and a LoRA for it."""

    def __init__(self, folder: Path) -> None:
        self.base, self.lorad, self.lora = (folder / f"{name}.safetensors" for name in ("base", "lorad", "lora"))


def prepare(files: Files, size: str) -> None:
    """Write network and adapters, unless they are there from an earlier run."""
    if files.lora.exists():
        return
    network = network_of("sd15") if size == "sd15" else _small_network()
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> Callable[[], Tensor]:
        return lambda: (torch.randn(shape, generator=generator) * 0.03).half()

    state = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    write_stream(files.base, [(name, torch.float16, shape, drawn(shape)) for name, shape in state.items()])
    rank = RANKS[size]
    random_lorad(network, rank).save(files.lorad)
    lora: dict[str, Tensor] = {}
    shapes = linear_shapes(network)
    for path in student_layers(network):
        key = adapter_key(path, "sd15")
        lora[f"{key}.lora_down.weight"] = (torch.randn(rank, shapes[path][1], generator=generator) * 0.02).half()
        lora[f"{key}.lora_up.weight"] = (torch.randn(shapes[path][0], rank, generator=generator) * 0.02).half()
        lora[f"{key}.alpha"] = torch.tensor(float(rank))
    write_safetensors(files.lora, lora)


def _small_network() -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, **SMALL)


# In ComfyUI's Python


def host(path: str) -> None:
    """Make ComfyUI's modules importable, set up for the CPU, and import what its server imports before packs."""
    sys.path.insert(0, path)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import latent_preview  # noqa: F401
    import nodes  # noqa: F401
    from comfy_api.latest import ComfyExtension  # noqa: F401


def load_pack() -> list[Any]:
    """The pack's nodes, loaded as ComfyUI loads them."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)

    async def load() -> list[Any]:
        return await (await module.comfy_entrypoint()).get_node_list()

    found = asyncio.run(load())
    for node in found:
        node.GET_SCHEMA()
    return found


def load_model(files: Files, size: str) -> Any:
    """The network as a MODEL; in diffusers' names ComfyUI recognises it at its full size only."""
    import comfy.sd
    import comfy.utils

    if size == "sd15":
        return comfy.sd.load_diffusion_model(str(files.base))
    names = comfy.utils.unet_to_diffusers(SMALL_SHAPE)
    return comfy.sd.load_diffusion_model_state_dict({names[name]: t for name, t in tensors(files.base).items()})


def tensors(path: Path) -> dict[str, Tensor]:
    return read_tensors(read_header(path))


def measure_start(files: Files, size: str) -> dict[str, float]:
    """From nothing of the pack imported to its nodes declared."""
    clock = Clock()
    load_pack()
    return clock.read()


def measure_lora(files: Files, size: str) -> dict[str, float]:
    """The stock loader's LoRA: patched into a network that is loaded already."""
    import comfy.sd

    return _patched(files, size, lambda model: comfy.sd.load_lora_for_models(model, None, tensors(files.lora), 1.0, 0.0)[0])


def measure_lorad(files: Files, size: str) -> dict[str, float]:
    """The same with a LoRaD by Load LoRaD; its file is checked against its checksum as well."""
    load_pack()
    loaders = importlib.import_module(f"{PACK}.comfy_nodes.loaders")
    return _patched(files, size, lambda model: loaders.put_on(model, loaders.LoRaD.load(files.lorad), 1.0, True).args[0])


def _patched(files: Files, size: str, put_on: Callable[[Any], Any]) -> dict[str, float]:
    import comfy.model_management

    model = load_model(files, size)
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    clock = Clock()
    patched = put_on(model)
    reading = clock.read("file_")
    clock = Clock()
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    return {**clock.read(), **reading, "peak_bytes": repeats.peak_memory()}


def measure_sample(files: Files, size: str) -> dict[str, float]:
    """One-Step Sampler and KSampler (euler, one step, cfg 1) on the same network in turn: medians, least and most."""
    import nodes

    load_pack()
    sampling = importlib.import_module(f"{PACK}.comfy_nodes.sampling")
    schedule = importlib.import_module(f"{PACK}.wadi_core.schedule")
    model = sampling.with_one_step(load_model(files, size), schedule.OneStep())
    positive = [[torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(1)), {}]]
    side = PIXELS[size]

    def ours() -> Any:
        return sampling.OneStepSampler.execute(model, positive, side, side, 1, 7)

    def stock() -> Any:
        empty = {"samples": torch.zeros(1, 4, side // 8, side // 8)}
        return nodes.common_ksampler(model, 7, 1, 1.0, "euler", "normal", positive, positive, empty)

    found: dict[str, list[dict[str, float]]] = {"": [], "stock_": []}
    with torch.inference_mode():
        for turn in range(SAMPLINGS[size] + 1):
            pair = [("", ours), ("stock_", stock)]
            for name, sample in pair if turn % 2 else reversed(pair):
                clock = Clock()
                sample()
                if turn:
                    found[name].append(clock.read(name))
    medians: dict[str, float] = {}
    for name, times in found.items():
        for what in times[0]:
            medians[what] = statistics.median(one[what] for one in times)
        walls = [one[f"{name}seconds"] for one in times]
        medians |= {f"{name}least": min(walls), f"{name}most": max(walls)}
    return medians


MEASURES = {"lora": measure_lora, "lorad": measure_lorad, "sample": measure_sample, "start": measure_start}


# The run


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        f"ComfyUI {report['comfyui']}, {report['size']}, rank {report['rank']}, medians of {report['repeats']} rounds; "
        f"{repeats.place(report['machine'])}.",
        "",
        "| | |",
        "|---|---|",
    ]
    for name, values in report["medians"].items():
        said = [f"{what} {value:.3g}" for what, value in values.items() if what != "peak_bytes"]
        said += [f"peak memory {values['peak_bytes'] / 1e9:.2f} GB"] if "peak_bytes" in values else []
        lines.append(f"| {name} | {', '.join(said)} |")
    return "\n".join([*lines, "", *repeats.ratio_table(report["ratios"])]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    take_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="ComfyUI's folder (default: $COMFYUI_PATH)")
    add("--python", default=os.environ.get("COMFYUI_PYTHON", sys.executable), help="its Python (default: $COMFYUI_PYTHON)")
    add("--size", choices=tuple(RANKS), default="sd15")
    add("--repeats", type=int, default=3)
    add("--only", nargs="+", choices=tuple(MEASURES), default=list(MEASURES), help="measure only these")
    add("--work", type=Path, default=Path("runs/comfyui"), help="where networks and results are written")
    add("--measure", choices=tuple(MEASURES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.comfyui is None:
        parser.error("where is ComfyUI? Set COMFYUI_PATH or --comfyui")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    files = Files(options.work / options.size)
    if options.measure:
        repeats.use_all_cores()
        host(str(options.comfyui))
        repeats.tell(MEASURES[options.measure](files, options.size))
        return 0
    files.base.parent.mkdir(parents=True, exist_ok=True)
    prepare(files, options.size)
    command = [options.python, __file__, "--size", options.size, "--work", str(options.work.resolve())]
    command += ["--comfyui", str(options.comfyui), "--measure"]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for turn in range(options.repeats):
        for name in options.only:
            if name == "sample" and turn:  # which is made of twenty samplings of each kind
                continue
            rounds[name].append(repeats.run_apart(name, [*command, name], options.comfyui))
            logger.info("round %d: %-8s %s", turn + 1, name, rounds[name][-1])
    asked = [options.python, "-c", "import torch; print(torch.__version__)"]
    torch_of_host = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    version = (options.comfyui / "comfyui_version.py").read_text(encoding="utf-8").rpartition('"')[0].rpartition('"')[2]
    report = {
        "version": __version__,
        "comfyui": version,
        "size": options.size,
        "rank": RANKS[options.size],
        "repeats": options.repeats,
        "machine": {**repeats.this_machine(), "torch": torch_of_host},
        **repeats.summary(rounds, TARGETS, limits=LIMITS),
        "rounds": rounds,
    }
    repeats.write(options.work, "comfyui", report, as_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
