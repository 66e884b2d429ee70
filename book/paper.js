// The long page as a printed book: a title page, contents, a running head for each
// chapter, and hints and solutions at the end. Nothing stays that needs a screen.
() => {
  const make = (tag, attributes, ...children) => {
    const node = document.createElement(tag);
    Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
    node.append(...children);
    return node;
  };
  const article = document.querySelector("article");
  const all = (selector, root = article) => [...root.querySelectorAll(selector)];
  const text = (node) => node.textContent.replace("#", "").replace(/\s+/g, " ").trim();

  // What nobody looks at is quick to change.
  article.remove();

  // Folded cells and boxes open, which the theme does slowly, one by one, before it
  // prints; what is pressed, dragged or copied goes.
  const screen = ".headerlink, .toggle-button, .copybtn, .anim-controls, details.hide > summary, script";
  all(screen).forEach((node) => node.remove());
  all("details.hide").forEach((node) => node.replaceWith(...node.childNodes));
  all("details").forEach((node) => (node.open = true));
  all(".toggle-hidden").forEach((node) => node.classList.remove("toggle-hidden"));
  // A tag for each coloured word of code would take a fifth of the file: comments alone keep theirs.
  all("mjx-assistive-mml").forEach((node) => node.remove());
  for (const word of all("pre span"))
    if (!/^(c|ansi)/.test(word.className)) word.replaceWith(...word.childNodes);
  all("pre").forEach((node) => node.normalize());

  // The builder of the long page writes some links as if to a file beside it.
  all("a[href^='intro.html#']").forEach((link) => link.setAttribute("href", link.hash));
  all("a.image-reference").forEach((link) => link.replaceWith(...link.childNodes));

  // Chapters, in the parts of the book.
  const captions = all("nav.bd-links p.caption", document).map(text);
  const parts = all(".toctree-wrapper").map((wrapper, i) => ({
    caption: captions[i] ?? "",
    chapters: all("span[id^=document-]", wrapper).map((span) => span.nextElementSibling),
  }));
  const chapters = parts.flatMap((part) => part.chapters);
  const heading = (section) => section.querySelector("h1, h2, h3, h4");

  // Hints and solutions leave their exercises, and each keeps a way back.
  const solutions = make("section", { class: "solutions" }, make("h2", {}, "Hints and solutions"));
  for (const chapter of chapters) {
    const moved = [];
    let exercise = null;
    for (const box of all(".exercise, .solution, .admonition.tip", chapter)) {
      const title = box.querySelector(".admonition-title");
      if (box.matches(".exercise")) exercise = box;
      else if (exercise && /^(Hint|Solution)/.test(text(title))) {
        const number = text(exercise.querySelector(".caption-number"));
        const back = make("a", { href: `#${exercise.id}` }, number);
        const of = box.matches(".solution") ? "Solution of " : "Hint to ";
        title.replaceChildren(of, back);
        box.classList.remove("dropdown", "toggle", "toggle-hidden");
        moved.push(box);
        if (!box.matches(".solution")) continue;
        box.id ||= `solution-of-${exercise.id}`;
        exercise.append(make("p", { class: "onward" }, make("a", { href: `#${box.id}` }, "Solution at the end of the book")));
      }
    }
    if (moved.length) solutions.append(make("h3", {}, text(heading(chapter))), ...moved);
  }

  // Contents: pages are written beside the links once they are known.
  const contents = make("section", { class: "contents" }, make("h2", {}, "Contents"));
  let count = 0;
  const entry = (target, kind) => {
    target.id = `page-${++count}`; // names of sections repeat from chapter to chapter
    contents.append(make("p", { class: kind }, make("a", { href: `#${target.id}` }, make("span", {}, text(target)))));
  };
  const sections = (section) => all(":scope > section > :is(h2, h3, h4)", section);
  for (const { caption, chapters } of parts) {
    contents.append(make("p", { class: "part" }, caption));
    for (const chapter of chapters) {
      entry(heading(chapter), "chapter");
      sections(chapter).forEach((node) => entry(node, "section"));
    }
  }
  contents.append(make("p", { class: "part" }, "At the end"));
  entry(heading(solutions), "chapter");

  // A page that is named after its chapter knows its running head.
  const heads = [];
  const head = (section, words) => {
    section.style.page = `head-${heads.length}`;
    heads.push(`@page head-${heads.length} { @top-right { content: ${JSON.stringify(words)} } }`);
  };
  const name = text(article.querySelector("h1"));
  const author = text(document.querySelector(".footer-item .component-author") ?? make("p", {}));
  const cover = make("section", { class: "cover" }, make("p", { class: "name" }, name),
    make("p", { class: "about" }, "An executable book about arXiv:2510.15511, and its package sipit_lite"),
    make("p", { class: "author" }, author.replace(/^By /, "")));
  const logo = document.querySelector("img.logo__image");
  if (logo) cover.prepend(make("img", { src: logo.src, alt: "" }));
  const opening = article.querySelector("h1").parentElement;
  const book = make("main", { class: "bd-content bd-article" }, cover, contents, opening, solutions);
  head(contents, "Contents");
  head(opening, "Before you begin");
  chapters.forEach((chapter) => head(chapter, text(heading(chapter))));
  head(solutions, "Hints and solutions");
  document.head.append(make("style", {}, `@page { @top-left { content: ${JSON.stringify(name)} } } ${heads.join(" ")}`));
  document.body.replaceChildren(make("article", { class: "bd-article-container" }, book));
}
