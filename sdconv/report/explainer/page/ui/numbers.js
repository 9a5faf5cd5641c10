// Numbers as text, and text as numbers.

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

// The numbers of a list as typed, such as "1, 2.5, −3"; null where it is not one.
export function numbers(text, { longest = Infinity, largest = Infinity } = {}) {
  const parts = text.replaceAll("−", "-").split(",").map((part) => part.trim());
  const found = parts.map(Number);
  const fits = parts.every(Boolean) && found.every((x) => Number.isFinite(x) && Math.abs(x) <= largest);
  return fits && found.length <= longest ? found : null;
}

// Lists in Python, of one type: floats as soon as one number is not whole.
export function literals(...lists) {
  const whole = lists.flat().every(Number.isInteger);
  const one = (x) => (whole || !Number.isInteger(x) ? String(x) : x.toFixed(1));
  return lists.map((list) => `[${list.map(one).join(", ")}]`);
}
