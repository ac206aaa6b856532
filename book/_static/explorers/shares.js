// Chapters 06, 07 and 14: parts of different sizes, of examples, words or samples. Who counts for how much?
{
  const { svg, digits, fraction, Plot, define } = explorers;
  const COLOURS = ["sgd", "heun", "rk4", "momentum", "adaptive"];
  const KINDS = {
    parts: ["part", "example", "in one large batch of", 1, 16, "in"],
    sentences: ["sentence", "word", "in one large batch of", 1, 32, "in"],
    devices: ["device", "sample", "on one device with", 0, 8, "on"],
  };

  function build(panel) {
    const [part, unit, whole, least, most, at] = KINDS[panel.start.kind];
    panel.slider("parts", `${part}s`, [2, 3, 4, 5]);
    const rows = COLOURS.map((colour, i) => {
      const row = panel.slider(`n${i + 1}`, `${unit}s ${at} ${part} ${i + 1}`, { min: least, max: most, step: 1 });
      row.classList.add(colour);
      return row;
    });
    panel.choice("rule", "Rule", { means: "mean of means", weighted: `weighed by ${unit}s` });
    const plot = new Plot(
      "Shares in the update, as one batch and by the rule",
      {
        range: [0, 1],
        ticks: [0, 0.2, 0.4, 0.6, 0.8, 1].map((v) => [v, `${100 * v} %`]),
        label: "share in the update",
      },
      { range: [0, 1], ticks: [], label: "" },
      { width: panel.room, height: 210, left: 18, right: 18 },
    );
    plot.back.querySelector(".axis").remove();
    const [meant, caption] = [plot.write("", "ink", 0, 0.9), plot.write("", "ink", 0, 0.4)];
    const gap = plot.write("", "quiet end", 1, 0.2);
    const bars = plot.add("g", "");
    panel.pictures.append(plot.svg);

    function bar(sizes, shares, y) {
      let from = plot.left;
      return sizes.flatMap((n, i) => {
        if (!n) return [];
        const width = shares[i] * (plot.right - plot.left);
        const space = Math.min(1, width / 6);
        const look = { d: `M${from} ${y + 17}h${n * width}`, "stroke-dasharray": `${width - space} ${space}` };
        const middle = from + (n * width) / 2;
        from += n * width;
        const text = n * width > 70 ? `${i + 1}: ${digits(100 * n * shares[i], 1)} %` : n * width > 12 ? i + 1 : "";
        const words = svg("text", { class: `label middle ${COLOURS[i]}`, x: middle, y: y + 50 }, text);
        return [svg("path", { class: `line share ${COLOURS[i]}`, ...look }), words];
      });
    }

    return ({ parts, rule, ...state }) => {
      const sizes = Array.from({ length: parts }, (_, i) => state[`n${i + 1}`]);
      for (const [i, row] of rows.entries()) row.hidden = i >= parts;
      const total = sizes.reduce((sum, n) => sum + n, 0);
      const means = rule === "means";
      const divisors = sizes.map((n) => (means ? parts * n : total));
      const [held, asked] = means ? [sizes.filter(Boolean).length, parts] : [1, 1];
      const shares = sizes.map((n, i) => (n ? fraction(1, divisors[i]) : null));
      const alone = sizes.map(() => 1 / total);
      bars.replaceChildren(
        ...bar(sizes, alone, 34),
        ...bar(
          sizes,
          divisors.map((n) => 1 / n),
          114,
        ),
      );
      meant.textContent = `${whole} ${total} ${unit}${total === 1 ? "" : "s"}`;
      caption.textContent = means ? "by the mean of means" : `weighed by ${unit}s`;
      gap.textContent = held < asked ? "missing" : "";
      const result = { shares, sum: fraction(held, asked) };
      const present = sizes.filter(Boolean);
      const [small, large] = [Math.min(...present), Math.max(...present)];
      if (!total) return [{ shares, sum: "0" }, `Nobody holds a ${unit}.`];
      const one = fraction(1, total);
      const missing = held < asked ? ` All together they make ${result.sum} of a step.` : "";
      const should = `it should be ${one}, as ${meant.textContent}.${missing}`;
      if (!means || small === large) {
        const equal = `Each ${unit} counts for ${shares.find(Boolean)}`;
        return [result, missing ? `${equal}; ${should}` : `${equal}, as ${meant.textContent}.`];
      }
      const [few, many] = [sizes.indexOf(small), sizes.indexOf(large)];
      const times = `${fraction(large, small)} times as much`;
      return [
        result,
        `Each ${unit} ${at} ${part} ${few + 1} counts for ${shares[few]}, ${at} ${part} ${many + 1} for ${shares[many]}: ${times} where there are fewer. For each ${should}`,
      ];
    };
  }

  const start = { parts: 4, n1: 16, n2: 16, n3: 16, n4: 8, n5: 8, rule: "means", kind: "parts" };
  define("shares", "Who counts for how much?", start, build);
}
