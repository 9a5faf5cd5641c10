// What stands between the convolutions: GroupNorm, SiLU, the shortcut, upsampling.

import { conv2d, convTranspose2d, upsampleNearest } from "../core/convolution.js";
import { SIZE } from "../core/vae.js";
import { drawGrey, drawPhoto, percentiles, picker } from "../ui/canvas.js";
import { choice, el, html, python, select, slider, tell, toggle } from "../ui/dom.js";
import { inPython } from "../ui/edits.js";
import { short } from "../ui/numbers.js";
import { state } from "../ui/state.js";

export const blocks = {
  id: "blocks",
  title: "Between the convolutions, and checkerboards",
  short: "Blocks",
  lead: `<p>Convolutions alone do not make a network. Between them stand a normalisation, an activation function and a shortcut, and between the levels of the decoder an upsampling. Here you can switch each of them off.</p>`,

  build({ root, section, vae: network, photo, follow }) {
    root.append(html(`<div><h3>Four parts of the decoder</h3><p><b>GroupNorm</b> subtracts the mean of a few maps and divides by their standard deviation, so that no layer gets numbers that are much too large or too small. <b>SiLU</b> lets large positive numbers pass and holds negative ones back. The <b>shortcut</b> (or residual path) adds a block’s input to what its convolutions make of it. <b>Nearest upsampling</b> repeats each value as a 2 × 2 square; switched off, a transposed convolution with the same weights takes its place. The weights were trained with all four. The switches act on the decoder’s blocks; its last GroupNorm, before <code>conv_out</code>, stays on.</p></div>`));
    switches({ root, section, network, follow });
    root.append(html(`<div><h3>What a block adds</h3><p>Because of the shortcut, the convolutions of a block only have to say what should change.</p></div>`));
    residual({ root, section, network, follow });
    root.append(html(`<div><h3>Upsampling, and where checkerboards come from</h3><p>To make a map larger, the decoder repeats each value as a 2 × 2 square (<b>nearest</b>) and convolves the result. Older networks used a <b>transposed convolution</b>: each value puts down a copy of the kernel, multiplied by the value, two pixels from the last one. Where the copies overlap unevenly, some pixels get more products than their neighbours: a checkerboard. Point at a pixel and count.</p></div>`));
    upsampling({ root, section, photo });
  },
};

const SWITCHES = { norm: "GroupNorm", silu: "SiLU", shortcut: "shortcut", nearest: "nearest upsampling" };
const WITHOUT = {
  norm: "Without GroupNorm the convolutions get numbers far larger than those that they were trained on, and the picture breaks down.",
  silu: "Without SiLU a block can only weigh and add; nothing is held back. Colours and contrast come out harsh.",
  shortcut: "Without the shortcut every block has to make the whole picture by itself. It was not trained to, and most of the photo is lost.",
  nearest: "A transposed convolution puts three zeros next to each value instead of three copies. Some pixels then get more products than their neighbours: the picture gets a grid, a checkerboard.",
};

