// The network's layers: its parts as a strip of small maps, and the layers of a part as options.

import { PARTS } from "../core/network.js";
import { drawGrey, drawPhoto } from "./canvas.js";
import { el } from "./dom.js";

export const partOf = (name) => PARTS.find(({ has }) => has.test(name));
export const pointsOf = (network, part) => network.points.filter(({ name }) => part.has.test(name));

// The point whose map stands for a part: its last one, and of the latents' part the latents.
const outputOf = (network, part) => network.point[part.label] ?? pointsOf(network, part).at(-1);

const ROLES = [
  [/\.conv1$/, "a block’s first convolution"],
  [/resnets\.\d$/, "a block’s output"],
  [/downsamplers/, "stride 2"],
  [/upsamplers/, "upsampling and a convolution"],
];
export const options = (points) => points.map(({ name, channels, height }) => {
  const role = ROLES.find(([has]) => has.test(name));
  return el("option", { value: name }, `${name} · ${role ? `${role[1]}, ` : ""}${channels} × ${height}²`);
});

// Of each point, the channel that varies most with this photo.
let varied = { photo: null, channels: {} };

// One button for each part of the network. `onpick` is given what it shows: the name of the point that
// stands for it, and a channel.
export function strip(network, onpick) {
  const pick = (part) => {
    const { name } = outputOf(network, part);
    onpick(name, varied.channels[name] ?? 0);
  };
  const tiles = PARTS.map((part) => el("button", { type: "button", class: "part", onclick: () => pick(part) },
    el("canvas", { "aria-hidden": "true" }), el("b", {}, part.label), el("small")));
  const row = (side) => el("div", { class: "parts", role: "group", "aria-label": side },
    el("span", { class: "side" }, side), tiles.filter((_, at) => PARTS[at].side === side));
  const node = el("div", { class: "strip" }, row("encoder"), row("decoder"));

  node.set = (name, edits = {}) => tiles.forEach((tile, at) => {
    tile.setAttribute("aria-pressed", String(PARTS[at].has.test(name)));
    tile.classList.toggle("edited", Object.keys(edits).some((one) => PARTS[at].has.test(one)));
  });

  let drawn = 0;
  node.draw = async () => {
    if (drawn === network.version) return;
    drawn = network.version;
    if (varied.photo !== network.announced.photo) varied = { photo: network.announced.photo, channels: {} };
    await Promise.all(PARTS.map((part, at) => drawPart(tiles[at], outputOf(network, part))));
  };

  async function drawPart(tile, { name, channels, height: side }) {
    const canvas = tile.querySelector("canvas");
    tile.querySelector("small").textContent = `${channels} × ${side}²`;
    const known = varied.channels[name], rgb = name === "decoder.conv_out";
    const planes = await (known === undefined ? network.allPlanes(name, 32) : network.planes(name, [known], 32));
    const { values, width, height } = planes;
    if (rgb) return drawPhoto(canvas, values, width, height);
    const area = width * height, channel = (c) => values.subarray(c * area, (c + 1) * area);
    const variances = Array.from({ length: planes.channels }, (_, c) => variance(channel(c)));
    const most = variances.indexOf(Math.max(...variances));
    varied.channels[name] ??= most;
    drawGrey(canvas, channel(most), width, height);
  }
  return node;
}

function variance(values) {
  let sum = 0, squares = 0;
  for (const x of values) { sum += x; squares += x * x; }
  return squares / values.length - (sum / values.length) ** 2;
}
