// The panel's tick is on its own: the program ticks such an accordion when it is opened and unticks it when it is closed,
// until its box is clicked. A LoRaD that is chosen must not be lost by closing the panel.
onUiLoaded(function () {
    for (const tab of ["txt2img", "img2img"]) {
        const box = gradioApp().querySelector("#script_" + tab + "_wadi_accordion-visible-checkbox");
        if (box) {
            box.click();
            box.click();
        }
    }
});

// Draw while typing: some time after the last key in the prompt, the panel's hidden button is pressed. All else is in
// a1111_extension/live.py.
const WADI_PAUSE = 100; // ms

onUiLoaded(function () {
    const prompt = gradioApp().querySelector("#txt2img_prompt textarea");
    const part = (name) => gradioApp().querySelector("#script_txt2img_wadi_" + name);
    if (!prompt || !part("live") || !part("live_draw")) {
        return;
    }
    let waiting = 0;
    prompt.addEventListener("input", function () {
        clearTimeout(waiting);
        if (part("live").querySelector("input").checked) {
            waiting = setTimeout(() => part("live_draw").click(), WADI_PAUSE);
        }
    });
});
