// How much one value of a feature map changes with each pixel of the photo: its gradient, from the
// value back through every layer. The exact derivative, through GroupNorm's statistics and
// attention too; equal to torch.autograd's.

import { joined, product, softmax, transpose } from "./matrix.js";
import { transposed } from "./weights.js";

export async function gradient(band, name, channel, i, j) {
  let at = name, y = band.maps.get(name);
  let dy = fresh(band, "g0", y);
  const row = i - band.rank * y.rows;
  if (row >= 0 && row < y.rows) band.values(dy, row, j)[channel] = 1;
  const shortcuts = new Map();
  while (at !== "photo") {
    y = band.maps.get(at);
    scaleByEdits(band, y, dy);
    const { input, add, attention, mean } = y.from, x = band.maps.get(input);
    // three buffers take turns: this gradient's, that of a shortcut which waits, the next one's
    const busy = [dy, ...shortcuts.values()].map((map) => map.name);
    const key = ["g0", "g1", "g2"].find((one) => !busy.includes(one));
    let dx;
    if (attention) dx = await throughAttention(band, at, x, dy, key);
    else if (mean) dx = copied(band, key, x, dy);
    else dx = await throughConv(band, y.from, x, dy, key);
    if (add) shortcuts.set(add, dy);
    if (shortcuts.has(input)) {
      band.plus(dx, shortcuts.get(input));
      shortcuts.delete(input);
    }
    dy = dx;
    at = input;
  }
  const out = new Float32Array(3 * dy.rows * dy.width);
  for (let r = 0; r < dy.rows; r++)
    for (let c = 0; c < dy.width; c++)
      for (let k = 0; k < 3; k++) out[(k * dy.rows + r) * dy.width + c] = band.values(dy, r, c)[k];
  return { values: out, rows: dy.rows, width: dy.width };
}

// A map of zeros in the shape of `like`.
function fresh(band, key, like, rows = like.rows, width = like.width, channels = like.channels) {
  const map = band.frame(`${key} ${channels}`, rows, width, channels);
  map.name = key;
  map.real = channels;
  band.view(map.at, map.size).fill(0);
  return map;
}

function scaleByEdits(band, y, dy) {
  for (const [channel, factor] of Object.entries(band.edits[y.name] ?? {}))
    for (let i = 0; i < dy.rows; i++) {
      const line = band.values(dy, i, 0, dy.width);
      for (let at = Number(channel); at < line.length; at += dy.channels) line[at] *= factor;
    }
}

// The mean of the latents is the first half of its input's channels.
function copied(band, key, x, dy) {
  const dx = fresh(band, key, x);
  for (let i = 0; i < dy.rows; i++)
    for (let j = 0; j < dy.width; j++)
      band.values(dx, i, j).set(band.values(dy, i, j).subarray(0, x.real / 2));
  return dx;
}

async function throughConv(band, { weight, norm, stride, up }, x, dy, key) {
  const packed = band.matrix(weight);
  const back = (packed.back ??= band.pack(`${weight} back`, () => transposed(packed)));
  const none = (back.none ??= { values: new Float32Array(back.n), at: band.put(new Float32Array(back.n)) });
  let source = dy;
  if (stride === 2) {
    // each gradient at the odd row and column of its 2x2 square, zeros elsewhere
    source = fresh(band, "apart", dy, dy.rows * 2, dy.width * 2);
    for (let i = 0; i < dy.rows; i++)
      for (let j = 0; j < dy.width; j++)
        band.values(source, 2 * i + 1, 2 * j + 1).set(band.values(dy, i, j));
  }
  await band.publish(source);
  let dx = fresh(band, up ? "wide" : key, source, source.rows, source.width, back.n);
  if (back.size === 1) band.convolve(source, back, none, dx);
  else band.convolve(source, back, none, dx, 1);
  if (up) {
    const wide = dx, n = wide.channels;
    dx = fresh(band, key, x);
    for (let i = 0; i < wide.rows; i++)
      for (let j = 0; j < wide.width; j++) {
        const to = band.values(dx, i >> 1, j >> 1), from = band.values(wide, i, j);
        for (let c = 0; c < n; c++) to[c] += from[c];
      }
  }
  if (norm) await throughNorm(band, norm, x, dx, true);
  return dx;
}

