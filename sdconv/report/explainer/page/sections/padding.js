// Padding and stride: how many numbers come out, and which positions the kernel visits.

import { conv2d, outputSize, samePadding } from "../core/convolution.js";
import { SIZE } from "../core/vae.js";
import { drawGrey, drawPhoto } from "../ui/canvas.js";
import { button, choice, el, html, python, slider, svg, tell, toggle } from "../ui/dom.js";
import { short } from "../ui/numbers.js";
import { state } from "../ui/state.js";

const KINDS = [
  ["valid", "valid: none"],
  ["same", "same: size ÷ stride outputs"],
  ["both", "symmetric: both ends"],
  ["end", "Stable Diffusion: at the end"],
];

// Which of two runs a number stands for, so that the address does not tell.
const wrongRun = (run) => (Math.abs(Math.sin(run * 12.9898) * 43758.5453) % 1 < 0.5 ? "A" : "B");

// Zeros before and after a row.
function zeros(kind, size, kernel, stride) {
  if (kind === "same") return samePadding(size, kernel, stride);
  if (kind === "both") return [(kernel - 1) / 2, (kernel - 1) / 2];
  return kind === "end" ? [0, 1] : [0, 0];
}

const BOTH_WAYS = `import copy
wrong = copy.deepcopy(vae)
for block in wrong.encoder.down_blocks[:3]:
    block.downsamplers[0] = block.downsamplers[0].conv  # without the zeros at the end
    block.downsamplers[0].padding = (1, 1)
with torch.no_grad():
    decoded = [one.decode(one.encode(photo).latent_dist.mode()).sample for one in (vae, wrong)]
print([(one - photo).abs().mean().item() for one in decoded])`;

export const padding = {
  id: "padding",
  title: "Padding and stride, and a bug to find",
  short: "Padding",
  lead: `<p>At the ends of a row the kernel reaches beyond the numbers. <b>Padding</b> puts zeros there. Nor does the kernel have to visit every position: the step from one position to the next is the <b>stride</b>. Set both, guess how many numbers come out, then look. In a photo, rows and columns are treated alike: “at the end” is on the right and at the bottom.</p>`,

  build({ root, section, vae: network, photo }) {
    const { values: now, set } = state("padding", { size: 8, kernel: 3, stride: 2, kind: "end", guess: 0, shown: false, levels: 1, side: "end", flicker: false, run: 0, answer: "" },
      () => render(), (v) => v.size >= 4 && v.size <= 12 && [1, 3, 5].includes(v.kernel) && v.stride >= 1 && v.stride <= 3 && KINDS.some(([kind]) => kind === v.kind)
        && v.size >= v.kernel && v.levels >= 1 && v.levels <= 4 && ["end", "both"].includes(v.side)
        && v.run >= 0 && ["", "A", "B"].includes(v.answer));
    // each puts its part on the page, and returns what draws it
    const parts = [countOutputs, halveThePhoto, findTheBug].map((build) => build({ root, section, network, photo, now, set }));
    const render = () => { for (const draw of parts) draw(); };
    photo.addEventListener("change", render);
    render();
  },
};

