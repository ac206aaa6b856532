// Chapter 15: two workers whose losses are bowls. Each makes k steps of its own, then both go to the average.
{
  const { set, digits, Plot, define } = explorers;
  const MINIMA = [
    [-1, -0.5],
    [1, 1],
  ];
  const START = [1.2, -0.7];
  const ROUNDS = 9; // drawn at least,
  const WALK = 180; // and so many steps
  const STEPS = 100; // of the chapter's runs
  const BYTES = 4 * 2410; // of the chapter's network, for one exchange
  const COLOURS = ["heun", "rk4"];
  const LEVELS = [0.02, 0.1, 0.25, 0.5, 0.9, 1.4];

  function build(panel) {
    panel.slider("k", "steps k alone", [1, 2, 3, 5, 7, 10, 14, 20, 30, 50, 70, 100]);
    panel.slider("h", "learning rate h", { min: 0.01, max: 0.5, step: 0.01 }, 2);
    panel.slider("ratio", "bowls, steep : flat", [1, 2, 3, 5, 10, 20, 50], (times) =>
      times === 1 ? "equal" : `${times} : 1`,
    );
    const plot = new Plot(
      "Two workers’ paths, their averages, and where these rest",
      { range: [-1.35, 1.45], ticks: [-1, 0, 1], label: "first weight" },
      { range: [-0.85, 1.35], ticks: [-0.5, 0, 0.5, 1], label: "second weight" },
      { width: panel.room, height: 400 },
    );
    const contours = LEVELS.map(() => plot.add("ellipse", "contour"));
    const curve = plot.add("path", "line dotted flow");
    const lines = COLOURS.map((colour) => plot.add("path", `line thin ${colour}`));
    const averages = plot.trail("momentum", false);
    for (const r of [0, 1])
      plot.move(plot.add("path", `line ${COLOURS[r]}`, { d: "M-5-5l10 10m0-10l-10 10" }), ...MINIMA[r]);
    const [diamond, circle] = [
      plot.add("path", "line ink", { d: "M0-7l7 7l-7 7l-7-7z" }),
      plot.add("circle", "line flow", { r: 6 }),
    ];
    plot.write("minimum of worker 0", "heun", -0.94, -0.58);
    plot.write("minimum of worker 1", "rk4 end", 0.98, 1.09);
    plot.write("start", "quiet middle", 1.2, -0.8);
    const name = plot.write("averages", "momentum end");
    const [best, here] = [plot.write("minimum of the mean", "flow"), plot.write("", "ink")];
    const far = plot.write("", "flow");
    panel.pictures.append(plot.svg);

    return ({ k, h, ratio }) => {
      const curvatures = [
        [1, 1 / ratio],
        [1 / ratio, 1],
      ];
      const middles = [START];
      const walked = ["", ""];
      const rounds = Math.max(ROUNDS, Math.ceil(WALK / k));
      for (let round = 0; round < rounds; round++) {
        const ends = MINIMA.map((minimum, r) => {
          const path = [middles[round]];
          for (let step = 0; step < k; step++)
            path.push(path[step].map((x, d) => x - h * (curvatures[r][d] * (x - minimum[d]))));
          walked[r] += plot.through(path);
          return path[k];
        });
        middles.push(ends[0].map((x, d) => (x + ends[1][d]) / 2));
      }
      // At rest the ways of the two workers cancel: a mean of their minima, weighted by how far k steps bring each.
      const resting = (steps) =>
        [0, 1].map((d) => {
          const [p, q] = curvatures.map((curvature) => 1 - (1 - h * curvature[d]) ** steps);
          return (p * MINIMA[0][d] + q * MINIMA[1][d]) / (p + q);
        });
      const [lowest, rest] = [resting(1), resting(k)]; // after single steps: the minimum of the mean loss
      const off = Math.hypot(rest[0] - lowest[0], rest[1] - lowest[1]);
      for (const r of [0, 1]) set(lines[r], { d: walked[r] });
      averages(middles);
      set(curve, { d: plot.through([1, 2, 3, 5, 10, 20, 40, 100, 400].map(resting)) });
      const flat = (1 + 1 / ratio) / 2; // the curvature of the mean loss, along both weights
      for (const [i, level] of LEVELS.entries())
        plot.ellipse(contours[i], lowest, Array(2).fill(Math.sqrt((2 * level) / flat)));
      plot.move(diamond, ...rest);
      plot.move(circle, ...lowest);
      plot.move(best, lowest[0] - 0.1, lowest[1] + 0.09);
      plot.move(name, middles[1][0] - 0.05, middles[1][1] - 0.05);
      plot.move(here, rest[0] + 0.06, rest[1] - 0.09);
      here.textContent = off < 0.005 ? "" : `rest, k = ${k}`;
      const last = resting(400);
      plot.move(far, last[0] + 0.04, last[1] - 0.02);
      far.textContent = Math.hypot(last[0] - rest[0], last[1] - rest[1]) > 0.35 ? "rest, k = 400" : "";
      const exchanges = Math.floor(STEPS / k);
      const bytes = exchanges * BYTES;
      const where = off < 5e-4 ? "at" : `${digits(off, 3)} away from`;
      return [
        { middles, rest, off, exchanges, bytes },
        `Drawn: ${rounds} rounds of ${k} ${k > 1 ? "steps" : "step"}, an exchange after each. The averages come to rest ${where} the minimum of the mean loss. (In ${STEPS} steps the chapter’s network of 2,410 weights sends ${bytes.toLocaleString("en")} bytes.)`,
      ];
    };
  }

  define("drift", "Where do averages come to rest?", { k: 20, h: 0.1, ratio: 10 }, build);
}
