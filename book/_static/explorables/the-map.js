/* The map: dead units and accuracy over the learning rate, every stored network a dot.

   Nothing is computed here but means and quartiles: the dots are the book's networks, and between
   the rates that were measured nothing is drawn. */
(() => {
  "use strict";
  const rb = window.relubook;
  const SERIES = [
    { name: "as they come", mark: "circle", shift: -0.16 },
    { name: "centered", mark: "square", shift: 0.16 },
  ];
  const LAYERS = { "both layers": ["layer1", "layer2"], "layer 1": ["layer1"], "layer 2": ["layer2"] };

  // ---- the model -----------------------------------------------------------------------------
  /* Dead shares and accuracies of one cell's networks; null where a network overflowed. */
  const cell = (data, optimizer, series, index, layers) => {
    const at = data.cells[optimizer][series], units = layers.length * data.units;
    return {
      dead: at.layer1[index].map((_, k) => {
        const silent = layers.map((layer) => at[layer][index][k]);
        return silent.includes(null) ? null : silent.reduce((a, b) => a + b, 0) / units;
      }),
      accuracy: at.accuracy[index].map((hits) => hits / data.images),
    };
  };
  /* Mean and middle half of the networks that did not overflow, and how many did. */
  const summary = (values) => {
    const kept = values.filter((v) => v !== null).sort((a, b) => a - b), n = kept.length;
    const quantile = (q) => {
      const place = q * (n - 1), low = Math.floor(place);
      return kept[low] + (place - low) * (kept[Math.min(low + 1, n - 1)] - kept[low]);
    };
    return n ? { mean: kept.reduce((a, b) => a + b, 0) / n, low: quantile(0.25), high: quantile(0.75), n }
      : { n };
  };
  rb.theMap = { cell, summary, layers: LAYERS };

  // ---- the picture ---------------------------------------------------------------------------
  rb.explorable("the-map", (stage, data) => {
    const s = rb.svg, rates = data.rates;
    let optimizer = "SGD", layers = "both layers", rate = rates.indexOf(0.56);
    const box = { left: 44, right: 392, top: 10, bottom: 242 };
    const px = (k) => box.left + 12 + k / (rates.length - 1) * (box.right - box.left - 24);
    const py = (share) => box.bottom - share * (box.bottom - box.top);
    const text = (x, y, content, name, anchor = "start") =>
      s("text", { x, y, class: `rb-text ${name || ""}`, "text-anchor": anchor, text: content });
    const chart = () => {
      const marks = s("g"), here = s("line", { class: "rb-here", y1: box.top, y2: box.bottom });
      const ground = [0, 0.25, 0.5, 0.75, 1].flatMap((share) => [
        s("line", { class: "rb-grid", x1: box.left, x2: box.right, y1: py(share), y2: py(share) }),
        text(box.left - 6, py(share) + 4, `${100 * share}%`, "rb-muted", "end")]);
      const ticks = rates.map((v, k) => [v, k]).filter(([v]) => [0.001, 0.01, 0.1, 1, 10].includes(v))
        .map(([v, k]) => text(px(k), box.bottom + 18, `${v}`, "rb-muted", "middle"));
      const picture = s("svg", { viewBox: "0 0 400 280", role: "img" }, ...ground, ...ticks,
        text((box.left + box.right) / 2, box.bottom + 34, "learning rate", "rb-muted", "middle"), here, marks);
      return { marks, here, picture };
    };
    const charts = { dead: chart(), accuracy: chart() };
    const percent = (v) => `${rb.number(100 * v, v > 0 && v < 0.095 ? 1 : 0)}%`;

    const draw = () => {
      const now = SERIES.map(({ name }) => rates.map((_, k) => cell(data, optimizer, name, k, LAYERS[layers])));
      for (const [what, { marks, here, picture }] of Object.entries(charts)) {
        marks.replaceChildren(...SERIES.flatMap(({ mark, shift }, way) => {
          const width = px(1) - px(0), kind = `rb-way-${mark}`;
          const dots = rates.flatMap((_, k) => now[way][k][what].map((share, network) => share === null ? ""
            : `M${(px(k) + width * (shift + 0.2 * (network / (data.networks - 1) - 0.5))).toFixed(1)} ${py(share).toFixed(1)}h0`));
          const means = rates.map((_, k) => [px(k), summary(now[way][k][what]).mean])
            .filter(([, mean]) => mean !== undefined).map(([x, mean]) => [x, py(mean)]);
          return [s("path", { class: `rb-way-dots ${kind}`, d: dots.join("") }), s("polyline", { class: `rb-way-line ${kind}`, points: rb.points(means) })];
        }));
        rb.set(here, { x1: px(rate), x2: px(rate) });
        rb.set(picture, { "aria-label": `${what === "dead" ? `Dead units, ${layers}` : "Test accuracy"}, by learning rate, ${optimizer}.` });
      }
      const told = SERIES.map(({ name }, way) => {
        const { dead, accuracy } = now[way][rate];
        const d = summary(dead), a = summary(accuracy), gone = data.networks - d.n;
        const over = gone ? `, ${gone} of ${data.networks} overflowed` : "";
        return d.n ? `${name}, ${percent(d.mean)} of the units are dead and ${percent(a.mean)} of the test images right${over}`
          : `${name}, all networks overflowed`;
      });
      const words = `${optimizer} at ${rates[rate]}: ${told.join("; ")}.`;
      if (sentence.textContent !== words) sentence.textContent = words;
      numbers.textContent = SERIES.map(({ name }, way) => {
        const d = summary(now[way][rate].dead);
        return d.n ? `${name}: half of ${d.n} networks have between ${percent(d.low)} and ${percent(d.high)} dead` : "";
      }).join(" \u00b7 ");
    };

    const sentence = rb.html("span", { role: "status" });
    const numbers = rb.html("p", { class: "rb-numbers" });
    const slider = rb.slider({ label: "Learning rate", min: 0, max: rates.length - 1, step: 1, value: rate,
      to: (k) => k, format: (k) => `${rates[k]}`, change: (k) => { rate = k; draw(); } });
    const key = rb.html("p", { class: "rb-key" },
      rb.html("span", { class: "rb-key-come", text: "data as they come" }),
      rb.html("span", { class: "rb-key-centered", text: "centered data" }),
      rb.html("span", { class: "rb-key-none", text: "a dot is a network, a line joins the means" }));
    const panel = (title, ...content) => rb.html("div", { class: "rb-panel" }, rb.html("p", { class: "rb-head-line", text: title }), ...content);
    stage.append(
      rb.html("div", { class: "rb-panels" }, panel("Dead units", charts.dead.picture), panel("Test accuracy", charts.accuracy.picture)),
      rb.html("div", { class: "rb-words" }, rb.html("p", { class: "rb-state" }, sentence), numbers),
      rb.html("div", { class: "rb-side" },
        rb.choice("Optimizer", Object.keys(data.cells), optimizer, (v) => { optimizer = v; draw(); }).node,
        rb.choice("Dead in", Object.keys(LAYERS), layers, (v) => { layers = v; draw(); }).node,
        rb.html("div", { class: "rb-sliders rb-wide" }, slider.node)),
      key);
    draw();
  });
})();
