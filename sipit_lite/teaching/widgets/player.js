// A film: one picture a frame. It opens on the frame that tells most, and stands still.
start("player", "A figure in steps", (root, data) => {
  const last = data.frames.length - 1;
  const picture = make("img", { alt: "" });
  let timer = 0;

  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  };
  const next = () => {
    frame.set(frame.value() + 1);
    if (frame.value() === last) stop();
  };
  const play = button("Play", () => {
    if (timer) return stop();
    // From the end it starts again.
    if (frame.value() === last) frame.set(0);
    play.textContent = "Pause";
    timer = setInterval(next, 400);
  });
  const shown = (k) => `${k + 1} of ${last + 1}`;
  const frame = slider("Frame", { min: 0, max: last, value: data.start, shown }, (k) => {
    picture.src = data.frames[k];
  });
  frame.set(data.start);
  root.append(controls(play, frame.node), picture);
});
