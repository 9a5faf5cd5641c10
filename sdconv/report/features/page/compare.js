// Two snapshots of a feature map side by side, with their difference.
"use strict";

function showCompareChoices(snapshot) {
  const every = maps[state.map].snapshots;
  const options = every.filter((one) => one !== snapshot)
    .map((one) => make("option", { value: keyOf(one) }, nameOf(one)));
  $("compare").replaceChildren(make("option", { value: "" }, "nothing"), ...options);
  const other = comparedNow();
  $("compare").value = other === null ? "" : keyOf(other);
  $("compare-with").hidden = every.length < 2;
}

/** Values at the size of another image, by the nearest pixel. */
function resized(image, { width, height }) {
  if (image.width === width && image.height === height) return image;
  const values = new Float32Array(width * height);
  for (let y = 0; y < height; y++) {
    const row = Math.floor(((y + 0.5) * image.height) / height);
    for (let x = 0; x < width; x++) {
      values[y * width + x] = image.values[row * image.width + Math.floor(((x + 0.5) * image.width) / width)];
    }
  }
  return { values, width, height };
}

/** The image of a plane (mean or deviation), and the ends of its values. */
function planeOf(snapshot, data, at) {
  const [low, high, min, max] = snapshot.planes[at];
  const tile = tileOf(data.planes, data.planesColumns, data.planesWidth, data.planesHeight, at);
  return { image: valuesOf(tile, low, high), low, high, min, max };
}

function channelOf(data, channel) {
  const tile = tileOf(data.sheet, data.columns, data.width, data.height, channel);
  const [low, high, min, max] = [data.low, data.high, data.min, data.max].map((values) => values[channel]);
  return { image: valuesOf(tile, low, high), low, high, min, max };
}

function showCompared(one, first, two, second) {
  const channel = Math.max(0, channelNow());
  const rows = [[`Mean over ${unitNow()}s`, planeOf(one, first, 0), planeOf(two, second, 0)],
    [`Standard deviation over ${unitNow()}s`, planeOf(one, first, 1), planeOf(two, second, 1)]];
  if (channel < second.count) {
    rows.unshift([titleOf(channel), channelOf(first, channel), channelOf(second, channel)]);
  }
  const cells = [nameOf(one), nameOf(two), "difference"].map((words, at) =>
    make("p", { class: "versus", title: words }, make("b", {}, ["A", "B", "B − A"][at]), at < 2 ? ` ${words}` : ""));
  const figure = (words, image, scale, size) => {
    const canvas = make("canvas", { role: "img" });
    const bar = make("p", { class: "scale" });
    showImage(canvas, image, scale, words, size);
    showScale(bar, scale);
    return make("figure", {}, canvas, bar);
  };
  for (const [title, a, b] of rows) {
    const both = (name, of) => of(a[name], b[name]);
    const scale = scaleOf({
      low: both("low", Math.min), high: both("high", Math.max),
      min: both("min", Math.min), max: both("max", Math.max),
      signed: title === titleOf(channel) ? one.signed || two.signed : undefined,
    });
    const second = resized(b.image, a.image);
    const values = second.values.map((value, i) => value - a.image.values[i]);
    const sorted = Float32Array.from(values).sort();
    const end = (share) => sorted[Math.round(share * (sorted.length - 1))];
    const most = Math.max(-end(0.005), end(0.995), 0);
    const apart = {
      name: "diverging", low: -most, high: most, min: sorted[0], max: sorted[sorted.length - 1],
      below: sorted[0] < -most, above: sorted[sorted.length - 1] > most,
    };
    const shownNow = figure(`${title}, A`, a.image, scale, one.size);
    if (title === titleOf(channel)) {
      const canvas = shownNow.firstChild;
      canvas.classList.add("opens");
      canvas.title = "Enlarge and download";
      canvas.onclick = openLarge;
    }
    cells.push(make("h3", {}, title), shownNow,
      figure(`${title}, B`, b.image, scale, two.size),
      figure(`${title}, B minus A`, { ...a.image, values }, apart, one.size));
  }
  const colours = [[first, one], [second, two]].map(([data, { pca }]) => {
    const canvas = make("canvas", { role: "img", "aria-label": "Three principal components" });
    canvas.width = data.pca.width;
    canvas.height = data.pca.height;
    canvas.getContext("2d").drawImage(data.pca, 0, 0);
    return make("figure", {}, canvas, make("p", { class: "scale" }, `${Math.round(100 * pca)} % of variance`));
  });
  cells.push(make("h3", {}, "Principal components"), ...colours,
    make("p", { class: "found" }, "Each image has components of its own, so there is no difference to show."));
  $("compared").replaceChildren(...cells);
}

$("compare").addEventListener("change", (event) => change({ compare: event.target.value || null }));
