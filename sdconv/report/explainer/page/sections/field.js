// The receptive field: which pixels of the photo one value depends on, and how much.

import { receptiveSpan } from "../core/convolution.js";
import { SIZE } from "../core/vae.js";
import { drawHeat, drawPhoto, overlay } from "../ui/canvas.js";
import { choice, el, python, term, toggle } from "../ui/dom.js";
import { inPython } from "../ui/edits.js";
import { grouped, short } from "../ui/numbers.js";
import { chooser, goToLayer, look } from "../ui/points.js";
import { state } from "../ui/state.js";

const SPREAD = 0.9;
const DEPTHS = [
  ["encoder.conv_in", "first layer"],
  ["encoder.down_blocks.0.resnets.1", "five layers"],
  ["encoder.down_blocks.0.downsamplers.0", "a stride of 2"],
  ["encoder.down_blocks.1.downsamplers.0", "two of them"],
  ["encoder.down_blocks.3.resnets.1", "three, and just before attention"],
  ["decoder.conv_out", "the decoded picture"],
];

// The layers from the photo to a point, along the longest path; `global` where attention is among them.
function chainTo(network, name) {
  const chain = [];
  let global = false;
  for (let at = name; at !== "photo"; at = network.point[at].input) {
    const point = network.point[at];
    if (point.kind === "attention") global = true;
    if (point.kind !== "conv") continue;
    chain.unshift({ kernel: point.kernel, stride: point.stride, before: point.before });
    if (point.up) chain.unshift({ up: 2 });
  }
  return { chain, global };
}

