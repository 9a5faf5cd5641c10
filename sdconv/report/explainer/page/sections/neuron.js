// One value of a feature map, taken apart: why is this pixel bright?

import { silu } from "../core/convolution.js";
import { SIZE } from "../core/vae.js";
import { drawGrey, drawPhoto, overlay } from "../ui/canvas.js";
import { el, python, short, svg, tell } from "../ui/dom.js";
import { inPython } from "../ui/edits.js";
import { chooser, look } from "../ui/points.js";

const SHOWN = 27;

export const neuron = {
  id: "neuron",
  title: "The neuron: why is this pixel bright?",
  short: "Neuron",
  lead: `<p>A colour photo has three planes: red, green, blue. So a kernel of the network’s first layer is three grids deep, 27 weights, and makes <b>one</b> feature map. The layer has 64 such kernels and makes 64 maps, its <b>channels</b>. A kernel of the next layer reads all of them: it is 64 grids deep.</p>
<p>Each number of a map is the output of one <b>neuron</b>. It multiplies the numbers under its kernel (<b class="input">blue</b>) by its weights (<b class="kernel">orange</b>), adds up the products, and adds a constant, the <b>bias</b>. Point at any value of any map, and read what made it.</p>`,

  build({ root, section, vae: network, photo, follow }) {
    const { values: now, set } = look(() => render());
    const choose = chooser(network, set, "point at a value");
    const why = el("p", { class: "verdict", role: "status" });
    const slices = el("div", { class: "slices" });
    const reads = el("canvas", { width: 32, height: 32, role: "img", "aria-label": "What the kernel reads" });
    const { node: over, mark } = overlay(32, 32), readsWords = el("figcaption");
    const list = el("div", { class: "products", role: "img" });
    const steps = el("ol", { class: "steps" });
    const code = python();
    root.append(el("div", { class: "split thirds" }, choose.node,
      el("div", { class: "panel" }, el("div", { class: "reads" }, el("figure", {}, el("div", { class: "plate still" }, reads, over), readsWords), why), slices, list, steps)), code);

    let turn = 0;
    async function render() {
      if (!network.version) return;
      const mine = ++turn, { point, value, values } = await choose.draw(now);
      const { layer, channel, i, j } = now;
      const found = await network.neuron(layer, channel, i, j);
      const next = network.points.find(({ input, norm }) => input === layer && norm);
      const norm = next && await network.norm(layer, next.norm, channel);
      const strongest = largestChannel(found);
      const input = point.input === "photo" ? null : await network.planes(point.input, [strongest]);
      if (mine !== turn) return;
      drawInput(point, found, input, strongest);
      let below = 0;
      for (const x of values) below += x < value;
      show(point, found, norm, next, below / values.length);
    }

    // The photo, or of the map below the channel that matters most, and the kernel's place in it.
    function drawInput({ kind, input, stride = 1, up = false }, { size }, map, channel) {
      const { i, j } = now, edge = size === 3 && stride === 1 ? 1 : 0, scale = up ? 0.5 : stride;
      const [height, width] = map ? [map.height, map.width] : [SIZE, SIZE];
      if (map) drawGrey(reads, map.values, width, height);
      else drawPhoto(reads, photo.planes, SIZE, SIZE);
      over.setAttribute("viewBox", `0 0 ${width} ${height}`);
      const reach = up ? size / 2 : size;
      if (kind === "attention") mark(0, 0, width, height);
      else mark(j * scale - edge * (up ? 0.5 : 1), i * scale - edge * (up ? 0.5 : 1), reach, reach);
      readsWords.textContent = map ? `${input}, channel ${channel}, and the kernel in it` : "the photo, and the kernel in it";
    }

    function show(point, found, norm, next, rank) {
      const products = Array.from(found.inputs, (x, at) => x * found.weights[at]);
      const sum = products.reduce((a, b) => a + b, 0), z = sum + found.bias;
      const area = found.size ** 2;
      const order = products.map((_, at) => at).sort((a, b) => Math.abs(products[b]) - Math.abs(products[a]));
      const named = (at) => `${channelName(point, Math.floor(at / area))}, ${place(at % area, found.size)}`;
      drawSlices(slices, point, found);
      drawProducts(list, { products, order, found, named });
      const largest = order[0], signs = [1, -1, 0].map((sign) => products.filter((x) => Math.sign(x) === sign).length);
      tell(why,
        `${rank > 0.5 ? `Brighter than ${Math.floor(rank * 100)} %` : `Darker than ${Math.floor((1 - rank) * 100)} %`} of this map. Of its ${products.length} products ${signs[0]} raise it and ${signs[1]} lower it${signs[2] ? `; ${signs[2]} are 0` : ""}. The largest: `,
        el("b", {}, named(largest)), `, ${short(found.inputs[largest], 3)} × ${short(found.weights[largest], 3)} = ${short(products[largest], 3)}. `,
        Math.abs(found.shortcut ?? 0) > Math.abs(z) ? `But most comes through the shortcut: ${short(found.shortcut, 3)}. ` : "",
        found.outside.some(Boolean) ? "Here the kernel reaches beyond the edge: what lies there counts as 0." : "");
      const lines = [["products, added up", sum], ["plus the bias", found.bias, z]];
      if (found.shortcut !== null) lines.push([`plus the ${point.kind === "attention" ? "layer" : "block"}’s input (the shortcut)`, found.shortcut, z + found.shortcut]);
      const factor = network.announced.edits[now.layer]?.[now.channel] ?? 1;
      const value = factor * (z + (found.shortcut ?? 0));
      if (factor !== 1) lines.push([`times ${short(factor)}: you changed this channel in section 8`, null, value]);
      if (norm) {
        const u = (value - norm.mean) / norm.std * norm.weight + norm.bias;
        lines.push([`GroupNorm: minus its group’s mean ${short(norm.mean, 3)}, over its deviation ${short(norm.std, 3)}, times ${short(norm.weight, 3)}, plus ${short(norm.bias, 3)}`, null, u],
          ["SiLU: x ÷ (1 + e⁻ˣ), which holds negative numbers back", null, silu(u)]);
      }
      steps.replaceChildren(...lines.map(([words, x, total = x]) =>
        el("li", {}, el("span", {}, words, x !== null && total !== x ? el("em", {}, ` ${x < 0 ? "−" : "+"} ${short(Math.abs(x), 4)}`) : ""),
          el("b", { class: total === lines.at(-1).at(-1) ? "output" : "" }, short(total, 4)))));
      if (norm) steps.append(el("li", { class: "note" }, `This is what ${next.name} reads.`));
      const { definitions, managers, scaling } = inPython(network.announced.edits);
      code.show(`${definitions}with torch.no_grad()${managers}, sdconv.capture(vae, "${point.name}") as maps:
    latents = vae.encode(photo).latent_dist.mode()
${scaling}    vae.decode(latents)
print(maps["${point.name}"][0, ${now.channel}, ${now.i}, ${now.j}].item())`, found.value);
      section.dataset.sum = String(value);
    }

    follow(section, render, [root]);
  },
};

