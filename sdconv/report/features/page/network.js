// The drawing of the network, the search, and the list of feature maps.
"use strict";

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

