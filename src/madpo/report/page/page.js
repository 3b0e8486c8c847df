/* What a pointer can ask of the page. Text from data enters by textContent alone. */
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const make = (name, className, text) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const number = (value) => value.toFixed(2).replace("-", "−");

  for (const [id, entry] of Object.entries(data.weights)) {
    MadpoWeight.mount(document.getElementById(id), entry.margins, entry.parameters);
  }

  /* Lines: the values of every series at the step under the pointer. */
  for (const svg of document.querySelectorAll("svg[data-series]")) {
    const { series, x } = JSON.parse(svg.dataset.series);
    const readout = make("p", "readout", "Move over the figure to read its values.");
    svg.after(readout);
    const mark = document.createElementNS("http://www.w3.org/2000/svg", "line");
    mark.setAttribute("class", "mark");
    mark.setAttribute("y1", x.top);
    mark.setAttribute("y2", x.base);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const step = x.low + ((at - x.start) / (x.end - x.start)) * (x.high - x.low);
      if (step < x.low || step > x.high) return;
      mark.setAttribute("x1", at);
      mark.setAttribute("x2", at);
      svg.append(mark);
      const nearest = (line) => line.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
      readout.textContent = `Step ${Math.round(step)}: ` + Object.entries(series).map(([name, line]) => `${name} ${Number(nearest(line)[1].toPrecision(3))}`).join(" · ");
    });
  }

  /* Tables whose columns sort: a button in every head, largest first, then smallest, by the first number of a cell. */
  const value = (cell) => {
    const found = cell.textContent.replace(/−/g, "-").match(/[-+]?[0-9]*[.]?[0-9]+(e[-+]?[0-9]+)?/);
    return found ? Number(found[0]) : -Infinity;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    const written = [...body.rows];
    heads.forEach((head, k) => {
      const button = make("button", "sort", head.textContent);
      button.type = "button";
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const next = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", next);
        const sign = next === "descending" ? 1 : -1;
        const order = k === 0
          ? (p, q) => sign * p.cells[0].textContent.localeCompare(q.cells[0].textContent)
          : (p, q) => sign * (value(q.cells[k]) - value(p.cells[k])) || 0;
        body.replaceChildren(...[...written].sort(order));
      });
    });
  }

  /* Samples side by side. */
  const tiers = Object.keys(data.samples);
  if (!tiers.length) return;
  const place = document.getElementById("sample-browser");
  const picker = make("div", "picker");
  const list = make("div");
  const said = make("p", "note");
  said.setAttribute("role", "status");
  const more = make("button", "", "Show more");
  more.type = "button";
  let shown = 8;

  const field = (label, control) => {
    const wrap = make("label", "", label);
    wrap.append(control);
    picker.append(wrap);
    return control;
  };
  const choose = (label, options) => {
    const select = make("select");
    options.forEach(([value, text]) => select.append(new Option(text, value)));
    return field(label, select);
  };
  const tier = choose("Pairs", tiers.map((name) => [name, name]));
  const left = choose("Method", []);
  const right = choose("compared with", []);
  const order = choose("Order", [["down", "first method ahead"], ["up", "second method ahead"], ["id", "as in the data"]]);
  const search = field("Search", make("input"));
  search.type = "search";

  const fill = () => {
    const entry = data.samples[tier.value];
    [left, right].forEach((select, i) => {
      select.replaceChildren(...entry.methods.map((name, k) => new Option(name, k)));
      select.value = String(entry.baseline[i]);
    });
  };

  const draw = () => {
    const entry = data.samples[tier.value];
    const [a, b] = [Number(left.value), Number(right.value)];
    const words = search.value.trim().toLowerCase();
    const difference = (row) => row.rewards[a] - row.rewards[b];
    const found = entry.prompts.filter((row) =>
      !words || [row.prompt, row.responses[a], row.responses[b]].some((text) => text.toLowerCase().includes(words)));
    if (order.value !== "id") found.sort((p, q) => (difference(q) - difference(p)) * (order.value === "down" ? 1 : -1));
    list.replaceChildren(...found.slice(0, shown).map((row) => {
      const card = make("article", "card");
      const prompt = make("p", "prompt", row.prompt);
      prompt.dir = "auto";
      card.append(prompt);
      for (const k of [a, b]) {
        const answer = make("div", "answer");
        const head = make("h4", "", `${entry.methods[k]} `);
        head.dir = "auto";
        head.append(make("span", "", number(row.rewards[k])));
        const text = make("p", "", row.responses[k]);
        text.dir = "auto";
        answer.append(head, text);
        card.append(answer);
      }
      return card;
    }));
    const part = entry.of > entry.prompts.length ? ` The page holds the first ${entry.prompts.length} of ${entry.of}.` : "";
    said.textContent = `${found.length} prompts; the number beside a method is the oracle's reward.${part}`;
    more.hidden = found.length <= shown;
  };

  const restart = () => { shown = 8; draw(); };
  tier.addEventListener("change", () => { fill(); restart(); });
  for (const control of [left, right, order]) control.addEventListener("change", restart);
  search.addEventListener("input", restart);
  more.addEventListener("click", () => { shown += 16; draw(); });
  fill();
  draw();
  place.replaceChildren(picker, said, list, more);
})();
