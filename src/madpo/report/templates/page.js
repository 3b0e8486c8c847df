/* What a pointer can ask of the page: values under it, sorted tables, samples. */
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  for (const [id, entry] of Object.entries(data.weights || {})) {
    MadpoWeight.mount(document.getElementById(id), entry.margins, entry.parameters);
  }

  /* Lines: the values of every series at the step under the pointer. */
  for (const svg of document.querySelectorAll("svg[data-series]")) {
    const { series, x } = JSON.parse(svg.dataset.series);
    const panels = svg.closest(".panels");
    if (!panels.nextElementSibling?.classList.contains("readout")) {
      panels.after(make("p", "readout", "Move over a line to read its values."));
    }
    const readout = panels.nextElementSibling;
    const mark = document.createElementNS("http://www.w3.org/2000/svg", "line");
    mark.setAttribute("class", "mark");
    mark.setAttribute("y1", x.top);
    mark.setAttribute("y2", x.base);
    svg.addEventListener("pointermove", (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
      const step = x.low + ((at - x.start) / (x.end - x.start)) * (x.high - x.low);
      if (step < x.low || step > x.high) return;
      mark.setAttribute("x1", at);
      mark.setAttribute("x2", at);
      svg.append(mark);
      const nearest = (line) => line.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
      readout.textContent = `Step ${Math.round(step)}: ` + Object.entries(series).map(([name, line]) => `${name} ${Number(nearest(line)[1].toPrecision(3))}`).join(" · ");
    });
  }

  /* Tables that sort: a button in every head, largest first, then smallest, by the first number of a cell. */
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

  const samples = document.getElementById("samples-body");
  if (samples && data.samples) MadpoSamples.mount(samples, data.samples, data.unit);

  /* A printed page shows everything. */
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
})();
