/**
 * Following the links of a graph, through subgraphs, reroutes and bypassed nodes. It registers nothing of its own.
 *
 * Links are followed by hand rather than through app.graphToPrompt(), because that serialises every widget of the graph,
 * and with some of them (webcam, painter) that takes a picture or uploads a file.
 */
export const MUTED = 2;
export const BYPASSED = 4;
const PRIMITIVES = ["PrimitiveNode", "PrimitiveInt", "PrimitiveFloat", "PrimitiveBoolean", "PrimitiveString"];
const DEEPEST = 300; // nodes in a row; a browser's stack ends somewhere

/** Newer front ends want to be asked, older ones only have the field. A subgraph's node answers with a link inside of it. */
function linkInto(node, slot) {
  if (slot < 0 || !node.graph) return undefined;
  const asked = node.getInputLink && !node.isSubgraphNode?.();
  return asked ? node.getInputLink(slot) : node.graph.getLink(node.inputs?.[slot]?.link);
}

export function isLinked(node, slot) {
  return node.isInputConnected ? node.isInputConnected(slot) : linkInto(node, slot) != null;
}

/** Every node with the subgraph nodes around it, outermost first. */
export function* everyNode(graph, path = []) {
  for (const node of graph?.nodes ?? []) {
    yield [node, path];
    if (node.isSubgraphNode?.()) yield* everyNode(node.subgraph, [...path, node]);
  }
}

/**
 * One look at a graph, with a memory: a place that many ways lead to is looked at once.
 *
 * A place is {node, slot, path}: an output of a node, path being the subgraph nodes around it, outermost first.
 */
export class Walk {
  visits = 0; // places that were looked at, which is what a walk costs
  #known = new WeakMap(); // node -> question and place -> answer
  #depth = 0;

  /** The answer to a question about a place; undefined in a loop, and where it would lie too deep. */
  once(question, { node, slot, path }, answer) {
    const key = [question, slot, ...path.map((host) => host.id)].join();
    if (!this.#known.has(node)) this.#known.set(node, new Map());
    const answers = this.#known.get(node);
    if (answers.has(key)) return answers.get(key);
    if (this.#depth > DEEPEST) return undefined;
    answers.set(key, undefined);
    this.visits += 1;
    this.#depth += 1;
    answers.set(key, answer());
    this.#depth -= 1;
    return answers.get(key);
  }

  /** The place that an input's value comes from. */
  source(node, slot, path) {
    return this.#follow(node.graph, linkInto(node, slot), path);
  }

  inputNamed(node, name, path) {
    return this.source(node, node.inputs?.findIndex((input) => input.name === name) ?? -1, path);
  }

  /** The value of a widget, also where it is fed by a primitive or lifted onto a subgraph; undefined where not known. */
  valueOf(node, name, path) {
    const slot = node.inputs?.findIndex((input) => input.widget?.name === name) ?? -1;
    if (slot >= 0 && isLinked(node, slot)) {
      const from = this.source(node, slot, path);
      if (from?.promoted !== undefined) {
        const lifted = from.node.inputs[from.promoted];
        return from.node.widgets?.find((widget) => widget.name === (lifted.widget?.name ?? lifted.name))?.value;
      }
      return PRIMITIVES.includes(from?.node.type) ? from.node.widgets?.[0]?.value : undefined;
    }
    return node.widgets?.find((widget) => widget.name === name)?.value;
  }

  #follow(graph, link, path) {
    if (!link) return undefined;
    if (link.originIsIoNode) {
      const host = path.at(-1);
      if (!host) return undefined;
      const [slot, outside] = [link.origin_slot, path.slice(0, -1)];
      // An input of the subgraph that nothing is linked to is a widget on the subgraph's node.
      return isLinked(host, slot) ? this.source(host, slot, outside) : { node: host, promoted: slot, path: outside };
    }
    const node = graph.getNodeById(link.origin_id);
    return node ? this.#output({ node, slot: link.origin_slot, path }) : undefined;
  }

  #output(place) {
    return this.once("origin", place, () => this.#originOf(place));
  }

  #originOf({ node, slot, path }) {
    if (node.mode === MUTED) return undefined;
    if (node.mode === BYPASSED) {
      const type = node.outputs[slot]?.type;
      const same = node.inputs?.[slot]?.type === type ? slot : node.inputs?.findIndex((input) => input.type === type);
      return same >= 0 ? this.source(node, same, path) : undefined;
    }
    if (node.isSubgraphNode?.()) {
      const inner = node.resolveSubgraphOutputLink(slot);
      return inner && this.#follow(node.subgraph, inner.link, [...path, node]);
    }
    if (node.isVirtualNode && !PRIMITIVES.includes(node.type)) {
      const other = node.resolveVirtualOutput?.(slot);
      return other ? this.#output({ ...other, path }) : this.source(node, slot, path);
    }
    return { node, slot, path };
  }
}
