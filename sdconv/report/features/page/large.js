// One channel at its own resolution, and its download.
"use strict";

const ZOOMS = { fit: "fit", 1: "1×", 2: "2×", 4: "4×", 8: "8×" };
let zoom = "fit";
let large = null; // the image in the dialog: values, width, height, whether they are exact

async function showLarge() {
  const snapshot = snapshotNow();
  const channel = Math.max(0, channelNow());
  const key = `${snapshot.id}/${channel}`;
  const [height, width] = snapshot.size;
  const exact = await exactValues(key);
  if (key !== `${snapshotNow().id}/${Math.max(0, channelNow())}`) return;
  const stats = channelOf(shown, channel);
  const image = exact === null ? stats.image : { values: exact.values, width, height };
  const scale = scaleOf({ ...stats, signed: snapshot.signed });
  large = { ...image, exact: exact !== null, name: `${maps[state.map].name}.call${snapshot.step}.${unitNow()}${channel}` };
  $("large-title").textContent = `${maps[state.map].name}, ${unitNow()} ${channel}`;
  const where = index.store ? `sdconv.open_maps("${index.store}").series("${maps[state.map].name}")` : "the captured maps";
  $("large-note").textContent = exact === null
    ? `A thumbnail of ${image.height} × ${image.width} for a map of ${height} × ${width}, with values in 256 shades. ` +
      `The page has the exact values of ${snapshot.exact.length} ${unitNow()}s, those with the largest variance; those of all: ${where}, or --detail.`
    : `${nameOf(snapshot)}. ${height} × ${width}, exact values in ${exact.dtype}.`;
  showImage($("large-canvas"), image, scale, titleOf(channel), snapshot.size, (words) => {
    $("large-value").textContent = words;
  }, exact !== null);
  showScale($("large-scale"), scale);
  $("npy").disabled = exact === null;
  $("npy").title = exact === null ? "the page does not have these exact values" : "float32, rows × columns";
  segments($("zoom"), ZOOMS, zoom, (name) => { zoom = name; showLarge(); });
  resizeLarge();
  $("large").dataset.shown = key;
}

function resizeLarge() {
  if (!large || !$("large").open) return;
  const room = $("large-room");
  const [height, width] = snapshotNow().size;
  const fits = Math.min(room.clientWidth / width, room.clientHeight / height);
  // whole multiples keep the pixels square and equal
  const factor = zoom === "fit" ? (fits >= 1 ? Math.floor(fits) : fits) : Number(zoom);
  const canvas = $("large-canvas");
  canvas.style.width = `${Math.round(width * factor)}px`;
  canvas.style.height = `${Math.round(height * factor)}px`;
}

function openLarge() {
  if (!shown) return;
  $("large").showModal();
  showLarge();
}

/** The file of a numpy array of float32. */
function npyOf({ values, width, height }) {
  const words = `{'descr': '<f4', 'fortran_order': False, 'shape': (${height}, ${width}), }`;
  const head = words.padEnd(64 * Math.ceil((words.length + 11) / 64) - 11) + "\n";
  const bytes = new Uint8Array(10 + head.length);
  bytes.set([0x93, ...[..."NUMPY"].map((letter) => letter.charCodeAt(0)), 1, 0]);
  new DataView(bytes.buffer).setUint16(8, head.length, true);
  bytes.set([...head].map((letter) => letter.charCodeAt(0)), 10);
  return new Blob([bytes, values], { type: "application/octet-stream" });
}

function download(blob, ending) {
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: `${large.name.replace(/[^\w.-]/g, "_")}.${ending}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function moveLarge(by) {
  const at = order.indexOf(Math.max(0, channelNow())) + by;
  if (at < 0 || at >= order.length) return;
  choose(order[at]);
  showLarge();
}

$("png").addEventListener("click", () => $("large-canvas").toBlob((blob) => download(blob, "png")));
$("npy").addEventListener("click", () => download(npyOf(large), "npy"));
$("large-previous").addEventListener("click", () => moveLarge(-1));
$("large-next").addEventListener("click", () => moveLarge(1));
$("large-close").addEventListener("click", () => $("large").close());
$("large").addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) moveLarge(by);
});
$("enlarge").addEventListener("click", openLarge);
$("one").addEventListener("click", openLarge);
window.addEventListener("resize", resizeLarge);
