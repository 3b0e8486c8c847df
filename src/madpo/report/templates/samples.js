/* Samples side by side: two methods, a search, an order; words that differ are marked. Text enters by textContent. */
const MadpoSamples = (() => {
  const LONGEST = 1500; // words of a response that are compared
  const ALIKE = 0.3; // share of the words that two responses must share for their differences to be worth a mark

  /* Pieces of a and of b as [text, whether it differs], by the longest common subsequence of their words. */
  const compared = (a, b) => {
    const [x, y] = [a, b].map((text) => text.match(/^\s+|\S+\s*/g) || []);
    const same = (i, j) => x[i].trim() === y[j].trim();
    const plain = [[[a, false]], [[b, false]]];
    if (x.length > LONGEST || y.length > LONGEST) return plain;
    const n = y.length + 1;
    const length = new Uint16Array((x.length + 1) * n);
    for (let i = x.length - 1; i >= 0; i -= 1) {
      for (let j = y.length - 1; j >= 0; j -= 1) {
        length[i * n + j] = same(i, j) ? length[(i + 1) * n + j + 1] + 1 : Math.max(length[(i + 1) * n + j], length[i * n + j + 1]);
      }
    }
    if (length[0] < ALIKE * Math.max(x.length, y.length)) return plain;
    const out = [[], []];
    const put = (side, word, differs) => {
      const last = out[side][out[side].length - 1];
      if (last && last[1] === differs) last[0] += word;
      else out[side].push([word, differs]);
    };
    let [i, j] = [0, 0];
    while (i < x.length || j < y.length) {
      if (i < x.length && j < y.length && same(i, j)) { put(0, x[i], false); put(1, y[j], false); i += 1; j += 1; }
      else if (j >= y.length || (i < x.length && length[(i + 1) * n + j] >= length[i * n + j + 1])) { put(0, x[i], true); i += 1; }
      else { put(1, y[j], true); j += 1; }
    }
    return out;
  };

  /* Groups: name -> {methods, baseline: the two shown first, prompts: [{id, prompt, responses, rewards, notes}], of}. */
  const mount = (place, groups, unit) => {
    const names = Object.keys(groups);
    if (!names.length) return;
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
    const group = choose("Pairs", names.map((name) => [name, name]));
    const left = choose("Method", []);
    const right = choose("compared with", []);
    const order = choose("Order", [["id", "as in the data"], ["down", "first method ahead"], ["up", "second method ahead"]]);
    const search = field("Search", make("input"));
    search.type = "search";
    group.parentElement.hidden = names.length < 2;

    const fill = () => {
      const entry = groups[group.value];
      [left, right].forEach((select, i) => {
        select.replaceChildren(...entry.methods.map((name, k) => new Option(name, k)));
        select.value = String(entry.baseline[i]);
        select.parentElement.hidden = entry.methods.length < 3;
      });
    };

    const card = (entry, row, sides) => {
      const box = make("article", "card");
      const prompt = make("p", "prompt", row.prompt);
      prompt.dir = "auto";
      box.append(prompt);
      const pieces = compared(row.responses[sides[0]], row.responses[sides[1]]);
      sides.forEach((k, side) => {
        const answer = make("div", "answer");
        const head = make("h4", "", `${entry.methods[k]} `);
        head.dir = "auto";
        const note = row.notes ? row.notes[k] : "";
        head.append(make("span", "", `${number(row.rewards[k])}${note ? ` · ${note}` : ""}`));
        const text = make("p");
        text.dir = "auto";
        for (const [words, differs] of pieces[side]) {
          const own = words.trimEnd();
          text.append(...(differs ? [make("mark", "", own), words.slice(own.length)] : [words]));
        }
        answer.append(head, text);
        box.append(answer);
      });
      return box;
    };

    const draw = () => {
      const entry = groups[group.value];
      const sides = [Number(left.value), Number(right.value)];
      const words = search.value.trim().toLowerCase();
      const ahead = (row) => row.rewards[sides[0]] - row.rewards[sides[1]];
      const found = entry.prompts.filter((row) =>
        !words || [row.prompt, ...sides.map((k) => row.responses[k])].some((text) => text.toLowerCase().includes(words)));
      if (order.value !== "id") found.sort((p, q) => (ahead(q) - ahead(p)) * (order.value === "down" ? 1 : -1));
      list.replaceChildren(...found.slice(0, shown).map((row) => card(entry, row, sides)));
      const part = entry.of > entry.prompts.length ? ` The page holds the first ${entry.prompts.length} of ${entry.of}.` : "";
      said.textContent = `${found.length} prompts; the number next to a method is ${unit}. Where two responses are alike, the words that differ are marked.${part}`;
      more.hidden = found.length <= shown;
    };

    const restart = () => { shown = 8; draw(); };
    group.addEventListener("change", () => { fill(); restart(); });
    for (const control of [left, right, order]) control.addEventListener("change", restart);
    search.addEventListener("input", restart);
    more.addEventListener("click", () => { shown += 16; draw(); });
    fill();
    draw();
    place.replaceChildren(picker, said, list, more);
  };

  return { compared, mount };
})();
if (typeof module !== "undefined") module.exports.MadpoSamples = MadpoSamples;
