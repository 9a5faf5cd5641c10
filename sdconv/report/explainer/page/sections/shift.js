// Equivariance: move the photo, and the maps of a convolution move with it.

import { conv2d } from "../core/convolution.js";
import { SIZE } from "../core/vae.js";
import { floats } from "../core/weights.js";
import { drawGrey, drawPhoto } from "../ui/canvas.js";
import { button, el, python, slider } from "../ui/dom.js";
import { short } from "../ui/numbers.js";
import { state } from "../ui/state.js";

const CHANNEL = 12; // of the first layer
const WINDOW = 98; // pixels that one sees of the photo
const HOME = (SIZE - WINDOW) / 2; // the window's first row and column while nothing is moved
const MOST = 32; // pixels that one can move
const DENSE = 24; // the dense layer reads and makes a square of so many pixels,
const INSET = (WINDOW - DENSE) / 2; // in the middle of the window

export const shift = {
  id: "shift",
  title: "Move the photo",
  short: "Shift",
  lead: `<p>All neurons of a feature map share one kernel. So if the photo moves, the map moves with it and otherwise stays the same: <b>equivariance</b>. With a stride of 2 that holds for even steps only; an odd one falls between two positions, and the numbers change. A <b>dense</b> layer has weights of its own for every position, and does not follow at all. Drag the photo and see.</p>`,

  build({ root, vae: network, photo, whenNear, section }) {
    const { values: now, set } = state("shift", { x: 0, y: 0 }, () => render(), (v) =>
      [v.x, v.y].every((x) => Math.abs(x) <= MOST));
    const within = (x) => Math.max(-MOST, Math.min(MOST, x));
    const stage = el("div", { class: "plate picker drag", tabindex: 0, role: "application", "aria-label": "The photo: drag it, or move it with arrow keys",
      "aria-roledescription": "picture that can be moved" }, el("canvas", { width: WINDOW, height: WINDOW }));
    const maps = ["stride 1", "stride 2", "dense layer"].map((name) => ({ name, canvas: el("canvas", { width: 8, height: 8, role: "img", "aria-label": `Feature map, ${name}` }), words: el("figcaption") }));
    const x = slider({ label: "right", min: -MOST, max: MOST, value: 0, oninput: (value) => set({ x: value }) });
    const y = slider({ label: "down", min: -MOST, max: MOST, value: 0, oninput: (value) => set({ y: value }) });
    const code = python("How far strides 1 and 2 are off: in Python"), denseCode = python("The dense layer’s first value: in Python");
    root.append(el("div", { class: "four" }, el("figure", {}, stage, el("figcaption", {}, "the photo, seen through a window")),
      maps.map(({ canvas, words }) => el("figure", {}, canvas, words))),
    el("div", { class: "controls" }, x, y, button("One pixel right", () => move(1, 0), { class: "quiet" }), button("Back to the middle", () => set({ x: 0, y: 0 }), { class: "quiet" })),
    code, denseCode);

    const move = (dx, dy) => set({ x: within(now.x + dx), y: within(now.y + dy) });
    let from = null;
    stage.addEventListener("pointerdown", (event) => {
      stage.setPointerCapture(event.pointerId);
      from = { x: event.clientX, y: event.clientY, at: { ...now } };
    });
    stage.addEventListener("pointermove", (event) => {
      if (!stage.hasPointerCapture(event.pointerId) || !from) return;
      const pixel = stage.clientWidth / WINDOW, near = (start, by) => within(start + Math.round(by / pixel));
      set({ x: near(from.at.x, event.clientX - from.x), y: near(from.at.y, event.clientY - from.y) });
    });
    stage.addEventListener("keydown", (event) => {
      const by = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
      if (!by) return;
      event.preventDefault();
      move(...by);
    });

    let kernel = null;
    async function render() {
      if (!kernel) {
        await network.read();
        kernel = { weight: floats(network.tensors["encoder.conv_in.weight"]).slice(CHANNEL * 27, (CHANNEL + 1) * 27), bias: floats(network.tensors["encoder.conv_in.bias"])[CHANNEL] };
      }
      x.set(now.x);
      y.set(now.y);
      // the photo moved right shows what was further left
      const top = HOME - now.y, left = HOME - now.x;
      const seen = cut(photo.planes, top, left, WINDOW), unmoved = cut(photo.planes, HOME, HOME, WINDOW);
      drawPhoto(stage.firstChild, seen, WINDOW, WINDOW);
      stage.setAttribute("aria-description", `${now.x} pixels right, ${now.y} down`);
      const results = [
        ...[1, 2].map((stride) => [seen, unmoved].map((planes) => convolved(planes, kernel, stride))),
        [dense(photo, top, left), dense(photo, HOME, HOME)],
      ];
      const strides = [1, 2, 1];
      const differences = results.map(([moved, home], at) => {
        drawGrey(maps[at].canvas, moved.values, moved.size, moved.size, range(home.values));
        const margin = at < 2 ? MOST / strides[at] : 0; // where the photo is the same at home and moved
        const d = difference(moved, home, Math.trunc(now.y / strides[at]), Math.trunc(now.x / strides[at]), margin);
        const [low, high] = range(home.values);
        const fits = d < 1e-5 ? "follows exactly" : `off by up to ${short(d / (high - low) * 100, 0)} % of its range`;
        maps[at].words.textContent = `${maps[at].name}: ${now.x || now.y ? fits : "not moved"}`;
        return d;
      });
      section.dataset.differences = differences.join(",");
      code.show(`w, b = (one[${CHANNEL}:${CHANNEL + 1}].detach() for one in vae.encoder.conv_in.parameters())
def off(s, x=${now.x}, y=${now.y}):
    home, moved = (
        torch.nn.functional.conv2d(photo[..., i : i + ${WINDOW}, j : j + ${WINDOW}], w, b, stride=s)[0, 0]
        for i, j in ((${HOME}, ${HOME}), (${HOME} - y, ${HOME} - x))
    )
    difference = moved - home.roll((int(y / s), int(x / s)), (0, 1))
    return difference[${MOST} // s : -${MOST} // s, ${MOST} // s : -${MOST} // s].abs().max().item()
print([off(1), off(2)])`, differences.slice(0, 2));
      denseCode.show(`n = ${DENSE}  # a dense layer with arbitrary weights, which nobody trained
count = torch.arange(n * n, dtype=torch.float64)
weights = (torch.sin(12.9898 * count[:, None] + 78.233 * count) * 43758.5453 % 1 - 0.5) / n
grey = photo.double().mean(1)[0]
print((weights @ grey[${top + INSET} : ${top + INSET} + n, ${left + INSET} : ${left + INSET} + n].flatten())[0].item())`, results[2][0].values[0]);
    }
    photo.addEventListener("change", () => kernel && render());
    whenNear(section, render);
  },
};

