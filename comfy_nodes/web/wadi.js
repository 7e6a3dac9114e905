/**
 * What the WaDi nodes say on the canvas.
 *
 * A panel at the foot of a node shows: on the loaders, the chosen file's thumbnail and what is in it; on every WaDi node,
 * the line that it reported when it ran; on samplers, what would go wrong with one-step weights before it does.
 *
 * ComfyUI loads every script of this folder. This one alone registers an extension, the others are its parts.
 */
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { BYPASSED, MUTED, Walk, everyNode } from "./links.js";
import { STYLE, showOn } from "./panels.js";
import { isSampler, remarksOn, saysOneStep } from "./remarks.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2)); // its folder, whatever it is called
const FILE_NODES = ["WaDi_LoadLoRaD", "WaDi_OpenLoRaD"];
const STRENGTH_NODES = ["WaDi_LoadLoRaD", "WaDi_ApplyLoRaD"];
const WARNINGS = "WaDi.Nodes.Warnings";
const STRENGTH = "WaDi.Nodes.Strength";
const SLOT_COLOUR = "#a3e635"; // of LORAD
const KEPT = "wadi_report"; // the property in which a node keeps what it said

const ours = (node) => node?.type?.startsWith("WaDi_");
const setting = (name) => app.extensionManager?.setting?.get(name);

// ------------------------------------------------------------------------------------------ what the adapters' files say

const FRESH = 5000; // ms for which an answer is not asked for again
const files = new Map(); // file name -> {metadata, asked}; metadata is null without any, undefined while it is on its way

function metadataOf(name) {
  if (typeof name !== "string" || !name) return null;
  const file = files.get(name) ?? { metadata: undefined, asked: -FRESH };
  files.set(name, file);
  if (performance.now() - file.asked >= FRESH) {
    file.asked = Infinity;
    readMetadata(name)
      .catch(() => file.metadata) // no answer: what was known holds until the next look
      .then((found) => {
        file.asked = performance.now();
        const changed = JSON.stringify(found) !== JSON.stringify(file.metadata);
        file.metadata = found;
        if (changed) review();
      });
  }
  return file.metadata;
}

/** The browser keeps the answer, and the server says whether the file has changed since. */
async function readMetadata(name) {
  const answer = await api.fetchApi(`/wadi/lorad?name=${encodeURIComponent(name)}`, { cache: "no-cache" });
  return answer.ok ? (await answer.json()).metadata : null;
}

// ------------------------------------------------------------------------------------------------ what the nodes reported

/** The settings that a report is about. Seeds change with every run and are no part of them. */
function settingsOf(node) {
  const widgets = (node.widgets ?? []).filter(({ name }) => !/^wadi_panel$|seed|control_after_generate/.test(name));
  return JSON.stringify(widgets.map(({ name, value }) => [name, value]));
}

/**
 * Keeps a node's report in its properties: ComfyUI sends nothing for a node that it has cached, and a saved workflow comes
 * back with what was said. It is shown as long as the node's settings are those that it was said about.
 */
function keepReport(node, message) {
  const { text, wadi_notices: notices } = message ?? {};
  const said = (Array.isArray(text) ? text : []).filter((line) => typeof line === "string" && line);
  const coded = (Array.isArray(notices) ? notices : []).filter((notice) => typeof notice?.code === "string");
  const lines = said.filter((line) => !coded.some((notice) => notice.text === line));
  if (lines.length + coded.length) node.properties[KEPT] = { lines, notices: coded, settings: settingsOf(node) };
  else delete node.properties[KEPT];
  review();
}

/** What a node reported, as lines of its panel. */
function reportOf(node) {
  const kept = node.properties?.[KEPT];
  if (!Array.isArray(kept?.lines) || kept.settings !== settingsOf(node)) return [];
  const lines = kept.lines.map((text) => ({ kind: text.includes("\n") ? "table" : "report", text }));
  const notices = setting(WARNINGS) === false || !Array.isArray(kept.notices) ? [] : kept.notices;
  return [...lines, ...notices.map(({ code, text, values }) => ({ kind: kindOf(code), text: say(code, values, text) }))];
}

