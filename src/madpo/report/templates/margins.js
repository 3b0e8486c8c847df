/* The list of affected pairs, which follows the sliders. Text from data enters only by textContent. */
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const place = document.getElementById("weight");
  MadpoWeight.mount(place, data.margins, data.parameters);

  const list = document.getElementById("affected-body");
  const note = document.getElementById("affected-note");
  const SHOWN = 6; // of each kind
  const CHANGED = Math.log(1.05);

  const settings = () => {
    const read = (key) => Number(document.getElementById(`weight-${key}`).value);
    const own = document.getElementById("weight-own").checked;
    return { tau: read("tau"), c_max: read("c_max"), lam: read("lam"), c_min: own ? read("c_min") : null };
  };

  const card = (pair, weight) => {
    const box = make("div", "card");
    const prompt = make("p", "prompt", `pair ${pair.id} (${pair.place}), margin ${number(pair.h)}, weight ${number(weight)} · ${pair.prompt}`);
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
    const groups = { "turned down": [], amplified: [], dampened: [] };
    for (const pair of data.pairs) {
      const log = MadpoWeight.logWeight(pair.h, p);
      if (Math.abs(log) < CHANGED) continue;
      groups[log > 0 ? "amplified" : pair.h > 0 ? "dampened" : "turned down"].push({ pair, log });
    }
    const kept = data.pairs.length < data.of ? `${data.pairs.length} of the ${data.of} pairs are kept on this page: the lowest margins and a random sample. ` : "";
    const changed = Object.entries(groups).filter(([, entries]) => entries.length);
    const counts = changed.map(([name, entries]) => `${entries.length} ${entries.length > 1 ? "are" : "is"} ${name}`).join(", ");
    note.textContent = `${kept}${counts ? `By more than 5 %, ${counts}. The ones that change most:` : "No weight differs from 1 by more than 5 %."}`;
    list.replaceChildren();
    for (const [name, entries] of changed) {
      entries.sort((a, b) => Math.abs(b.log) - Math.abs(a.log));
      list.append(make("h3", "", name));
      list.append(...entries.slice(0, SHOWN).map(({ pair, log }) => card(pair, Math.exp(log))));
    }
  };

  /* The sliders' own listeners run first, since these events bubble up to their container. */
  for (const event of ["input", "change", "click"]) place.addEventListener(event, draw);
  draw();
})();
