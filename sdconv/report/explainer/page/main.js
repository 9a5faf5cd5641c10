// The page: its sections, the photo, the network, the colours.

import { Vae } from "./core/vae.js";
import { sections } from "./sections/all.js";
import { SETUP, el, html } from "./ui/dom.js";
import { Photo } from "./ui/photo.js";
import { anchor, startOver } from "./ui/state.js";

const photo = new Photo();
await photo.load();
const vae = new Vae(photo.pixels);
photo.addEventListener("change", () => { if (vae.running || vae.version) vae.compute({ photo: photo.pixels }); else vae.wanted.photo = photo.pixels; });
photo.acceptDrops();

// Calls `begin` once, when `node` is about to come into view: the network is run when it is needed.
function whenNear(node, begin) {
  const observer = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    begin();
  }, { rootMargin: "600px" });
  observer.observe(node);
}

document.getElementById("setup").textContent = SETUP;
const nav = document.getElementById("nav"), main = document.getElementById("main");
const links = new Map();
sections.forEach(({ id, title, lead, build }, at) => {
  const body = el("div", { class: "body" });
  const node = el("section", { id, "aria-labelledby": `${id}-title`, tabindex: -1 },
    el("h2", { id: `${id}-title` }, el("span", { class: "number" }, String(at + 1)), title), html(lead), body);
  main.append(node);
  links.set(id, el("a", { href: `#${id}`, "aria-label": `${at + 1}. ${title}`, title }, String(at + 1)));
  build({ root: body, section: node, vae, photo, whenNear });
});
nav.append(...links.values());
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
vae.addEventListener("progress", ({ detail }) => {
  work.hidden = detail >= 1;
  work.firstChild.style.width = `${detail * 100}%`;
  work.setAttribute("aria-valuenow", Math.round(detail * 100));
});

document.getElementById("reset").addEventListener("click", () => startOver());
const theme = document.getElementById("theme");
const THEMES = { "": "Auto", light: "Light", dark: "Dark" };
theme.addEventListener("click", () => {
  const names = Object.keys(THEMES), now = document.documentElement.dataset.theme ?? "";
  const next = names[(names.indexOf(now) + 1) % names.length];
  if (next) document.documentElement.dataset.theme = next;
  else delete document.documentElement.dataset.theme;
  theme.textContent = THEMES[next];
  theme.setAttribute("aria-label", `Colours: ${next || "as the system"}`);
});

goTo(anchor());
document.documentElement.dataset.ready = "true";
window.explainer = { vae, photo }; // for the console, and for tests
