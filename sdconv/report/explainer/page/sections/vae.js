// The whole network: level by level, and with single channels changed.

import { drawGrey, drawPhoto, picker, thumbnails } from "../ui/canvas.js";
import { button, choice, el, python, select, short, slider, toggle } from "../ui/dom.js";
import { inPython, parsed, written } from "../ui/edits.js";
import { state } from "../ui/state.js";

// The stations of the strip: where they stand, what they are called, how their points begin.
const STATIONS = [
  ["encoder", "in", "encoder.conv_in"],
  ...[0, 1, 2, 3].map((n) => ["encoder", `level ${n}`, `encoder.down_blocks.${n}.`]),
  ["encoder", "middle", "encoder.mid_block."],
  ["encoder", "out", "encoder.conv_out"],
  ["encoder", "latents", "latents"],
  ["decoder", "in", "decoder.conv_in"],
  ["decoder", "middle", "decoder.mid_block."],
  ...[0, 1, 2, 3].map((n) => ["decoder", `level ${n}`, `decoder.up_blocks.${n}.`]),
  ["decoder", "out", "decoder.conv_out"],
];

export const vae = {
  id: "vae",
  title: "The whole network",
  lead: `<p>Here are all of its layers. The <b>encoder</b> turns the photo into <b>latents</b>: four maps of 32 × 32 numbers, a 48th of the photo’s. The <b>decoder</b> makes a picture of them. Choose a station, then one of its channels, and turn it up, down or off: everything behind it is computed again.</p>`,

  build({ root, section, vae: network, photo, follow }) {
    let baseline = null, decoded = null, live = {}, stationsOf = 0;
    const { values: now, set } = state("vae", {
      point: "decoder.mid_block.resnets.1", channel: 0, edits: "", i: 128, j: 128, compare: false,
    }, (change) => render(change), (v) => v.channel >= 0 && v.channel < 64 && v.i >= 0 && v.i < 256 && v.j >= 0 && v.j < 256);

    const stations = STATIONS.map(([, label, prefix]) => el("button", { type: "button", class: "station",
      onclick: () => set({ point: of(prefix).at(-1).name, channel: 0 }) }, el("canvas", { "aria-hidden": "true" }), el("b", {}, label), el("small")));
    const row = (side) => el("div", { class: "stations", role: "group", "aria-label": side },
      el("span", { class: "side" }, side), stations.filter((_, at) => STATIONS[at][0] === side));
    const before = el("canvas", { width: 256, height: 256, role: "img", "aria-label": "The photo" });
    const after = picker({ label: "The decoded picture", width: 256, height: 256, onpick: (i, j) => set({ i, j }) });
    const changed = el("p", { class: "note", role: "status" });
    const compare = toggle({ label: "without my changes", value: now.compare, onchange: (on) => set({ compare: on }) });
    const where = select({ label: "Point", options: [["", ""]], value: "", onchange: (point) => set({ point, channel: 0 }) });
    const grid = thumbnails({ label: "Channels", onpick: (channel) => set({ channel }) });
    const big = el("canvas", { width: 32, height: 32, role: "img" });
    const factor = slider({ label: "times", min: -2, max: 4, step: 0.25, value: 1, words: (x) => short(x), oninput: (x) => change(x) });
    const quick = choice({ label: "This channel", value: "1", onchange: (x) => change(Number(x)),
      options: [["1", "as it is"], ["0", "silent"], ["3", "× 3"], ["-1", "× −1"]] });
    const list = el("ul", { class: "edits" });
    const clear = button("Undo all changes", () => set({ edits: "" }), { class: "quiet" });
    const about = el("p", { class: "note" });
    const code = python();
    root.append(
      row("encoder"), row("decoder"),
      el("div", { class: "split" },
        el("div", { class: "panel" }, el("div", { class: "controls" }, where), grid),
        el("div", { class: "panel" }, el("div", { class: "one" }, big, el("div", {}, about, quick, factor)), list, clear,
          el("div", { class: "pair" }, el("figure", {}, before, el("figcaption", {}, "photo")),
            el("figure", {}, after, el("figcaption", {}, "decoded"))), changed, compare)),
      code, el("p", { class: "controls" }, photo.controls()));

    const of = (prefix) => network.points.filter(({ name }) => name.startsWith(prefix));

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
      if (JSON.stringify(edits) !== JSON.stringify(network.wanted.edits)) network.compute({ edits });
      else if (!("edits" in changes)) show();
    }

    let turn = 0;
    async function show() {
      const mine = ++turn, { edits } = network.announced;
      decoded = (await network.planes("decoder.conv_out", [0, 1, 2])).values;
      if (!Object.keys(edits).length) baseline = decoded;
      result(edits);
      if (mine === turn) await pointMaps();
      if (mine === turn && stationsOf !== network.version) await stationMaps();
    }

    function controls(edits) {
      const point = network.point[now.point];
      const station = STATIONS.findIndex(([, , prefix]) => now.point.startsWith(prefix));
      stations.forEach((one, at) => {
        one.setAttribute("aria-pressed", String(at === station));
        one.classList.toggle("edited", Object.keys(edits).some((name) => name.startsWith(STATIONS[at][2])));
      });
      const points = of(STATIONS[Math.max(0, station)][2]);
      where.querySelector("select").replaceChildren(...points.map(({ name }) => el("option", { value: name }, name)));
      where.set(now.point);
      const x = edits[now.point]?.[now.channel] ?? 1;
      factor.set(x);
      quick.set(x);
      about.textContent = `channel ${now.channel} of ${point.channels}, ${point.height} × ${point.width} values`;
      list.replaceChildren(...Object.entries(edits).flatMap(([name, factors]) => Object.entries(factors).map(([channel, times]) =>
        el("li", {}, el("button", { type: "button", class: "chip", onclick: () => set({ point: name, channel: Number(channel) }) }, `${name}, channel ${channel}: × ${short(times)}`),
          button("×", () => { const all = parsed(now.edits); delete all[name][channel]; set({ edits: written(all) }); }, { "aria-label": `undo channel ${channel} of ${name}`, class: "chip" })))));
      clear.hidden = !Object.keys(edits).length;
      compare.hidden = clear.hidden;
      compare.set(now.compare);
      after.set(now.i, now.j, 256, 256, `row ${now.i}, column ${now.j}`, 3);
    }

    async function stationMaps() {
      stationsOf = network.version;
      await Promise.all(STATIONS.map(async ([, , prefix], at) => {
        const point = of(prefix).at(-1), all = Array.from({ length: point.channels }, (_, c) => c);
        const map = await network.planes(point.name, all, 32), area = map.width * map.height;
        stations[at].querySelector("small").textContent = `${point.channels} × ${point.height}²`;
        const canvas = stations[at].querySelector("canvas");
        if (point.name === "decoder.conv_out") return drawPhoto(canvas, map.values, map.width, map.height);
        // the channel that varies most stands for the others
        live[point.name] ??= all.map((c) => [variation(map.values.subarray(c * area, (c + 1) * area)), c])
          .reduce((a, b) => (b[0] > a[0] ? b : a))[1];
        const c = live[point.name];
        drawGrey(canvas, map.values.subarray(c * area, (c + 1) * area), map.width, map.height);
      }));
    }

    async function pointMaps() {
      const point = network.point[now.point], all = Array.from({ length: point.channels }, (_, c) => c);
      grid.fill(await network.planes(point.name, all, 32));
      grid.choose(now.channel);
      grid.mark(Object.keys(valid()[point.name] ?? {}).map(Number));
      const { values, width, height } = await network.planes(point.name, [now.channel]);
      drawGrey(big, values, width, height);
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
    });
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
