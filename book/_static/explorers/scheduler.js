// Chapter 05: be the scheduler of one training step. A plan is a set of accesses to memory, and which must wait for
// which; every order that respects this may happen. Pick one, and see where the weight goes.
{
  const { set, html, define } = explorers;
  const N = 3;
  const RATE = N; // h: one step moves the weight by h s / N = s
  const GRADIENT = 1000;
  const MEMORY = { θ: 0, s: 111, i: 3 };
  const LETTERS = "abcdefgh"; // of the accesses
  const due = (i) => i % N === 0;
  const move = (θ, s) => θ - (RATE * s) / N;

  // An access is [what it reads, its words, none] or [what it writes, its words, what it waits for, its value], which it
  // computes from what the reads that it waits for saw.
  const READ_S = ["s", "s, for θ − hs/N"];
  const READ_THETA = ["θ", "θ, for θ − hs/N"];
  const READ_SUM = ["s", "s, for s + g"];
  const COUNT = ["i", "i + 1", [], (i) => i + 1]; // adds in place
  const PLANS = {
    published: [
      READ_S,
      READ_THETA,
      COUNT,
      ["θ", "θ − hs/N", [1, 0], move],
      ["s", "g, restarted", [], () => GRADIENT],
      READ_SUM,
      ["s", "s + g, grown", [5], (s) => s + GRADIENT],
    ],
    masked: [
      READ_S,
      READ_THETA,
      ["i", "i, is it due?"],
      COUNT,
      ["θ", "θ, to keep it"],
      ["θ", "θ − hs/N if due, else θ", [1, 0, 2, 4], (θ, s, i, kept) => (due(i) ? move(θ, s) : kept)],
      READ_SUM,
      ["s", "g if due, else s + g", [2, 6], (i, s) => (due(i) ? GRADIENT : s + GRADIENT)],
    ],
    ordered: [
      ["θ", "θ"],
      ["s", "s"],
      ["i", "i"],
      ["θ", "θ − hs/N if due, else θ", [0, 1, 2], (θ, s, i) => (due(i) ? move(θ, s) : θ)],
      ["s", "g if due, else s + g", [0, 1, 2], (_, s, i) => (due(i) ? GRADIENT : s + GRADIENT)],
      ["i", "i + 1", [0, 1, 2], (...seen) => seen[2] + 1],
    ],
  };

  /** The memory, and what was seen, after one access more. */
  function perform([what, , first, value], access, { memory, seen }) {
    if (!value) return { memory, seen: { ...seen, [access]: memory[what] } };
    return {
      memory: { ...memory, [what]: value(...(first.length ? first.map((read) => seen[read]) : [memory[what]])) },
      seen,
    };
  }

  const ready = (plan, done, access) =>
    !done.includes(access) && (plan[access][2] ?? []).every((first) => done.includes(first));

  /** All that one step can leave in memory, "θ,s,i", and in how many orders. */
  function possible(plan) {
    let states = [{ done: [], memory: MEMORY, seen: {}, orders: 1 }];
    for (const _ of plan) {
      const next = new Map();
      for (const { orders, ...state } of states) {
        for (const access of plan.keys()) {
          if (!ready(plan, state.done, access)) continue;
          const after = { done: [...state.done, access].sort(), ...perform(plan[access], access, state) };
          const key = JSON.stringify(after);
          next.set(key, { ...after, orders: orders + (next.get(key)?.orders ?? 0) });
        }
      }
      states = [...next.values()];
    }
    const results = {};
    for (const { memory, orders } of states)
      results[Object.values(memory)] = (results[Object.values(memory)] ?? 0) + orders;
    return results;
  }

  /** What happened, from the digits. */
  function verdict({ θ, s }) {
    if (θ === 0) return "No update: the count went up before it was read.";
    if (θ === -111 && s === GRADIENT) return "Just what was meant.";
    const used = {
      111: "the old sum",
      1000: "a sum that had started again: three gradients are lost",
      1111: "a sum that had grown",
      2000: "a sum with the gradient twice",
    };
    const left = { 1000: "starts again", 1111: "was not restarted", 2000: "has the gradient twice" };
    return `The weight used ${used[-θ]}. The sum that is left ${left[s]}.`;
  }

  function build(panel) {
    panel.choice("plan", "Plan", { published: "published", masked: "repaired", ordered: "ordered" }, (plan) => ({
      plan,
      picks: "",
    }));
    panel.controls.picks = (text) => (/^\d(\.\d)*$/.test(text) ? text : undefined);
    const all = Object.fromEntries(Object.entries(PLANS).map(([name, plan]) => [name, possible(plan)]));
    let met = {}; // for each plan the results seen
    panel.forget = () => {
      met = {};
    };
    const [memory, cards, order] = [
      html("div", { class: "memory" }),
      html("div", { class: "cards" }),
      html("p", { class: "order" }),
    ];
    const picks = () => panel.state.picks.split(".").filter(Boolean);
    const back = panel.button("Take back", () => ({ picks: picks().slice(0, -1).join(".") }));
    const again = panel.button("Start again", () => ({ picks: "" }));
    const lucky = panel.button("Finish at random", () => {
      const [plan, done] = [PLANS[panel.state.plan], picks().map(Number)];
      if (done.length === plan.length) done.length = 0;
      while (done.length < plan.length) {
        const open = [...plan.keys()].filter((access) => ready(plan, done, access));
        done.push(open[Math.floor(Math.random() * open.length)]);
      }
      return { picks: done.join(".") };
    });
    panel.pictures.append(memory, cards, order, html("div", { class: "buttons" }, lucky, again, back));
    let drawn = null;

    function showCards(plan, done, values) {
      if (drawn !== plan) {
        cards.replaceChildren(
          ...plan.map(([what, words, , value], access) => {
            const card = panel.button("", () =>
              ready(plan, picks().map(Number), access) ? { picks: [...picks(), access].join(".") } : {},
            );
            const does = value ? `write ${what} ←` : "read";
            card.append(html("b", {}, `${LETTERS[access]}: ${does} ${words}`), html("small"));
            return card;
          }),
        );
        drawn = plan;
      }
      for (const [access, card] of [...cards.children].entries()) {
        const [place, open] = [done.indexOf(access), ready(plan, done, access)];
        const waits = (plan[access][2] ?? []).filter((first) => !done.includes(first)).sort();
        const did = `${place + 1}. ${plan[access][3] ? "Wrote" : "Saw"} ${values[access]}`.replace("-", "−");
        const words = open ? "ready" : `waits for ${waits.map((first) => LETTERS[first]).join(", ")}`;
        card.lastChild.textContent = place < 0 ? words : did;
        set(card, {
          "aria-disabled": !open,
          class: `card ${plan[access][3] ? "write" : ""} ${place < 0 ? "" : "done"}`,
        });
      }
    }

    return (state) => {
      const [plan, results] = [PLANS[state.plan], all[state.plan]];
      const done = [];
      const values = {};
      let at = { memory: MEMORY, seen: {} };
      for (const pick of picks().map(Number)) {
        if (!plan[pick] || !ready(plan, done, pick)) break; // an address that somebody made up
        at = perform(plan[pick], pick, at);
        done.push(pick);
        values[pick] = at.memory[plan[pick][0]];
      }
      state.picks = done.join(".");
      showCards(plan, done, values);
      const { θ, s, i } = at.memory;
      const cell = (name, value, before = value) =>
        html("span", { class: value === before ? "" : "changed" }, name, html("b", {}, value));
      const cells = [
        cell("sum s", s, MEMORY.s),
        cell("count i", i, MEMORY.i),
        cell("gradient g", GRADIENT),
        cell("N = h", N),
      ];
      memory.replaceChildren(cell("−θ", 0 - θ, 0), ...cells);
      const finished = done.length === plan.length;
      met[state.plan] ??= new Set();
      if (finished) met[state.plan].add(`−θ = ${0 - θ}, s = ${s}${θ === -111 && s === GRADIENT ? " (as meant)" : ""}`);
      const orders = Object.values(results)
        .reduce((sum, n) => sum + n, 0)
        .toLocaleString("en");
      const found = [...met[state.plan]];
      order.textContent = `Results seen: ${found.length} of ${Object.keys(results).length} (${orders} orders are allowed). ${found.join("; ")}`;
      const left = done.length
        ? `${plan.length - done.length} of ${plan.length} cards to go. Meant are −θ = 111 and s = 1000.`
        : "In this step the weight is due to move. Meant are −θ = 111, the old sum, and s = 1000, a sum that starts again with g. Pick a card that is ready.";
      const ends = `−θ = ${0 - θ}, s = ${s}. ${verdict(at.memory)} ${results[[θ, s, i]]} of ${orders} orders end so.`;
      return [{ memory: [θ, s, i], finished, results }, finished ? ends : left];
    };
  }

  define("scheduler", "Be the scheduler: what runs next?", { plan: "published", picks: "" }, build);
}
