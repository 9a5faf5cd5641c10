// The convolutions of the block in view, and their learned kernels.
"use strict";

let layer = null; // the number of the convolution whose kernels are in view

const KERNEL_SIDE = 280; // pixels of a figure's longer side

const layersNow = () => kernels.map((_, at) => at).filter((at) => kernels[at].block === maps[state.map].block);

function showLayers() {
  const own = layersNow();
  $("layers").hidden = !own.length;
  if (!own.length) return;
  const named = own.find((at) => kernels[at].name === maps[state.map].name);
  if (named !== undefined) layer = named;
  else if (!own.includes(layer)) layer = own[0];
  const columns = [...new Set(own.flatMap((at) => kernels[at].facts.map(([term]) => term)))];
  const block = blocks[maps[state.map].block].name;
  $("layers-head").replaceChildren(...["layer", ...columns].map((words) => make("th", { scope: "col" }, words)));
  $("layers-body").replaceChildren(...own.map((at) => {
    const facts = new Map(kernels[at].facts);
    const inside = kernels[at].name.slice(block.length).replace(/^[.:]/, "");
    const name = kernels[at].name.startsWith(block) && inside ? inside : kernels[at].name;
    const pick = make("button", {
      type: "button", "aria-pressed": at === layer, title: `show the kernels of ${kernels[at].name}`,
      onclick: () => { layer = at; $("kernels").open = true; showLayers(); },
    }, name);
    return make("tr", {}, make("th", { scope: "row" }, pick),
      ...columns.map((term) => make("td", { "data-term": term }, facts.get(term) ?? "")));
  }));
  $("kernels-name").textContent = kernels[layer].name.slice(block.length).replace(/^[.:]/, "") || kernels[layer].name;
  if ($("kernels").open) showKernels();
}

const kernelData = cached(12, async (at) => {
  const raw = JSON.parse(stored(`kernels-${at}`));
  return { ...raw, norms: await greyOf(raw.norms) };
});

async function showKernels() {
  const mine = layer;
  const data = await kernelData(layer);
  if (mine !== layer) return;
  const [outs, ins, rows, columns] = data.shape;
  const figures = [];
  const canvasOf = (words) => make("canvas", { role: "img", "aria-label": words });
  const figure = (title, words, canvas, scale, stretched = false) => {
    // a matrix has no aspect of its own; small images keep theirs
    const aspect = stretched ? 1 : canvas.width / canvas.height;
    const side = Math.max(canvas.width, canvas.height) < 12 ? KERNEL_SIDE / 2 : KERNEL_SIDE;
    canvas.style.width = `${side * Math.min(1, aspect)}px`;
    canvas.style.aspectRatio = aspect;
    const bar = make("p", { class: "scale" });
    if (scale) showScale(bar, scale);
    figures.push(make("figure", {},
      make("figcaption", {}, make("b", {}, title), make("span", {}, words)), canvas, bar));
  };
  if (data.colours) {
    const canvas = canvasOf(`${data.coloursCount} kernels as colours`);
    drawTiles(canvas, data.coloursCount, rows, columns, colouredAt(bytesOf(data.colours), rows * columns));
    figure("Kernels as colours", `one for each ${data.coloursOf} channel; grey is zero`, canvas, null);
  }
  if (rows * columns > 1) {
    const bytes = bytesOf(data.slices);
    const canvas = canvasOf("Slices of the kernels");
    const diverging = COLORMAPS.diverging;
    // the longer axis lies across
    const wide = data.outs.length > data.ins.length;
    const [down, across] = wide ? [data.ins, data.outs] : [data.outs, data.ins];
    drawTiles(canvas, down.length * across.length, rows, columns, (tile, pixel) => {
      const [y, x] = [Math.floor(tile / across.length), tile % across.length];
      const at = wide ? x * down.length + y : tile;
      return diverging[bytes[at * rows * columns + pixel]];
    }, across.length);
    canvas.onpointermove = (event) => {
      const at = (offset, side, channels) =>
        channels[Math.min(channels.length - 1, Math.floor((offset / side) * channels.length))];
      const y = at(event.offsetY, canvas.clientHeight, down);
      const x = at(event.offsetX, canvas.clientWidth, across);
      canvas.title = `output channel ${wide ? x : y}, input channel ${wide ? y : x}`;
    };
    const words = wide ? ["input", "output"] : ["output", "input"];
    figure("Slices", `${down.length} ${words[0]} × ${across.length} ${words[1]} channels with the largest norms`,
      canvas, { name: "diverging", low: -data.slicesTop, high: data.slicesTop });
  }
  const norms = canvasOf("Norms of the kernels");
  const scale = { name: "viridis", low: 0, high: data.normTop };
  paint(norms, valuesOf(data.norms, 0, data.normTop), scale);
  const [high, wide] = data.normsSize;
  const averaged = high < outs || wide < ins ? `, averaged to ${high} × ${wide}` : "";
  figure(rows * columns > 1 ? "Norms" : "Absolute weights", `${outs} output × ${ins} input channels${averaged}`, norms, scale, true);
  if (rows * columns > 1) {
    const canvas = canvasOf("Mean absolute weight by position");
    const values = Float32Array.from(data.profile.flat());
    const positions = { name: "viridis", low: 0, high: Math.max(...values) };
    paint(canvas, { values, width: columns, height: rows }, positions);
    figure("By position", "mean absolute weight", canvas, positions);
  }
  $("kernel-figures").replaceChildren(...figures);
  $("kernels").dataset.shown = kernels[layer].name;
}

/** The colour of a pixel in kernels stored as bytes, three for each pixel. */
const colouredAt = (bytes, pixels) => (tile, pixel) =>
  [0, 1, 2].map((part) => bytes[3 * (tile * pixels + pixel) + part]);

/** Draws small tiles in rows, with a gap of a pixel between them. */
function drawTiles(canvas, count, height, width, colour, across = Math.ceil(Math.sqrt(count * 1.4))) {
  canvas.width = across * (width + 1) - 1;
  canvas.height = Math.ceil(count / across) * (height + 1) - 1;
  const image = new ImageData(canvas.width, canvas.height);
  for (let tile = 0; tile < count; tile++) {
    const left = (tile % across) * (width + 1);
    const top = Math.floor(tile / across) * (height + 1);
    for (let pixel = 0; pixel < width * height; pixel++) {
      const at = (top + Math.floor(pixel / width)) * canvas.width + left + (pixel % width);
      image.data.set([...colour(tile, pixel), 255], 4 * at);
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

$("kernels").addEventListener("toggle", () => $("kernels").open && showKernels());
