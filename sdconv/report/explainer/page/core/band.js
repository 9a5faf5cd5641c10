// One band of rows of every feature map, and the operations of the network on it.
//
// A worker has a Band. All workers run the same program, each over its own rows; after each
// operation they exchange the rows at their edges, which the next 3x3 kernel reaches into, and
// the sums that GroupNorm needs. A map is channels-last with a frame of one pixel around it: zeros
// at the photo's border, the neighbour's row between two bands.

import { softmax } from "./matrix.js";
import { zerosBefore } from "./network.js";
import { floats, matrices, up8, winograd } from "./weights.js";

const GROUPS = 32, EPS = 1e-6, CHUNK = 32;
const SWITCHED = /^decoder\..*(resnets|upsamplers)/; // where parts can be switched off

export class Band {
  constructor({ module, tensors, rank, ranks, exchange }) {
    this.memory = new WebAssembly.Memory({ initial: 64, maximum: 65536 });
    this.kernels = new WebAssembly.Instance(module, { env: { memory: this.memory } }).exports;
    Object.assign(this, { tensors, rank, ranks, exchange });
    this.end = 4096; // the kernels' constants come first
    this.maps = new Map();
    this.packed = new Map();
    this.scratch = new Map();
    this.edits = {};
    this.valid = new Map(); // name -> the conditions under which its map was computed
    this.stale = true;
    this.shift = 0; // -1 is torch's padding 1 where the network was trained with (0, 1, 0, 1)
    this.without = {}; // {norm, silu, shortcut, nearest}: switched off in the decoder's blocks
    this.progress = () => {};
  }

  // --- memory

  allocate(count) {
    const at = this.end;
    this.end += (count * 4 + 63) & ~63;
    const missing = this.end + 65536 - this.memory.buffer.byteLength;
    if (missing > 0) this.memory.grow(Math.ceil(missing / 65536));
    return at;
  }

  view(at, count) {
    return new Float32Array(this.memory.buffer, at, count);
  }

  put(values) {
    const at = this.allocate(values.length);
    this.view(at, values.length).set(values);
    return at;
  }

  // a buffer that operations of the same kind share
  buffer(key, count) {
    const name = `${key} ${count}`;
    if (!this.scratch.has(name)) this.scratch.set(name, this.allocate(count));
    return this.scratch.get(name);
  }

  shape(name, rows, width, channels, real) {
    const pixel = up8(channels) * 4, row = (width + 2) * pixel, size = (rows + 2) * row / 4;
    return { name, rows, width, channels: up8(channels), real, pixel, row, size };
  }

  create(name, rows, width, channels) {
    const old = this.maps.get(name);
    if (old) return old;
    const map = this.shape(name, rows, width, channels, channels);
    map.at = this.allocate(map.size);
    this.maps.set(name, map);
    return map;
  }

  // a shared map of that shape whose frame stays zero
  frame(key, rows, width, channels) {
    const map = this.shape(key, rows, width, channels, channels);
    map.at = this.buffer(`${key} ${rows} ${width}`, map.size);
    return map;
  }

  // address of a pixel; row and column -1 are the frame
  pixel(map, i, j) {
    return map.at + (i + 1) * map.row + (j + 1) * map.pixel;
  }

  values(map, i, j, count = 1) {
    return this.view(this.pixel(map, i, j), count * map.channels);
  }

  // --- weights, packed when first used

  pack(key, make) {
    if (!this.packed.has(key)) {
      const { values, ...rest } = make();
      this.packed.set(key, { ...rest, values, at: this.put(values) });
    }
    return this.packed.get(key);
  }

  matrix(name) {
    return this.pack(`${name}.weight`, () => matrices(this.tensors[`${name}.weight`]));
  }

  vector(name, scale = 1) {
    return this.pack(`${name} ${scale}`, () => {
      const values = new Float32Array(up8(this.tensors[name].shape[0]));
      values.set(floats(this.tensors[name]).map((x) => x * scale));
      return { values };
    });
  }

  // --- operations

