/* What all explorables share. Classic script, no dependency: works from file:// and offline. */
(() => {
  "use strict";
  const rb = (window.relubook = window.relubook || {});
  const SVG = "http://www.w3.org/2000/svg";
  const builders = {};
  let ids = 0;

  const make = (node, attributes, children) => {
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value === undefined || value === null || value === false) continue;
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (key === "text") node.textContent = value;
      else node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  };
  /** Make an HTML element: attributes, `text`, and `onevent` listeners. */
  rb.html = (tag, attributes, ...children) =>
    make(document.createElement(tag), attributes, children);
  /** Make an SVG element. */
  rb.svg = (tag, attributes, ...children) =>
    make(document.createElementNS(SVG, tag), attributes, children);
  /** Change attributes of an element. */
  rb.set = (node, attributes) => make(node, attributes, []);
  rb.id = (name) => `rb-${name}-${++ids}`;
  rb.clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  /** A number with a true minus sign. */
  rb.number = (value, digits = 2) => {
    const text = value.toFixed(digits);
    return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "\u2212");
  };
  /** Coordinates rounded to a tenth of a pixel. */
  rb.points = (pairs) => pairs.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
  const still = window.matchMedia("(prefers-reduced-motion: reduce)");
  rb.reducedMotion = () => still.matches;

  /** A labelled range input. `to` maps its position to the value, `from` back (default: as it is). */
  rb.slider = ({ label, min, max, step, value, format, change, to = (v) => v, from = (v) => v }) => {
    const id = rb.id("range");
    const output = rb.html("span", { class: "rb-value", "aria-hidden": "true" }); // the input says it
    const input = rb.html("input", { id, type: "range", min, max, step });
    const show = () => {
      output.textContent = format(to(Number(input.value)));
      input.setAttribute("aria-valuetext", output.textContent);
    };
    input.addEventListener("input", () => { show(); change(to(Number(input.value))); });
    const node = rb.html("div", { class: "rb-slider" },
      rb.html("span", {}, rb.html("label", { for: id, text: label }), output), input);
    const control = { node, input, set: (v) => { input.value = from(v); show(); } };
    control.set(value);
    return control;
  };

  /** A labelled choice among names. */
  rb.choice = (label, options, value, change) => {
    const id = rb.id("choice");
    const select = rb.html("select", { id, class: "rb-button", onchange: () => change(select.value) },
      ...options.map((name) => rb.html("option", { value: name, text: name, selected: name === value })));
    const node = rb.html("div", { class: "rb-choice" }, rb.html("label", { for: id, text: label }), select);
    return { node, select };
  };

  /** Call `tick(count)` about `rate` times a second while on screen; `tick` returns false to stop. */
  rb.player = (node, rate, tick, changed) => {
    let frame = 0, last = 0, owed = 0, seen = true;
    new IntersectionObserver((entries) => { seen = entries.some((e) => e.isIntersecting); })
      .observe(node);
    const stop = () => { if (frame) { cancelAnimationFrame(frame); frame = 0; changed(false); } };
    const run = (now) => {
      frame = requestAnimationFrame(run);
      owed += seen ? Math.min(0.1, (now - last) / 1000) * rate : 0;
      last = now;
      const count = Math.floor(owed);
      owed -= count;
      if (count && tick(count) === false) stop();
    };
    const start = () => {
      if (frame) return;
      last = performance.now();
      owed = 0;
      frame = requestAnimationFrame(run);
      changed(true);
    };
    return { start, stop, running: () => frame !== 0 };
  };

  /** Ease a number from `a` to `b`; jumps at once when the reader prefers less motion. */
  rb.ease = (a, b, milliseconds, draw) => {
    if (rb.reducedMotion()) { draw(b, true); return () => {}; }
    let frame = 0;
    const begin = performance.now();
    const run = (now) => {
      const t = rb.clamp((now - begin) / milliseconds, 0, 1);
      draw(a + (b - a) * t * t * (3 - 2 * t), t === 1);
      if (t < 1) frame = requestAnimationFrame(run);
    };
    frame = requestAnimationFrame(run);
    return () => cancelAnimationFrame(frame);
  };

  /** Independent standard normal numbers from a seed (mulberry32 and Box-Muller). */
  rb.normals = (seed) => {
    let state = seed >>> 0;
    const uniform = () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let t = state;
      t = Math.imul(t ^ (t >>> 15), t | 1);
      t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
    return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  };

  /** Register an explorable; every container of its name on the page is built once. */
  rb.explorable = (name, build) => {
    builders[name] = build;
    if (document.readyState === "complete") start();
  };

  const start = () => {
    for (const root of document.querySelectorAll("[data-explorable]")) {
      const build = builders[root.dataset.explorable];
      if (!build || root.dataset.ready) continue;
      const data = root.querySelector('script[type="application/json"]');
      const stage = rb.html("div", { class: "rb-stage" });
      try {
        build(stage, data ? JSON.parse(data.textContent) : {}, root);
      } catch (error) { // the still and its sentence remain
        console.error(error);
        continue;
      }
      root.querySelector(".rb-stage").replaceWith(stage);
      root.dataset.ready = "true";
    }
  };
  // Deferred scripts run in order before DOMContentLoaded: by then all have registered.
  document.addEventListener("DOMContentLoaded", start);
})();
