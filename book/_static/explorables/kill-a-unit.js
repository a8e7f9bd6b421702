/* Kill a unit: one ReLU unit on nine points, one outlier, and the plane of weight and bias.

   The whole history is a pure function of the parameters: every control computes it again from the
   start, so that a slider answers "what if" for the run on the screen. */
(() => {
  "use strict";
  const rb = window.relubook;

  // ---- the model -----------------------------------------------------------------------------
  const X = [1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3];
  const NOISE = [0.08, -0.1, 0.04, -0.06, 0.1, -0.02, -0.08, 0.09, -0.05];
  const Y = X.map((x, k) => 1 + 0.5 * (x - 2) + NOISE[k]);
  const MEAN = 2;
  const OUTLIER_Y = 1;
  const DEFAULTS = { rate: 0.15, leak: 0, center: false, start: [0.5, -0.9], outlier: 5, drops: [] };

  /* Gradient descent on the mean of half the squared error. `start` is in raw coordinates: centered,
     the same function starts with the bias b + w mean. A step listed in `drops` sees the outlier
     alone. `mean` (for the animation between the two views) overrides `center`. */
  const run = (parameters, steps) => {
    const p = { ...DEFAULTS, ...parameters };
    const mean = p.mean === undefined ? (p.center ? MEAN : 0) : p.mean;
    const x = X.map((v) => v - mean);
    let [w, b] = [p.start[0], p.start[1] + p.start[0] * mean];
    const path = { x, y: Y, mean, w: [], b: [], fires: [], loss: [] };
    const note = () => {
      let fires = 0, loss = 0;
      x.forEach((v, k) => {
        const z = w * v + b;
        const error = (z > 0 ? z : p.leak * z) - Y[k];
        fires += z > 0;
        loss += error * error / 2 / x.length;
      });
      path.w.push(w); path.b.push(b); path.fires.push(fires); path.loss.push(loss);
    };
    note();
    for (let step = 0; step < steps; step += 1) {
      const outlier = p.drops.includes(step);
      const [bx, by] = outlier ? [[p.outlier - mean], [OUTLIER_Y]] : [x, Y];
      let gw = 0, gb = 0;
      bx.forEach((v, k) => {
        const z = w * v + b;
        const slope = z > 0 ? 1 : p.leak;
        const delta = (slope * z - by[k]) * slope;
        gw += delta * v; gb += delta;
      });
      w -= p.rate * gw / bx.length;
      b -= p.rate * gb / bx.length;
      note();
    }
    return path;
  };

  /* What happened up to a step, in one word and one sentence. */
  const describe = (p, path, t) => {
    const n = X.length, fires = path.fires[t];
    const silent = path.fires.slice(0, t + 1).map((count, k) => (count === 0 ? k : -1)).filter((k) => k >= 0);
    const hit = p.drops.filter((step) => step < t);
    const hits = hit.length > 1 ? "The outliers" : "The outlier";
    if (!Number.isFinite(path.w[t]) || Math.abs(path.w[t]) > 1e6)
      return ["diverged", "Diverged", "The steps overshoot further each time: the rate is too high."];
    if (fires === 0 && p.leak === 0) {
      let since = t;
      while (since > 0 && path.fires[since - 1] === 0) since -= 1;
      if (since === 0) return ["dead", "Dead", `Dead from the start: z is below 0 on all ${n} points, and every gradient is exactly 0.`];
      const cause = p.drops.includes(since - 1)
        ? `One outlier pushed z below 0 on all ${n} points.`
        : `No outlier needed: at rate ${rb.number(p.rate)} an ordinary step overshot on all ${n} points.`;
      return ["dead", "Dead", `${cause} Every gradient is now 0, so it stays there.${p.center ? " Even on centered inputs: the step took b itself below 0." : " Tick \u201cCenter the inputs\u201d to replay it."}`];
    }
    if (fires === 0)
      return ["leak", "Below 0, not dead", `Below 0 on all ${n} points, yet a leak of ${rb.number(p.leak)} lets some gradient through: it creeps back. Press Play.`];
    if (silent.length)
      return ["alive", "Came back", `It was below 0 on all ${n} points for ${silent.length} ${silent.length === 1 ? "step" : "steps"}; the leak brought it back.`];
    if (hit.length && p.center) {
      const turned = path.w.slice(0, t + 1).some((w) => w < 0);
      return ["alive", "Alive", `${hits} pushed one side up, the other down. ` +
        (turned ? "The unit turned round, but still fired." : "The unit tilted, but still fired.") + " Raise the rate, move the outlier: can you kill it?"];
    }
    if (hit.length)
      return ["alive", "Alive", `The push left z above 0 somewhere. To kill it, move the outlier away or raise the rate.`];
    if (t === 0)
      return ["idle", "Not trained yet", `It fires on ${fires} of ${n} points. Press Play.`];
    return path.loss[t] < 0.012
      ? ["alive", "Fits", "It fires on all points and fits them. Now drop an outlier."]
      : ["alive", "Learning", `It fires on some points, so their gradient moves it.`];
  };

  rb.killAUnit = { run, describe, defaults: DEFAULTS, data: { x: X, y: Y, mean: MEAN } };

  // ---- the picture ---------------------------------------------------------------------------
  const LAST = 200, READY = 60, WIDTH = 400, HEIGHT = 300;
  const frame = (box, low, high) => ({
    x: (v) => box.left + (v - low[0]) / (high[0] - low[0]) * (box.right - box.left),
    y: (v) => box.bottom - (v - low[1]) / (high[1] - low[1]) * (box.bottom - box.top),
    back: (px, py) => [
      low[0] + (px - box.left) / (box.right - box.left) * (high[0] - low[0]),
      low[1] + (box.bottom - py) / (box.bottom - box.top) * (high[1] - low[1]),
    ],
    box, low, high,
  });
  const DATA = frame({ left: 8, right: 392, top: 8, bottom: 244 }, [-0.4, -2.7], [6.4, 3.1]);
  const PLANE = frame({ left: 8, right: 392, top: 8, bottom: 292 }, [-2.7, -2.3], [1.7, 2]);

  rb.explorable("kill-a-unit", (stage, data, root) => {
    const s = rb.svg;
    const clip = [rb.id("clip"), rb.id("clip")], head = rb.id("head");
    let p = { ...DEFAULTS };
    let t = READY, mean = 0, path, hold = 0, stopEase = () => {};

    const clipPath = (id, f) => s("clipPath", { id }, s("rect", {
      x: f.box.left, y: f.box.top, width: f.box.right - f.box.left, height: f.box.bottom - f.box.top }));
    const text = (x, y, content, name, anchor = "start") =>
      s("text", { x, y, class: `rb-text ${name || ""}`, "text-anchor": anchor, text: content });

    // Left: the unit over the data.
    const ticks = s("g", { class: "rb-ticks" });
    const zero = s("line", { class: "rb-axis", y1: DATA.box.top, y2: DATA.box.bottom });
    const zeroLabel = text(0, DATA.box.top + 10, "x = 0", "rb-muted");
    const before = s("polyline", { class: "rb-ghost" });
    const z = s("polyline", { class: "rb-z" });
    const unit = s("polyline", { class: "rb-unit" });
    const miss = s("line", { class: "rb-miss" });
    const bad = s("path", { class: "rb-outlier" });
    const badLabel = text(0, 0, "outlier", "rb-out", "middle");
    const zs = X.map(() => s("circle", { class: "rb-z-dot", r: 2 }));
    const dots = X.map(() => s("circle", { class: "rb-dot", r: 4.5 }));
    const pushLabel = text(DATA.x(3) + 16, 272, "", "rb-push-label");
    const pushes = X.map(() => s("path", { class: "rb-push" }));
    const left = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "The unit over the data" },
      s("defs", {}, clipPath(clip[0], DATA)),
      s("line", { class: "rb-axis", x1: DATA.box.left, x2: DATA.box.right, y1: DATA.y(0), y2: DATA.y(0) }),
      zero, zeroLabel, ticks,
      s("g", { "clip-path": `url(#${clip[0]})` }, before, z, ...zs, unit, miss),
      ...dots, bad, badLabel, ...pushes, pushLabel);

    // Right: the same unit as a point (w, b).
    const dead = s("polygon", { class: "rb-dead" });
    const deadLabel = text(0, 0, "dead", "rb-dead-label", "middle");
    const safe = text(PLANE.box.right, 0, "b \u2265 0: cannot be dead", "rb-safe", "end");
    const trail = s("polyline", { class: "rb-trail" });
    const jumps = s("g", { class: "rb-jumps" });
    const best = s("path", { class: "rb-best" });
    const bestLabel = text(0, 0, "best fit", "rb-muted");
    const handle = s("circle", { class: "rb-start", r: 7, tabindex: 0, role: "slider",
      "aria-label": "Start of the unit: arrow keys change weight and bias",
      "aria-valuemin": PLANE.low[0], "aria-valuemax": PLANE.high[0] });
    const startLabel = text(0, 0, "start: drag", "rb-muted");
    const now = s("circle", { class: "rb-now", r: 6 });
    const away = text(0, 0, "", "rb-out");
    const right = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": "The plane of weight and bias" },
      s("defs", {}, clipPath(clip[1], PLANE),
        s("marker", { id: head, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 5, markerHeight: 5, orient: "auto" },
          s("path", { d: "M0 0L8 4L0 8Z", class: "rb-head" }))),
      s("g", { "clip-path": `url(#${clip[1]})` }, dead,
        s("line", { class: "rb-axis", x1: PLANE.box.left, x2: PLANE.box.right, y1: PLANE.y(0), y2: PLANE.y(0) }),
        s("line", { class: "rb-axis", x1: PLANE.x(0), x2: PLANE.x(0), y1: PLANE.box.top, y2: PLANE.box.bottom })),
      text(PLANE.box.left + 6, PLANE.y(0) - 6, "weight w", "rb-dead-label"),
      text(PLANE.x(0) + 6, PLANE.box.bottom - 5, "bias b", "rb-dead-label"),
      deadLabel, safe, best, bestLabel, s("g", { "clip-path": `url(#${clip[1]})` }, trail), jumps, startLabel, handle, now, away);

    const inside = (w, b) => [
      rb.clamp(PLANE.x(w), PLANE.box.left + 7, PLANE.box.right - 7),
      rb.clamp(PLANE.y(b), PLANE.box.top + 7, PLANE.box.bottom - 7),
    ];
    const output = (w, b, v) => { const value = w * v + b; return value > 0 ? value : p.leak * value; };
    const hinge = (w, b) => { // in raw x
      const b0 = b - w * mean, edges = [DATA.low[0], DATA.high[0]], corner = -b0 / w;
      if (w !== 0 && corner > edges[0] && corner < edges[1]) edges.splice(1, 0, corner);
      return rb.points(edges.map((v) => [DATA.x(v), DATA.y(rb.clamp(output(w, b0, v), -50, 50))]));
    };
    const straight = (w, b) => {
      const b0 = b - w * mean;
      return rb.points([DATA.low[0], DATA.high[0]].map((v) => [DATA.x(v), DATA.y(rb.clamp(w * v + b0, -99, 99))]));
    };

    const draw = () => {
      path = run({ ...p, mean }, LAST);
      const w = path.w[t], b = path.b[t];
      const dropped = p.drops.filter((step) => step < t);
      const latest = dropped.length ? dropped[dropped.length - 1] : -1;

      // the data
      rb.set(zero, { x1: DATA.x(mean), x2: DATA.x(mean) });
      rb.set(zeroLabel, { x: DATA.x(mean) + 4 });
      ticks.replaceChildren();
      for (let k = -2; k <= 6; k += 1) {
        const at = DATA.x(mean + k);
        if (at > DATA.box.left + 8 && at < DATA.box.right - 4 && k !== 0)
          ticks.append(s("line", { x1: at, x2: at, y1: DATA.y(0), y2: DATA.y(0) + 4 }),
            text(at, DATA.y(0) + 16, rb.number(k, 0), "rb-muted", "middle"));
      }
      rb.set(unit, { points: hinge(w, b) });
      rb.set(z, { points: straight(w, b) });
      rb.set(before, { points: latest < 0 ? "" : hinge(path.w[latest], path.b[latest]) });
      zs.forEach((dot, k) => rb.set(dot, { cx: DATA.x(X[k]).toFixed(1), cy: rb.clamp(DATA.y(w * path.x[k] + b), -9, 399).toFixed(1) }));
      dots.forEach((dot, k) => rb.set(dot, { cx: DATA.x(X[k]).toFixed(1), cy: DATA.y(Y[k]).toFixed(1),
        class: w * path.x[k] + b > 0 ? "rb-dot rb-on" : "rb-dot" }));
      const ox = DATA.x(p.outlier), oy = DATA.y(OUTLIER_Y);
      rb.set(bad, { d: `M${ox.toFixed(1)} ${oy - 7}l7 7l-7 7l-7 -7Z`, class: latest < 0 ? "rb-outlier" : "rb-outlier rb-hit" });
      rb.set(badLabel, { x: ox.toFixed(1), y: oy + 22 });
      const guess = latest < 0 ? 0 : output(path.w[latest], path.b[latest], p.outlier - mean);
      rb.set(miss, { x1: ox, x2: ox, y1: oy, y2: latest < 0 ? oy : DATA.y(guess) });

      // the push on z, point by point
      const from = latest < 0 ? t - 1 : latest;
      pushLabel.textContent = from < 0 ? "" : latest < 0 ? "last step\u2019s push on each z" : "outlier\u2019s push on each z";
      pushes.forEach((arrow, k) => {
        const push = from < 0 ? 0 : (path.w[from + 1] - path.w[from]) * path.x[k] + path.b[from + 1] - path.b[from];
        const length = 17 * Math.tanh(Math.abs(push) / 0.4), way = push > 0 ? -1 : 1;
        const at = DATA.x(X[k]), middle = 268;
        rb.set(arrow, {
          d: length < 1.5 ? `M${(at - 1.5).toFixed(1)} ${middle}h3` :
            `M${at.toFixed(1)} ${(middle - way * length).toFixed(1)}V${(middle + way * length).toFixed(1)}m-3.5 ${-way * 5}l3.5 ${way * 5}l3.5 ${-way * 5}`,
          class: latest < 0 ? "rb-push" : "rb-push rb-by-outlier" });
      });

      // the plane
      const top = (v) => -Math.max(v * path.x[0], v * path.x[8]);
      const [w0, b0] = PLANE.low, w1 = PLANE.high[0];
      rb.set(dead, { points: rb.points([[w0, top(w0)], [0, 0], [w1, top(w1)], [w1, Math.min(b0, top(w1))], [w1, b0 - 9], [w0, b0 - 9]]
        .map(([u, v]) => [PLANE.x(u), PLANE.y(v)])), class: p.leak ? "rb-dead rb-leaky" : "rb-dead" });
      const share = mean / MEAN;
      rb.set(deadLabel, { x: PLANE.x(-1.75 + 0.9 * share).toFixed(1), y: PLANE.y(-1.55 - 0.3 * share).toFixed(1) });
      deadLabel.textContent = p.leak ? "below 0 on all points" : "dead on all points";
      rb.set(safe, { y: PLANE.box.top + 12, opacity: share.toFixed(2) });
      const [bw, bb] = fit();
      const [bx, by] = inside(bw, bb + bw * mean);
      rb.set(best, { d: `M${(bx - 5).toFixed(1)} ${by.toFixed(1)}h10m-5 -5v10` });
      rb.set(bestLabel, { x: (bx + 9).toFixed(1), y: (by + (share > 0.5 ? -6 : -8)).toFixed(1) });
      const seen = path.w.slice(0, t + 1).map((u, k) => [PLANE.x(rb.clamp(u, -99, 99)), PLANE.y(rb.clamp(path.b[k], -99, 99))]);
      rb.set(trail, { points: rb.points(seen) });
      jumps.replaceChildren(...dropped.map((k) => {
        const [x1, y1] = inside(path.w[k], path.b[k]), [x2, y2] = inside(path.w[k + 1], path.b[k + 1]);
        return s("line", { class: "rb-jump", x1: x1.toFixed(1), y1: y1.toFixed(1), x2: x2.toFixed(1), y2: y2.toFixed(1), "marker-end": `url(#${head})` });
      }));
      const [cx, cy] = inside(w, b);
      const word = describe(p, path, t);
      rb.set(now, { cx: cx.toFixed(1), cy: cy.toFixed(1), class: word[0] === "dead" ? "rb-now rb-is-dead" : "rb-now" });
      const outside = w < w0 || w > w1 || b < b0 || b > PLANE.high[1];
      away.textContent = outside && Number.isFinite(w) ? `(${rb.number(w, 1)}, ${rb.number(b, 1)})` : "";
      rb.set(away, { x: rb.clamp(cx + 12, 12, 310), y: rb.clamp(cy - 10, 24, 280) });
      const [sx, sy] = inside(p.start[0], p.start[1] + p.start[0] * mean);
      rb.set(handle, { cx: sx.toFixed(1), cy: sy.toFixed(1), "aria-valuenow": p.start[0].toFixed(2),
        "aria-valuetext": `weight ${rb.number(p.start[0])}, bias ${rb.number(p.start[1] + p.start[0] * mean)}` });
      rb.set(startLabel, { x: (sx + 6).toFixed(1), y: (sy + 21).toFixed(1) });

      // the words
      chip.textContent = word[1];
      state.dataset.state = word[0];
      if (sentence.textContent !== word[2]) sentence.textContent = word[2];
      numbers.textContent = `w ${rb.number(w)} \u00b7 b ${rb.number(b)} \u00b7 fires on ${path.fires[t]} of ${X.length} \u00b7 loss ${rb.number(path.loss[t], 3)}`;
      rb.set(left, { "aria-label": `The unit over the data at step ${t}: it fires on ${path.fires[t]} of ${X.length} points.` });
      time.set(t);
      drop.textContent = dropped.length ? "Drop another" : "Drop an outlier";
    };
    const fit = () => { // least squares: best for the unit too, for it is positive on all points
      const mx = MEAN, my = Y.reduce((a, v) => a + v, 0) / Y.length;
      const slope = X.reduce((a, v, k) => a + (v - mx) * (Y[k] - my), 0) / X.reduce((a, v) => a + (v - mx) ** 2, 0);
      return [slope, my - slope * mx];
    };

    // ---- the controls --------------------------------------------------------------------------
    const button = (label, click, kind) => rb.html("button", { type: "button", class: `rb-button ${kind || ""}`, text: label, onclick: click });
    const player = rb.player(stage, 30, (count) => {
      for (let k = 0; k < count; k += 1) {
        if (hold > 0) { hold -= 1; continue; }
        if (t >= LAST) break;
        t += 1;
        if (p.drops.includes(t - 1)) hold = 24; // let the reader see the jump
      }
      draw();
      const quiet = t > 25 && path.fires.slice(t - 25, t + 1).every((f) => f === 0) && p.leak === 0;
      return t < LAST && !quiet;
    }, (on) => { play.textContent = on ? "Pause" : "Play"; });
    const begin = () => {
      if (rb.reducedMotion()) { t = LAST; draw(); } else player.start();
    };
    const play = button("Play", () => {
      if (player.running()) { player.stop(); return; }
      if (t >= LAST) t = 0;
      begin();
    });
    const step = button("One step", () => { player.stop(); t = Math.min(LAST, t + 1); draw(); });
    const reset = button("Start again", () => { player.stop(); p = { ...p, drops: [] }; t = 0; draw(); });
    const drop = button("Drop an outlier", () => {
      if (t >= LAST) { player.stop(); t = READY; p = { ...p, drops: p.drops.filter((k) => k < t) }; }
      p = { ...p, drops: [...p.drops.filter((k) => k < t), t] };
      t += 1;
      hold = 24;
      draw();
      begin();
    }, "rb-primary");
    const box = rb.html("input", { type: "checkbox", onchange: () => {
      p = { ...p, center: box.checked };
      stopEase();
      stopEase = rb.ease(mean, p.center ? MEAN : 0, 700, (value) => { mean = value; draw(); });
    } });
    const center = rb.html("label", { class: "rb-check" }, box, rb.html("span", { text: "Center the inputs" }));
    const change = (name) => (value) => { p = { ...p, [name]: value }; draw(); };
    const time = rb.slider({ label: "After step", min: 0, max: LAST, step: 1, value: t, format: (v) => `${v}`,
      change: (v) => { player.stop(); t = v; draw(); } });
    time.node.classList.add("rb-time");
    const rate = rb.slider({ label: "Learning rate \u03b7", min: 0, max: 60, step: 1, value: p.rate,
      to: (v) => Number((0.02 * 25 ** (v / 60)).toPrecision(2)), from: (v) => Math.round(60 * Math.log(v / 0.02) / Math.log(25)),
      format: (v) => rb.number(v, v < 0.1 ? 3 : 2), change: change("rate") });
    const size = rb.slider({ label: "Outlier at x", min: 3, max: 6, step: 0.1, value: p.outlier, format: (v) => rb.number(v, 1), change: change("outlier") });
    const leak = rb.slider({ label: "Leak", min: 0, max: 0.3, step: 0.01, value: 0, format: (v) => rb.number(v), change: change("leak") });

    // Put the start anywhere: by pointer or by arrow keys.
    const move = (w, b) => { // b in the coordinates on the screen
      const u = rb.clamp(w, PLANE.low[0] + 0.1, PLANE.high[0] - 0.1), v = rb.clamp(b, PLANE.low[1] + 0.1, PLANE.high[1] - 0.1);
      p = { ...p, start: [u, v - u * mean] };
      draw();
    };
    handle.addEventListener("pointerdown", (event) => { handle.setPointerCapture(event.pointerId); event.preventDefault(); handle.focus(); });
    handle.addEventListener("pointermove", (event) => {
      if (!handle.hasPointerCapture(event.pointerId)) return;
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(right.getScreenCTM().inverse());
      move(...PLANE.back(at.x, at.y));
    });
    handle.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (!way) return;
      event.preventDefault();
      const by = event.shiftKey ? 0.5 : 0.1;
      move(p.start[0] + by * way[0], p.start[1] + p.start[0] * mean + by * way[1]);
    });

    const chip = rb.html("strong", { class: "rb-chip" });
    const sentence = rb.html("span", { role: "status" });
    const state = rb.html("p", { class: "rb-state" }, chip, sentence);
    const numbers = rb.html("p", { class: "rb-numbers" });
    const more = rb.html("details", { class: "rb-more" }, rb.html("summary", { text: "Rate, outlier, leak" }),
      rb.html("div", { class: "rb-sliders" }, rate.node, size.node, leak.node));
    more.open = !("compact" in root.dataset) || root.clientWidth > 560;
    const panel = (title, picture) => rb.html("div", { class: "rb-panel" }, rb.html("p", { class: "rb-head-line", text: title }), picture);
    stage.append(
      rb.html("div", { class: "rb-panels" },
        panel("One ReLU, z = wx + b, on nine points", left),
        panel("The same unit as a point", right)),
      rb.html("div", { class: "rb-words" }, state, numbers),
      rb.html("div", { class: "rb-side" }, drop, center, more),
      rb.html("div", { class: "rb-bar" }, play, step, reset, time.node));
    draw();
  });
})();
