// One slide at a time: arrows, space, page keys, Home and End; N shows the notes.
window.MathJax = { svg: { fontCache: "local" }, options: { enableMenu: false } };

addEventListener("load", async () => {
  await MathJax.startup.promise;
  await document.fonts.ready;
  const slides = [...document.querySelectorAll(".slide")];

  // The letters of a slide are as large as its page allows.
  slides.forEach((slide, i) => {
    const body = slide.querySelector(".body");
    slide.querySelector("footer").append(`${i + 1} / ${slides.length}`);
    const full = () => body.scrollHeight > body.clientHeight || body.scrollWidth > body.clientWidth
      || [...body.querySelectorAll("pre, mjx-container")].some((e) => e.scrollWidth > e.clientWidth + 1 && e.clientWidth);
    for (let size = 26; size > 14 && full(); size--) body.style.fontSize = `${size - 1}px`;
  });

  let current = 0;
  const show = (next) => {
    current = Math.max(0, Math.min(slides.length - 1, next));
    slides.forEach((slide, i) => slide.classList.toggle("current", i === current));
    history.replaceState(null, "", `#${current + 1}`);
  };
  const scale = () =>
    document.body.style.setProperty("--scale", Math.min(innerWidth / 1280, innerHeight / 720));
  const steps = { ArrowRight: 1, ArrowDown: 1, " ": 1, PageDown: 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1, Home: -1e9, End: 1e9 };
  addEventListener("keydown", (event) => {
    if (event.key in steps) {
      event.preventDefault();
      show(current + steps[event.key]);
    }
    if (event.key.toLowerCase() === "n") document.body.classList.toggle("notes");
  });
  addEventListener("click", (event) => {
    if (!event.target.closest("a, aside")) show(current + 1);
  });
  addEventListener("hashchange", () => show(Number(location.hash.slice(1)) - 1));
  addEventListener("resize", scale);
  scale();
  show((Number(location.hash.slice(1)) || 1) - 1);
  document.body.classList.add("ready");
});
