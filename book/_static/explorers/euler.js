// Chapter 08: Euler's polygon in a valley, at any learning rate, beside the exact path of the flow.
{
  const { TABLEAUX, integrate, round, digits, Plot, define } = explorers;
  const CURVATURE = [1, 10]; // along the valley, across it
  const START = [3, 1];
  const TIME = 2;

  function build(panel) {
    panel.slider("h", "learning rate h", { min: 0.01, max: 0.22, step: 0.005 }, 3);
    const plot = new Plot(
      "A valley, its exact path, and Euler’s steps",
      { range: [-0.5, 3.3], ticks: [0, 1, 2, 3], label: "along the valley, θ₁" },
      { range: [-1.6, 1.6], ticks: [-1, 0, 1], label: "across, θ₂" },
      { width: panel.room, height: 330 },
    );
    for (const level of [0.15, 1, 3, 6.5, 12]) {
      plot.ellipse(
        plot.add("ellipse", "contour"),
        [0, 0],
        CURVATURE.map((curvature) => Math.sqrt((2 * level) / curvature)),
      );
    }
    const flow = Array.from({ length: 201 }, (_, i) =>
      START.map((x, d) => x * Math.exp(-CURVATURE[d] * i * (TIME / 200))),
    );
    plot.add("path", "line thick flow", { d: plot.through(flow) });
    const trail = plot.trail("sgd");
    plot.move(plot.add("path", "line flow", { d: "M-6 0h12m-6-6v12" }), 0, 0);
    plot.write("minimum", "flow middle", 0, -0.22);
    plot.write("start", "quiet middle", 3.05, 1.13);
    plot.write("the exact path", "flow", 1.25, -0.22);
    const name = plot.write("Euler’s steps", "sgd end");
    panel.pictures.append(plot.svg);

    return ({ h }) => {
      const steps = round(TIME / h);
      const path = integrate(([x, y]) => [CURVATURE[0] * x, CURVATURE[1] * y], START, h, steps, TABLEAUX.euler);
      trail(path);
      const across = 1 - h * CURVATURE[1];
      plot.move(name, ...(across > -0.5 ? [2.45, 0.55] : [3.25, -1.4]));
      let words = "the steps are so short that the polygon lies on the exact path.";
      if (across < 0.75) words = "it cuts the corner, because it trusts each slope for too long.";
      if (across < 1e-9) words = "one step to the floor, then along it.";
      if (across < -1e-9) words = "it overshoots the floor, and lands closer than before.";
      if (across < -0.8) words = "it overshoots at every step, and the bouncing hardly dies away.";
      if (across < -1 + 1e-9) words = "it bounces from wall to wall, for ever.";
      if (across < -1 - 1e-9) words = "each bounce is higher than the last. Training blows up.";
      const size = `${digits(across, 2)} (1 − hλ₂, with hλ₂ = ${digits(h * CURVATURE[1], 2)})`;
      return [
        { steps, path, across },
        `${steps} steps to time ${TIME}. Each multiplies what is left across the valley by ${size}: ${words}`,
      ];
    };
  }

  define("euler", "Your learning rate is a step of time", { h: 0.02 }, build);
}