export const field = {
  id: "field",
  title: "How much of the photo does one value see?",
  short: "Field",
  lead: `<p>A neuron of the first layer reads 3 × 3 pixels. One of the next reads 3 × 3 of those neurons: 5 × 5 pixels. After a stride of 2, every step covers twice as much. That is the <b>receptive field</b>: the square. But not every pixel in it counts the same: the colour shows how much the value would change if the pixel did, its <b>effective</b> receptive field, computed backwards through every layer. It is the same value as in section 4: choose it here or there.</p>`,

  build({ root, section, vae: network, photo, follow }) {
    const { values: now, set } = look(() => render());
    const own = state("field", { heat: true, zoom: true }, () => render());
    const choose = chooser(network, set, "point at a value and see what it depends on");
    const depth = choice({ label: "How deep?", options: DEPTHS, value: "", onchange: (layer) => goToLayer(network, layer) });
    const canvas = el("canvas", { width: SIZE, height: SIZE, role: "img", "aria-label": "The photo with the receptive field" });
    const { node: over, mark } = overlay(SIZE, SIZE);
    const heat = toggle({ label: "how much each pixel counts", value: own.values.heat, onchange: (x) => own.set({ heat: x }) });
    const zoom = toggle({ label: "closer", value: own.values.zoom, onchange: (x) => own.set({ zoom: x }) });
    const words = el("p", { class: "verdict", role: "status" });
    const steps = el("div", { class: "growth", role: "img" }), reach = el("p", { class: "note" });
    const code = python();
    root.append(depth, choose.parts, el("div", { class: "split" }, choose.node, el("div", { class: "panel" },
      el("figure", {}, el("div", { class: "plate still" }, canvas, over)), el("div", { class: "controls" }, heat, zoom), words,
      el("p", { class: "note" }, "How wide the square is after each layer, from the photo to the decoded picture (", el("b", { class: "kernel" }, "strides of 2"), ", ", el("b", { class: "output" }, "upsampling"), "); pale: not yet reached"), reach, steps)), code);

    let turn = 0, wait = null, sizes = null;
    async function render() {
      if (!network.version) return;
      const mine = ++turn;
      clearTimeout(wait);
      section.classList.remove("busy");
      await choose.draw(now);
      if (mine !== turn) return;
      depth.set(now.layer);
      heat.set(own.values.heat);
      zoom.set(own.values.zoom);
      const { chain, global } = chainTo(network, now.layer);
      const rows = receptiveSpan(chain, now.i), columns = receptiveSpan(chain, now.j);
      const whole = rows[0] <= 0 && columns[0] <= 0 && rows[1] >= SIZE - 1 && columns[1] >= SIZE - 1;
      const [top, bottom, left, right] = global || whole ? [0, SIZE - 1, 0, SIZE - 1] : [...rows, ...columns];
      frame(top, bottom, left, right);
      growth(chain.length, global);
      const size = `${rows[1] - rows[0] + 1} × ${columns[1] - columns[0] + 1} pixels`;
      words.replaceChildren(...(global
        ? [term("attention", "Attention"), " lies on the way: through it this value depends on every pixel of the photo."]
        : [`Through its convolutions this value sees ${size}, rows ${short(rows[0], 0)} to ${rows[1]} and columns ${short(columns[0], 0)} to ${columns[1]}${top < 0 || left < 0 || bottom >= SIZE || right >= SIZE ? "; what lies outside the photo is padding" : ""}.`]));
      section.dataset.span = [...rows, ...columns].join(",");
      code.hidden = true;
      drawPhoto(canvas, photo.planes, SIZE, SIZE);
      choose.parts.draw();
      if (!own.values.heat) return;
      wait = setTimeout(async () => {
        section.classList.add("busy");
        const note = el("i", {}, " Computing how much each pixel counts…");
        words.append(note);
        const found = await network.gradient(now.layer, now.channel, now.i, now.j);
        if (mine !== turn) return;
        section.classList.remove("busy");
        note.remove();
        if (found) paint(found.values, { rows, columns, global });
      }, 120);
    }

    function paint(values, { rows, columns, global }) {
      const area = SIZE * SIZE, size = new Float32Array(area);
      for (let at = 0; at < area; at++)
        size[at] = Math.abs(values[at]) + Math.abs(values[area + at]) + Math.abs(values[2 * area + at]);
      const most = size.reduce((a, b) => Math.max(a, b), 0) || 1, total = size.reduce((a, b) => a + b, 0);
      drawHeat(canvas, photo.planes, size.map((x) => Math.sqrt(x / most)), SIZE, SIZE, [255, 140, 40]);
      const within = [];
      for (let i = Math.max(0, rows[0]); i <= Math.min(SIZE - 1, rows[1]); i++)
        for (let j = Math.max(0, columns[0]); j <= Math.min(SIZE - 1, columns[1]); j++) within.push(size[i * SIZE + j]);
      const sorted = global ? size.slice() : Float32Array.from(within), inside = sorted.reduce((a, b) => a + b, 0);
      sorted.sort().reverse();
      let sum = 0, count = 0;
      while (sum < SPREAD * inside) sum += sorted[count++];
      words.append(` ${grouped(count)} of ${global ? "all" : "its"} ${grouped(sorted.length)} pixels make up ${SPREAD * 100} % of the effect${global ? "" : " in the square"}.`,
        chainTo(network, now.layer).chain.length === 1 ? " With one layer there is little to see: choose a deeper one, and the middle will count far more than the rim." : "",
        ...(global || inside > 0.9999 * total ? [] : [` Besides, ${short((1 - inside / total) * 100, 1)} % of the whole effect comes from outside the square, spread thinly: `, term("groupnorm", "GroupNorm"), " uses means over the whole map (section 7)."]));
      code.show(gradientLines(now, network.announced.edits), total);
      section.dataset.painted = `${now.layer} ${now.channel} ${now.i} ${now.j}`;
    }

    // The square, and the part of the photo in view.
    function frame(top, bottom, left, right) {
      mark(left, top, right - left + 1, bottom - top + 1);
      const side = Math.min(SIZE, Math.max(24, (bottom - top + 1) * 1.5));
      const shown = own.values.zoom ? side : SIZE;
      const start = (low, high) => Math.max(0, Math.min(SIZE - shown, (low + high + 1 - shown) / 2));
      const x = start(left, right), y = start(top, bottom);
      over.setAttribute("viewBox", `${x} ${y} ${shown} ${shown}`);
      canvas.style.transform = `scale(${SIZE / shown}) translate(${-x / SIZE * 100}%, ${-y / SIZE * 100}%)`;
    }

    // All layers to the decoded picture, of which the first `depth` lead to the chosen value.
    function growth(depth, global) {
      const { chain } = chainTo(network, network.points.at(-1).name);
      sizes ??= chain.map((_, n) => {
        // the widest of the copies that upsampling makes
        const spans = Array.from({ length: 8 }, (_, index) => receptiveSpan(chain.slice(0, n + 1), 64 + index));
        return Math.max(...spans.map(([first, last]) => last - first + 1));
      });
      const reached = sizes.slice(0, depth), kind = ({ up, stride }) => (up ? "up" : stride === 2 ? "stride" : "");
      steps.setAttribute("aria-label", `Receptive field after each layer: ${reached.join(", ")} pixels`);
      steps.replaceChildren(...sizes.map((size, n) => el("i", {
        style: `height:${Math.max(2, size / Math.max(...sizes) * 100)}%`, class: `${kind(chain[n])} ${n < depth ? "" : "ahead"}`,
        title: `layer ${n + 1}: ${size} × ${size} pixels${chain[n].stride === 2 ? " (stride 2)" : chain[n].up ? " (upsampling)" : ""}` })));
      reach.replaceChildren(el("b", {}, `${reached.at(-1)} × ${reached.at(-1)}${global ? ", and through attention everything" : ""}`));
    }

    follow(section, render, [root]);
  },
};

function gradientLines({ layer, channel, i, j }, edits) {
  const { definitions, managers, scaling } = inPython(edits);
  return `${definitions}pixels = photo.clone().requires_grad_()
found = {}
with torch.enable_grad()${managers}:
    hook = vae.get_submodule("${layer}").register_forward_hook(
        lambda module, inputs, output: found.update(map=output)
    )
    latents = vae.encode(pixels).latent_dist.mode()
${scaling}    vae.decode(latents)
    hook.remove()
(gradient,) = torch.autograd.grad(found["map"][0, ${channel}, ${i}, ${j}], pixels)
print(gradient.abs().sum().item())`;
}
