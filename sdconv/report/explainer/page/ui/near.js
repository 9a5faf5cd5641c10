// What begins when it comes near the window, and what follows the network.

import { el } from "./dom.js";

// Calls `begin` once, when `node` is about to come into view.
export function whenNear(node, begin) {
  const observer = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    begin();
  }, { rootMargin: "600px" });
  observer.observe(node);
}

// Starts the network when `node` comes near, and calls `render` whenever it has computed something
// else: at once, or when `node` comes back. `parts` are pale, and do nothing, until there is something to see.
export const follower = (vae) => function follow(node, render, parts) {
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
};
