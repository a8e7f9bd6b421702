/* Take the largest: lines to lay under a bowl, and maxout units, which are the largest of them.

   A line is where the reader put its handle: at `p`, `lift` above a guide, with the guide's slope
   there, so that it touches where the lift is 0. The guide of one unit is x^2 itself. A wave bends
   both ways and is a difference of two bowls, wave + C x^2 and C x^2: these guide two units. */
(() => {
  "use strict";
  const rb = window.relubook;
  const C = 1.8; // at least half of the wave's largest second derivative, 0.35 pi^2
  const bowl = (c) => ({ f: (x) => c * x * x, slope: (x) => 2 * c * x });
  const WAVE = { f: (x) => 0.35 * Math.sin(Math.PI * x), slope: (x) => 0.35 * Math.PI * Math.cos(Math.PI * x) };
  const SUM = { f: (x) => WAVE.f(x) + bowl(C).f(x), slope: (x) => WAVE.slope(x) + bowl(C).slope(x) };
  const MODES = {
    "one maximum": { guides: [bowl(1)], target: bowl(1).f, name: "x²" },
    "a difference of two": { guides: [SUM, bowl(C)], target: WAVE.f, name: "the wave" },
  };
  const GRID = Array.from({ length: 401 }, (_, k) => k / 200 - 1);
  const MOST = 8;

  // ---- the model -----------------------------------------------------------------------------
  /* Lines as [slope, height at 0]. */
  const lines = (guide, handles) => handles.map(({ p, lift }) => {
    const slope = guide.slope(p);
    return [slope, guide.f(p) + lift - slope * p];
  });
  const largest = (rows, x) => Math.max(...rows.map(([a, b]) => a * x + b));
  /* Where from -1 to 1 each line is the largest, equals included; null if on no stretch. */
  const reigns = (rows) => rows.map(([a, b]) => {
    let from = -1, to = 1;
    for (const [c, d] of rows) {
      if (a === c && d > b) return null;
      if (a > c) from = Math.max(from, (d - b) / (a - c));
      if (a < c) to = Math.min(to, (d - b) / (a - c));
    }
    return to - from > 1e-9 ? [from, to] : null;
  });
  /* k lines that stay within 1/(2 k^2) of x^2. None do better: of the k + 1 ends of these pieces,
     two neighbors would share a line, and one that is high enough there is too high between. */
  const best = (k) => Array.from({ length: k }, (_, j) => ({ p: -1 + (2 * j + 1) / k, lift: 1 / (2 * k * k) }));
  const bestError = (k) => 1 / (2 * k * k);
  const spread = (k) => best(k).map(({ p }) => ({ p, lift: 0 }));
  /* What units with these handles make, and where it is furthest from the target. */
  const outcome = (mode, units) => {
    const { guides, target } = MODES[mode];
    const rows = units.map((handles, u) => lines(guides[u], handles)), won = rows.map(reigns);
    const at = (x) => rows.reduce((sum, own, u) => sum + (u ? -1 : 1) * largest(own, x), 0);
    const xs = [...GRID, ...won.flat(2).filter((x) => x !== null), ...units.flat().map(({ p }) => p)].sort((a, b) => a - b);
    const off = xs.map((x) => at(x) - target(x));
    const worst = off.reduce((most, v, k) => (Math.abs(v) > Math.abs(off[most]) ? k : most), 0);
    return { rows, won, at, xs, off, error: Math.abs(off[worst]), where: xs[worst] };
  };
  rb.takeTheLargest = { best, bestError, spread, grid: GRID, modes: Object.keys(MODES),
    target: (mode, x) => MODES[mode].target(x),
    outcome: (mode, units) => { const { at, ...rest } = outcome(mode, units); return { ...rest, values: GRID.map(at) }; } };

  // ---- the picture ---------------------------------------------------------------------------
  rb.explorable("take-the-largest", (stage) => {
    const s = rb.svg, clip = rb.id("clip"), other = rb.id("clip");
    const starts = { "one maximum": [[...spread(3), { p: 0.35, lift: -0.3 }]], "a difference of two": [spread(4), spread(4)] };
    const names = { "one maximum": ["line"], "a difference of two": ["line", "subtracted line"] };
    let mode = "one maximum", units = starts[mode], hand = [0, 3];
    const box = { left: 8, right: 392, top: 8, bottom: 272 };
    const px = (x) => box.left + (x + 1) / 2 * (box.right - box.left);
    const heights = (low, high) => (y) => box.bottom - (y - low) / (high - low) * (box.bottom - box.top);
    let py = heights(-0.7, 1.15), low = -0.7, high = 1.15;
    const path = (xs, at, to) => rb.points(xs.map((x) => [px(x), rb.clamp(to(at(x)), -400, 680)]));
    const frame = (id) => s("defs", {}, s("clipPath", { id }, s("rect", { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top })));
    const across = (kind) => s("line", { class: kind, x1: box.left, x2: box.right });
    const axis = across("rb-axis"), drawn = s("g", { "clip-path": `url(#${clip})` }), handles = s("g"), labels = s("g", { "aria-hidden": "true" });
    const left = s("svg", { viewBox: "0 0 400 280", role: "group", "aria-label": "Lines and the largest of them" }, frame(clip), axis, drawn, labels, handles);
    const result = s("g", { "clip-path": `url(#${other})` }), notes = s("g"), zero = across("rb-axis");
    const right = s("svg", { viewBox: "0 0 400 280", role: "img" }, frame(other), zero, result, notes);
    const guide = (u) => MODES[mode].guides[u];
    const held = () => units[hand[0]][hand[1]];

    const move = ([u, k], p, lift) => {
      const at = { p: rb.clamp(p, -1, 1), lift: rb.clamp(lift, -0.6, 0.6) };
      units = units.map((own, i) => (i === u ? own.map((old, j) => (j === k ? at : old)) : own));
      hand = [u, k];
      draw();
    };
    const handle = (u, k) => {
      const now = () => units[u][k];
      const dot = s("g", { class: `rb-handle${u ? " rb-minus" : ""}`, tabindex: 0, role: "slider", "aria-valuemin": -1, "aria-valuemax": 1,
        onfocus: () => { hand = [u, k]; draw(); },
        onpointerdown: (event) => { dot.setPointerCapture(event.pointerId); event.preventDefault(); dot.focus(); },
        onpointermove: (event) => {
          if (!dot.hasPointerCapture(event.pointerId)) return;
          const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(left.getScreenCTM().inverse());
          const p = rb.clamp((at.x - box.left) / (box.right - box.left) * 2 - 1, -1, 1);
          move([u, k], p, low + (box.bottom - at.y) / (box.bottom - box.top) * (high - low) - guide(u).f(p));
        },
        onkeydown: (event) => {
          const [across, up] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] }[event.key] || [];
          if (across === undefined) return;
          event.preventDefault();
          const by = event.shiftKey ? 0.1 : 0.02;
          move([u, k], now().p + across * by, now().lift + up * by);
        } }, s("circle", { class: "rb-reach", r: 18 }), u ? s("rect", { x: -9, y: -9, width: 18, height: 18, rx: 2 }) : s("circle", { r: 9.5 }), s("text", { dy: ".35em", "text-anchor": "middle", text: k + 1 }));
      return dot;
    };

    const draw = () => {
      const now = outcome(mode, units), one = units.length === 1, { target, name } = MODES[mode], k = units[0].length;
      [low, high] = one ? [-0.7, 1.15] : [-0.7, 2];
      py = heights(low, high);
      rb.set(axis, { y1: py(0), y2: py(0) });
      const lost = now.won.map((own) => own.map((v, i) => (v ? 0 : i + 1)).filter((i) => i));
      drawn.replaceChildren(
        ...(one ? [s("polyline", { class: "rb-curve", points: path(now.xs, target, py) })] : []),
        ...now.rows.flatMap((own, u) => own.map(([a, b], i) => s("polyline", {
          class: `rb-one-line${u ? " rb-minus" : ""}${now.won[u][i] ? "" : " rb-lost"}`, points: path([-1, 1], (x) => a * x + b, py) }))),
        ...now.rows.map((own, u) => s("polyline", { class: `rb-unit${u ? " rb-minus" : ""}`, points: path(now.xs, (x) => largest(own, x), py) })));
      const words = (x, y, text, kind) => s("text", { class: `rb-text ${kind || ""}`, x: px(x), y,
        "text-anchor": x < -0.45 ? "start" : x > 0.45 ? "end" : "middle", text });
      labels.replaceChildren(...lost.flatMap((own, u) => own.map((i) => {
        const { p, lift } = units[u][i - 1];
        return words(p, rb.clamp(py(guide(u).f(p) + lift) + 24, 30, 272), `line ${i} never wins`, "rb-muted");
      })));
      const wanted = units.flatMap((own, u) => own.map((_, i) => [u, i]));
      if (handles.dataset.shape !== `${units.map((own) => own.length)}`) {
        handles.replaceChildren(...wanted.map(([u, i]) => handle(u, i)));
        handles.dataset.shape = `${units.map((own) => own.length)}`;
      }
      wanted.forEach(([u, i], n) => {
        const { p, lift } = units[u][i], [slope] = now.rows[u][i];
        rb.set(handles.children[n], { transform: `translate(${px(p).toFixed(1)} ${rb.clamp(py(guide(u).f(p) + lift), 12, 268).toFixed(1)})`,
          "aria-label": `${names[mode][u]} ${i + 1}`, "aria-valuenow": p.toFixed(2),
          "aria-valuetext": `slope ${rb.number(slope)}, lift ${rb.number(lift)}${now.won[u][i] ? "" : ", never wins"}` });
      });
      // The second picture: how far one unit is off, or the difference of two.
      const most = one ? 1.25 * Math.max(now.error, 2 * bestError(k)) : 0.6, to = heights(-most, most);
      rb.set(zero, { y1: to(0), y2: to(0) });
      const gap = s("line", { class: "rb-miss", x1: px(now.where), x2: px(now.where), y1: to(one ? 0 : target(now.where)), y2: to(now.at(now.where) - (one ? target(now.where) : 0)) });
      const edge = (y) => s("line", { class: "rb-gone", x1: box.left, x2: box.right, y1: to(y), y2: to(y) });
      result.replaceChildren(...(one
        ? [edge(bestError(k)), edge(-bestError(k)), s("polyline", { class: "rb-unit", points: rb.points(now.xs.map((x, i) => [px(x), to(now.off[i])])) })]
        : [s("polyline", { class: "rb-curve", points: path(now.xs, target, to) }), s("polyline", { class: "rb-unit", points: path(now.xs, now.at, to) })]), gap);
      notes.replaceChildren(...(one ? [words(-0.98, to(bestError(k)) - 6, `the best ${k}: within ${rb.number(bestError(k), 3)}`, "rb-muted")] : []));
      rb.set(right, { "aria-label": one ? `How far the unit is from x², from −${rb.number(most)} to ${rb.number(most)}.` : "The wave, dashed, and the difference of the two units." });
      first.textContent = one ? "Drag the lines: x² is the dashed curve" : "Drag the lines of two units: circles minus squares";
      second.textContent = one ? "The unit minus x²: the best lines keep between the dots" : "The difference: the wave is dashed";
      const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
      const idle = lost.flatMap((own, u) => own.map((i) => `${names[mode][u]} ${i}`));
      const never = idle.length ? ` ${idle.join(" and ")} never win${idle.length === 1 ? "s" : ""}.`.replace(/^ ./, (c) => c.toUpperCase()) : "";
      sentence.textContent = one
        ? `Of ${plural(k, "line")} ${k - idle.length} win${k - idle.length === 1 ? "s" : ""}: the largest is at worst ${rb.number(now.error, 3)} from ${name}; with the best ${plural(k, "line")} ${rb.number(bestError(k), 3)}.${never}`
        : `The largest of ${plural(k, "line")} minus the largest of ${units[1].length}: at worst ${rb.number(now.error, 3)} from ${name}, which bends both ways.${never}`;
      const { p, lift } = held(), label = (u, i) => `${names[mode][u]} ${i + 1}`;
      const title = label(...hand).replace(/^./, (c) => c.toUpperCase());
      for (const [slider, what, value] of [[tilt, "slope", p], [rise, "lift", lift]]) {
        slider.node.querySelector("label").textContent = `${title}: ${what}`;
        slider.set(value);
      }
      fewer.textContent = `Remove ${label(...hand)}`;
      more.disabled = k >= MOST || units.some((own) => own.length >= MOST);
      fewer.disabled = units[hand[0]].length <= 1;
      lay.textContent = one ? `Lay the best ${k}` : "Spread evenly";
    };
    /* A new line touches where the unit falls furthest short; of a difference, both get one. */
    const add = () => {
      const now = outcome(mode, units), short = now.off.map((v) => (units.length === 1 ? -v : Math.abs(v)));
      const free = (x) => units.flat().every(({ p }) => Math.abs(p - x) >= 0.02);
      const p = now.xs.filter(free).reduce((top, x) => (short[now.xs.indexOf(x)] > short[now.xs.indexOf(top)] ? x : top));
      units = units.map((own) => [...own, { p, lift: 0 }]);
      hand = [0, units[0].length - 1];
      draw();
    };
    const remove = () => {
      const [u, k] = hand;
      units = units.map((own, i) => (i === u ? own.filter((_, j) => j !== k) : own));
      hand = [u, Math.max(0, k - 1)];
      draw();
    };

    const sentence = rb.html("span", { role: "status" });
    const first = rb.html("p", { class: "rb-head-line" }), second = rb.html("p", { class: "rb-head-line" });
    const button = (label, click, kind) => rb.html("button", { type: "button", class: `rb-button ${kind || ""}`, text: label, onclick: click });
    const more = button("Add a line", add, "rb-primary"), fewer = button("", remove);
    const lay = button("", () => { units = units.map((own) => (units.length === 1 ? best : spread)(own.length)); draw(); });
    const kind = rb.choice("Built of", Object.keys(MODES), mode, (v) => { starts[mode] = units; mode = v; units = starts[v]; hand = [0, 0]; draw(); });
    const tilt = rb.slider({ label: "", min: -1, max: 1, step: 0.01, value: 0,
      format: (p) => rb.number(guide(hand[0]).slope(p)), change: (p) => move(hand, p, held().lift) });
    const rise = rb.slider({ label: "", min: -0.6, max: 0.6, step: 0.01, value: 0,
      format: (lift) => rb.number(lift), change: (lift) => move(hand, held().p, lift) });
    stage.append(
      rb.html("div", { class: "rb-panels" },
        rb.html("div", { class: "rb-panel" }, first, left), rb.html("div", { class: "rb-panel" }, second, right)),
      rb.html("div", { class: "rb-words" }, rb.html("p", { class: "rb-state" }, sentence)),
      rb.html("div", { class: "rb-side" }, more, fewer, lay, kind.node, tilt.node, rise.node));
    draw();
  });
})();
