/** What would go wrong with one-step weights, found in the graph before it runs. It registers nothing of its own. */
import { isLinked } from "./links.js";

const SAMPLER = "wadi_one_step";
const WRONG_SAMPLERS = ["uni_pc", "uni_pc_bh2", "dpm_fast", "dpm_adaptive"];
const WRONG_SCHEDULERS = ["ddim_uniform", "kl_optimal"];
const STOCK_SAMPLERS = ["KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"];
const ROWS = [1, 2, 3, 4]; // of a LoRaD Stack
const OUR_SAMPLERS = ["WaDi_OneStepSampler", "WaDi_OneStepCustomSampling"];

export function isSampler(node) {
  return STOCK_SAMPLERS.includes(node.type) || OUR_SAMPLERS.includes(node.type);
}

/** Metadata of a LoRaD: true, false, or undefined as long as nobody knows. Without any it is the authors': one-step. */
export function saysOneStep(metadata) {
  if (metadata === undefined) return undefined;
  return metadata === null || !("wadi.format" in metadata) || "wadi.timestep" in metadata;
}

function either(first, second) {
  if (first === true) return true;
  const other = second();
  return other === true || (first === false && other === false) ? other : undefined;
}

/**
 * Whether a MODEL (or LORAD) carries one-step weights: true, false, or undefined where that cannot be told.
 *
 * metadataOf(name) returns what a file says of itself, null without anything, undefined while it is read.
 */
export function isOneStep(walk, place, metadataOf) {
  return place && walk.once("one step", place, () => lookUpstream(walk, place, metadataOf));
}

function lookUpstream(walk, { node, slot, path }, metadataOf) {
  const upstream = (name) => isOneStep(walk, walk.inputNamed(node, name, path), metadataOf);
  const strong = (name, adapter) => (walk.valueOf(node, name, path) === 0 ? false : adapter());
  const file = (name = "lorad_name") => saysOneStep(metadataOf(walk.valueOf(node, name, path)));
  switch (node.type) {
    case "WaDi_OneStepModel":
    case "WaDi_ExtractLoRaD": // an adapter is extracted from a one-step student
      return true;
    case "WaDi_EmbeddedModel":
      return node.outputs[slot]?.type === "LORAD"; // its MODEL is the multi-step teacher
    case "WaDi_OpenLoRaD":
      return file();
    case "WaDi_LoadLoRaD":
      return either(strong("strength", () => file()), () => upstream("model"));
    case "WaDi_LoRaDStack":
      return ROWS.filter((row) => walk.valueOf(node, `on_${row}`, path) !== false)
        .filter((row) => walk.valueOf(node, `lorad_${row}`, path) !== "none")
        .reduce((known, row) => either(known, () => strong(`strength_${row}`, () => file(`lorad_${row}`))), upstream("model"));
    case "WaDi_ApplyLoRaD":
      return either(strong("strength", () => upstream("lorad")), () => upstream("model"));
    case "LoraLoader": // which take a LoRaD file too
    case "LoraLoaderModelOnly": {
      const stock = () => {
        const metadata = metadataOf(walk.valueOf(node, "lora_name", path));
        return metadata === undefined ? undefined : metadata !== null && "wadi.timestep" in metadata;
      };
      return either(strong("strength_model", stock), () => upstream("model"));
    }
  }
  // Anything else passes its model on (ControlNet, patches, merges), or is a loader of an ordinary network.
  return (node.inputs ?? [])
    .map((input, index) => [input, index])
    .filter(([input, index]) => input.type === "MODEL" || (input.type === "*" && isLinked(node, index)))
    .reduce((known, [, index]) => either(known, () => isOneStep(walk, walk.source(node, index, path), metadataOf)), false);
}

/** All that is set for one sampling: on the sampler itself, and on the nodes that make its sampler, sigmas and guider. */
function settingsOf(walk, node, path) {
  const found = { model: walk.inputNamed(node, "model", path) };
  for (const name of ["steps", "cfg", "denoise", "sampler_name", "scheduler", "add_noise", "start_at_step"]) {
    const value = walk.valueOf(node, name, path);
    if (value !== undefined) found[name] = value;
  }
  for (const input of node.inputs ?? []) {
    if (!["SAMPLER", "SIGMAS", "GUIDER"].includes(input.type)) continue;
    const from = walk.inputNamed(node, input.name, path);
    if (!from) continue;
    const { model, ...rest } = walk.once("settings", from, () => settingsOf(walk, from.node, from.path)) ?? {};
    Object.assign(found, rest);
    if (input.type === "GUIDER") found.model = model;
  }
  return found;
}

/** Names of messages for a sampler, most important first. A name that begins with "note" is no warning. */
export function remarksOn(walk, node, path, metadataOf) {
  const set = settingsOf(walk, node, path);
  const ours = OUR_SAMPLERS.includes(node.type);
  const exact = set.sampler_name === SAMPLER;
  const oneStep = isOneStep(walk, set.model, metadataOf);
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
