/** Create an element with a class and a text. */
function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

/** A name with line-break opportunities for narrow columns. */
function breakable(name) {
  const made = element("span");
  for (const part of name.split(/(?<=[_:=])/)) made.append(part, element("wbr"));
  return made;
}

const percent = (value, sign) =>
  new Intl.NumberFormat("en", {
    minimumFractionDigits: 1,
    maximumFractionDigits: 1,
    signDisplay: sign ? "exceptZero" : "auto",
  }).format(100 * value);

/** A number with at most two decimals, fewer for larger numbers. */
function figure(value) {
  const digits = value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return value.toLocaleString("en", { maximumFractionDigits: digits });
}

/** A mean with its interval. */
function estimate(cell, value, sign) {
  cell.append(element("span", "mean", `${percent(value.mean, sign)}%`));
  cell.append(element("span", "interval", `${percent(value.low, sign)} to ${percent(value.high, sign)}`));
}

/** The columns of the table: heading, value to sort by, and how to fill a cell. */
function columnsOf(data) {
  const number = (name, title, hint, write = figure) => ({
    title,
    hint,
    value: (cell) => cell[name],
    fill: (td, cell) => td.append(write(cell[name])),
  });
  const mean = (name, title, hint, sign) => ({
    title,
    hint,
    value: (cell) => cell[name]?.mean ?? null,
    fill: (td, cell) => estimate(td, cell[name], sign),
  });
  const columns = [
    { title: "strategy or fusion", hint: "Strategy or fusion that answered", isText: true, value: (cell) => cell.name },
    { title: "segments", hint: "Segments used of each request", isText: true, value: (cell) => cell.segments, fill: (td, cell) => td.append(cell.segments) },
    mean("score", data.metric, "Mean over the questions, with its 95% interval", false),
    mean("difference", "against the first", "Difference from the first row in percentage points, paired by question", true),
    number("mean_logprob", "log-probability", "Mean log-probability of the answers, generated or chosen", (value) => value.toFixed(2)),
    number("tokens_per_s", "tokens/s", "Generated tokens per second"),
    number("ms_per_question", "ms/question", "Milliseconds per question"),
    number("first_token_ms", "first token, ms", "Time from the start of a batch to its first tokens"),
    number("prompt_tokens", "prompt tokens", "Per question, including copies of the prefix"),
    number("computed_tokens", "computed", "Prompt tokens per question that were not reused from the prefix cache"),
    number("peak_bytes", "peak GB", "Peak device memory", (value) => figure(value / 1e9)),
  ];
  return columns.filter((column) => data.cells.some((cell) => column.value(cell) !== null));
}

/** The table; a click on a heading sorts it. */
class Table {
  constructor(root, data, announce) {
    this.body = root.querySelector("tbody");
    this.columns = columnsOf(data);
    this.announce = announce;
    this.rows = data.cells.map((cell) => ({ cell, row: this.#row(cell) }));
    this.body.append(...this.rows.map(({ row }) => row));
    const headings = element("tr");
    this.headings = this.columns.map((column) => this.#heading(column));
    headings.append(...this.headings);
    root.querySelector("thead").append(headings);
  }

  #heading(column) {
    const heading = element("th");
    heading.scope = "col";
    const button = element("button", "", column.title);
    button.type = "button";
    button.title = column.hint;
    button.addEventListener("click", () => this.#sort(column));
    heading.append(button);
    return heading;
  }

  #row(cell) {
    const row = element("tr");
    const name = element("th", "name");
    name.append(breakable(cell.name));
    name.scope = "row";
    if (cell.same.length) name.append(element("span", "same", `also ${cell.same.join(", ")}`));
    if (cell.error) name.append(element("span", "failed", `failed: ${cell.error}`));
    row.append(name);
    for (const column of this.columns.slice(1)) {
      const td = element("td");
      if (column.value(cell) !== null) column.fill(td, cell);
      row.append(td);
    }
    return row;
  }

  #sort(column) {
    const heading = this.headings[this.columns.indexOf(column)];
    const before = heading.ariaSort;
    const direction = column.isText === (before !== "ascending") || before === "descending" ? "ascending" : "descending";
    for (const each of this.headings) each.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const compare = (one, other) => {
      const [a, b] = [column.value(one.cell), column.value(other.cell)];
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    };
    this.rows.sort(compare);
    this.body.append(...this.rows.map(({ row }) => row));
    this.announce(`Sorted by ${column.title}, ${direction}`);
  }
}
