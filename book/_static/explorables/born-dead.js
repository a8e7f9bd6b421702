/* Born dead: twelve fresh networks x -> f(x) without biases, and how often such networks are dead.

   A network's layers do not depend on the depth asked for: more depth means the same network read
   further on, so that what is dead stays dead before the reader's eyes. */
(() => {
  "use strict";
  const rb = window.relubook;
  const SHOWN = 12, DEEPEST = 30;

  // ---- the model -----------------------------------------------------------------------------
  /* Draw network number `index`: DEEPEST - 1 ReLU layers with He's variance 2 / fan_in, and behind
     each the last linear map that a network ending there would have. */
  const network = (width, index) => {
    const normal = rb.normals(Math.imul(index + 1, 2654435761) ^ Math.imul(width, 40503));
    const matrix = (rows, columns) => {
      const scale = Math.sqrt(2 / columns);
      return Array.from({ length: rows }, () => Array.from({ length: columns }, () => scale * normal()));
    };
    const hidden = [], last = [matrix(1, 1)];
    for (let layer = 1; layer < DEEPEST; layer += 1) {
      hidden.push(matrix(width, layer === 1 ? 1 : width));
      last.push(matrix(1, width));
    }
    return { hidden, last };
  };
  const times = (matrix, vector) => matrix.map((row) => row.reduce((sum, w, k) => sum + w * vector[k], 0));
  /* What the half-lines x > 0 and x < 0 become: f(1) and f(-1) at every depth from 1, and the first
     layer that is silent on each (0 for none). */
  const fate = ({ hidden, last }) => [1, -1].map((x) => {
    let h = [x], silent = 0;
    const f = [times(last[0], h)[0]];
    hidden.forEach((matrix, k) => {
      h = times(matrix, h).map((v) => (v > 0 ? v : 0));
      if (!silent && h.every((v) => v === 0)) silent = k + 1;
      f.push(times(last[k + 1], h)[0]);
    });
    return { f, silent };
  });
  const deadAt = (sides) => (sides.every((side) => side.silent) ? Math.max(sides[0].silent, sides[1].silent) : 0);

  /* Bounds of the probability, exact for width 1 and for depths up to 3: the lower one by Lu et al.
     2019, the upper one as the evidence derives it. */
  const upper = (width, depth) => {
    const q = 2 ** -width;
    return depth <= 2 ? 0 : -Math.expm1((depth - 1) * Math.log1p(-q) + Math.log1p(2 * q));
  };
  const lower = (width, depth) => {
    if (depth < 2) return 0;
    const q = 2 ** -width, a = 1 - q, b = 1 - 2 * q - (width - 1) * q * q, steps = depth - 2;
    const share = (1 - 2 * q) * (1 - q) / (1 + (width - 1) * q);
    return Math.max(0, 1 - 2 * a ** (depth - 1) + share * b ** steps + (1 - 2 * q - share) * a ** steps);
  };
  /* Wilson's 95% interval of a share. */
  const interval = (k, n) => {
    const z = 1.959963984540054, middle = (k + z * z / 2) / (n + z * z);
    const half = z / (n + z * z) * Math.sqrt(k * (n - k) / n + z * z / 4);
    return [middle - half, middle + half];
  };
  /* How many of the networks first ... first + count - 1 are born dead at each depth up to 30. */
  const count = (width, first, number) => {
    const dead = new Array(DEEPEST + 1).fill(0);
    for (let k = first; k < first + number; k += 1) {
      const layer = deadAt(fate(network(width, k)));
      if (layer) for (let depth = layer + 1; depth <= DEEPEST; depth += 1) dead[depth] += 1;
    }
    return dead;
  };

  rb.bornDead = { network, fate, deadAt, count, lower, upper };

  // ---- the picture ---------------------------------------------------------------------------
  rb.explorable("born-dead", (stage, data) => {
    const s = rb.svg;
    let width = 3, depth = 10, first = 0, tally = null;
    let shown = [];
    const text = (x, y, content, name, anchor = "start") =>
      s("text", { x, y, class: `rb-text ${name || ""}`, "text-anchor": anchor, text: content });

    // Left: twelve functions.
    const CELL = { width: 92, height: 78, gap: 8, column: 100, row: 100 };
    const cells = Array.from({ length: SHOWN }, (_, k) => {
      const x = (k % 4) * CELL.column + 4, y = Math.floor(k / 4) * CELL.row + 2;
      const cell = {
        ground: s("rect", { x, y, width: CELL.width, height: CELL.height, rx: 4, class: "rb-cell" }),
        left: s("line", { class: "rb-half" }), right: s("line", { class: "rb-half" }),
        label: text(x + CELL.width / 2, y + CELL.height + 14, "", "rb-muted", "middle"),
        cx: x + CELL.width / 2, cy: y + CELL.height / 2,
      };
      cell.group = s("g", {}, cell.ground,
        s("line", { class: "rb-axis", x1: x + 6, x2: x + CELL.width - 6, y1: cell.cy, y2: cell.cy }),
        s("line", { class: "rb-axis", x1: cell.cx, x2: cell.cx, y1: y + 6, y2: y + CELL.height - 6 }),
        cell.left, cell.right, cell.label);
      return cell;
    });
    const multiples = s("svg", { viewBox: "0 0 400 300", role: "img" }, ...cells.map((cell) => cell.group));

    // Right: the share of networks that are born dead, by depth.
    const box = { left: 40, right: 392, top: 10, bottom: 262 };
    const px = (d) => box.left + (d - 1) / (DEEPEST - 1) * (box.right - box.left);
    const py = (share) => box.bottom - share * (box.bottom - box.top);
    const band = s("polygon", { class: "rb-band" });
    const marks = s("g", { class: "rb-marks" });
    const here = s("line", { class: "rb-here", y1: box.top, y2: box.bottom });
    const bar = s("line", { class: "rb-bar-line" });
    const mine = s("path", { class: "rb-mine" });
    const chart = s("svg", { viewBox: "0 0 400 300", role: "img" },
      ...[0, 0.25, 0.5, 0.75, 1].flatMap((share) => [
        s("line", { class: "rb-grid", x1: box.left, x2: box.right, y1: py(share), y2: py(share) }),
        text(box.left - 6, py(share) + 4, `${100 * share}%`, "rb-muted", "end")]),
      ...[1, 5, 10, 15, 20, 25, 30].map((d) => text(px(d), box.bottom + 17, `${d}`, "rb-muted", "middle")),
      text((box.left + box.right) / 2, box.bottom + 34, "depth: number of linear maps", "rb-muted", "middle"),
      band, here, marks, bar, mine);

    const draw = () => {
      // the twelve
      let dead = 0, half = 0;
      const alike = [];
      cells.forEach((cell, k) => {
        const sides = shown[k], values = sides.map((side) => side.f[depth - 1]);
        const gone = sides.map((side) => side.silent > 0 && side.silent < depth);
        const largest = Math.max(...values.map(Math.abs)) || 1;
        const both = gone[0] && gone[1];
        dead += both; half += gone[0] !== gone[1];
        [[cell.right, 1, 0], [cell.left, -1, 1]].forEach(([line, way, side]) => rb.set(line, {
          x1: cell.cx, y1: cell.cy, x2: cell.cx + way * 38, y2: (cell.cy - 32 * values[side] / largest).toFixed(1),
          class: gone[side] ? "rb-half rb-gone" : "rb-half" }));
        rb.set(cell.ground, { class: both ? "rb-cell rb-cell-dead" : "rb-cell" });
        cell.label.textContent = both ? `dead: layer ${deadAt(sides)}` : gone[0] || gone[1] ? "half dead" : "";
        alike.push(both ? "dead" : gone[0] || gone[1] ? "half dead" : "alive");
      });
      rb.set(multiples, { "aria-label": `Twelve functions: ${alike.join(", ")}.` });

      // the chart
      const depths = Array.from({ length: DEEPEST }, (_, k) => k + 1);
      rb.set(band, { points: rb.points([...depths.map((d) => [px(d), py(upper(width, d))]),
        ...depths.toReversed().map((d) => [px(d), py(lower(width, d))])]) });
      const stored = Object.entries((data.dead || {})[width] || {}).map(([d, k]) => [Number(d), k / data.networks]).filter(([d]) => d <= DEEPEST);
      marks.replaceChildren(...stored.map(([d, share]) => s("circle", { cx: px(d).toFixed(1), cy: py(share).toFixed(1), r: 3.2 })));
      rb.set(here, { x1: px(depth), x2: px(depth) });
      const share = tally.dead[depth] / tally.networks, [low, high] = interval(tally.dead[depth], tally.networks);
      rb.set(bar, { x1: px(depth), x2: px(depth), y1: py(low).toFixed(1), y2: py(high).toFixed(1) });
      rb.set(mine, { d: `M${px(depth).toFixed(1)} ${(py(share) - 6).toFixed(1)}l6 6l-6 6l-6 -6Z` });

      // the words
      const percent = (v) => `${rb.number(100 * v, v > 0 && v < 0.1 ? 1 : 0)}%`;
      const known = stored.find(([d]) => d === depth);
      const book = depth === 1 ? "A linear map cannot die." : width === 1 ? `Exactly ${percent(lower(1, depth))} of all such networks are.`
        : known ? `Of the book\u2019s ${data.networks.toLocaleString("en")}, ${percent(known[1])} are.`
        : `The bounds say ${percent(lower(width, depth))} to ${percent(upper(width, depth))}.`;
      chip.textContent = `${dead} of ${SHOWN} dead`;
      state.dataset.state = dead > SHOWN / 2 ? "dead" : dead ? "leak" : "alive";
      const words = `${dead} of these ${SHOWN} networks are constant before training` + (half ? `, ${half} on one side of 0. ` : ". ") + book;
      if (sentence.textContent !== words) sentence.textContent = words;
      numbers.textContent = `Your draws: ${tally.dead[depth].toLocaleString("en")} of ${tally.networks.toLocaleString("en")} dead, ${percent(share)} (95% interval ${percent(low)} to ${percent(high)})`;
      rb.set(chart, { "aria-label": `Share born dead by depth at width ${width}. ${numbers.textContent}. ${book}` });
    };
    const add = (number) => {
      const dead = count(width, first + SHOWN, number);
      tally = { networks: tally.networks + number, dead: tally.dead.map((k, d) => k + dead[d]) };
      first += number;
      shown = Array.from({ length: SHOWN }, (_, k) => fate(network(width, first + k)));
      draw();
    };
    const restart = () => {
      first = 0;
      shown = Array.from({ length: SHOWN }, (_, k) => fate(network(width, k)));
      tally = { networks: SHOWN, dead: count(width, 0, SHOWN) };
      draw();
    };

    const chip = rb.html("strong", { class: "rb-chip" });
    const sentence = rb.html("span", { role: "status" });
    const state = rb.html("p", { class: "rb-state" }, chip, sentence);
    const numbers = rb.html("p", { class: "rb-numbers" });
    const button = (label, number, kind) => rb.html("button", { type: "button", class: `rb-button ${kind}`, text: label, onclick: () => add(number) });
    const size = rb.slider({ label: "Width", min: 1, max: 10, step: 1, value: width, format: (v) => `${v}`, change: (v) => { width = v; restart(); } });
    const deep = rb.slider({ label: "Depth", min: 1, max: DEEPEST, step: 1, value: depth, format: (v) => `${v}`, change: (v) => { depth = v; draw(); } });
    const key = rb.html("p", { class: "rb-key" },
      rb.html("span", { class: "rb-key-dot", text: "the book\u2019s 40,000 networks" }),
      rb.html("span", { class: "rb-key-band", text: "between two exact bounds" }),
      rb.html("span", { class: "rb-key-mine", text: "your draws, 95% interval" }));
    const panel = (title, ...content) => rb.html("div", { class: "rb-panel" }, rb.html("p", { class: "rb-head-line", text: title }), ...content);
    stage.append(
      rb.html("div", { class: "rb-panels" },
        panel("Twelve fresh networks, f(x) for x from \u22121 to 1", multiples),
        panel("How many are born dead", chart, key)),
      rb.html("div", { class: "rb-words" }, state, numbers),
      rb.html("div", { class: "rb-side" }, button("Draw again", SHOWN, "rb-primary"), button("Draw 1,200", 1200, ""),
        rb.html("div", { class: "rb-sliders rb-wide" }, size.node, deep.node)));
    restart();
  });
})();
