// The frame that the explorers share: settings with native inputs, plots, one sentence, and a place in the address.
//
// The book's figures.show(figure, explorer="ravine", start={"h": 0.075}) puts <ravine-explorer> around a figure. Here it
// takes the figure's place, or stands below it; without JavaScript, and in print, the figure stays. A setting can be
// linked: #ravine?h=0.15&beta=0.97 restores it, and the address of the page follows what a reader sets.
{
  const PAUSE = 300; // ms without a change before the address follows: browsers complain about too many changes
  let count = 0;
  const identifier = () => `explorer-${count++}`;

  /** Sets attributes of an element, and appends children. */
  function set(element, attributes, children = []) {
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  /** An element of HTML, or of a drawing. */
  const html = (name, attributes = {}, ...children) => set(document.createElement(name), attributes, children);
  const svg = (name, attributes = {}, ...children) =>
    set(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

  /** A number in the book's writing: a true minus sign, and none before a zero. */
  const digits = (value, places) =>
    value
      .toFixed(places)
      .replace(/^-(?=.*[1-9])/, "−")
      .replace("-", "");

  /** A drawing with axes. x and y: {range: [low, high], ticks: [number or [number, text], …], label, scale, inverse}. */
  class Plot {
    constructor(words, x, y, { width = 360, height = 270, left = 40, right = 10, top = 10, bottom = 40 } = {}) {
      Object.assign(this, { width, left, right: width - right, top, bottom: height - bottom });
      [this.back, this.inside] = [svg("g"), svg("g")];
      const id = identifier();
      const box = svg("rect", { x: left, y: top, width: this.right - left, height: this.bottom - top });
      const clip = svg("clipPath", { id }, box);
      const shown = svg("g", { "clip-path": `url(#${id})` }, this.inside);
      this.svg = svg(
        "svg",
        { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words },
        clip,
        this.back,
        shown,
      );
      this.axes(x, y);
    }

    /** Draws the axes, anew if they change. */
    axes(x, y) {
      const drawn = JSON.stringify([x, y]);
      if (drawn === this.drawn) return;
      Object.assign(this, { x, y, drawn });
      const { left, right, top, bottom, back } = this;
      const place = ({ range, scale = (v) => v }, from, to) => {
        const [low, high] = range.map(scale);
        return (value) => from + ((scale(value) - low) / (high - low)) * (to - from);
      };
      [this.X, this.Y] = [place(x, left, right), place(y, bottom, top)];
      const write = (at, look, text) => back.append(svg("text", { ...at, class: look }, text));
      back.replaceChildren(svg("path", { class: "axis", d: `M${left} ${top}V${bottom}H${right}` }));
      const named = (tick) => (Array.isArray(tick) ? tick : [tick, String(tick).replace("-", "−")]);
      for (const [v, text] of x.ticks.map(named)) write({ x: this.X(v), y: bottom + 15 }, "tick middle", text);
      for (const [v, text] of y.ticks.map(named)) write({ x: left - 5, y: this.Y(v) + 4 }, "tick end", text);
      write({ x: (left + right) / 2, y: bottom + 35 }, "middle", x.label);
      write({ transform: `translate(11 ${(top + bottom) / 2}) rotate(-90)` }, "middle", y.label);
    }

    /** Adds a part: a path, a circle, …, to be moved later. */
    add(name, look, attributes = {}) {
      return this.inside.appendChild(svg(name, { class: look, ...attributes }));
    }

    /** Adds what can be dragged: it stays whole on the edge of the plot. */
    handle() {
      return this.svg.appendChild(svg("circle", { class: "end", r: 6 }));
    }

    /** Adds words beside a curve, in its colour. */
    write(text, look, ...at) {
      const words = this.add("text", `label ${look}`);
      words.textContent = text;
      if (at.length) this.move(words, ...at);
      return words;
    }

    /** Adds a line with dots, or only dots. Returns what puts it through points, and says if some are not in sight. */
    trail(look, line = true) {
      const [path, dots] = [this.add("path", `line thin ${look}`), this.add("path", `dots ${look}`)];
      const beyond = set(this.write("", look), { x: this.left + 6, y: this.top + 14 });
      const within = (value, { range: [low, high] }) => value >= low && value <= high;
      return (points) => {
        if (line) set(path, { d: this.through(points) });
        set(dots, { d: this.through(points, true) });
        const all = points.every(([x, y]) => within(x, this.x) && within(y, this.y));
        beyond.textContent = all ? "" : "goes on outside the picture";
      };
    }

    /** The `d` of a path through points, or of dots at them (lines of no length); far outside the plot it ends. */
    through(points, dots = false) {
      const parts = [];
      for (const point of points) {
        const [x, y] = [this.X(point[0]), this.Y(point[1])];
        if (!(Math.abs(x) < 1e4 && Math.abs(y) < 1e4)) break;
        parts.push(`${x.toFixed(1)} ${y.toFixed(1)}`);
      }
      return `M${parts.join(dots ? "h0M" : "L")}${dots ? "h0" : ""}`;
    }

    move(element, x, y) {
      set(element, { transform: `translate(${this.X(x)} ${this.Y(y)})` });
    }

    /** An ellipse around a point, in data. */
    ellipse(element, [x, y], [rx, ry]) {
      const [cx, cy] = [this.X(x), this.Y(y)];
      set(element, { cx, cy, rx: this.X(x + rx) - cx, ry: cy - this.Y(y + ry) });
    }

    /**
     * Calls back while a pointer drags: the handle nearest to where it began follows it, from where the handle was.
     * `handles` returns their places; `moved` gets the new place, in data, and which handle. Every drag has a slider, too.
     */
    drag(handles, moved) {
      let grabbed = {};
      const value = ({ range, scale = (v) => v, inverse = (v) => v }, share) => {
        const [low, high] = range.map(scale);
        return inverse(low + Math.max(0, Math.min(1, share)) * (high - low));
      };
      const place = (event) =>
        new DOMPoint(event.clientX, event.clientY).matrixTransform(this.svg.getScreenCTM().inverse());
      this.svg.classList.add("drags");
      this.svg.addEventListener("pointermove", (event) => {
        if (!this.svg.hasPointerCapture(event.pointerId)) return;
        const { x, y } = place(event);
        moved(
          value(this.x, (x + grabbed.x - this.left) / (this.right - this.left)),
          value(this.y, (this.bottom - y - grabbed.y) / (this.bottom - this.top)),
          grabbed.i,
        );
      });
      this.svg.addEventListener("pointerdown", (event) => {
        this.svg.setPointerCapture(event.pointerId);
        const at = place(event);
        const all = handles().map(([x, y], i) => ({ x: this.X(x) - at.x, y: this.Y(y) - at.y, i }));
        grabbed = all.sort((p, q) => Math.hypot(p.x, p.y) - Math.hypot(q.x, q.y))[0];
      });
    }
  }

  /** What every explorer is. `build` makes its controls and plots, and returns `show`. */
  class Explorer extends HTMLElement {
    connectedCallback() {
      if (this.state) return;
      const { heading, start, build } = this.parts;
      this.start = { ...start, ...JSON.parse(this.dataset.start || "{}") };
      this.state = { ...this.start };
      this.controls = {};
      this.form = html("div", { class: "controls" });
      this.pictures = html("div", { class: "pictures" });
      this.says = html("p", { class: "says", role: "status", "aria-live": "polite" });
      const head = html(
        "div",
        { class: "head" },
        html("strong", {}, heading),
        this.button("Reset", () => {
          this.forget?.();
          return this.start;
        }),
      );
      const frame = html("div", { class: "explorer", role: "group", "aria-label": `Explorer: ${heading}` }, head);
      frame.append(this.form, this.pictures, this.says);
      // In the figure, above its caption; or below all of it.
      if (this.dataset.figure) this.append(frame);
      else this.firstElementChild.prepend(frame);
      this.room = Math.max(300, Math.min(640, this.pictures.clientWidth)); // the width of one plot alone
      this.show = build(this);
      this.classList.add("is-live");
      this.update();
      this.restore();
      addEventListener("hashchange", () => this.restore());
      // At once: the browser follows a link later, not at all if it is there, and not if we write our address meanwhile.
      addEventListener("click", ({ target }) => this.restore(target.closest("a")?.hash ?? ""));
    }

    /** Takes the settings that an address's end holds for this explorer, if any. */
    restore(address = location.hash) {
      const [, query] = address.split(`#${this.id}?`);
      if (query === undefined) return;
      const wanted = { ...this.start };
      for (const [key, text] of new URLSearchParams(query)) {
        if (key in this.controls) wanted[key] = this.controls[key](text) ?? wanted[key];
      }
      clearTimeout(this.timer);
      this.state = wanted;
      this.update();
      // On a phone the sentence stands between the controls and the pictures.
      if (innerWidth > 480) this.says.parentElement.scrollIntoView({ block: "nearest" });
      else this.says.scrollIntoView();
    }

    /** Changes settings, and then the address: the settings that differ from the start. */
    change(settings) {
      Object.assign(this.state, settings);
      this.update();
      clearTimeout(this.timer);
      this.timer = setTimeout(() => {
        const changed = Object.entries(this.state).filter(([key, value]) => value !== this.start[key]);
        history.replaceState(null, "", `#${this.id}?${new URLSearchParams(changed)}`);
      }, PAUSE);
    }

    /** Shows the settings. `show` returns the result, for whoever asks, and a sentence that says it. */
    update() {
      const [result, sentence] = this.show(this.state);
      this.result = result;
      if (this.says.textContent !== sentence) this.says.textContent = sentence;
      for (const control of Object.values(this.controls)) control();
    }

    /** Says how to read the pictures. */
    note(words) {
      this.pictures.after(html("p", { class: "note" }, words));
    }

    button(words, settings) {
      const button = html("button", { type: "button" }, words);
      button.addEventListener("click", () => this.change(settings()));
      return button;
    }

    /** A slider through a list of values, or {min, max, step}, which may be changed, shown with so many digits. */
    slider(key, label, values, format = 0) {
      const id = identifier();
      const list = Array.isArray(values) ? values : null;
      const [input, output] = [html("input", { type: "range", id }), html("output", { for: id })];
      const row = html("div", { class: "dial" }, html("label", { for: id }, label), input, output);
      row.range = (range) => set(input, range);
      row.range(list ? { min: 0, max: list.length - 1 } : values);
      input.addEventListener("input", () => this.change({ [key]: list ? list[+input.value] : +input.value }));
      this.form.append(row);
      // Without a text it shows the state; with one it reads a value from the address.
      this.controls[key] = (text) => {
        if (text && list) return list.find((value) => String(value) === text);
        if (text) return Number.isFinite(+text) ? Math.max(values.min, Math.min(values.max, +text)) : undefined;
        const value = this.state[key];
        input.value = list ? list.indexOf(value) : value;
        output.value = typeof format === "number" ? digits(value, format) : format(value);
        set(input, { "aria-valuetext": output.value });
      };
      return row;
    }

    /** One of several, as radio buttons: {value: words, …}. Returns its row. */
    choice(key, label, options, settings = (value) => ({ [key]: value })) {
      const name = identifier();
      const row = html("fieldset", { class: "choice" }, html("legend", {}, label));
      for (const [value, words] of Object.entries(options)) {
        const input = html("input", { type: "radio", name, value });
        input.addEventListener("change", () => this.change(settings(value)));
        row.append(html("label", {}, input, words));
      }
      this.form.append(row);
      this.controls[key] = (text) => {
        if (text) return text in options ? text : undefined;
        for (const input of row.querySelectorAll("input")) input.checked = input.value === this.state[key];
      };
      return row;
    }
  }

  /** Makes an explorer known to the page, under the name that figures carry. */
  function define(name, heading, start, build) {
    customElements.define(
      `${name}-explorer`,
      class extends Explorer {
        parts = { heading, start, build };
      },
    );
  }

  Object.assign(explorers, { set, svg, html, digits, Plot, define });
}
