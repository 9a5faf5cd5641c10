// Elements, and the controls that sections share.

import { printed } from "./numbers.js";

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

// Trusted text of this page as elements; lines do not break at a ×.
export function html(text) {
  const template = document.createElement("template");
  template.innerHTML = text.trim().replaceAll(" × ", "\u00a0×\u00a0");
  return template.content;
}

// A link to the explanation of a term.
export const term = (id, text) => el("a", { class: "term", href: `#word-${id}` }, text);

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

// Text fields for lists of numbers, {name: {label, kind}}, and a note on what is wrong with what was
// typed. `read` makes a list of a text, or null; `onlist` is given the text of each list that is typed.
export function listFields(fields, { read, rule, onlist }) {
  const problem = el("p", { class: "note minus", role: "alert" });
  const inputs = Object.fromEntries(Object.entries(fields).map(([name, { kind }]) => [name, el("input", {
    type: "text", class: kind, spellcheck: "false", autocomplete: "off",
    oninput: ({ target }) => { if (judge(name)) onlist(name, target.value); },
    onblur: () => node.set(shown),
  })]));
  const judge = (name) => {
    inputs[name].setAttribute("aria-invalid", String(!read(inputs[name].value, name)));
    const wrong = Object.keys(inputs).find((one) => inputs[one].getAttribute("aria-invalid") === "true");
    tell(problem, wrong ? rule(wrong) : "");
    return inputs[name].getAttribute("aria-invalid") === "false";
  };
  const node = el("div", { class: "fields" }, el("div", { class: "controls" }, Object.entries(fields).map(([name, { label, kind }]) =>
    el("label", { class: "text" }, el("span", { class: kind }, label), inputs[name]))), problem);
  let shown = {};
  // shows the lists in force; what is being typed stays
  node.set = (values) => {
    shown = values;
    for (const [name, input] of Object.entries(inputs))
      if (document.activeElement !== input) {
        input.value = values[name];
        judge(name);
      }
  };
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

// The Python that prints a number of the page: its last statement, what that prints, and, folded,
// the lines before it. Hidden until there is a number. The number is a float unless it is said to be an int.
export function python(title = "The same in Python") {
  const before = el("code"), last = el("code"), about = el("span"), prints = el("output", { "aria-live": "off" });
  const copy = button("Copy", async () => {
    const text = `${SETUP}\n\n${before.textContent}${last.textContent}\n`;
    try {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    } catch {
      before.closest("details").open = true;
      getSelection().selectAllChildren(lines);
      copy.textContent = "Selected";
    }
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  }, { class: "quiet", title: "Copy all lines" });
  const lines = el("div", {},
    el("details", {}, el("summary", {}, "the lines before it"), el("pre", {}, `${SETUP}\n`), el("pre", { tabindex: 0, "aria-label": "The Python lines before it" }, before)),
    el("pre", { tabindex: 0, "aria-label": "Python code" }, last));
  const node = el("figure", { class: "python" }, el("figcaption", {}, title, copy), lines, el("p", {}, about, prints));
  node.hidden = true;
  node.show = (text, value, type = "float") => {
    const at = text.lastIndexOf("\nprint(") + 1;
    before.textContent = text.slice(0, at);
    before.parentNode.hidden = !at;
    last.textContent = text.slice(at);
    about.textContent = [value].flat().every(Number.isInteger) ? "prints " : "prints, to seven digits, ";
    const one = (x) => (type === "float" && Number.isInteger(x) ? `${x}.0` : printed(x));
    prints.textContent = Array.isArray(value) ? `[${value.map(one).join(", ")}]` : one(value);
    node.dataset.value = JSON.stringify(value);
    node.hidden = false;
  };
  return node;
}

// Sets a status's text, unless it says that already: what is set is spoken.
export function tell(node, ...parts) {
  if (parts.map((part) => part.textContent ?? part).join("") !== node.textContent) node.replaceChildren(...parts);
}

// Says something to screen readers.
export function say(text) {
  document.getElementById("said").textContent = text;
}
