/* On/off: which unit of one trained network is silent on which image, as it was stored.

   A filled row is a dead unit, a nearly filled column an image on which few units fire. Nothing is
   computed here but counts of what the book's network did. */
(() => {
  "use strict";
  const rb = window.relubook;
  const ORDERS = ["the digit", "the zeros"];

  // ---- the model -----------------------------------------------------------------------------
  /* One network: how many of all images make each unit fire, and on[unit][image] of those shown. */
  const network = (data, way, index) => {
    const state = data.states[way][index], images = data.digits.length;
    const units = data.units.reduce((a, b) => a + b, 0), bytes = atob(state.on);
    const bit = (k) => (bytes.charCodeAt(k >> 3) >> (7 - (k & 7))) & 1;
    return {
      fires: Array.from({ length: units }, (_, u) => parseInt(state.fires.slice(2 * u, 2 * u + 2), 36)),
      on: Array.from({ length: units }, (_, u) => Array.from({ length: images }, (__, i) => bit(u * images + i))),
    };
  };
  /* What is drawn: units layer by layer, the busiest first; images by digit, or by silent units. */
  const view = (data, way, index, order) => {
    const { fires, on } = network(data, way, index);
    const layer = data.units.flatMap((n, k) => new Array(n).fill(k));
    const zeros = data.digits.map((_, i) => on.reduce((sum, row) => sum + 1 - row[i], 0));
    return {
      fires, on, layer, zeros,
      rows: fires.map((_, u) => u).sort((a, b) => layer[a] - layer[b] || fires[b] - fires[a] || a - b),
      columns: zeros.map((_, i) => i).sort((a, b) => (order === ORDERS[0] ? 0 : zeros[a] - zeros[b]) || a - b),
      dead: fires.filter((n) => n === 0).length,
      silent: 1 - fires.reduce((a, b) => a + b, 0) / fires.length / data.all,
    };
  };
  const pixels = (data, image) => [...data.pixels.slice(64 * image, 64 * image + 64)].map((c) => parseInt(c, 36));
  rb.onOff = { network, view, pixels, orders: ORDERS };

  // ---- the picture ---------------------------------------------------------------------------
  rb.explorable("on-off", (stage, data) => {
    const s = rb.svg, images = data.digits.length, units = data.units[0] + data.units[1];
    let way = "as they are", index = data.rates.length - 1, order = ORDERS[0], row = 4, column = 17, now;
    const text = (x, y, content, name, anchor = "start", more = {}) =>
      s("text", { x, y, class: `rb-text ${name || ""}`, "text-anchor": anchor, text: content, ...more });

    // Left: the matrix. A cell is 7 by 4, and a gap parts the layers.
    const W = 7, H = 4, LEFT = 22, TOP = 6, GAP = 6;
    const cx = (c) => LEFT + W * c, ry = (r) => TOP + H * r + (r < data.units[0] ? 0 : GAP);
    const bottom = ry(units - 1) + H, right = cx(images);
    const silent = s("path", { class: "rb-silent" }), gone = s("path", { class: "rb-gone-rows" });
    const marks = s("g"), labels = s("g");
    const pickRow = s("rect", { class: "rb-pick", x: LEFT - 1, width: right - LEFT + 2, height: H + 2 });
    const pickColumn = s("rect", { class: "rb-pick", y: TOP - 2, width: W, height: bottom - TOP + 4 });
    const ground = data.units.map((n, k) => s("rect", { class: "rb-fires", x: LEFT, y: ry(k * data.units[0]), width: right - LEFT, height: n * H }));
    const matrix = s("svg", { viewBox: "0 0 420 296", role: "img", class: "rb-matrix" }, ...ground, silent, gone, pickColumn, pickRow, marks, labels,
      ...data.units.map((n, k) => text(12, ry(k * n) + n * H / 2, `layer ${k + 1}`, "rb-muted", "middle", { transform: `rotate(-90 12 ${ry(k * n) + n * H / 2})` })));
    const pick = (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.getScreenCTM().inverse());
      const y = at.y - TOP - (at.y > ry(data.units[0]) - GAP / 2 ? GAP : 0);
      unit.set(rb.clamp(Math.floor(y / H), 0, units - 1) + 1);
      image.set(rb.clamp(Math.floor((at.x - LEFT) / W), 0, images - 1) + 1);
      row = Number(unit.input.value) - 1;
      column = Number(image.input.value) - 1;
      draw();
    };
    matrix.addEventListener("pointerdown", pick);
    matrix.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse" && event.buttons === 1) pick(event); });

    // Right: the image picked, and a bar for each unit and for each image.
    const P = 12, picture = s("g"), told = s("g"), bars = s("g");
    const BAR = { left: 8, unit: { base: 190, height: 56, width: 6 }, image: { base: 272, height: 44, width: 384 / images } };
    const side = s("svg", { viewBox: "0 0 400 296", role: "img" }, picture, told, bars,
      s("line", { class: "rb-axis", x1: 8, x2: 392, y1: BAR.unit.base, y2: BAR.unit.base }),
      text(8, BAR.unit.base + 15, "a bar is a unit: how often it fires", "rb-muted"),
      s("line", { class: "rb-axis", x1: 8, x2: 392, y1: BAR.image.base, y2: BAR.image.base }),
      text(8, BAR.image.base + 15, "a bar is an image: how many units are silent", "rb-muted"));

    const percent = (share) => `${rb.number(100 * share, share > 0 && share < 0.095 ? 1 : 0)}%`;
    const name = (r) => `unit ${r % data.units[0] + 1} of layer ${now.layer[now.rows[r]] + 1}`;
    const run = (cells, y) => { // cells of a row as few strokes as there are runs
      let d = "";
      for (let c = 0; c < cells.length; c += 1) {
        const from = c;
        while (c < cells.length && cells[c]) c += 1;
        if (c > from) d += `M${cx(from)} ${y}h${W * (c - from)}`;
      }
      return d;
    };

    const draw = () => {
      now = view(data, way, index, order);
      const { rows, columns, fires, on, zeros } = now, u = rows[row], i = columns[column];
      const filled = (dead) => rows.map((unit_, r) => (fires[unit_] === 0) === dead ? run(columns.map((k) => !on[unit_][k]), ry(r) + H / 2) : "").join("");
      rb.set(silent, { d: filled(false) });
      rb.set(gone, { d: filled(true) });
      rb.set(pickRow, { y: ry(row) - 1 });
      rb.set(pickColumn, { x: cx(column) });
      marks.replaceChildren(...data.units.flatMap((n, k) => {
        const lost = rows.filter((unit_) => now.layer[unit_] === k && fires[unit_] === 0).length;
        const end = ry((k + 1) * n - 1) + H, middle = end - lost * H / 2;
        return lost ? [s("line", { class: "rb-bar-line", x1: right + 5, x2: right + 5, y1: end - lost * H, y2: end }),
          text(right + 10, middle + 4, "dead", "rb-out")] : [];
      }));
      labels.replaceChildren(...(order === ORDERS[0]
        ? [...new Set(data.digits)].map((digit) => text(cx(data.digits.indexOf(digit) + data.digits.filter((d) => d === digit).length / 2), bottom + 16, `${digit}`, "rb-muted", "middle"))
        : [text(LEFT, bottom + 16, "fewest silent units", "rb-muted"), text(right, bottom + 16, "most", "rb-muted", "end")]));
      rb.set(matrix, { "aria-label": `${units} units by ${images} images, filled where a unit is silent; ${now.dead} rows are filled from end to end on all images.` });

      picture.replaceChildren(s("rect", { class: "rb-fires", x: 8, y: 6, width: 8 * P, height: 8 * P }), ...pixels(data, i).map((v, k) => v
        ? s("rect", { class: "rb-ink", x: 8 + P * (k % 8), y: 6 + P * (k >> 3), width: P, height: P, "fill-opacity": (v / 16).toFixed(2) }) : null).filter(Boolean));
      const lines = [[`Image ${column + 1}: a ${data.digits[i]}`, ""], [`${zeros[i]} of ${units} units are silent`, "rb-muted"],
        [`U${name(row).slice(1)}`, ""], [fires[u] ? `fires on ${percent(fires[u] / data.all)} of all images` : "fires on no image: dead", fires[u] ? "rb-muted" : "rb-out"],
        [on[u][i] ? "fires on this one" : "silent on this one", "rb-muted"]];
      told.replaceChildren(...lines.map(([words, kind], k) => text(118, 22 + 19 * k, words, kind)));
      const bar = (k, share, { base, height, width }, chosen) => s("rect", { class: chosen ? "rb-bar-picked" : "rb-bar-plain",
        x: (BAR.left + k * width + 0.5).toFixed(1), width: (width - 1).toFixed(1), y: (base - share * height).toFixed(1), height: (share * height).toFixed(1) });
      bars.replaceChildren(...rows.map((unit_, r) => bar(r, fires[unit_] / data.all, BAR.unit, r === row)),
        ...columns.map((k, c) => bar(c, zeros[k] / units, BAR.image, c === column)));
      rb.set(side, { "aria-label": `${lines.map(([words]) => words).join(", ")}.` });

      const trained = index ? `trained at a rate of ${data.rates[index]}` : "before training";
      const words = `Images ${way}, ${trained}: ${now.dead} of ${units} units are dead, and ${percent(now.silent)} of all outputs are zeros.`;
      if (sentence.textContent !== words) sentence.textContent = words;
    };

    const sentence = rb.html("span", { role: "status" });
    const slider = (label, min, max, value, format, change) => rb.slider({ label, min, max, step: 1, value, format, change });
    now = view(data, way, index, order);
    const rate = slider("Learning rate", 0, data.rates.length - 1, index, (k) => (k ? `${data.rates[k]}` : "before training"), (k) => { index = k; draw(); });
    const unit = slider("Row: a unit", 1, units, row + 1, (k) => name(k - 1), (k) => { row = k - 1; draw(); });
    const image = slider("Column: an image", 1, images, column + 1, (k) => `a ${data.digits[now.columns[k - 1]]}`, (k) => { column = k - 1; draw(); });
    const sort = (value) => {
      order = value;
      draw();
      image.set(column + 1);
    };
    stage.append(
      rb.html("div", { class: "rb-panels" },
        rb.html("div", { class: "rb-panel" }, rb.html("p", { class: "rb-head-line", text: "A row is a unit; filled where it is silent" }), matrix),
        rb.html("div", { class: "rb-panel" }, rb.html("p", { class: "rb-head-line", text: "The row and the column that are framed" }), side)),
      rb.html("div", { class: "rb-words rb-short" }, rb.html("p", { class: "rb-state" }, sentence)),
      rb.html("div", { class: "rb-side" },
        rb.html("div", { class: "rb-sliders rb-wide" }, rate.node),
        rb.choice("Images", Object.keys(data.states), way, (v) => { way = v; draw(); }).node,
        rb.choice("Sorted by", ORDERS, order, sort).node,
        rb.html("div", { class: "rb-sliders rb-wide" }, unit.node, image.node)));
    draw();
  });
})();
