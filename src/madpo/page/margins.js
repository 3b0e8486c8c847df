/* The list of affected pairs, which follows the sliders. Text from data enters by textContent alone. */
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const place = document.getElementById("weight");
  MadpoWeight.mount(place, data.margins, data.parameters);

  const list = document.getElementById("affected");
  const note = document.getElementById("affected-note");
  const SHOWN = 20;
  const make = (name, className, text) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const number = (value) => value.toFixed(2).replace("-", "−");

  const settings = () => {
    const read = (key) => Number(document.getElementById(`weight-${key}`).value);
    const own = document.getElementById("weight-own").checked;
    return { tau: read("tau"), c_max: read("c_max"), lam: read("lam"), c_min: own ? read("c_min") : null };
  };

  const card = (pair, weight) => {
    const box = make("div", "card");
    const prompt = make("p", "prompt", `pair ${pair.id}, margin ${number(pair.h)}, weight ${number(weight)} · ${pair.prompt}`);
    prompt.dir = "auto";
    box.append(prompt);
    for (const side of ["chosen", "rejected"]) {
      const answer = make("div", "answer");
      const text = make("p", "", pair[side]);
      text.dir = "auto";
      answer.append(make("h4", "", side), text);
      box.append(answer);
    }
    return box;
  };

  const draw = () => {
    if (!data.pairs.length) {
      note.textContent = "The data holds margins without texts, so there are no pairs to list.";
      return;
    }
    const p = settings();
    const changed = data.pairs
      .map((pair) => ({ pair, log: MadpoWeight.logWeight(pair.h, p) }))
      .filter((entry) => Math.abs(entry.log) > 0.05)
      .sort((a, b) => Math.abs(b.log) - Math.abs(a.log));
    const sample = data.pairs.length < data.of ? ` (${data.pairs.length} of ${data.of} pairs are kept on this page)` : "";
    note.textContent = `${changed.length} pairs get a weight more than 5 % away from 1${sample}; the ${Math.min(SHOWN, changed.length)} that change most:`;
    list.replaceChildren(...changed.slice(0, SHOWN).map(({ pair, log }) => card(pair, Math.exp(log))));
  };

  /* The sliders' own listeners run first, since these events bubble up to their container. */
  for (const event of ["input", "change", "click"]) place.addEventListener(event, draw);
  draw();
})();
