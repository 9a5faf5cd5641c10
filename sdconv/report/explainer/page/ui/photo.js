// The photo: the one inside the page, or the reader's own, always 256 x 256.

import { SIZE } from "../core/vae.js";
import { button, el } from "./dom.js";

export class Photo extends EventTarget {
  async load() {
    await this.#take(document.getElementById("photo").textContent.trim(), false);
    this.original = this.pixels;
  }

  async #take(url, own) {
    const image = new Image();
    image.src = url;
    await image.decode();
    const canvas = el("canvas", { width: SIZE, height: SIZE });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const side = Math.min(image.width, image.height);
    context.fillStyle = "#fff"; // below what is transparent
    context.fillRect(0, 0, SIZE, SIZE);
    context.drawImage(image, (image.width - side) / 2, (image.height - side) / 2, side, side, 0, 0, SIZE, SIZE);
    const { data } = context.getImageData(0, 0, SIZE, SIZE), area = SIZE * SIZE;
    this.pixels = new Float32Array(area * 3); // (rows, columns, channels), as workers take it
    this.planes = new Float32Array(area * 3); // (channels, rows, columns)
    this.grey = new Float32Array(area); // 0 to 1
    for (let at = 0; at < area; at++)
      for (let c = 0; c < 3; c++) {
        const x = data[at * 4 + c] / 127.5 - 1;
        this.pixels[at * 3 + c] = this.planes[c * area + at] = x;
        this.grey[at] += data[at * 4 + c] / 765;
      }
    this.canvas = canvas;
    this.own = own;
  }

  async use(file) {
    const url = URL.createObjectURL(file);
    try {
      await this.#take(url, true);
    } catch {
      throw new Error("this file is not a picture that the browser can read");
    } finally {
      URL.revokeObjectURL(url);
    }
    this.dispatchEvent(new Event("change"));
  }

  async restore() {
    await this.#take(document.getElementById("photo").textContent.trim(), false);
    this.pixels = this.original; // the network need not compute again what it has
    this.dispatchEvent(new Event("change"));
  }

  // Buttons for the reader's own photo; dropping one anywhere on the page does the same.
  controls() {
    const note = el("span", { class: "note", role: "status" });
    const file = el("input", { type: "file", accept: "image/*", class: "sr", tabindex: -1, "aria-hidden": "true",
      onchange: () => file.files[0] && this.take(file.files[0]) });
    const back = button("Back to the first photo", () => this.restore(), { class: "quiet", hidden: true });
    const save = button("Save as 256 × 256", () => this.save(), { class: "quiet", hidden: true,
      title: "The pixels that this page computes with, for Python" });
    const node = el("span", { class: "own" }, button("Use your own photo, or drop one anywhere", () => file.click(), { class: "quiet" }), file, save, back, note);
    this.addEventListener("change", () => {
      back.hidden = save.hidden = !this.own;
      note.textContent = this.own ? "Its middle square, scaled to 256 × 256. In Python, read the saved file: to_tensor(read_image(\"photo.png\").image)." : "";
      note.classList.remove("minus");
    });
    this.addEventListener("refused", ({ detail }) => {
      note.textContent = `${detail[0].toUpperCase()}${detail.slice(1)}.`;
      note.classList.add("minus");
    });
    return node;
  }

  async take(file) {
    try {
      await this.use(file);
    } catch (error) {
      this.dispatchEvent(new CustomEvent("refused", { detail: error.message }));
    }
  }

  save() {
    const link = el("a", { download: "photo.png", href: this.canvas.toDataURL("image/png") });
    link.click();
  }

  acceptDrops() {
    const over = (event) => { event.preventDefault(); document.body.classList.add("dropping"); };
    const out = () => document.body.classList.remove("dropping");
    addEventListener("dragover", over);
    addEventListener("dragleave", (event) => { if (!event.relatedTarget) out(); });
    addEventListener("drop", (event) => {
      event.preventDefault();
      out();
      if (event.dataTransfer.files[0]) this.take(event.dataTransfer.files[0]);
    });
  }
}
