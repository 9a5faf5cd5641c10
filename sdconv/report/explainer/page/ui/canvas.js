// Pictures of numbers.

import { button, el, say, svg } from "./dom.js";
import { short } from "./numbers.js";

// The values between which a map is shown: its 1st and 99th percentile.
export function percentiles(values, low = 0.01, high = 0.99) {
  const step = Math.max(1, Math.floor(values.length / 4096));
  const some = [];
  for (let at = 0; at < values.length; at += step) some.push(values[at]);
  some.sort((a, b) => a - b);
  const from = some[Math.floor(low * (some.length - 1))], to = some[Math.ceil(high * (some.length - 1))];
  return from === to ? [from - 1, to + 1] : [from, to];
}

// What black and white stand for.
export const shades = ([low, high]) => `Shown from ${short(low)} (black) to ${short(high)} (white).`;

function paint(canvas, width, height, color) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let at = 0; at < width * height; at++) color(image.data, at * 4, at);
  context.putImageData(image, 0, 0);
}

// One channel in grey, from `low` (black) to `high` (white).
export function drawGrey(canvas, values, width, height, [low, high] = percentiles(values)) {
  paint(canvas, width, height, (data, to, at) => {
    data[to] = data[to + 1] = data[to + 2] = Math.max(0, Math.min(255, (values[at] - low) / (high - low) * 255));
    data[to + 3] = 255;
  });
}

// Three planes from -1 to 1 as a photo.
export function drawPhoto(canvas, values, width, height) {
  const area = width * height;
  paint(canvas, width, height, (data, to, at) => {
    for (let c = 0; c < 3; c++) data[to + c] = Math.max(0, Math.min(255, (values[c * area + at] + 1) * 127.5));
    data[to + 3] = 255;
  });
}

// A photo dimmed, and coloured where `heat` (0 to 1) is.
export function drawHeat(canvas, photo, heat, width, height, [r, g, b]) {
  const area = width * height;
  paint(canvas, width, height, (data, to, at) => {
    const share = Math.min(1, heat[at]);
    const grey = 25 + 0.55 * ((photo[at] + photo[area + at] + photo[2 * area + at]) / 3 + 1) * 127.5;
    data[to] = grey + (r - grey) * share;
    data[to + 1] = grey + (g - grey) * share;
    data[to + 2] = grey + (b - grey) * share;
    data[to + 3] = 255;
  });
}

// A square that marks a place in a picture: white in black, so that it shows on both.
export function overlay(width, height) {
  const squares = ["under", "above"].map((name) => svg("rect", { class: name, width: 1, height: 1 }));
  const node = svg("svg", { class: "over", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, squares);
  const mark = (x, y, w, h) => {
    for (const one of squares) for (const [name, value] of Object.entries({ x, y, width: w, height: h })) one.setAttribute(name, value);
  };
  return { node, mark };
}

// A canvas of which a value can be chosen: by pointer, touch or arrow keys, or with its `nudges`.
export function picker({ label, width, height, onpick, hover = false }) {
  const canvas = el("canvas", { width, height });
  const { node: over, mark } = overlay(width, height);
  const node = el("div", { class: "plate picker", tabindex: 0, role: "application", "aria-label": label,
    "aria-roledescription": "picture to point at: arrow keys, with Shift eight pixels at a time" }, canvas, over);
  let at = [0, 0], size = [height, width];
  const pick = (i, j) => {
    const now = [Math.max(0, Math.min(size[0] - 1, i)), Math.max(0, Math.min(size[1] - 1, j))];
    if (now[0] !== at[0] || now[1] !== at[1]) onpick(...now);
  };
  const point = (event) => {
    const box = node.getBoundingClientRect();
    pick(Math.floor((event.clientY - box.top) / box.height * size[0]),
      Math.floor((event.clientX - box.left) / box.width * size[1]));
  };
  let held = false; // a click holds what the mouse hovers over, the next one lets go
  node.addEventListener("pointerdown", (event) => {
    node.setPointerCapture(event.pointerId);
    held = !held;
    point(event);
  });
  node.addEventListener("pointermove", (event) => { if (node.hasPointerCapture(event.pointerId) || (hover && !held && event.pointerType === "mouse")) point(event); });
  node.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 8 : 1;
    const by = { ArrowUp: [-step, 0], ArrowDown: [step, 0], ArrowLeft: [0, -step], ArrowRight: [0, step],
      PageUp: [-16, 0], PageDown: [16, 0], Home: [0, -at[1]], End: [0, size[1]] }[event.key];
    if (!by) return;
    event.preventDefault();
    pick(at[0] + by[0], at[1] + by[1]);
  });
  // for fingers, which are wider than a pixel
  const nudge = (arrow, name, di, dj) => button(arrow, () => pick(at[0] + di, at[1] + dj), { class: "quiet", "aria-label": `one pixel ${name}` });
  const nudges = el("div", { class: "nudges" }, nudge("←", "left", 0, -1), nudge("→", "right", 0, 1), nudge("↑", "up", -1, 0), nudge("↓", "down", 1, 0));
  Object.assign(node, { canvas, over, nudges });
  // the chosen value, and the size of the picture that it is a value of
  node.set = (i, j, rows = height, columns = width, words = "", reach = 0) => {
    at = [i, j];
    size = [rows, columns];
    over.setAttribute("viewBox", `0 0 ${columns} ${rows}`);
    mark(j - reach, i - reach, 1 + 2 * reach, 1 + 2 * reach);
    if (words) {
      node.setAttribute("aria-description", words);
      if (document.activeElement === node) say(words);
    }
  };
  return node;
}

// Many small maps as buttons, of which one is chosen; arrow keys move.
export function thumbnails({ label, onpick }) {
  const node = el("div", { class: "thumbnails", role: "listbox", "aria-label": label, "aria-orientation": "horizontal" });
  let chosen = 0, tiles = [];
  const choose = (at, focus) => {
    if (at < 0 || at >= tiles.length) return;
    onpick(at);
    if (focus) tiles[at].focus();
  };
  node.addEventListener("keydown", (event) => {
    const columns = tiles.filter((tile) => tile.offsetTop === tiles[0].offsetTop).length;
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns,
      Home: -chosen, End: tiles.length - 1 - chosen }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    choose(chosen + by, true);
  });
  node.fill = ({ values, width, height, channels }) => {
    if (tiles.length !== channels) {
      tiles = Array.from({ length: channels }, (_, at) => el("button", {
        type: "button", role: "option", "aria-label": `channel ${at}`, title: `channel ${at}`, onclick: () => choose(at),
      }, el("canvas", { "aria-hidden": "true" })));
      node.replaceChildren(...tiles);
    }
    const area = width * height;
    tiles.forEach((tile, at) => drawGrey(tile.firstChild, values.subarray(at * area, (at + 1) * area), width, height));
    node.choose(Math.min(chosen, channels - 1));
  };
  node.choose = (at) => {
    chosen = at;
    tiles.forEach((tile, one) => {
      tile.setAttribute("aria-selected", String(one === at));
      tile.tabIndex = one === at ? 0 : -1;
    });
  };
  node.mark = (channels) => tiles.forEach((tile, at) => tile.classList.toggle("edited", channels.includes(at)));
  return node;
}
