/**
 * What the WaDi nodes say on the canvas.
 *
 * A panel at the foot of a node shows: on the loaders, the chosen file's thumbnail and what is in it; on every WaDi node,
 * the line that it reported when it ran; on samplers, what would go wrong with one-step weights before it does.
 *
 * Links are followed by hand rather than through app.graphToPrompt(), because that serialises every widget of the graph,
 * and with some of them (webcam, painter) that takes a picture or uploads a file.
 */
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const SAMPLER = "wadi_one_step";
const WRONG_SAMPLERS = ["uni_pc", "uni_pc_bh2", "dpm_fast", "dpm_adaptive"];
const WRONG_SCHEDULERS = ["ddim_uniform", "kl_optimal"];
const STOCK_SAMPLERS = ["KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"];
const OUR_SAMPLERS = ["WaDi_OneStepSampler", "WaDi_OneStepCustomSampling"];
const FILE_NODES = ["WaDi_LoadLoRaD", "WaDi_OpenLoRaD"];
const PRIMITIVES = ["PrimitiveNode", "PrimitiveInt", "PrimitiveFloat", "PrimitiveBoolean", "PrimitiveString"];
const MUTED = 2;
const BYPASSED = 4;
const MARGIN = 6;

// ---------------------------------------------------------------------------------------------- following the links

/** Where an input's value comes from: {node, slot, path}, path being the subgraph nodes around it, outermost first. */
function source(node, slot, path) {
  return follow(node.graph, node.graph?.getLink(node.inputs?.[slot]?.link), path);
}

function follow(graph, link, path) {
  if (!link) return undefined;
  if (link.originIsIoNode) {
    const host = path.at(-1);
    if (!host) return undefined;
    const outside = path.slice(0, -1);
    // An input of the subgraph that nothing is linked to is a widget on the subgraph's node.
    const linked = host.inputs?.[link.origin_slot]?.link != null;
    return linked ? source(host, link.origin_slot, outside) : { node: host, promoted: link.origin_slot, path: outside };
  }
  return output(graph.getNodeById(link.origin_id), link.origin_slot, path);
}

function output(node, slot, path) {
  if (!node || node.mode === MUTED) return undefined;
  if (node.mode === BYPASSED) {
    const type = node.outputs[slot]?.type;
    const same = node.inputs?.[slot]?.type === type ? slot : node.inputs?.findIndex((input) => input.type === type);
    return same >= 0 ? source(node, same, path) : undefined;
  }
  if (node.isSubgraphNode?.()) {
    const inner = node.resolveSubgraphOutputLink(slot);
    return inner && follow(node.subgraph, inner.link, [...path, node]);
  }
  if (node.isVirtualNode && !PRIMITIVES.includes(node.type)) {
    const other = node.resolveVirtualOutput?.(slot);
    return other ? output(other.node, other.slot, path) : follow(node.graph, node.getInputLink(slot), path);
  }
  return { node, slot, path };
}

function inputNamed(node, name, path) {
  const slot = node.inputs?.findIndex((input) => input.name === name) ?? -1;
  return slot < 0 ? undefined : source(node, slot, path);
}

/** The value of a widget, also where it is fed by a primitive or lifted onto a subgraph; undefined where not known. */
function valueOf(node, name, path) {
  const slot = node.inputs?.findIndex((input) => input.widget?.name === name) ?? -1;
  if (slot >= 0 && node.inputs[slot].link != null) {
    const from = source(node, slot, path);
    if (from?.promoted !== undefined) {
      const lifted = from.node.inputs[from.promoted];
      return from.node.widgets?.find((widget) => widget.name === (lifted.widget?.name ?? lifted.name))?.value;
    }
    return PRIMITIVES.includes(from?.node.type) ? from.node.widgets?.[0]?.value : undefined;
  }
  return node.widgets?.find((widget) => widget.name === name)?.value;
}

function* everyNode(graph, path = []) {
  for (const node of graph?.nodes ?? []) {
    yield [node, path];
    if (node.isSubgraphNode?.()) yield* everyNode(node.subgraph, [...path, node]);
  }
}

// ------------------------------------------------------------------------------------------ what the adapters' files say

const files = new Map(); // file name -> its metadata, null where there is none, undefined while it is on its way

function metadataOf(name) {
  if (typeof name !== "string" || !name) return null;
  if (!files.has(name)) {
    files.set(name, undefined);
    readMetadata(name).then((found) => {
      files.set(name, found);
      review();
    });
  }
  return files.get(name);
}

async function readMetadata(name) {
  for (const folder of ["lorad", "loras"]) {
    const answer = await api.fetchApi(`/view_metadata/${folder}?filename=${encodeURIComponent(name)}`);
    if (answer.ok) return await answer.json();
  }
  return null;
}

