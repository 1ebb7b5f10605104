const CHUNK = 256; // tokens that are added to the page at once

/** The text of a panel: a list of tokens by part, filled as it is scrolled into view. */
class TokenList {
  constructor(element, panel, state, { onPoint, onPick, onMove }) {
    Object.assign(this, { element, panel, state });
    element.classList.toggle("numbered", !panel.texts.length);
    this.chunks = [];
    this.spans = new Array(panel.size);
    this.marks = new Uint8Array(panel.size);
    this.seeing = [];
    this.observer = new IntersectionObserver(
      (entries) => entries.forEach((entry) => entry.isIntersecting && this.#fill(entry.target)),
      { root: element, rootMargin: "300px" },
    );
    panel.bands.forEach((band) => this.#addBand(band));
    const tokenAt = (event) => {
      const span = event.target.closest("[data-token]");
      return span ? Number(span.dataset.token) : -1;
    };
    element.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse") onPoint(tokenAt(event));
    });
    element.addEventListener("pointerleave", () => onPoint(-1));
    element.addEventListener("click", (event) => {
      const token = tokenAt(event);
      if (token >= 0) onPick(token);
    });
    element.addEventListener("keydown", (event) => onMove(event));
  }

  #addBand(band) {
    const group = document.createElement("div");
    group.className = "part";
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", `${PART_NAMES[band.label] ?? `segment ${band.label.slice(1)}`}`);
    group.style.setProperty("--part", `var(--${band.colour})`);
    const label = document.createElement("span");
    label.className = "part-label";
    label.setAttribute("aria-hidden", "true");
    label.textContent = band.label;
    group.append(label);
    for (let start = band.start; start < band.stop; start += CHUNK) {
      const chunk = document.createElement("span");
      const stop = Math.min(start + CHUNK, band.stop);
      chunk.className = "chunk";
      chunk.style.minHeight = `${Math.ceil((stop - start) / 12) * 1.7}em`;
      Object.assign(chunk.dataset, { start, stop });
      this.chunks.push(chunk);
      this.observer.observe(chunk);
      group.append(chunk);
    }
    this.element.append(group);
  }

  #fill(chunk) {
    if (chunk.childElementCount) return;
    this.observer.unobserve(chunk);
    chunk.style.minHeight = "";
    const { start, stop } = chunk.dataset;
    for (let token = Number(start); token < Number(stop); token++) {
      chunk.append(this.#span(token), "\u200b");
    }
  }

  #span(token) {
    const { panel } = this;
    const span = document.createElement("span");
    const text = panel.text(token);
    span.textContent = text.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "·";
    span.dataset.token = token;
    span.id = this.idOf(token);
    span.setAttribute("role", "option");
    const { label } = panel.band(token);
    span.setAttribute(
      "aria-label",
      `${text.trim() || JSON.stringify(text)}, ${label}, slot ${token}, position ${panel.positionOf[token]}`,
    );
    span.title = `slot ${token}, position ${panel.positionOf[token]}`;
    this.spans[token] = span;
    this.#mark(token, true);
    return span;
  }

  idOf(token) {
    return `${this.element.id}-token-${token}`;
  }

  /** Bring a token into the page and into view. */
  reveal(token) {
    const chunk = this.chunks.find(({ dataset }) => token < Number(dataset.stop));
    this.#fill(chunk);
    const box = this.spans[token].getBoundingClientRect();
    const list = this.element.getBoundingClientRect();
    if (box.top < list.top) this.element.scrollTop -= list.top - box.top + 20;
    if (box.bottom > list.bottom) this.element.scrollTop += box.bottom - list.bottom + 20;
  }

  /** Mark the selected token, what it sees and what sees it. */
  refresh() {
    const token = this.state.tokenIn(this.panel);
    const visible = this.state.visible(this.panel);
    this.keys = token < 0 ? [] : this.panel.layers.map((layer) => layer.keysOf(token));
    this.queries = token < 0 ? [] : this.panel.layers.map((layer) => layer.queriesOf(token));
    this.token = token;
    this.visible = visible;
    for (let i = 0; i < this.panel.size; i++) if (this.spans[i]) this.#mark(i);
    if (token >= 0) this.element.setAttribute("aria-activedescendant", this.idOf(token));
    else this.element.removeAttribute("aria-activedescendant");
  }

  #mark(token, isNew = false) {
    const found = (lists, what) => (lists ?? []).findIndex((list) => list[token] === what);
    const seen = found(this.keys, SEEN);
    const seenBy = found(this.queries, SEEN);
    const isUnknown = Math.max(found(this.keys, UNKNOWN), found(this.queries, UNKNOWN)) >= 0;
    const isSelected = token === this.token;
    const isFuture = token >= (this.visible ?? this.panel.size);
    const isApart = this.token >= 0 && seen < 0 && seenBy < 0 && !isUnknown;
    const flags = [isSelected, isFuture, isApart, isUnknown];
    const mark = flags.reduce((bits, flag) => 2 * bits + flag, 4 * (seen + 1) + seenBy + 1);
    if (!isNew && this.marks[token] === mark) return;
    this.marks[token] = mark;
    const span = this.spans[token];
    const names = ["token"];
    if (seen >= 0) names.push("seen", `layer-${seen}`);
    if (seenBy >= 0) names.push("sees-it");
    if (isSelected) names.push("selected");
    if (isApart) names.push("apart");
    if (isUnknown) names.push("unknown");
    span.className = names.join(" ");
    span.hidden = isFuture;
    span.setAttribute("aria-selected", String(isSelected));
  }

  /** What the selected token sees and what sees it, in a sentence. */
  sentence() {
    const { panel, token, visible } = this;
    if (token === undefined || token < 0) return "";
    const count = (lists, layer) => {
      let seen = 0;
      let open = 0;
      for (let i = 0; i < visible; i++) {
        seen += lists[layer][i] === SEEN;
        open += lists[layer][i] === UNKNOWN;
      }
      return open ? `${seen} to ${seen + open}` : String(seen);
    };
    const band = panel.band(token);
    const text = panel.text(token);
    const name = text ? ` ${JSON.stringify(text)}` : "";
    const who = `${band.label} token${name}, slot ${token}, position ${panel.positionOf[token]}`;
    if (panel.isDifference) {
      const seen = panel.layers.map((layer, i) => `${layer.name}: ${count(this.keys, i)}`);
      return `${who}. Of the tokens before it: ${seen.join("; ")}.`;
    }
    const parts = new Set();
    for (let i = 0; i < visible; i++) if (this.keys[0][i] !== MASKED) parts.add(panel.band(i).label);
    return (
      `${who}, sees ${count(this.keys, 0)} tokens (${[...parts].join(", ")}); ` +
      `${count(this.queries, 0)} see it.`
    );
  }
}
