// Where one looks: a layer of the VAE, a channel of its map, and a value in it. The sections on the
// neuron and on the receptive field share it.

import { PARTS } from "../core/network.js";
import { drawGrey, percentiles, picker, shades, thumbnails } from "./canvas.js";
import { el, select } from "./dom.js";
import { options, pointsOf, strip } from "./layers.js";
import { short } from "./numbers.js";
import { state } from "./state.js";

const listeners = new Set();
let shared = null;

// {values: {layer, channel, i, j}, set}; `listen` is called with every change.
export function look(listen) {
  listeners.add(listen);
  shared ??= state("look", { layer: "encoder.conv_in", channel: 12, i: 36, j: 126 },
    (change) => { for (const one of listeners) one(change); },
    (v) => [v.channel, v.i, v.j].every((x) => Number.isInteger(x) && x >= 0));
  return shared;
}

// The chosen layer, with channel and position moved inside of it.
export function within(network, now) {
  const known = network.point[now.layer];
  if (!known || known.kind === "mean") now.layer = "encoder.conv_in";
  const point = network.point[now.layer];
  now.channel = Math.min(now.channel, point.channels - 1);
  now.i = Math.min(now.i, point.height - 1);
  now.j = Math.min(now.j, point.width - 1);
  return point;
}

// Goes to a layer: to the same place in the picture, in a map of another size.
export function goToLayer(network, layer, channel = shared.values.channel) {
  const { values: now, set } = shared, scale = network.point[layer].height / network.point[now.layer].height;
  const moved = (x) => Math.floor((x + 0.5) * scale);
  set({ layer, channel, i: moved(now.i), j: moved(now.j) });
}

// What a value is chosen with: the network's parts in a strip, and in `node` the layer, the channel
// and the map.
export function chooser(network, set, what) {
  // the latents are some of quant_conv's channels, and only those come out of a sum
  const parts = strip(network, (name, channel) => goToLayer(network, name === "latents" ? "quant_conv" : name, channel));
  const layer = select({ label: "Layer", options: [["", ""]], value: "", onchange: (name) => goToLayer(network, name) });
  const grid = thumbnails({ label: "Channels", onpick: (channel) => set({ channel }) });
  const map = picker({ label: `The feature map: ${what}`, width: 256, height: 256, onpick: (i, j) => set({ i, j }) });
  const caption = el("figcaption");
  let drawn = "", filled = false;
  const draw = async (now) => {
    if (!filled) layer.querySelector("select").replaceChildren(...PARTS.map((part) =>
      el("optgroup", { label: `${part.side}, ${part.label}` }, options(pointsOf(network, part).filter(({ kind }) => kind !== "mean")))));
    filled = true;
    const point = within(network, now), version = network.version;
    layer.set(now.layer);
    parts.set(now.layer, network.announced.edits);
    if (drawn !== `${now.layer} ${version}`) grid.fill(await network.allPlanes(now.layer, 32));
    drawn = `${now.layer} ${version}`;
    grid.choose(now.channel);
    const { values, width, height } = await network.planes(now.layer, [now.channel]);
    const range = percentiles(values);
    drawGrey(map.canvas, values, width, height, range);
    const value = values[now.i * width + now.j];
    map.set(now.i, now.j, height, width, `row ${now.i}, column ${now.j}: ${short(value)}`, height > 100 ? 2 : 0);
    caption.textContent = `channel ${now.channel}: row ${now.i}, column ${now.j} is ${short(value)}. ${shades(range)}`;
    return { point, value, values };
  };
  const node = el("div", { class: "panel" }, layer, el("div", { class: "tall" }, grid), el("figure", {}, map, map.nudges, caption));
  return { node, parts, draw };
}