// How many numbers come out?
function countOutputs({ root, now, set }) {
  const change = (what) => set({ ...what, shown: false, guess: 0 });
  const controls = {
    size: slider({ label: "numbers in", min: 5, max: 12, value: now.size, oninput: (size) => change({ size }) }),
    stride: slider({ label: "stride", min: 1, max: 3, value: now.stride, oninput: (stride) => change({ stride }) }),
    kernel: choice({ label: "kernel", options: [["1", "1"], ["3", "3"], ["5", "5"]], value: now.kernel, onchange: (x) => change({ kernel: Number(x) }) }),
    kind: choice({ label: "padding", options: KINDS, value: now.kind, onchange: (kind) => change({ kind }) }),
  };
  const row = svg("svg", { class: "row-drawing", role: "img" });
  const square = svg("svg", { class: "square-drawing", role: "img" });
  const guess = el("input", { type: "number", min: 0, max: 20, id: "padding-guess", onkeydown: (event) => { if (event.key === "Enter") reveal(); } });
  const check = button("Check", () => reveal());
  const verdict = el("p", { class: "verdict", role: "status" });
  const code = python();
  const reveal = () => set({ shown: true, guess: guess.valueAsNumber || 0 });
  root.append(
    el("div", { class: "controls" }, Object.values(controls)),
    el("div", { class: "panel" },
      el("div", { class: "drawings" },
        el("figure", {}, row, el("figcaption", {}, "blue: the numbers of a row, numbered; grey: zeros of the padding; orange: positions of the kernel; green: the outputs, numbered")),
        el("figure", {}, square, el("figcaption", {}, "the same in a photo"))),
      el("div", { class: "controls" }, el("label", { class: "text", for: "padding-guess" }, el("span", {}, "How many numbers come out?"), guess), check), verdict), code);

  return () => {
    const { size, kernel, stride, kind, shown } = now, pad = zeros(kind, size, kernel, stride);
    for (const name of ["size", "stride", "kernel", "kind"]) controls[name].set(now[name]);
    const count = outputSize(size, kernel, stride, pad);
    drawRow(row, { size, kernel, stride, pad, count, shown });
    drawSquare(square, { size, kernel, stride, pad, count, shown });
    if (document.activeElement !== guess) guess.value = now.guess || "";
    const unread = neverRead(size, kernel, stride, pad, count);
    tell(verdict, ...(shown ? [now.guess === count ? "Yes, " : now.guess ? `No, not ${short(now.guess, 0)}: ` : "It is ", el("b", { class: "output" }, String(count)),
      `. That is (${size} numbers + ${pad[0]} before + ${pad[1]} after − kernel ${kernel}) ÷ stride ${stride}, rounded down, plus 1.`,
      unread.length ? ` Never read: number${unread.length > 1 ? "s" : ""} ${unread.join(", ")}.` : ""] : ["Guess first; all positions of the kernel appear when you check."]));
    code.show(`from sdconv.convolution.geometry import output_size
print(output_size(${size}, kernel=${kernel}, stride=${stride}, padding=(${pad.join(", ")})))`, count, "int");
    code.hidden = !shown; // it prints the answer
  };
}

// The numbers, from 1 on, that no position of the kernel covers.
function neverRead(size, kernel, stride, [before], count) {
  const read = new Set(Array.from({ length: count * kernel }, (_, at) => Math.floor(at / kernel) * stride + at % kernel - before + 1));
  return Array.from({ length: size }, (_, at) => at + 1).filter((number) => !read.has(number));
}

// Where do the outputs lie? The photo, halved with either padding.
function halveThePhoto({ root, photo, now, set }) {
  const compared = [["a zero at the end", [0, 1]], ["a zero on both sides", [1, 1]]].map(([words, pad]) => {
    const row = svg("svg", { class: "row-drawing", role: "img" });
    drawRow(row, { size: 8, kernel: 3, stride: 2, pad, count: 4, shown: true, first: 1 });
    return el("figure", {}, row, el("figcaption", {}, words));
  });
  const canvas = el("canvas", { width: SIZE, height: SIZE, role: "img" });
  const side = choice({ label: "zeros", options: [["end", "at the end"], ["both", "on both sides"]], value: now.side, onchange: (one) => set({ side: one }) });
  const levels = slider({ label: "times halved", min: 1, max: 4, value: now.levels, oninput: (x) => set({ levels: x }) });
  const flicker = toggle({ label: "flicker between the two", value: now.flicker, onchange: (on) => set({ flicker: on }) });
  const words = el("p", { class: "note", role: "status" });
  const code = python();
  root.append(
    html(`<div><h3>Half a cell apart</h3><p>At stride 2, one zero at the end and a zero on both sides give the same size. But with a zero on both sides the kernel starts one pixel earlier: each map is half a cell off, and every halving adds to it. Stable Diffusion’s VAE pads at the end; torch’s usual <code>padding=1</code> is on both sides.</p></div>`),
    el("div", { class: "compared" }, compared),
    el("div", { class: "split thirds" }, el("figure", {}, canvas, el("figcaption", {}, "the photo, halved by a blur with stride 2")),
      el("div", { class: "panel" }, side, flicker, levels, words)), code);

  let timer = null;
  function blink() {
    flicker.set(now.flicker);
    if (now.flicker === Boolean(timer)) return;
    clearInterval(timer);
    // alternation is what is asked for by the switch; slower where motion is unwelcome
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    timer = now.flicker ? setInterval(() => set({ side: now.side === "end" ? "both" : "end" }), still ? 2000 : 500) : null;
  }

  return () => {
    side.set(now.side);
    levels.set(now.levels);
    blink();
    const blur = [1, 2, 1, 2, 4, 2, 1, 2, 1].map((x) => x / 16), [before, after] = now.side === "end" ? [0, 1] : [1, 1];
    let map = { values: photo.grey, height: SIZE, width: SIZE };
    for (let n = 0; n < now.levels; n++) map = conv2d(map, blur, { stride: 2, padding: [before, after, before, after] });
    drawGrey(canvas, map.values, map.width, map.height, [0, 1]);
    canvas.setAttribute("aria-label", `The photo halved ${now.levels} times, zeros ${now.side === "end" ? "at the end" : "on both sides"}`);
    const cell = 2 ** now.levels, off = cell - 1;
    tell(words, `One cell is now ${cell} × ${cell} pixels of the photo. The kernel of the first cell is centred on pixel ${off} with zeros at the end, on pixel 0 with zeros on both sides: ${off} ${off === 1 ? "pixel" : "pixels"} apart, ${off}/${cell} of a cell.`);
    const middle = map.width / 2;
    code.show(`grey = (photo.mean(1, keepdim=True) + 1) / 2
blur = torch.tensor([[[[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]]]) / 16
for _ in range(${now.levels}):
    grey = conv2d_reference(grey, blur, stride=2, padding=(${before}, ${after}, ${before}, ${after}))
print(grey[0, 0, ${middle}, ${middle}].item())`, map.values[middle * map.width + middle]);
  };
}

