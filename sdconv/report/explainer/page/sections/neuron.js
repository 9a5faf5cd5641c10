// One value of a feature map, taken apart: why is this pixel bright?

import { silu } from "../core/convolution.js";
import { el, python, short, svg } from "../ui/dom.js";
import { inPython } from "../ui/edits.js";
import { chooser, look } from "../ui/points.js";

const SHOWN = 18;

export const neuron = {
  id: "neuron",
  title: "The neuron: why is this pixel bright?",
  lead: `<p>Each number of a feature map is the output of one <b>neuron</b>. It multiplies the numbers under its kernel (<b class="input">blue</b>) by its weights (<b class="kernel">orange</b>), adds up the products, and adds a constant, the <b>bias</b>. In the first layer there are 27 products: three colours, nine positions. In later layers there are nine for every channel below. Point at any value and read what made it.</p>`,

  build({ root, section, vae: network, follow }) {
    const { values: now, set } = look(() => render());
    const choose = chooser(network, set, "point at a value");
    const why = el("p", { class: "verdict", role: "status" });
    const slices = el("div", { class: "slices" });
    const list = el("div", { class: "products", role: "img" });
    const steps = el("ol", { class: "steps" });
    const code = python();
    root.append(el("div", { class: "split thirds" }, choose.node,
      el("div", { class: "panel" }, why, slices, list, steps)), code);

    let turn = 0;
    async function render() {
      if (!network.version) return;
      const mine = ++turn, { point, value, values } = await choose.draw(now);
      const { layer, channel, i, j } = now;
      const found = await network.neuron(layer, channel, i, j);
      const next = network.points.find(({ input, norm }) => input === layer && norm);
      const norm = next && await network.norm(layer, next.norm, channel);
      if (mine !== turn) return;
      let below = 0;
      for (const x of values) below += x < value;
      show(point, found, norm, next, below / values.length);
    }

    function show(point, found, norm, next, rank) {
      const products = Array.from(found.inputs, (x, at) => x * found.weights[at]);
      const sum = products.reduce((a, b) => a + b, 0), z = sum + found.bias;
      const area = found.size ** 2;
      const order = products.map((_, at) => at).sort((a, b) => Math.abs(products[b]) - Math.abs(products[a]));
      const named = (at) => `${channelName(point, Math.floor(at / area))}, ${place(at % area, found.size)}`;
      drawSlices(slices, point, found);
      drawProducts(list, { products, order, found, named });
      const largest = order[0], up = products.filter((x) => x > 0).length;
      why.replaceChildren(
        `${rank > 0.5 ? `Brighter than ${Math.floor(rank * 100)} %` : `Darker than ${Math.floor((1 - rank) * 100)} %`} of this map. ${up} of ${products.length} products pull up, ${products.length - up} pull down or are 0. The strongest: `,
        el("b", {}, named(largest)), `, ${short(found.inputs[largest], 3)} × ${short(found.weights[largest], 3)} = ${short(products[largest], 3)}. `,
        found.outside.some(Boolean) ? "Here the kernel reaches beyond the edge: what lies there counts as 0." : "");
      const lines = [["products, added up", sum], ["plus the bias", found.bias, z]];
      if (found.shortcut !== null) lines.push(["plus the block’s input (the shortcut)", found.shortcut, z + found.shortcut]);
      const factor = network.announced.edits[now.layer]?.[now.channel] ?? 1;
      const value = factor * (z + (found.shortcut ?? 0));
      if (factor !== 1) lines.push([`times ${short(factor)}: you changed this channel in section 8`, null, value]);
      if (norm) {
        const u = value * norm.scale + norm.shift;
        lines.push([`GroupNorm: minus its group’s mean ${short(norm.mean)}, over its deviation ${short(norm.std)}, then weight and bias`, null, u],
          [`SiLU: ${u < 0 ? "a negative number is held back" : "a positive number passes"}`, null, silu(u)]);
      }
      steps.replaceChildren(...lines.map(([words, x, total = x]) =>
        el("li", {}, el("span", {}, words, x !== null && total !== x ? el("em", {}, ` ${x < 0 ? "−" : "+"} ${short(Math.abs(x), 4)}`) : ""),
          el("b", { class: total === lines.at(-1).at(-1) ? "output" : "" }, short(total, 4)))));
      if (norm) steps.append(el("li", { class: "note" }, `That is what ${next.name} reads.`));
      const { definitions, managers, scaling } = inPython(network.announced.edits);
      code.show(`${definitions}with torch.no_grad()${managers}, sdconv.capture(vae, "${point.name}") as maps:
    latents = vae.encode(photo).latent_dist.mode()
${scaling}    vae.decode(latents)
print(maps["${point.name}"][0, ${now.channel}, ${now.i}, ${now.j}].item())`, found.value);
      section.dataset.sum = String(value);
    }

    follow(section, render);
  },
};

const COLORS = ["red", "green", "blue"];
const channelName = (point, channel) => (point.inputs === 3 ? COLORS[channel] : `channel ${channel}`);

function place(at, size) {
  if (size === 1) return "this position";
  const row = ["above", "", "below"][Math.floor(at / 3)], column = ["left", "", "right"][at % 3];
  return [row, column].filter(Boolean).join(" ") || "centre";
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
    count > 3 ? el("p", { class: "note" }, `These ${shown.length} of ${count} channels add most.`) : "");
}

// The largest products as bars, and the rest as one.
function drawProducts(node, { products, order, found, named }) {
  const shown = order.slice(0, Math.min(SHOWN, order.length)), rest = order.slice(SHOWN);
  const others = rest.reduce((sum, at) => sum + products[at], 0);
  const most = Math.max(...shown.map((at) => Math.abs(products[at])), Math.abs(others), Math.abs(found.bias)) || 1;
  const rows = [
    ...shown.map((at) => [named(at), products[at]]),
    ...(rest.length ? [[`the other ${rest.length}`, others]] : []),
    ["bias", found.bias],
  ];
  node.setAttribute("aria-label", `Products, the largest first: ${rows.slice(0, 4).map(([name, x]) => `${name} ${short(x, 3)}`).join("; ")}`);
  node.replaceChildren(...rows.map(([name, x]) => el("div", { class: `bar-row ${name === "bias" ? "bias" : ""}` },
    el("span", {}, name), svg("svg", { viewBox: "-100 0 200 10", preserveAspectRatio: "none" },
      svg("line", { x1: 0, x2: 0, y1: -4, y2: 14 }),
      svg("rect", { x: Math.min(0, x / most * 100), width: Math.abs(x / most * 100), y: 1, height: 8, class: x < 0 ? "down" : "up" })),
    el("b", {}, short(x, 3)))));
}