// In place: from the gradient of SiLU's output, or of GroupNorm's, to that of GroupNorm's input.
async function throughNorm(band, norm, x, dx, silu) {
  const { scale, shift, groups, size } = band.affine(x, norm), n = x.channels;
  const sums = new Float64Array(2 * groups.length);
  const groupOf = (c) => groups[Math.floor(c / size)];
  for (let i = 0; i < x.rows; i++) {
    const from = band.values(x, i, 0, x.width), to = band.values(dx, i, 0, x.width);
    for (let at = 0; at < from.length; at++) {
      const c = at % n, u = from[at] * scale[c] + shift[c];
      let d = to[at];
      if (silu) {
        const gate = 1 / (1 + Math.exp(-u));
        d *= gate * (1 + u * (1 - gate));
      }
      // times GroupNorm's weight over the deviation
      d *= scale[c];
      to[at] = d;
      const { mean, std } = groupOf(c), group = Math.floor(c / size);
      sums[2 * group] += d;
      sums[2 * group + 1] += d * (from[at] - mean) / std;
    }
  }
  const parts = await band.exchange({ sums }), count = x.total * size;
  const total = sums.map((_, at) => parts.reduce((sum, part) => sum + part.sums[at], 0) / count);
  for (let i = 0; i < x.rows; i++) {
    const from = band.values(x, i, 0, x.width), to = band.values(dx, i, 0, x.width);
    for (let at = 0; at < from.length; at++) {
      const c = at % n, group = Math.floor(c / size), { mean, std } = groupOf(c);
      to[at] -= total[2 * group] + (from[at] - mean) / std * total[2 * group + 1];
    }
  }
}

async function throughAttention(band, name, x, dy, slot) {
  const n = x.channels, own = x.rows * x.width, all = own * band.ranks, scale = 1 / Math.sqrt(n);
  const matrix = (part) => band.matrix(`${name}.${part}`).values; // (inputs, outputs)
  const read = (at, count) => band.view(at, count).slice();
  // forward once more, for what the shared buffers no longer hold
  const tokens = band.tokens("tokens", band.activated(x, `${name}.group_norm`, { plain: true }));
  const query = read(band.linear("query", tokens, own, `${name}.to_q`), own * n);
  const key = read(band.linear("key", tokens, own, `${name}.to_k`), own * n);
  const value = read(band.linear("value", tokens, own, `${name}.to_v`), own * n);
  const parts = await band.exchange({ key, value });
  const keys = joined(parts.map((part) => part.key)), values = joined(parts.map((part) => part.value));
  const shares = product(query, transpose(keys, all, n), own, n, all);
  for (let t = 0; t < own; t++) softmax(shares.subarray(t * all, (t + 1) * all), scale);

  const dOut = read(band.tokens("tokens", dy), own * n);
  const dMixed = product(dOut, transpose(matrix("to_out.0"), n, n), own, n, n);
  const dShares = product(dMixed, transpose(values, all, n), own, n, all);
  for (let t = 0; t < own; t++) {
    let sum = 0;
    for (let s = t * all; s < (t + 1) * all; s++) sum += dShares[s] * shares[s];
    for (let s = t * all; s < (t + 1) * all; s++) dShares[s] = (dShares[s] - sum) * shares[s] * scale;
  }
  const dQuery = product(dShares, keys, own, all, n);
  // every worker's rows read every key and value: their gradients are summed over workers
  const sums = await band.exchange({
    key: product(transpose(dShares, own, all), query, all, own, n),
    value: product(transpose(shares, own, all), dMixed, all, own, n),
  });
  const mine = (part) => {
    const total = new Float32Array(own * n), from = band.rank * own * n;
    for (const one of sums) for (let at = 0; at < total.length; at++) total[at] += one[part][from + at];
    return total;
  };
  const dTokens = new Float32Array(own * n);
  for (const [d, part] of [[dQuery, "to_q"], [mine("key"), "to_k"], [mine("value"), "to_v"]]) {
    const more = product(d, transpose(matrix(part), n, n), own, n, n);
    for (let at = 0; at < more.length; at++) dTokens[at] += more[at];
  }
  const dx = fresh(band, slot, x);
  for (let i = 0; i < x.rows; i++)
    band.values(dx, i, 0, x.width).set(dTokens.subarray(i * x.width * n, (i + 1) * x.width * n));
  await throughNorm(band, `${name}.group_norm`, x, dx, false);
  band.plus(dx, dy);
  return dx;
}
