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

// Draw while typing: some time after the last key in the prompt, one of the panel's hidden buttons is pressed. They take
// turns, because older versions of gradio drop a press while the one before is on its way. All else is in
// a1111_extension/live.py.
const WADI_PAUSE = 100; // ms

onUiLoaded(function () {
    const panel = "#script_txt2img_wadi_live";
    const prompt = gradioApp().querySelector("#txt2img_prompt textarea");
    const buttons = gradioApp().querySelectorAll('[id^="' + panel.slice(1) + '_draw_"]');
    if (!prompt || !buttons.length) {
        return;
    }
    let waiting = 0, turn = 0;
    prompt.addEventListener("input", function () {
        clearTimeout(waiting);
        if (gradioApp().querySelector(panel + " input").checked) {
            waiting = setTimeout(() => buttons[turn++ % buttons.length].click(), WADI_PAUSE);
        }
    });
});
