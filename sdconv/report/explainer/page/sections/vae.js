// The whole network: level by level, and with single channels changed.

import { PARTS } from "../core/network.js";
import { drawGrey, drawPhoto, percentiles, picker, shades, thumbnails } from "../ui/canvas.js";
import { button, choice, el, python, select, short, slider, toggle } from "../ui/dom.js";
import { inPython, parsed, written } from "../ui/edits.js";
import { state } from "../ui/state.js";

export const vae = {
  id: "vae",
  title: "The whole network",
  short: "VAE",
  lead: `<p>Here are all of its layers. The <b>encoder</b> turns the photo into <b>latents</b>: four maps of 32 × 32 numbers, a 48th of the photo’s. The <b>decoder</b> makes a picture of them. Choose a level, a layer and one of its channels, and turn the channel up, down or off: everything after it is computed again.</p>`,

  build({ root, section, vae: network, photo, follow }) {
    let baseline = null, decoded = null, live = {}, partsOf = 0;
    const { values: now, set } = state("vae", {
      point: "latents", channel: 0, edits: "", i: 128, j: 128, compare: false,
    }, (change) => render(change), (v) => v.channel >= 0 && v.channel < 64 && v.i >= 0 && v.i < 256 && v.j >= 0 && v.j < 256);

    const pointsOf = (part) => network.points.filter(({ name }) => part.has.test(name));
    const standsFor = (part) => network.point[part.label] ?? pointsOf(part).at(-1); // of the latents, the latents
    const tiles = PARTS.map((part) => el("button", { type: "button", class: "station",
      onclick: () => set({ point: standsFor(part).name, channel: 0 }) }, el("canvas", { "aria-hidden": "true" }), el("b", {}, part.label), el("small")));
    const row = (side) => el("div", { class: "stations", role: "group", "aria-label": side },
      el("span", { class: "side" }, side), tiles.filter((_, at) => PARTS[at].side === side));
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
      row("encoder"), row("decoder"),
      el("p", { class: "note" }, "Of each level one channel is shown: the one that varies most."),
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
      if (mine === turn && partsOf !== network.version) await partMaps();
    }

    function controls(edits) {
      const point = network.point[now.point];
      tiles.forEach((tile, at) => {
        tile.setAttribute("aria-pressed", String(PARTS[at].has.test(now.point)));
        tile.classList.toggle("edited", Object.keys(edits).some((name) => PARTS[at].has.test(name)));
      });
      const points = pointsOf(PARTS.find(({ has }) => has.test(now.point)));
      where.querySelector("select").replaceChildren(...points.map(({ name }) => el("option", { value: name }, name)));
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

    async function partMaps() {
      partsOf = network.version;
      await Promise.all(PARTS.map(async (part, at) => {
        const point = standsFor(part), rgb = point.name === "decoder.conv_out", known = live[point.name];
        const some = rgb ? [0, 1, 2] : known === undefined ? Array.from({ length: point.channels }, (_, c) => c) : [known];
        const { values, width, height } = await network.planes(point.name, some, 32), area = width * height;
        const canvas = tiles[at].querySelector("canvas");
        tiles[at].querySelector("small").textContent = `${point.channels} × ${point.height}²`;
        if (rgb) return drawPhoto(canvas, values, width, height);
        const map = (n) => values.subarray(n * area, (n + 1) * area);
        const most = some.reduce((best, _, n) => (variation(map(n)) > variation(map(best)) ? n : best), 0);
        live[point.name] = some[most];
        drawGrey(canvas, map(most), width, height);
      }));
    }

    async function pointMaps() {
      const point = network.point[now.point], all = Array.from({ length: point.channels }, (_, c) => c);
      grid.fill(await network.planes(point.name, all, 32));
      grid.choose(now.channel);
      grid.mark(Object.keys(valid()[point.name] ?? {}).map(Number));
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

    photo.addEventListener("change", () => {
      baseline = null;
      live = {};
    });
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

function variation(values) {
  let sum = 0, squares = 0;
  for (const x of values) { sum += x; squares += x * x; }
  return squares / values.length - (sum / values.length) ** 2;
}

function lines(edits, { i, j }) {
  const { definitions, managers, scaling } = inPython(edits);
  return `${definitions}with torch.no_grad()${managers}:
    latents = vae.encode(photo).latent_dist.mode()
${scaling}    decoded = vae.decode(latents).sample
print(decoded[0, :, ${i}, ${j}].tolist())`;
}
