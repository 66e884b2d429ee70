// Lens and prior meet on a token: each candidate is a point, and the weight of the prior
// tilts the line of equal sums that sweeps in from the upper right.
start("search", "Lens and prior meet on a token", (root, data) => {
  const [width, height] = [360, 270];
  const rows = 8;
  let scene;
  const plane = draw("svg", { width, height, class: "plane" });
  const beyond = draw("polygon", { class: "beyond" });
  const edge = draw("line", { class: "edge" });
  const names = [draw("text", { class: "no token" }), draw("text", { class: "yes token" })];
  const picture = draw("svg", { viewBox: `-8 -8 ${width + 16} ${height + 32}`, "aria-hidden": "true" },
    draw("rect", { width, height, class: "frame" }), plane,
    draw("text", { x: width, y: height + 18, "text-anchor": "end" }, "lens says more →"),
    draw("text", { x: 4, y: 14 }, "↑ prior says more"));
  const lines = Array.from({ length: rows }, () => {
    const cells = ["token", "share", "", "", ""].map((kind) => make("span", { class: kind }));
    const bar = make("i");
    return { node: make("div", { class: "line" }, ...cells, bar), cells, bar };
  });
  const said = report();

  // Columns become tokens.
  const positions = data.positions.map((position) => ({
    ...position,
    tokens: position.token.map((token, i) => ({
      token,
      lens: position.lens[i],
      prior: position.prior[i],
      places: [position.lens_place[i], position.prior_place[i]],
      proxy: position.proxy_place[i],
    })),
  }));

  // Room around the points, and what turns scores into coordinates.
  const scale = (values, from, to) => {
    const low = Math.min(...values);
    const high = Math.max(...values);
    const room = 0.08 * (high - low || 1);
    return (value) => from + ((value - low + room) / (high - low + 2 * room)) * (to - from);
  };

  const place = (i) => {
    const position = positions[i];
    const x = scale(position.tokens.map((each) => each.lens), 0, width);
    const y = scale(position.tokens.map((each) => each.prior), height, 0);
    const points = position.tokens.map((each) =>
      draw("circle", { cx: x(each.lens), cy: y(each.prior), r: 3.5 }, draw("title", {}, shownToken(each.token))));
    points[position.true].setAttribute("class", "true");
    // The prior at a height of the plane, for the line through it.
    const priorAt = (pixel) => (pixel - y(0)) / (y(1) - y(0));
    scene = { position, x, y, points, top: -1, priorAt };
    plane.replaceChildren(beyond, edge, ...points, ...names);
    move();
  };

  const name = (node, each, { x, y }) => {
    const [left, up] = [x(each.lens), y(each.prior)];
    const right = left > width / 2;
    node.textContent = shownToken(each.token);
    node.setAttribute("x", left + (right ? -9 : 9));
    node.setAttribute("y", Math.max(14, up - 7));
    node.setAttribute("text-anchor", right ? "end" : "start");
  };

  // What stays as it is needs no layout.
  const write = (node, text) => {
    if (node.textContent !== text) node.textContent = text;
  };

  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;

  const move = () => {
    const w = weight.value();
    const k = steps.value();
    const { position, x, points, priorAt } = scene;
    const { tokens, rest, ahead } = position;
    const scores = tokens.map((each) => each.lens + w * each.prior);
    const order = scores.map((_, i) => i).sort((i, j) => scores[j] - scores[i] || i - j);
    const best = scores[order[0]];
    const weights = scores.map((score) => Math.exp((score - best) / Math.max(w, 1)));
    const sum = weights.reduce((a, b) => a + b);
    const shares = weights.map((each) => ((1 - rest[w]) * each) / sum);

    // On the line the sums are those of the token on top; beyond it there is no token.
    const [low, high] = [x(best - w * priorAt(height)), x(best - w * priorAt(0))];
    const corners = { x1: low, y1: height, x2: high, y2: 0 };
    for (const [key, value] of Object.entries(corners)) edge.setAttribute(key, value.toFixed(1));
    const far = Math.max(width, low, high) + 9;
    beyond.setAttribute("points", `${low.toFixed(1)},${height} ${high.toFixed(1)},0 ${far},0 ${far},${height}`);
    if (scene.top >= 0) points[scene.top].classList.remove("top");
    scene.top = order[0];
    points[scene.top].classList.add("top");
    name(names[0], tokens[scene.top], scene);
    name(names[1], tokens[position.true], scene);
    names[0].style.display = scene.top === position.true ? "none" : "";

    lines.forEach(({ node, cells, bar }, row) => {
      const i = order[row];
      node.className = `line ${i === position.true ? "yes" : row ? "" : "no"}`;
      const { token, places, proxy } = tokens[i];
      const texts = [shownToken(token), percent(shares[i]), ...places, proxy[k]];
      texts.forEach((text, c) => write(cells[c], String(text)));
      bar.style.transform = `scaleX(${shares[i].toFixed(4)})`;
    });
    const truth = tokens[position.true];
    const at = 1 + order.indexOf(position.true) + ahead[w];
    const top = tokens[order[0]];
    const verdict = at === 1 ? "the true token" : `the true one, “${shownToken(truth.token)}”, is at place ${at}`;
    const others = data.vocabulary - tokens.length;
    said.textContent = `Weight ${w}: “${shownToken(top.token)}” is on top, ${verdict}. ` +
      `The ${others} tokens that are not drawn hold ${percent(rest[w])} together. ` +
      `After ${k} steps the proxy has the true token at place ${truth.proxy[k]}.`;
  };

  const weight = slider("Weight of the prior", { min: 0, max: positions[0].rest.length - 1, value: 0 }, () => move());
  const steps = slider("Steps of the proxy", { min: 0, max: positions[0].proxy_place[0].length - 1, value: 0 }, () => move());
  const choice = select("Text", positions.map((each) => `…${each.before} ▢`), place);
  const heads = ["token", "share", "lens", "prior", "proxy"].map((text) => make("span", {}, text));
  root.append(
    controls(choice.node, weight.node, steps.node),
    make("div", { class: "halves" },
      picture,
      make("div", { class: "lines" }, make("div", { class: "line head" }, ...heads), ...lines.map((line) => line.node))),
    said,
  );
  place(0);
  steps.set(0);
  weight.set(0);
});