// Which of two runs pads wrongly? The number of the run, in the address, decides it; the pictures are computed.
function findTheBug({ root, section, network, photo, now, set }) {
  const wrong = () => wrongRun(now.run);
  const given = el("canvas", { width: SIZE, height: SIZE, role: "img", "aria-label": "The photo" });
  const runs = ["A", "B"].map((name) => el("canvas", { width: SIZE, height: SIZE, role: "img", "aria-label": `Picture decoded by run ${name}` }));
  const start = button("Run the network both ways", () => set({ run: 1 + Math.floor(Math.random() * 1e6), answer: "" }));
  const answers = ["A", "B"].map((name) => button(`${name} pads wrongly`, () => set({ answer: name }), { class: "quiet", disabled: true }));
  const found = el("p", { class: "verdict", role: "status" });
  const code = python("How far each run is from the photo, the right one first: in Python");
  root.append(
    html(`<div><h3>Find the padding bug</h3><p>Two programs run the same trained VAE. All shapes agree, no error is raised. One of the two pads its strided convolutions on both sides. Which one?</p></div>`),
    el("div", { class: "controls" }, start, answers), found,
    el("div", { class: "trio" }, el("figure", {}, given, el("figcaption", {}, "the photo")),
      runs.map((canvas, at) => el("figure", {}, canvas, el("figcaption", {}, `run ${"AB"[at]}`)))), code);

  let decoded = null;
  async function decode() {
    const mine = decoded = { run: now.run, photo: photo.pixels };
    for (const one of answers) one.disabled = true;
    for (const canvas of runs) canvas.getContext("2d").clearRect(0, 0, SIZE, SIZE);
    found.textContent = now.run ? "Computing…" : "";
    code.hidden = true;
    start.disabled = now.run > 0;
    if (!now.run) return;
    for (const name of ["A", "B"]) {
      const shift = name === wrong() ? -1 : 0; // as torch's padding 1 starts, one position earlier
      mine[name] = (await network.decodedWith({ shift })).picture;
      if (mine !== decoded) return;
    }
    runs.forEach((canvas, at) => drawPhoto(canvas, mine["AB"[at]], SIZE, SIZE));
    for (const one of [start, ...answers]) one.disabled = false;
  }

  function judge() {
    delete section.dataset.bug;
    code.hidden = true;
    answers.forEach((one, at) => one.setAttribute("aria-pressed", String(now.answer === "AB"[at])));
    if (!now.answer) {
      tell(found, "Compare contrast and edges with those of the photo.");
      return;
    }
    const error = (picture) => picture.reduce((sum, x, at) => sum + Math.abs(x - photo.planes[at]), 0) / picture.length;
    const [a, b] = ["A", "B"].map((one) => error(decoded[one]));
    const percent = (x) => `${short(x / 2 * 100, 1)} %`; // of the range from -1 to 1
    tell(found, `${now.answer === wrong() ? "Right" : "No"}: run ${wrong()} pads on both sides. On average A differs from the photo by ${percent(a)} and B by ${percent(b)}. Three times its kernels started a pixel too early, so every map was half a cell off, with zeros at the top and left where the network had never seen any. The layers after them were trained on other numbers, and answer with wrong contrast, colours and rims.`);
    code.show(BOTH_WAYS, wrong() === "B" ? [a, b] : [b, a]);
    section.dataset.bug = now.answer === wrong() ? "found" : "missed";
  }

  return async () => {
    drawPhoto(given, photo.planes, SIZE, SIZE);
    start.disabled ||= !network.possible;
    if (!network.possible) return;
    if (decoded?.run !== now.run || decoded.photo !== photo.pixels) await decode();
    if (decoded.B) judge();
  };
}

