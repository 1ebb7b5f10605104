const MARGIN = 20; // CSS pixels of the bands of parts
const BAND = 16;
const MIN_TILE_DOTS = 3; // smaller tiles are drawn by state alone
const MIN_GRID_DOTS = 7;
const MIN_SPAN = 8; // tokens along an axis when zoomed in fully

function makeCanvas(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

/** The matrix of a panel on a canvas: queries down, keys across. */
class Matrix {
  /** `onPoint(q, k)` and `onPick(q, k)` are called when the pointer moves and is pressed. */
  constructor(canvas, panel, state, { onPoint, onPick }) {
    Object.assign(this, { canvas, panel, state, onPoint, onPick });
    this.view = { q: 0, k: 0, span: panel.size };
    this.images = new Map();
    this.base = makeCanvas(1, 1);
    this.ink = makeCanvas(1, 1);
    this.isStale = true;
    new ResizeObserver(() => this.redraw()).observe(canvas);
    this.#listen();
  }

  /** Redraw everything with the next frame. */
  redraw() {
    this.isStale = true;
    this.images.clear();
    this.refresh();
  }

  /** Draw what depends on the selection with the next frame. */
  refresh() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.#draw();
    });
  }

  zoom(factor, q = this.view.q + this.view.span / 2, k = this.view.k + this.view.span / 2) {
    const { size } = this.panel;
    const span = Math.min(size, Math.max(Math.min(MIN_SPAN, size), this.view.span * factor));
    const ratio = span / this.view.span;
    this.#look(q - (q - this.view.q) * ratio, k - (k - this.view.k) * ratio, span);
  }

  fit() {
    this.#look(0, 0, this.panel.size);
  }

  /** Move the view so that a pair is in it. */
  reveal(q, k) {
    const { view } = this;
    const near = (at, start) => Math.min(start + view.span - 1, Math.max(start, at)) - start;
    this.#look(q - near(q, view.q), k - near(k, view.k), view.span);
  }

  get isZoomed() {
    return this.view.span < this.panel.size;
  }

  #look(q, k, span) {
    const last = this.panel.size - span;
    const clamp = (start) => Math.min(Math.max(start, 0), last);
    const view = { q: clamp(q), k: clamp(k), span };
    if (view.q === this.view.q && view.k === this.view.k && span === this.view.span) return;
    this.view = view;
    this.canvas.style.touchAction = this.isZoomed ? "none" : "manipulation";
    this.isStale = true;
    this.refresh();
  }

  #listen() {
    const { canvas } = this;
    let drag = null;
    canvas.addEventListener("pointerdown", (event) => {
      drag = { x: event.clientX, y: event.clientY, view: this.view, isMoved: false };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (drag && this.isZoomed) this.#pan(event, drag);
      if (!drag || !drag.isMoved) this.onPoint(...this.#pairAt(event));
    });
    canvas.addEventListener("pointerup", (event) => {
      if (drag && !drag.isMoved) this.onPick(...this.#pairAt(event));
      drag = null;
    });
    canvas.addEventListener("pointercancel", () => (drag = null));
    canvas.addEventListener("pointerleave", () => this.onPoint(-1, -1));
    canvas.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
        event.preventDefault();
        const { left, top, scale } = this.#place();
        const k = this.view.k + (event.clientX - left) / scale;
        const q = this.view.q + (event.clientY - top) / scale;
        this.zoom(Math.exp(event.deltaY / 300), q, k);
      },
      { passive: false },
    );
  }

  #pan(event, drag) {
    const dx = event.clientX - drag.x;
    const dy = event.clientY - drag.y;
    drag.isMoved ||= Math.hypot(dx, dy) > 4;
    const { scale } = this.#place();
    if (drag.isMoved) this.#look(drag.view.q - dy / scale, drag.view.k - dx / scale, this.view.span);
  }

  /** The screen coordinates of the cells, and CSS pixels per token. */
  #place() {
    const box = this.canvas.getBoundingClientRect();
    const side = box.width - MARGIN;
    return { left: box.left + MARGIN, top: box.top + MARGIN, scale: side / this.view.span };
  }

  #pairAt(event) {
    const { left, top, scale } = this.#place();
    const q = Math.floor(this.view.q + (event.clientY - top) / scale);
    const k = Math.floor(this.view.k + (event.clientX - left) / scale);
    const last = this.state.visible(this.panel) - 1;
    const isWithin = q >= 0 && k >= 0 && q <= last && k <= last;
    return isWithin ? [q, k] : [-1, -1];
  }

  #draw() {
    const { canvas } = this;
    const ratio = window.devicePixelRatio || 1;
    const dots = Math.round(canvas.clientWidth * ratio);
    if (!dots) return;
    if (canvas.width !== dots) {
      for (const each of [canvas, this.base, this.ink]) each.width = each.height = dots;
      this.isStale = true;
    }
    this.margin = Math.round(MARGIN * ratio);
    this.side = dots - this.margin;
    this.scale = this.side / this.view.span;
    this.style = getComputedStyle(canvas);
    if (this.isStale) this.#drawBase(ratio);
    this.isStale = false;
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, dots, dots);
    context.drawImage(this.base, 0, 0);
    this.#drawFuture(context);
    this.#drawSelection(context, ratio);
  }

  #colour(name) {
    return this.style.getPropertyValue(`--${name}`).trim();
  }

  #drawBase(ratio) {
    const context = this.base.getContext("2d");
    const { margin, side } = this;
    context.clearRect(0, 0, this.base.width, this.base.width);
    context.fillStyle = this.#colour("masked");
    context.fillRect(margin, margin, side, side);
    if (!this.panel.isDifference) this.#drawStates(context, this.panel.layers[0], "skipped", EMPTY);
    for (const layer of this.panel.layers) {
      if (this.state.showsTiles) {
        const name = layer.colour;
        this.#drawStates(context, layer, name || "full", FULL);
        this.#drawStates(context, layer, name || "partial", PARTIAL);
      } else {
        this.#drawPairs(context, layer);
      }
    }
    this.#drawGrid(context, 1, "grid", ratio);
    this.#drawGrid(context, this.panel.tile, "tile-edge", ratio);
    this.#drawBands(context, ratio);
  }

  /** An image of a dot per tile, opaque where tiles have one of the states. */
  #stateImage(layer, colour, ...states) {
    const key = `${layer.name} ${colour} ${states}`;
    if (!this.images.has(key)) {
      const canvas = makeCanvas(layer.tiles, layer.tiles);
      const context = canvas.getContext("2d");
      const image = context.createImageData(layer.tiles, layer.tiles);
      layer.states.forEach((state, index) => {
        if (states.includes(state)) image.data[4 * index + 3] = 255;
      });
      context.putImageData(image, 0, 0);
      context.globalCompositeOperation = "source-in";
      context.fillStyle = colour;
      context.fillRect(0, 0, layer.tiles, layer.tiles);
      this.images.set(key, canvas);
    }
    return this.images.get(key);
  }

  #drawStates(context, layer, colourName, ...states) {
    const image = this.#stateImage(layer, this.#colour(colourName), ...states);
    const { q, k, span } = this.view;
    const { tile } = layer;
    context.imageSmoothingEnabled = false;
    const { margin, side } = this;
    context.drawImage(image, k / tile, q / tile, span / tile, span / tile, margin, margin, side, side);
  }

  /** Draw allowed pairs as ink, then colour the ink by the part of the key. */
  #drawPairs(context, layer) {
    const ink = this.ink.getContext("2d");
    ink.globalCompositeOperation = "source-over";
    ink.clearRect(0, 0, this.ink.width, this.ink.width);
    this.#drawStates(ink, layer, "ink", FULL);
    if (layer.tile * this.scale < MIN_TILE_DOTS) {
      ink.globalAlpha = 0.6;
      this.#drawStates(ink, layer, "ink", PARTIAL);
      ink.globalAlpha = 1;
    } else {
      this.#drawPartialTiles(ink, layer);
    }
    ink.globalCompositeOperation = "source-in";
    if (layer.colour) {
      ink.fillStyle = this.#colour(layer.colour);
      ink.fillRect(0, 0, this.ink.width, this.ink.width);
    } else {
      this.#fillByKey(ink);
    }
    const { margin, side } = this;
    context.drawImage(this.ink, margin, margin, side, side, margin, margin, side, side);
  }

  /** Fill the columns of each part in its colour; in one fill, because several would erase each other. */
  #fillByKey(ink) {
    const { margin, side, scale, view } = this;
    const gradient = ink.createLinearGradient(margin, 0, margin + side, 0);
    for (const { colour, start, stop } of this.panel.bands) {
      for (const edge of [start, stop]) {
        const at = ((edge - view.k) * scale) / side;
        gradient.addColorStop(Math.min(Math.max(at, 0), 1), this.#colour(colour));
      }
    }
    ink.fillStyle = gradient;
    ink.fillRect(0, 0, this.ink.width, this.ink.width);
  }

  #drawPartialTiles(ink, layer) {
    const { tile, tiles } = layer;
    const { margin, scale, view } = this;
    const side = tile * scale;
    const [firstRow, firstColumn] = [Math.floor(view.q / tile), Math.floor(view.k / tile)];
    const lastRow = Math.min(Math.floor((view.q + view.span) / tile), tiles - 1);
    const lastColumn = Math.min(Math.floor((view.k + view.span) / tile), tiles - 1);
    ink.imageSmoothingEnabled = scale < 1;
    ink.fillStyle = this.#colour("ink");
    for (const [index, number] of layer.bitmapOf) {
      const row = Math.floor(index / tiles);
      const column = index % tiles;
      if (row < firstRow || row > lastRow || column < firstColumn || column > lastColumn) continue;
      const x = margin + (column * tile - view.k) * scale;
      const y = margin + (row * tile - view.q) * scale;
      if (number >= 0) {
        ink.drawImage(this.#bitmapImage(layer, number), x, y, side, side);
      } else {
        ink.globalAlpha = 0.5;
        ink.fillRect(x, y, side, side);
        ink.globalAlpha = 1;
      }
    }
  }

  #bitmapImage(layer, number) {
    const key = `${layer.name} ${number}`;
    if (!this.images.has(key)) {
      const canvas = makeCanvas(layer.tile, layer.tile);
      const context = canvas.getContext("2d");
      const image = context.createImageData(layer.tile, layer.tile);
      const bitmap = layer.bitmaps[number];
      for (let bit = 0; bit < layer.tile ** 2; bit++) {
        if ((bitmap[bit >> 3] >> (bit & 7)) & 1) image.data[4 * bit + 3] = 255;
      }
      context.putImageData(image, 0, 0);
      this.images.set(key, canvas);
    }
    return this.images.get(key);
  }

  #drawGrid(context, step, colourName, ratio) {
    const { margin, side, scale, view } = this;
    if (step * scale < MIN_GRID_DOTS * ratio || step >= this.panel.size) return;
    context.strokeStyle = this.#colour(colourName);
    context.lineWidth = 1;
    context.beginPath();
    for (const [start, isRow] of [[view.q, true], [view.k, false]]) {
      for (let at = Math.ceil(start / step) * step; at < start + view.span; at += step) {
        const edge = Math.round(margin + (at - start) * scale) + 0.5;
        context.moveTo(isRow ? margin : edge, isRow ? edge : margin);
        context.lineTo(isRow ? margin + side : edge, isRow ? edge : margin + side);
      }
    }
    context.stroke();
  }

  #drawBands(context, ratio) {
    const { margin, scale, view } = this;
    const thick = Math.round(BAND * ratio);
    context.save();
    context.font = `${Math.round(9 * ratio)}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (const isRow of [true, false]) {
      const first = isRow ? view.q : view.k;
      for (const { label, colour, start, stop } of this.panel.bands) {
        const from = Math.max(start, first);
        const length = (Math.min(stop, first + view.span) - from) * scale;
        if (length <= 0) continue;
        const at = margin + (from - first) * scale;
        context.fillStyle = this.#colour(colour);
        context.fillRect(isRow ? 0 : at, isRow ? at : 0, isRow ? thick : length, isRow ? length : thick);
        if (length < (isRow ? 9 : label.length * 7) * ratio) continue;
        context.fillStyle = this.#colour("on-part") || this.#colour(`on-${colour}`);
        const middle = at + length / 2;
        context.fillText(label, isRow ? thick / 2 : middle, isRow ? middle : thick / 2, thick * 0.95);
      }
    }
    context.restore();
  }

  /** Hide the rows and columns of tokens that are not generated yet. */
  #drawFuture(context) {
    const { margin, side, scale, view } = this;
    const visible = this.state.visible(this.panel);
    context.fillStyle = this.#colour("future");
    const x = Math.max(margin, margin + (visible - view.k) * scale);
    const y = Math.max(margin, margin + (visible - view.q) * scale);
    if (y < margin + side) context.fillRect(0, y, margin + side, margin + side - y);
    if (x < margin + side) context.fillRect(x, 0, margin + side - x, Math.min(y, margin + side));
  }

  #drawSelection(context, ratio) {
    const token = this.state.tokenIn(this.panel);
    if (token < 0) return;
    const { margin, side, scale, view } = this;
    const thick = Math.max(scale, 3 * ratio);
    const shift = (thick - scale) / 2;
    context.save();
    context.beginPath();
    context.rect(margin, margin, side, side);
    context.clip();
    context.lineWidth = 2 * ratio;
    context.strokeStyle = this.#colour("sees");
    context.strokeRect(margin, margin + (token - view.q) * scale - shift, side, thick);
    context.strokeStyle = this.#colour("seen-by");
    context.setLineDash([4 * ratio, 3 * ratio]);
    context.strokeRect(margin + (token - view.k) * scale - shift, margin, thick, side);
    context.restore();
  }
}
