// A safetensors file: eight bytes of length, a JSON header, then the tensors' bytes.

export function readSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const tensors = {};
  delete header.__metadata__;
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    if (dtype !== "F16") throw new Error(`${name} is ${dtype}, not F16`);
    tensors[name] = { shape, bits: new Uint16Array(buffer.slice(8 + length + from, 8 + length + to)) };
  }
  return tensors;
}

// float16: one bit of sign, five of exponent, ten of fraction
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => half(bits));

// The tensor's numbers; a float16 is a float32 without loss.
export function floats(tensor) {
  return Float32Array.from(tensor.bits, (bits) => HALVES[bits]);
}

export const up8 = (channels) => (channels + 7) & ~7;

// A convolution's weight (kernels, channels, rows, columns) as one matrix per position of the
// kernel, (channels, kernels), both rounded up to multiples of 8 with zeros.
export function matrices(tensor) {
  const [kernels, channels, size = 1] = tensor.shape;
  const values = floats(tensor), k = up8(channels), n = up8(kernels), area = size * size;
  const out = new Float32Array(area * k * n);
  for (let kernel = 0; kernel < kernels; kernel++)
    for (let channel = 0; channel < channels; channel++)
      for (let p = 0; p < area; p++)
        out[(p * k + channel) * n + kernel] = values[(kernel * channels + channel) * area + p];
  return { values: out, k, n, size };
}

// The same convolution read backwards, from its outputs to its inputs: for gradients.
export function transposed({ values, k, n, size }) {
  const out = new Float32Array(values.length), area = size * size;
  for (let p = 0; p < area; p++)
    for (let channel = 0; channel < k; channel++)
      for (let kernel = 0; kernel < n; kernel++)
        out[((area - 1 - p) * n + kernel) * k + channel] = values[(p * k + channel) * n + kernel];
  return { values: out, k: n, n: k, size };
}

// The interpolation points of Winograd's F(4x4, 3x3); the sixth is infinity.
const POINTS = [0, 3 / 4, -3 / 4, 3 / 2, -3 / 2];

// Three weights to six: each row has a point's powers, over the product of its differences from the
// other points.
const SIX = [...POINTS.map((p) => {
  const scale = POINTS.reduce((product, other) => (other === p ? product : product * (p - other)), 1);
  return [1 / scale, p / scale, p * p / scale];
}), [0, 0, 1]];

// Nine matrices to the thirty-six of Winograd's F(4x4, 3x3): G w G^T.
export function winograd({ values, k, n }) {
  const out = new Float32Array(36 * k * n), plane = k * n;
  for (let r = 0; r < 6; r++)
    for (let c = 0; c < 6; c++) {
      const by = Array.from({ length: 9 }, (_, p) => SIX[r][Math.floor(p / 3)] * SIX[c][p % 3]);
      for (let at = 0; at < plane; at++) {
        let sum = 0;
        for (let p = 0; p < 9; p++) sum += by[p] * values[p * plane + at];
        out[(6 * r + c) * plane + at] = sum;
      }
    }
  return { values: out, k, n, size: 6 };
}
