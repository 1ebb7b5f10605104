const PART_NAMES = { P: "prefix", T: "fusion tail", G: "generated" };

/** The state that the user has chosen; every panel draws itself from it. */
class State {
  constructor(panels) {
    this.panels = panels;
    this.newTokens = panels[0].newTokens;
    this.step = this.newTokens;
    this.showsTiles = false;
    this.isSideBySide = panels.length > 1 && window.matchMedia("(min-width: 900px)").matches;
    this.current = 0;
    this.pinned = new Array(panels.length).fill(-1);
    this.pointed = null;
  }

  /** The number of tokens at this step. */
  visible(panel) {
    return panel.promptTokens + this.step;
  }

  /** The selected token of a panel, -1 if there is none. */
  tokenIn(panel) {
    const tokens = this.pointed ?? this.pinned;
    const token = tokens[this.panels.indexOf(panel)];
    return token < this.visible(panel) ? token : -1;
  }

  /** The same token of the request in every panel. */
  everywhere(panel, token) {
    if (token < 0) return null;
    return this.panels.map((each) => (each === panel ? token : each.counterpart(panel, token)));
  }
}

/** The controls, and a matrix and a list of tokens for each panel. */
class Page {
  constructor(data) {
    this.panels = data.panels.map((panel) => new Panel(panel));
    this.attention = data.attention;
    this.state = new State(this.panels);
    this.views = this.panels.map((panel, number) => this.#addPanel(panel, number));
    this.#addSwitches();
    this.#listen();
    this.setStep(this.state.step, false);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }

  #addPanel(panel, number) {
    const section = document.querySelector("#panel").content.cloneNode(true).firstElementChild;
    section.setAttribute("aria-label", panel.title);
    section.querySelector("h2").textContent = panel.title;
    section.querySelector(".summary").textContent = panel.summary;
    const canvas = section.querySelector("canvas");
    const list = section.querySelector(".tokens");
    list.id = `tokens-${number}`;
    list.setAttribute("aria-label", `Tokens under ${panel.title}`);
    canvas.setAttribute("aria-label", `Mask matrix of ${panel.title}. ${panel.summary}`);
    document.querySelector("#panels").append(section);
    const onPoint = (token) => this.point(panel, token);
    const onPick = (token) => this.pick(panel, token);
    const onMove = (event) => this.#move(panel, event);
    const matrix = new Matrix(canvas, panel, this.state, { onPoint, onPick });
    const tokens = new TokenList(list, panel, this.state, { onPoint, onPick, onMove });
    canvas.addEventListener("keydown", onMove);
    section.querySelector(".zoom-in").addEventListener("click", () => matrix.zoom(0.5));
    section.querySelector(".zoom-out").addEventListener("click", () => matrix.zoom(2));
    section.querySelector(".fit").addEventListener("click", () => matrix.fit());
    this.#addLegend(section.querySelector(".legend"), panel);
    return { section, matrix, tokens, canvas };
  }

