// The page: everything shown follows from `state`, which is kept in the address.
"use strict";

const $ = (id) => document.getElementById(id);
const index = JSON.parse($("index").textContent);
const { maps, blocks, frames } = index;
const SORTS = { number: "number", variance: "variance", mean: "mean" };
const SIZES = { small: 40, medium: 64, large: 128 };
const THEMES = ["auto", "light", "dark"];
const ICONS = {
  auto: '<circle cx="8" cy="8" r="5.5"/><path d="M8 2.5v11M8 4.5h4M8 7h5.3M8 9.5h5"/>',
  light: '<circle cx="8" cy="8" r="3"/><path d="M8 1v1.5M8 13.5V15M1 8h1.5M13.5 8H15M3 3l1 1M12 12l1 1M3 13l1-1M12 4l1-1"/>',
  dark: '<path d="M13.5 9.5A6 6 0 0 1 6.5 2.5a6 6 0 1 0 7 7Z"/>',
};
const START = {
  map: 0, step: null, half: null, sort: "number",
  size: "medium", colormap: "viridis", channel: null, search: "",
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
    step: whole("step"),
    half: parts.get("half"),
    sort: among("sort", Object.keys(SORTS)),
    size: among("size", Object.keys(SIZES)),
    colormap: among("colormap", Object.keys(COLORMAPS)),
    channel: whole("channel"),
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

function stepBy(count) {
  const { snapshots } = snapshotsNow();
  const at = (snapshots.indexOf(snapshotNow()) + count + snapshots.length) % snapshots.length;
  return change({ step: snapshots[at].step });
}

// ---- the network

const frameUrl = cached(8, (id) => URL.createObjectURL(webpOf(stored(id))), URL.revokeObjectURL);
const boxes = [];

function drawNetwork() {
  const { columns, height, lines, levels, kinds } = index.drawing;
  const drawing = $("drawing");
  drawing.style.setProperty("--columns", columns);
  drawing.style.setProperty("--height", height);
  const share = (value, whole) => `${(100 * value) / whole}%`;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${columns} ${height}`);
  svg.setAttribute("aria-hidden", "true");
  for (const line of lines) {
    const path = document.createElementNS(svg.namespaceURI, "path");
    path.setAttribute("d", line.d);
    if (line.skip) path.setAttribute("class", "skipline");
    path.ends = line.ends;
    svg.append(path);
  }
  drawing.append(svg);
  for (const { x, y, words } of levels) {
    const style = `left:${share(x, columns)};top:${share(y, height)};transform:translate(-50%,-50%)`;
    drawing.append(make("span", { class: "level", style }, words));
  }
  blocks.forEach((block, at) => {
    const some = block.maps.length;
    const words = `${block.name}, ${block.kind}${some ? "" : ", not captured"}`;
    const box = make("button", {
      type: "button", class: "box", "data-kind": block.kind, "data-block": block.name, tabindex: -1,
      title: block.name, "aria-label": words, onclick: () => change({ map: block.main }),
      style: `left:${share(block.x, columns)};top:${share(block.y, height)};` +
        `width:${share(index.drawing.side, columns)};height:${share(index.drawing.side, height)}`,
    });
    box.disabled = !some;
    box.addEventListener("keydown", (event) => moveAmongBlocks(event, at));
    boxes.push(box);
    drawing.append(box);
  });
  $("legend").append(...kinds.map(([kind, words]) =>
    make("li", {}, make("i", { "data-kind": kind }), words)));
}

function moveAmongBlocks(event, at) {
  const here = blocks[at];
  const open = blocks.map((_, i) => i).filter((i) => blocks[i].maps.length);
  const position = open.indexOf(at);
  let to;
  if (event.key === "ArrowLeft") to = open[position - 1];
  else if (event.key === "ArrowRight") to = open[position + 1];
  else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
    const sign = event.key === "ArrowUp" ? -1 : 1;
    const rows = open.filter((i) => sign * (blocks[i].y - here.y) > 0.1);
    const away = (i) => 10 * Math.abs(blocks[i].y - here.y) + Math.abs(blocks[i].x - here.x);
    to = rows.sort((a, b) => away(a) - away(b))[0];
  } else return;
  event.preventDefault();
  if (to === undefined) return;
  change({ map: blocks[to].main });
  boxes[to].focus();
}

function showNetwork() {
  const now = maps[state.map].block;
  const snapshot = snapshotNow();
  const frame = frames.find(({ step, half }) => step === snapshot.step && half === snapshot.half) ?? frames[0];
  const url = frameUrl(frame.id);
  const { columns } = frame;
  const rows = Math.ceil(index.tiles / columns);
  const among = new Set(matching().map((at) => maps[at].block));
  boxes.forEach((box, at) => {
    box.toggleAttribute("aria-current", at === now);
    if (at === now) box.setAttribute("aria-current", "true");
    box.tabIndex = at === now ? 0 : -1;
    box.classList.toggle("dim", Boolean(state.search) && !among.has(at));
    const { tile } = blocks[at];
    if (tile === null) return;
    const part = (position, all) => (all > 1 ? (100 * position) / (all - 1) : 0);
    box.style.backgroundImage = `url(${url})`;
    box.style.backgroundSize = `${100 * columns}% ${100 * rows}%`;
    box.style.backgroundPosition = `${part(tile % columns, columns)}% ${part(Math.floor(tile / columns), rows)}%`;
  });
  for (const path of $("drawing").querySelectorAll("path")) {
    path.classList.toggle("lit", path.ends.includes(now));
  }
}

/** Scrolls to the block in view if the drawing is wider than its container. */
function bringIntoView() {
  const box = boxes[maps[state.map].block];
  const room = $("scroll");
  room.scrollLeft = box.offsetLeft + box.offsetWidth / 2 - room.clientWidth / 2;
  const item = $("list").querySelector("[aria-current]");
  const list = $("list");
  if (item) list.scrollTop = item.offsetTop - list.offsetTop - list.clientHeight / 2;
}

// ---- search and the list of feature maps

function matching() {
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  const escaped = (word) => word.replace(/[.+^${}()|[\]\\]/g, "\\$&");
  const patterns = words.map((word) => new RegExp(escaped(word).replaceAll("*", ".*").replaceAll("?", ".")));
  return maps.map((_, at) => at).filter((at) => {
    const text = `${maps[at].name} ${blocks[maps[at].block].kind}`.toLowerCase();
    return patterns.every((pattern) => pattern.test(text));
  });
}

const items = maps.map((map) => {
  const { channels, size } = map.snapshots[0];
  return make("li", {}, make("a", { href: "#map=" + encodeURIComponent(map.name).replaceAll("%3A", ":") },
    map.name, make("span", {}, `${channels} × ${size.join(" × ")}`)));
});

function showList() {
  const found = matching();
  const open = new Set(found);
  items.forEach((item, at) => {
    item.hidden = !open.has(at);
    const link = item.firstChild;
    if (at === state.map) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  });
  $("found").textContent = state.search ? `${found.length} of ${maps.length} feature maps` : `${maps.length} feature maps`;
  $("list").hidden = !found.length;
  if ($("search").value !== state.search) $("search").value = state.search;
}

// ---- one feature map

function showFacts(snapshot) {
  const map = maps[state.map];
  const block = blocks[map.block];
  document.title = `${map.name} · ${index.title}`;
  $("name").textContent = map.name;
  $("block").textContent = block.words;
  $("points").replaceChildren(...(block.maps.length < 2 ? [] : block.maps.map((at) =>
    make("button", { type: "button", "aria-pressed": at === state.map, onclick: () => change({ map: at }) },
      maps[at].label))));
  terms($("about-map"), [
    ["shape", `${snapshot.channels} × ${snapshot.size.join(" × ")}`],
    ...map.facts,
    ["values", `${number(snapshot.low)} to ${number(snapshot.high)}`],
  ]);
  $("not-finite").hidden = !snapshot.notFinite;
  $("not-finite").textContent = snapshot.notFinite ? `${snapshot.notFinite} values are NaN or infinite, and are left out here.` : "";
  $("previous").disabled = state.map === 0;
  $("next").disabled = state.map === maps.length - 1;
}

function showTime(snapshot) {
  const { halves, half, snapshots } = snapshotsNow();
  $("time").hidden = snapshots.length < 2 && halves.length < 2;
  const slider = $("step");
  slider.max = snapshots.length - 1;
  slider.value = snapshots.indexOf(snapshot);
  const timestep = snapshot.timestep === null ? "" : `, t = ${number(snapshot.timestep)}`;
  const words = `call ${snapshot.step}${timestep}`;
  $("step-words").textContent = words;
  slider.setAttribute("aria-valuetext", words);
  $("halves").hidden = halves.length < 2;
  segments($("halves"), Object.fromEntries(halves.map((name) => [name, name])), half, (name) => change({ half: name }));
}

function segments(group, choices, now, choose) {
  const names = Object.keys(choices);
  let buttons = [...group.querySelectorAll("button")];
  if (buttons.map((button) => button.dataset.choice).join() !== names.join()) {
    buttons.forEach((button) => button.remove());
    buttons = names.map((name) => make("button", { type: "button", "data-choice": name, onclick: () => choose(name) }, choices[name]));
    group.append(...buttons);
  }
  buttons.forEach((button) => button.setAttribute("aria-pressed", button.dataset.choice === String(now)));
}

function scaleOf(element, low, high) {
  element.replaceChildren(number(low), make("i"), number(high));
}

function showImages(snapshot) {
  const colormap = COLORMAPS[state.colormap];
  const canvas = $("pca");
  canvas.width = shown.pca.width;
  canvas.height = shown.pca.height;
  canvas.getContext("2d").drawImage(shown.pca, 0, 0);
  $("pca-note").textContent = `${Math.round(100 * snapshot.pca)} % of variance`;
  canvas.setAttribute("aria-label", "Three principal components as red, green and blue");
  ["mean", "std"].forEach((name, at) => {
    const [low, high] = snapshot.planes[at];
    const tile = tileOf(shown.planes, shown.planesColumns, shown.planesWidth, shown.planesHeight, at);
    showImage($(name), tile, colormap, low, high, name === "mean" ? "Mean over channels" : "Standard deviation over channels");
    scaleOf($(`${name}-scale`), low, high);
  });
}

function showImage(canvas, tile, colormap, low, high, words) {
  paint(canvas, tile, colormap);
  canvas.setAttribute("aria-label", `${words}, ${number(low)} to ${number(high)}`);
  canvas.onpointermove = (event) => {
    const area = canvas.getBoundingClientRect();
    const at = (value, most) => Math.max(0, Math.min(most - 1, Math.floor(value * most)));
    const x = at((event.clientX - area.left) / area.width, tile.width);
    const y = at((event.clientY - area.top) / area.height, tile.height);
    const value = low + ((high - low) * tile.values[y * tile.width + x]) / 255;
    const { size } = snapshotNow();
    const pixel = [Math.round(((y + 0.5) * size[0]) / tile.height - 0.5), Math.round(((x + 0.5) * size[1]) / tile.width - 0.5)];
    canvas.title = `row ${pixel[0]}, column ${pixel[1]}: about ${number(value)}`;
  };
}

const channelNow = () => (state.channel !== null && state.channel < shown.count
  ? state.channel : shown.variance.indexOf(shown.variance.reduce((a, b) => Math.max(a, b))));

function showChannel() {
  const channel = Math.max(0, channelNow());
  const { low, high, mean, variance } = shown;
  const tile = tileOf(shown.sheet, shown.columns, shown.width, shown.height, channel);
  showImage($("one"), tile, COLORMAPS[state.colormap], low[channel], high[channel], `Channel ${channel}`);
  scaleOf($("one-scale"), low[channel], high[channel]);
  $("one-title").textContent = `Channel ${channel}`;
  $("one-note").textContent = `${number(mean[channel])} ± ${number(Math.sqrt(variance[channel]))}`;
  drawStrip(channel);
}

function showHistogram({ counts, low, high }) {
  const top = Math.log1p(Math.max(...counts));
  const bars = counts.map((count, at) => {
    const height = top ? (82 * Math.log1p(count)) / top : 0;
    return `<rect x="${(100 * at) / counts.length}%" y="${90 - height}" width="${96 / counts.length}%" height="${height}"/>`;
  });
  const zero = low < 0 && high > 0 ? (100 * -low) / (high - low) : null;
  const mark = zero === null ? "" : `<line x1="${zero}%" x2="${zero}%" y1="4" y2="94" stroke-dasharray="2 3"/>`;
  const middle = zero !== null && zero > 18 && zero < 82 ? `<text x="${zero}%" y="108" text-anchor="middle">0</text>` : "";
  $("histogram").innerHTML = `<svg role="img" aria-label="Histogram of the values, ${number(low)} to ${number(high)}">` +
    `<svg x="8" width="calc(100% - 16px)" style="width:calc(100% - 16px)">${bars.join("")}${mark}${middle}` +
    `<text x="0" y="108">${number(low)}</text><text x="100%" y="108" text-anchor="end">${number(high)}</text></svg></svg>`;
}

function drawStrip(channel) {
  const canvas = $("strip");
  const ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const spread = Array.from(shown.variance, Math.sqrt);
  const low = Math.min(...order.map((c) => shown.mean[c] - spread[c]));
  const high = Math.max(...order.map((c) => shown.mean[c] + spread[c]));
  const y = (value) => 8 + (height - 16) * (high > low ? (high - value) / (high - low) : 0.5);
  const each = (width - 16) / order.length;
  const [accent, ink, line] = ["--accent", "--ink", "--line"].map((name) => {
    canvas.style.color = `var(${name})`; // light-dark() is resolved only in colour properties
    return getComputedStyle(canvas).color;
  });
  pen.fillStyle = line;
  if (low < 0 && high > 0) pen.fillRect(8, y(0), width - 16, 1);
  order.forEach((c, at) => {
    const left = 8 + at * each;
    const wide = Math.max(each * 0.8, 0.7);
    pen.globalAlpha = c === channel ? 1 : 0.35;
    pen.fillStyle = accent;
    pen.fillRect(left, y(shown.mean[c] + spread[c]), wide, Math.max(1, y(shown.mean[c] - spread[c]) - y(shown.mean[c] + spread[c])));
    pen.globalAlpha = 1;
    pen.fillStyle = ink;
    pen.fillRect(left, y(shown.mean[c]) - 0.75, wide, 1.5);
    if (c === channel) pen.fillRect(left + wide / 2 - 1.5, height - 5, 3, 3);
  });
  canvas.setAttribute("aria-label", `Mean and standard deviation of ${order.length} channels, ${number(low)} to ${number(high)}`);
  const under = (event) => order[Math.floor((event.offsetX - 8) / each)];
  canvas.onpointermove = (event) => {
    const c = under(event);
    canvas.title = c === undefined ? "" : `channel ${c}: ${number(shown.mean[c])} ± ${number(spread[c])}`;
  };
  canvas.onclick = (event) => under(event) !== undefined && change({ channel: under(event) });
}

// ---- the channels

let tiles = [];
let sheetUrl = "";

function showGrid() {
  const grid = $("grid");
  const { count, columns, width, height, variance, mean } = shown;
  order = Array.from({ length: count }, (_, at) => at);
  if (state.sort === "variance") order.sort((a, b) => variance[b] - variance[a] || a - b);
  if (state.sort === "mean") order.sort((a, b) => mean[b] - mean[a] || a - b);
  const long = Math.max(width, height);
  const wide = Math.max(8, Math.round((SIZES[state.size] * width) / long));
  const high = Math.max(8, Math.round((SIZES[state.size] * height) / long));
  URL.revokeObjectURL(sheetUrl);
  sheetUrl = bitmapUrl(shown.sheet, COLORMAPS[state.colormap]);
  grid.style.setProperty("--sheet", `url(${sheetUrl})`);
  grid.style.setProperty("--tile", `${wide}px`);
  const rows = shown.sheet.height / height;
  const whole = `${columns * wide}px ${rows * high}px`;
  const smooth = wide < 2 * width ? "auto" : "pixelated";
  while (tiles.length < count) tiles.push(make("button", { type: "button", class: "tile" }));
  const now = channelNow();
  order.forEach((channel, at) => {
    const tile = tiles[at];
    tile.dataset.channel = channel;
    tile.title = `channel ${channel}`;
    tile.setAttribute("aria-label", `Channel ${channel}, variance ${number(variance[channel])}`);
    tile.setAttribute("aria-pressed", channel === now);
    tile.tabIndex = channel === now ? 0 : -1;
    tile.style.cssText = `height:${high}px;background-size:${whole};image-rendering:${smooth};` +
      `background-position:${-(channel % columns) * wide}px ${-Math.floor(channel / columns) * high}px`;
  });
  if (grid.childElementCount !== count) grid.replaceChildren(...tiles.slice(0, count));
  $("count").textContent = `${count} channel${count === 1 ? "" : "s"}`;
}

function choose(channel) {
  state.channel = channel;
  for (const tile of $("grid").children) {
    const on = Number(tile.dataset.channel) === channel;
    tile.setAttribute("aria-pressed", on);
    tile.tabIndex = on ? 0 : -1;
  }
  showChannel();
  change({ channel });
}

function moveAmongChannels(event) {
  const at = [...$("grid").children].indexOf(event.target);
  const across = getComputedStyle($("grid")).gridTemplateColumns.split(" ").length;
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across, Home: -at, End: order.length - 1 - at }[event.key];
  if (at < 0 || by === undefined) return;
  event.preventDefault();
  const tile = $("grid").children[at + by];
  if (!tile) return;
  $("grid").querySelector('[tabindex="0"]').tabIndex = -1;
  tile.tabIndex = 0;
  tile.focus();
}

// ---- everything

let turn = 0;
let lastMap = null;
async function render() {
  const mine = ++turn;
  const snapshot = snapshotNow();
  showNetwork();
  showList();
  showFacts(snapshot);
  showTime(snapshot);
  segments($("sort"), SORTS, state.sort, (sort) => change({ sort }));
  segments($("size"), { small: "S", medium: "M", large: "L" }, state.size, (size) => change({ size }));
  segments($("colormap"), { grey: "grey", viridis: "viridis" }, state.colormap, (colormap) => change({ colormap }));
  const ramp = [0, 64, 128, 191, 255].map((grey) => `rgb(${COLORMAPS[state.colormap][grey]})`);
  document.documentElement.style.setProperty("--ramp", `linear-gradient(90deg, ${ramp})`);
  if (lastMap !== state.map) bringIntoView();
  lastMap = state.map;
  const data = await snapshotData(snapshot.id);
  if (mine !== turn) return; // a newer render has started
  shown = data;
  showImages(snapshot);
  showHistogram(snapshot);
  showGrid();
  showChannel();
  document.documentElement.dataset.shown = `${maps[state.map].name} ${snapshot.step} ${state.sort}`;
}

let playing = 0;
function play(on = !playing) {
  clearInterval(playing);
  playing = on ? setInterval(() => stepBy(1), 600) : 0;
  $("play").setAttribute("aria-pressed", on);
  $("play").setAttribute("aria-label", on ? "Stop" : "Play");
  $("play").textContent = on ? "❚❚" : "▶";
}

function theme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").innerHTML = `<svg viewBox="0 0 16 16" aria-hidden="true">${ICONS[name]}</svg>`;
  $("theme").setAttribute("aria-label", `Theme: ${name === "auto" ? "system" : name}`);
  $("theme").title = $("theme").getAttribute("aria-label");
  $("theme").dataset.name = name;
  try { localStorage.setItem("sdconv-theme", name); } catch { /* some browsers have no storage for local files */ }
  if (shown) showChannel();
}

const turned = (choices, now) => choices[(choices.indexOf(now) + 1) % choices.length];
const KEYS = {
  j: () => state.map < maps.length - 1 && change({ map: state.map + 1 }),
  k: () => state.map > 0 && change({ map: state.map - 1 }),
  "[": () => stepBy(-1),
  "]": () => stepBy(1),
  p: () => snapshotsNow().snapshots.length > 1 && play(),
  h: () => change({ half: turned(snapshotsNow().halves, snapshotsNow().half) }),
  s: () => change({ sort: turned(Object.keys(SORTS), state.sort) }),
  c: () => change({ colormap: turned(Object.keys(COLORMAPS), state.colormap) }),
  t: () => theme(turned(THEMES, $("theme").dataset.name)),
  "/": () => $("search").select(),
  "?": () => $("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  if (event.target === $("search")) {
    if (event.key === "Enter" && matching().length) change({ map: matching()[0] });
    if (event.key === "Escape") {
      change({ search: "" });
      event.target.blur();
    }
    return;
  }
  if (!(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
});
$("search").addEventListener("input", (event) => {
  state.search = event.target.value;
  showNetwork();
  showList();
  change({});
});
$("step").addEventListener("input", (event) => {
  play(false);
  change({ step: snapshotsNow().snapshots[Number(event.target.value)].step });
});
$("skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("view").focus();
  $("view").scrollIntoView();
});
$("previous").addEventListener("click", KEYS.k);
$("next").addEventListener("click", KEYS.j);
$("play").addEventListener("click", () => play());
$("theme").addEventListener("click", KEYS.t);
$("help").addEventListener("click", KEYS["?"]);
$("grid").addEventListener("click", (event) => {
  const tile = event.target.closest(".tile");
  if (tile) choose(Number(tile.dataset.channel));
});
$("grid").addEventListener("keydown", moveAmongChannels);
window.addEventListener("hashchange", () => {
  // this event comes late: the state may have changed since this page wrote the address
  if (location.hash === written) return;
  clearTimeout(later);
  written = location.hash;
  fromAddress();
  render();
});
window.addEventListener("resize", () => shown && showChannel());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => shown && showChannel());

$("title").textContent = index.title;
terms($("facts"), index.facts);
if (index.image) {
  $("image").src = index.image;
  $("image").hidden = false;
}
$("list").append(...items);
drawNetwork();
let before = "auto";
try { before = localStorage.getItem("sdconv-theme") ?? "auto"; } catch { /* as above */ }
theme(THEMES.includes(before) ? before : "auto");
fromAddress();
render();
