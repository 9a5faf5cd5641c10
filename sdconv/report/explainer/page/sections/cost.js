// What it costs: parameters and multiplications, and how Winograd saves some.

import { choice, el, html, listFields, python, slider } from "../ui/dom.js";
import { grouped, literals, numbers, short } from "../ui/numbers.js";
import { state } from "../ui/state.js";

const ALL_LAYERS = `points = sdconv.features(vae, size=256)
print(sum(point.multiplies for point in points if point.kind == "conv"))`;
const SIZES = [16, 32, 64, 128, 256, 512];

export const cost = {
  id: "cost",
  title: "What it costs",
  short: "Cost",
  lead: `<p>A convolution learns few numbers and uses each of them at every position. A <b>dense</b> layer learns one for every pair of an input and an output. Choose a layer and compare; each mark of the scale is a thousand times the one before. The dense layer takes all input numbers and makes all output numbers at once.</p>`,

  build({ root, section, vae: network, whenNear }) {
    const { values: now, set } = state("cost", { inputs: 64, outputs: 64, kernel: 3, stride: 1, size: 256 }, () => render(), (v) =>
      v.inputs >= 1 && v.inputs <= 512 && v.outputs >= 1 && v.outputs <= 512 && [1, 3, 5, 7].includes(v.kernel) && [1, 2].includes(v.stride) && SIZES.includes(v.size));
    const inputs = slider({ label: "channels in", min: 1, max: 512, value: now.inputs, oninput: (x) => set({ inputs: x }) });
    const outputs = slider({ label: "channels out", min: 1, max: 512, value: now.outputs, oninput: (x) => set({ outputs: x }) });
    const kernel = choice({ label: "kernel", options: [1, 3, 5, 7].map((x) => [String(x), `${x} × ${x}`]), value: now.kernel, onchange: (x) => set({ kernel: Number(x) }) });
    const stride = choice({ label: "stride", options: [["1", "1"], ["2", "2"]], value: now.stride, onchange: (x) => set({ stride: Number(x) }) });
    const size = slider({ label: "photo", min: 0, max: SIZES.length - 1, value: SIZES.indexOf(now.size), words: (at) => `${SIZES[at]} × ${SIZES[at]}`, oninput: (at) => set({ size: SIZES[at] }) });
    const table = el("div", { class: "costs" });
    const words = el("p", { class: "verdict", role: "status" });
    const code = python(), layersCode = python("All convolutions together: in Python");
    const demo = winograd();
    const layers = el("div", { class: "products", role: "img", "aria-label": "Multiplications of each part of the VAE" });
    root.append(el("div", { class: "controls" }, inputs, outputs, size, kernel, stride), el("div", { class: "panel" }, table, words), code,
      html(`<div><h3>Fewer multiplications: Winograd</h3><p>Neighbouring outputs share inputs, and that can be used. Two outputs of a row and a kernel of three take 2 × 3 = 6 multiplications. With the right sums and differences computed first, four are enough. In two directions and for a square of 4 × 4 outputs, that makes 6 × 6 = <b>36</b> multiplications where the direct way has 16 × 9 = <b>144</b>. This is Winograd’s F(4 × 4, 3 × 3), and this page computes nearly all of the network with it.</p></div>`),
      demo.node, demo.code,
      html(`<div><h3>Where the VAE’s time goes</h3><p>Multiplications of each part for one photo, in millions (M) or billions (G). The parts near the photo’s full size have no more weights than the others, and nearly all of the work.</p></div>`),
      el("div", { class: "panel" }, layers), layersCode);

    function render() {
      inputs.set(now.inputs);
      outputs.set(now.outputs);
      kernel.set(now.kernel);
      stride.set(now.stride);
      size.set(SIZES.indexOf(now.size));
      const side = now.size / now.stride, area = side ** 2, weights = now.inputs * now.kernel ** 2 * now.outputs;
      const pairs = now.size ** 2 * now.inputs * area * now.outputs;
      const rows = [
        ["dense layer", pairs + area * now.outputs, pairs, "soft"],
        ["convolution", weights + now.outputs, weights * area, "kernel"],
        ...(now.kernel === 3 && now.stride === 1 ? [["by Winograd’s method", null, weights * area * 36 / 144, "output"]] : []),
      ];
      const width = (x) => `${Math.max(1, Math.log10(x) / 18 * 100)}%`;
      table.replaceChildren(...["learned numbers", "multiplications"].flatMap((title, column) => [el("h4", {}, title),
        ...rows.filter((row) => row[column + 1] !== null).map((row) => el("div", { class: `cost ${row[3]}` }, el("span", {}, row[0]),
          el("span", { class: "log ticks", style: `--step:${100 / 6}%` }, el("i", { style: `width:${width(row[column + 1])}` })), el("b", {}, grouped(row[column + 1]))))]));
      const times = rows[0][1] / rows[1][1];
      words.textContent = `The dense layer learns ${grouped(times)} times as many numbers, and fits one size of picture only. The convolution’s ${grouped(rows[1][1])} fit every size.`;
      code.show(`from sdconv.convolution.geometry import (
    conv_multiplies, conv_parameters, dense_multiplies, dense_parameters,
)
inputs, outputs, side, to = ${now.inputs}, ${now.outputs}, ${now.size}, ${side}  # channels, channels, pixels, pixels
print([
    dense_parameters(inputs * side**2, outputs * to**2), dense_multiplies(inputs * side**2, outputs * to**2),
    conv_parameters(inputs, outputs, ${now.kernel}), conv_multiplies(inputs, outputs, ${now.kernel}, to),${rows[2] ? `
    conv_multiplies(inputs, outputs, 3, to) * 36 // 144,` : ""}
])`, [rows[0][1], rows[0][2], rows[1][1], ...rows.slice(1).map((row) => row[2])], "int");
      section.dataset.times = String(times);
    }
    render();

    whenNear(section, async () => {
      await network.read();
      const parts = new Map();
      for (const { name, multiplies } of network.points) {
        const part = /^\w+coder\.(\w+blocks?(\.\d)?|conv_\w+)/.exec(name)?.[0] ?? "latents";
        parts.set(part, (parts.get(part) ?? 0) + multiplies);
      }
      const most = Math.max(...parts.values());
      layers.setAttribute("aria-label", `Multiplications of each part of the VAE, in millions: ${[...parts].map(([name, x]) => `${name} ${Math.round(x / 1e6)}`).join(", ")}`);
      layersCode.show(ALL_LAYERS, network.points.reduce((sum, { kind, multiplies }) => sum + (kind === "conv" ? multiplies : 0), 0), "int");
      layers.replaceChildren(...[...parts].map(([name, x]) => el("div", { class: "bar-row" }, el("span", {}, name),
        el("span", { class: "log" }, el("i", { style: `width:${x / most * 100}%` })), el("b", {}, x < 1e7 ? `${short(x / 1e6, 1)} M` : `${short(x / 1e9)} G`))));
    });
  },
};

const LENGTHS = { d: 4, g: 3 };

// Winograd's F(2, 3) with numbers that one can change.
function winograd() {
  const { values: now, set } = state("winograd", { d: "1, 2, 3, 4", g: "1, 0, -1" }, () => render(), (v) => list(v.d, LENGTHS.d) && list(v.g, LENGTHS.g));
  const fields = listFields({ d: { label: "four numbers of a row", kind: "input" }, g: { label: "three weights", kind: "kernel" } }, {
    read: (text, name) => list(text, LENGTHS[name]),
    rule: (name) => `${LENGTHS[name]} numbers are needed here, with commas between them. Until then, the sums below stay as they are.`,
    onlist: (name, text) => set({ [name]: text }),
  });
  const direct = el("div", { class: "panel" }), fast = el("div", { class: "panel" }), code = python();
  const node = el("div", { class: "body flat" }, fields, el("div", { class: "split" }, direct, fast));

  function render() {
    const d = list(now.d, LENGTHS.d), g = list(now.g, LENGTHS.g), n = (x) => short(x, Number.isInteger(x) ? 0 : 2);
    fields.set({ d: now.d, g: now.g });
    const m = [(d[0] - d[2]) * g[0], (d[1] + d[2]) * (g[0] + g[1] + g[2]) / 2, (d[2] - d[1]) * (g[0] - g[1] + g[2]) / 2, (d[1] - d[3]) * g[2]];
    const y = [0, 1].map((at) => g.reduce((sum, w, u) => sum + w * d[at + u], 0));
    const line = (text, value) => el("p", { class: "sumline" }, el("span", {}, text), el("b", { class: "output" }, n(value)));
    direct.replaceChildren(el("h4", {}, "directly: 6 multiplications"), ...y.map((value, at) =>
      line(`${g.map((w, u) => `${n(d[at + u])} × ${n(w)}`).join(" + ")} =`, value)));
    fast.replaceChildren(el("h4", {}, "Winograd: 4 multiplications"),
      line(`m₁ = (${n(d[0])} − ${n(d[2])}) × ${n(g[0])} =`, m[0]),
      line(`m₂ = (${n(d[1])} + ${n(d[2])}) × ${n((g[0] + g[1] + g[2]) / 2)} =`, m[1]),
      line(`m₃ = (${n(d[2])} − ${n(d[1])}) × ${n((g[0] - g[1] + g[2]) / 2)} =`, m[2]),
      line(`m₄ = (${n(d[1])} − ${n(d[3])}) × ${n(g[2])} =`, m[3]),
      line("m₁ + m₂ + m₃ =", m[0] + m[1] + m[2]), line("m₂ − m₃ − m₄ =", m[1] - m[2] - m[3]));
    const [row, kernel] = literals(d, g), whole = [...d, ...g].every(Number.isInteger);
    code.show(`print(convolve(${row}, ${kernel}[::-1])[2:4])  # turned beforehand: convolve turns it back`, y, whole ? "int" : "float");
  }
  render();
  return { node, code };
}

function list(text, count) {
  const found = numbers(text);
  return found?.length === count ? found : null;
}
