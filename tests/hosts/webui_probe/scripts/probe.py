"""An extension for the tests alone: what A1111 or Forge does inside, told over HTTP."""

import os
import sys
import threading
import time
from typing import Any

import torch
from modules import processing, script_callbacks, scripts, sd_models, shared
from safetensors.torch import save_file

CALLS: list[dict[str, Any]] = []
LAST: dict[str, Any] = {"comments": "", "preview": None, "inner": False}
HOOKED: list[Any] = []


def network() -> torch.nn.Module:
    model = sd_models.model_data.sd_model
    objects = getattr(model, "forge_objects", None)
    return objects.unet.model.diffusion_model if objects else model.model.diffusion_model


def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    x, t = args[0], kwargs.get("timesteps", args[1] if len(args) > 1 else None)
    CALLS.append({"timesteps": [float(one) for one in t.flatten()], "shape": list(x.shape), **clock()})


def after(module: torch.nn.Module, args: tuple, result: Any) -> None:
    CALLS[-1] |= {name: value - CALLS[-1][name] for name, value in clock().items()}


def clock() -> dict[str, float]:
    return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}


class Probe(scripts.Script):
    def title(self) -> str:
        return "WaDi probe"

    def show(self, is_img2img: bool) -> object:
        return scripts.AlwaysVisible

    def process(self, p: Any, *args: Any) -> None:
        module = network()
        if not any(module is hooked for hooked in HOOKED):
            module.register_forward_pre_hook(count, with_kwargs=True)
            module.register_forward_hook(after)
            HOOKED.append(module)

    def postprocess_image(self, p: Any, pp: Any, *args: Any) -> None:
        """What extensions such as ADetailer do: a pass of their own over the picture, with the sampler of the generation."""
        if not LAST["inner"]:
            return
        LAST["inner"] = False
        within = processing.StableDiffusionProcessingImg2Img(
            init_images=[pp.image], denoising_strength=0.4, prompt=p.all_prompts[0], seed=p.seed,
            width=p.width, height=p.height, sampler_name=p.sampler_name,
            steps=p.steps, cfg_scale=p.cfg_scale, do_not_save_samples=True, do_not_save_grid=True,
        )  # fmt: skip
        pp.image = processing.process_images(within).images[0]

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        LAST["comments"] = processed.comments
        LAST["preview"] = shared.state.current_latent


def routes(demo: Any, app: Any) -> None:
    @app.post("/probe/calls")
    def calls() -> list[dict[str, Any]]:
        found = list(CALLS)
        CALLS.clear()
        return found

    @app.post("/probe/clock")
    def read_clock() -> dict[str, float]:
        return clock()

    @app.post("/probe/comments")
    def comments() -> list[str]:
        return [line for line in LAST["comments"].split("\n") if line]

    @app.post("/probe/preview")
    def preview() -> list[int]:
        return list(LAST["preview"].shape)

    @app.post("/probe/weights")
    def weights(body: dict) -> int:
        tensors = network().state_dict().items()
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors}, body["path"])
        return len(tensors)

    @app.post("/probe/cards")
    def cards() -> list[str]:
        """The names on the page of LoRaD files, made anew as when its refresh button is pressed."""
        from modules import ui_extra_networks

        page = next(page for page in ui_extra_networks.extra_pages if page.title == "LoRaD")
        page.refresh()
        page.items = {item["name"]: item for item in page.list_items()}
        page.metadata.update({name: item["metadata"] for name, item in page.items.items()})
        return sorted(item["prompt"] for item in page.items.values())

    @app.post("/probe/disguise")
    def disguise(body: dict) -> None:
        """Give the loaded network a layer by which networks of Stable Diffusion XL are known, or take it away."""
        if body["on"]:
            network().label_emb = torch.nn.Linear(1, 1)
        else:
            del network().label_emb

    @app.post("/probe/axis")
    def axis(body: dict) -> list[str]:
        """What an axis of the X/Y/Z plot offers."""
        grid = next(data.module for data in scripts.scripts_data if data.module.__name__ == "xyz_grid.py")
        return next(axis.choices() for axis in grid.axis_options if axis.label == body["label"] and axis.choices)

    @app.post("/probe/loaded")
    def loaded() -> str:
        """The checkpoint of the network in memory, which A1111 loads behind its page when it starts."""
        return shared.sd_model.sd_checkpoint_info.name

    @app.post("/probe/imported")
    def imported() -> list[str]:
        return sorted({name.split(".")[0] for name in sys.modules})

    @app.post("/probe/tool")
    def tool(body: dict) -> list[str]:
        from a1111_extension import tools

        return list(getattr(tools, body["name"])(*body["values"]))

    @app.post("/probe/check")
    def check(body: dict) -> str:
        from a1111_extension import check

        return check.line(*body["values"], **body.get("page", {}))

    @app.post("/probe/inner")
    def inner() -> None:
        """The next picture gets a pass of another extension."""
        LAST["inner"] = True

    @app.post("/probe/applied")
    def applied() -> list[str]:
        """The adapters that the extension finds on the network."""
        from a1111_extension import host

        return [file.stem for file, strength in host.applied() if strength]

    @app.post("/probe/live")
    def live(body: dict) -> dict[str, int]:
        """What became of the requests to draw while typing; with ``several`` so many are made at once before."""
        from a1111_extension import live

        if body.get("several"):
            newest = live.Newest()
            values = [True, True, body["name"], 1.0, "off"]
            rest = [[], body["size"], body["size"], 3]
            asked = [f"a cat {number}" for number in range(body["several"])]
            threads = [threading.Thread(target=live.draw, args=(newest, *values, text, *rest)) for text in asked]
            with live.queue_lock:  # somebody draws
                for thread in threads:
                    thread.start()
                time.sleep(0.3)
            for thread in threads:
                thread.join()
        return dict(live.COUNTS)

    @app.post("/probe/environment")
    def environment(body: dict) -> None:
        """Set variables for the processes that the program starts; an empty text takes one out."""
        for name, text in body.items():
            if text:
                os.environ[name] = text
            else:
                os.environ.pop(name, None)

    @app.post("/probe/last")
    def last() -> str:
        """What the program remembers of the last picture."""
        from modules import paths

        path = os.path.join(paths.data_path, "params.txt")
        return open(path, encoding="utf-8").read() if os.path.exists(path) else ""

    @app.post("/probe/paste")
    def paste(body: dict) -> dict[str, Any]:
        """What pasting an infotext puts into the panel's components of a tab, by their labels."""
        from modules import infotext_utils

        read = infotext_utils.parse_generation_parameters(body["infotext"])
        found = {}
        for field in infotext_utils.paste_fields[body.get("tab", "txt2img")]["fields"]:
            if getattr(field.component, "label", None) and "wadi" in (getattr(field.component, "elem_id", None) or ""):
                value = field.function(read) if field.function else read.get(field.label)
                found[field.component.label] = value
        return found


script_callbacks.on_app_started(routes)
