// The page: its sections, the photo, the network, the colours.

import { Vae } from "./core/vae.js";
import { sections } from "./sections/all.js";
import { SETUP, el, html } from "./ui/dom.js";
import { follower, whenNear } from "./ui/near.js";
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

const follow = follower(vae);

document.getElementById("setup").textContent = SETUP;
const nav = document.getElementById("nav"), main = document.getElementById("main");
const links = new Map();
sections.forEach(({ id, title, short, lead, build }, at) => {
  const body = el("div", { class: "body" });
  const node = el("section", { id, "aria-labelledby": `${id}-title` },
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

// Shows a section, or a term, which is folded away.
function goTo(id) {
  const node = document.getElementById(id ?? "");
  if (!node) return;
  const folded = node.closest("details");
  if (folded) folded.open = true;
  node.tabIndex = -1; // it can have the focus, and is not in the order of the Tab key
  node.scrollIntoView();
  node.focus({ preventScroll: true });
}
addEventListener("click", (event) => {
  const link = event.target.closest?.('a[href^="#"]');
  if (!link) return;
  event.preventDefault();
  const id = link.getAttribute("href").slice(1), from = link.closest("section")?.id;
  const kept = location.hash.slice(1).split("&").filter((part) => part.includes("="));
  const address = (place) => `#${[place, ...kept].join("&")}`;
  if (from) history.replaceState(null, "", address(from)); // where Back returns to
  history.pushState(null, "", address(id));
  goTo(id);
});
addEventListener("pointerover", ({ target }) => {
  const term = target.closest?.("a.term");
  if (term) term.title = document.querySelector(`${term.getAttribute("href")} + dd`).textContent;
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