  // Sets the photo, of which every worker is given the whole: (rows, columns, channels).
  async input(name, pixels, height, width, channels) {
    const rows = height / this.ranks, map = this.create(name, rows, width, channels);
    for (let i = 0; i < rows; i++)
      for (let j = 0; j < width; j++) {
        const from = ((this.rank * rows + i) * width + j) * channels;
        this.values(map, i, j).set(pixels.subarray(from, from + channels));
      }
    await this.publish(map);
    this.stale = true;
    return map;
  }

  // What an operation depends on besides its input.
  conditions(name) {
    const shift = name.includes("downsamplers") ? this.shift : 0;
    return JSON.stringify([this.edits[name] ?? {}, shift, SWITCHED.test(name) ? this.without : {}]);
  }

  // Whether a point has to be computed: something before it has changed, or its own conditions
  // have. What is begun is valid again when it is finished; a run may be stopped in between.
  due(name) {
    if (this.valid.get(name) !== this.conditions(name)) this.stale = true;
    if (this.stale) this.valid.delete(name);
    return this.stale;
  }

  async conv(name, x, { weight = name, norm = null, stride = 1, up = false, add = null } = {}) {
    if (!this.due(name)) return this.maps.get(name);
    const off = SWITCHED.test(name) ? this.without : {};
    const source = norm ? this.activated(x, norm, { plain: off.silu }) : up ? this.upsampled(x, off.nearest) : x;
    const packed = this.matrix(weight);
    const bias = this.vector(`${weight}.bias`);
    const real = this.tensors[`${weight}.bias`].shape[0];
    const y = this.create(name, source.rows / stride, source.width / stride, real);
    y.from = { input: x.name, weight, norm, stride, up, add: add?.name ?? null };
    this.convolve(source, packed, bias, y, stride, stride === 2 ? this.shift : 0);
    if (add && !off.shortcut) this.plus(y, add);
    return this.finish(y);
  }

  // One convolution from frame to frame. With a stride, `shift` moves the kernel's stops.
  convolve(x, packed, bias, y, stride = 1, shift = 0) {
    if (stride === 1 && packed.size === 3 && packed.k >= 16 && packed.n >= 16)
      return this.winograd(x, packed, bias, y);
    const { gemm } = this.kernels, edge = zerosBefore(packed.size, stride);
    const line = new Float32Array(y.width * y.channels);
    for (let j = 0; j < y.width; j++) line.set(bias.values, j * y.channels);
    for (let i = 0; i < y.rows; i++) {
      this.values(y, i, 0, y.width).set(line);
      for (let u = 0; u < packed.size; u++)
        for (let v = 0; v < packed.size; v++)
          gemm(this.pixel(x, i * stride + u - edge + shift, v - edge + shift),
            packed.at + (u * packed.size + v) * packed.k * packed.n * 4, this.pixel(y, i, 0),
            y.width, packed.k, packed.n, x.pixel * stride, packed.n * 4, y.pixel);
    }
  }

  // Winograd's F(4x4, 3x3): 36 multiplications for 4x4 outputs where the sum has 144.
  winograd(x, packed, bias, y) {
    const { k, n } = packed, { product, winograd_in, winograd_out } = this.kernels;
    const weight = (packed.winograd ??= this.pack(packed, () => winograd(packed)));
    // a position's products, and a gap: at multiples of 4 kB they would share one set of the cache
    const inputs = CHUNK * k + 16, outputs = CHUNK * n + 16;
    const v = this.buffer("v", 36 * inputs), m = this.buffer("m", 36 * outputs);
    for (let i = 0; i < y.rows; i += 4)
      for (let tile = 0; tile < y.width / 4; tile += CHUNK) {
        const count = Math.min(CHUNK, y.width / 4 - tile);
        winograd_in(this.pixel(x, i - 1, 4 * tile - 1), x.row, x.pixel, v, inputs * 4, count, k);
        for (let p = 0; p < 36; p++)
          product(v + p * inputs * 4, weight.at + p * k * n * 4, m + p * outputs * 4,
            count, k, n, k * 4, n * 4, n * 4);
        winograd_out(m, outputs * 4, this.pixel(y, i, 4 * tile), y.row, y.pixel, bias.at, count, n);
      }
  }

