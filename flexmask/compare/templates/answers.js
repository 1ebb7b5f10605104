const PAGE = 20;

/** Which questions are shown, by the scores of A and B and whether their answers differ. */
const KINDS = [
  ["one", "only one is right", (a, b) => a.score !== null && a.score !== b.score],
  ["a", "A is right, B is not", (a, b) => a.score > b.score],
  ["b", "B is right, A is not", (a, b) => b.score > a.score],
  ["other", "answers differ", (a, b) => a.text !== b.text],
  ["wrong", "both are wrong", (a, b) => a.score === 0 && b.score === 0],
  ["all", "all", () => true],
];

/** The questions on which two cells differ, a page at a time. */
class Answers {
  constructor(data) {
    this.data = data;
    this.cells = data.cells.filter((cell) => cell.answers.length);
    const select = (id) => document.querySelector(`#${id}`);
    [this.first, this.second, this.kind] = ["first", "second", "kind"].map(select);
    [this.list, this.counts, this.more] = ["questions", "counts", "more"].map(select);
    for (const chosen of [this.first, this.second]) {
      chosen.append(...this.cells.map((cell, number) => new Option(cell.title, number)));
      chosen.addEventListener("change", () => this.show());
    }
    const kinds = KINDS.filter(([name]) => data.isJudged || ["other", "all"].includes(name));
    this.kind.append(...kinds.map(([name, title]) => new Option(title, name)));
    this.kind.addEventListener("change", () => this.show());
    this.second.value = this.#best();
    select("swap").addEventListener("click", () => {
      [this.first.value, this.second.value] = [this.second.value, this.first.value];
      this.show();
    });
    this.more.addEventListener("click", () => this.#addPage(true));
    this.show();
  }

  /** The cell with the highest score besides the first. */
  #best() {
    const scores = this.cells.map((cell, number) => (number ? (cell.score?.mean ?? 0) : -1));
    return scores.indexOf(Math.max(...scores));
  }

  #answer(cell, question) {
    const [text, score] = [this.data.texts[cell.answers[question]], cell.scores[question]];
    return { text, score, logprob: cell.logprobs[question] ?? null };
  }

  show() {
    const [a, b] = [this.first, this.second].map((chosen) => this.cells[chosen.value]);
    const [, , isWanted] = KINDS.find(([name]) => name === this.kind.value);
    const pairs = this.data.questions.map((question, number) => ({
      question,
      a: this.#answer(a, number),
      b: this.#answer(b, number),
    }));
    this.found = pairs.filter((pair) => isWanted(pair.a, pair.b));
    this.list.replaceChildren();
    this.counts.textContent = this.#summary(pairs);
    this.#addPage(false);
  }

  #summary(pairs) {
    const shown = `${this.found.length.toLocaleString("en")} of ${pairs.length.toLocaleString("en")} questions shown`;
    if (!this.data.isJudged) return shown;
    const count = (isWanted) => pairs.filter(({ a, b }) => isWanted(a, b)).length.toLocaleString("en");
    return `${shown}; A better in ${count(KINDS[1][2])}, B better in ${count(KINDS[2][2])}, both wrong in ${count(KINDS[4][2])}`;
  }

  #addPage(isAsked) {
    const start = this.list.children.length;
    const some = this.found.slice(start, start + PAGE);
    this.list.append(...some.map((pair) => this.#item(pair)));
    const left = this.found.length - start - some.length;
    this.more.hidden = left <= 0;
    this.more.textContent = `Show ${Math.min(PAGE, left)} of ${left} more`;
    if (isAsked) this.list.children[start]?.focus();
  }

  #item({ question, a, b }) {
    const item = element("li", "question");
    item.tabIndex = -1;
    item.append(element("p", "uuid", question.uuid));
    const [fewer, more] = [this.first, this.second].map((chosen) => this.cells[chosen.value].num_segments ?? Infinity);
    const segments = element("ol", "segments");
    question.segments.slice(0, Math.max(fewer, more)).forEach((text, number) => {
      const segment = element("li", "", text);
      if (number >= Math.min(fewer, more)) segment.append(element("span", "only", fewer < more ? "B only" : "A only"));
      segments.append(segment);
    });
    item.append(segments);
    const [prefix, suffix] = [question.prefix, question.suffix].map((number) => this.data.shared[number]);
    if (prefix || suffix) {
      const details = element("details");
      details.append(element("summary", "", "prefix and suffix"), element("pre", "", `${prefix}…${suffix}`));
      item.append(details);
    }
    const answers = element("dl", "answers");
    answers.append(...this.#lines("A", a), ...this.#lines("B", b));
    if (question.answers.length) {
      answers.append(element("dt", "", "accepted"), element("dd", "", question.answers.join(" | ")));
    }
    item.append(answers);
    return item;
  }

  #lines(name, { text, score, logprob }) {
    const verdict = { null: "", 1: " ✓ right", 0: " ✗ wrong" }[score] ?? ` ${percent(score)}%`;
    const answer = element("dd", "", text || "(nothing)");
    answer.append(element("span", score === 1 ? "right" : "wrong", verdict));
    if (logprob !== null) answer.append(element("span", "only", `log-probability ${logprob.toFixed(3)}`));
    return [element("dt", `mark-${name.toLowerCase()}`, name), answer];
  }
}
