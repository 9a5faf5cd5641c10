// Two lists: one slides, turned around, under the other.

import { convolve, meetings } from "../core/convolution.js";
import { button, choice, el, listFields, python, slider, tell } from "../ui/dom.js";
import { literals, numbers, printed } from "../ui/numbers.js";
import { state } from "../ui/state.js";

const PRESETS = {
  small: ["1, 2, 3", "0, 1, 10", 2, "Small enough to do it in your head."],
  "two dice": ["0, 1, 1, 1, 1, 1, 1", "0, 1, 1, 1, 1, 1, 1", 7, "Each list counts in how many ways one die shows 0, 1, 2, … 6. The answer counts in how many ways two dice add up to 0, 1, 2, … 12: position 7 has the most."],
  "mean of two": ["0, 0, 0, 6, 6, 6", "0.5, 0.5", 3, "Each answer is the mean of two neighbours, so the step becomes a slope. At the ends a neighbour is missing and counts as 0."],
  rise: ["0, 0, 0, 6, 6, 6", "1, -1", 3, "Each answer is a number minus the one before it: it finds where the list rises. The last answer is the fall from 6 to nothing."],
};
const LONGEST = 9, LARGEST = 9999;
const list = (text) => numbers(text, { longest: LONGEST, largest: LARGEST });

// A number in a cell.
const few = (x) => printed(Number(x.toPrecision(5))).replace("-", "−");

export const lists = {
  id: "lists",
  title: "Two lists",
  short: "Lists",
  lead: `<p>A convolution takes two lists of numbers and makes a third. Turn the second list around, push it under the first, multiply the numbers that <b>meet</b>, and add up the products. That is one number of the answer. Then push the list on by one. Drag the <b class="kernel">orange</b> list.</p>`,

  build({ root }) {
    const { values: now, set } = state("lists", { a: "1, 2, 3", b: "0, 1, 10", n: 2 }, () => render(), (v) => {
      const a = list(v.a), b = list(v.b);
      return a && b && Number.isInteger(v.n) && v.n >= 0 && v.n < a.length + b.length - 1;
    });
    const fields = listFields({ a: { label: "first list", kind: "input" }, b: { label: "second list", kind: "kernel" } }, {
      read: list,
      rule: () => `A list has at most ${LONGEST} numbers from −${LARGEST} to ${LARGEST}, with commas between them, such as 1, 2, 3. Until it does, the lists below stay as they are.`,
      onlist: (name, text) => set({ [name]: text, n: 0 }),
    });
    const preset = choice({ label: "Lists to begin with", value: "", options: Object.keys(PRESETS).map((name) => [name, name]),
      onchange: (name) => set({ a: PRESETS[name][0], b: PRESETS[name][1], n: PRESETS[name][2] }) });
    const rail = el("div", { class: "rail", role: "img" });
    const at = slider({ label: "position", min: 0, max: 4, value: 2, oninput: (n) => set({ n }) });
    const play = button("Slide it", () => (timer ? stop() : start()));
    const sum = el("p", { class: "verdict", role: "status" });
    const answer = el("div", { class: "answer" });
    const code = python();
    const about = el("p", { class: "note", role: "status" });
    root.append(fields, preset, about,
      el("div", { class: "panel" }, rail, el("div", { class: "controls" }, at, play), sum, answer), code);

    let timer = null;
    const end = () => list(now.a).length + list(now.b).length - 2;
    const stop = () => { clearInterval(timer); timer = null; play.textContent = "Slide it"; };
    function start() {
      set({ n: now.n >= end() ? 0 : now.n });
      play.textContent = "Stop";
      timer = setInterval(() => (now.n >= end() ? stop() : set({ n: now.n + 1 })), 900);
    }

    // dragging moves by whole cells
    let grabbed = null;
    rail.addEventListener("pointerdown", (event) => {
      if (!event.target.closest(".turned")) return;
      rail.setPointerCapture(event.pointerId);
      stop();
      grabbed = { x: event.clientX, n: now.n };
    });
    rail.addEventListener("pointermove", (event) => {
      if (!grabbed) return;
      const cell = rail.querySelector("span").getBoundingClientRect().width + 4;
      const n = Math.max(0, Math.min(end(), grabbed.n + Math.round((event.clientX - grabbed.x) / cell)));
      if (n !== now.n) set({ n });
    });
    rail.addEventListener("pointerup", () => { grabbed = null; });
    rail.addEventListener("pointercancel", () => { grabbed = null; });

    function render() {
      const a = list(now.a), b = list(now.b), { n } = now;
      fields.set({ a: now.a, b: now.b });
      const known = Object.keys(PRESETS).find((name) => PRESETS[name][0] === now.a && PRESETS[name][1] === now.b);
      preset.set(known ?? "");
      tell(about, PRESETS[known]?.[3] ?? "");
      const pairs = meetings(a, b, n), all = convolve(a, b), room = b.length - 1;
      rail.style.setProperty("--columns", a.length + 2 * room);
      const cell = (value, row, column, kind) => el("span", { class: kind, style: `grid-row:${row};grid-column:${column + 1}` }, few(value));
      rail.replaceChildren(
        ...a.map((x, m) => cell(x, 1, room + m, `in ${pairs.some((pair) => pair.m === m) ? "meets" : ""}`)),
        ...b.map((x, k) => cell(x, 2, n + room - k, `turned ${pairs.some((pair) => pair.other === k) ? "meets" : ""}`)),
        ...pairs.map(({ m, product }) => cell(product, 3, room + m, "product")));
      const terms = pairs.map(({ m, other }) => `${few(a[m])} × ${few(b[other])}`).join(" + ");
      rail.setAttribute("aria-label", `At position ${n}: ${terms} = ${printed(all[n])}`);
      at.set(n, all.length - 1);
      tell(sum, `${terms} = `, el("b", { class: "output" }, few(all[n])));
      answer.replaceChildren(el("span", { class: "note" }, "the answer so far"),
        ...all.map((x, m) => button(m <= n ? few(x) : "?", () => set({ n: m }), {
          class: `cell ${m === n ? "now" : ""}`, "aria-label": `position ${m}${m <= n ? `: ${printed(x)}` : ""}`, "aria-current": m === n ? "true" : "false" })));
      const whole = [...a, ...b].every(Number.isInteger);
      code.show(`print(convolve(${literals(a, b).join(", ")})[${n}])`, all[n], whole ? "int" : "float");
    }
    render();
  },
};
