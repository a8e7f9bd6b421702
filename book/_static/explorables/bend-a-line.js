/* Bend a line: ReLUs added one by one until they draw a curve, or lines under a maximum.

   ReLUs: the corners are the reader's, the weights are fitted by least squares on a fine grid. A
   continuous curve of straight pieces is fixed by its heights at the corners, and those solve a
   system with three diagonals; the weight of a ReLU is the change of the slope at its corner.
   Maxout: the lines touch the curve where the reader says, and the unit is their maximum. */
(() => {
  "use strict";
  const rb = window.relubook;
  const CURVES = {
    "a wave": { f: (x) => 0.8 * Math.sin(4 * x), slope: (x) => 3.2 * Math.cos(4 * x) },
    "a bowl": { f: (x) => 1.6 * x * x - 0.8, slope: (x) => 3.2 * x },
    "a hill": { f: (x) => 1.5 * Math.exp(-8 * x * x) - 0.7, slope: (x) => -24 * x * Math.exp(-8 * x * x) },
    "a step": { f: (x) => 0.8 * Math.tanh(6 * x), slope: (x) => 4.8 * (1 - Math.tanh(6 * x) ** 2) },
  };
  const GRID = Array.from({ length: 401 }, (_, k) => k / 200 - 1);
  const MOST = 12, GAP = 0.02;

  // ---- the model -----------------------------------------------------------------------------
  /* The best line with these corners: heights at -1, the corners and 1, and the same as ReLUs,
     f(x) = start + slope (x + 1) + sum of weights[k] relu(x - corners[k]). */
  const relus = (name, corners) => {
    const { f } = CURVES[name], knots = [-1, ...corners, 1], n = knots.length;
    const main = new Array(n).fill(0), side = new Array(n - 1).fill(0), right = new Array(n).fill(0);
    let piece = 0;
    for (const x of GRID) {
      while (piece < n - 2 && x > knots[piece + 1]) piece += 1;
      const b = (x - knots[piece]) / (knots[piece + 1] - knots[piece]), a = 1 - b, y = f(x);
      main[piece] += a * a; main[piece + 1] += b * b; side[piece] += a * b;
      right[piece] += a * y; right[piece + 1] += b * y;
    }
    for (let k = 1; k < n; k += 1) {
      const by = side[k - 1] / main[k - 1];
      main[k] -= by * side[k - 1]; right[k] -= by * right[k - 1];
    }
    const heights = new Array(n);
    for (let k = n - 1; k >= 0; k -= 1)
      heights[k] = (right[k] - (k < n - 1 ? side[k] * heights[k + 1] : 0)) / main[k];
    const slopes = knots.slice(1).map((x, k) => (heights[k + 1] - heights[k]) / (x - knots[k]));
    return { start: heights[0], slope: slopes[0], weights: slopes.slice(1).map((v, k) => v - slopes[k]) };
  };
  const relusAt = (fit, corners, x) => corners.reduce(
    (sum, c, k) => sum + fit.weights[k] * Math.max(0, x - c), fit.start + fit.slope * (x + 1));
  /* Lines that touch the curve at these places, as [slope, height at 0]. */
  const tangents = (name, places) => places.map((p) => {
    const slope = CURVES[name].slope(p);
    return [slope, CURVES[name].f(p) - slope * p];
  });
  const maxoutAt = (lines, x) => Math.max(...lines.map(([slope, height]) => slope * x + height));
  /* What is drawn, where it is furthest from the curve, and into how many pieces it falls. */
  const outcome = (name, places, mode) => {
    const fit = mode === "ReLUs" ? relus(name, places) : tangents(name, places);
    const at = mode === "ReLUs" ? (x) => relusAt(fit, places, x) : (x) => maxoutAt(fit, x);
    const off = GRID.map((x) => Math.abs(at(x) - CURVES[name].f(x)));
    const worst = off.reduce((best, v, k) => (v > off[best] ? k : best), 0);
    const winners = new Set(mode === "ReLUs" ? [] : GRID.map((x) => fit.reduce(
      (best, [a, b], k) => (a * x + b > fit[best][0] * x + fit[best][1] ? k : best), 0)));
    const pieces = mode === "ReLUs" ? places.length + 1 : winners.size;
    return { fit, at, error: off[worst], where: GRID[worst], pieces };
  };
  rb.bendALine = {
    relus, relusAt, tangents, maxoutAt, grid: GRID, curves: Object.keys(CURVES),
    value: (name, x) => CURVES[name].f(x),
    outcome: (...asked) => { const { at, ...rest } = outcome(...asked); return { ...rest, values: GRID.map(at) }; },
  };

  // ---- the picture ---------------------------------------------------------------------------
  rb.explorable("bend-a-line", (stage, data, root) => {
    const s = rb.svg, clip = rb.id("clip"), other = rb.id("clip");
    let name = "a wave", mode = root.dataset.mode || "ReLUs", places = [-0.4, 0.1, 0.45];
    const box = { left: 8, right: 392, top: 8, bottom: 272 };
    const px = (x) => box.left + (x + 1) / 2 * (box.right - box.left);
    const py = (y) => (box.top + box.bottom) / 2 - y * 96;
    const line = (at) => rb.points(GRID.map((x) => [px(x), rb.clamp(py(at(x)), -200, 480)]));
    const frame = (id) => s("clipPath", { id }, s("rect", { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top }));
    const axis = () => s("line", { class: "rb-axis", x1: box.left, x2: box.right, y1: py(0), y2: py(0) });
    const curve = s("polyline", { class: "rb-curve" }), drawn = s("polyline", { class: "rb-unit" });
    const gap = s("line", { class: "rb-miss" }), handles = s("g"), parts = s("g", { "clip-path": `url(#${other})` });
    const left = s("svg", { viewBox: "0 0 400 280", role: "group", "aria-label": "The curve and the bent line" },
      s("defs", {}, frame(clip)), axis(), s("g", { "clip-path": `url(#${clip})` }, curve, drawn, gap), handles);
    const right = s("svg", { viewBox: "0 0 400 280", role: "img" }, s("defs", {}, frame(other)), axis(), parts);

    const move = (k, x) => {
      const low = k ? places[k - 1] + GAP : -1 + GAP, high = k < places.length - 1 ? places[k + 1] - GAP : 1 - GAP;
      places = places.map((v, i) => (i === k ? rb.clamp(x, low, high) : v));
      draw();
    };
    const handle = (k) => {
      const dot = s("circle", { class: "rb-start", r: 7, tabindex: 0, role: "slider", "aria-valuemin": -1, "aria-valuemax": 1,
        onpointerdown: (event) => { dot.setPointerCapture(event.pointerId); event.preventDefault(); dot.focus(); },
        onpointermove: (event) => {
          if (!dot.hasPointerCapture(event.pointerId)) return;
          const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(left.getScreenCTM().inverse());
          move(k, (at.x - box.left) / (box.right - box.left) * 2 - 1);
        },
        onkeydown: (event) => {
          const way = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
          if (!way) return;
          event.preventDefault();
          move(k, places[k] + way * (event.shiftKey ? 0.1 : 0.02));
        } });
      return dot;
    };

    const draw = () => {
      const now = outcome(name, places, mode), one = mode === "ReLUs" ? "corner" : "touching point";
      rb.set(curve, { points: line(CURVES[name].f) });
      rb.set(drawn, { points: line(now.at) });
      rb.set(gap, { x1: px(now.where), x2: px(now.where), y1: py(now.at(now.where)), y2: py(CURVES[name].f(now.where)) });
      while (handles.children.length > places.length) handles.lastChild.remove();
      while (handles.children.length < places.length) handles.append(handle(handles.children.length));
      places.forEach((x, k) => rb.set(handles.children[k], { cx: px(x).toFixed(1), cy: rb.clamp(py(now.at(x)), 12, 268).toFixed(1),
        "aria-label": `${one} ${k + 1}`, "aria-valuenow": x.toFixed(2), "aria-valuetext": `x = ${rb.number(x)}` }));
      const shown = mode === "ReLUs"
        ? [(x) => now.fit.start + now.fit.slope * (x + 1), ...places.map((c, k) => (x) => now.fit.weights[k] * Math.max(0, x - c))]
        : now.fit.map(([a, b]) => (x) => a * x + b);
      parts.replaceChildren(...shown.map((at, k) => s("polyline", { class: `rb-part rb-part-${mode === "ReLUs" && k === 0 ? "line" : k % 3}`, points: line(at) })));
      rb.set(right, { "aria-label": mode === "ReLUs" ? `A straight line and ${places.length} weighted ReLUs, which add up to the bent line.`
        : `${places.length} straight lines; the unit is the largest of them.` });
      second.textContent = mode === "ReLUs" ? "What is added up: a line, and the ReLUs times their weights" : "The lines; the unit is the largest";
      const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
      const off = `at worst it is ${rb.number(now.error)} away.`;
      const convex = name === "a bowl";
      sentence.textContent = mode === "ReLUs"
        ? `${plural(places.length, "ReLU")}, ${plural(now.pieces, "piece")}: ${off}`
        : `The largest of ${plural(places.length, "line")}, ${plural(now.pieces, "piece")}: ${off}` +
          (convex ? "" : " A maximum of lines only bends upwards: it takes the difference of two such units.");
      more.disabled = places.length >= MOST;
      fewer.disabled = places.length <= 1;
    };
    /* A new corner goes where the line is furthest off, unless one stands there. */
    const add = () => {
      const free = GRID.filter((x) => Math.abs(x) < 1 - GAP && places.every((p) => Math.abs(p - x) >= 2 * GAP));
      const now = outcome(name, places, mode), off = (x) => Math.abs(now.at(x) - CURVES[name].f(x));
      const at = free.reduce((best, x) => (off(x) > off(best) ? x : best), free[0]);
      places = [...places, at].sort((a, b) => a - b);
      draw();
    };
    const spread = () => { // a line touches best in the middle of its share, a corner stands at a border
      const n = places.length;
      places = places.map((_, k) => (mode === "ReLUs" ? -1 + 2 * (k + 1) / (n + 1) : -1 + (2 * k + 1) / n));
      draw();
    };

    const sentence = rb.html("span", { role: "status" });
    const second = rb.html("p", { class: "rb-head-line" });
    const button = (label, click, kind) => rb.html("button", { type: "button", class: `rb-button ${kind || ""}`, text: label, onclick: click });
    const more = button("Add one", add, "rb-primary");
    const fewer = button("Remove one", () => { places = places.slice(0, -1); draw(); });
    const shape = rb.choice("Curve", Object.keys(CURVES), name, (v) => { name = v; draw(); });
    const kind = rb.choice("Built of", ["ReLUs", "a maximum of lines"], mode, (v) => {
      mode = v;
      if (mode !== "ReLUs") shape.select.value = name = "a bowl"; // what one such unit can do
      draw();
    });
    stage.append(
      rb.html("div", { class: "rb-panels" },
        rb.html("div", { class: "rb-panel" }, rb.html("p", { class: "rb-head-line", text: "Drag a corner: the curve is dashed" }), left),
        rb.html("div", { class: "rb-panel" }, second, right)),
      rb.html("div", { class: "rb-words rb-short" }, rb.html("p", { class: "rb-state" }, sentence)),
      rb.html("div", { class: "rb-side" }, more, fewer, button("Spread evenly", spread),
        shape.node, kind.node));
    draw();
  });
})();
