// Equivariance: move the photo, and the maps of a convolution move with it.

import { drawGrey, drawPhoto } from "../ui/canvas.js";
import { SIZE } from "../core/vae.js";
import { floats } from "../core/weights.js";
import { button, el, python, short, slider } from "../ui/dom.js";
import { state } from "../ui/state.js";

const WINDOW = 98, MAP = WINDOW - 2, DENSE = 24, HOME = 79, CHANNEL = 12, EDGE = 32;

export const shift = {
  id: "shift",
  title: "Move the photo",
  short: "Shift",
  lead: `<p>All neurons of a feature map share one kernel. So if the photo moves, the map moves with it and changes in nothing else: <b>equivariance</b>. With a stride of 2 that holds for even steps only; an odd one falls between the stops, and the numbers change. A <b>dense</b> layer has weights of its own for every position, and does not follow at all. Drag the photo and see.</p>`,

  build({ root, vae: network, photo, whenNear, section }) {
    const { values: now, set } = state("shift", { x: 0, y: 0 }, () => render(), (v) =>
      [v.x, v.y].every((x) => Number.isInteger(x) && Math.abs(x) <= 32));
    const stage = el("div", { class: "plate picker drag", tabindex: 0, role: "application", "aria-label": "The photo: drag it, or move it with arrow keys",
      "aria-roledescription": "picture that can be moved" }, el("canvas", { width: WINDOW, height: WINDOW }));
    const maps = ["stride 1", "stride 2", "dense layer"].map((name) => ({ name, canvas: el("canvas", { width: 8, height: 8, role: "img", "aria-label": `Feature map, ${name}` }), words: el("figcaption") }));
    const x = slider({ label: "right", min: -32, max: 32, value: 0, oninput: (value) => set({ x: value }) });
    const y = slider({ label: "down", min: -32, max: 32, value: 0, oninput: (value) => set({ y: value }) });
    const code = python("How far strides 1 and 2 are off: in Python"), denseCode = python("The dense layer’s first value: in Python");
    root.append(el("div", { class: "four" }, el("figure", {}, stage, el("figcaption", {}, "the photo, seen through a window")),
      maps.map(({ canvas, words }) => el("figure", {}, canvas, words))),
    el("div", { class: "controls" }, x, y, button("One pixel right", () => move(1, 0), { class: "quiet" }), button("Back to the middle", () => set({ x: 0, y: 0 }), { class: "quiet" })),
    code, denseCode);

    const move = (dx, dy) => set({ x: Math.max(-32, Math.min(32, now.x + dx)), y: Math.max(-32, Math.min(32, now.y + dy)) });
    let from = null;
    stage.addEventListener("pointerdown", (event) => {
      stage.setPointerCapture(event.pointerId);
      from = { x: event.clientX, y: event.clientY, at: { ...now } };
    });
    stage.addEventListener("pointermove", (event) => {
      if (!stage.hasPointerCapture(event.pointerId) || !from) return;
      const pixel = stage.clientWidth / WINDOW, near = (start, by) => Math.max(-32, Math.min(32, start + Math.round(by / pixel)));
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
      const seen = cut(photo.planes, top, left, WINDOW);
      drawPhoto(stage.firstChild, seen, WINDOW, WINDOW);
      stage.setAttribute("aria-description", `${now.x} pixels right, ${now.y} down`);
      const results = [
        [convolved(photo, kernel, top, left, 1), convolved(photo, kernel, HOME, HOME, 1)],
        [convolved(photo, kernel, top, left, 2), convolved(photo, kernel, HOME, HOME, 2)],
        [dense(photo, top, left), dense(photo, HOME, HOME)],
      ];
      const strides = [1, 2, 1];
      const differences = results.map(([moved, home], at) => {
        drawGrey(maps[at].canvas, moved.values, moved.size, moved.size, range(home.values));
        const margin = at < 2 ? EDGE / strides[at] : 0; // where the photo is the same at home and moved
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
    return difference[${EDGE} // s : -${EDGE} // s, ${EDGE} // s : -${EDGE} // s].abs().max().item()
print([off(1), off(2)])`, differences.slice(0, 2));
      denseCode.show(`n = ${DENSE}  # a dense layer with arbitrary weights, which nobody trained
count = torch.arange(n * n, dtype=torch.float64)
weights = (torch.sin(12.9898 * count[:, None] + 78.233 * count) * 43758.5453 % 1 - 0.5) / n
grey = photo.double().mean(1)[0]
print((weights @ grey[${top + 37} : ${top + 37} + n, ${left + 37} : ${left + 37} + n].flatten())[0].item())`, results[2][0].values[0]);
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

// One kernel of the VAE's first layer over a window, without padding.
function convolved(photo, { weight, bias }, top, left, stride) {
  const size = MAP / stride, values = new Float32Array(size * size);
  for (let i = 0; i < size; i++)
    for (let j = 0; j < size; j++) {
      let sum = bias;
      for (let c = 0; c < 3; c++)
        for (let u = 0; u < 3; u++)
          for (let v = 0; v < 3; v++)
            sum += photo.planes[c * SIZE * SIZE + (top + i * stride + u) * SIZE + left + j * stride + v] * weight[c * 9 + u * 3 + v];
      values[i * size + j] = sum;
    }
  return { values, size };
}

let dense_ = null;
function dense(photo, top, left) {
  const n = DENSE * DENSE, values = new Float32Array(n), inputs = new Float64Array(n);
  dense_ ??= Float64Array.from({ length: n * n }, (_, at) => {
    const x = Math.sin(12.9898 * Math.floor(at / n) + 78.233 * (at % n)) * 43758.5453;
    return (x - Math.floor(x) - 0.5) / DENSE;
  });
  for (let at = 0; at < n; at++) {
    const place = (top + 37 + Math.floor(at / DENSE)) * SIZE + left + 37 + at % DENSE;
    inputs[at] = (photo.planes[place] + photo.planes[SIZE * SIZE + place] + photo.planes[2 * SIZE * SIZE + place]) / 3;
  }
  for (let to = 0; to < n; to++) {
    let sum = 0;
    for (let at = 0; at < n; at++) sum += dense_[to * n + at] * inputs[at];
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
