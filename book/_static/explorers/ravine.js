// Chapters 03 and 11: momentum in a ravine. On the map of what a step multiplies by, the loss is a bar from its flattest
// to its steepest curvature; beside it is the path.
{
  const { momentum, radius, set, digits, Plot, define } = explorers;
  const START = [10, 1.5];
  const STEPS = 500; // as far as anybody counts
  const DRAWN = 101; // points
  const END = 4; // of the map: the longest hλ that momentum bears
  const SIZES = [10, 7, 4.5, 2.5, 1]; // of the contours

  /** A map as a picture: pale is fast, dark is slow, where it grows is nothing. */
  function picture(nesterov) {
    const [width, height] = [180, 120];
    const context = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
    const image = context.createImageData(width, height);
    for (let pixel = 0; pixel < width * height; pixel++) {
      const [x, y] = [((pixel % width) + 0.5) / width, 1 - (Math.floor(pixel / width) + 0.5) / height];
      const size = radius(END * x ** 2, y ** 2, nesterov);
      if (size >= 1) continue;
      // From #FBE3EC, where nothing is left after a step, over #DB6BA5 to #6A0A5E, where all is.
      const mix = (pale, middle, dark) =>
        size < 0.5 ? pale + 2 * size * (middle - pale) : middle + (2 * size - 1) * (dark - middle);
      image.data.set([mix(251, 219, 106), mix(227, 107, 10), mix(236, 165, 94), 255], 4 * pixel);
    }
    context.putImageData(image, 0, 0);
    return context.canvas.toDataURL();
  }

  function build(panel) {
    const rate = panel.slider("h", "learning rate h", { min: 0.0005, max: 1, step: 0.0005 }, (h) =>
      String(+h.toPrecision(4)),
    );
    panel.slider("beta", "momentum β", { min: 0, max: 0.99, step: 0.01 }, 2);
    panel.slider("kappa", "steepness κ", [4, 10, 25, 50, 100, 200]);
    panel.choice("rule", "Rule", { momentum: "momentum", nesterov: "Nesterov’s form" });

    const root = { scale: Math.sqrt, inverse: (v) => v * v };
    const map = new Plot(
      "What a step multiplies the distance by, over hλ and β; the ravine is a bar",
      { range: [0, END], ticks: [0, 0.1, 0.5, 1, 2, 4], label: "hλ", ...root },
      { range: [0, 1], ticks: [0, 0.1, 0.3, 0.6, 0.9], label: "momentum β", ...root },
      { width: 330 },
    );
    const box = { x: map.left, y: map.top, width: map.right - map.left, height: map.bottom - map.top };
    const image = map.add("image", "", { ...box, preserveAspectRatio: "none" });
    const [arms, bar] = [map.add("path", "line thin black"), map.add("path", "bar")];
    const ends = [0, 1].map(() => map.handle());
    map.write("creeps", "white middle", 0.04, 0.14);
    const [swings, grows] = [map.write("swings", "black middle"), map.write("grows", "flow middle")];
    const parts = ["floor", "walls"].map((part) => map.write(part, "black middle"));
    const images = {};
    let spread = [];
    const handles = () => spread.map((hLambda) => [hLambda, panel.state.beta]);
    map.drag(handles, (hLambda, beta, i) => {
      const { kappa } = panel.state;
      const h = Math.max(0.0005, Math.min(END / kappa, i ? hLambda / kappa : hLambda));
      panel.change({ h: +h.toPrecision(3), beta: Math.min(0.99, Math.round(100 * beta) / 100) });
    });

    const plot = new Plot(
      "The path in the ravine",
      { range: [-10.6, 10.6], ticks: [-10, -5, 0, 5, 10], label: "along the floor, θ₁" },
      { range: [-2, 2], ticks: [-2, -1, 0, 1, 2], label: "across, θ₂" },
    );
    const contours = SIZES.map(() => plot.add("ellipse", "contour"));
    const trail = plot.trail("small momentum");
    const begin = plot.write("start", "quiet end");
    const scale = set(plot.write("", "ink"), { x: plot.left + 6, y: plot.bottom - 8 });
    panel.pictures.append(map.svg, plot.svg);
    panel.note(
      "Drag the bar, or one of its ends. It is this ravine, from floor (curvature λ = 1) to walls (κ). The colour is what a step multiplies the distance by: light is fast, dark is slow; outside the colours the distance grows. In the V steps swing; left of it they creep.",
    );

    function draw(h, beta, kappa, nesterov) {
      images[nesterov] ??= picture(nesterov);
      if (image.getAttribute("href") !== images[nesterov]) set(image, { href: images[nesterov] });
      // The arms of the V: there the two roots of a step are equal.
      const curved = Array.from({ length: 41 }, (_, i) => [((1600 - i * i) / (1600 + i * i)) ** 2, (i / 40) ** 2]);
      const straight = [
        [0, 1],
        [1, 0],
        [END, 1],
      ];
      set(arms, { d: map.through(nesterov ? [[1, 1], ...curved] : straight) });
      spread = [h, Math.min(kappa * h, END)];
      set(bar, { d: map.through(handles()) });
      for (const i of [0, 1]) {
        map.move(ends[i], spread[i], beta);
        set(parts[i], { y: beta > 0.75 ? 21 : -11 });
        map.move(parts[i], Math.max(0.02, Math.min(3.3, spread[i])), beta);
      }
      map.move(swings, nesterov ? 0.56 : 1, 0.36);
      map.move(grows, nesterov ? 2.6 : 3.3, nesterov ? 0.45 : 0.1);
    }

    return ({ h, beta, kappa, rule }) => {
      const nesterov = rule === "nesterov";
      rate.range({ max: END / kappa, step: Math.max(0.0001, 0.0125 / kappa) });
      draw(h, beta, kappa, nesterov);
      const all = momentum(([x, y]) => [x, kappa * y], START, h, beta, STEPS, nesterov);
      const path = all.slice(0, DRAWN);
      const swing = Math.max(...path.map(([, y]) => Math.abs(y)));
      const factors = [h, kappa * h].map((hLambda) => radius(hLambda, beta, nesterov));
      const grows = Math.max(...factors) >= 1;
      let high = 2;
      while (high < swing && high < (grows ? 8 : 64)) high *= 2;
      scale.textContent = high > 2 ? `across: now up to ±${high}` : "";
      plot.axes(plot.x, { ...plot.y, range: [-high, high], ticks: [-high, -high / 2, 0, high / 2, high] });
      for (const [i, size] of SIZES.entries()) plot.ellipse(contours[i], [0, 0], [size, size / Math.sqrt(kappa)]);
      plot.move(begin, 10.5, START[1] + 0.07 * high);
      trail(path);
      const until = (good) => {
        const first = all.findLastIndex((point) => !good(point)) + 1;
        return first > STEPS ? null : first;
      };
      const loss = ([x, y]) => (x * x + kappa * y * y) / 2;
      const enough = loss(START) / 1000;
      const thousandth = until((point) => loss(point) < enough);
      const floor = until((point) => Math.abs(point[1]) <= 0.05);
      const [along, across] = factors.map((size) => digits(size, 3));
      let sentence = `The loss grows: in the long run a step multiplies the distance across the floor by ${across}. The bar sticks out of the colours.`;
      if (!grows) {
        const arrived =
          thousandth === null
            ? `not down to a thousandth within ${STEPS} steps`
            : `down to a thousandth after ${thousandth} steps, for good`;
        const slower = factors[0] > factors[1] ? "the floor is" : "the walls are";
        const which = along === across ? "neither direction is slower" : `${slower} the slower part`;
        sentence = `The loss is ${arrived}. In the long run a step multiplies the distance by ${along} along the floor and by ${across} across it: ${which}.`;
      }
      return [{ thousandth, floor, factors, path }, sentence];
    };
  }

  define(
    "ravine",
    "Momentum in a ravine: where should its bar lie?",
    { h: 0.075, beta: 0.5, kappa: 25, rule: "momentum" },
    build,
  );
}
