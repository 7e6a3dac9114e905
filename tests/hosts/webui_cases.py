"""What the programs must do alike. Each test takes ``webui``, a running program, and ``base``, what it has loaded."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from webui_models import Base, turned, with_lora
from webui_server import SAMPLER, Made, WebUI, WebUIError, png

PICTURES = 2  # of 255: the programs round down, the core to the nearest
WEIGHTS = 5e-7  # absolute, of weights around 0.05 in float32
FP8, FP8_SMALLEST = 2**-4, 2**-10  # half a step of float8_e4m3fn, relative, and absolute below its normal numbers


def close(made: Made, expected: list[np.ndarray], within: int = PICTURES) -> bool:
    """Whether pictures are the core's own."""
    assert len(made.pictures) == len(expected)
    return max(int(abs(one - other).max()) for one, other in zip(made.pictures, expected, strict=True)) <= within


def tag(base: Base, adapter: str, strength: float = 1.0, kind: str = "lora") -> str:
    return f" <{kind}:{base.adapters[adapter].stem}:{strength:g}>"


def weights_after(webui: WebUI, prompt: str, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The network's weights as they are after a picture of this prompt."""
    webui.draw(prompt)
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"  # a file that is read stays mapped
    webui.post("/probe/weights", {"path": str(path)})
    return load_file(path)


def farthest(live: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    assert live.keys() == expected.keys()
    return max((live[name] - exact).abs().max().item() for name, exact in expected.items())


def beyond_rounding(stored: torch.Tensor, exact: torch.Tensor, half_steps: int = 1) -> float:
    """By how much a weight in eight bits is farther from the exact one than rounding explains.

    Args:
        half_steps: 1 for rounding to the nearest, 2 where the program rounds up or down by chance.
    """
    step = FP8 * exact.abs().clamp(min=FP8_SMALLEST / FP8)
    return ((stored.float() - exact).abs() - half_steps * step).max().item()


# The sampler


def hires(webui: WebUI, sampler: str, **values: object) -> dict[str, object]:
    """What a request needs for a second pass with this sampler; Forge's API fails without choices of its own."""
    own = {"hr_cfg": 7.0, "hr_additional_modules": ["Use same choices"]} if webui.kind in ("forge", "neo") else {}
    upscaler = "None" if webui.kind == "neo" else "Latent"  # Forge Neo has no upscalers of latents
    common = {"enable_hr": True, "hr_scale": 2.0, "hr_upscaler": upscaler, "denoising_strength": 0.5}
    return {**common, "hr_sampler_name": sampler, **own, **values}


def test_the_sampler_is_listed_under_its_exact_name(webui: WebUI) -> None:
    assert [one["name"] for one in webui.get("/sdapi/v1/samplers")].count(SAMPLER) == 1


def test_a_batch_is_one_call_whatever_the_sliders_say(webui: WebUI, base: Base) -> None:
    webui.draw()
    webui.calls()
    made = webui.draw("a cat" + tag(base, "one-step"), batch_size=2, n_iter=2, steps=37, cfg_scale=11)
    calls = webui.calls()
    assert [call["timesteps"] for call in calls] == [[999.0, 999.0]] * 2
    assert {tuple(call["shape"]) for call in calls} == {(2, 4, base.size // 8, base.size // 8)}
    pictures = made.pictures[-4:]  # a grid may come first
    assert abs(pictures[0] - webui.draw().pictures[0]).max() > 5 * PICTURES
    assert close(Made(pictures, [], {}), base.pictures("a cat", [3, 4, 5, 6], base.adapters["one-step"]))


def test_the_infotext_is_true(webui: WebUI, base: Base) -> None:
    fields = webui.draw("a cat" + tag(base, "one-step")).fields
    assert (fields["Steps"], fields["Sampler"], float(fields["CFG scale"])) == ("1", SAMPLER, 1.0)
    assert fields["WaDi"] == "alpha_T^2 0.0047 t 999"
    assert base.adapters["one-step"].stem in fields["Lora hashes"]


def test_a_picture_of_a_batch_is_the_one_of_its_seed(webui: WebUI, base: Base) -> None:
    together = webui.draw(batch_size=3).pictures[-3:]
    alone = [webui.draw(seed=seed).pictures[0] for seed in (3, 4, 5)]
    assert all(abs(one - other).max() <= 1 for one, other in zip(together, alone, strict=True))
    assert abs(alone[0] - alone[1]).max() > 20


@pytest.mark.parametrize(
    ("name", "told"),
    [("other-alpha", "alpha_T^2 0.02 t 999"), ("other-start", "alpha_T^2 0.1378 t 625 input sigma")],
)
def test_the_schedule_is_the_adapters_own(webui: WebUI, base: Base, name: str, told: str) -> None:
    made = webui.draw("a cat" + tag(base, name))
    assert made.fields["WaDi"] == told
    assert close(made, base.pictures("a cat", [3], base.adapters[name]))


def test_a_network_that_returns_v(webui: WebUI, base: Base, velocity: Base) -> None:
    webui.choose(velocity.name)
    try:
        made = webui.draw("a cat" + tag(velocity, "velocity"))
        assert close(made, velocity.pictures("a cat", [3], velocity.adapters["velocity"]))
        assert webui.draw().fields["WaDi"].startswith("alpha_T^2 0.0047 t 999 v_prediction")
        webui.draw("a cat" + tag(velocity, "one-step"))
        assert any("they are followed" in line for line in webui.comments())
    finally:
        webui.choose(base.name)


def test_a_composed_prompt_is_one_call(webui: WebUI, base: Base) -> None:
    webui.draw()
    webui.calls()
    made = webui.draw("a cat AND a dog :3")
    assert [call["timesteps"] for call in webui.calls()] == [[999.0, 999.0]]
    assert close(made, base.mixed({"a cat": 0.25, "a dog": 0.75}, 3))
    with pytest.raises(WebUIError, match="must add up to more than 0"):
        webui.draw("a cat AND a dog :-1")


def test_the_last_latent_is_there_for_the_live_preview(webui: WebUI, base: Base) -> None:
    webui.draw()
    assert webui.post("/probe/preview") == [1, 4, base.size // 8, base.size // 8]


def test_interrupting_stops_the_batches(webui: WebUI) -> None:
    webui.draw()
    webui.calls()
    made: list[Made] = []
    drawing = threading.Thread(target=lambda: made.append(webui.draw(n_iter=40)))
    drawing.start()
    while not webui.get("/sdapi/v1/progress?skip_current_image=true")["state"]["job_count"]:
        pass
    webui.post("/sdapi/v1/interrupt")
    drawing.join()
    assert len(webui.calls()) < 40
    assert len(webui.draw().pictures) == 1


# img2img, inpainting, hires


def test_img2img_draws_from_noise_and_says_so(webui: WebUI, base: Base) -> None:
    plain = webui.draw().pictures[0]
    given = np.full((base.size, base.size, 3), 200)
    made = webui.draw(tab="img2img", init_images=[png(given)], denoising_strength=0.3)
    assert abs(made.pictures[0] - plain).max() <= 1
    assert float(made.fields["Denoising strength"]) == 1.0
    assert any("denoising strength has no effect" in line for line in webui.comments())


def test_inpainting_keeps_what_is_not_masked(webui: WebUI, base: Base) -> None:
    given, mask = np.full((base.size, base.size, 3), 120), np.zeros((base.size, base.size, 3))
    mask[:, : base.size // 2] = 255
    values = {"init_images": [png(given)], "mask": png(mask), "mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False}
    webui.calls()
    made = webui.draw(tab="img2img", **values, inpainting_mask_invert=0).pictures[0]
    assert [call["timesteps"] for call in webui.calls()] == [[999.0]]
    right = slice(base.size // 2 + 8, None)
    assert abs(made[:, right] - 120).max() <= PICTURES
    assert abs(made[:, : base.size // 2 - 8] - 120).max() > 20
    assert any("without seeing what is around it" in line for line in webui.comments())


@pytest.mark.parametrize(("first", "second"), [(SAMPLER, SAMPLER), (SAMPLER, "Euler"), ("Euler", SAMPLER)])
def test_hires_fix_in_each_combination(webui: WebUI, base: Base, first: str, second: str) -> None:
    webui.draw()
    webui.calls()
    made = webui.draw("a cat" + tag(base, "one-step"), sampler_name=first, steps=4, **hires(webui, second))
    side, calls = base.size // 8, webui.calls()
    small = [call for call in calls if call["shape"][-1] == side]
    large = [call for call in calls if call["shape"][-1] == 2 * side]
    assert made.pictures[0].shape[:2] == (2 * base.size, 2 * base.size)
    if first == SAMPLER:
        assert [call["timesteps"] for call in small] == [[999.0]]
    else:
        assert len(small) >= 4
    if second == SAMPLER:
        assert [call["timesteps"] for call in large] == [[999.0]]
        assert close(made, base.pictures("a cat", [3], base.adapters["one-step"], 2 * base.size))
    else:
        assert len(large) >= 2 and all(len(call["timesteps"]) == 2 or call["shape"][0] == 1 for call in large)
    fields = made.fields
    assert fields["Steps"] == ("1" if first == SAMPLER else "4")
    expected = {(SAMPLER, SAMPLER): None, (SAMPLER, "Euler"): "4", ("Euler", SAMPLER): "1"}[first, second]
    assert fields.get("Hires steps") == expected


# Weights


@pytest.mark.parametrize("strength", [1, 0.5, 0, -0.3])
def test_weights_are_the_cores_and_come_back(webui: WebUI, base: Base, tmp_path: Path, strength: float) -> None:
    bare = weights_after(webui, "a cat", tmp_path)
    live = weights_after(webui, "a cat" + tag(base, "one-step", strength), tmp_path)
    expected = turned(bare, [(base.adapters["one-step"], strength)])
    assert farthest(live, expected) < WEIGHTS
    changed = sum(not torch.equal(live[name], bare[name]) for name in bare)
    assert changed >= len(base.lorad_layers) if strength else changed == 0
    restored = weights_after(webui, "a cat", tmp_path)
    assert all(torch.equal(bare[name], restored[name]) for name in bare)


def test_two_lorads_add_their_angles(webui: WebUI, base: Base, tmp_path: Path) -> None:
    bare = weights_after(webui, "a cat", tmp_path)
    prompt = "a cat" + tag(base, "one-step", 0.8) + tag(base, "style", -1.5, "lorad")
    live = weights_after(webui, prompt, tmp_path)
    expected = turned(bare, [(base.adapters["one-step"], 0.8), (base.adapters["style"], -1.5)])
    assert farthest(live, expected) < WEIGHTS


@pytest.mark.parametrize("lora_first", [False, True])
def test_lorad_and_lora_keep_the_order_of_the_prompt(webui: WebUI, base: Base, tmp_path: Path, lora_first: bool) -> None:
    bare = weights_after(webui, "a cat", tmp_path)
    tags = [tag(base, "one-step"), tag(base, "lora", 0.7)]
    live = weights_after(webui, "a cat" + "".join(reversed(tags) if lora_first else tags), tmp_path)
    told = any("rotation first, then LoRA" in line for line in webui.comments())
    lora, stack = load_file(base.adapters["lora"]), [(base.adapters["one-step"], 1.0)]
    expected = turned(with_lora(bare, lora, 0.7), stack) if lora_first else with_lora(turned(bare, stack), lora, 0.7)
    assert farthest(live, expected) < WEIGHTS
    assert told == lora_first


def test_files_in_the_folder_of_lorads_are_found(webui: WebUI, base: Base) -> None:
    mine = webui.data / "models" / "LoRaD" / "elsewhere.safetensors"
    mine.write_bytes(base.adapters["one-step"].read_bytes())
    try:
        made = webui.draw("a cat <lorad:elsewhere:1> <lora:is-nowhere:1>")
        assert close(made, base.pictures("a cat", [3], base.adapters["one-step"]))
        assert any("is-nowhere is left out: there is no adapter file of this name" in line for line in webui.comments())
        webui.post("/probe/cards")
        metadata = webui.get("/sd_extra_networks/metadata?page=lorad&item=elsewhere")
        assert json.loads(metadata["metadata"])["wadi.format"] == "1"
    finally:
        mine.unlink()


# The panel


def test_the_panel_draws_what_the_tag_draws_and_writes_it_down(webui: WebUI, base: Base) -> None:
    name = base.adapters["one-step"].stem
    made = webui.draw(alwayson_scripts={"WaDi": {"args": [True, name, 0.5]}})
    assert close(made, base.pictures("a cat", [3], [(base.adapters["one-step"], 0.5)]))
    assert (made.fields["WaDi LoRaD"], made.fields["WaDi strength"]) == (name, "0.5")
    assert "<lora" not in made.infotexts[0]
    assert name in made.fields["Lora hashes"]


@pytest.mark.parametrize("method", ["shrink", "redilate"])
def test_larger_pictures_are_the_cores(webui: WebUI, base: Base, method: str) -> None:
    side, prompt = 2 * base.size, "a cat" + tag(base, "one-step")
    panel = {"WaDi": {"args": [False, "None", 1.0, method]}}
    made = webui.draw(prompt, width=side, height=side, alwayson_scripts=panel)
    assert close(made, base.pictures("a cat", [3], base.adapters["one-step"], side, hires=method))
    assert made.fields["WaDi high resolution"] == method and webui.comments() == []
    pasted = webui.post("/probe/paste", {"infotext": made.infotexts[0]})
    assert pasted["Larger than native in one piece"] == method
    plain = webui.draw(prompt, width=side, height=side)
    assert close(plain, base.pictures("a cat", [3], base.adapters["one-step"], side))
    assert not close(plain, made.pictures) and "WaDi high resolution" not in plain.fields


def test_an_infotext_goes_round(webui: WebUI, base: Base) -> None:
    name = base.adapters["one-step"].stem
    made = webui.draw("a frog", seed=11, alwayson_scripts={"WaDi": {"args": [True, name, -0.25]}})
    pasted = webui.post("/probe/paste", {"infotext": made.infotexts[0]})
    expected = {"WaDi": True, "LoRaD": name, "Strength": "-0.25", "Larger than native in one piece": "off"}
    expected |= {"Negative prompt in one step": None, "Negative scale": None}  # stays as it is in the panel
    assert {label: pasted[label] for label in expected} == expected
    if webui.kind == "a1111":  # the API of Forge takes no infotext, with or without extensions
        again = webui.post("/sdapi/v1/txt2img", {"infotext": made.infotexts[0]})
        assert json.loads(again["info"])["infotexts"] == made.infotexts
    assert webui.post("/probe/paste", {"infotext": made.infotexts[0], "tab": "img2img"}) == pasted
    assert webui.post("/probe/paste", {"infotext": webui.draw().infotexts[0]})["WaDi"] is False


def plot(webui: WebUI, prompt: str, axes: dict[str, Any], **values: Any) -> Made:
    """What the X/Y/Z plot makes: label of an axis -> its values, as text or as a list."""
    info = next(one for one in webui.get("/sdapi/v1/script-info") if one["name"] == "x/y/z plot" and not one["is_img2img"])
    known, arguments = info["args"][0]["choices"], [one.get("value") for one in info["args"]]
    for place in range(3):
        label, chosen = [*axes.items(), *[("Nothing", "")] * 3][place]
        assert known.count(label) == 1
        arguments[3 * place : 3 * place + 3] = [
            known.index(label),
            *(("", chosen) if isinstance(chosen, list) else (chosen, [])),
        ]
    arguments[[one["label"] for one in info["args"]].index("Include Sub Images")] = True
    return webui.draw(prompt, script_name="x/y/z plot", script_args=arguments, **values)


def cells(made: Made, like: np.ndarray) -> Made:
    """The pictures of a plot that are no grids."""
    return Made([picture for picture in made.pictures if picture.shape == like.shape], made.infotexts, {})


def test_the_plot_goes_over_strengths(webui: WebUI, base: Base) -> None:
    name = base.adapters["one-step"].stem
    assert SAMPLER in webui.post("/probe/axis", {"label": "Sampler"})
    made = plot(webui, "a cat", {"[WaDi] Strength": "1, 0.5, 0", "[WaDi] LoRaD": [name]})
    expected = [base.pictures("a cat", [3], [(base.adapters["one-step"], strength)])[0] for strength in (1, 0.5, 0)]
    assert close(cells(made, expected[0]), expected)
    strengths = [text.split("WaDi strength: ")[1].split(",")[0] for text in made.infotexts if "WaDi strength: " in text]
    assert {"1.0", "0.5", "0.0"} <= set(strengths)


def test_the_plot_scales_tags_or_refuses(webui: WebUI, base: Base) -> None:
    made = plot(webui, "a cat" + tag(base, "one-step", 0.8), {"[WaDi] Strength": "1, 0.5"})
    expected = [base.pictures("a cat", [3], [(base.adapters["one-step"], strength)])[0] for strength in (0.8, 0.4)]
    assert close(cells(made, expected[0]), expected)
    assert any(f"{base.adapters['one-step'].stem}:0.4>" in text for text in made.infotexts)
    webui.calls()
    with pytest.raises(WebUIError):
        plot(webui, "a cat", {"[WaDi] Strength": "1, 0.5"})
    assert webui.calls() == [] and "[WaDi] Strength has no LoRaD to act on" in webui.said()


def test_the_second_pass_of_another_sampler_is_without_the_panels_one_step_lorad(webui: WebUI, base: Base) -> None:
    values = hires(webui, "Euler", steps=2)
    name = base.adapters["one-step"].stem
    panel = {"WaDi": {"args": [True, name, 1.0]}}
    webui.draw(**values, alwayson_scripts=panel)
    assert not any("at work in the hires pass too" in line for line in webui.comments())
    webui.draw("a cat" + tag(base, "one-step"), **values)
    assert any("at work in the hires pass too" in line for line in webui.comments())


def test_a_folder_of_the_settings_page_is_looked_through(webui: WebUI, base: Base, tmp_path: Path) -> None:
    (tmp_path / "chosen.safetensors").write_bytes(base.adapters["one-step"].read_bytes())
    webui.post("/sdapi/v1/options", {"wadi_folder": str(tmp_path), "wadi_default_lorad": "chosen"})
    try:
        made = webui.draw(alwayson_scripts={"WaDi": {"args": [True, "chosen", 1.0]}})
        assert close(made, base.pictures("a cat", [3], base.adapters["one-step"]))
    finally:
        webui.post("/sdapi/v1/options", {"wadi_folder": "", "wadi_default_lorad": "None"})


def test_the_check_line_says_what_fits_and_what_does_not(webui: WebUI, base: Base) -> None:
    side, name = base.size, base.adapters["one-step"].stem
    line = webui.post("/probe/check", {"values": [name, 1.0, SAMPLER, side, side]})
    assert f"{len(base.lorad_layers)} of {len(base.lorad_layers)} layers, rank 4" in line
    assert "one step at t 999, alpha_T^2 0.0047" in line and "⚠" not in line
    line = webui.post("/probe/check", {"values": [name, 1.0, "Euler", 4 * side, side]})
    assert f"choose the sampler {SAMPLER} instead of Euler" in line and f"was trained at {side}x{side}" in line
    line = webui.post("/probe/check", {"values": [base.adapters["foreign"].stem, 1.0, SAMPLER, side, side]})
    assert "⚠ it is made for sd21" in line
    line = webui.post("/probe/check", {"values": ["None", 1.0, SAMPLER, side, side]})
    assert "a multi-step network" in line and "no one-step weights are loaded" in line
    prompt = f"a cat{tag(base, 'one-step', 0.5, 'lorad')} <lora:nowhere:1>" + tag(base, "lora")
    line = webui.post("/probe/check", {"values": ["None", 1.0, SAMPLER, side, side, prompt]})
    assert f"{name}: {len(base.lorad_layers)} of" in line and "angles times 0.5" in line
    assert line.count("⚠") == 1 and "⚠ nowhere: there is no adapter file of this name" in line
    line = webui.post("/probe/check", {"values": [base.adapters["other-alpha"].stem, 1.0, SAMPLER, side, side, prompt]})
    assert "schedules differ" in line


# Mistakes and errors


def test_the_commonest_mistakes_are_told(webui: WebUI, base: Base) -> None:
    webui.draw()
    assert any("no one-step weights are loaded" in line for line in webui.comments())
    webui.draw("a cat" + tag(base, "one-step"), sampler_name="Euler", steps=3, cfg_scale=5)
    assert any(f"choose the sampler {SAMPLER} instead of Euler (3 steps, CFG scale 5)" in line for line in webui.comments())
    webui.draw("a cat" + tag(base, "one-step"), width=2 * base.size)
    assert any(f"was trained at {base.size}x{base.size}" in line for line in webui.comments())
    webui.draw("a cat" + tag(base, "one-step"))
    assert webui.comments() == []
    for sentence in ("WaDi: no one-step weights are loaded", "is made for one step: choose the sampler"):
        assert sentence in webui.said()


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [("foreign", "it is made for sd21, this is"), ("cut", "the file is cut short")],
)
def test_an_adapter_that_cannot_be_used_is_left_out_and_told(webui: WebUI, base: Base, adapter: str, sentence: str) -> None:
    plain = webui.draw().pictures[0]
    made = webui.draw("a cat" + tag(base, adapter))
    assert abs(made.pictures[0] - plain).max() == 0
    told = [line for line in webui.comments() if sentence in line]
    assert len(told) == 1 and f"{base.adapters[adapter].stem} is left out" in told[0]
    assert told[0] in webui.said()


def test_stable_diffusion_xl_is_named(webui: WebUI, base: Base) -> None:
    """Other samplers go on without the adapter; this one stops with a sentence."""
    euler = {"sampler_name": "Euler", "steps": 1}
    plain = webui.draw(**euler).pictures[0]
    webui.post("/probe/disguise", {"on": True})
    try:
        made = webui.draw("a cat" + tag(base, "one-step"), **euler)
        assert abs(made.pictures[0] - plain).max() == 0
        assert any("is left out" in line and "Stable Diffusion XL" in line for line in webui.comments())
        with pytest.raises(WebUIError, match="Stable Diffusion XL"):
            webui.draw()
        line = webui.post("/probe/check", {"values": [base.adapters["one-step"].stem, 1.0, SAMPLER, base.size, base.size]})
        assert "⚠" in line and "Stable Diffusion XL" in line
    finally:
        webui.post("/probe/disguise", {"on": False})
    assert close(webui.draw("a cat" + tag(base, "one-step")), base.pictures("a cat", [3], base.adapters["one-step"]))


def test_a_name_without_a_file_is_told(webui: WebUI) -> None:
    plain = webui.draw().pictures[0]
    made = webui.draw("a cat <lorad:nowhere:1>", alwayson_scripts={"WaDi": {"args": [True, "neither", 1.0]}})
    assert abs(made.pictures[0] - plain).max() == 0
    said = "\n".join(webui.comments())
    assert "nowhere is left out: there is no adapter file" in said and "neither is left out" in said


def test_lorads_that_disagree_are_left_out_together(webui: WebUI, base: Base) -> None:
    plain = webui.draw().pictures[0]
    made = webui.draw("a cat" + tag(base, "one-step") + tag(base, "other-alpha"))
    assert abs(made.pictures[0] - plain).max() == 0
    assert any("all LoRaDs are left out" in line and "schedules differ" in line for line in webui.comments())
    made = webui.draw("a cat" + tag(base, "one-step") + tag(base, "other-alpha", 0))
    assert close(made, base.pictures("a cat", [3], base.adapters["one-step"]))


# What is told


def told(webui: WebUI, part: str) -> bool:
    """Whether a sentence stands below the last picture and in the console."""
    return any(part in line for line in webui.comments()) and part in webui.said()


def checked(webui: WebUI, *values: Any, **page: Any) -> str:
    return webui.post("/probe/check", {"values": values, "page": page})


def test_clip_skip_is_told(webui: WebUI, base: Base) -> None:
    name = base.adapters["one-step"].stem
    webui.post("/sdapi/v1/options", {"CLIP_stop_at_last_layers": 2})
    try:
        webui.draw("a cat" + tag(base, "one-step"))
        assert told(webui, "Clip skip is 2")
        assert "Clip skip is 2" in checked(webui, name, 1.0, SAMPLER, base.size, base.size)
        webui.draw("a cat", sampler_name="Euler", steps=1)
        assert not any("Clip skip" in line for line in webui.comments())
    finally:
        webui.post("/sdapi/v1/options", {"CLIP_stop_at_last_layers": 1})
    webui.draw("a cat" + tag(base, "one-step"), override_settings={"CLIP_stop_at_last_layers": 2})
    assert told(webui, "Clip skip is 2")
    webui.draw("a cat" + tag(base, "one-step"))
    assert webui.comments() == []


@pytest.mark.parametrize("by_panel", [True, False])
def test_the_same_lorad_twice_is_told(webui: WebUI, base: Base, by_panel: bool) -> None:
    name = base.adapters["one-step"].stem
    panel = {"WaDi": {"args": [by_panel, name, 1.0]}}
    prompt = "a cat" + tag(base, "one-step", 0.5, "lorad") + ("" if by_panel else tag(base, "one-step"))
    made = webui.draw(prompt, alwayson_scripts=panel)
    strength = 1.0 if by_panel else 0.5
    assert close(made, base.pictures("a cat", [3], [(base.adapters["one-step"], strength)]))
    assert told(webui, f"{name} is asked for twice: the second is not applied")
    line = checked(webui, name, 1.0, SAMPLER, base.size, base.size, prompt, enabled=by_panel)
    assert "is asked for twice" in line


def test_a_lorad_that_is_not_switched_on_is_told(webui: WebUI, base: Base) -> None:
    name = base.adapters["one-step"].stem
    plain = webui.draw().pictures[0]
    made = webui.draw(alwayson_scripts={"WaDi": {"args": [False, name, 1.0]}})
    assert abs(made.pictures[0] - plain).max() == 0
    assert told(webui, f"{name} is chosen in the panel and not switched on")
    assert f"⚠ {name} is chosen in the panel and" in checked(webui, name, 1.0, SAMPLER, 8, 8, enabled=False)


def test_a_size_above_native_is_told_of_either_pass(webui: WebUI, base: Base) -> None:
    side, name = base.size, base.adapters["one-step"].stem
    prompt = "a cat" + tag(base, "one-step")
    webui.draw(prompt, width=2 * side)
    assert told(webui, f"was trained at {side}x{side}") and not any("hires pass" in line for line in webui.comments())
    webui.draw(prompt, **hires(webui, SAMPLER))
    assert told(webui, f"the hires pass draws at {2 * side}x{2 * side}, the LoRaD was trained at {side}x{side}")
    webui.draw(prompt, **hires(webui, SAMPLER), alwayson_scripts={"WaDi": {"args": [False, "None", 1.0, "redilate"]}})
    assert not any("was trained at" in line for line in webui.comments())
    page = {"hires": True, "scale": 1.0, "wide": 3 * side, "high": 0, "second": "Use same sampler"}
    line = checked(webui, name, 1.0, SAMPLER, side, side, **page)
    assert f"the hires pass draws at {3 * side}x{3 * side}" in line
    assert "⚠" not in checked(webui, name, 1.0, SAMPLER, side, side, **{**page, "second": "Euler"})
    assert "⚠" not in checked(webui, name, 1.0, SAMPLER, side, side, **page, large="shrink")


@pytest.mark.parametrize("strength", ["0,8", "", ":1", "nan", "1e9"])
def test_a_tag_whose_strength_is_no_number_is_told_and_the_others_stay(webui: WebUI, base: Base, strength: str) -> None:
    name = base.adapters["style"].stem
    made = webui.draw(f"a cat <lorad:{name}:{strength}>" + tag(base, "one-step"))
    assert close(made, base.pictures("a cat", [3], base.adapters["one-step"]))
    assert told(webui, f"<lorad:{name}:{strength}> is left out: ")
    assert f"{name}:{strength}&gt;: " in checked(webui, "None", 1.0, SAMPLER, 8, 8, f"a <lorad:{name}:{strength}>")


def test_the_nearest_names_are_told(webui: WebUI, base: Base) -> None:
    name = base.adapters["one-step"].stem
    webui.draw(f"a cat <lorad:{name[:-1]}:1>")
    assert told(webui, f"{name[:-1]} is left out: there is no adapter file of this name; did you mean '{name}'")
    webui.draw(alwayson_scripts={"WaDi": {"args": [True, name[:-1], 1.0]}})
    assert told(webui, f"did you mean '{name}'")


def test_the_pass_of_another_extension_is_drawn_in_many_steps_without_the_lorad(webui: WebUI, base: Base) -> None:
    prompt = "a cat" + tag(base, "one-step")
    webui.draw()
    webui.calls()
    webui.post("/probe/inner")
    made = webui.draw(prompt)
    first, *rest = (call["timesteps"] for call in webui.calls())
    assert first == [999.0] and len(rest) >= 8 and all(max(steps) < 700 for steps in rest)
    assert told(webui, "the inner pass of another extension (such as ADetailer) is drawn with Euler")
    assert (made.fields["Steps"], made.fields["Sampler"]) == ("1", SAMPLER)
    assert webui.post("/probe/applied") == []
    assert close(webui.draw(prompt), base.pictures("a cat", [3], base.adapters["one-step"]))
    assert not any("inner pass" in line for line in webui.comments())


# Drawing while typing


def test_requests_that_are_stale_are_never_drawn(webui: WebUI, base: Base) -> None:
    name = base.adapters["one-step"].stem
    before, _ = webui.post("/probe/live", {}), webui.draw("a frog", seed=11)
    last = webui.post("/probe/last")
    webui.calls()
    after = webui.post("/probe/live", {"several": 6, "name": name, "size": base.size})
    counts = {what: after[what] - before[what] for what in after}
    assert counts == {"asked": 6, "drawn": 1, "stale": 5}
    assert [call["timesteps"] for call in webui.calls()] == [[999.0]]
    assert webui.post("/probe/last") == last
    assert close(webui.draw("a cat" + tag(base, "one-step")), base.pictures("a cat", [3], base.adapters["one-step"]))


# The tools


def test_a_merged_checkpoint_is_known_as_a_one_step_network(webui: WebUI, base: Base) -> None:
    name = base.adapters["one-step"].stem
    *_, said = webui.post("/probe/tool", {"name": "merge", "values": [name, 1.0, "merged"]})
    assert f"merged.safetensors: {len(base.lorad_layers)} layers rotated" in said
    *_, again = webui.post("/probe/tool", {"name": "merge", "values": [name, 1.0, "merged"]})
    assert "there is a file of this name already" in again
    try:
        webui.choose("merged")
        made = webui.draw()
        assert close(made, base.pictures("a cat", [3], base.adapters["one-step"]))
        assert made.fields["WaDi"] == "alpha_T^2 0.0047 t 999"
        assert webui.comments() == []
    finally:
        webui.choose(base.name)


def test_a_lorad_comes_out_of_a_complete_network(webui: WebUI, base: Base, tmp_path: Path) -> None:
    student = webui.data / "models" / "LoRaD" / "released.safetensors"
    from wadi_core.lorad.merge import merge

    merge(base.folder, [(base.adapters["one-step"], 1.0)], student)
    try:
        *steps, said = webui.post("/probe/tool", {"name": "extract", "values": ["released.safetensors", 0, "mine"]})
        assert "100.0% of the change is a rotation" in said and steps
        made = webui.draw("a cat <lorad:mine:1>")
        (expected,) = base.pictures("a cat", [3], base.adapters["one-step"])
        assert abs(made.pictures[0] - expected).max() < 16  # of weights in half precision
    finally:
        student.unlink()
        (webui.data / "models" / "LoRaD" / "mine.safetensors").unlink(missing_ok=True)
    *_, said = webui.post("/probe/tool", {"name": "extract", "values": ["released.safetensors", 0, "mine"]})
    assert said.startswith("⚠ choose a one-step network first")
