// The page: its sections, the photo, the network, the colours.

import { Vae } from "./core/vae.js";
import { sections } from "./sections/all.js";
import { SETUP, el, html } from "./ui/dom.js";
import { Photo } from "./ui/photo.js";
import { anchor, startOver, state } from "./ui/state.js";

const photo = new Photo();
await photo.load();
const vae = new Vae(photo.pixels);
photo.addEventListener("change", () => {
  if (vae.running || vae.version) vae.compute({ photo: photo.pixels });
  else vae.wanted.photo = photo.pixels; // it waits until a section needs the network
});
photo.acceptDrops();

const trouble = document.getElementById("trouble");
const tell = (text) => { trouble.textContent = text; trouble.hidden = false; };
if (!vae.possible)
  tell("This browser cannot run the network: it lacks WebAssembly with SIMD, or it is switched off. Chrome or Edge 91, Firefox 89, Safari 16.4 and newer have it. Sections 1, 2, 3, 6 and 9 work all the same.");
vae.addEventListener("failed", ({ detail }) => tell(`The network has stopped: ${detail}. Load the page again; if that does not help, close other pages, for it needs about 1 GB of memory.`));

// Calls `begin` once, when `node` is about to come into view.
function whenNear(node, begin) {
  const observer = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    begin();
  }, { rootMargin: "600px" });
  observer.observe(node);
}

// Starts the network when `node` comes near, and calls `render` whenever it has computed something
// else: at once, or when `node` comes back. `parts` are pale, and do nothing, until there is something to see.
function follow(node, render, parts) {
  const note = el("p", { class: "waiting note" }, vae.possible ? "The network computes its maps for the first time…" : "This needs the network, which cannot run in this browser.");
  parts[0].before(note);
  for (const part of parts) {
    part.classList.add("waits");
    for (const type of ["click", "pointerdown", "keydown", "input", "change"])
      part.addEventListener(type, (event) => { if (part.classList.contains("waits")) event.stopPropagation(); }, true);
  }
  if (!vae.possible) return;
  const percent = ({ detail }) => { note.textContent = `The network computes its maps for the first time: ${Math.round(detail * 100)} %`; };
  vae.addEventListener("progress", percent);
  let first = true;
  const begin = () => {
    if (!first) return;
    first = false;
    vae.removeEventListener("progress", percent);
    note.remove();
    for (const part of parts) part.classList.remove("waits");
  };
  let near = false, seen = 0;
  const update = () => {
    if (!near || seen === vae.version) return;
    seen = vae.version;
    Promise.resolve(render()).then(begin);
  };
  new IntersectionObserver((entries) => {
    near = entries.at(-1).isIntersecting;
    if (near) vae.compute().then(update);
  }, { rootMargin: "600px" }).observe(node);
  vae.addEventListener("computed", update);
}

document.getElementById("setup").textContent = SETUP;
const nav = document.getElementById("nav"), main = document.getElementById("main");
const links = new Map();
sections.forEach(({ id, title, short, lead, build }, at) => {
  const body = el("div", { class: "body" });
  const node = el("section", { id, "aria-labelledby": `${id}-title`, tabindex: -1 },
    el("h2", { id: `${id}-title` }, el("span", { class: "number" }, String(at + 1)), title), html(lead), body);
  main.append(node);
  links.set(id, el("a", { href: `#${id}`, "aria-label": `${at + 1}. ${title}`, title }, String(at + 1), el("span", {}, short)));
  build({ root: body, section: node, vae, photo, whenNear, follow });
});
nav.append(...links.values());

// What changes is spoken in the section in use only.
const spoken = (section, on) => {
  for (const node of section.querySelectorAll("[role=status]")) node.setAttribute("aria-live", on ? "polite" : "off");
};
for (const section of main.querySelectorAll("section")) {
  spoken(section, false);
  section.addEventListener("focusin", () => spoken(section, true));
  section.addEventListener("focusout", () => spoken(section, false));
}
document.getElementById("contents").append(...sections.map(({ id, title }) => el("li", {}, el("a", { href: `#${id}` }, title))));

// The link of the section in view.
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) links.get(target.id).classList.toggle("here", isIntersecting);
}, { rootMargin: "-45% 0px -50%" });
for (const { id } of sections) seen.observe(document.getElementById(id));

function goTo(id) {
  const node = document.getElementById(id ?? "");
  if (!node) return;
  node.scrollIntoView();
  node.focus({ preventScroll: true });
}
addEventListener("click", (event) => {
  const link = event.target.closest?.('a[href^="#"]');
  if (!link) return;
  event.preventDefault();
  const id = link.getAttribute("href").slice(1);
  const kept = location.hash.slice(1).split("&").filter((part) => part.includes("="));
  history.pushState(null, "", `#${[id, ...kept].join("&")}`);
  goTo(id);
});
addEventListener("popstate", () => goTo(anchor()));

const work = document.getElementById("work");
let drawn = 0;
vae.addEventListener("progress", ({ detail }) => {
  if (detail < 1 && performance.now() - drawn < 100) return; // each step costs the workers' cores time
  drawn = performance.now();
  work.hidden = detail >= 1;
  work.firstChild.style.transform = `scaleX(${detail})`;
  work.setAttribute("aria-valuenow", Math.round(detail * 100));
});

document.getElementById("reset").addEventListener("click", () => {
  startOver();
  if (photo.own) photo.restore();
});
const theme = document.getElementById("theme");
const THEMES = { "": "Colours: auto", light: "Colours: light", dark: "Colours: dark" };
const colours = state("page", { theme: "" }, () => {
  const { theme: now } = colours.values;
  if (now) document.documentElement.dataset.theme = now;
  else delete document.documentElement.dataset.theme;
  theme.textContent = THEMES[now];
}, (v) => v.theme in THEMES);
colours.set({});
theme.addEventListener("click", () => {
  const names = Object.keys(THEMES);
  colours.set({ theme: names[(names.indexOf(colours.values.theme) + 1) % names.length] });
});

goTo(anchor());
document.documentElement.dataset.ready = "true";
window.explainer = { vae, photo }; // for the console, and for tests
