// What the latent explorer shows beside its map: a headline, pictures in a row, and their key. Python puts this before
// latent_explorer.js, as one module.

const [PICTURE, SMALL] = [256, 128]; // about the longer side of a picture, and of one in a chain [px]
const FRAME_MS = 400; // of a film
const LINE = 14; // between two names of layers, at the least [px]
const SVG = "http://www.w3.org/2000/svg";
// Points of classes, of radius 1 about the origin, in the order of the markers of `explorer_figure`.
const SHAPES = [
  "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0Z",
  "M-.9-.9H.9V.9H-.9Z",
  "M0-1.1L1.05 .85H-1.05Z",
  "M0-1.25L1.25 0L0 1.25L-1.25 0Z",
  "M0 1.1L1.05-.85H-1.05Z",
  "M-.4-1.15H.4V-.4H1.15V.4H.4V1.15H-.4V.4H-1.15V-.4H-.4Z",
  "M.53-1.1L1.1-.53L.57 0L1.1 .53L.53 1.1L0 .57L-.53 1.1L-1.1 .53L-.57 0L-1.1-.53L-.53-1.1L0-.57Z",
  "M0-1.35L.32-.44L1.28-.42L.52 .17L.79 1.09L0 .55L-.79 1.09L-.52 .17L-1.28-.42L-.32-.44Z",
];

function make(parent, tag, attributes = {}, text = "", namespace = "http://www.w3.org/1999/xhtml") {
  const node = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  parent.append(node);
  return node;
}

function bytes(view) {
  return new Uint8ClampedArray(view.buffer, view.byteOffset, view.byteLength);
}

/** How much a picture is enlarged to about a side [px]: from twice on in whole steps, with hard edges. */
function enlargement({ width, height }, side) {
  const factor = side / Math.max(width, height);
  return factor < 2 ? Math.max(1, factor) : Math.round(factor);
}

/** A panel's canvas and caption; the first is named `picture`, that of the nearest sample `neighbour`. */
function makePanel(row, title, index) {
  const name = index === 0 ? "lx-picture" : title.startsWith("nearest") ? "lx-neighbour" : "";
  const figure = make(row, "figure", { class: `lx-panel ${name}`, "data-panel": index });
  make(figure, "div", { class: "lx-label" }, title);
  const canvas = make(figure, "canvas", { role: "img", width: 0, height: 0 });
  return { canvas, caption: make(figure, "figcaption", { "aria-live": index ? "off" : "polite" }) };
}

function drawPanel({ canvas, caption }, { title, caption: text, pixels, width, height }, side) {
  caption.textContent = text;
  canvas.setAttribute("aria-label", `${title}: ${text}`);
  if (canvas.width !== width || canvas.height !== height) {
    const factor = enlargement({ width, height }, side);
    [canvas.width, canvas.height] = [width, height];
    canvas.parentElement.style.width = `${width * factor}px`;
    canvas.style.imageRendering = factor < 2 ? "auto" : "pixelated";
  }
  canvas.getContext("2d").putImageData(new ImageData(bytes(pixels), width, height), 0, 0);
}

/** Colours and what they tell; with the shapes of points where these are drawn. */
function makeLegend(parent, { label, kind, entries }, shaped = false) {
  const legend = make(parent, "div", { class: `lx-legend lx-${kind}` });
  make(legend, "span", { class: "lx-label" }, label);
  entries.forEach(([text, colour], i) => {
    const entry = make(legend, "span", { class: "lx-entry" });
    if (shaped) {
      const shape = make(entry, "svg", { viewBox: "-1.5 -1.5 3 3", "aria-hidden": true }, "", SVG);
      make(shape, "path", { d: SHAPES[i % SHAPES.length], fill: colour }, "", SVG);
    } else make(entry, "i").style.background = colour;
    make(entry, "span", {}, text);
  });
}

/** Places near the wished ones, in their order, at least a line apart and none beyond the height. */
function spread(wished, height) {
  const places = [];
  for (const place of wished) places.push(Math.max(place, (places.at(-1) ?? -LINE / 2) + LINE));
  for (let i = places.length - 1, last = height - LINE / 2; i >= 0; i--, last -= LINE) {
    places[i] = Math.min(places[i], last);
  }
  return places;
}

/** Layers of a network beside its picture: a bracket over the rows of each, and names, of the largest where many. */
function makeLayers(parent, { label, entries }, height) {
  const column = make(parent, "figure", { class: "lx-layers" });
  const svg = make(column, "svg", { height }, "", SVG);
  make(column, "figcaption", {}, label);
  const largest = entries.toSorted((a, b) => b[2] - b[1] - (a[2] - a[1])).slice(0, Math.floor(height / LINE));
  const named = entries.filter((entry) => largest.includes(entry));
  const middles = named.map(([, start, end]) => (height * (start + end)) / 2);
  const places = spread(middles, height);
  const brackets = entries.map(([, start, end]) => `M6 ${start * height + 0.5}H1V${end * height - 0.5}H6`);
  const leaders = places.map((place, i) => `M1 ${middles[i]}L14 ${place}`);
  make(svg, "path", { d: [...brackets, ...leaders].join("") }, "", SVG);
  named.forEach(([name], i) => make(svg, "text", { x: 17, y: places[i], dy: "0.35em" }, name, SVG));
}

function drawKey(parent, content, panel, side) {
  parent.replaceChildren();
  if (content.kind === "layers") makeLayers(parent, content, panel.height * enlargement(panel, side));
  else if (content.kind) makeLegend(parent, content);
}

/** The headline, the pictures in a row, and their key; as all that follow, it gives what draws the traits. */
function makePanels(parent, model) {
  const all = make(parent, "div", { class: "lx-pictures" });
  const headline = make(all, "div", { class: "lx-headline", "aria-live": "polite" });
  const pictures = make(all, "div", { class: "lx-panels" });
  const key = make(all, "div", { class: "lx-key" });
  const chained = model.get("codes").length > 0;
  const side = chained ? SMALL : PICTURE;
  let [made, drawn, timer] = [[], [], null]; // panels; their titles and the key as they are on the page; of a film
  const show = () => {
    clearInterval(timer);
    const panels = model.get("panels");
    const wanted = [panels.map((panel) => panel.title).join("\n"), JSON.stringify(model.get("key"))];
    headline.textContent = model.get("headline");
    if (wanted[0] !== drawn[0]) {
      pictures.replaceChildren();
      made = panels.map(({ title }, i) => makePanel(pictures, title, i));
      all.classList.toggle("lx-wide", panels.length > 2 && !chained);
    }
    panels.forEach((panel, i) => drawPanel(made[i], panel, side));
    if (wanted[1] !== drawn[1]) drawKey(key, model.get("key"), panels[0], side);
    drawn = wanted;
  };
  const film = () => {
    show();
    const frames = [...model.get("panels")];
    const step = () => (frames.length ? drawPanel(made[0], frames.shift(), side) : show());
    timer = setInterval(step, FRAME_MS);
  };
  return { show, film, stop: () => clearInterval(timer) };
}