  #addLegend(legend, panel) {
    const entries = panel.isDifference
      ? panel.layers.map((layer) => [layer.colour, layer.name, "both"])
      : [
          ["full", "full tile", "tiles"],
          ["partial", "partial tile", "tiles"],
          ["skipped", "tile skipped by the kernel", "both"],
        ];
    for (const [colour, meaning, view] of entries) {
      const entry = document.createElement("span");
      entry.className = `entry ${view}`;
      entry.style.setProperty("--entry", `var(--${colour})`);
      entry.textContent = meaning;
      legend.append(entry);
    }
  }

  #addSwitches() {
    const group = document.querySelector("#switches");
    group.hidden = this.panels.length < 2;
    document.querySelector("#side-by-side").hidden = this.panels.length < 2;
    this.panels.forEach((panel, number) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = panel.title;
      button.title = `key ${number + 1}`;
      button.addEventListener("click", () => this.switchTo(number));
      group.append(button);
    });
    document.querySelector("#stepper").hidden = this.state.newTokens === 0;
    document.querySelector("#step").max = this.state.newTokens;
    this.#showPanels();
  }

  #listen() {
    const on = (id, event, action) => document.querySelector(id).addEventListener(event, action);
    on("#side-by-side", "click", () => {
      this.state.isSideBySide = !this.state.isSideBySide;
      this.#showPanels();
    });
    on("#tiles", "click", () => this.showTiles(!this.state.showsTiles));
    on("#step", "input", (event) => this.setStep(Number(event.target.value)));
    on("#previous", "click", () => this.setStep(this.state.step - 1));
    on("#next", "click", () => this.setStep(this.state.step + 1));
    document.addEventListener("keydown", (event) => this.#shortcut(event));
  }

  #shortcut(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const actions = {
      Escape: () => this.pick(null, -1),
      "[": () => this.setStep(this.state.step - 1),
      "]": () => this.setStep(this.state.step + 1),
      t: () => this.showTiles(!this.state.showsTiles),
    };
    const number = Number(event.key);
    if (number >= 1 && number <= this.panels.length) this.switchTo(number - 1);
    else actions[event.key]?.();
  }

  /** Move the selection by keys: token by token, part by part. */
  #move(panel, event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const last = this.state.visible(panel) - 1;
    const token = this.state.pinned[this.panels.indexOf(panel)];
    const band = panel.band(Math.max(token, 0));
    const targets = {
      ArrowLeft: token - 1,
      ArrowRight: token + 1,
      ArrowUp: token > band.start ? band.start : (panel.bands[panel.bands.indexOf(band) - 1] ?? band).start,
      ArrowDown: band.stop,
      Home: 0,
      End: last,
    };
    if (!(event.key in targets)) return;
    event.preventDefault();
    this.pick(panel, Math.min(Math.max(targets[event.key], 0), last), true);
  }

  /** Show what a token sees while it is pointed at. */
  point(panel, token) {
    this.state.pointed = this.state.everywhere(panel, token);
    this.refresh();
  }

  /** Select a token until another is, or none with -1. */
  pick(panel, token, isExact = false) {
    const isAgain = !isExact && panel && this.state.pinned[this.panels.indexOf(panel)] === token;
    const tokens = isAgain ? null : this.state.everywhere(panel, token);
    this.state.pinned = tokens ?? new Array(this.panels.length).fill(-1);
    this.state.pointed = null;
    this.refresh();
    this.#reveal();
  }

  #reveal() {
    this.views.forEach(({ section, matrix, tokens }, number) => {
      const token = this.state.pinned[number];
      if (token < 0 || section.hidden) return;
      tokens.reveal(token);
      matrix.reveal(token, token);
    });
  }

  /** Go to the step at which `step` tokens are generated, and select the newest token. */
  setStep(step, selects = true) {
    const { state } = this;
    state.step = Math.min(Math.max(step, 0), state.newTokens);
    document.querySelector("#step").value = state.step;
    const what = state.step === 0 ? "prompt" : `${state.step} of ${state.newTokens} tokens generated`;
    document.querySelector("#step-text").textContent = what;
    document.querySelector("#step").setAttribute("aria-valuetext", what);
    const looked = this.attention[state.step - 1];
    if (this.attention.length) {
      document.querySelector("#looked").textContent = looked ? `Attention of generated token ${state.step}: ${looked}` : "";
    }
    document.querySelector("#previous").disabled = state.step === 0;
    document.querySelector("#next").disabled = state.step === state.newTokens;
    if (selects) {
      state.pinned = this.panels.map((panel) => state.visible(panel) - 1);
      state.pointed = null;
    }
    this.refresh();
    if (selects) this.#reveal();
  }

  switchTo(number) {
    this.state.current = number;
    this.state.isSideBySide = false;
    this.#showPanels();
  }

  showTiles(showsTiles) {
    this.state.showsTiles = showsTiles;
    document.querySelector("#tiles").setAttribute("aria-pressed", String(showsTiles));
    document.body.classList.toggle("shows-tiles", showsTiles);
    this.redraw();
  }

  #showPanels() {
    const { isSideBySide, current } = this.state;
    document.querySelector("#side-by-side").setAttribute("aria-pressed", String(isSideBySide));
    document.querySelector("#panels").classList.toggle("side-by-side", isSideBySide);
    const buttons = document.querySelectorAll("#switches button");
    buttons.forEach((button, number) => {
      button.setAttribute("aria-pressed", String(!isSideBySide && number === current));
    });
    this.views.forEach(({ section }, number) => {
      section.hidden = !isSideBySide && number !== current;
    });
    this.redraw();
    this.#reveal();
  }

  redraw() {
    this.views.forEach(({ matrix }) => matrix.redraw());
    this.refresh();
  }

  refresh() {
    const sentences = [];
    this.views.forEach(({ section, matrix, tokens }, number) => {
      if (section.hidden) return;
      matrix.refresh();
      tokens.refresh();
      const sentence = tokens.sentence();
      section.querySelector(".selection").textContent = sentence;
      if (sentence) sentences.push(`${this.panels[number].title}: ${sentence}`);
    });
    document.querySelector("#status").textContent = sentences.join(" ");
  }
}

window.flexmask = new Page(JSON.parse(document.querySelector("#data").textContent));
