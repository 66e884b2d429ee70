// A prompt comes back: its states on the left, the nearest tokens on the right.
start("inverter", "The prompt comes back, one token after the other", (root, data) => {
  let prompt = data.prompts[0];
  let rows = [];
  let timer = 0;
  const table = make("div", { class: "rows" });
  const nearest = make("div", { class: "nearest" });
  const said = report();
  // From a billionth to ten thousand, as on the picture's axis.
  const place = (distance) => (Math.log10(distance) + 5) / 7;

  const strip = (levels) => {
    const canvas = make("canvas", { width: levels.length, height: 1, "aria-hidden": "true" });
    const image = new ImageData(levels.length, 1);
    levels.forEach((level, i) => {
      const [r, g, b] = level < 0 ? [47, 120, 240] : [232, 113, 10];
      image.data.set([r, g, b, (255 * Math.abs(level)) / data.levels], 4 * i);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  };

  const row = (levels, near) => {
    const [[token], [rival, far]] = near;
    const line = make("i", { style: `--far: ${(100 * place(far)).toFixed(1)}%` });
    const right = make("span", { class: "no" }, `${far.toFixed(1)} `, make("span", { class: "token" }, shownToken(rival)));
    const word = make("span", { class: "yes token" }, shownToken(token));
    return make("div", { class: "state" }, strip(levels), word, line, right);
  };

  const bar = ([token, distance], i, all) => {
    const width = (100 * distance) / all.at(-1)[1];
    const kind = i ? "no" : "yes";
    const length = i ? distance.toFixed(1) : `< ${data.bound}`;
    return make("div", { class: `bar ${kind}` }, make("span", { class: "token" }, shownToken(token)),
      make("i", { style: `width: max(2px, ${width.toFixed(1)}%)` }), make("span", {}, length));
  };

  const show = (count) => {
    rows.forEach((node, i) => {
      node.classList.toggle("unread", i >= count);
      node.classList.toggle("now", i === count - 1);
    });
    if (!count) {
      nearest.replaceChildren();
      said.textContent = `${rows.length} states of ${data.width} numbers, of which ${prompt.states[0].length} are drawn. No token is known yet.`;
      return;
    }
    const near = prompt.near[count - 1];
    nearest.replaceChildren(...near.map(bar));
    said.textContent = `Position ${count - 1}: of ${data.vocabulary} tokens, “${shownToken(near[0][0])}” agrees with the state to within ${data.bound}. ` +
      `The runner-up, “${shownToken(near[1][0])}”, is ${near[1][1].toFixed(1)} away.`;
  };

  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  };
  const next = () => {
    if (read.value() >= rows.length) return stop();
    read.set(read.value() + 1);
    if (read.value() >= rows.length) stop();
  };
  const play = button("Play", () => {
    if (timer) return stop();
    if (read.value() >= rows.length) read.set(0);
    // Who wants no motion gets the end of it.
    if (calm()) return read.set(rows.length);
    play.textContent = "Pause";
    timer = setInterval(next, 500);
  });
  const read = slider("Tokens back", { min: 0, max: 1, value: 0 }, show);
  const choice = select("Prompt", data.prompts.map((each) => each.text), (i) => {
    stop();
    prompt = data.prompts[i];
    rows = prompt.near.map((near, t) => row(prompt.states[t], near));
    table.replaceChildren(...rows);
    // A new prompt is hidden first.
    read.set(0, { max: rows.length });
  });

  rows = prompt.near.map((near, t) => row(prompt.states[t], near));
  table.append(...rows);
  read.set(rows.length, { max: rows.length });
  const heads = ["stored", "came back", "", "runner-up"].map((text) => make("span", {}, text));
  root.append(
    controls(choice.node, play, read.node),
    make("div", { class: "state head", "aria-hidden": "true" }, ...heads),
    table, said, nearest,
  );
});