/** The node of an execution's id, which names the subgraph nodes around it: "4" or "12:4". */
function nodeOf(id) {
  let [graph, node] = [app.rootGraph ?? app.graph, undefined];
  for (const part of String(id ?? "").split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

// --------------------------------------------------------------------------------------------------------- all together

let texts = {}; // language -> messages; they are translated in the pack's locales folder, with everything else
let waiting = false;

/** A message in the front end's language, with the values that it names as %name%. */
function say(name, values = {}, fallback = name) {
  const language = setting("Comfy.Locale") ?? "en";
  const message = texts[language]?.[name] ?? texts.en?.[name] ?? fallback;
  return message.replace(/%(\w+)%/g, (whole, value) => values?.[value] ?? whole);
}

/** "warn" or "note", which is what the name of a message begins with. */
const kindOf = (name) => (name.startsWith("note_") ? "note" : "warn");

/** Title, rank and base of the chosen file, and its thumbnail. */
function describeFile(walk, node, path) {
  const metadata = metadataOf(walk.valueOf(node, "lorad_name", path));
  if (!metadata) return { lines: [] };
  const thumbnail = metadata["modelspec.thumbnail"] ?? "";
  const rank = metadata["ss_network_dim"];
  const facts = [
    metadata["wadi.architecture"],
    rank && `${say("rank")} ${rank}`,
    say(saysOneStep(metadata) ? "one_step" : "ordinary"),
  ];
  const title = metadata["modelspec.title"];
  return {
    picture: /^data:image\/(png|jpeg|webp);base64,/.test(thumbnail) ? thumbnail : undefined,
    lines: [
      ...(title ? [{ kind: "title", text: title }] : []),
      { kind: "info", text: facts.filter(Boolean).join(" · ") },
    ],
  };
}

function reviewNow() {
  waiting = false;
  const walk = new Walk();
  const contents = new Map();
  for (const [node, path] of everyNode(app.rootGraph ?? app.graph)) {
    const sampler = isSampler(node);
    if (!ours(node) && !sampler) continue;
    const content = contents.get(node) ?? { picture: undefined, lines: [] };
    contents.set(node, content);
    const add = (line) => content.lines.some(({ text }) => text === line.text) || content.lines.push(line);
    if (FILE_NODES.includes(node.type)) {
      const described = describeFile(walk, node, path);
      content.picture ??= described.picture;
      described.lines.forEach(add);
    }
    reportOf(node).forEach(add);
    if (sampler && node.mode !== MUTED && node.mode !== BYPASSED && setting(WARNINGS) !== false) {
      for (const name of remarksOn(walk, node, path, metadataOf)) add({ kind: kindOf(name), text: say(name) });
    }
  }
  for (const [node, content] of contents) showOn(node, content);
}

/** Looks at the graph again, once for however many changes come together. */
function review() {
  if (waiting) return;
  waiting = true;
  setTimeout(reviewNow, 50);
}

/** Gives LORAD its colour. A palette overwrites the colours of all types, with nothing where it does not know one. */
function colourSlots() {
  const { canvas } = app;
  for (const colours of [canvas?.default_connection_color_byType, canvas?.constructor.link_type_colors]) {
    if (!colours) continue;
    let chosen = colours.LORAD;
    const get = () => chosen || SLOT_COLOUR;
    const set = (colour) => (chosen = colour);
    Object.defineProperty(colours, "LORAD", { get, set, enumerable: true, configurable: true });
  }
}

/** ComfyUI lists the templates as the disk does; their names are numbered. */
function sortTemplates() {
  const asListed = api.getWorkflowTemplates;
  api.getWorkflowTemplates = async function () {
    const packs = await asListed.apply(this, arguments);
    packs[PACK]?.sort();
    return packs;
  };
}

app.registerExtension({
  name: "WaDi.Panels",

  settings: [
    {
      id: WARNINGS,
      category: ["WaDi", "Nodes", "Warnings"],
      name: "Warn about settings that do not suit one step",
      tooltip: "On samplers: steps, cfg, denoise, sampler and scheduler, and where no one-step weights arrive.",
      type: "boolean",
      defaultValue: true,
      onChange: review,
    },
    {
      id: STRENGTH,
      category: ["WaDi", "Nodes", "Strength"],
      name: "Strength of a new LoRaD node",
      tooltip: "What Load LoRaD and Apply LoRaD are set to when they are added to a graph.",
      type: "number",
      attrs: { min: -4, max: 4, step: 0.05, showButtons: true, maxFractionDigits: 2 },
      defaultValue: 1,
    },
  ],

  async setup() {
    const style = document.createElement("style");
    style.textContent = `${STYLE}\n:root { --color-datatype-LORAD: ${SLOT_COLOUR}; }`;
    document.head.append(style);
    sortTemplates();
    colourSlots();
    api.addEventListener("graphChanged", review);
    // A node that runs again has nothing to say until it does; one that is cached does not run.
    api.addEventListener("executing", ({ detail }) => {
      const node = nodeOf(detail);
      if (ours(node)) keepReport(node, undefined);
    });
    const answer = await api.fetchApi("/i18n");
    const languages = answer.ok ? await answer.json() : {};
    texts = Object.fromEntries(Object.entries(languages).map(([language, all]) => [language, all.wadi ?? {}]));
    review();
  },

  nodeCreated(node) {
    if (node.comfyClass?.startsWith("WaDi_")) {
      const before = node.onExecuted;
      node.onExecuted = function (message) {
        before?.apply(this, arguments);
        keepReport(this, message);
      };
    }
    const strength = node.widgets?.find(({ name }) => name === "strength");
    // A saved node gets its own value after this.
    if (strength && STRENGTH_NODES.includes(node.comfyClass)) strength.value = setting(STRENGTH) ?? strength.value;
    review();
  },

  afterConfigureGraph: review,

  /** "Refresh" reads the model folders again. */
  refreshComboInNodes() {
    files.clear();
    review();
  },
});
