// Chapter 13: from any start and at any learning rate, Euler's points between the flow of L and the flow of the modified
// loss, in the smallest deep network: L(a, b) = (y − ab)²/2.
{
  const { TABLEAUX, integrate, round, set, digits, Plot, define } = explorers;
  const TARGET = 0.6;
  const TIME = 8;
  const FINE = 0.01; // the step of the flows: so short that they are flows

  function gradient([a, b]) {
    const slope = -(TARGET - a * b);
    return [slope * b, slope * a];
  }

  /** Of L + (h/4) ‖∇L‖², as companion.gradient_flow.modified_gradient. */
  const modified = (h) => (values) => {
    const [a, b] = values;
    const [p, q] = gradient(values);
    const half = h / 2;
    const mixed = half * (2 * a * b - TARGET);
    return [p + (half * (b * b) * p + mixed * q), q + (mixed * p + half * (a * a) * q)];
  };

  function build(panel) {
    panel.slider("h", "learning rate h", { min: 0.005, max: 0.06, step: 0.0025 }, (h) => String(+h.toPrecision(3)));
    panel.slider("a", "start, weight a", { min: 0, max: 3.2, step: 0.05 }, 2);
    panel.slider("b", "start, weight b", { min: 0.2, max: 3.6, step: 0.05 }, 2);
    const plot = new Plot(
      "The loss, its flow, that of the modified loss, and Euler’s steps",
      { range: [-0.1, 3.4], ticks: [0, 1, 2, 3], label: "weight a" },
      { range: [0, 3.8], ticks: [0, 1, 2, 3], label: "weight b" },
      { width: panel.room, height: 400 },
    );
    const hyperbola = (product) => {
      const points = Array.from({ length: 220 }, (_, i) => [product / (3.8 * 0.985 ** i), 3.8 * 0.985 ** i]);
      return plot.through(points.filter(([a]) => a < 4));
    };
    for (const away of [0.2, 0.63, 1.4, 2.4, 4, 5.6, 7.5, 9.4])
      plot.add("path", "contour", { d: hyperbola(TARGET + away) });
    plot.add("path", "line thin quiet", {
      d: plot.through([
        [0, 0],
        [3.8, 3.8],
      ]),
    });
    plot.add("path", "line dotted quiet", { d: hyperbola(TARGET) });
    const [flow, bent] = ["flow", "dashed adaptive"].map((look) => plot.add("path", `line ${look}`));
    const trail = plot.trail("sgd");
    const handle = plot.handle();
    plot.write("floor: ab = y", "quiet end", 3.3, 0.3);
    plot.write("a = b: flattest floor", "quiet", 1.05, 0.88);
    const begin = plot.write("start: drag it", "");
    plot.write("a² + b² at the end", "ink end", 3.3, 1.95);
    const names = ["sgd", "flow", "adaptive"].map((look, i) =>
      plot.write("", `${look} end`, 3.3, [1.35, 1.75, 1.55][i]),
    );
    const near = (value, low, high) => Math.round(20 * Math.max(low, Math.min(high, value))) / 20;
    const handles = () => [[panel.state.a, panel.state.b]];
    plot.drag(handles, (a, b) => panel.change({ a: near(a, 0, 3.2), b: near(b, 0.2, 3.6) }));
    panel.pictures.append(plot.svg);
    let exact = {}; // the flow of L, which does not depend on h

    return ({ h, a, b }) => {
      const fine = (field, h = FINE, time = TIME) => integrate(field, [a, b], h, time / h, TABLEAUX.rk4);
      if (exact.key !== `${a} ${b}`) exact = { key: `${a} ${b}`, path: fine(gradient) };
      const paths = [integrate(gradient, [a, b], h, round(TIME / h), TABLEAUX.euler), exact.path, fine(modified(h))];
      // As a curve: with more points where it is fast.
      const curve = (field, path) =>
        plot.through([...fine(field, FINE / 10, 0.1), ...path.filter((_, i) => i > 10 && (i < 99 || i % 8 === 0))]);
      set(flow, { d: curve(gradient, paths[1]) });
      set(bent, { d: curve(modified(h), paths[2]) });
      trail(paths[0].slice(0, 150));
      plot.move(handle, a, b);
      set(begin, { class: `label quiet ${a < 1 ? "" : "end"}` });
      plot.move(begin, a + (a < 1 ? 0.08 : -0.08), Math.min(3.68, b + 0.12));
      const ends = paths.map((path) => path.at(-1)[0] ** 2 + path.at(-1)[1] ** 2);
      const steepest = (a * a + b * b) / 2 + Math.hypot((a * a - b * b) / 2, 2 * a * b - TARGET); // eigenvalue there
      const [euler, ofL, other] = ends.map((end) => (end < 1e4 ? digits(end, 2) : "it blows up"));
      names[0].textContent = `gradient descent: ${euler}`;
      names[1].textContent = `flow of L: ${ofL}`;
      names[2].textContent = `flow of L + (h/4)‖∇L‖²: ${other}`;
      const words = `Where they end, the curvature a² + b² is ${ofL} for the flow of L, ${other} for the flow of L + (h/4)‖∇L‖², and ${euler} for gradient descent. The flattest floor has ${2 * TARGET}.`;
      const ahead = `At the start hλ is ${digits(h * steepest, 2)}.`;
      return [{ ends }, `${ahead} ${ends[0] < 1e4 ? words : "Gradient descent blows up; the flows do not."}`];
    };
  }

  define("which-loss", "Whose flow do the steps follow?", { h: 0.025, a: 2.8, b: 3.5 }, build);
}
