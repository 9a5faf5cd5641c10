// The VAE as the page sees it: workers that compute, and questions about what they have computed.
//
// One thing happens at a time. What the reader has set (`wanted`) is computed and announced;
// questions are about what was announced last; runs under other conditions come after them. These
// and gradients give way when the reader changes something.

import { outline } from "./network.js";
import { readSafetensors } from "./weights.js";

const bytes = (id) => Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (c) => c.charCodeAt(0));

export const SIZE = 256;

export class Vae extends EventTarget {
  #workers = null;
  #waiting = new Map();
  #count = 0;
  #questions = [];
  #asides = [];
  #computing = []; // those who wait for `wanted`
  #yielding = null; // the message that gives way to a change
  #photo = null; // the one that the workers have

  constructor(photo) {
    super();
    // whether the browser can run the kernels: they need WebAssembly with 128-bit SIMD
    this.possible = typeof WebAssembly === "object" && WebAssembly.validate(bytes("kernels"));
    this.wanted = { photo, edits: {}, shift: 0, without: {} };
    this.announced = null; // the last of `wanted` that has been computed
    this.held = null; // the conditions of what the workers hold
    this.running = null;
    this.seconds = null;
    this.version = 0;
  }

  // Weights and geometry: once, when first needed.
  read() {
    this.reading ??= this.#read();
    return this.reading;
  }

