const COSTS = [
  ["ms_per_question", "milliseconds per question"],
  ["computed_tokens", "prompt tokens computed per question"],
  ["prompt_tokens", "prompt tokens per question"],
  ["first_token_ms", "milliseconds to a batch's first tokens"],
  ["peak_bytes", "peak memory, bytes"],
];
const SHAPES = [
  "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z",
  "M-4.5-4.5H4.5V4.5H-4.5Z",
  "M0-6L5.5 4.5H-5.5Z",
  "M0-6.5L5.5 0L0 6.5L-5.5 0Z",
];
const COLOURS = 6;
const HEIGHT = 340;
const MARGIN = { top: 24, right: 20, bottom: 44, left: 52 };

function svg(name, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

/** About `count` round numbers from low to high. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step) found.push(at || 0);
  return found;
}

/** Score against a cost: cells of one name share a mark and are joined by a line. */
class Plot {
  constructor(root, legend, data) {
    this.root = root;
    this.data = data;
    this.cells = data.cells.filter((cell) => cell.score !== null);
    this.names = [...new Set(this.cells.map((cell) => cell.name))];
    this.costs = COSTS.filter(([name]) => this.cells.some((cell) => cell[name] !== null));
    this.cost = this.costs[0];
    this.names.forEach((name) => legend.append(this.#entry(name)));
    new ResizeObserver(() => this.draw()).observe(root);
  }

  #mark(name) {
    const number = this.names.indexOf(name);
    const shape = SHAPES[(number + Math.floor(number / COLOURS)) % SHAPES.length];
    return { d: shape, class: `mark series-${number % COLOURS}` };
  }

  #entry(name) {
    const entry = element("li");
    const picture = svg("svg", { width: 16, height: 16, viewBox: "-8 -8 16 16", "aria-hidden": "true" });
    picture.append(svg("path", this.#mark(name)));
    entry.append(picture, name);
    return entry;
  }

  draw() {
    const width = this.root.clientWidth;
    if (!width || !this.cost) return;
    const [name, title] = this.cost;
    const shown = this.cells.filter((cell) => cell[name] !== null);
    const xs = shown.map((cell) => cell[name]);
    const highest = Math.max(...xs);
    const lowest = Math.min(...shown.map((cell) => cell.score.low));
    const from = Math.max(0, Math.floor(lowest * 10 - 0.5) / 10);
    const x = (value) => MARGIN.left + (value / (highest * 1.06 || 1)) * (width - MARGIN.left - MARGIN.right);
    const y = (value) => MARGIN.top + ((1 - value) / (1 - from || 1)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
    const picture = svg("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img" });
    picture.setAttribute("aria-label", `${this.data.metric} against ${title}, as in the table`);
    for (const at of ticks(from, 1, 5)) {
      picture.append(svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(at), y2: y(at) }));
      picture.append(svg("text", { class: "tick", x: MARGIN.left - 6, y: y(at) + 4, "text-anchor": "end" }, `${Math.round(100 * at)}%`));
    }
    for (const at of ticks(0, highest, Math.max(2, width / 110))) {
      picture.append(svg("text", { class: "tick", x: x(at), y: HEIGHT - MARGIN.bottom + 16, "text-anchor": "middle" }, figure(at)));
    }
    const middle = (MARGIN.left + width - MARGIN.right) / 2;
    picture.append(svg("text", { class: "axis", x: middle, y: HEIGHT - 8, "text-anchor": "middle" }, title));
    for (const each of this.names) {
      const line = shown.filter((cell) => cell.name === each);
      const points = line.map((cell) => `${x(cell[name])},${y(cell.score.mean)}`).join(" ");
      picture.append(svg("polyline", { class: `line ${this.#mark(each).class}`, points }));
    }
    this.labels = [];
    for (const cell of shown) picture.append(this.#point(cell, x(cell[name]), y, title, name));
    this.root.replaceChildren(picture);
  }

  /** A free position for a label beside a point. */
  #free(x, y) {
    const points = [[8, -6], [8, 15], [-16, -6], [-16, 15], [20, 4], [-28, 4]].map(([dx, dy]) => ({ x: x + dx, y: y + dy }));
    const isFree = (point) => this.labels.every((other) => Math.abs(other.x - point.x) > 10 || Math.abs(other.y - point.y) > 11);
    const point = points.find(isFree) ?? points[0];
    this.labels.push(point);
    return point;
  }

  #point(cell, x, y, title, name) {
    const group = svg("g", { class: "point" });
    const { low, high, mean } = cell.score;
    const mark = this.#mark(cell.name);
    group.append(svg("line", { class: `bar ${mark.class}`, x1: x, x2: x, y1: y(low), y2: y(high) }));
    group.append(svg("path", { ...mark, transform: `translate(${x} ${y(mean)})` }));
    group.append(svg("text", { class: "tick", ...this.#free(x, y(mean)) }, cell.segments));
    const text = `${cell.title}: ${percent(mean)}% (${percent(low)} to ${percent(high)}), ${figure(cell[name])} ${title}`;
    group.append(svg("title", {}, text));
    return group;
  }
}
