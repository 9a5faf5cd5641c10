// What the reader has set, kept in the address: `#field&field.layer=encoder.conv_in`.
// A section declares its values with their defaults; only what differs is written.

const sections = new Map();
let pending = null;

function read() {
  const found = new Map();
  for (const part of location.hash.slice(1).split("&")) {
    const at = part.indexOf("=");
    if (at > 0) found.set(part.slice(0, at), decoded(part.slice(at + 1)));
  }
  return found;
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

export const anchor = () => location.hash.slice(1).split("&").find((part) => part && !part.includes("="));

function write() {
  const parts = anchor() ? [anchor()] : [];
  for (const [id, { defaults, values }] of sections)
    for (const [name, value] of Object.entries(values))
      if (value !== defaults[name]) parts.push(`${id}.${name}=${encodeURIComponent(value)}`);
  const hash = parts.length ? `#${parts.join("&")}` : location.pathname + location.search;
  history.replaceState(null, "", hash);
}

// A value of the default's type (numbers are whole), or the default where the address has nonsense.
function typed(text, standard) {
  if (typeof standard === "number") return text !== "" && Number.isInteger(Number(text)) ? Number(text) : standard;
  if (typeof standard === "boolean") return text === "true";
  return text;
}

function fill(id) {
  const { defaults, values, check } = sections.get(id), found = read();
  for (const [name, standard] of Object.entries(defaults)) {
    const text = found.get(`${id}.${name}`);
    values[name] = text === undefined ? standard : typed(text, standard);
  }
  if (!check(values)) Object.assign(values, defaults);
}

// The section's values. `set` changes some, and calls `render`; `check` refuses impossible ones.
export function state(id, defaults, render, check = () => true) {
  const values = {};
  sections.set(id, { defaults, values, render, check });
  fill(id);
  const set = (change) => {
    Object.assign(values, change);
    pending ??= setTimeout(() => { pending = null; write(); }, 120); // browsers limit how often
    render(change);
  };
  return { values, set };
}

export function startOver() {
  history.pushState(null, "", location.href); // so that one can go back
  for (const { defaults, values, render } of sections.values()) {
    Object.assign(values, defaults);
    render({});
  }
  write();
}

addEventListener("hashchange", () => {
  for (const [id, { render }] of sections) {
    fill(id);
    render({});
  }
});
