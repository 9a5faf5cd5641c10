// Matrices as flat arrays, row by row.

export function joined(parts) {
  const out = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) { out.set(part, at); at += part.length; }
  return out;
}

// (rows, columns) to (columns, rows)
export function transpose(a, rows, columns) {
  const out = new Float32Array(a.length);
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) out[c * rows + r] = a[r * columns + c];
  return out;
}

// a (m, k) @ b (k, n)
export function product(a, b, m, k, n) {
  const out = new Float32Array(m * n);
  for (let r = 0; r < m; r++) {
    const to = out.subarray(r * n, (r + 1) * n);
    for (let p = 0; p < k; p++) {
      const x = a[r * k + p], from = p * n;
      if (x !== 0) for (let c = 0; c < n; c++) to[c] += x * b[from + c];
    }
  }
  return out;
}

// In place: e^(scale x) of each number, over their sum.
export function softmax(line, scale = 1) {
  const most = line.reduce((a, b) => (a > b ? a : b), -Infinity) * scale;
  let sum = 0;
  for (let at = 0; at < line.length; at++) sum += line[at] = Math.exp(line[at] * scale - most);
  for (let at = 0; at < line.length; at++) line[at] /= sum;
}