function switches({ root, section, network, follow }) {
  const names = Object.keys(SWITCHES);
  const { values: now, set } = state("switch", Object.fromEntries(names.map((name) => [name, true])), () => render());
  const toggles = names.map((name) => toggle({ label: SWITCHES[name], value: true, onchange: (on) => set({ [name]: on }) }));
  const picture = el("canvas", { width: SIZE, height: SIZE, role: "img", "aria-label": "The decoded picture" });
  const bars = el("div", { class: "products", role: "img" });
  const words = el("p", { class: "note", role: "status" });
  const code = python();
  const node = el("div", { class: "split thirds" }, el("figure", {}, picture, el("figcaption", {}, "decoded")),
    el("div", { class: "panel" }, el("div", { class: "controls" }, toggles), words,
      el("p", { class: "note" }, "Spread (standard deviation) of the values after each block of the decoder; each mark of the scale, which begins at 0.01, is ten times the one before. Pale: as trained."), bars));
  root.append(node, code);

  let usual = null, usualPhoto = null, turn = 0;
  async function render() {
    if (!network.version) return;
    names.forEach((name, at) => toggles[at].set(now[name]));
    const mine = ++turn, off = names.filter((name) => !now[name]);
    if (off.length) words.textContent = "Computing…";
    const blocks = network.points.filter(({ name, add }) => add && name.startsWith("decoder.")).map(({ name }) => name);
    const read = [...blocks, "decoder.conv_out"], current = network.wanted.photo;
    const trained = current === usualPhoto ? usual : await network.decodedWith({}, read);
    [usual, usualPhoto] = [trained, current];
    const { picture: values, spread } = off.length
      ? await network.decodedWith({ without: Object.fromEntries(off.map((name) => [name, true])) }, read) : usual;
    if (mine !== turn) return;
    drawPhoto(picture, values, SIZE, SIZE);
    const log = (x) => (Number.isFinite(x) ? Math.max(0, Math.min(100, (Math.log10(Math.max(x, 1e-2)) + 2) / 16 * 100)) : 100);
    bars.replaceChildren(...blocks.map((name, at) => el("div", { class: "bar-row" }, el("span", {}, name.replace("decoder.", "").replace("resnets.", "")),
      el("span", { class: "log ticks", style: "--step:6.25%" }, el("i", { class: "usual", style: `width:${log(usual.spread[at])}%` }), el("i", { style: `width:${log(spread[at])}%` })), el("b", {}, magnitude(spread[at])))));
    bars.setAttribute("aria-label", `Spread after the first block ${magnitude(spread[0])}, after the last ${magnitude(spread.at(-2))}`);
    words.textContent = off.length ? off.map((name) => WITHOUT[name]).join(" ")
      : "As trained. Within a level the spread hardly changes: a block adds little to what is there. It jumps at the upsamplers, whose convolutions have no shortcut.";
    code.show(switchLines(now), Number(spread.at(-1).toFixed(3))); // rounding grows where GroupNorm is off
    section.dataset.switched = names.map((name) => now[name]).join(" ");
  }
  // changed channels do not matter here
  follow(section, () => { if (network.wanted.photo !== usualPhoto) render(); }, [node]);
}

const magnitude = (x) => (!Number.isFinite(x) ? "∞" : x >= 1e5 || x < 0.01 ? x.toExponential(0) : short(x, x < 10 ? 2 : 0));

function switchLines({ norm, silu, shortcut, nearest }) {
  const inBlocks = [
    norm ? "" : "        block.norm1 = block.norm2 = torch.nn.Identity()\n",
    silu ? "" : "        block.nonlinearity = torch.nn.Identity()\n",
    shortcut ? "" : "        block.register_forward_hook(lambda block, inputs, output: output - inputs[0])\n",
  ].join("");
  const start = inBlocks || !nearest ? `import copy
from sdconv.models.blocks import ResnetBlock2D, Upsample2D
changed = copy.deepcopy(vae)
for block in changed.decoder.modules():
` : "changed = vae\n";
  return `${start}${inBlocks && `    if isinstance(block, ResnetBlock2D):\n${inBlocks}`}${nearest ? "" : `    if isinstance(block, Upsample2D):
        block.register_forward_hook(lambda block, inputs, output: torch.nn.functional.conv_transpose2d(
            4 * inputs[0], block.conv.weight.transpose(0, 1).flip(2, 3), block.conv.bias,
            stride=2, padding=1, output_padding=1,
        ))
`}with torch.no_grad():
    decoded = changed.decode(vae.encode(photo).latent_dist.mode()).sample
print(round(decoded.std(correction=0).item(), 3))`;
}