const COLORS = ["red", "green", "blue"];
const channelName = (point, channel) => (point.inputs === 3 ? COLORS[channel] : `channel ${channel}`);

function place(at, size) {
  if (size === 1) return "this position";
  const row = ["above", "", "below"][Math.floor(at / 3)], column = ["left", "", "right"][at % 3];
  return [row, column].filter(Boolean).join(" ") || "centre";
}

// The channel of the input whose products add up to most.
function largestChannel({ inputs, weights, count, size }) {
  const shares = new Float32Array(count);
  inputs.forEach((x, at) => { shares[Math.floor(at / size ** 2)] += x * weights[at]; });
  return shares.reduce((best, x, c) => (Math.abs(x) > Math.abs(shares[best]) ? c : best), 0);
}

// What the blue and orange numbers are.
function source({ kind, input, weight, norm }) {
  const blue = kind === "attention" ? "averages over all positions, weighted by attention" : input === "photo" ? "the photo, from −1 to 1" : norm ? `${input} after GroupNorm and SiLU` : input;
  return `Blue: ${blue}. Orange: ${weight}.weight.`;
}

// Inputs and weights as small grids: all three colours, or the four channels that matter most.
function drawSlices(node, point, { inputs, weights, outside, count, size }) {
  const area = size * size;
  const shares = Array.from({ length: count }, (_, c) => {
    let sum = 0;
    for (let at = c * area; at < (c + 1) * area; at++) sum += inputs[at] * weights[at];
    return sum;
  });
  const shown = count === 3 ? [0, 1, 2]
    : shares.map((_, c) => c).sort((a, b) => Math.abs(shares[b]) - Math.abs(shares[a])).slice(0, 4);
  const grid = (values, c, kind) => el("div", { class: `cells ${kind}`, style: `--columns:${size}` },
    Array.from(values.subarray(c * area, (c + 1) * area), (x, at) =>
      el("span", { class: outside[at] && kind === "input" ? "zero" : "" }, short(x, Math.abs(x) >= 10 ? 1 : 2))));
  node.replaceChildren(...shown.map((c) => el("figure", {},
    el("div", { class: "meeting" }, grid(inputs, c, "input"), el("span", { "aria-hidden": "true" }, "×"), grid(weights, c, "kernel")),
    el("figcaption", {}, `${channelName(point, c)}: adds ${short(shares[c], 3)}`))),
    el("p", { class: "note" }, `${count > 3 ? `The four of ${count} channels that matter most. ` : ""}${source(point)}`));
}

// The largest products as bars, and the rest as one.
function drawProducts(node, { products, order, found, named }) {
  const shown = order.slice(0, Math.min(SHOWN, order.length)), rest = order.slice(SHOWN);
  const others = rest.reduce((sum, at) => sum + products[at], 0);
  const most = Math.max(...shown.map((at) => Math.abs(products[at])), Math.abs(others), Math.abs(found.bias), Math.abs(found.shortcut ?? 0)) || 1;
  const rows = [
    ...shown.map((at) => [named(at), products[at]]),
    ...(rest.length ? [[`the other ${rest.length}`, others]] : []),
    ["bias", found.bias],
    ...(found.shortcut === null ? [] : [["the shortcut", found.shortcut]]),
  ];
  node.setAttribute("aria-label", `Products, the largest first: ${rows.slice(0, 4).map(([name, x]) => `${name} ${short(x, 3)}`).join("; ")}`);
  node.replaceChildren(...rows.map(([name, x]) => el("div", { class: `bar-row ${name === "bias" ? "bias" : ""}` },
    el("span", {}, name), svg("svg", { viewBox: "-100 0 200 10", preserveAspectRatio: "none" },
      svg("line", { x1: 0, x2: 0, y1: -4, y2: 14 }),
      svg("rect", { x: Math.min(0, x / most * 100), width: Math.abs(x / most * 100), y: 1, height: 8, class: x < 0 ? "down" : "up" })),
    el("b", {}, short(x, 3)))));
}
