// A kernel on a photo: nine weights that one can change, and the nine products behind each pixel.

import { conv2d } from "../core/convolution.js";
import { SIZE } from "../core/vae.js";
import { drawGrey, picker } from "../ui/canvas.js";
import { choice, el, python, tell } from "../ui/dom.js";
import { short } from "../ui/numbers.js";
import { state } from "../ui/state.js";

const PRESETS = {
  identity: [0, 0, 0, 0, 1, 0, 0, 0, 0],
  blur: [1, 2, 1, 2, 4, 2, 1, 2, 1].map((x) => x / 16),
  sharpen: [0, -1, 0, -1, 5, -1, 0, -1, 0],
  "edges |": [-1, 0, 1, -1, 0, 1, -1, 0, 1],
  "edges —": [-1, -1, -1, 0, 0, 0, 1, 1, 1],
  outline: [-1, -1, -1, -1, 8, -1, -1, -1, -1],
};
const READ = {
  identity: "Only the centre counts: the photo stays as it is.",
  blur: "A weighted average of a pixel and its neighbours.",
  sharpen: "The centre five times, minus the four neighbours: differences grow.",
  "edges |": "The right column minus the left one: large where the photo gets brighter to the right.",
  "edges —": "The lower row minus the upper one: large where the photo gets brighter downwards.",
  outline: "Eight times the centre minus all neighbours: large where a pixel differs from what is around it.",
};
const LARGEST = 100; // of the weights
const PLACES = ["above left", "above", "above right", "left", "centre", "right", "below left", "below", "below right"];

export const kernel = {
  id: "kernel",
  title: "A kernel on a photo",
  short: "Kernel",
  lead: `<p>Now the long list is a photo, in grey, and the short one a grid of nine <b class="kernel">weights</b>. The grid stops at every pixel: nine <b class="input">brightnesses</b> meet nine weights, the products are added up, and their <b class="output">sum</b> is the new pixel. What the convolution looks for is in the weights and only there. Change them, and point at the photo to see the sum.</p>
<p>Unlike the second list of section 1, the grid is <b>not</b> turned around. Strictly, that is a cross-correlation; neural networks call it a convolution all the same, for with learned weights it makes no difference. And where the grid reaches beyond the photo, it meets zeros, so that the new picture is as large as the old one.</p>`,

  build({ root, photo }) {
    const { values: now, set } = state("kernel", { w: PRESETS["edges |"].join(), i: 35, j: 119 }, () => render(), (v) => {
      const w = v.w.split(",").map(Number);
      return w.length === 9 && w.every((x) => Math.abs(x) <= LARGEST) && v.i >= 0 && v.i < SIZE && v.j >= 0 && v.j < SIZE;
    });
    const weights = () => now.w.split(",").map(Number);
    const inputs = PLACES.map((place, at) => el("input", { type: "number", step: 0.1, "aria-label": `weight ${place}`,
      oninput: (event) => {
        const fits = Math.abs(event.target.valueAsNumber) <= LARGEST;
        event.target.setAttribute("aria-invalid", String(!fits));
        if (!fits) return; // while it is being typed
        const w = weights();
        w[at] = event.target.valueAsNumber;
        set({ w: w.join() });
      }, onblur: () => render() }));
    const preset = choice({ label: "Kernels to begin with", value: "", options: Object.keys(PRESETS).map((name) => [name, name]),
      onchange: (name) => set({ w: PRESETS[name].join() }) });
    const onpick = (i, j) => set({ i, j });
    const before = picker({ label: "The photo in grey", width: SIZE, height: SIZE, onpick, hover: true });
    const after = picker({ label: "The result", width: SIZE, height: SIZE, onpick, hover: true });
    const scale = el("figcaption");
    const grid = (kind, words) => {
      const cells = el("div", { class: `cells ${kind}`, style: "--columns:3" });
      const caption = el("figcaption"), node = el("figure", {}, cells, caption);
      node.fill = (values) => {
        caption.textContent = values.includes(null) ? `${words}; grey: beyond the photo` : words;
        cells.replaceChildren(...values.map((x) => el("span", { class: x === null ? "zero" : "" }, short(x ?? 0))));
      };
      return node;
    };
    const under = grid("input", "brightnesses under the kernel"), multiplied = grid("", "products");
    const total = el("b", { class: "output" });
    const code = python(), about = el("p", { class: "note", role: "status" });
    root.append(
      el("div", { class: "controls" }, preset, photo.controls()), about,
      el("div", { class: "pair" }, el("figure", {}, before, before.nudges, el("figcaption", {}, "the photo, from 0 (black) to 1 (white). Click to hold a pixel, and again to release it")), el("figure", {}, after, scale)),
      el("div", { class: "panel sum" }, under, el("span", { "aria-hidden": "true" }, "×"),
        el("figure", {}, el("div", { class: "nine" }, inputs), el("figcaption", {}, "weights: change them")),
        el("span", { "aria-hidden": "true" }, "="), multiplied, el("p", { class: "total", role: "status" }, "sum ", total)), code);

    function render() {
      const w = weights(), result = conv2d({ values: photo.grey, height: SIZE, width: SIZE }, w, { padding: [1, 1, 1, 1] });
      inputs.forEach((input, at) => { if (document.activeElement !== input) { input.value = Number(w[at].toFixed(4)); input.removeAttribute("aria-invalid"); } });
      const known = Object.keys(PRESETS).find((name) => PRESETS[name].join() === now.w);
      preset.set(known ?? "");
      tell(about, READ[known] ?? "A kernel of your own. Positive weights look for bright pixels in their place, negative ones for dark ones.");
      drawGrey(before.canvas, photo.grey, SIZE, SIZE, [0, 1]);
      const weight = w.reduce((a, b) => a + b, 0), balanced = Math.abs(weight) < 1e-6;
      const most = result.values.reduce((a, x) => Math.max(a, Math.abs(x)), 0) || 1;
      drawGrey(after.canvas, result.values, SIZE, SIZE, balanced ? [-most / 2, most / 2] : [Math.min(0, weight), Math.max(0, weight)]);
      scale.textContent = balanced ? `the result. The weights add up to 0, so grey is 0. White, ${short(most / 2, 1)} or more: the pattern is there; black, ${short(-most / 2, 1)} or less: its opposite` : `the result, from ${short(Math.min(0, weight), 1)} (black) to ${short(Math.max(0, weight), 1)} (white)`;
      const near = PLACES.map((_, at) => {
        const r = now.i + Math.floor(at / 3) - 1, c = now.j + at % 3 - 1;
        return r < 0 || r >= SIZE || c < 0 || c >= SIZE ? null : photo.grey[r * SIZE + c];
      });
      const products = near.map((x, at) => (x ?? 0) * w[at]);
      under.fill(near);
      multiplied.fill(products);
      const value = result.values[now.i * SIZE + now.j];
      total.textContent = short(value, 3);
      for (const node of [before, after]) node.set(now.i, now.j, SIZE, SIZE, `row ${now.i}, column ${now.j}: sum ${short(value, 3)}`, node === before ? 1 : 0);
      const rows = [0, 3, 6].map((at) => `[${w.slice(at, at + 3).map((x) => (Number.isInteger(x) ? x.toFixed(1) : x)).join(", ")}]`);
      code.show(`grey = (photo.mean(1, keepdim=True) + 1) / 2
kernel = torch.tensor([[[${rows.join(", ")}]]])
print(conv2d_reference(grey, kernel, padding=(1, 1, 1, 1))[0, 0, ${now.i}, ${now.j}].item())`, value);
    }
    photo.addEventListener("change", render);
    render();
  },
};
