/* Who dies, who learns? Five treatments of a layer over the learning rates, every stored network a
   mark: it learns, it does not, or it overflowed. Nothing is computed here but counts and means. */
(() => {
  "use strict";
  const rb = window.relubook;
  const FATES = ["learns", "does not", "overflowed"];

  // ---- the model -----------------------------------------------------------------------------
  /* A run of two characters a network, in thousandths; null where one overflowed. */
  const read = (text) => text.match(/../g).map((v) => (v === "--" ? null : parseInt(v, 36) / 1000));
  /* The networks of one point: share of dead units and accuracy. */
  const networks = (data, setting, method, index) => {
    const cell = data.cells[setting].found[method];
    return { dead: read(cell.dead[index]), accuracy: read(cell.accuracy[index]) };
  };
  /* What became of them, those that learn first, then by accuracy. */
  const fates = ({ dead, accuracy }, least) => {
    const all = dead.map((share, k) => ({ dead: share, accuracy: accuracy[k],
      fate: share === null ? FATES[2] : accuracy[k] >= least ? FATES[0] : FATES[1] }));
    all.sort((a, b) => FATES.indexOf(a.fate) - FATES.indexOf(b.fate) || b.accuracy - a.accuracy);
    const finite = all.filter((one) => one.dead !== null);
    const mean = (what) => (finite.length ? finite.reduce((sum, one) => sum + one[what], 0) / finite.length : null);
    const count = (fate) => all.filter((one) => one.fate === fate).length;
    return { all, learn: count(FATES[0]), overflowed: count(FATES[2]), dead: mean("dead"), accuracy: mean("accuracy") };
  };
  rb.whoDies = { networks, fates };

  // ---- the picture ---------------------------------------------------------------------------
  rb.explorable("who-dies", (stage, data) => {
    const s = rb.svg, methods = Object.keys(data.methods), images = data.images;
    let way = images[0], depth = data.depths[0], rate = 1.8, least = 0.9;
    const text = (x, y, content, name, anchor = "start") =>
      s("text", { x, y, class: `rb-text ${name || ""}`, "text-anchor": anchor, text: content });
    const percent = (v) => `${rb.number(100 * v, v > 0 && v < 0.095 ? 1 : 0)}%`;
    const setting = () => `${way} ${depth}`;
    const MARK = { learns: (x, y) => `M${x} ${y}h0`, "does not": (x, y) => `M${x} ${y}h0`,
      overflowed: (x, y) => `M${x - 1.7} ${y - 1.7}l3.4 3.4m0 -3.4l-3.4 3.4` };
    /* All marks of a kind are one path. */
    const marks = (placed) => FATES.map((fate, k) => s("path", { class: `rb-fate rb-fate-${k}`,
      d: placed.filter((one) => one.fate === fate).map(({ x, y }) => MARK[fate](Number(x.toFixed(1)), Number(y.toFixed(1)))).join("") }));

    // Left: a row a treatment, a column a rate, 6 by 5 marks a cell. Right: one rate.
    const LEFT = 86, TOP = 4, ROW = 48, STEP = 6.4;
    const names = () => methods.map((method, r) => text(LEFT - 8, TOP + ROW * (r + 0.5) + 4, data.methods[method], "", "end"));
    const lines = (from) => methods.map((_, r) => s("line", { class: "rb-grid", x1: from, x2: 396, y1: TOP + ROW * (r + 1), y2: TOP + ROW * (r + 1) }));
    const grid = s("g"), here = s("rect", { class: "rb-pick", y: TOP, height: 5 * ROW, rx: 3 });
    const map = s("svg", { viewBox: "0 0 400 286", role: "img", class: "rb-matrix" }, ...lines(8), ...names(), here, grid);
    const spread = s("g"), px = (share) => LEFT + 8 + 176 * share;
    const shares = s("svg", { viewBox: "0 0 400 286", role: "img" }, ...lines(8), ...names(),
      ...[0, 0.5, 1].flatMap((v) => [s("line", { class: "rb-grid", x1: px(v), x2: px(v), y1: TOP, y2: TOP + 5 * ROW }),
        text(px(v), TOP + 5 * ROW + 17, `${100 * v}%`, "rb-muted", "middle")]),
      text(px(0.5), TOP + 5 * ROW + 34, "dead units", "rb-muted", "middle"), spread);
    const width = () => (396 - LEFT) / data.cells[setting()].rates.length;
    map.addEventListener("pointerdown", (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(map.getScreenCTM().inverse());
      const { rates } = data.cells[setting()], k = Math.floor((at.x - LEFT) / width());
      if (k >= 0 && k < rates.length) { rate = rates[k]; slider.set(k); draw(); }
    });

    const draw = () => {
      const { rates } = data.cells[setting()], wide = width(), chosen = rates.indexOf(rate);
      const found = methods.map((method) => rates.map((_, k) => fates(networks(data, setting(), method, k), least)));
      grid.replaceChildren(...marks(found.flatMap((row, r) => row.flatMap(({ all }, c) => all.map((one, k) => ({ fate: one.fate,
        x: LEFT + wide * (c + 0.5) + STEP * (k % 6 - 2.5), y: TOP + ROW * (r + 0.5) + STEP * (Math.floor(k / 6) - 2) }))))),
        ...rates.map((v, c) => text(LEFT + wide * (c + 0.5), TOP + 5 * ROW + 17, `${v}`, "rb-muted", "middle")),
        text((LEFT + 396) / 2, TOP + 5 * ROW + 34, "learning rate", "rb-muted", "middle"));
      rb.set(here, { x: (LEFT + wide * chosen + 1).toFixed(1), width: (wide - 2).toFixed(1) });
      const at = found.map((row) => row[chosen]);
      spread.replaceChildren(...marks(at.flatMap(({ all }, r) => all.filter((one) => one.dead !== null).map((one, k) => ({ fate: one.fate,
        x: px(one.dead), y: TOP + ROW * (r + 0.5) + 30 * ((0.618034 * k) % 1 - 0.5) })))),
        ...at.flatMap(({ overflowed }, r) => overflowed ? [text(396, TOP + ROW * (r + 0.5) + 4, `\u00d7 ${overflowed} overflowed`, "", "end")] : []));
      rb.set(map, { "aria-label": `What became of ${data.networks} networks for each of five treatments and ${rates.length} learning rates.` });
      rb.set(shares, { "aria-label": `Share of dead units of each network at a learning rate of ${rate}.` });
      const told = at.map(({ learn, overflowed, dead }, r) => `${data.methods[methods[r]]} ${learn}`
        + (dead === null ? " (all overflowed)" : ` (${percent(dead)} of the units dead${overflowed ? `, ${overflowed} overflowed` : ""})`));
      const words = `At a rate of ${rate}, of ${data.networks} networks each learn: ${told.join("; ")}.`;
      if (sentence.textContent !== words) sentence.textContent = words;
      numbers.textContent = `new images right, on average: ${at.map(({ accuracy }, r) => `${data.methods[methods[r]]} ${accuracy === null ? "\u2013" : percent(accuracy)}`).join(" \u00b7 ")}`;
    };
    /* Not every pair was measured at every rate: take the nearest, and say which can be chosen. */
    const turn = () => {
      const { rates } = data.cells[setting()];
      rate = rates.reduce((best, v) => (Math.abs(Math.log(v / rate)) < Math.abs(Math.log(best / rate)) ? v : best), rates[0]);
      slider.input.max = rates.length - 1;
      slider.set(rates.indexOf(rate));
      for (const option of layers.select.options) option.disabled = !data.cells[`${way} ${option.value}`];
      for (const option of kind.select.options) option.disabled = !data.cells[`${option.value} ${depth}`];
      draw();
    };

    const sentence = rb.html("span", { role: "status" }), numbers = rb.html("p", { class: "rb-numbers" });
    const slider = rb.slider({ label: "Learning rate", min: 0, max: data.cells[setting()].rates.length - 1, step: 1,
      value: data.cells[setting()].rates.indexOf(rate), to: (k) => k, format: (k) => `${data.cells[setting()].rates[k]}`,
      change: (k) => { rate = data.cells[setting()].rates[k]; draw(); } });
    const bound = rb.slider({ label: "Learns: right on", min: 50, max: 95, step: 5, value: 100 * least,
      format: (v) => `${v}% or more`, change: (v) => { least = v / 100; draw(); } });
    const layers = rb.choice("Hidden layers", data.depths, `${depth}`, (v) => { depth = v; turn(); });
    const kind = rb.choice("Images", images, way, (v) => { way = v; turn(); });
    const panel = (title, content) => rb.html("div", { class: "rb-panel" }, rb.html("p", { class: "rb-head-line", text: title }), content);
    stage.append(
      rb.html("div", { class: "rb-panels" }, panel("Every network, by treatment and rate", map), panel("Dead units at the framed rate", shares)),
      rb.html("div", { class: "rb-words" }, rb.html("p", { class: "rb-state" }, sentence), numbers),
      rb.html("div", { class: "rb-side" }, rb.html("div", { class: "rb-sliders rb-wide" }, slider.node),
        layers.node, kind.node, rb.html("div", { class: "rb-sliders rb-wide" }, bound.node)),
      rb.html("p", { class: "rb-key" }, ...FATES.map((fate, k) => rb.html("span", { class: `rb-key-fate-${k}`, text: fate })),
        rb.html("span", { class: "rb-key-none", text: "a mark is a network" })));
    turn();
  });
})();
