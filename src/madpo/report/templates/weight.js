/* The weight of MADPO over a margin histogram, with sliders. One component, used by every page that shows margins.
   The mathematics comes first and touches no page, so that it can be checked against the library's own weight. */
const MadpoWeight = (() => {
  const LN2 = Math.log(2);
  /* log sigma(x), without overflow on either side. */
  const logSigmoid = (x) => (x < 0 ? x - Math.log1p(Math.exp(x)) : -Math.log1p(Math.exp(-x)));
  const sigmoid = (x) => Math.exp(logSigmoid(x));
  const cMin = (p) => (p.c_min === null || p.c_min === undefined ? 1 / p.c_max : p.c_min);

  /* Share of c_max in the coefficient; K by log1p, since near c_max = 1 the ratio loses its digits. */
  const share = (h, p) =>
    sigmoid(-(Math.log(p.c_max - 1) - Math.log1p(-cMin(p)) + p.lam * (Math.abs(h) - p.tau)));

  const coefficient = (h, p) => cMin(p) + (p.c_max - cMin(p)) * share(h, p);

  /* log w(h) = log sigma(c h) - log sigma(h) above -tau, 0 below (Eq. 4); c h in two terms, which cannot overflow. */
  const logWeight = (h, p) => {
    const inside = h > -p.tau;
    const active =
      p.part === "amplify" ? inside && Math.abs(h) < p.tau
      : p.part === "dampen" ? inside && Math.abs(h) >= p.tau
      : inside;
    if (!active) return 0;
    const target = cMin(p) * h + (p.c_max - cMin(p)) * (Math.min(h, 1e30) * share(h, p));
    return Math.min(logSigmoid(target) - logSigmoid(h), LN2);
  };
  const weight = (h, p) => Math.exp(logWeight(h, p));

  /* What the weight does to a set of margins: counts, mean, and (sum w)^2 / sum w^2, the effective sample size. */
  const summary = (margins, p) => {
    const s = { amplified: 0, dampened: 0, turned_down: 0, unchanged: 0, mean: 0, effective: 0, n: margins.length };
    let sum = 0;
    let squares = 0;
    for (const h of margins) {
      const log = logWeight(h, p);
      const w = Math.exp(log);
      sum += w;
      squares += w * w;
      if (log > 0) s.amplified += 1;
      else if (log < 0 && h > 0) s.dampened += 1;
      else if (log < 0) s.turned_down += 1;
      else s.unchanged += 1;
    }
    s.mean = s.n ? sum / s.n : 0;
    s.effective = squares > 0 ? (sum * sum) / squares : 0;
    return s;
  };

  /* ---- The figure ---- */
  const SVG = "http://www.w3.org/2000/svg";
  const shape = (name, attributes, text) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");
  const nice = (step) => {
    const power = 10 ** Math.floor(Math.log10(step));
    return [1, 2, 5, 10].map((m) => m * power).find((m) => m >= step);
  };
  const kind = (h, p) => {
    const log = logWeight(h, p);
    return log > 1e-12 ? "amplified" : log < -1e-12 ? (h > 0 ? "dampened" : "turned-down") : "unchanged";
  };

  const LEFT = 50, RIGHT = 14, TOP = 20, CURVE = 170, GAP = 52, BARS = 120, BOTTOM = 44;
  const H = TOP + CURVE + GAP + BARS + BOTTOM;
  /* A narrow window has a narrow figure, so that its labels stay readable. */
  const width = () => (window.innerWidth < 640 ? 400 : 720);

  const draw = (svg, margins, p, range) => {
    svg.replaceChildren();
    const [lo, hi] = range;
    const W = width();
    svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
    svg.setAttribute("class", `figure w${W}`);
    const x = (h) => LEFT + ((h - lo) / (hi - lo)) * (W - LEFT - RIGHT);
    const y = (w) => TOP + CURVE - (Math.min(w, 2) / 2) * CURVE;
    const base = TOP + CURVE + GAP + BARS;
    for (const w of [0, 0.5, 1, 1.5, 2]) {
      svg.append(shape("line", { x1: LEFT, x2: W - RIGHT, y1: y(w), y2: y(w), class: w === 1 ? "axis strong" : "axis" }));
      svg.append(shape("text", { x: LEFT - 8, y: y(w) + 4, class: "tick end" }, String(w)));
    }
    const step = nice((hi - lo) / (W / 90));
    for (let h = Math.ceil(lo / step) * step; h <= hi + 1e-9; h += step) {
      const label = String(Math.round(h * 1e6) / 1e6).replace("-", "−");
      svg.append(shape("line", { x1: x(h), x2: x(h), y1: base, y2: base + 5, class: "axis strong" }));
      svg.append(shape("text", { x: x(h), y: base + 19, class: "tick middle" }, label));
    }
    for (const [h, name] of [[-p.tau, "−τ"], [p.tau, "τ"]]) {
      if (h <= lo || h >= hi) continue;
      svg.append(shape("line", { x1: x(h), x2: x(h), y1: TOP, y2: base, class: "mark" }));
      svg.append(shape("text", { x: x(h), y: TOP + CURVE + 20, class: "tick middle strong" }, name));
    }
    const bins = 60;
    const counts = new Array(bins).fill(0);
    const weights = new Array(bins).fill(0);
    for (const h of margins) {
      const bin = Math.max(0, Math.min(bins - 1, Math.floor(((h - lo) / (hi - lo)) * bins)));
      counts[bin] += 1;
      weights[bin] += weight(h, p);
    }
    const most = Math.max(1, ...counts, ...weights);
    counts.forEach((count, i) => {
      if (!count) return;
      const a = lo + (i / bins) * (hi - lo);
      const b = lo + ((i + 1) / bins) * (hi - lo);
      for (const [value, name] of [[count, "pairs"], [weights[i], "weighted"]]) {
        const height = (value / most) * BARS;
        const bar = shape("rect", {
          x: x(a) + 0.5, y: base - height, width: Math.max(1, x(b) - x(a) - 1), height, class: `bar ${name} ${kind((a + b) / 2, p)}`,
        });
        bar.append(shape("title", {}, `${count} pairs with margins from ${a.toFixed(2)} to ${b.toFixed(2)}, of weight ${weights[i].toFixed(2)} together`));
        svg.append(bar);
      }
    });
    svg.append(shape("line", { x1: LEFT, x2: W - RIGHT, y1: base, y2: base, class: "axis strong" }));
    let path = "";
    for (let i = 0; i <= 480; i += 1) {
      const h = lo + (i / 480) * (hi - lo);
      path += `${i ? "L" : "M"}${x(h).toFixed(1)} ${y(weight(h, p)).toFixed(2)}`;
    }
    svg.append(shape("path", { d: path, class: "curve" }));
    const top = nice(most / 3);
    for (let value = 0; value <= most; value += top) {
      svg.append(shape("text", { x: LEFT - 8, y: base - (value / most) * BARS + 4, class: "tick end" }, String(Math.round(value * 100) / 100)));
    }
    svg.append(shape("text", { x: W - RIGHT, y: H - 6, class: "tick end" }, "reward margin h of the pair, log-odds"));
    svg.append(shape("text", { x: 0, y: 12, class: "tick" }, "weight w(h)"));
    svg.append(shape("text", { x: 0, y: base - BARS - 8, class: "tick halo" }, "pairs: pale by number, solid by their weights’ sum"));
  };

  const spread = (margins, tau) => {
    const largest = margins.reduce((m, h) => Math.max(m, Math.abs(h)), 1);
    return [-Math.max(largest, tau * 1.15) * 1.04, Math.max(largest, tau * 1.15) * 1.04];
  };

  const SLIDERS = [
    { key: "tau", label: "τ, the margin where the weight is 1", min: 0.1, max: 15, step: 0.01 },
    { key: "c_max", label: "c_max, coefficient for small margins", min: 1.01, max: 8, step: 0.01 },
    { key: "lam", label: "λ, steepness around τ", min: 0.05, max: 5, step: 0.05 },
  ];

  /* Build the figure, its sliders and its counts inside `place`. `defaults`: {tau, c_max, c_min, lam}. */
  const mount = (place, margins, defaults) => {
    const p = { tau: 7, c_max: 2, c_min: null, lam: 1, ...defaults };
    const id = place.id || "weight";
    const svg = shape("svg", { role: "img" });
    const controls = make("div", "controls");
    const counts = make("dl", "counts");
    counts.setAttribute("aria-live", "polite");
    const readout = make("p", "readout", "Move over the figure to read the weight at a margin.");
    let range = spread(margins, p.tau);

    const redraw = () => {
      range = spread(margins, p.tau);
      draw(svg, margins, p, range);
      const s = summary(margins, p);
      svg.setAttribute("aria-label",
        `Weight curve over ${s.n} margins: ${s.amplified} amplified, ${s.dampened} dampened, ${s.turned_down} turned down`);
      counts.replaceChildren();
      const entries = [
        ["amplified", "amplified, w > 1", `${s.amplified} (${percent(s.amplified, s.n)})`],
        ["dampened", "dampened, w < 1", `${s.dampened} (${percent(s.dampened, s.n)})`],
        ["turned-down", "turned down, h < 0", `${s.turned_down} (${percent(s.turned_down, s.n)})`],
        ["unchanged", "unchanged, w = 1", `${s.unchanged} (${percent(s.unchanged, s.n)})`],
        ["", "mean weight", s.mean.toFixed(3)],
        ["", "effective sample size", `${s.effective.toFixed(0)} of ${s.n}`],
      ];
      for (const [name, label, value] of entries) {
        const box = make("div", name);
        box.append(make("dt", "", label), make("dd", "", value));
        counts.append(box);
      }
    };

    const slider = (spec, value, change) => {
      const label = make("label", "slider");
      const output = make("output", "", String(value));
      const input = make("input");
      Object.assign(input, { type: "range", min: Math.min(spec.min, value), max: Math.max(spec.max, value), step: spec.step, value, id: `${id}-${spec.key}` });
      input.addEventListener("input", () => {
        output.textContent = input.value;
        change(Number(input.value));
        redraw();
      });
      label.append(make("span", "", spec.label), output, input);
      return { label, input, output };
    };

    const reset = () => {
      controls.replaceChildren();
      for (const spec of SLIDERS) controls.append(slider(spec, p[spec.key], (v) => { p[spec.key] = v; }).label);
      const own = make("label", "check");
      const box = make("input");
      Object.assign(box, { type: "checkbox", checked: p.c_min !== null, id: `${id}-own` });
      const low = slider({ key: "c_min", label: "c_min, coefficient for large margins", min: 0, max: 0.99, step: 0.01 },
        cMin(p).toFixed(2), (v) => { p.c_min = v; });
      low.label.hidden = !box.checked;
      box.addEventListener("change", () => {
        p.c_min = box.checked ? Number(low.input.value) : null;
        low.label.hidden = !box.checked;
        redraw();
      });
      own.append(box, make("span", "", "c_min of its own (otherwise 1/c_max)"));
      const again = make("button", "", "Reset");
      again.type = "button";
      again.addEventListener("click", () => { Object.assign(p, { tau: 7, c_max: 2, c_min: null, lam: 1, ...defaults }); reset(); redraw(); });
      controls.append(own, low.label, again);
    };

    window.addEventListener("resize", () => redraw());
    svg.addEventListener("pointermove", (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
      const h = range[0] + ((at - LEFT) / (width() - LEFT - RIGHT)) * (range[1] - range[0]);
      if (h < range[0] || h > range[1]) return;
      readout.textContent = `At h = ${h.toFixed(2)} the coefficient is ${coefficient(h, p).toFixed(3)} and the weight is ${weight(h, p).toFixed(3)}.`;
    });

    reset();
    redraw();
    const side = make("div", "side");
    side.append(controls, counts);
    place.replaceChildren(svg, readout, side);
  };

  return { logWeight, weight, coefficient, summary, draw, mount };
})();
if (typeof module !== "undefined") module.exports = MadpoWeight;
