"""The pack's nodes for several prompts, files, strengths and parts of pictures in a real ComfyUI, and what nodes warn of."""

from __future__ import annotations

import io
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import comfy_networks
import comfy_slice
import pytest
import torch
from comfy_graph import Graph, Node
from comfy_server import ComfyError, ComfyServer
from comfy_slice import SEED, SIZE, TOLERANCE, calls, conditioning, error, latent_of, one_step, with_lorad
from networks import random_lorad
from PIL import Image
from safetensors.torch import load_file, save_file

from wadi_core import LoRaD, mini
from wadi_core.pipeline import noise

LINES = ("a red apple", "a bicycle", " ".join(["a green tree and a house"] * 30))  # the last is longer than 77 tokens


@pytest.fixture(scope="module")
def network(comfy_base: Path) -> torch.nn.Module:
    """The slice, and a second adapter for it that is no student."""
    made = comfy_slice.prepare(comfy_base)
    random_lorad(made, rank=2, seed=5, one_step=False).save(comfy_base / "models/lorad/personal.safetensors", torch.float32)
    return made


def mini_model(graph: Graph, strength: float = 1.0) -> tuple[Node, Node]:
    base = graph("WaDi_EmbeddedModel")
    turned = graph("WaDi_ApplyLoRaD", model=base[0], lorad=base[3], strength=strength, one_step=True)
    counted = graph("Probe_Count", model=turned[0], name="calls.json")
    return base, counted


def sampled(graph: Graph, model: Node, positive: Any, **more: Any) -> Node:
    settings = {"width": 0, "height": 0, "batch_size": 1, "seed": SEED, **more}
    return graph("WaDi_OneStepSampler", model=model[0], positive=positive, **settings)


def codes(comfy: ComfyServer, graph: Graph, node: Node, latent: Any = None) -> list[str]:
    """The notices of a node; each is among its lines too."""
    graph("Probe_DumpLatent", latent=latent or node[0], name="latent.safetensors")
    said = comfy.run(graph.prompt).ui.get(node.id, {})
    notices = said.get("wadi_notices", [])
    assert all(one["text"] in said["text"] for one in notices)
    return [one["code"] for one in notices]


# Several prompts


def test_a_batch_of_prompts_is_one_call_and_each_picture_is_that_of_its_line(comfy: ComfyServer) -> None:
    graph = Graph()
    base, model = mini_model(graph)
    batch = graph("WaDi_PromptBatch", clip=base[1], text="\n \n".join(LINES))
    together = latent_of(comfy, graph, sampled(graph, model, batch[0], batch_size=batch[1])[0])
    assert [call["shape"] for call in calls(comfy)] == [[3, 4, 16, 16]]
    for index, line in enumerate(LINES):
        graph = Graph()
        base, model = mini_model(graph)
        told = graph("CLIPTextEncode", clip=base[1], text=line)
        alone = latent_of(comfy, graph, sampled(graph, model, told[0], seed=SEED + index)[0])
        assert error(together[index : index + 1], alone) < 1e-3


def test_a_batch_of_prompts_for_the_stock_sampler(comfy: ComfyServer) -> None:
    """The count makes the empty latents fit."""
    graph = Graph()
    base, model = mini_model(graph)
    batch = graph("WaDi_PromptBatch", clip=base[1], text="a red apple\na bicycle")
    empty = graph("EmptyLatentImage", width=128, height=128, batch_size=batch[1])
    names = {"sampler_name": "wadi_one_step", "scheduler": "normal", "steps": 1, "cfg": 1.0, "denoise": 1.0, "seed": SEED}
    links = {"positive": batch[0], "negative": batch[0], "latent_image": empty[0]}
    found = latent_of(comfy, graph, graph("KSampler", model=model[0], **names, **links)[0])
    assert found.shape[0] == 2 and error(found[:1], found[1:]) > 0.1


