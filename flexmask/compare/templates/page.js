const data = JSON.parse(document.querySelector("#data").textContent);
const announce = (text) => {
  document.querySelector("#status").textContent = text;
};

new Table(document.querySelector("#table"), data, announce);

const plot = new Plot(document.querySelector("#plot"), document.querySelector("#legend"), data);
document.querySelector("#plot-heading").textContent = `${data.metric[0].toUpperCase()}${data.metric.slice(1)} against cost`;
document.querySelector("#plot-section").hidden = plot.costs.length === 0;
const cost = document.querySelector("#cost");
cost.append(...plot.costs.map(([, title], number) => new Option(title, number)));
cost.addEventListener("change", () => {
  plot.cost = plot.costs[cost.value];
  plot.draw();
});

document.querySelector("#answers-section").hidden = data.cells.every((cell) => !cell.answers.length);
if (data.cells.some((cell) => cell.answers.length)) new Answers(data);
