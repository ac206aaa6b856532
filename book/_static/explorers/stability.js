// Chapters 10 and 12: how far may a step go? On the real axis (a way downhill) and in the plane (where the weights also
// circle), for each method of the book, for one step or for one gradient.
{
  const { TABLEAUX, chebyshev, factor, gradients, limit, set, digits, Plot, define } = explorers;
  const NAMES = {
    euler: "Euler",
    heun: "Heun",
    kutta3: "Kutta 3",
    rk4: "RK4",
    rk45: "RK45",
    extragradient: "Extragradient",
    chebyshev: "Chebyshev",
  };
  const LOOKS = {
    euler: "sgd",
    heun: "heun",
    kutta3: "quiet",
    rk4: "rk4",
    rk45: "adaptive",
    extragradient: "momentum",
    chebyshev: "ink",
  };
  const METHODS = Object.keys(NAMES);

  /** Round numbers for an axis. */
  function ticks(edge) {
    const power = 10 ** Math.floor(Math.log10(edge));
    const stride = power * (edge / power > 5 ? 2 : edge / power > 2 ? 1 : 0.5);
    return Array.from({ length: Math.floor(edge / stride) + 1 }, (_, i) => +(i * stride).toPrecision(3));
  }

  /** Where a function over [left, right] × [0, top] crosses 1, as pieces of lines (marching squares). */
  function contour(size, left, right, top) {
    const [columns, rows] = [60, 30];
    const place = (i, j) => [left + ((right - left) * i) / columns, (top * j) / rows];
    const above = Array.from({ length: columns + 1 }, (_, i) =>
      Array.from({ length: rows + 1 }, (_, j) => size(...place(i, j)) - 1),
    );
    const pieces = [];
    for (let i = 0; i < columns; i++) {
      for (let j = 0; j < rows; j++) {
        const corners = [
          [i, j],
          [i + 1, j],
          [i + 1, j + 1],
          [i, j + 1],
          [i, j],
        ];
        const found = [];
        for (let side = 0; side < 4; side++) {
          const [[a, b], [u, v]] = corners.slice(side, side + 2);
          const [from, to] = [above[a][b], above[u][v]];
          const share = from / (from - to);
          if (from > 0 !== to > 0) found.push(place(a + share * (u - a), b + share * (v - b)));
        }
        while (found.length > 1) pieces.push(found.splice(0, 2));
      }
    }
    return pieces;
  }

  function build(panel) {
    panel.choice("method", "Method", NAMES);
    const stages = panel.slider("stages", "stages", { min: 2, max: 20, step: 1 });
    const downhill = panel.slider("x", "", { min: 0, max: 1000 }, 2);
    const rotation = panel.slider("y", "", { min: 0, max: 4, step: 0.01 }, 2);
    panel.choice("per", "Counted for", { step: "one step", gradient: "one gradient" }, (per) => {
      const { method, stages: s, x, y, per: before } = panel.state; // it stays the same step
      const times = per === before ? 1 : gradients(of(method, s)) ** (per === "step" ? 1 : -1);
      return { per, x: x * times, y: y * times };
    });
    panel.choice("view", "Look at", { axis: "downhill only", plane: "downhill and rotation" });

    const none = { range: [0, 4], ticks: [], label: "" };
    const factors = { range: [-1.6, 1.6], ticks: [-1, 0, 1], label: "factor of one step" };
    const curve = new Plot("The factor of a step over hλ", none, factors);
    const [band, line, point, tag] = [
      curve.add("path", "band"),
      curve.add("path", ""),
      curve.handle(),
      curve.write("", ""),
    ];
    const plane = new Plot("Where steps are stable, over hλ and hω", none, none);
    const ray = plane.add("path", "line thin dotted ink");
    const regions = METHODS.map((name) => [name, plane.add("path", ""), plane.write("", `middle ${LOOKS[name]}`)]);
    const here = plane.handle();
    const rows = { range: [0, 7.7], ticks: METHODS.map((name, i) => [6.5 - i, NAMES[name]]), label: "" };
    const bars = new Plot("The longest stable step of each method", none, rows, { left: 92 });
    const pieces = METHODS.map(() => bars.add("rect", "", { height: 18 }));
    const mark = bars.add("path", "line thin ink");
    const names = METHODS.map(() => bars.write("", ""));
    const yours = bars.write("your step", "");
    panel.note(
      "Drag the circle or the slider. A bar ends at the longest stable step of its method. Where yours is longer the bar is pale: there the distance grows.",
    );

    const known = new Map();
    const once = (key, compute) => known.get(key) ?? known.set(key, compute()).get(key);
    const of = (name, s) => (name === "chebyshev" ? once(s, () => chebyshev(s)) : TABLEAUX[name]);
    const reach = (method, x, y) => (y ? limit(method, x, y) : once(method, () => limit(method)));
    const fine = (edge) => (edge > 40 ? 1 : edge > 6 ? 0.1 : 0.01); // the step of the slider
    let [edge, top, height] = [4, 4, 0]; // of the axes, of the handle
    const near = (x) => +(Math.round(Math.max(0, x) / fine(edge)) * fine(edge)).toFixed(2);
    const handles = () => [[panel.state.x, height]];
    curve.drag(handles, (x) => panel.change({ x: near(x) }));
    plane.drag(handles, (x, y) => panel.change({ x: near(x), y: Math.round(100 * y) / 100 }));

    function showCurve(axis, name, method, share) {
      curve.axes(axis, factors);
      set(band, { d: `M${curve.left} ${curve.Y(1)}H${curve.right}V${curve.Y(-1)}H${curve.left}z` });
      const points = Array.from({ length: 241 }, (_, i) => [
        (edge * i) / 240,
        factor(method, (-share * edge * i) / 240, 0)[0],
      ]);
      set(line, { class: `line ${LOOKS[name]}`, d: curve.through(points) });
      curve.move(point, panel.state.x, height);
      const late = panel.state.x > 0.7 * edge;
      set(tag, { class: `label ink ${late ? "end" : ""}`, x: late ? -10 : 10, y: height > 0 ? 18 : -9 });
      curve.move(tag, panel.state.x, height);
    }

    function showPlane(axis, name, { stages: s, per, x, y }) {
      const right = -0.15 * edge;
      plane.axes({ ...axis, range: [edge, right] }, { range: [0, top], ticks: ticks(top), label: `hω of one ${per}` });
      set(ray, {
        d: plane.through([
          [0, 0],
          [9 * x, 9 * y],
        ]),
      });
      const written = []; // where names stand: the chosen method's comes first, others only where there is room
      for (const [other, region, words] of regions.toSorted((p, q) => (q[0] === name) - (p[0] === name))) {
        const shown = name !== "chebyshev" ? other !== "chebyshev" : ["euler", "rk45", name].includes(other);
        const method = of(other, s);
        const cost = per === "gradient" ? gradients(method) : 1;
        const draw = () => {
          const size = (x, y) => Math.hypot(...factor(method, -cost * x, cost * y));
          const pieces = contour(size, right, edge, top);
          const highest = pieces.flat().reduce((p, q) => (q[1] > p[1] ? q : p), [0, 0]);
          return [pieces.map((piece) => plane.through(piece)).join(""), highest];
        };
        const key = [other, other === "chebyshev" && s, edge, cost].join();
        const [d, [a, b]] = shown ? once(key, draw) : ["", [0, 0]];
        set(region, { class: `line ${other === name ? "" : "thin faint"} ${LOOKS[other]}`, d });
        plane.move(words, a, b - 0.07 * top);
        const [X, Y] = [plane.X(a), plane.Y(b)];
        const free = d && !written.some(([u, v]) => Math.hypot((u - X) / 4, v - Y) < 14);
        words.textContent = free ? NAMES[other] : "";
        if (free) written.push([X, Y]);
      }
      plane.move(here, x, y);
    }

    function showBars(axis, { stages: s, per, x, y }) {
      const far = Math.hypot(x, y);
      bars.axes(axis, rows);
      for (const [i, name] of METHODS.entries()) {
        const method = of(name, s);
        const cost = per === "gradient" ? gradients(method) : 1;
        const value = reach(method, x / far, y / far) / cost;
        const [right, middle] = [Math.min(bars.X(value), bars.right), bars.Y(6.5 - i)];
        const inside = right > 300;
        const grows = Math.hypot(...factor(method, -cost * x, cost * y)) > 1 + 1e-11;
        set(pieces[i], {
          x: bars.left,
          y: middle - 9,
          width: right - bars.left,
          class: `piece ${LOOKS[name]} ${grows ? "faint" : ""}`,
        });
        set(names[i], {
          x: inside ? right - 6 : right + 5,
          y: middle + 4.5,
          class: `label ${inside ? "onto end" : LOOKS[name]}`,
        });
        names[i].textContent = digits(value, value < 20 ? 2 : 0) + (value > edge ? " →" : "");
      }
      set(mark, { d: `M${bars.X(far)} ${bars.top}V${bars.bottom}` });
      const late = far > edge / 2;
      set(yours, { class: `label ink ${late ? "end" : ""}`, x: late ? -5 : 5 });
      bars.move(yours, Math.min(far, edge), 7.2);
    }

    return (state) => {
      const { method: name, per, view } = state;
      const method = of(name, state.stages);
      const [cost, farthest] = [gradients(method), reach(method)];
      const share = per === "gradient" ? cost : 1;
      edge = Math.max(per === "gradient" ? 2.6 : 4, (1.2 * farthest) / share);
      if (edge > 6) edge = Math.ceil(edge);
      top = per === "gradient" ? 1.6 : 4;
      state.x = Math.min(state.x, edge);
      state.y = Math.min(state.y, top);
      const flat = view === "axis";
      const [x, y] = [state.x, flat ? 0 : state.y];
      stages.hidden = name !== "chebyshev";
      rotation.hidden = flat;
      downhill.range({ max: edge, step: fine(edge) });
      rotation.range({ max: top });
      downhill.firstChild.textContent = `downhill, hλ a ${per}`;
      rotation.firstChild.textContent = `rotation, hω a ${per}`;
      const value = factor(method, -share * x, share * y);
      const size = Math.hypot(...value);
      height = flat ? Math.max(-1.5, Math.min(1.5, value[0])) : y;
      const beyond = height === value[0] ? "" : value[0] > 0 ? " ↑" : " ↓";
      tag.textContent = digits(value[0], 2) + beyond;
      const axis = { range: [0, edge], ticks: ticks(edge), label: `hλ of one ${per}` };
      const longestOf = flat ? `longest hλ of one ${per}` : "longest along the dotted line";
      const { svg } = flat ? curve : plane;
      if (flat) showCurve(axis, name, method, share);
      else showPlane(axis, name, state);
      showBars({ ...axis, label: longestOf }, { ...state, y });
      if (!svg.isConnected) panel.pictures.replaceChildren(svg, bars.svg);
      const longest = y ? reach(method, x / Math.hypot(x, y), y / Math.hypot(x, y)) : farthest;
      const who = name === "chebyshev" ? `Chebyshev with ${cost} stages` : NAMES[name];
      const stable = flat ? `${who} is stable up to hλ =` : `Along the dotted line ${who} is stable up to`;
      const bill = cost > 1 ? ` (${digits(size ** (1 / cost), 3)} for each of its ${cost} gradients)` : "";
      const verdict = size > 1 + 1e-11 ? "grows" : size < 1 - 1e-11 ? "shrinks" : "stays";
      return [
        { cost, limit: farthest, longest, factor: value },
        `${stable} ${digits(longest, 2)} a step, ${digits(longest / cost, 2)} a gradient. Your step multiplies the distance by ${digits(size, 3)}${bill}: it ${verdict}.`,
      ];
    };
  }

  const start = { method: "rk4", stages: 5, x: 1.5, y: 0, per: "step", view: "axis" };
  define("stability", "How far may a step go, and what does it cost?", start, build);
}