def test_prompts_without_a_picture_are_told(comfy: ComfyServer) -> None:
    graph = Graph()
    base, model = mini_model(graph)
    batch = graph("WaDi_PromptBatch", clip=base[1], text="a red apple\na bicycle")
    assert codes(comfy, graph, sampled(graph, model, batch[0])) == ["warn_prompts"]
    graph = Graph()
    base, model = mini_model(graph)
    nothing = graph("WaDi_PromptBatch", clip=base[1], text=" \n\n")
    graph("Probe_DumpLatent", latent=sampled(graph, model, nothing[0])[0], name="latent.safetensors")
    with pytest.raises(ComfyError, match="write one a line"):
        comfy.run(graph.prompt)


# Several files


def test_a_stack_is_its_files_one_after_the_other(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    base = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    rows: dict[str, Any] = {"lorad_3": "slice.safetensors", "strength_3": 0.7}  # switched off
    rows |= {"lorad_1": "slice.safetensors", "strength_1": 1.0, "lorad_4": "personal.safetensors", "strength_4": 0.5}
    rows |= {f"on_{row}": row != 3 for row in range(1, 5)} | {"lorad_2": "none", "strength_2": 2.0}
    stack = graph("WaDi_LoRaDStack", model=base[0], one_step=True, **rows)
    graph("Probe_DumpWeights", model=stack[0], name="stack.safetensors")
    said = comfy.run(graph.prompt).ui[stack.id]
    assert [fact["strength"] for fact in said["wadi"]] == [1.0, 0.5] and "wadi_notices" not in said

    graph = Graph()
    model = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    for name, strength in (("slice", 1.0), ("personal", 0.5)):
        settings = {"lorad_name": f"{name}.safetensors", "strength": strength, "one_step": True}
        model = graph("WaDi_LoadLoRaD", model=model[0], **settings)
    graph("Probe_DumpWeights", model=model[0], name="chain.safetensors")
    comfy.run(graph.prompt)
    one, other = (load_file(comfy.base / f"output/{name}.safetensors") for name in ("stack", "chain"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_stack_with_a_file_that_is_not_there_is_refused_at_once(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    base = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    rows = {f"lorad_{row}": "none" for row in range(1, 5)} | {f"strength_{row}": 1.0 for row in range(1, 5)}
    rows |= {f"on_{row}": True for row in range(1, 5)} | {"lorad_2": "../nothing.safetensors"}
    stack = graph("WaDi_LoRaDStack", model=base[0], one_step=True, **rows)
    graph("Probe_DumpWeights", model=stack[0], name="stack.safetensors")
    with pytest.raises(ComfyError, match="no such file in models/lorad"):
        comfy.run(graph.prompt)


# Strengths and seeds


def test_a_grid_has_a_row_for_each_strength_from_one_call(comfy: ComfyServer) -> None:
    graph = Graph()
    base = graph("WaDi_EmbeddedModel")
    counted = graph("Probe_Count", model=base[0], name="calls.json")
    told = graph("CLIPTextEncode", clip=base[1], text="a red apple")
    grid = graph(
        "WaDi_StrengthSeedGrid",
        **{"model": counted[0], "positive": told[0], "vae": base[2], "lorad": base[3]},
        **{"strengths": "0; 0.5, 1", "width": 0, "height": 0, "seeds": 2, "seed": SEED},
    )
    graph("Probe_DumpImage", image=grid[1], name="images.safetensors")
    graph("SaveImage", images=grid[0], filename_prefix="grid")
    shown = comfy.run(graph.prompt).ui
    assert [call["shape"] for call in calls(comfy)] == [[2, 4, 16, 16]] * 3
    images = load_file(comfy.base / "output/images.safetensors")["image"]
    assert images.shape == (6, 128, 128, 3)
    name = next(output["images"][0]["filename"] for output in shown.values() if output.get("images"))
    with Image.open(io.BytesIO(comfy.bytes_of(f"/view?filename={name}&type=output"))) as sheet:
        assert sheet.width > 2 * 128 and sheet.height > 3 * (128 + 12)  # labels under the pictures

    graph = Graph()
    base, model = mini_model(graph)
    told = graph("CLIPTextEncode", clip=base[1], text="a red apple")
    made = sampled(graph, model, told[0], seed=SEED + 1)
    decoded = graph("VAEDecode", samples=made[0], vae=base[2])
    graph("Probe_DumpImage", image=decoded[0], name="alone.safetensors")
    comfy.run(graph.prompt)
    alone = load_file(comfy.base / "output/alone.safetensors")["image"][0]
    assert float((images[5] - alone).abs().max()) < 1e-3
    assert float((images[0] - images[4]).abs().mean()) > 0.02


@pytest.mark.parametrize("strengths", ["", "one", "1, 9", "nan", " ,".join(["1"] * 17)])
def test_strengths_that_are_none_are_told(comfy: ComfyServer, strengths: str) -> None:
    graph = Graph()
    base = graph("WaDi_EmbeddedModel")
    told = graph("CLIPTextEncode", clip=base[1], text="a red apple")
    links = {"model": base[0], "positive": told[0], "vae": base[2], "lorad": base[3]}
    sizes = {"strengths": strengths, "width": 0, "height": 0, "seeds": 1, "seed": 0}
    grid = graph("WaDi_StrengthSeedGrid", **links, **sizes)
    graph("Probe_DumpImage", image=grid[0], name="grid.safetensors")
    with pytest.raises(ComfyError, match="strengths are 1 to 16 numbers from -4 to 4"):
        comfy.run(graph.prompt)


# A part of a picture


def test_a_mask_keeps_the_rest_to_the_bit(comfy: ComfyServer, network: torch.nn.Module) -> None:
    def made(masked: bool) -> tuple[torch.Tensor, torch.Tensor]:
        graph = Graph()
        model, positive = with_lorad(graph)
        first = sampled(graph, model, positive[0], seed=1, width=SIZE, height=SIZE)
        graph("Probe_DumpLatent", latent=first[0], name="kept.safetensors")
        black = graph("SolidMask", value=0.0, width=SIZE, height=SIZE)
        white = graph("SolidMask", value=1.0, width=SIZE // 2, height=SIZE)
        mask = graph("MaskComposite", destination=black[0], source=white[0], x=SIZE // 2, y=0, operation="add")
        if masked:
            more: dict[str, Any] = {"latent": first[0], "mask": mask[0]}
        else:
            noted = graph("SetLatentNoiseMask", samples=first[0], mask=mask[0])
            more = {"latent": noted[0]}
        found = latent_of(comfy, graph, sampled(graph, model, positive[0], batch_size=2, **more)[0])
        return found, load_file(comfy.base / "output/kept.safetensors")["samples"]

    half = SIZE // 16
    found, kept = made(masked=True)
    assert found.shape == (2, 4, SIZE // 8, SIZE // 8)
    assert torch.equal(found[..., :half], kept[..., :half].expand(2, -1, -1, -1))
    assert error(found[:1, :, :, half:], kept[..., half:]) > 0.1 and error(found[:1], found[1:]) > 0.1
    by_latent, _ = made(masked=False)
    assert torch.equal(by_latent, found)


def test_a_mask_of_white_alone_is_a_new_picture(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    model, positive = with_lorad(graph)
    first = sampled(graph, model, positive[0], seed=1, width=SIZE, height=SIZE)
    mask = graph("SolidMask", value=1.0, width=SIZE, height=SIZE)
    found = latent_of(comfy, graph, sampled(graph, model, positive[0], latent=first[0], mask=mask[0])[0])
    lorad = LoRaD.load(comfy.base / "models/lorad/slice.safetensors")
    lorad.apply_to(network)
    expected = one_step(network, noise([SEED], SIZE, SIZE), conditioning(comfy.base), lorad.one_step)
    lorad.remove(network)
    assert error(found, expected / comfy_networks.SD15_VAE_SCALE) < TOLERANCE


def test_what_a_latent_is_for_is_told(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    model, positive = with_lorad(graph)
    first = sampled(graph, model, positive[0], seed=1, width=SIZE, height=SIZE)
    assert "note_latent" in codes(comfy, graph, sampled(graph, model, positive[0], latent=first[0]))
    graph = Graph()
    model, positive = with_lorad(graph)
    mask = graph("SolidMask", value=1.0, width=SIZE, height=SIZE)
    graph("Probe_DumpLatent", latent=sampled(graph, model, positive[0], mask=mask[0])[0], name="latent.safetensors")
    with pytest.raises(ComfyError, match="a mask keeps parts of a latent, and there is none"):
        comfy.run(graph.prompt)


# What would go wrong without a word


@pytest.mark.parametrize(
    ("size", "enlarged", "expected"),
    [
        ((0, 0), False, []),
        ((128, 128), False, []),
        ((512, 512), False, ["warn_size_large"]),
        ((128, 192), False, ["warn_size_large"]),
        ((64, 64), False, ["warn_size"]),
        ((256, 256), True, []),
    ],
)
def test_sizes_that_fall_apart_are_told(comfy: ComfyServer, size: tuple[int, int], enlarged: bool, expected: list[str]) -> None:
    graph = Graph()
    base, model = mini_model(graph)
    if enlarged:
        model = graph("WaDi_HighResolution", model=model[0], method="shrink", native_size=0)
    told = graph("CLIPTextEncode", clip=base[1], text="a red apple")
    made = sampled(graph, model, told[0], width=size[0], height=size[1])
    assert codes(comfy, graph, made) == expected
    shape = load_file(comfy.base / "output/latent.safetensors")["samples"].shape
    assert shape[-1] == (size[0] or 128) // 8


@pytest.mark.parametrize(
    ("strengths", "same", "expected"),
    [
        ((1.0, 1.0), True, ["warn_same_lorad"]),
        ((1.0, 1.0), False, ["warn_second_one_step"]),
        ((0.5, 0.5), False, []),
    ],
)
def test_one_step_files_that_add_up_to_too_much_are_told(
    comfy: ComfyServer, network: torch.nn.Module, strengths: tuple[float, float], same: bool, expected: list[str]
) -> None:
    other = random_lorad(network, seed=9)
    other.save(comfy.base / "models/lorad/other.safetensors", torch.float32)
    copied = comfy.base / "models/lorad/copied.safetensors"
    copied.write_bytes((comfy.base / "models/lorad/slice.safetensors").read_bytes())
    graph = Graph()
    model = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    for name, strength in zip(("slice", "copied" if same else "other"), strengths, strict=True):
        settings = {"lorad_name": f"{name}.safetensors", "strength": strength, "one_step": True}
        model = graph("WaDi_LoadLoRaD", model=model[0], **settings)
    positive = graph("Probe_Conditioning", name="prompt.safetensors")
    made = sampled(graph, model, positive[0], width=SIZE, height=SIZE)
    assert codes(comfy, graph, model, made[0]) == expected


def test_the_stock_loader_brings_one_step_weights_too(comfy: ComfyServer, network: torch.nn.Module) -> None:
    random_lorad(network).save(comfy.base / "models/loras/student.safetensors", torch.float32)
    graph = Graph()
    base = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    model = graph("LoraLoaderModelOnly", model=base[0], lora_name="student.safetensors", strength_model=1.0)
    positive = graph("Probe_Conditioning", name="prompt.safetensors")
    found = codes(comfy, graph, sampled(graph, model, positive[0], width=512, height=512))
    assert found == ["note_schedule"]


def test_the_network_is_counted_and_not_the_file(comfy: ComfyServer, network: torch.nn.Module) -> None:
    whole = random_lorad(network)
    fewer = LoRaD(dict(list(whole.factors.items())[:-4]), whole.metadata)
    fewer.save(comfy.base / "models/lorad/fewer.safetensors")
    graph = Graph()
    model, _ = with_lorad(graph, lorad_name="fewer.safetensors")
    graph("Probe_DumpWeights", model=model[0], name="weights.safetensors")
    said = comfy.run(graph.prompt).ui["2"]
    count = len(whole.factors)
    assert said["text"][0].startswith(f"{count - 4} of {count} layers")
    assert (said["wadi"][0]["layers"], said["wadi"][0]["of"]) == (count - 4, count)


# Files


def test_a_damaged_file_is_told_by_its_name_alone(comfy: ComfyServer, network: torch.nn.Module) -> None:
    folder = comfy.base / "models/lorad"
    (folder / "deep").mkdir(exist_ok=True)
    (folder / "deep/broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 no header")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, folder / "plain.safetensors")
    for name in ("deep/broken.safetensors", "plain.safetensors"):
        graph = Graph()
        model, _ = with_lorad(graph, lorad_name=name)
        graph("Probe_DumpWeights", model=model[0], name="weights.safetensors")
        with pytest.raises(ComfyError, match=name) as failed:
            comfy.run(graph.prompt)
        assert str(comfy.base) not in str(failed.value)


def test_metadata_are_those_of_the_file_as_it_is(comfy: ComfyServer, network: torch.nn.Module) -> None:
    address = comfy.url("/wadi/lorad?name=changing.safetensors")
    path = comfy.base / "models/lorad/changing.safetensors"

    def ask(**headers: str) -> tuple[int, dict[str, str], bytes]:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as failed:
            return failed.code, dict(failed.headers), failed.read()

    assert ask()[0] == 404
    random_lorad(network, rank=4).save(path)
    status, headers, content = ask()
    assert status == 200 and b'"ss_network_dim": "4"' in content and str(comfy.base).encode() not in content
    assert ask(**{"If-None-Match": headers["ETag"]})[0] == 304
    random_lorad(network, rank=2).save(path)
    status, _, content = ask(**{"If-None-Match": headers["ETag"]})
    assert status == 200 and b'"ss_network_dim": "2"' in content
    address = comfy.url("/wadi/lorad?name=../../input/prompt.safetensors")
    assert ask()[0] == 404
    path.write_bytes(b"no header")
    address = comfy.url("/wadi/lorad?name=changing.safetensors")
    status, _, content = ask()
    assert status == 422 and str(comfy.base).encode() not in content


def test_names_of_the_embedded_model_are_known(comfy: ComfyServer) -> None:
    """Its files lie in the pack, and its LoRaDs are offered."""
    spec = comfy.get("/object_info/WaDi_LoRaDStack")["WaDi_LoRaDStack"]["input"]["required"]["lorad_1"]
    options = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
    own = sorted(path.name for path in (mini.FOLDER / mini.ADAPTERS).glob("*.safetensors"))
    assert options[0] == "none" and set(own) <= set(options)


# Training by ComfyUI's own node


def stock(comfy: ComfyServer, graph: Graph, node: str, **settings: Any) -> Node:
    """A node of ComfyUI's own that has more inputs in newer versions: these keep their defaults."""
    declared = comfy.get(f"/object_info/{node}")[node]["input"]["required"]
    defaults = {name: spec[1]["default"] for name, spec in declared.items() if len(spec) > 1 and "default" in spec[1]}
    return graph(node, **(defaults | settings))


def trained(comfy: ComfyServer, graph: Graph, base: Node, **more: Any) -> tuple[Any, Any]:
    """Train LoRA with this pack's algorithm; its LoRA and its number of steps."""
    told = graph("Probe_Conditioning", name="prompt.safetensors")
    latent = sampled(graph, base, told[0], width=SIZE, height=SIZE)
    settings = {"steps": 3, "learning_rate": 0.01, "rank": 2, "seed": 1, "training_dtype": "fp32", "lora_dtype": "fp32"}
    settings |= {"algorithm": "LoRaD", "gradient_checkpointing": False, "existing_lora": "[None]", **more}
    node = stock(comfy, graph, "TrainLoraNode", model=base[0], latents=latent[0], positive=told[0], **settings)
    first = comfy.get("/object_info/TrainLoraNode")["TrainLoraNode"]["output"].index("LORA_MODEL")
    return node[first], node[first + 2]


def test_comfyuis_own_training_trains_angles(comfy: ComfyServer, network: torch.nn.Module) -> None:
    graph = Graph()
    base = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    graph("Probe_DumpWeights", model=base[0], name="base.safetensors")
    lora, steps = trained(comfy, graph, base)
    turned = stock(comfy, graph, "LoraModelLoader", model=base[0], lora=lora, strength_model=1.0)
    graph("Probe_DumpWeights", model=turned[0], name="turned.safetensors")
    saver = "SaveLoRA" if "SaveLoRA" in comfy.get("/object_info") else "SaveLoRANode"  # as older versions call it
    graph(saver, lora=lora, prefix="loras/angles", steps=steps)
    comfy.run(graph.prompt)
    before, after = (load_file(comfy.base / f"output/{name}.safetensors") for name in ("base", "turned"))
    pairs = [key for key, weight in before.items() if weight.ndim == 2]
    changed = [key for key in pairs if float((after[key] - before[key]).norm() / before[key].norm()) > 1e-3]
    assert len(changed) > 0.8 * len(pairs)
    for key, weight in before.items():
        if weight.ndim == 2:  # turned, and no longer or shorter than before
            norms = (one.unflatten(1, (-1, 2)).norm(dim=2) for one in (weight, after[key]))
            assert torch.allclose(*norms, rtol=1e-4, atol=1e-6)
        elif weight.ndim == 4:
            assert torch.equal(weight, after[key])

    saved = next((comfy.base / "output/loras").glob("angles_3_steps_*.safetensors"))
    file = saved.replace(comfy.base / "models/loras" / saved.name)
    assert {name.rpartition(".")[2] for name in load_file(file)} == {"lorad_a", "lorad_b", "diff", "diff_b"}
    graph = Graph()
    base = graph("UNETLoader", unet_name="slice.safetensors", weight_dtype="default")
    loaded = graph("LoraLoaderModelOnly", model=base[0], lora_name=file.name, strength_model=1.0)
    graph("Probe_DumpWeights", model=loaded[0], name="loaded.safetensors")
    more, _ = trained(comfy, graph, base, existing_lora=file.name)
    further = stock(comfy, graph, "LoraModelLoader", model=base[0], lora=more, strength_model=1.0)
    graph("Probe_DumpWeights", model=further[0], name="further.safetensors")
    comfy.run(graph.prompt)
    loaded, further = (load_file(comfy.base / f"output/{name}.safetensors") for name in ("loaded", "further"))
    assert all(torch.equal(loaded[key], after[key]) for key in after)
    assert any(float((further[key] - after[key]).norm()) > 1e-4 for key in changed)


def test_a_file_of_comfyuis_own_training_is_for_its_own_loader(comfy: ComfyServer, network: torch.nn.Module) -> None:
    layers = {f"diffusion_model.{name}": torch.zeros(2, 2) for name in ("x.lorad_a", "x.lorad_b", "x.diff_b")}
    save_file(layers, comfy.base / "models/loras/trained.safetensors")
    graph = Graph()
    model, _ = with_lorad(graph, lorad_name="trained.safetensors")
    graph("Probe_DumpWeights", model=model[0], name="weights.safetensors")
    with pytest.raises(ComfyError, match="use ComfyUI's Load LoRA for it"):
        comfy.run(graph.prompt)
