// One value of a feature map, taken apart: why is this pixel bright?

import { silu } from "../core/convolution.js";
import { SIZE } from "../core/vae.js";
import { drawGrey, drawPhoto, overlay } from "../ui/canvas.js";
import { el, python, svg, tell, term } from "../ui/dom.js";
import { inPython } from "../ui/edits.js";
import { short } from "../ui/numbers.js";
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
    root.append(choose.parts, el("div", { class: "split thirds" }, choose.node,
      el("div", { class: "panel" }, el("div", { class: "reads" }, el("figure", {}, el("div", { class: "plate still" }, reads, over), readsWords), why), slices, list, steps)), code);

    let turn = 0;
    async function render() {
      if (!network.version) return;
      const mine = ++turn, { point, value, values } = await choose.draw(now);
      const { layer, channel, i, j } = now;
      const found = await network.neuron(layer, channel, i, j);
      const next = network.points.find(({ input, norm }) => input === layer && norm);
      const norm = next && { reader: next.name, ...await network.norm(layer, next.norm, channel) };
      const sums = channelSums(found);
      const input = point.input === "photo" ? null : await network.planes(point.input, [largest(sums)]);
      if (mine !== turn) return;
      drawInput(point, input, largest(sums));
      drawSlices(slices, point, found, sums);
      const products = Array.from(found.inputs, (x, at) => x * found.weights[at]);
      drawProducts(list, point, found, products);
      tellWhy(point, found, products, values.filter((x) => x < value).length / values.length);
      drawSteps(point, found, products, norm);
      printIt(point, found.value);
      choose.parts.draw();
    }

    // The photo, or of the map below the channel that matters most, and the kernel's place in it.
    function drawInput({ kind, input, kernel, stride = 1, before = 0, up = false }, map, channel) {
      const [height, width] = map ? [map.height, map.width] : [SIZE, SIZE];
      if (map) drawGrey(reads, map.values, width, height);
      else drawPhoto(reads, photo.planes, SIZE, SIZE);
      over.setAttribute("viewBox", `0 0 ${width} ${height}`);
      const pixel = up ? 0.5 : 1; // of the input, for each row and column that the kernel reads
      if (kind === "attention") mark(0, 0, width, height);
      else mark((now.j * stride - before) * pixel, (now.i * stride - before) * pixel, kernel * pixel, kernel * pixel);
      readsWords.textContent = map ? `${input}, channel ${channel}, and the kernel in it` : "the photo, and the kernel in it";
    }

    function tellWhy(point, { inputs, weights, bias, size, shortcut, outside }, products, rank) {
      const first = byMagnitude(products)[0], z = total(products) + bias;
      const [raise, lower, none] = [1, -1, 0].map((sign) => products.filter((x) => Math.sign(x) === sign).length);
      tell(why,
        `${rank > 0.5 ? `Brighter than ${Math.floor(rank * 100)} %` : `Darker than ${Math.floor((1 - rank) * 100)} %`} of this map. Of its ${products.length} products ${raise} raise it and ${lower} lower it${none ? `; ${none} are 0` : ""}. The largest: `,
        el("b", {}, productName(point, first, size)), `, ${short(inputs[first], 3)} × ${short(weights[first], 3)} = ${short(products[first], 3)}. `,
        Math.abs(shortcut ?? 0) > Math.abs(z) ? `But most comes through the shortcut: ${short(shortcut, 3)}. ` : "",
        outside.some(Boolean) ? "Here the kernel reaches beyond the edge: what lies there counts as 0." : "");
    }

    // From the sum of the products to the value, and to what the next layer reads of it.
    function drawSteps(point, { bias, shortcut }, products, norm) {
      const sum = total(products), z = sum + bias;
      const factor = network.announced.edits[now.layer]?.[now.channel] ?? 1;
      const value = factor * (z + (shortcut ?? 0));
      const added = (x) => el("em", {}, ` ${x < 0 ? "−" : "+"} ${short(Math.abs(x), 4)}`);
      const lines = [[["products, added up"], sum], [["plus the bias", added(bias)], z]];
      if (shortcut !== null) lines.push([[`plus the ${point.kind === "attention" ? "layer" : "block"}’s input (the `, term("shortcut", "shortcut"), ")", added(shortcut)], z + shortcut]);
      if (factor !== 1) lines.push([[`times ${short(factor)}: you changed this channel in section 8`], value]);
      if (norm) {
        const u = (value - norm.mean) / norm.std * norm.weight + norm.bias;
        lines.push([[term("groupnorm", "GroupNorm"), `: minus its group’s mean ${short(norm.mean, 3)}, divided by its standard deviation ${short(norm.std, 3)}, times ${short(norm.weight, 3)}, plus ${short(norm.bias, 3)}`], u],
          [[term("silu", "SiLU"), ": x ÷ (1 + e⁻ˣ), which holds negative numbers back"], silu(u)]);
      }
      steps.replaceChildren(...lines.map(([words, x], at) =>
        el("li", {}, el("span", {}, words), el("b", { class: at === lines.length - 1 ? "output" : "" }, short(x, 4)))));
      if (norm) steps.append(el("li", { class: "note" }, `This is what ${norm.reader} reads.`));
      section.dataset.sum = String(value);
    }

    function printIt({ name }, value) {
      const { definitions, managers, scaling } = inPython(network.announced.edits);
      code.show(`${definitions}with torch.no_grad()${managers}, sdconv.capture(vae, "${name}") as maps:
    latents = vae.encode(photo).latent_dist.mode()
${scaling}    vae.decode(latents)
print(maps["${name}"][0, ${now.channel}, ${now.i}, ${now.j}].item())`, value);
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

const productName = (point, at, size) => `${channelName(point, Math.floor(at / size ** 2))}, ${place(at % size ** 2, size)}`;

const total = (values) => values.reduce((a, b) => a + b, 0);
const byMagnitude = (values) => [...values.keys()].sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]));
const largest = (values) => byMagnitude(values)[0];

