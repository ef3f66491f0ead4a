// The page's side of the latent explorer: a map of points, what Python decodes for the latent shown, and the controls.
// Traits carry everything: events set them, Python answers in others and counts `answered`, `show` draws the answer.
// The widget protocol keeps one message on its way and merges what follows, so no event is delayed or queued.
// Python puts explorer_pictures.js before this, as one module.

const MAP = 420; // side of the map, as in the CSS [px]
const MARGIN = 16; // around the points [px]
const REACH = 30; // a cursor farther than this from every point is over none [px]
const STEP = 0.01; // of the slider from A to B
const STEP_MS = 40; // between two steps of a playing path, at the least

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

/** A trait of little-endian float32 bytes as numbers; copied, since its bytes may lie unaligned. */
function floats(view) {
  return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

const pinned = (model) => model.get("pin_a") >= 0 && model.get("pin_b") >= 0;

/** Map coordinates (x right, y up, in [0, 1]) as pixels (y down), and back. */
const toPixel = (x, y) => [MARGIN + x * (MAP - 2 * MARGIN), MAP - MARGIN - y * (MAP - 2 * MARGIN)];
const toMap = (left, top) => [(left - MARGIN) / (MAP - 2 * MARGIN), (MAP - MARGIN - top) / (MAP - 2 * MARGIN)];

/** Index of the point nearest to (x, y), -1 beyond `reach`. A plain scan: 100,000 points take less than 1 ms. */
function nearest(points, x, y, reach = Infinity) {
  let [best, least] = [-1, reach * reach];
  for (let i = 0; i < points.length; i += 2) {
    const distance = (points[i] - x) ** 2 + (points[i + 1] - y) ** 2;
    if (distance <= least) [best, least] = [i / 2, distance];
  }
  return best;
}

/** Index of the point nearest to point `from` within 45 degrees of direction (right, up); else `from`. */
function towards(points, from, [right, up]) {
  let [best, least] = [from, Infinity];
  for (let i = 0; i < points.length; i += 2) {
    const [x, y] = [points[i] - points[2 * from], points[i + 1] - points[2 * from + 1]];
    const along = x * right + y * up;
    const distance = x * x + y * y;
    if (along > 0 && distance <= 2 * along * along && distance < least) [best, least] = [i / 2, distance];
  }
  return best;
}

/** All points, once; few ones as rimmed discs, or shapes of their classes, many as plain squares.
 * @returns whether classes have shapes */
function drawPoints(canvas, points, colours, { kind, entries }) {
  const ratio = window.devicePixelRatio;
  canvas.width = canvas.height = MAP * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const n = points.length / 2;
  const radius = Math.min(5, Math.max(1, 120 / Math.sqrt(n)));
  const shapes = SHAPES.map((shape) => new Path2D(shape));
  const shaped = kind === "classes" && radius >= 2;
  const entryOf = new Map(shaped ? entries.map(([, colour], i) => [parseInt(colour.slice(1), 16), i]) : []);
  [context.strokeStyle, context.lineWidth] = ["rgb(136, 136, 136)", 1 / radius];
  for (let i = 0; i < n; i++) {
    const [x, y] = toPixel(points[2 * i], points[2 * i + 1]);
    const [red, green, blue] = [colours[3 * i], colours[3 * i + 1], colours[3 * i + 2]];
    context.fillStyle = `rgb(${red}, ${green}, ${blue})`;
    if (radius < 2) {
      context.fillRect(x - radius, y - radius, 2 * radius, 2 * radius);
      continue;
    }
    context.setTransform(radius * ratio, 0, 0, radius * ratio, x * ratio, y * ratio);
    const shape = shapes[(entryOf.get((red << 16) | (green << 8) | blue) ?? 0) % shapes.length];
    context.fill(shape);
    context.stroke(shape);
  }
  return shaped;
}

/** The path, a diamond at the nearest sample, a ring at the one chosen, a cross around the latent; A and B. */
function drawMarks(svg, model, points, current) {
  const at = (index) => toPixel(points[2 * index], points[2 * index + 1]);
  const pairs = (flat) => Array.from({ length: flat.length / 2 }, (_, i) => toPixel(flat[2 * i], flat[2 * i + 1]));
  const line = pairs(floats(model.get("path"))).map((place, i) => `${i ? "L" : "M"}${place}`);
  const here = model.get("here").map((part) => Math.min(1.02, Math.max(-0.02, part)));
  const cross = pairs(here).map((place) => `M${place} m-7 -7 l5 5 m4 4 l5 5 m0 -14 l-5 5 m-4 4 l-5 5`);
  const near = model.get("neighbour_index");
  const diamond = near < 0 ? "" : `M${at(near)} m-13 0 l13 -13 l13 13 l-13 13 z`;
  const ring = current < 0 || current === near ? "" : `M${at(current)} m-8 0 a8 8 0 1 0 16 0 a8 8 0 1 0 -16 0`;
  const lines = [...line, diamond, ring, ...cross].join(" ");
  const ends = ["a", "b"].filter((end) => model.get(`pin_${end}`) >= 0);
  const letters = ends.map((end) => {
    const [x, y] = at(model.get(`pin_${end}`));
    return `<circle cx="${x}" cy="${y}" r="9"/><text x="${x}" y="${y}" dy="0.35em">${end.toUpperCase()}</text>`;
  });
  svg.innerHTML = `<path class="lx-halo" d="${lines}"/><path d="${lines}"/>${letters.join("")}`;
}

/** A canvas of the points under the marks, between the names of the axes and above the legend. */
function makeArea(parent, model, points) {
  const figure = make(parent, "figure", { class: "lx-map" });
  const [across, up] = model.get("axes");
  make(figure, "div", { class: "lx-up" }, up);
  const pins = model.get("walks") ? "Enter pins it as A, then as B; the keys a and b pin it as A or B." : "Enter pins it.";
  const label = `Map of ${points.length / 2} samples by ${across} and ${up}. Arrow keys choose the next sample. ${pins}`;
  const area = make(figure, "div", { class: "lx-area", tabindex: 0, role: "application", "aria-label": label });
  const shaped = drawPoints(make(area, "canvas"), points, bytes(model.get("colours")), model.get("legend"));
  const marks = make(area, "svg", { viewBox: `0 0 ${MAP} ${MAP}` }, "", SVG);
  make(figure, "div", { class: "lx-across" }, across);
  makeLegend(figure, model.get("legend"), shaped);
  make(figure, "div", { class: "lx-marks" }, "✕ latent, at the edge if beyond · ◇ nearest sample · ○ chosen");
  return { area, marks };
}

function makeMap(parent, model, send) {
  const points = floats(model.get("points"));
  const { area, marks } = makeArea(parent, model, points);
  let current = model.get("hover"); // the sample chosen by cursor or arrows
  let next = model.get("pin_a") >= 0 && model.get("pin_b") < 0 ? "b" : "a";
  const show = () => drawMarks(marks, model, points, current);
  const choose = (index) => {
    if (index < 0 || (index === current && model.get("mode") === "hover")) return;
    current = index;
    send({ hover: index, mode: "hover" });
    show();
  };
  const pin = (asked = next) => {
    if (current < 0) return;
    const end = model.get("walks") ? asked : "a";
    next = end === "a" ? "b" : "a";
    send({ [`pin_${end}`]: current, mode: "pin" });
    show();
  };
  const under = (event) => {
    const box = area.getBoundingClientRect();
    const scale = MAP / box.width;
    const [x, y] = toMap((event.clientX - box.left) * scale, (event.clientY - box.top) * scale);
    return nearest(points, x, y, REACH / (MAP - 2 * MARGIN));
  };
  area.addEventListener("pointermove", (event) => choose(under(event)));
  area.addEventListener("click", (event) => {
    choose(under(event));
    if (under(event) >= 0) pin();
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter") pin();
    else if (event.key in ARROWS) choose(current < 0 ? 0 : towards(points, current, ARROWS[event.key]));
    else return;
    event.preventDefault();
  });
  return { show, pin };
}

/** How numbers are written that differ by a step at the least; a step of 0 is that of a single one. */
function format(step) {
  const digits = Math.ceil(-Math.log10(step));
  if (step === 0 || digits > 6) return (value) => String(Number(value.toPrecision(6)));
  return (value) => value.toFixed(step < 1 ? Math.max(2, digits) : 0);
}

/** A named slider with its value beside it. `changed` takes the number; the result sets number and use. */
function makeSlider(parent, { name, min, max, step }, changed) {
  const label = make(parent, "label", { class: "lx-slider" });
  make(label, "span", {}, name);
  const input = make(label, "input", { type: "range", min, max, step, "aria-label": name });
  const output = make(label, "span", { class: "lx-value" });
  const text = format(step);
  const show = (value, disabled = step === 0) => {
    [input.value, input.disabled] = [value, disabled];
    output.textContent = text(value);
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => {
    show(input.valueAsNumber);
    changed(input.valueAsNumber);
  });
  return show;
}

function makeButton(parent, text, title, clicked) {
  const button = make(parent, "button", { type: "button", title }, text);
  button.addEventListener("click", clicked);
  return button;
}

function makeMethods(parent, changed) {
  const group = make(parent, "span", { class: "lx-methods", role: "radiogroup", "aria-label": "path from A to B" });
  const inputs = ["lerp", "slerp"].map((method) => {
    const label = make(group, "label");
    const input = make(label, "input", { type: "radio", name: "method", value: method });
    make(label, "span", {}, method);
    input.addEventListener("change", () => changed(method));
    return input;
  });
  return (method) => inputs.forEach((input) => (input.checked = input.value === method));
}

/** Steps along the path, each only after the last was answered; back and forth where `loops`, else once to B. */
function makePlayer(model, send, loops, changed) {
  let timer = null;
  let direction = 1;
  let sent = null; // what `answered` was at the last step
  const stop = () => {
    clearInterval(timer);
    timer = null;
    changed(false);
  };
  const step = () => {
    const [position, answered] = [model.get("position"), model.get("answered")];
    if (answered === sent) return;
    if (position >= 1 && !loops()) return stop();
    if (position <= 0 || !loops()) direction = 1;
    else if (position >= 1) direction = -1;
    sent = answered;
    send({ position: Math.min(1, Math.max(0, (Math.round(position / STEP) + direction) * STEP)), mode: "path" });
  };
  const start = () => {
    [direction, sent] = [1, null];
    if (model.get("position") >= 1) send({ position: 0, mode: "path" });
    timer = setInterval(step, STEP_MS);
    changed(true);
  };
  return { stop, toggle: () => (timer === null ? start() : stop()) };
}

function makePath(parent, model, send) {
  const row = make(parent, "div", { class: "lx-row" });
  const slider = { name: "A → B", min: 0, max: 1, step: STEP };
  const setPosition = makeSlider(row, slider, (position) => send({ position, mode: "path" }));
  const setMethod = makeMethods(row, (method) => send({ method, mode: "path" }));
  const play = makeButton(row, "play", "walk from A to B (key p)", () => player.toggle());
  const label = make(row, "label", { title: "back and forth while playing" });
  const loop = make(label, "input", { type: "checkbox" });
  make(label, "span", {}, "loop");
  const player = makePlayer(model, send, () => loop.checked, (on) => (play.textContent = on ? "pause" : "play"));
  const show = () => {
    play.disabled = !pinned(model);
    setPosition(model.get("position"), !pinned(model));
    setMethod(model.get("method"));
  };
  return { show, stop: player.stop, play: () => play.click() };
}

/** A button for each code, which acts on the last frame of the chain; `film` plays the frames that are shown. */
function makeCodes(parent, model, send, film) {
  const box = make(parent, "div", { class: "lx-codes" });
  const row = make(box, "div", { class: "lx-row", role: "group", "aria-label": "codes" });
  const chain = (codes) => send({ chain: codes, mode: "codes" });
  const names = model.get("codes");
  names.forEach((name, i) => {
    makeButton(row, name, `let ${name} act on the last frame`, () => chain([...model.get("chain"), i]));
  });
  const controls = make(box, "div", { class: "lx-row" });
  const buttons = [
    makeButton(controls, "undo", "take the last code back", () => chain(model.get("chain").slice(0, -1))),
    makeButton(controls, "clear", "back to the first frame", () => chain([])),
    makeButton(controls, "play", "the frames one after the other, in the first picture (key p)", film),
  ];
  const told = make(controls, "span", { "aria-live": "polite" });
  const show = () => {
    const codes = model.get("chain");
    for (const button of buttons) button.disabled = !codes.length;
    told.textContent = codes.map((code) => names[code]).join(" → ");
  };
  return { show, play: () => buttons[2].click() };
}

function makeButtons(parent, model, send) {
  const row = make(parent, "div", { class: "lx-row" });
  const count = (name) => ({ [name]: model.get(name) + 1 });
  const slides = model.get("dimensions").length + model.get("conditions").length > 0;
  if (slides) makeButton(row, "reset", "back to the latent of A", () => send(count("reset")));
  const draw = () => send({ ...count("draw"), mode: "draw" });
  if (model.get("draws")) makeButton(row, "random draw", "decode a random latent", draw);
  const strip = "the walk as figure, GIF and latents, into the run folder";
  const save = makeButton(row, "save strip", strip, () => send(count("save")));
  return () => (save.disabled = model.get("codes").length ? !model.get("chain").length : !pinned(model));
}

/** A slider for each of the ranges that a trait holds; `values` is the trait of where they stand. */
function makeSliders(parent, model, send, ranges, values, mode) {
  const grid = make(parent, "div", { class: `lx-sliders lx-${ranges}` });
  const change = (i) => (value) => send({ [values]: model.get(values).with(i, value), mode });
  const sliders = model.get(ranges).map((range, i) => makeSlider(grid, range, change(i)));
  return () => model.get(values).forEach((value, i) => sliders[i](value));
}

function makeMessage(parent, model) {
  const line = make(parent, "div", { class: "lx-message", role: "status" });
  const [one, two] = ["Click a sample on the map to begin with it.", "Click two samples on the map to pin A and B."];
  const hint = model.get("walks") ? two : one;
  const begun = () => (model.get("walks") ? pinned(model) : model.get("pin_a") >= 0);
  return () => (line.textContent = model.get("message") || (begun() ? "" : hint));
}

function render({ model, el }) {
  const send = (changes) => {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
  };
  const root = make(el, "form", { class: "latent-explorer" });
  const grid = make(root, "div", { class: "lx-grid" });
  const map = makeMap(grid, model, send);
  const panels = makePanels(grid, model);
  const controls = make(grid, "div", { class: "lx-controls" });
  const parts = [map, panels, { show: makeMessage(controls, model) }];
  if (model.get("codes").length) parts.push(makeCodes(controls, model, send, panels.film));
  if (model.get("walks")) parts.push(makePath(controls, model, send));
  parts.push({ show: makeButtons(controls, model, send) });
  parts.push({ show: makeSliders(controls, model, send, "conditions", "condition_values", "conditions") });
  parts.push({ show: makeSliders(controls, model, send, "dimensions", "values", "sliders") });
  const show = () => {
    for (const part of parts) part.show();
    root.dataset.answered = model.get("answered");
  };
  root.addEventListener("submit", (event) => event.preventDefault());
  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.key === "p") parts.find((part) => part.play)?.play();
    if (event.key === "a" || event.key === "b") map.pin(event.key);
  });
  // JupyterLab leaves the keys alone only where the attribute stands on the element itself.
  for (const node of root.querySelectorAll("input, button, [tabindex]")) node.dataset.lmSuppressShortcuts = "true";
  model.on("change:answered", show);
  show();
  return () => {
    for (const part of parts) part.stop?.();
    model.off("change:answered", show);
  };
}

export default { render };