  plus(y, x) {
    for (let i = 0; i < y.rows; i++)
      this.kernels.plus(this.pixel(y, i, 0), this.pixel(x, i, 0), y.width * y.channels);
  }

  // GroupNorm as a scale and a shift for each channel, from the sums over all bands.
  affine(x, norm) {
    if (this.without.norm && SWITCHED.test(norm))
      return { scale: new Float32Array(x.channels).fill(1), shift: new Float32Array(x.channels), groups: [], size: 1 };
    const size = x.real / GROUPS, count = x.total * size;
    const weight = this.vector(`${norm}.weight`).values, bias = this.vector(`${norm}.bias`).values;
    const scale = new Float32Array(x.channels), shift = new Float32Array(x.channels);
    const groups = [];
    for (let group = 0; group < GROUPS; group++) {
      let sum = 0, squares = 0;
      for (let c = group * size; c < (group + 1) * size; c++) {
        sum += x.sums[c];
        squares += x.sums[x.channels + c];
      }
      const mean = sum / count, std = Math.sqrt(squares / count - mean * mean + EPS);
      groups.push({ mean, std });
      for (let c = group * size; c < (group + 1) * size; c++) {
        scale[c] = weight[c] / std;
        shift[c] = bias[c] - mean * scale[c];
      }
    }
    return { scale, shift, groups, size };
  }

  // SiLU of GroupNorm, also in the neighbours' rows; beyond the photo's border zeros stay zeros.
  activated(x, norm, { plain = false } = {}) {
    const { scale, shift } = this.affine(x, norm), y = this.frame("activated", x.rows, x.width, x.channels);
    const a = this.buffer("scale", x.channels), b = this.buffer("shift", x.channels);
    this.view(a, x.channels).set(scale);
    this.view(b, x.channels).set(shift);
    for (let i = -1; i <= x.rows; i++)
      if (this.hasRow(x, i))
        this.kernels.activate(this.pixel(x, i, 0), this.pixel(y, i, 0), x.width, x.channels, a, b, plain ? 1 : 0);
    return y;
  }

  hasRow(x, i) {
    return (i >= 0 || this.rank > 0) && (i < x.rows || this.rank < this.ranks - 1);
  }

  // Each value as a square of four; or `apart`, four times as large with three zeros around it,
  // which makes the next convolution a transposed one.
  upsampled(x, apart = false) {
    const y = this.frame("upsampled", 2 * x.rows, 2 * x.width, x.channels), n = x.channels;
    const line = new Float32Array(y.width * n), zeros = new Float32Array(y.width * n);
    for (let i = -1; i <= x.rows; i++) {
      if (!this.hasRow(x, i)) continue;
      const from = this.values(x, i, 0, x.width);
      for (let j = 0; j < x.width; j++) {
        const one = from.subarray(j * n, (j + 1) * n);
        line.set(apart ? one.map((value) => 4 * value) : one, 2 * j * n);
        if (!apart) line.set(one, (2 * j + 1) * n);
      }
      for (const row of [2 * i, 2 * i + 1])
        if (row >= -1 && row <= y.rows) this.values(y, row, 0, y.width).set(apart && row % 2 ? zeros : line);
    }
    return y;
  }

  // (rows * columns, channels) without a frame, as attention needs it
  tokens(key, x) {
    const count = x.rows * x.width, at = this.buffer(key, count * x.channels);
    for (let i = 0; i < x.rows; i++)
      this.view(at + i * x.width * x.channels * 4, x.width * x.channels).set(this.values(x, i, 0, x.width));
    return at;
  }

  // tokens @ weight^T + bias
  linear(key, tokens, count, name, scale = 1) {
    const weight = this.matrix(name), bias = this.vector(`${name}.bias`).values;
    const out = this.buffer(key, count * weight.n);
    for (let t = 0; t < count; t++) this.view(out + t * weight.n * 4, weight.n).set(bias);
    this.kernels.gemm(tokens, weight.at, out, count, weight.k, weight.n, weight.k * 4, weight.n * 4, weight.n * 4);
    if (scale !== 1) this.view(out, count * weight.n).forEach((x, at, all) => { all[at] = x * scale; });
    return out;
  }

