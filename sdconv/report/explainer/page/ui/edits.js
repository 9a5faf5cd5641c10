// Changed channels: as the address has them, as the network takes them, and in Python.
// An edit is {point: {channel: factor}}; in the address it is `point:channel:factor;...`.

export const parsed = (text) => Object.fromEntries(text.split(";").filter(Boolean).reduce((all, one) => {
  const [name, channel, factor] = one.split(":");
  return all.set(name, { ...all.get(name), [channel]: Number(factor) });
}, new Map()));

export const written = (edits) => Object.entries(edits)
  .flatMap(([name, factors]) => Object.entries(factors).map(([channel, factor]) => `${name}:${channel}:${factor}`)).join(";");

// Python's parts: definitions in front, context managers after another one, and what scales the
// latents, which no hook of sdconv.edit reaches.
export function inPython(edits) {
  const entries = Object.entries(edits);
  if (!entries.length) return { definitions: "", managers: "", scaling: "" };
  const literal = (factors) => `{${Object.entries(factors).map(([c, x]) => `${c}: ${x}`).join(", ")}}`;
  const hooked = entries.filter(([name]) => name !== "latents");
  return {
    definitions: `def scaled(factors):
    def edit(x, _):
        by = torch.ones(x.shape[1])
        for channel, factor in factors.items():
            by[channel] = factor
        return x * by[:, None, None]
    return edit

${hooked.length ? `edits = {${hooked.map(([name, factors]) => `\n    "${name}": scaled(${literal(factors)}),`).join("")}
}
` : ""}`,
    managers: hooked.length ? ", sdconv.edit(vae, edits)" : "",
    scaling: edits.latents ? `    latents = scaled(${literal(edits.latents)})(latents, None)\n` : "",
  };
}
