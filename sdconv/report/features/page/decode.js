// Decodes the page's data blocks when they are needed.
"use strict";

const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const webpOf = (text) => new Blob([bytesOf(text)], { type: "image/webp" });
const floatsOf = (text) => new Float32Array(bytesOf(text).buffer);

/** Grey values of an image, row by row. */
async function greyOf(text) {
  const bitmap = await createImageBitmap(webpOf(text), { colorSpaceConversion: "none" });
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(bitmap, 0, 0);
  const { data } = pen.getImageData(0, 0, bitmap.width, bitmap.height);
  const values = new Uint8Array(data.length / 4);
  for (let i = 0; i < values.length; i++) values[i] = data[4 * i];
  return { values, width: bitmap.width, height: bitmap.height };
}

/** An 8-bit bitmap as a URL for a stylesheet: the colormap is the palette in its header. */
function bitmapUrl({ values, width, height }, colormap) {
  const row = (width + 3) & ~3;
  const head = new DataView(new ArrayBuffer(54 + 1024));
  head.setUint16(0, 0x424d);
  head.setUint32(2, 1078 + row * height, true);
  head.setUint32(10, 1078, true);
  head.setUint32(14, 40, true);
  head.setInt32(18, width, true);
  head.setInt32(22, -height, true); // rows from the top
  head.setUint16(26, 1, true);
  head.setUint16(28, 8, true);
  head.setUint32(34, row * height, true);
  head.setUint32(46, 256, true);
  colormap.forEach(([red, green, blue], at) =>
    [blue, green, red].forEach((part, i) => head.setUint8(54 + 4 * at + i, part)));
  let pixels = values;
  if (row !== width) {
    pixels = new Uint8Array(row * height);
    for (let y = 0; y < height; y++) {
      pixels.set(values.subarray(y * width, (y + 1) * width), y * row);
    }
  }
  return URL.createObjectURL(new Blob([head.buffer, pixels], { type: "image/bmp" }));
}

/** One tile of a sheet of grey tiles. */
function tileOf(sheet, columns, width, height, at) {
  const left = (at % columns) * width;
  const top = Math.floor(at / columns) * height;
  const values = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    const start = (top + y) * sheet.width + left;
    values.set(sheet.values.subarray(start, start + width), y * width);
  }
  return { values, width, height };
}

/** Caches the last few results of `make`, and releases the others. */
function cached(size, make, release = () => {}) {
  const kept = new Map();
  return (key) => {
    const value = kept.get(key) ?? make(key);
    kept.delete(key);
    kept.set(key, value);
    if (kept.size > size) {
      const [oldest, gone] = kept.entries().next().value;
      kept.delete(oldest);
      release(gone);
    }
    return value;
  };
}

const stored = (id) => document.getElementById(id).textContent;

/** The data of one snapshot: sheets decoded, and each channel's numbers. */
const snapshotData = cached(16, async (id) => {
  const raw = JSON.parse(stored(id));
  const [sheet, planes, pca] = await Promise.all([
    greyOf(raw.sheet), greyOf(raw.planes), createImageBitmap(webpOf(raw.pca)),
  ]);
  const numbers = floatsOf(raw.numbers);
  const count = numbers.length / 6;
  const part = (at) => numbers.subarray(at * count, (at + 1) * count);
  return {
    ...raw, sheet, planes, pca, count,
    mean: part(0), variance: part(1), low: part(2), high: part(3), min: part(4), max: part(5),
  };
});

/** The value of a half-precision number. */
function halfOf(bits) {
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  const size = exponent === 31 ? (fraction ? NaN : Infinity)
    : exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction;
  return bits & 32768 ? -size : size;
}

/** Numbers of `size` bytes, of which all first bytes come first, then all second ones, and so on. */
function numbersOf(bytes, size) {
  const count = bytes.length / size;
  const together = new Uint8Array(bytes.length);
  bytes.forEach((byte, i) => { together[(i % count) * size + Math.floor(i / count)] = byte; });
  if (size === 4) return new Float32Array(together.buffer);
  return Float32Array.from(new Uint16Array(together.buffer), halfOf);
}

const FLOAT32 = "float32:"; // the beginning of values that are too large for float16

/** The exact values of a channel and their dtype, or null if the page does not have them. */
const exactValues = cached(24, async (key) => {
  const [id, channel] = key.split("/");
  const text = JSON.parse(stored(id.replace("snapshot", "exact")))[channel];
  if (text === undefined) return null;
  const wide = text.startsWith(FLOAT32);
  const stream = new Blob([bytesOf(text.slice(wide ? FLOAT32.length : 0))]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  return { values: numbersOf(bytes, wide ? 4 : 2), dtype: wide ? "float32" : "float16" };
});
