// What is shown follows from `state`, which is kept in the address.
"use strict";

const $ = (id) => document.getElementById(id);
const index = JSON.parse($("index").textContent);
const { maps, blocks, frames, kernels } = index;
const SORTS = { number: "number", variance: "variance", mean: "mean" };
const SIZES = { small: 44, medium: 64, large: 128 };
const THEMES = ["auto", "light", "dark"];
const ICONS = {
  auto: '<circle cx="8" cy="8" r="5.5"/><path d="M8 2.5v11M8 4.5h4M8 7h5.3M8 9.5h5"/>',
  light: '<circle cx="8" cy="8" r="3"/><path d="M8 1v1.5M8 13.5V15M1 8h1.5M13.5 8H15M3 3l1 1M12 12l1 1M3 13l1-1M12 4l1-1"/>',
  dark: '<path d="M13.5 9.5A6 6 0 0 1 6.5 2.5a6 6 0 1 0 7 7Z"/>',
};
const START = {
  map: index.start.map, step: index.start.step, half: null, sort: "number",
  size: "medium", colormap: "auto", channel: null, search: "", compare: null,
};
const state = { ...START };
let order = []; // the sorted channels
let shown = null; // the data of the snapshot in view

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function number(value) {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2).replace("-", "−");
  return String(Number(value.toPrecision(3))).replace("-", "−");
}

const terms = (element, pairs) => element.replaceChildren(...pairs.map(([term, words]) =>
  make("div", {}, make("dt", {}, term), make("dd", {}, words))));

// ---- the address

function address() {
  const parts = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (name === "map") parts.set("map", maps[value].name);
    else if (value !== START[name] && value !== null) parts.set(name, value);
  }
  // readable: a fragment may contain colons
  return "#" + parts.toString().replaceAll("%3A", ":");
}

function fromAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const among = (name, choices) => (choices.includes(parts.get(name)) ? parts.get(name) : START[name]);
  const whole = (name) => (/^\d+$/.test(parts.get(name) ?? "") ? Number(parts.get(name)) : null);
  const map = maps.findIndex(({ name }) => name === parts.get("map"));
  Object.assign(state, {
    map: map < 0 ? START.map : map,
    step: whole("step") ?? START.step,
    half: parts.get("half"),
    sort: among("sort", Object.keys(SORTS)),
    size: among("size", Object.keys(SIZES)),
    colormap: among("colormap", Object.keys(CHOICES)),
    channel: whole("channel"),
    compare: parts.get("compare"),
    search: parts.get("search") ?? "",
  });
}

let later = 0;
let written = ""; // the address that this page wrote last
function write(put) {
  put(address());
  written = location.hash;
}

function change(changes) {
  const opens = "map" in changes && changes.map !== state.map;
  Object.assign(state, changes);
  clearTimeout(later);
  // browsers limit how often the address may change, and a slider changes it often
  if (opens) write((to) => { location.hash = to; });
  else later = setTimeout(() => write((to) => location.replace(to)), 200);
  return render();
}

// ---- the snapshot in view

function snapshotsNow() {
  const every = maps[state.map].snapshots;
  const halves = [...new Set(every.map((snapshot) => snapshot.half))];
  const half = halves.includes(state.half) ? state.half : halves[0];
  return { halves, half, snapshots: every.filter((snapshot) => snapshot.half === half) };
}

function snapshotNow() {
  const { snapshots } = snapshotsNow();
  const away = (snapshot) => Math.abs(snapshot.step - (state.step ?? snapshots[0].step));
  return snapshots.reduce((best, snapshot) => (away(snapshot) < away(best) ? snapshot : best));
}

/** What another snapshot of this feature map is called in the address: its step, and its half. */
const keyOf = ({ step, half }) => (half === null ? `${step}` : `${step} ${half}`);

/** The snapshot to compare with; null for none. */
function comparedNow() {
  if (state.compare === null) return null;
  const others = maps[state.map].snapshots.filter((one) => one !== snapshotNow());
  return others.find((one) => keyOf(one) === state.compare) ?? null;
}

function nameOf({ step, timestep, half }) {
  const words = `call ${step}${timestep === null ? "" : `, t = ${number(timestep)}`}`;
  return half === null ? words : `${half}, ${words}`;
}

function stepBy(count) {
  const { snapshots } = snapshotsNow();
  const at = (snapshots.indexOf(snapshotNow()) + count + snapshots.length) % snapshots.length;
  return change({ step: snapshots[at].step });
}

