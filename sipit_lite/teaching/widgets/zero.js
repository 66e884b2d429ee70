// Two prompts' states agree where two curves meet. The transformer has width 2 and one
// block; its formula is written out, since a box has thousands of corners.
start("zero", "Where two prompts of a small transformer collide", (root, data) => {
  const finest = 64; // boxes a side; a coarser grid has a part of its corners
  const theta = structuredClone(data.theta);
  const [embedding, position] = [theta["wte.weight"], theta["wpe.weight"]];
  const [first, second] = ["h.0.ln_1", "h.0.ln_2"].map((name) => [...theta[`${name}.weight`], ...theta[`${name}.bias`]]);
  const [heads, headsBias] = [theta["h.0.attn.c_attn.weight"], theta["h.0.attn.c_attn.bias"]];
  const [out, outBias] = [theta["h.0.attn.c_proj.weight"], theta["h.0.attn.c_proj.bias"]];
  const [inner, innerBias] = [theta["h.0.mlp.c_fc.weight"], theta["h.0.mlp.c_fc.bias"]];
  const [last, lastBias] = [theta["h.0.mlp.c_proj.weight"], theta["h.0.mlp.c_proj.bias"]];

  /** Error function, within 2e-7 (Abramowitz and Stegun, 7.1.26). */
  const erf = (x) => {
    const t = 1 / (1 + 0.3275911 * Math.abs(x));
    const sum = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
    return Math.sign(x) * (1 - sum * Math.exp(-x * x));
  };
  // What a norm of width 2 leaves is one number: the two entries are its multiples.
  const centre = (x, y) => (x - y) / 2 / Math.sqrt(((x - y) / 2) ** 2 + data.epsilon);
  const head = (u, v, column) => u * heads[column] + v * heads[6 + column] + headsBias[column];

  /** The last-token state of the rows (a, b), (c, d), added to `at` times `sign`. */
  const state = (a, b, c, d, at, sign) => {
    const n = centre(a, b);
    const m = centre(c, d);
    const n0 = n * first[0] + first[2];
    const n1 = -n * first[1] + first[3];
    const m0 = m * first[0] + first[2];
    const m1 = -m * first[1] + first[3];
    const q0 = head(m0, m1, 0);
    const q1 = head(m0, m1, 1);
    const one = (q0 * head(n0, n1, 2) + q1 * head(n0, n1, 3)) / Math.SQRT2;
    const two = (q0 * head(m0, m1, 2) + q1 * head(m0, m1, 3)) / Math.SQRT2;
    const weight = 1 / (1 + Math.exp(two - one));
    const v0 = weight * head(n0, n1, 4) + (1 - weight) * head(m0, m1, 4);
    const v1 = weight * head(n0, n1, 5) + (1 - weight) * head(m0, m1, 5);
    const y0 = c + v0 * out[0] + v1 * out[2] + outBias[0];
    const y1 = d + v0 * out[1] + v1 * out[3] + outBias[1];
    const k = centre(y0, y1);
    const z = (k * second[0] + second[2]) * inner[0] + (-k * second[1] + second[3]) * inner[1] + innerBias[0];
    const g = (z * (1 + erf(z / Math.SQRT2))) / 2;
    at[0] += sign * (y0 + g * last[0] + lastBias[0]);
    at[1] += sign * (y1 + g * last[1] + lastBias[1]);
  };

  /** Both components of the difference at all corners; a is at the corner. */
  const evaluate = (pair) => {
    const [[left, right], [low, high]] = data.box;
    const values = [0, 1].map(() => new Float64Array((finest + 1) ** 2));
    const [p, q, r, s] = position;
    const at = [0, 0];
    const rows = [0, 0, embedding[2], embedding[3]];
    for (let j = 0, corner = 0; j <= finest; j++) {
      for (let i = 0; i <= finest; i++, corner++) {
        rows[0] = left + ((right - left) * i) / finest;
        rows[1] = low + ((high - low) * j) / finest;
        at[0] = at[1] = 0;
        for (let k = 0; k < 2; k++) {
          const x = 2 * pair[k][0];
          const y = 2 * pair[k][1];
          state(rows[x] + p, rows[x + 1] + q, rows[y] + r, rows[y + 1] + s, at, 1 - 2 * k);
        }
        values[0][corner] = at[0];
        values[1][corner] = at[1];
      }
    }
    return values;
  };

  /** For each box of n by n: 1, 2 or 3 where curve one, two or both pass its corners. */
  const boxes = (values, n) => {
    const step = finest / n;
    const hit = new Uint8Array(n * n);
    for (let k = 0; k < 2; k++) {
      const f = values[k];
      for (let j = 0; j < n; j++) {
        for (let i = 0; i < n; i++) {
          const corner = j * step * (finest + 1) + i * step;
          const up = corner + step * (finest + 1);
          const sum = (f[corner] > 0) + (f[corner + step] > 0) + (f[up] > 0) + (f[up + step] > 0);
          if (sum % 4) hit[j * n + i] |= k + 1;
        }
      }
    }
    return hit;
  };

  const levels = [4, 8, 16, 32, 64];
  const canvas = make("canvas", { role: "img", "aria-label": "Boxes that the two curves cross" });
  const cells = [0, 1, 2].map(() => levels.map(() => make("td")));
  const said = report();
  const names = ["curve 1", "curve 2", "both"];
  const table = make("table", {},
    make("tr", {}, make("th", {}, "boxes a side"), ...levels.map((n) => make("th", {}, String(n)))),
    ...cells.map((row, k) => make("tr", { "data-key": names[k] }, make("th", { class: ["yes", "no", ""][k] }, names[k]), ...row)));

  const paint = (hit, n) => {
    const side = Math.round(canvas.clientWidth * devicePixelRatio) || 400;
    canvas.width = canvas.height = side;
    const brush = canvas.getContext("2d");
    const style = getComputedStyle(canvas);
    const size = side / n;
    const colours = [style.borderTopColor, style.borderBottomColor, style.color];
    hit.forEach((kind, box) => {
      if (!kind) return;
      brush.fillStyle = colours[kind - 1];
      // The second entry grows upwards.
      brush.fillRect((box % n) * size, side - (Math.floor(box / n) + 1) * size, Math.ceil(size), Math.ceil(size));
    });
  };

  let hits;
  const show = () => {
    const n = levels[grid.value()];
    paint(hits[grid.value()], n);
    const [one, , both] = cells.map((row) => row[grid.value()].textContent);
    said.textContent = `Of ${n} × ${n} boxes, ${one} touch the first curve, and ${both} may hold a collision.`;
  };
  const again = () => {
    theta[moved.name][moved.index] = value.value();
    const values = evaluate(data.pairs[prompts.value()].rows);
    hits = levels.map((n) => boxes(values, n));
    hits.forEach((hit, column) => {
      const count = [0, 0, 0, 0];
      for (const kind of hit) count[kind]++;
      const shares = [count[1] + count[3], count[2] + count[3], count[3]];
      shares.forEach((each, k) => (cells[k][column].textContent = `${((100 * each) / hit.length).toFixed(2)}%`));
    });
    show();
  };
  const grid = slider("Boxes a side", { min: 0, max: 4, value: 2, shown: (k) => levels[k] }, () => hits && show());
  const value = slider("Its value", { min: -4, max: 4, step: 0.05, value: 0, shown: (v) => v.toFixed(2) }, () => again());
  const prompts = select("Prompts", data.pairs.map((pair) => pair.text), () => again());
  let moved = data.letters[0];
  const letter = select("Letter", data.letters.map((each) => each.text), () => {
    // One letter moves at a time: the last one goes back.
    theta[moved.name][moved.index] = data.theta[moved.name][moved.index];
    moved = data.letters[letter.value()];
    value.set(theta[moved.name][moved.index]);
  });
  const axes = make("p", { class: "axes" }, "Right: the first entry of the embedding of a, from −3 to 3. Up: its second.");
  root.append(controls(prompts.node, letter.node, value.node, grid.node), canvas, axes, table, said);
  value.set(theta[moved.name][moved.index]);
  grid.set(2);
  new ResizeObserver(soon(show)).observe(canvas);
});
