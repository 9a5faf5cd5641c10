// Colormaps, the values of their colours, and images painted with them.
"use strict";

// matplotlib's viridis as polynomials of the grey value, by Matt Zucker (CC0)
const VIRIDIS = [
  [0.2777273272, 0.1050930431, -0.3308618287, -4.6342304990, 6.2282699093, 4.7763849986, -5.4354558559],
  [0.0054073445, 1.4046135299, 0.2148475595, -5.7991009735, 14.1799333668, -13.7451453777, 4.6458526122],
  [0.3340998053, 1.3845901628, 0.0950951630, -19.3324409563, 56.6905526007, -65.3530326334, 26.3124352496],
];
const table = (colour) => Array.from({ length: 256 }, (_, grey) => colour(grey / 255));
const polynomial = (factors, x) => factors.reduceRight((sum, factor) => sum * x + factor, 0);
// ColorBrewer's RdBu, from blue to red
const RD_BU = ["053061", "2166ac", "4393c3", "92c5de", "d1e5f0", "f7f7f7", "fddbc7", "f4a582", "d6604d", "b2182b", "67001f"]
  .map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
function between(colours, x) {
  const at = Math.min(colours.length - 2, Math.floor(x * (colours.length - 1)));
  const share = x * (colours.length - 1) - at;
  return colours[at].map((part, i) => Math.round(part + share * (colours[at + 1][i] - part)));
}
const COLORMAPS = {
  grey: table((x) => [x, x, x].map((part) => Math.round(255 * part))),
  viridis: table((x) =>
    VIRIDIS.map((part) => Math.round(255 * Math.min(1, Math.max(0, polynomial(part, x)))))),
  diverging: table((x) => between(RD_BU, x)),
};
const CHOICES = { auto: "auto", diverging: "diverging", viridis: "viridis", grey: "grey" };

/** Whether zero lies well inside a range, so that it is a value to see. */
const isSigned = (low, high) => Math.min(-low, high) > 0.05 * Math.max(-low, high);

/**
 * The colours of values from `low` to `high`: `auto` takes diverging colours with zero in the middle
 * for signed values. `min` and `max` are the ends of all values, which may be clipped.
 */
function scaleOf({ low, high, min = low, max = high, signed = isSigned(low, high) }) {
  const name = state.colormap === "auto" ? (signed ? "diverging" : "viridis") : state.colormap;
  if (name === "diverging") {
    const most = Math.max(Math.abs(low), Math.abs(high)) || 1;
    [low, high] = [-most, most];
  }
  // ranges are rounded for the page
  const slack = 1e-3 * (high - low);
  return { name, low, high, below: min < low - slack, above: max > high + slack, min, max };
}

const shareOf = (value, { low, high }) =>
  (high > low ? Math.min(1, Math.max(0, (value - low) / (high - low))) : 0.5);

/** For bytes that stand for values from `low` to `high`: their colours' numbers in a scale. */
const shades = (low, high, scale) => Uint8Array.from({ length: 256 }, (_, grey) =>
  Math.round(255 * shareOf(low + ((high - low) * grey) / 255, scale)));

/** Draws values on a canvas; NaN stays transparent. */
function paint(canvas, { values, width, height }, scale) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  const colours = COLORMAPS[scale.name];
  values.forEach((value, i) => {
    if (Number.isNaN(value)) return;
    image.data.set(colours[Math.round(255 * shareOf(value, scale))], 4 * i);
    image.data[4 * i + 3] = 255;
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** The values that a tile's bytes stand for. */
function valuesOf(tile, low, high) {
  return { ...tile, values: Float32Array.from(tile.values, (grey) => low + ((high - low) * grey) / 255) };
}

/** A colour bar, with pointed ends where values are clipped. */
function showScale(element, scale) {
  const { name, low, high, below, above, min, max } = scale;
  const stops = [0, 32, 64, 96, 128, 159, 191, 223, 255].map((grey) => `rgb(${COLORMAPS[name][grey]})`);
  const bar = make("i", { class: `${below ? "below" : ""} ${above ? "above" : ""}` });
  bar.style.background = `linear-gradient(90deg, ${stops})`;
  element.replaceChildren(
    make("span", {}, `${below ? "≤ " : ""}${number(low)}`), bar,
    make("span", {}, `${above ? "≥ " : ""}${number(high)}`));
  const clipped = below || above;
  element.title = clipped ? `clipped: the values go from ${number(min)} to ${number(max)}` : "nothing is clipped";
  element.classList.toggle("clipped", clipped);
}
