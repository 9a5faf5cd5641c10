// The subject itself, in plain loops: what the fast kernels compute, and the arithmetic of sizes.
// Functions have the names and the results of sdconv.convolution.

export function convolve(a, b) {
  return Array.from({ length: a.length + b.length - 1 }, (_, n) => meetings(a, b, n)
    .reduce((sum, { product }) => sum + product, 0));
}

// The pairs that meet at position n of the answer, in the order of the first list.
export function meetings(a, b, n) {
  const pairs = [];
  for (let m = Math.max(0, n - b.length + 1); m < Math.min(n + 1, a.length); m++)
    pairs.push({ m, other: n - m, product: a[m] * b[n - m] });
  return pairs;
}

export function outputSize(size, kernel, stride = 1, [before, after] = [0, 0]) {
  return Math.floor((size + before + after - kernel) / stride) + 1;
}

export function samePadding(size, kernel, stride) {
  const outputs = Math.ceil(size / stride);
  const total = Math.max((outputs - 1) * stride + kernel - size, 0);
  return [Math.floor(total / 2), total - Math.floor(total / 2)];
}

// A picture of one channel through one kernel; rows and columns beyond it count as 0.
export function conv2d({ values, height, width }, kernel, { stride = 1, padding = [0, 0, 0, 0] } = {}) {
  const size = Math.sqrt(kernel.length), [top, bottom, left, right] = padding;
  const rows = outputSize(height, size, stride, [top, bottom]);
  const columns = outputSize(width, size, stride, [left, right]);
  const out = new Float32Array(rows * columns);
  for (let i = 0; i < rows; i++)
    for (let j = 0; j < columns; j++) {
      let sum = 0;
      for (let u = 0; u < size; u++)
        for (let v = 0; v < size; v++) {
          const r = i * stride + u - top, c = j * stride + v - left;
          if (r >= 0 && r < height && c >= 0 && c < width) sum += values[r * width + c] * kernel[u * size + v];
        }
      out[i * columns + j] = sum;
    }
  return { values: out, height: rows, width: columns };
}

// Each value as a square of 2 × 2.
export function upsampleNearest({ values, height, width }) {
  const out = new Float32Array(4 * values.length);
  for (let at = 0; at < out.length; at++)
    out[at] = values[Math.floor(at / (4 * width)) * width + Math.floor(at % (2 * width) / 2)];
  return { values: out, height: 2 * height, width: 2 * width };
}

// Each value puts down a copy of the kernel, multiplied by the value, `stride` pixels from the last one.
export function convTranspose2d({ values, height, width }, kernel, stride) {
  const size = Math.sqrt(kernel.length);
  const rows = (height - 1) * stride + size, columns = (width - 1) * stride + size;
  const out = new Float32Array(rows * columns);
  for (let i = 0; i < height; i++)
    for (let j = 0; j < width; j++)
      for (let u = 0; u < size; u++)
        for (let v = 0; v < size; v++)
          out[(i * stride + u) * columns + j * stride + v] += values[i * width + j] * kernel[u * size + v];
  return { values: out, height: rows, width: columns };
}

// The input pixels from `first` to `last` that the value at `index` depends on.
// `chain` is a list of layers from input to output: {kernel, stride, before} or {up: 2}.
export function receptiveSpan(chain, index) {
  let first = index, last = index;
  for (const { kernel, stride = 1, before = 0, up = 0 } of chain.toReversed()) {
    if (up) [first, last] = [Math.floor(first / up), Math.floor(last / up)];
    else [first, last] = [first * stride - before, last * stride - before + kernel - 1];
  }
  return [first, last];
}

export const silu = (z) => z / (1 + Math.exp(-z));
