// The whole network: level by level, and with single channels changed.

import { drawGrey, drawPhoto, percentiles, picker, shades, thumbnails } from "../ui/canvas.js";
import { button, choice, el, python, select, slider, toggle } from "../ui/dom.js";
import { inPython, parsed, written } from "../ui/edits.js";
import { options, partOf, pointsOf, strip } from "../ui/layers.js";
import { short } from "../ui/numbers.js";
import { state } from "../ui/state.js";

export const vae = {
  id: "vae",
  title: "The whole network",
  short: "VAE",
  lead: `<p>Here are all of the VAE’s layers. The <b>encoder</b> turns the photo into <b>latents</b>: four maps of 32 × 32 numbers, one number for every 48 of the photo. The <b>decoder</b> makes a picture from them. Choose a level, a layer and one of its channels, and turn the channel up, down or off: everything after it is computed again.</p>`,

  build({ root, section, vae: network, photo, follow }) {
    let baseline = null, decoded = null;
    const { values: now, set } = state("vae", {
      point: "latents", channel: 0, edits: "", i: 128, j: 128, compare: false,
    }, (change) => render(change), (v) => v.channel >= 0 && v.channel < 64 && v.i >= 0 && v.i < 256 && v.j >= 0 && v.j < 256);

    const parts = strip(network, (point, channel) => set({ point, channel }));
    const before = el("canvas", { width: 256, height: 256, role: "img", "aria-label": "The photo" });
    const after = picker({ label: "The decoded picture", width: 256, height: 256, onpick: (i, j) => set({ i, j }) });
    const changed = el("p", { class: "note", role: "status" });
    const compare = toggle({ label: "without my changes", value: now.compare, onchange: (on) => set({ compare: on }) });
    const where = select({ label: "Layer", options: [["", ""]], value: "", onchange: (point) => set({ point, channel: 0 }) });
    const grid = thumbnails({ label: "Channels", onpick: (channel) => set({ channel }) });
    const big = el("canvas", { width: 32, height: 32, role: "img" }), scale = el("figcaption");
    const factor = slider({ label: "times", min: -2, max: 4, step: 0.25, value: 1, words: (x) => short(x), oninput: (x) => change(x) });
    const quick = choice({ label: "This channel", value: "1", onchange: (x) => change(Number(x)),
      options: [["1", "as it is"], ["0", "off"], ["3", "× 3"], ["-1", "× −1"]] });
    const list = el("ul", { class: "edits" });
    const clear = button("Undo all changes", () => set({ edits: "" }), { class: "quiet" });
    const about = el("p", { class: "note" });
    const code = python();
    root.append(
      parts, el("p", { class: "note" }, "Of each part you see the last layer’s channel that varies most. The encoder’s first three levels end with a downsampler, the decoder’s with an upsampler; the last level of each keeps its size."),
      el("div", { class: "split" },
        el("div", { class: "panel" }, el("div", { class: "controls" }, where), grid),
        el("div", { class: "panel" }, el("div", { class: "one" }, el("figure", {}, big, scale), el("div", {}, about, quick, factor)), list, clear,
          el("div", { class: "pair" }, el("figure", {}, before, el("figcaption", {}, "photo")),
            el("figure", {}, after, el("figcaption", {}, "decoded"))), changed, compare)),
      code, el("p", { class: "controls" }, photo.controls()));

    function change(x) {
      const edits = parsed(now.edits), one = { ...edits[now.point], [now.channel]: x };
      if (x === 1) delete one[now.channel];
      edits[now.point] = one;
      set({ edits: written(edits) });
    }

    // Edits of points and channels that exist; an address may have others.
    function valid() {
      return Object.fromEntries(Object.entries(parsed(now.edits)).filter(([name, factors]) => network.point[name]
        && Object.entries(factors).every(([c, x]) => Number(c) < network.point[name].channels && Number.isFinite(x))));
    }

    // Sets the controls and asks for what has changed; `show` draws what was computed.
    function render(changes = {}) {
      if (!network.version) return;
      if (!network.point[now.point]) now.point = "latents";
      now.channel = Math.min(now.channel, network.point[now.point].channels - 1);
      const edits = valid();
      now.edits = written(edits);
      controls(edits);
      if (JSON.stringify(edits) !== JSON.stringify(network.wanted.edits)) {
        changed.textContent = "Computing…";
        network.compute({ edits });
      } else if (!("edits" in changes)) show();
    }

    let turn = 0;
    async function show() {
      const mine = ++turn, { edits } = network.announced;
      decoded = (await network.planes("decoder.conv_out", [0, 1, 2])).values;
      if (!Object.keys(edits).length) baseline = decoded;
      result(edits);
      if (mine === turn) await pointMaps();
      if (mine === turn) await parts.draw();
    }

    function controls(edits) {
      const point = network.point[now.point];
      parts.set(now.point, edits);
      where.querySelector("select").replaceChildren(...options(pointsOf(network, partOf(now.point))));
      where.set(now.point);
      const x = edits[now.point]?.[now.channel] ?? 1;
      factor.set(x);
      quick.set(x);
      about.textContent = `channel ${now.channel} of ${point.channels}, counted from 0; ${point.height} × ${point.width} values`;
      list.replaceChildren(...Object.entries(edits).flatMap(([name, factors]) => Object.entries(factors).map(([channel, times]) =>
        el("li", {}, el("button", { type: "button", class: "chip", onclick: () => set({ point: name, channel: Number(channel) }) }, `${name}, channel ${channel}: × ${short(times)}`),
          button("×", () => { const all = parsed(now.edits); delete all[name][channel]; set({ edits: written(all) }); }, { "aria-label": `undo channel ${channel} of ${name}`, class: "chip" })))));
      clear.hidden = !Object.keys(edits).length;
      compare.hidden = clear.hidden;
      compare.set(now.compare);
      after.set(now.i, now.j, 256, 256, `row ${now.i}, column ${now.j}`, 3);
    }

    async function pointMaps() {
      const point = network.point[now.point];
      grid.fill(await network.allPlanes(point.name, 32));
      grid.choose(now.channel);
      grid.mark(Object.keys(parsed(now.edits)[point.name] ?? {}).map(Number));
      const { values, width, height } = await network.planes(point.name, [now.channel]);
      const range = percentiles(values);
      drawGrey(big, values, width, height, range);
      scale.textContent = shades(range);
      big.setAttribute("aria-label", `Feature map: ${point.name}, channel ${now.channel}`);
    }

    function result(edits) {
      draw();
      const pixel = [0, 1, 2].map((c) => decoded[c * 65536 + now.i * 256 + now.j]);
      code.show(lines(edits, now), pixel);
      const mean = baseline ? decoded.reduce((sum, x, at) => sum + Math.abs(x - baseline[at]), 0) / decoded.length : 0;
      changed.textContent = clear.hidden
        ? `Computed in ${network.seconds.toFixed(1)} s in your browser.`
        : `Computed in ${network.seconds.toFixed(1)} s. The changes move the picture’s values by ${short(mean / 2 * 100, 1)} % of their range on average.`;
    }

    function draw() {
      if (!decoded) return;
      const off = now.compare && baseline && !compare.hidden;
      drawPhoto(after.canvas, off ? baseline : decoded, 256, 256);
      drawPhoto(before, photo.planes, 256, 256);
    }

    photo.addEventListener("change", () => { baseline = null; });
    // what the address has holds for all sections, before this one comes into view
    if (now.edits) network.read().then(() => { network.wanted = { ...network.wanted, edits: valid() }; });
    let begun = false;
    follow(section, async () => {
      if (!begun) render({ edits: now.edits });
      begun = true;
      if (!baseline && Object.keys(network.announced.edits).length) baseline = (await network.decodedWith({})).picture;
      show();
    }, [root]);
  },
};

function lines(edits, { i, j }) {
  const { definitions, managers, scaling } = inPython(edits);
  return `${definitions}with torch.no_grad()${managers}:
    latents = vae.encode(photo).latent_dist.mode()
${scaling}    decoded = vae.decode(latents).sample
print(decoded[0, :, ${i}, ${j}].tolist())`;
}
