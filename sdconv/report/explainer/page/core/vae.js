// The VAE as the page sees it: workers that compute, and questions about what they have computed.

import { outline } from "./network.js";
import { readSafetensors } from "./weights.js";

const bytes = (id) => Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (c) => c.charCodeAt(0));

export const SIZE = 256;

export class Vae extends EventTarget {
  constructor(photo) {
    super();
    this.wanted = { photo, edits: {}, shift: 0, without: {} };
    this.done = {};
    this.seconds = null;
    this.version = 0;
  }

  // Weights, workers: once, when first needed.
  start() {
    this.started ??= this.#start();
    return this.started;
  }

  async #start() {
    const weights = bytes("weights").buffer;
    this.tensors = readSafetensors(weights);
    const shapes = Object.fromEntries(Object.entries(this.tensors).map(([name, { shape }]) => [name, shape]));
    this.points = await outline(shapes, SIZE);
    this.point = Object.fromEntries(this.points.map((point) => [point.name, point]));
    let before = 0;
    const total = this.points.reduce((sum, point) => sum + point.multiplies, 0);
    for (const point of this.points) point.until = (before += point.multiplies) / total;
    const fused = bytes("kernels-fused");
    const module = await WebAssembly.compile(WebAssembly.validate(fused) ? fused : bytes("kernels"));
    const cores = navigator.hardwareConcurrency || 2, ranks = cores >= 8 ? 4 : cores >= 2 ? 2 : 1;
    const ports = Array.from({ length: ranks }, () => Array(ranks).fill(null));
    for (let a = 0; a < ranks; a++)
      for (let b = 0; b < a; b++) {
        const { port1, port2 } = new MessageChannel();
        [ports[a][b], ports[b][a]] = [port1, port2];
      }
    const source = document.getElementById("worker").textContent;
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    this.waiting = new Map();
    this.count = 0;
    this.workers = ports.map(() => {
      const worker = new Worker(url);
      worker.onmessage = ({ data }) => this.#heard(data);
      return worker;
    });
    await Promise.all(this.workers.map((worker, rank) =>
      this.#ask(worker, { kind: "start", module, weights, rank, ports: ports[rank] }, ports[rank].filter(Boolean))));
  }

  #heard({ id, answer, error, progress }) {
    if (progress) {
      this.dispatchEvent(new CustomEvent("progress", { detail: this.point[progress].until }));
      return;
    }
    const { resolve, reject } = this.waiting.get(id);
    this.waiting.delete(id);
    if (error) reject(new Error(error));
    else resolve(answer);
  }

  #ask(worker, message, transfer = []) {
    const id = ++this.count;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      worker.postMessage({ id, ...message }, transfer);
    });
  }

  #all(message) {
    return Promise.all(this.workers.map((worker) => this.#ask(worker, message)));
  }

  // Computes what is `wanted`, changed by `change`. While a run is on, only the latest change waits.
  compute(change = {}) {
    this.wanted = { ...this.wanted, ...change };
    this.running ??= this.#run().finally(() => { this.running = null; });
    return this.running;
  }

  async #run() {
    await this.start();
    const before = this.version;
    while (Object.entries(this.wanted).some(([key, value]) => this.done[key] !== value)) {
      const now = this.wanted, from = performance.now();
      this.dispatchEvent(new CustomEvent("progress", { detail: 0 }));
      const photo = now.photo === this.done.photo ? null : now.photo;
      await this.#all({ kind: "run", photo, size: SIZE, edits: now.edits, shift: now.shift, without: now.without });
      this.done = now;
      this.seconds = (performance.now() - from) / 1000;
      this.version++;
    }
    if (this.version === before) return;
    this.dispatchEvent(new CustomEvent("progress", { detail: 1 }));
    if (!this.aside) this.dispatchEvent(new CustomEvent("computed"));
  }

  // The picture that the network decodes under other conditions, and what `read` asks for under
  // them; afterwards all is as before.
  decodedWith(change, read = () => null) {
    this.asides = (this.asides ?? Promise.resolve()).catch(() => {}).then(() => this.#decodedWith(change, read));
    return this.asides;
  }

  async #decodedWith(change, read) {
    await this.compute();
    const before = this.wanted;
    this.aside = true;
    try {
      await this.compute({ edits: {}, ...change });
      const { values } = await this.planes("decoder.conv_out", [0, 1, 2]);
      return { picture: values, more: await read() };
    } finally {
      await this.compute(before);
      this.aside = false;
    }
  }

  // Channels of a map as planes: Float32Array (channels, height, width).
  async planes(name, channels, side = 0) {
    await this.compute();
    return stacked(await this.#all({ kind: "planes", name, channels, side }), channels.length);
  }

  async neuron(name, channel, i, j) {
    await this.compute();
    return (await this.#all({ kind: "neuron", name, channel, i, j })).find(Boolean);
  }

  async norm(name, norm, channel) {
    await this.compute();
    return (await this.#all({ kind: "norm", name, norm, channel }))[0];
  }

  // The standard deviation of all values of each map.
  async spread(names) {
    return (await this.#all({ kind: "spread", names }))[0];
  }

  // The gradient of one value with respect to the photo: (3, height, width).
  async gradient(name, channel, i, j) {
    await this.compute();
    return stacked(await this.#all({ kind: "gradient", name, channel, i, j }), 3);
  }

  // The geometry of a convolution and its weights.
  tensor(name) {
    return this.tensors[name];
  }
}

function stacked(parts, channels) {
  const { rows, width } = parts[0], height = rows * parts.length;
  const values = new Float32Array(channels * height * width);
  parts.forEach((part, rank) => {
    for (let c = 0; c < channels; c++)
      values.set(part.values.subarray(c * rows * width, (c + 1) * rows * width), (c * height + rank * rows) * width);
  });
  return { values, height, width, channels };
}