function residual({ root, section, network, follow }) {
  const { values: now, set } = state("residual", { block: "encoder.down_blocks.0.resnets.0", channel: 12 }, () => render(), (v) => v.channel >= 0 && v.channel < 64);
  const block = select({ label: "Block", options: [["", ""]], value: "", onchange: (name) => set({ block: name }) });
  const channel = slider({ label: "channel", min: 0, max: 63, value: now.channel, oninput: (x) => set({ channel: x }) });
  const pictures = ["what comes in", "what the convolutions add", "the sum: what goes out"].map((words) => {
    const canvas = el("canvas", { width: 32, height: 32, role: "img", "aria-label": words });
    return { canvas, node: el("figure", {}, canvas, el("figcaption", {}, words)) };
  });
  const code = python();
  const maps = el("div", { class: "trio" }, pictures.map(({ node }) => node)), scale = el("p", { class: "note" });
  root.append(el("div", { class: "controls" }, block, channel), maps, scale, code);

  let filled = false;
  async function render() {
    if (!network.version) return;
    const all = network.points.filter(({ add }) => add);
    if (!filled) block.querySelector("select").replaceChildren(...all.map(({ name }) => el("option", { value: name }, name)));
    filled = true;
    if (!network.point[now.block]?.add) now.block = all[0].name;
    block.set(now.block);
    channel.set(now.channel);
    const point = network.point[now.block];
    const [before, after] = [await network.planes(point.add, [now.channel]), await network.planes(point.name, [now.channel])];
    const added = after.values.map((x, at) => x - before.values[at]), { width, height } = after;
    const range = percentiles(after.values), middle = (range[0] + range[1]) / 2;
    scale.textContent = `All three on one scale: ${short(range[1] - range[0])} from black to white. In the middle picture grey is 0; at the left and the right black is ${short(range[0])} or less.`;
    drawGrey(pictures[0].canvas, before.values, width, height, range);
    drawGrey(pictures[1].canvas, added, width, height, [range[0] - middle, range[1] - middle]);
    drawGrey(pictures[2].canvas, after.values, width, height, range);
    const i = height / 2, j = width / 2;
    const { definitions, managers, scaling } = inPython(network.announced.edits);
    code.show(`${definitions}before, after = "${point.add}", "${point.name}"
with torch.no_grad()${managers}, sdconv.capture(vae, [before, after]) as maps:
    latents = vae.encode(photo).latent_dist.mode()
${scaling}    vae.decode(latents)
print([maps[name][0, ${now.channel}, ${i}, ${j}].item() for name in (before, after)])`, [before.values[i * width + j], after.values[i * width + j]]);
  }
  follow(section, render, [maps]);
}

const COUNT = 8;

