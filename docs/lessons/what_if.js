// The sliders and curves of what_if.html. All numbers come from the page's table.
"use strict";
const table = document.getElementById("results");
const rows = [...table.tBodies[0].rows];
const settings = ["β", "clip", "λ"];
const choices = settings.map((_, i) => [...new Set(rows.map((row) => row.cells[i].textContent))]);
const start = document.getElementById("controls").dataset.start.split(" ");
const frontier = table.dataset.frontier.split(" ").map((point) => point.split(",").map(Number));
const number = (text) => Number(text.replace("−", "-"));

const inputs = settings.map((name, i) => {
  const label = document.createElement("label");
  const [input, output] = [document.createElement("input"), document.createElement("output")];
  Object.assign(input, { type: "range", min: 0, max: choices[i].length - 1, step: 1, value: choices[i].indexOf(start[i]) });
  input.addEventListener("input", show);
  label.append(name, output, input);
  document.getElementById("controls").append(label);
  return { input, output };
});

function make(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

// One chart: lines of [x, y] points with a class, in the given ranges.
function chart(title, xTitle, [x0, x1], [y0, y1], lines, dot) {
  const [W, H, left, bottom] = [460, 270, 46, 40];
  const x = (v) => left + ((v - x0) / (x1 - x0)) * (W - left - 12);
  const y = (v) => H - bottom - ((v - y0) / (y1 - y0)) * (H - bottom - 14);
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
  for (let i = 0; i <= 4; i++) {
    const [vx, vy] = [x0 + ((x1 - x0) * i) / 4, y0 + ((y1 - y0) * i) / 4];
    svg.append(make("line", { class: "axis", x1: left, x2: W - 12, y1: y(vy), y2: y(vy) }));
    svg.append(make("text", { x: left - 6, y: y(vy) + 4, "text-anchor": "end" }, String(+vy.toFixed(2)).replace("-", "−")));
    svg.append(make("text", { x: x(vx), y: H - bottom + 16, "text-anchor": "middle" }, String(+vx.toFixed(1))));
  }
  svg.append(make("text", { x: (left + W) / 2, y: H - 6, "text-anchor": "middle" }, xTitle));
  const bounded = ([a, b]) => [Math.min(Math.max(a, x0), x1), Math.min(Math.max(b, y0), y1)];
  for (const [kind, points] of lines) {
    const d = points.map(bounded).map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
    svg.append(make("path", { class: kind, d }));
  }
  if (dot) svg.append(make("circle", { cx: x(bounded(dot)[0]), cy: y(bounded(dot)[1]), r: 5 }));
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const bold = document.createElement("b");
  bold.textContent = title;
  caption.append(bold);
  figure.append(caption, svg);
  return figure;
}

function show() {
  const values = inputs.map(({ input, output }, i) => (output.textContent = choices[i][input.value]));
  const row = rows.find((r) => values.every((value, i) => r.cells[i].textContent === value));
  rows.forEach((r) => r.classList.toggle("chosen", r === row));
  const [score, kl] = [row.dataset.score, row.dataset.kl].map((series) => series.split(" ").map(Number));
  const [beta, end, best] = [0, 5, 7].map((i) => number(row.cells[i].textContent));
  const objective = score.map((s, i) => s - beta * kl[i]);
  const last = score.length - 1;
  const said =
    `After ${last} updates the score is ${row.cells[3].textContent} and the KL ${row.cells[4].textContent} nats: ` +
    `score − β·KL = ${row.cells[5].textContent}, and ${row.cells[7].textContent} is possible.`;
  const verdict = end < objective[0] - 0.005 ? " That is worse than the reference." : best - end < 0.02 ? " That is nearly all." : "";
  document.getElementById("said").textContent = said + verdict;
  const low = Math.min(...objective) < 0 ? -1 : 0; // steps of a half or a quarter
  document.getElementById("charts").replaceChildren(
    chart("score − β·KL; dashed: the best possible", "update", [0, last], [low, 1], [
      ["grey", [[0, best], [last, best]]],
      ["one", objective.map((v, i) => [i, v])],
    ]),
    chart("The way of the policy; dashed: the edge of the possible", "KL, nats", [0, 8], [0, 1], [
      ["grey", frontier],
      ["two", score.map((s, i) => [kl[i], s])],
    ], [kl[last], score[last]]),
  );
}
show();
