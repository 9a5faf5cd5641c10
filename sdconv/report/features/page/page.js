// The feature map in view, its channels, and what the keys do.
"use strict";

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
  document.querySelectorAll("[data-units]").forEach((element) => { element.textContent = `${map.unit}s`; });
  $("previous").disabled = state.map === 0;
  $("next").disabled = state.map === maps.length - 1;
}

function showTime(snapshot) {
  const { halves, half, snapshots } = snapshotsNow();
  $("time").hidden = snapshots.length < 2 && halves.length < 2;
  const slider = $("step");
  ["play", "step", "step-words"].forEach((id) => { $(id).hidden = snapshots.length < 2; });
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

function showImages(snapshot) {
  const canvas = $("pca");
  canvas.width = shown.pca.width;
  canvas.height = shown.pca.height;
  canvas.getContext("2d").drawImage(shown.pca, 0, 0);
  $("pca-note").textContent = `${Math.round(100 * snapshot.pca)} % of variance`;
  canvas.setAttribute("aria-label", "Three principal components as red, green and blue");
  ["mean", "std"].forEach((name, at) => {
    const plane = planeOf(snapshot, shown, at);
    const scale = scaleOf(plane);
    const words = `${name === "mean" ? "Mean" : "Standard deviation"} over ${unitNow()}s`;
    showImage($(name), plane.image, scale, words, snapshot.size);
    showScale($(`${name}-scale`), scale);
  });
}

/** Draws an image of values; the value under the pointer goes to `say`, or into the tooltip. */
function showImage(canvas, image, scale, words, size, say = (value) => { canvas.title = value; }, exact = false) {
  paint(canvas, image, scale);
  canvas.setAttribute("aria-label", `${words}, ${number(scale.low)} to ${number(scale.high)}`);
  canvas.onpointermove = (event) => {
    const area = canvas.getBoundingClientRect();
    const at = (value, most) => Math.max(0, Math.min(most - 1, Math.floor(value * most)));
    const x = at((event.clientX - area.left) / area.width, image.width);
    const y = at((event.clientY - area.top) / area.height, image.height);
    const value = image.values[y * image.width + x];
    const pixel = [[y, size[0], image.height], [x, size[1], image.width]]
      .map(([part, own, side]) => Math.round(((part + 0.5) * own) / side - 0.5));
    say(`row ${pixel[0]}, column ${pixel[1]}: ${exact ? "" : "about "}${number(value)}`);
  };
}

const unitNow = () => maps[state.map].unit; // channel; token or position of attention probabilities
const titleOf = (channel) => `${unitNow()[0].toUpperCase()}${unitNow().slice(1)} ${channel}`;
const channelNow = () => (state.channel !== null && state.channel < shown.count
  ? state.channel : shown.variance.indexOf(shown.variance.reduce((a, b) => Math.max(a, b))));

function showChannel() {
  const channel = Math.max(0, channelNow());
  const { mean, variance } = shown;
  const stats = channelOf(shown, channel);
  const { size, signed } = snapshotNow();
  const scale = scaleOf({ ...stats, signed });
  showImage($("one"), stats.image, scale, titleOf(channel), size);
  showScale($("one-scale"), scale);
  $("one-title").textContent = titleOf(channel);
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
  canvas.setAttribute("aria-label", `Mean and standard deviation of ${order.length} ${unitNow()}s, ${number(low)} to ${number(high)}`);
  const under = (event) => order[Math.floor((event.offsetX - 8) / each)];
  canvas.onpointermove = (event) => {
    const c = under(event);
    canvas.title = c === undefined ? "" : `${unitNow()} ${c}: ${number(shown.mean[c])} ± ${number(spread[c])}`;
  };
  canvas.onclick = (event) => under(event) !== undefined && change({ channel: under(event) });
}

// ---- the channels

let tiles = [];
let sheetUrl = "";

/** The sheet of thumbnails with each channel's bytes as the numbers of its colours. */
function shadedSheet({ signed }) {
  const { sheet, count, columns, width, height, low, high } = shown;
  const scale = (c) => scaleOf({ low: low[c], high: high[c], signed });
  const { name } = scale(0);
  if (name !== "diverging") return { sheet, name }; // the bytes are those of the whole range
  const values = new Uint8Array(sheet.values);
  for (let c = 0; c < count; c++) {
    const table = shades(low[c], high[c], scale(c));
    const start = Math.floor(c / columns) * height * sheet.width + (c % columns) * width;
    for (let y = 0; y < height; y++) {
      const row = start + y * sheet.width;
      for (let x = row; x < row + width; x++) values[x] = table[values[x]];
    }
  }
  return { sheet: { ...sheet, values }, name };
}

function showGrid(snapshot) {
  const grid = $("grid");
  const { count, columns, width, height, variance, mean } = shown;
  order = Array.from({ length: count }, (_, at) => at);
  if (state.sort === "variance") order.sort((a, b) => variance[b] - variance[a] || a - b);
  if (state.sort === "mean") order.sort((a, b) => mean[b] - mean[a] || a - b);
  // of long ones the shorter side grows as wide as a finger or a mouse needs, at first with the longer
  const least = matchMedia("(max-width: 720px), (pointer: coarse)").matches ? 44 : 24;
  const scale = SIZES[state.size] / Math.max(width, height);
  const larger = Math.min(2, Math.max(1, least / (scale * Math.min(width, height))));
  const [wide, high] = [width, height].map((side) => Math.max(least, Math.round(scale * larger * side)));
  URL.revokeObjectURL(sheetUrl);
  const shaded = shadedSheet(snapshot);
  sheetUrl = bitmapUrl(shaded.sheet, COLORMAPS[shaded.name]);
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
    tile.title = `${unitNow()} ${channel}`;
    tile.setAttribute("aria-label", `${titleOf(channel)}, variance ${number(variance[channel])}`);
    tile.setAttribute("aria-pressed", channel === now);
    tile.tabIndex = channel === now ? 0 : -1;
    tile.style.cssText = `height:${high}px;background-size:${whole};image-rendering:${smooth};` +
      `background-position:${-(channel % columns) * wide}px ${-Math.floor(channel / columns) * high}px`;
  });
  if (grid.childElementCount !== count) grid.replaceChildren(...tiles.slice(0, count));
  $("count").textContent = `${count} ${unitNow()}${count === 1 ? "" : "s"}`;
}

function choose(channel) {
  state.channel = channel;
  for (const tile of $("grid").children) {
    const on = Number(tile.dataset.channel) === channel;
    tile.setAttribute("aria-pressed", on);
    tile.tabIndex = on ? 0 : -1;
  }
  showChannel();
  change({ channel }); // also what is compared
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
  segments($("colormap"), CHOICES, state.colormap, (colormap) => change({ colormap }));
  showLayers();
  showCompareChoices(snapshot);
  if (lastMap !== state.map) bringIntoView();
  lastMap = state.map;
  const other = comparedNow();
  const [data, second] = await Promise.all([snapshot, other].map((one) => one && snapshotData(one.id)));
  if (mine !== turn) return; // a newer render has started
  shown = data;
  $("images").hidden = other !== null;
  $("compared").hidden = other === null;
  if (other) showCompared(snapshot, shown, other, second);
  showImages(snapshot);
  showHistogram(snapshot);
  showGrid(snapshot);
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
  c: () => change({ colormap: turned(Object.keys(CHOICES), state.colormap) }),
  l: openLarge,
  t: () => theme(turned(THEMES, $("theme").dataset.name)),
  "/": () => $("search").select(),
  "?": () => $("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target === $("compare")) return;
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