function upsampling({ root, section, photo }) {
  const { values: now, set } = state("up", { how: "transposed", size: 3, on: "flat", i: 6, j: 6 }, () => render(), (v) =>
    ["nearest", "transposed"].includes(v.how) && v.size >= 2 && v.size <= 5 && ["flat", "photo"].includes(v.on) && v.i >= 0 && v.j >= 0);
  const how = choice({ label: "upsampling", options: [["nearest", "nearest, then 3 × 3"], ["transposed", "transposed convolution"]], value: now.how, onchange: (x) => set({ how: x }) });
  const size = slider({ label: "kernel of the transposed one", min: 2, max: 5, value: now.size, words: (x) => `${x} × ${x}`, oninput: (x) => set({ size: x }) });
  const on = choice({ label: "input", options: [["flat", "all ones"], ["photo", "the photo, 32 × 32"]], value: now.on, onchange: (x) => set({ on: x }) });
  const map = picker({ label: "The enlarged map", width: 16, height: 16, onpick: (i, j) => set({ i, j }), hover: true });
  const words = el("p", { class: "verdict", role: "status" });
  const cells = el("div", { class: "cells output counts", "aria-hidden": "true" });
  const code = python();
  root.append(el("div", { class: "controls" }, how, on, size), el("div", { class: "split" }, el("figure", {}, map, el("figcaption", {}, "all weights of the kernel are equal")),
    el("div", { class: "panel" }, words, el("p", { class: "note" }, "How many products each of the first pixels gets:"), cells)), code);

  function render() {
    how.set(now.how);
    on.set(now.on);
    size.set(now.size);
    size.hidden = now.how === "nearest";
    const ones = { values: new Float32Array(COUNT * COUNT).fill(1), height: COUNT, width: COUNT };
    const input = now.on === "flat" ? ones : pooled(photo.grey);
    const enlarge = now.how === "nearest"
      ? (map) => conv2d(upsampleNearest(map), Array(9).fill(1), { padding: [1, 1, 1, 1] })
      : (map) => convTranspose2d(map, Array(now.size ** 2).fill(1), 2);
    // a product of ones is 1, so ones come out as the number of products
    const { values, width: n } = enlarge(input), { values: counts } = enlarge({ ...input, values: input.values.map(() => 1) });
    now.i = Math.min(now.i, n - 1);
    now.j = Math.min(now.j, n - 1);
    const even = now.how === "nearest" ? 9 : now.size ** 2 / 4;
    drawGrey(map.canvas, values, n, n, now.on === "flat" ? [0, 1.6 * even] : [0, even]);
    const count = counts[now.i * n + now.j];
    map.set(now.i, now.j, n, n, `row ${now.i}, column ${now.j}: ${count} products`);
    const kinds = countsInside(counts, n);
    tell(words, `Row ${now.i}, column ${now.j}: `, el("b", { class: "output" }, `${count} ${count === 1 ? "product" : "products"}`), ". ",
      kinds.length > 1 ? `Neighbours get ${kinds.slice(0, -1).join(", ")} or ${kinds.at(-1)}: even a flat input comes out as a checkerboard. The kernel’s size, ${now.size}, is not divisible by the stride, 2.`
        : `Away from the border every pixel gets ${kinds[0]}: the map stays even. ${now.how === "nearest" ? "The kernel moves by one pixel at a time, so it treats all pixels alike, whatever its weights. At the border it reaches into the padding."
          : `The kernel’s size, ${now.size}, is divisible by the stride, 2. But with unequal weights neighbours get different ones, and a checkerboard can still appear.`}`);
    const shown = Math.min(9, n);
    cells.style.setProperty("--columns", shown);
    cells.replaceChildren(...Array.from({ length: shown * shown }, (_, at) => {
      const i = Math.floor(at / shown), j = at % shown, one = counts[i * n + j];
      return el("span", { style: `--share:${Math.round(one / Math.max(...kinds) * 100)}%`, class: i === now.i && j === now.j ? "now" : "" }, String(one));
    }));
    section.dataset.counts = kinds.join(",");
    const x = now.on === "flat" ? `x = torch.ones(1, 1, ${COUNT}, ${COUNT})` : "x = torch.nn.functional.avg_pool2d((photo.mean(1, keepdim=True) + 1) / 2, 8)";
    code.show(now.how === "nearest" ? `${x}
larger = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
larger = conv2d_reference(larger, torch.ones(1, 1, 3, 3), padding=(1, 1, 1, 1))
print(larger[0, 0, ${now.i}, ${now.j}].item())` : `${x}
larger = torch.nn.functional.conv_transpose2d(x, torch.ones(1, 1, ${now.size}, ${now.size}), stride=2)
print(larger[0, 0, ${now.i}, ${now.j}].item())`, values[now.i * n + now.j]);
  }
  photo.addEventListener("change", render);
  render();
}

// The different numbers of products, away from the border.
function countsInside(counts, n) {
  const inside = (at) => Math.floor(at / n) >= 2 && Math.floor(at / n) < n - 4 && at % n >= 2 && at % n < n - 4;
  return [...new Set(counts.filter((_, at) => inside(at)))].sort((a, b) => a - b);
}

// The photo in grey, averaged to 32 × 32.
function pooled(grey) {
  const n = 32, side = SIZE / n, values = new Float32Array(n * n);
  for (let i = 0; i < SIZE; i++) for (let j = 0; j < SIZE; j++) values[Math.floor(i / side) * n + Math.floor(j / side)] += grey[i * SIZE + j] / side ** 2;
  return { values, height: n, width: n };
}
