// Elements, and the controls that sections share.

const NAMESPACE = "http://www.w3.org/2000/svg";

function filled(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const el = (tag, properties = {}, ...children) => filled(document.createElement(tag), properties, children);

export const svg = (tag, properties = {}, ...children) =>
  filled(document.createElementNS(NAMESPACE, tag), properties, children);

// Trusted text of this page as elements.
export function html(text) {
  const template = document.createElement("template");
  template.innerHTML = text.trim();
  return template.content;
}

export function button(text, onclick, properties = {}) {
  return el("button", { type: "button", onclick, ...properties }, text);
}

// A range with its label and its value in words.
export function slider({ label, min, max, step = 1, value, words = (x) => x, oninput }) {
  const output = el("output", { "aria-live": "off" }, String(words(value)));
  const input = el("input", { type: "range", min, max, step, value, oninput: () => oninput(Number(input.value)) });
  const node = el("label", { class: "slider" }, el("span", {}, label), input, output);
  node.set = (now, limit = max) => {
    input.max = limit;
    input.value = now;
    output.textContent = String(words(now));
    input.setAttribute("aria-valuetext", String(words(now)));
  };
  node.set(value);
  return node;
}

// One of several, as radio buttons in a row.
let groups = 0;
export function choice({ label, options, value, onchange }) {
  const name = `choice-${++groups}`;
  const inputs = options.map(([one]) =>
    el("input", { type: "radio", name, value: one, onchange: () => onchange(one) }));
  const node = el("fieldset", { class: "choice" }, el("legend", {}, label),
    options.map(([, text], at) => el("label", {}, inputs[at], el("span", {}, text))));
  node.set = (now) => inputs.forEach((input) => { input.checked = input.value === String(now); });
  node.set(value);
  return node;
}

export function select({ label, options, value, onchange }) {
  const input = el("select", { onchange: () => onchange(input.value) },
    options.map(([one, text]) => el("option", { value: one }, text)));
  const node = el("label", { class: "select" }, el("span", {}, label), input);
  node.set = (now) => { input.value = now; };
  node.set(value);
  return node;
}

// A switch.
export function toggle({ label, value, onchange }) {
  const input = el("input", { type: "checkbox", role: "switch", onchange: () => onchange(input.checked) });
  const node = el("label", { class: "toggle" }, input, el("i"), el("span", {}, label));
  node.set = (now) => { input.checked = now; };
  node.set(value);
  return node;
}

export const SETUP = `import torch
import sdconv
from sdconv.convolution.reference import conv2d_reference, convolve
from sdconv.images import example_image, to_tensor

vae = sdconv.load("tiny-vae", dtype=torch.float32)
photo = to_tensor(example_image())  # (1, 3, 256, 256), -1 to 1`;

// The Python that prints a number of the page, and that number; hidden until there is one.
export function python(title = "The same in Python") {
  const code = el("code"), about = el("span"), prints = el("output", { "aria-live": "off" });
  const copy = button("Copy", async () => {
    const text = `${SETUP}\n\n${code.textContent}\n`;
    try {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    } catch {
      const range = document.createRange();
      range.selectNodeContents(code);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      copy.textContent = "Selected";
    }
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  }, { class: "quiet", title: "Copy it with the lines that it needs" });
  const node = el("figure", { class: "python" },
    el("figcaption", {}, title, copy),
    el("details", {}, el("summary", {}, "after these first lines"), el("pre", {}, SETUP)),
    el("pre", { tabindex: 0, "aria-label": "Python code" }, code), el("p", {}, about, prints));
  node.hidden = true;
  node.show = (text, value) => {
    code.textContent = text;
    // Python writes 2.0 where a tensor's number is whole
    const tensor = /\.(item|tolist)\(\)/.test(text);
    about.textContent = [value].flat().every(Number.isInteger) ? "prints " : "prints, to seven digits, ";
    const one = (x) => (tensor && Number.isInteger(x) ? `${x}.0` : printed(x));
    prints.textContent = Array.isArray(value) ? `[${value.map(one).join(", ")}]` : one(value);
    node.dataset.value = JSON.stringify(value);
    node.hidden = false;
  };
  return node;
}

// A number as Python prints it, to seven digits.
export const printed = (value) =>
  typeof value !== "number" ? String(value)
    : Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(7)));

// A number for people: a true minus, few digits.
export function short(value, digits = 2) {
  const text = Math.abs(value) >= 1000 ? Math.round(value).toString() : value.toFixed(digits);
  return text.replace("-", "−").replace(/^−(0(\.0*)?)$/, "$1");
}

export const grouped = (count) => Math.round(count).toLocaleString("en").replaceAll(",", " ");

// Sets a status's text, unless it says that already: what is set is spoken.
export function tell(node, ...parts) {
  if (parts.map((part) => part.textContent ?? part).join("") !== node.textContent) node.replaceChildren(...parts);
}

// Says something to screen readers.
export function say(text) {
  document.getElementById("said").textContent = text;
}
