// The VAE, as the names of its points and the order in which they are computed.
// `ops` computes: a Band in each worker, with the same program over another band of rows.

const LEVELS = 4;

// Zeros above and on the left of a convolution's input. With stride 1 they are on all sides; with
// stride 2 only below and on the right.
export const zerosBefore = (kernel, stride) => (kernel === 3 && stride === 1 ? 1 : 0);

// The parts of the network in order: side, name, and what its points are called.
const each = Array.from({ length: LEVELS }, (_, level) => level);
export const PARTS = [
  ["encoder", "conv_in", /^encoder\.conv_in/],
  ...each.map((level) => ["encoder", `down ${level}`, new RegExp(`^encoder\\.down_blocks\\.${level}`)]),
  ["encoder", "mid block", /^encoder\.mid_block/],
  ["encoder", "conv_out", /^encoder\.conv_out/],
  ["encoder", "latents", /^(post_)?quant_conv|^latents/],
  ["decoder", "conv_in", /^decoder\.conv_in/],
  ["decoder", "mid block", /^decoder\.mid_block/],
  ...each.map((level) => ["decoder", `up ${level}`, new RegExp(`^decoder\\.up_blocks\\.${level}`)]),
  ["decoder", "conv_out", /^decoder\.conv_out/],
].map(([side, label, has]) => ({ side, label, has }));

async function resnet(ops, name, x) {
  const hidden = await ops.conv(`${name}.conv1`, x, { norm: `${name}.norm1` });
  return ops.conv(name, hidden, { weight: `${name}.conv2`, norm: `${name}.norm2`, add: x });
}

async function midBlock(ops, name, x) {
  x = await resnet(ops, `${name}.resnets.0`, x);
  x = await ops.attention(`${name}.attentions.0`, x);
  return resnet(ops, `${name}.resnets.1`, x);
}

export async function encode(ops, photo) {
  let x = await ops.conv("encoder.conv_in", photo);
  for (let level = 0; level < LEVELS; level++) {
    const block = `encoder.down_blocks.${level}`;
    for (let i = 0; i < 2; i++) x = await resnet(ops, `${block}.resnets.${i}`, x);
    if (level < LEVELS - 1)
      x = await ops.conv(`${block}.downsamplers.0`, x, { weight: `${block}.downsamplers.0.conv`, stride: 2 });
  }
  x = await midBlock(ops, "encoder.mid_block", x);
  x = await ops.conv("encoder.conv_out", x, { norm: "encoder.conv_norm_out" });
  x = await ops.conv("quant_conv", x);
  return ops.mean("latents", x); // of means and log-variances, the means
}

export async function decode(ops, latents) {
  let x = await ops.conv("post_quant_conv", latents);
  x = await ops.conv("decoder.conv_in", x);
  x = await midBlock(ops, "decoder.mid_block", x);
  for (let level = 0; level < LEVELS; level++) {
    const block = `decoder.up_blocks.${level}`;
    for (let i = 0; i < 3; i++) x = await resnet(ops, `${block}.resnets.${i}`, x);
    // each value four times, then a convolution
    if (level < LEVELS - 1)
      x = await ops.conv(`${block}.upsamplers.0`, x, { weight: `${block}.upsamplers.0.conv`, up: true });
  }
  return ops.conv("decoder.conv_out", x, { norm: "decoder.conv_norm_out" });
}

// Every point in order, with the geometry of the convolution behind it: the program, run by an
// `ops` that computes nothing and writes down what it is asked for.
export async function outline(shapes, size) {
  const points = [];
  const listed = (name, x, more) => {
    const point = { name, input: x.name, height: x.height, width: x.width, ...more };
    points.push(point);
    return point;
  };
  const ops = {
    conv(name, x, { weight = name, norm = null, stride = 1, up = false, add = null } = {}) {
      const [channels, inputs, kernel] = shapes[`${weight}.weight`];
      const side = (n) => (up ? n * 2 : n / stride);
      const height = side(x.height), width = side(x.width);
      const multiplies = height * width * channels * inputs * kernel * kernel;
      return listed(name, x, { kind: "conv", weight, norm, stride, up, add: add?.name ?? null,
        channels, inputs, kernel, height, width, multiplies, before: zerosBefore(kernel, stride) });
    },
    attention: (name, x) => listed(name, x, { kind: "attention", weight: `${name}.to_out.0`, channels: x.channels, inputs: x.channels,
      multiplies: x.height * x.width * x.channels * (4 * x.channels + 2 * x.height * x.width) }),
    mean: (name, x) => listed(name, x, { kind: "mean", channels: x.channels / 2, multiplies: 0 }),
  };
  const photo = { name: "photo", channels: 3, height: size, width: size };
  await decode(ops, await encode(ops, photo));
  return points;
}
