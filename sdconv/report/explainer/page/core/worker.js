// A worker: a Band, the messages between workers, and the questions of the page.

import { Band } from "./band.js";
import { gradient } from "./gradient.js";
import { decode, encode } from "./network.js";
import { neuron } from "./neuron.js";
import { readSafetensors } from "./weights.js";

let band = null;
let queue = Promise.resolve();
let current = null, stop = null; // numbers of messages

const STOPPED = Symbol("stopped");

// To and from the other workers, in order: what the n-th call sends meets the n-th of the others.
function exchanger(ports) {
  const inbox = ports.map(() => []);
  let arrived = () => {};
  ports.forEach((port, other) => {
    if (port) port.onmessage = ({ data }) => { inbox[other].push(data); arrived(); };
  });
  return async (more) => {
    const part = { ...more, stop: stop === current };
    for (const port of ports) port?.postMessage(part);
    const complete = () => ports.every((port, other) => !port || inbox[other].length);
    while (!complete()) await new Promise((resolve) => { arrived = resolve; });
    const parts = ports.map((port, other) => (port ? inbox[other].shift() : part));
    // all workers learn of it at the same exchange, so none waits for another
    if (parts.some((one) => one.stop)) throw STOPPED;
    return parts;
  };
}

// Rows of a map as planes: (channels, rows, columns), averaged over squares if `side` is smaller.
function planes(name, channels, side) {
  const map = band.maps.get(name), step = side ? Math.max(1, map.width / side) : 1;
  const rows = map.rows / step, width = map.width / step;
  const out = new Float32Array(channels.length * rows * width);
  for (let i = 0; i < map.rows; i++) {
    const line = band.values(map, i, 0, map.width);
    for (let j = 0; j < map.width; j++)
      for (let c = 0; c < channels.length; c++)
        out[(c * rows + Math.floor(i / step)) * width + Math.floor(j / step)] += line[j * map.channels + channels[c]];
  }
  if (step > 1) for (let at = 0; at < out.length; at++) out[at] /= step * step;
  return { values: out, rows, width };
}

const answers = {
  start({ module, weights, rank, ports }) {
    const tensors = readSafetensors(weights);
    band = new Band({ module, tensors, rank, ranks: ports.length, exchange: exchanger(ports) });
    if (rank === 0) band.progress = (name) => postMessage({ progress: name });
  },

  async run({ photo, size, edits, shift, without }) {
    Object.assign(band, { edits, shift, without, stale: false });
    if (photo) await band.input("photo", photo, size, size, 3);
    await decode(band, await encode(band, band.maps.get("photo")));
  },

  planes: ({ name, channels, side }) => planes(name, channels, side),

  neuron: ({ name, channel, i, j }) => neuron(band, name, channel, i, j),

  gradient: ({ name, channel, i, j }) => gradient(band, name, channel, i, j),

  spread: ({ names }) => names.map((name) => {
    const { sums, total, real, channels } = band.maps.get(name), count = total * real;
    let sum = 0, squares = 0;
    for (let c = 0; c < real; c++) {
      sum += sums[c];
      squares += sums[channels + c];
    }
    return Math.sqrt(squares / count - (sum / count) ** 2);
  }),

  // The group's mean and standard deviation, and GroupNorm's weight and bias for one channel.
  norm({ name, norm, channel }) {
    const { scale, shift, groups, size } = band.affine(band.maps.get(name), norm);
    const { mean, std } = groups[Math.floor(channel / size)];
    return { mean, std, weight: scale[channel] * std, bias: shift[channel] + mean * scale[channel] };
  },
};

onmessage = ({ data: { id, kind, ...given } }) => {
  if (given.stop) {
    ({ stop } = given);
    return;
  }
  queue = queue.then(async () => {
    current = id;
    try {
      postMessage({ id, answer: await answers[kind](given) });
    } catch (error) {
      postMessage(error === STOPPED ? { id, stopped: true } : { id, error: String(error?.stack ?? error) });
    }
  });
};
