/** The panel at the foot of a node: lines of text, and a picture. It registers nothing of its own. */
const MARGIN = 6;
const panels = new WeakMap(); // node -> Panel

export const STYLE = `
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

/** Show {picture, lines: [{kind, text}]} on a node; with neither, the panel goes away. */
export function showOn(node, content) {
  const empty = !content.lines.length && !content.picture;
  if (empty) return panels.get(node)?.remove();
  if (!panels.has(node)) panels.set(node, new Panel(node));
  panels.get(node).show(content);
}