/** True, false, or undefined as long as nobody knows. Factors without our metadata are the authors': one-step. */
function fileIsOneStep(name) {
  const metadata = metadataOf(name);
  if (metadata === undefined) return undefined;
  return metadata === null || !("wadi.format" in metadata) || "wadi.timestep" in metadata;
}

/** Whether a MODEL (or LORAD) carries one-step weights: true, false, or undefined where that cannot be told. */
function isOneStep(at, depth = 0) {
  if (!at || depth > 200) return undefined;
  const { node, path } = at;
  const upstream = (name) => isOneStep(inputNamed(node, name, path), depth + 1);
  const applied = (adapter) => (valueOf(node, "strength", path) === 0 ? false : adapter());
  switch (node.type) {
    case "WaDi_OneStepModel":
      return true;
    case "WaDi_EmbeddedModel":
      return node.outputs[at.slot]?.type === "LORAD"; // its MODEL is the multi-step teacher
    case "WaDi_OpenLoRaD":
      return fileIsOneStep(valueOf(node, "lorad_name", path));
    case "WaDi_ExtractLoRaD":
      return true; // an adapter is extracted from a one-step student
    case "WaDi_LoadLoRaD":
      return either(applied(() => fileIsOneStep(valueOf(node, "lorad_name", path))), () => upstream("model"));
    case "WaDi_ApplyLoRaD":
      return either(applied(() => upstream("lorad")), () => upstream("model"));
  }
  // Anything else passes its model on (LoRA, ControlNet, patches, merges), or is a loader of an ordinary network.
  return (node.inputs ?? [])
    .map((input, slot) => [input, slot])
    .filter(([input]) => input.type === "MODEL" || (input.type === "*" && input.link != null))
    .reduce((known, [, slot]) => either(known, () => isOneStep(source(node, slot, path), depth + 1)), false);
}

function either(first, second) {
  if (first === true) return true;
  const other = second();
  return other === true || (first === false && other === false) ? other : undefined;
}

// ------------------------------------------------------------------------------------------------------- the warnings

/** All that is set for one sampling: on the sampler itself, and on the nodes that make its sampler, sigmas and guider. */
function settingsOf(node, path) {
  const found = { path, model: inputNamed(node, "model", path) };
  for (const name of ["steps", "cfg", "denoise", "sampler_name", "scheduler", "add_noise", "start_at_step"]) {
    const value = valueOf(node, name, path);
    if (value !== undefined) found[name] = value;
  }
  for (const input of node.inputs ?? []) {
    if (!["SAMPLER", "SIGMAS", "GUIDER"].includes(input.type)) continue;
    const from = inputNamed(node, input.name, path);
    if (!from) continue;
    const { model, ...rest } = settingsOf(from.node, from.path);
    Object.assign(found, rest);
    if (input.type === "GUIDER") found.model = model;
  }
  return found;
}

/** Names of messages for a sampler, most important first. A name that begins with "note" is no warning. */
function remarksOn(node, path) {
  const set = settingsOf(node, path);
  const ours = OUR_SAMPLERS.includes(node.type);
  const exact = set.sampler_name === SAMPLER;
  const oneStep = isOneStep(set.model);
  if (oneStep === false) return ours || exact ? ["warn_no_weights"] : [];
  if (oneStep !== true || ours) return [];

  const remarks = [];
  if (set.cfg !== undefined && set.cfg !== 1) remarks.push("warn_cfg");
  if (set.add_noise === "disable" || set.add_noise === false) remarks.push("warn_noise");
  if (set.steps !== undefined && set.steps !== 1) remarks.push(exact ? "note_steps" : "warn_steps");
  if (set.denoise < 1 || set.start_at_step > 0) remarks.push(exact ? "note_denoise" : "warn_denoise");
  if (!exact && WRONG_SAMPLERS.includes(set.sampler_name)) remarks.push("warn_sampler");
  if (!exact && WRONG_SCHEDULERS.includes(set.scheduler)) remarks.push("warn_scheduler");
  return remarks;
}

// ----------------------------------------------------------------------------------------------------------- the panel

const panels = new WeakMap(); // node -> Panel
const reports = new WeakMap(); // node -> lines that it sent when it ran

class Panel {
  constructor(node) {
    this.node = node;
    this.height = 0;
    this.shown = "";
    this.inner = document.createElement("div");
    this.inner.className = "wadi-panel";
    const outer = document.createElement("div");
    outer.append(this.inner);
    this.widget = node.addDOMWidget("wadi_panel", "wadi_panel", outer, {
      serialize: false,
      hideOnZoom: false,
      hideInPanel: true,
      margin: MARGIN,
      getValue: () => "",
      getMinHeight: () => this.height,
      getMaxHeight: () => this.height,
    });
    this.widget.serialize = false;
    new ResizeObserver(() => this.fit(this.inner.offsetHeight + 2 * MARGIN)).observe(this.inner);
  }