  // One head, as wide as the map has channels: every position reads every other.
  async attention(name, x) {
    if (!this.due(name)) return this.maps.get(name);
    const n = x.channels, own = x.rows * x.width, all = own * this.ranks, { product } = this.kernels;
    const tokens = this.tokens("tokens", this.activated(x, `${name}.group_norm`, { plain: true }));
    const query = this.linear("query", tokens, own, `${name}.to_q`, 1 / Math.sqrt(n));
    const key = this.linear("key", tokens, own, `${name}.to_k`);
    const value = this.linear("value", tokens, own, `${name}.to_v`);
    const parts = await this.exchange({
      key: this.view(key, own * n).slice(), value: this.view(value, own * n).slice(),
    });
    const keys = this.buffer("keys", n * all), values = this.buffer("values", all * n);
    parts.forEach((part, rank) => {
      this.view(values + rank * own * n * 4, own * n).set(part.value);
      const transposed = this.view(keys, n * all);
      for (let t = 0; t < own; t++)
        for (let c = 0; c < n; c++) transposed[c * all + rank * own + t] = part.key[t * n + c];
    });
    const scores = this.buffer("scores", own * all), mixed = this.buffer("mixed", own * n);
    product(query, keys, scores, own, n, all, n * 4, all * 4, all * 4);
    for (let t = 0; t < own; t++) softmax(this.view(scores + t * all * 4, all));
    product(scores, values, mixed, own, all, n, all * 4, n * 4, n * 4);
    const out = this.linear("out", mixed, own, `${name}.to_out.0`);
    const y = this.create(name, x.rows, x.width, x.real);
    // `mixed` is what the last linear layer reads
    y.from = { input: x.name, attention: true, weight: `${name}.to_out.0`, mixed: this.view(mixed, own * n).slice() };
    for (let i = 0; i < y.rows; i++)
      this.values(y, i, 0, y.width).set(this.view(out + i * y.width * n * 4, y.width * n));
    this.plus(y, x);
    return this.finish(y);
  }

  async mean(name, x) {
    if (!this.due(name)) return this.maps.get(name);
    const y = this.create(name, x.rows, x.width, x.real / 2);
    y.from = { input: x.name, mean: true };
    for (let i = 0; i < x.rows; i++)
      for (let j = 0; j < x.width; j++)
        this.values(y, i, j).set(this.values(x, i, j).subarray(0, y.real));
    return this.finish(y);
  }

  async finish(y) {
    for (const [channel, factor] of Object.entries(this.edits[y.name] ?? {}))
      for (let i = 0; i < y.rows; i++) {
        const line = this.values(y, i, 0, y.width);
        for (let at = Number(channel); at < line.length; at += y.channels) line[at] *= factor;
      }
    await this.publish(y);
    this.valid.set(y.name, this.conditions(y.name));
    this.progress(y.name);
    return y;
  }

  // Exchanges the rows at the edges, and sums for GroupNorm: of values and of squares, in float64.
  async publish(map) {
    const n = map.channels, at = this.buffer("sums", 4 * n);
    const totals = new Float64Array(this.memory.buffer, at, 2 * n).fill(0);
    for (let i = 0; i < map.rows; i++) this.kernels.sums(this.pixel(map, i, 0), at, map.width, n, map.pixel);
    const sums = totals.slice();
    const first = this.values(map, 0, 0, map.width).slice();
    const last = this.values(map, map.rows - 1, 0, map.width).slice();
    const parts = await this.exchange({ sums, first, last });
    if (this.rank > 0) this.values(map, -1, 0, map.width).set(parts[this.rank - 1].last);
    if (this.rank < this.ranks - 1) this.values(map, map.rows, 0, map.width).set(parts[this.rank + 1].first);
    map.sums = sums.map((_, at) => parts.reduce((total, part) => total + part.sums[at], 0));
    map.total = map.rows * map.width * this.ranks;
  }
}
