// What the widgets share. A page holds this file and a widget's own in one closure:
// nothing is global, so that several widgets stand on one page. A widget calls
//   start("name", "what a screen reader calls it", (root, data) => { ... });
// Its cell shows the widget and then one picture of it, whose alternative text stands in
// mystnb.image; a caption in mystnb.figure would stand below both. Names of classes that
// Bootstrap has, as "row", are taken.

/** Sets attributes, listeners where a value is a function, and children. */
const fill = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
};

/** An element of HTML, or of SVG: make("p", { class: "large" }, "text"). */
const make = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/** The same action, at most once a frame, however often it is called. */
const soon = (action) => {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      action();
    });
  };
};

/** A labelled range. `shown` makes text of its value, `moved` gets the value. */
const slider = (label, { min, max, step = 1, value, shown = String }, moved) => {
  const input = make("input", { type: "range", min, max, step, value });
  const output = make("output");
  const show = () => {
    output.textContent = shown(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
    moved(Number(input.value));
  };
  input.addEventListener("input", soon(show));
  return {
    node: make("label", { class: "range" }, make("span", {}, label), input, output),
    value: () => Number(input.value),
    /** Moves it, within new limits where some are given. */
    set: (next, limits = {}) => {
      for (const [name, limit] of Object.entries(limits)) input.setAttribute(name, limit);
      input.value = next;
      show();
    },
  };
};

/** A labelled choice among texts; `chosen` gets the number of the one chosen. */
const select = (label, texts, chosen) => {
  const options = texts.map((text, i) => make("option", { value: i }, text));
  const input = make("select", { change: () => chosen(input.selectedIndex) }, ...options);
  return { node: make("label", {}, make("span", {}, label), input), value: () => input.selectedIndex };
};

const button = (text, pressed) => make("button", { type: "button", click: pressed }, text);

/** What a move changes in words: screen readers read it aloud. */
const report = () => make("p", { class: "report", "aria-live": "polite" });

/** A control strip. */
const controls = (...nodes) => make("div", { class: "controls" }, ...nodes);

const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** A token as it is printed: with its spaces visible. */
const shownToken = (token) => token.replaceAll(" ", "␣").replaceAll("\n", "⏎");

/** Paints each figure of this name that is not painted yet. */
const start = (name, title, paint) => {
  for (const figure of document.querySelectorAll(`figure.widget[data-name="${name}"]:not(.live)`)) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const root = make("div", { role: "group", "aria-label": title });
    paint(root, data);
    figure.append(root);
    // Only now the picture that stood for it goes.
    figure.classList.add("live");
  }
};
