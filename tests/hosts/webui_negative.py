"""The negative box in one step, as every program must have it. Fixtures and helpers as in webui_cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from webui_cases import close, hires, tag
from webui_models import Base
from webui_server import SAMPLER, Made, WebUI

from wadi_core.negative import DEFAULT, PRESETS

PROMPT, UNWANTED = "a cat", "a dog, blue"


def panel(method: str = DEFAULT, scale: float | None = None) -> dict[str, Any]:
    own = PRESETS[method].scale if method in PRESETS else 1.0
    return {"alwayson_scripts": {"WaDi": {"args": [False, "None", 1.0, "off", method, own if scale is None else scale]}}}


def expected(base: Base, seeds: list[int], negative: Any = UNWANTED, method: str = DEFAULT, scale: float | None = None) -> Any:
    base.pipe.set_lorad(base.adapters["one-step"])
    away = {"negative_prompt": negative, "negative_method": method, "negative_scale": scale}
    made = base.pipe(PROMPT, seeds=seeds, width=base.size, height=base.size, batch=len(seeds), **away)
    return [np.asarray(image).astype(int) for image in made.images]


@pytest.mark.parametrize("method", PRESETS)
def test_a_negative_prompt_is_the_cores_from_one_call(webui: WebUI, base: Base, method: str) -> None:
    webui.calls()
    prompt = PROMPT + tag(base, "one-step")
    made = webui.draw(prompt, batch_size=2, negative_prompt=UNWANTED, **panel(method))
    assert [call["timesteps"] for call in webui.calls()] == [[999.0, 999.0]]
    pictures = Made(made.pictures[-2:], [], {})
    assert close(pictures, expected(base, [3, 4], method=method))
    if method == "nag-published":  # on all levels, so that it shows in a network with random weights
        assert not close(pictures, expected(base, [3, 4], ""))
    assert (made.fields["WaDi negative"], float(made.fields["WaDi negative scale"])) == (method, PRESETS[method].scale)
    pasted = webui.post("/probe/paste", {"infotext": made.infotexts[-1]})
    assert pasted["Negative prompt in one step"] == method
    assert float(pasted["Negative scale"]) == PRESETS[method].scale


def test_without_a_value_of_the_panel_it_works_and_off_is_off(webui: WebUI, base: Base) -> None:
    prompt = PROMPT + tag(base, "one-step")
    made = webui.draw(prompt, negative_prompt=UNWANTED)
    assert close(made, expected(base, [3]))
    plain = webui.draw(prompt)
    assert close(plain, expected(base, [3], "")) and not close(plain, made.pictures, 0)
    for nothing in (panel("off"), panel(scale=0.0)):
        off = webui.draw(prompt, negative_prompt=UNWANTED, **nothing)
        assert close(off, plain.pictures, 0) and "WaDi negative" not in off.fields
        pasted = webui.post("/probe/paste", {"infotext": off.infotexts[0]})
        assert pasted["Negative prompt in one step"] == "off"
    assert close(webui.draw(prompt), plain.pictures, 0)  # nothing is left on the network


def test_each_picture_has_its_own_negative_prompt(webui: WebUI, base: Base) -> None:
    """As scripts write them; here the program's own prompt matrix, of four pictures with one seed."""
    webui.calls()
    matrix = {"script_name": "prompt matrix", "script_args": [False, False, "negative", "comma", 0]}
    made = webui.draw(PROMPT + tag(base, "one-step"), negative_prompt="|a dog|a boat", batch_size=4, **matrix)
    assert [len(call["timesteps"]) for call in webui.calls()] == [4]
    own = ["", ", a dog", ", a boat", ", a dog, a boat"]
    assert close(Made(made.pictures[-4:], [], {}), expected(base, [3] * 4, own))


def test_the_parts_of_a_composed_prompt_are_all_steered(webui: WebUI, base: Base) -> None:
    webui.calls()
    made = webui.draw(f"a cat :1 AND a cat :1{tag(base, 'one-step')}", negative_prompt=UNWANTED)
    assert [len(call["timesteps"]) for call in webui.calls()] == [2]
    assert close(made, expected(base, [3]))


def test_the_second_pass_is_steered_too(webui: WebUI, base: Base) -> None:
    prompt = PROMPT + tag(base, "one-step")
    values = hires(webui, SAMPLER)
    made, plain = (webui.draw(prompt, negative_prompt=text, **values) for text in (UNWANTED, ""))
    assert made.pictures[0].shape == plain.pictures[0].shape and not close(made, plain.pictures, 0)


def test_another_sampler_is_left_alone(webui: WebUI, base: Base) -> None:
    made = webui.draw(negative_prompt=UNWANTED, sampler_name="Euler", steps=2)
    assert "WaDi negative" not in made.fields


def test_what_is_no_method_and_no_scale_is_told(webui: WebUI, base: Base) -> None:
    prompt = PROMPT + tag(base, "one-step")
    for wrong, sentence in ((panel("cfg", 1.0), "not 'cfg'"), (panel(scale=99.0), "from 0 to 30, not 99")):
        made = webui.draw(prompt, negative_prompt=UNWANTED, **wrong)
        assert close(made, expected(base, [3], ""))
        assert any(sentence in one for one in webui.comments())


def test_the_plot_goes_over_negative_scales(webui: WebUI, base: Base) -> None:
    info = next(one for one in webui.get("/sdapi/v1/script-info") if one["name"] == "x/y/z plot" and not one["is_img2img"])
    axes, arguments = info["args"][0]["choices"], [one.get("value") for one in info["args"]]
    labels = [one["label"] for one in info["args"]]
    arguments[0], arguments[1] = axes.index("[WaDi] Negative scale"), "0, 1"
    arguments[3], arguments[5] = axes.index("[WaDi] Negative method"), ["nag", "nasa"]
    arguments[6] = axes.index("Nothing")
    arguments[labels.index("Include Sub Images")] = True
    prompt = PROMPT + tag(base, "one-step")
    made = webui.draw(prompt, negative_prompt=UNWANTED, script_name="x/y/z plot", script_args=arguments)
    wanted = [expected(base, [3], method=method, scale=scale)[0] for method in ("nag", "nasa") for scale in (0.0, 1.0)]
    cells = [picture for picture in made.pictures if picture.shape == wanted[0].shape]
    assert close(Made(cells, [], {}), wanted)