  show(content) {
    const key = JSON.stringify(content);
    if (key === this.shown) return;
    this.shown = key;
    const children = content.lines.map(({ kind, text }) => {
      const line = document.createElement("div");
      line.className = `wadi-${kind}`;
      line.textContent = text;
      return line;
    });
    if (content.picture) {
      const picture = document.createElement("img");
      picture.src = content.picture;
      picture.alt = "";
      children.unshift(picture);
    }
    this.inner.replaceChildren(...children);
  }

  /** A node that was as small as its content allows stays so; one that somebody made larger keeps its size. */
  fit(height) {
    if (height === this.height || !this.inner.isConnected) return;
    const { node } = this;
    const tight = node.size[1] <= node.computeSize()[1] + 1;
    this.height = height;
    this.settle(tight);
  }

  settle(tight) {
    const { node } = this;
    const needed = node.computeSize()[1];
    if (tight || node.size[1] < needed) node.setSize([node.size[0], needed]);
    node.setDirtyCanvas?.(true, true);
  }

  remove() {
    const { node } = this;
    const tight = node.size[1] <= node.computeSize()[1] + 1;
    node.removeWidget(this.widget);
    panels.delete(node);
    this.settle(tight);
  }
}

function showOn(node, content) {
  const empty = !content.lines.length && !content.picture;
  if (empty) return panels.get(node)?.remove();
  if (!panels.has(node)) panels.set(node, new Panel(node));
  panels.get(node).show(content);
}

// --------------------------------------------------------------------------------------------------------- all together

let texts = {}; // language -> messages; they are translated in the pack's locales folder, with everything else
let waiting = false;

function say(name) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  return texts[language]?.[name] ?? texts.en?.[name] ?? name;
}

/** Title, rank and base of the chosen file, and its thumbnail. */
function describeFile(node, path) {
  const metadata = metadataOf(valueOf(node, "lorad_name", path));
  if (!metadata) return { lines: [] };
  const thumbnail = metadata["modelspec.thumbnail"] ?? "";
  const rank = metadata["ss_network_dim"];
  const facts = [
    metadata["wadi.architecture"],
    rank && `${say("rank")} ${rank}`,
    say(fileIsOneStep(valueOf(node, "lorad_name", path)) ? "one_step" : "ordinary"),
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
  const contents = new Map();
  for (const [node, path] of everyNode(app.rootGraph ?? app.graph)) {
    const ours = node.type?.startsWith("WaDi_");
    const sampler = STOCK_SAMPLERS.includes(node.type) || OUR_SAMPLERS.includes(node.type);
    if (!ours && !sampler) continue;
    const content = contents.get(node) ?? { picture: undefined, lines: [] };
    contents.set(node, content);
    const add = (line) => content.lines.some(({ text }) => text === line.text) || content.lines.push(line);
    if (FILE_NODES.includes(node.type)) {
      const described = describeFile(node, path);
      content.picture ??= described.picture;
      described.lines.forEach(add);
    }
    for (const text of reports.get(node) ?? []) add({ kind: text.includes("\n") ? "table" : "report", text });
    if (sampler && node.mode !== MUTED && node.mode !== BYPASSED) {
      for (const name of remarksOn(node, path)) add({ kind: name.split("_")[0], text: say(name) });
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

function keepReport(node, message) {
  if (!node?.type?.startsWith("WaDi_") || !Array.isArray(message?.text)) return;
  reports.set(
    node,
    message.text.filter((text) => typeof text === "string" && text),
  );
  review();
}

const STYLE = `
.wadi-panel { font: 12px/1.4 sans-serif; color: var(--input-text); overflow-wrap: anywhere; user-select: text; }
.wadi-panel > * { margin-top: 3px; }
.wadi-panel img { display: block; max-width: 100%; max-height: 128px; margin: 0 auto 4px; border-radius: 4px; }
.wadi-title { font-weight: 600; }
.wadi-info { opacity: 0.75; }
.wadi-report { white-space: pre-wrap; }
.wadi-table { font: 11px/1.4 monospace; white-space: pre; overflow-x: auto; }
.wadi-warn, .wadi-note { padding: 3px 6px; border-left: 3px solid; border-radius: 3px; }
.wadi-warn { color: #f4c264; background: #4a3508; border-color: #e69a11; }
.wadi-note { color: #b9d3ee; background: #1f3347; border-color: #5b95cf; }
`;

app.registerExtension({
  name: "WaDi.Panels",

  async setup() {
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
    api.addEventListener("graphChanged", review);
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
    review();
  },

  afterConfigureGraph: review,

  /** Outputs of an earlier run come back with a workflow's tab. */
  onNodeOutputsUpdated(outputs) {
    const graph = app.rootGraph ?? app.graph;
    for (const [id, message] of Object.entries(outputs ?? {})) keepReport(graph?.getNodeById(id), message);
  },
});