// The row with its zeros, the kernel's positions below it, and what comes out. `first` is the column of
// the first number; without it the row is in the middle.
function drawRow(node, { size, kernel, stride, pad: [before, after], count, shown, first = null }) {
  const cell = 40, gap = 4, step = cell + gap, total = before + size + after;
  const most = Math.max(10, total), left = first === null ? (most - total) / 2 : first - before;
  const x = (at) => (left + at) * step;
  const positions = shown ? count : 1, top = cell + 16, line = 13;
  const height = top + positions * line + (shown ? cell + 22 : 0);
  node.setAttribute("viewBox", `0 -4 ${most * step} ${height + 8}`);
  node.setAttribute("aria-label", shown ? `${size} numbers, zeros before: ${before}, after: ${after}; positions of the kernel: ${count}` : `${size} numbers, zeros before: ${before}, after: ${after}`);
  const box = (at, y, kind, text) => [svg("rect", { x: x(at), y, width: cell, height: cell, rx: 5, class: kind }),
    svg("text", { x: x(at) + cell / 2, y: y + cell / 2 + 6, class: `${kind}-text` }, text)];
  node.replaceChildren(
    ...Array.from({ length: total }, (_, at) => {
      const inside = at >= before && at < before + size;
      return box(at, 0, inside ? "in" : "pad", inside ? String(at - before + 1) : "0");
    }).flat(),
    ...Array.from({ length: positions }, (_, at) => svg("line", { x1: x(at * stride) + 3, x2: x(at * stride + kernel) - gap - 3, y1: top + at * line, y2: top + at * line, class: "position" })),
    ...(shown ? Array.from({ length: count }, (_, at) => box(at * stride + (kernel - 1) / 2, top + count * line + 6, "out", String(at + 1))).flat() : []));
}

// The same in two directions: a photo, its zeros, the kernel, and the centres of all its positions.
function drawSquare(node, { size, kernel, stride, pad: [before, after], count, shown }) {
  const total = before + size + after, starts = Array.from({ length: count }, (_, at) => at * stride);
  node.setAttribute("viewBox", `-0.1 -0.1 ${total + 0.2} ${total + 0.2}`);
  node.setAttribute("aria-label", `a photo of ${size} × ${size}; rows and columns of zeros at the top and left: ${before}, at the bottom and right: ${after}${shown ? `; ${count} × ${count} positions` : ""}`);
  const inside = (at) => at >= before && at < before + size;
  node.replaceChildren(
    ...Array.from({ length: total ** 2 }, (_, at) => {
      const i = Math.floor(at / total), j = at % total;
      return svg("rect", { x: j + 0.04, y: i + 0.04, width: 0.92, height: 0.92, rx: 0.12, class: inside(i) && inside(j) ? "in" : "pad" });
    }),
    svg("rect", { x: 0, y: 0, width: kernel, height: kernel, class: "window" }),
    ...(shown ? starts.flatMap((i) => starts.map((j) => svg("circle", { cx: j + kernel / 2, cy: i + kernel / 2, r: 0.2 }))) : []));
}