  async #read() {
    this.tensors = readSafetensors(bytes("weights").buffer);
    const shapes = Object.fromEntries(Object.entries(this.tensors).map(([name, { shape }]) => [name, shape]));
    this.points = await outline(shapes, SIZE);
    this.point = Object.fromEntries(this.points.map((point) => [point.name, point]));
    let before = 0;
    const total = this.points.reduce((sum, point) => sum + point.multiplies, 0);
    for (const point of this.points) point.until = (before += point.multiplies) / total;
  }

  async #start() {
    await this.read();
    if (this.#workers) return;
    const weights = bytes("weights").buffer, fused = bytes("kernels-fused");
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
    this.#workers = ports.map((_, rank) => {
      const worker = new Worker(url);
      worker.onmessage = ({ data }) => this.#heard(rank, data);
      return worker;
    });
    await this.#all({ kind: "start", module, weights }, (rank) => [{ rank, ports: ports[rank] }, ports[rank].filter(Boolean)]);
  }

  // Sends a message to all workers: their answers by rank, or null where they gave way.
  #all(message, own = () => [{}, []]) {
    const id = ++this.#count;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { answers: [], left: this.#workers.length, resolve, reject });
      this.#workers.forEach((worker, rank) => {
        const [more, transfer] = own(rank);
        worker.postMessage({ id, ...message, ...more }, transfer);
      });
    });
  }

  #heard(rank, { id, answer, error, stopped, progress }) {
    if (progress) return this.#progress(progress);
    const waiting = this.#waiting.get(id);
    waiting.answers[rank] = answer;
    waiting.stopped ||= stopped;
    waiting.error ??= error;
    if (--waiting.left) return;
    this.#waiting.delete(id);
    if (waiting.error) waiting.reject(new Error(waiting.error));
    else waiting.resolve(waiting.stopped ? null : waiting.answers);
  }

  #progress(name) {
    this.dispatchEvent(new CustomEvent("progress", { detail: name === "done" ? 1 : this.point[name]?.until ?? 0 }));
  }

  // A message that gives way: `#giveWay` stops it.
  async #stoppable(message) {
    this.#yielding = this.#count + 1;
    try {
      return await this.#all(message);
    } finally {
      this.#yielding = null;
    }
  }

  #giveWay() {
    if (this.#yielding) for (const worker of this.#workers) worker.postMessage({ stop: this.#yielding });
  }

  // Computes what is `wanted`, changed by `change`; the promise is kept when that or something later
  // has been computed.
  compute(change = {}) {
    if (Object.entries(change).some(([key, value]) => this.wanted[key] !== value)) {
      this.wanted = { ...this.wanted, ...change };
      this.#giveWay();
    }
    if (this.wanted === this.announced) return Promise.resolve();
    return new Promise((resolve) => { this.#computing.push(resolve); this.#drive(); });
  }

  #drive() {
    if (this.failed) return;
    this.running ??= this.#work().catch((error) => {
      this.failed = error;
      this.dispatchEvent(new CustomEvent("failed", { detail: error.message }));
    }).finally(() => {
      this.running = null;
      // something may have been asked for after the last look
      if (this.#questions.length || this.#computing.length || this.#asides.length) this.#drive();
    });
  }

  async #work() {
    await this.#start();
    for (;;) {
      if (this.#questions.length && this.held && this.held === this.announced) await this.#answer(this.#questions.shift());
      else if (this.wanted !== this.announced) await this.#announce(this.wanted);
      else if (this.#asides.length) await this.#other(this.#asides[0]);
      else if (this.held !== this.announced) await this.#run(this.announced);
      else break;
    }
    this.#progress("done");
  }

  async #announce(settings) {
    const from = performance.now(), asked = this.#computing.splice(0);
    await this.#run(settings);
    this.seconds = (performance.now() - from) / 1000;
    this.announced = settings;
    if (this.wanted === settings) asked.push(...this.#computing.splice(0)); // who came meanwhile
    this.version++;
    for (const resolve of asked) resolve();
    this.dispatchEvent(new CustomEvent("computed"));
  }

  async #run(settings, send = (message) => this.#all(message)) {
    const { edits, shift, without } = settings;
    const photo = settings.photo === this.#photo ? null : settings.photo;
    this.#photo = settings.photo;
    this.held = null; // until it is complete
    this.#progress("start");
    const complete = await send({ kind: "run", photo, size: SIZE, edits, shift, without });
    if (complete) this.held = settings;
    return complete;
  }

  async #other(aside) {
    const settings = { ...this.wanted, edits: {}, ...aside.change };
    if (!await this.#run(settings, (message) => this.#stoppable(message))) return; // later, once more
    this.#asides.shift();
    const picture = stacked(await this.#all({ kind: "planes", name: "decoder.conv_out", channels: [0, 1, 2], side: 0 }), 3);
    const [spread] = await this.#all({ kind: "spread", names: aside.names });
    aside.resolve({ picture: picture.values, spread });
  }

  // What the network decodes without edits and under other conditions, and the standard deviation
  // of all values of the maps with these names.
  decodedWith(change, names = []) {
    return new Promise((resolve) => { this.#asides.push({ change, names, resolve }); this.#drive(); });
  }

  async #answer({ message, resolve, stoppable = false }) {
    resolve(await (stoppable ? this.#stoppable(message) : this.#all(message)));
  }

  #ask(message, more = {}) {
    return new Promise((resolve) => { this.#questions.push({ message, resolve, ...more }); this.#drive(); });
  }

  // Channels of a map as planes: Float32Array (channels, height, width); averaged over squares to
  // `side` values a row, unless it is 0.
  async planes(name, channels, side = 0) {
    return stacked(await this.#ask({ kind: "planes", name, channels, side }), channels.length);
  }

  allPlanes(name, side = 0) {
    return this.planes(name, [...Array(this.point[name].channels).keys()], side);
  }

  // One value taken apart; see neuron.js.
  async neuron(name, channel, i, j) {
    return (await this.#ask({ kind: "neuron", name, channel, i, j })).find(Boolean);
  }

  // What GroupNorm does to one channel; see worker.js.
  async norm(name, norm, channel) {
    return (await this.#ask({ kind: "norm", name, norm, channel }))[0];
  }

  // The gradient of one value with respect to the photo: (3, height, width). Null where something
  // else has been asked for meanwhile.
  async gradient(name, channel, i, j) {
    const earlier = this.#questions.findIndex(({ message }) => message.kind === "gradient");
    if (earlier >= 0) this.#questions.splice(earlier, 1)[0].resolve(null);
    this.#giveWay();
    const parts = await this.#ask({ kind: "gradient", name, channel, i, j }, { stoppable: true });
    return parts && stacked(parts, 3);
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