// A square window of three planes.
function cut(planes, top, left, size) {
  const out = new Float32Array(3 * size * size);
  for (let c = 0; c < 3; c++)
    for (let i = 0; i < size; i++)
      for (let j = 0; j < size; j++) out[(c * size + i) * size + j] = planes[c * SIZE * SIZE + (top + i) * SIZE + left + j];
  return out;
}

// One kernel of the VAE's first layer over a window of three planes, without padding.
function convolved(planes, { weight, bias }, stride) {
  const maps = [0, 1, 2].map((c) => conv2d(
    { values: planes.subarray(c * WINDOW ** 2, (c + 1) * WINDOW ** 2), height: WINDOW, width: WINDOW },
    weight.subarray(c * 9, (c + 1) * 9), { stride }));
  return { values: maps[0].values.map((x, at) => x + maps[1].values[at] + maps[2].values[at] + bias), size: maps[0].width };
}

// Weights that nobody trained, the same for each visit.
let denseWeights = null;
function dense(photo, top, left) {
  const n = DENSE * DENSE, values = new Float32Array(n), inputs = new Float64Array(n);
  denseWeights ??= Float64Array.from({ length: n * n }, (_, at) => {
    const x = Math.sin(12.9898 * Math.floor(at / n) + 78.233 * (at % n)) * 43758.5453;
    return (x - Math.floor(x) - 0.5) / DENSE;
  });
  for (let at = 0; at < n; at++) {
    const place = (top + INSET + Math.floor(at / DENSE)) * SIZE + left + INSET + at % DENSE;
    inputs[at] = (photo.planes[place] + photo.planes[SIZE * SIZE + place] + photo.planes[2 * SIZE * SIZE + place]) / 3;
  }
  for (let to = 0; to < n; to++) {
    let sum = 0;
    for (let at = 0; at < n; at++) sum += denseWeights[to * n + at] * inputs[at];
    values[to] = sum;
  }
  return { values, size: DENSE };
}

function range(values) {
  return [values.reduce((a, b) => Math.min(a, b), Infinity), values.reduce((a, b) => Math.max(a, b), -Infinity)];
}

// The largest difference between the moved map and the one at home, moved by as much; `margin` is
// left out at the edges, and what leaves the map on one side comes in on the other.
function difference(moved, home, dy, dx, margin) {
  let most = 0;
  for (let r = margin; r < home.size - margin; r++)
    for (let c = margin; c < home.size - margin; c++) {
      const i = (r - dy + 2 * home.size) % home.size, j = (c - dx + 2 * home.size) % home.size;
      most = Math.max(most, Math.abs(moved.values[r * home.size + c] - home.values[i * home.size + j]));
    }
  return most;
}
