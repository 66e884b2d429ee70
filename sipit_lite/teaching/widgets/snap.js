// A state is pushed off its token. Every rival is turned around the line of the push
// into the page, which keeps its distances to the truth and to the pushed state: both
// follow from three numbers, |x - v|² = s² - 2 s (along) + (away)².
start("snap", "A state is pushed until its token is lost", (root, data) => {
  const height = 320;
  const svg = draw("svg", { role: "img", "aria-label": "The true token, its rivals and the pushed state" });
  const values = make("dl");
  const said = report();
  const short = (x) => (x >= 1000 ? x.toFixed(0) : String(Number(x.toPrecision(3))));
  const shownSize = (power) => `${short(10 ** power)} margins`;

  /** Everything that the figure says, from the three numbers of each rival. */
  const measure = () => {
    const place = data.places[where.value()];
    const push = place.pushes[how.value()];
    const s = place.margin * 10 ** size.value();
    const radius = [place.floor, place.least / 2, place.margin / 2][within.value()];
    const rivals = push.rivals.map(([token, along, away, half], i) => {
      const y = Math.sqrt(Math.max(0, away ** 2 - along ** 2)) * (i % 2 ? 1 : -1);
      const distance = Math.sqrt(Math.max(0, s ** 2 - 2 * s * along + away ** 2));
      return { token, half, x: along, y, distance, lost: along > 0 ? away ** 2 / (2 * along) : Infinity };
    });
    const nearest = rivals.reduce((a, b) => (b.distance < a.distance ? b : a));
    const fit = rivals.filter((rival) => rival.distance <= radius).map((rival) => rival.token);
    if (s <= radius) fit.unshift(place.token);
    return { place, s, radius, rivals, nearest, fit, lost: Math.min(...rivals.map((rival) => rival.lost)) };
  };

  const paint = ({ place, s, radius, rivals, nearest }) => {
    const width = svg.clientWidth || 600;
    const scale = Math.min(height / (3.4 * place.margin), width / (5 * place.margin), (0.6 * height) / s);
    // The push goes up, rivals lie on either side.
    const at = (x, y) => [width / 2 + scale * y, 0.72 * height - scale * x];
    const circle = (x, y, r, options) => {
      const [cx, cy] = at(x, y);
      return draw("circle", { cx, cy, r, fill: "none", ...options });
    };
    const line = (from, to, options) =>
      draw("line", { x1: from[0], y1: from[1], x2: to[0], y2: to[1], stroke: "currentColor", ...options });
    const name = (token, x, y, kind, below) => {
      const [left, top] = at(x, y);
      const spot = { x: Math.min(left + 10, width - 70), y: top + (below ? 20 : -8), class: `token ${kind}` };
      return draw("text", spot, shownToken(token));
    };
    // The border midway between the truth and the nearest rival.
    const { x, y } = nearest;
    const border = [-9, 9].map((k) => at(x / 2 - k * y, y / 2 + k * x));
    const ring = { stroke: "currentColor", "stroke-dasharray": "5 4", opacity: 0.55 };
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren(
      ...[{ x: 0, y: 0, half: place.margin / 2 }, ...rivals].map((p) => circle(p.x, p.y, scale * p.half, ring)),
      line(...border, { opacity: 0.8 }),
      ...rivals.map((rival) => circle(rival.x, rival.y, 4, { fill: "currentColor", opacity: 0.5 })),
      line(at(0, 0), at(s, 0), { "stroke-width": 2 }),
      circle(s, 0, Math.max(1, scale * radius), { fill: "var(--blue)", opacity: 0.3 }),
      circle(s, 0, 5, { stroke: "currentColor", "stroke-width": 2 }),
      circle(0, 0, 6, { fill: "var(--blue)" }),
      circle(x, y, 6, { fill: "var(--orange)" }),
      name(place.token, 0, 0, "yes", true),
      name(nearest.token, x, y, "no", false),
    );
  };

  const show = () => {
    const now = measure();
    const { place, s, radius, nearest, fit } = now;
    paint(now);
    const rows = {
      truth: ["to the true token", s], rival: ["to the nearest rival", nearest.distance],
      half: ["half the token's margin", place.margin / 2], radius: ["radius of acceptance", radius],
      lost: ["token lost beyond", now.lost],
    };
    values.replaceChildren(...Object.entries(rows).map(([key, [label, value]]) =>
      make("div", {}, make("dt", {}, label), make("dd", { "data-key": key }, value < Infinity ? short(value) : "never"))));
    const quote = (token) => `“${shownToken(token)}”`;
    const near = s <= nearest.distance ? "the true one" : `${quote(nearest.token)}, which is wrong`;
    let answer = `it accepts ${quote(fit[0] ?? "")}`;
    if (fit.length === 0) answer = "no token lies within the radius, so it refuses";
    if (fit.length > 1) answer = "several tokens lie within the radius, so it refuses";
    said.textContent = `The nearest token is ${near}. SipIt: ${answer}.`;
  };

  const size = slider("Size", { min: -4, max: 1.5, step: 0.01, value: -0.4, shown: shownSize }, () => show());
  const pushed = () => {
    const { margin, pushes } = data.places[where.value()];
    const natural = pushes[how.value()].size;
    // A format moves a state by so much; then the slider goes on in its direction.
    if (natural) size.set(Math.log10(natural / margin).toFixed(2));
    else show();
  };
  const where = select("Token", data.places.map((place) => shownToken(place.token)), pushed);
  const how = select("Push", data.pushes, pushed);
  const within = select("Radius", ["noise floor", "half the prefix's margin", "half the token's margin"], () => show());
  root.append(controls(where.node, how.node, within.node, size.node), svg, values, said);
  where.node.querySelector("select").selectedIndex = data.start;
  within.node.querySelector("select").selectedIndex = 2;
  size.set(-0.4);
  new ResizeObserver(soon(show)).observe(svg);
});
