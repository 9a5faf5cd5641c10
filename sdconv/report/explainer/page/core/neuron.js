// One value of a feature map, taken apart: the numbers under the kernel, the weights, the rest.
// Of attention, it is the last linear layer, which reads averages over all positions.

import { zerosBefore } from "./network.js";
import { floats } from "./weights.js";

// Null where the value's row belongs to another worker.
export function neuron(band, name, channel, i, j) {
  const y = band.maps.get(name), { input, weight, norm = null, stride = 1, up = false, mixed = null } = y.from;
  const add = mixed ? input : y.from.add;
  const row = i - band.rank * y.rows;
  if (row < 0 || row >= y.rows) return null;
  const x = band.maps.get(input), tensor = band.tensors[`${weight}.weight`];
  const [, count, size = 1] = tensor.shape, area = size * size;
  const edge = zerosBefore(size, stride);
  const affine = norm ? band.affine(x, norm) : null;
  const inputs = new Float32Array(count * area), outside = [];
  const height = x.rows * (up ? 2 : 1), width = x.width * (up ? 2 : 1);
  for (let u = 0; u < size; u++)
    for (let v = 0; v < size; v++) {
      const r = row * stride + u - edge, c = j * stride + v - edge;
      const beyond = c < 0 || c >= width || (r < 0 && band.rank === 0)
        || (r >= height && band.rank === band.ranks - 1);
      outside.push(beyond);
      if (beyond) continue;
      const pixel = mixed ? mixed.subarray((r * x.width + c) * x.channels)
        : up ? band.values(x, Math.floor(r / 2), Math.floor(c / 2)) : band.values(x, r, c);
      for (let k = 0; k < count; k++) {
        const z = affine ? pixel[k] * affine.scale[k] + affine.shift[k] : pixel[k];
        inputs[k * area + u * size + v] = affine ? z / (1 + Math.exp(-z)) : z;
      }
    }
  const weights = floats(tensor).slice(channel * count * area, (channel + 1) * count * area);
  return {
    inputs, weights, outside, count, size,
    bias: floats(band.tensors[`${weight}.bias`])[channel],
    shortcut: add ? band.values(band.maps.get(add), row, j)[channel] : null,
    value: band.values(y, row, j)[channel],
  };
}