// What each channel of the input adds to the sum.
function channelSums({ inputs, weights, count, size }) {
  const sums = new Float64Array(count);
  inputs.forEach((x, at) => { sums[Math.floor(at / size ** 2)] += x * weights[at]; });
  return sums;
}

// What the blue and orange numbers are.
function source({ kind, input, weight, norm }) {
  const blue = kind === "attention" ? "averages over all positions, weighted by attention" : input === "photo" ? "the photo, from −1 to 1" : norm ? `${input} after GroupNorm and SiLU` : input;
  return `Blue: ${blue}. Orange: ${weight}.weight.`;
}

// Inputs and weights as small grids: all three colours, or the four channels that matter most.
function drawSlices(node, point, { inputs, weights, outside, count, size }, sums) {
  const area = size * size, shown = count === 3 ? [0, 1, 2] : byMagnitude(sums).slice(0, 4);
  // the largest of those shown has the strongest colour
  const strongest = (values) => Math.max(...shown.flatMap((c) => [...values.subarray(c * area, (c + 1) * area)].map(Math.abs))) || 1;
  const most = { input: strongest(inputs), kernel: strongest(weights) };
  const grid = (values, c, kind) => el("div", { class: `cells ${kind}`, style: `--columns:${size}` },
    Array.from(values.subarray(c * area, (c + 1) * area), (x, at) =>
      el("span", { style: `--share:${Math.round(Math.abs(x) / most[kind] * 100)}%`, class: outside[at] && kind === "input" ? "zero" : "" }, short(x, Math.abs(x) >= 10 ? 1 : 2))));
  node.replaceChildren(...shown.map((c) => el("figure", {},
    el("div", { class: "meeting" }, grid(inputs, c, "input"), el("span", { "aria-hidden": "true" }, "×"), grid(weights, c, "kernel")),
    el("figcaption", {}, `${channelName(point, c)}: adds ${short(sums[c], 3)}`))),
    el("p", { class: "note" }, `${count > 3 ? `The four of ${count} channels that matter most. ` : ""}${source(point)}`));
}

// The largest products as bars, and the rest as one.
function drawProducts(node, point, { bias, shortcut, size }, products) {
  const order = byMagnitude(products), shown = order.slice(0, SHOWN), rest = order.slice(SHOWN);
  const rows = [
    ...shown.map((at) => [productName(point, at, size), products[at]]),
    ...(rest.length ? [[`the other ${rest.length}`, total(rest.map((at) => products[at]))]] : []),
    ["bias", bias],
    ...(shortcut === null ? [] : [["the shortcut", shortcut]]),
  ];
  const most = Math.max(...rows.map(([, x]) => Math.abs(x))) || 1;
  node.setAttribute("aria-label", `Products, the largest first: ${rows.slice(0, 4).map(([name, x]) => `${name} ${short(x, 3)}`).join("; ")}`);
  node.replaceChildren(...rows.map(([name, x]) => el("div", { class: `bar-row ${name === "bias" ? "bias" : ""}` },
    el("span", {}, name), svg("svg", { viewBox: "-100 0 200 10", preserveAspectRatio: "none" },
      svg("line", { x1: 0, x2: 0, y1: -4, y2: 14 }),
      svg("rect", { x: Math.min(0, x / most * 100), width: Math.abs(x / most * 100), y: 1, height: 8, class: x < 0 ? "down" : "up" })),
    el("b", {}, short(x, 3)))));
}
