// Points and lines over two axes: a scatter with its Pareto front, or a sweep with bands.
function ticksOf(axis, low, high, room) {
  if (axis.ticks) return axis.ticks;
  if (axis.log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
      for (const step of [1, 2, 5]) { const value = step * 10 ** power; if (value >= low * 0.999 && value <= high * 1.001) found.push(value); }
    const every = Math.ceil(found.length / Math.max(2, room));
    if (found.length > 2) return found.filter((_, index) => index % every === 0).map((value) => [value, number(value)]);
  }
  const rough = (high - low) / Math.max(2, room), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push([value, number(Math.abs(value) < step * 1e-6 ? 0 : value)]);
  return found;
}

// What an axis shows of values in its unit: a little more than they span, from 0 where it says so.
function scaled(axis, values, from, to) {
  let low = Math.min(...values), high = Math.max(...values);
  if (axis.log) { low /= 1.15; high *= 1.15; } else {
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    low = axis.zero ? 0 : low - room; high += room;
  }
  const map = axis.log ? Math.log : (value) => value;
  const at = (value) => from + ((map(value) - map(low)) / (map(high) - map(low) || 1)) * (to - from);
  return { low, high, at };
}

const line = (points) => `M${points.map((one) => one.map((value) => value.toFixed(1)).join(",")).join("L")}`;

// Neighbours that have a value: a line does not go on over one that has none.
function runs(points) {
  const found = [[]];
  for (const one of points) if (one.y === null) found.push([]); else found.at(-1).push(one);
  return found;
}

function marker(index, mark, tint) {
  const hollow = mark === "may not fit", over = mark === "out of memory";
  const shape = svg("path", { d: SHAPES[over ? 7 : index % 7], fill: hollow || over ? "#fff" : tint, stroke: hollow || over ? tint : "#222", "stroke-width": hollow || over ? 2.5 : 1 });
  return hollow || over ? svg("g", {}, svg("path", { d: SHAPES[over ? 7 : index % 7], fill: "none", stroke: "#222", "stroke-width": 4.5 }), shape) : shape;
}

let clips = 0;
function plot(view) {
  const hidden = new Set();
  const box = el("div", { class: "chart" });
  const names = view.series.map((one) => one.name);
  const x = { ...view.x }, y = { ...view.y };
  const inside = view.series.flatMap((one) => one.points);
  for (const [axis, key] of [[x, "x"], [y, "y"]])
    axis.unit = unitOf(axis.type, inside.flatMap((one) => [one[key], ...(one[`${key}r`] || [])]));
  const value = (one, axis) => one / axis.unit.scale;

  function draw(width) {
    const height = Math.round(Math.max(240, Math.min(430, width * 0.55)));
    const left = width < 420 ? 50 : 66, right = width - 14, top = 14, bottom = height - 46;
    const shown = view.series.map((series, index) => ({ ...series, index })).filter((one) => !hidden.has(one.name));
    const points = shown.flatMap((one) => one.points);
    const limits = (view.limits || []).map((one) => ({ ...one, at: value(one.value, y) }));
    const spread = (key, axis) => points.flatMap((one) => [one[key], ...(one[`${key}r`] || [])]).filter((one) => one !== null && one !== undefined).map((one) => value(one, axis)).filter((one) => Number.isFinite(one) && (!axis.log || one > 0));
    let across = spread("x", x), up = [...spread("y", y), ...limits.map((one) => one.at)];
    if (!across.length || !up.length) { box.replaceChildren(el("p", {}, "Nothing to draw: no value is known, or every series is hidden.")); return; }
    if (view.diagonal) across = up = [...across, ...up];
    const sx = scaled(x, across, left, right), sy = scaled(y, up, bottom, top);
    const root = svg("svg", { width, height, role: "group", "aria-label": `${view.title}: ${titled(y.name, y.unit)} over ${titled(x.name, x.unit)}, ${points.length} points` });
    const axes = svg("g", { class: "axis", "aria-hidden": "true" });
    for (const [at, name] of ticksOf({ ...x, ticks: x.ticks && x.ticks.map(([one, text]) => [value(one, x), text]) }, sx.low, sx.high, width / 90))
      axes.append(svg("line", { x1: sx.at(at), x2: sx.at(at), y1: top, y2: bottom }), svg("text", { x: sx.at(at), y: bottom + 16, "text-anchor": "middle" }, name));
    for (const [at, name] of ticksOf(y, sy.low, sy.high, height / 60))
      axes.append(svg("line", { x1: left, x2: right, y1: sy.at(at), y2: sy.at(at) }), svg("text", { x: left - 6, y: sy.at(at) + 4, "text-anchor": "end" }, name));
    axes.append(svg("text", { x: (left + right) / 2, y: height - 8, "text-anchor": "middle" }, titled(x.name, x.unit)));
    root.append(axes);
    const inner = `inner-${(clips += 1)}`;
    root.append(svg("clipPath", { id: inner }, svg("rect", { x: left, y: top, width: right - left, height: bottom - top })));
    if (view.diagonal) {
      const corner = (over) => [[Math.max(sx.low, sy.low), over], [Math.min(sx.high, sy.high), over]].map(([one, factor]) => [sx.at(one), sy.at(one * factor)]);
      root.append(svg("path", { class: "within", "clip-path": `url(#${inner})`, d: `${line([...corner(0.9), ...corner(1.1).reverse()])}Z` }), svg("path", { class: "diagonal", d: line(corner(1)) }));
    }
    for (const limit of limits)
      root.append(svg("line", { class: "limit", x1: left, x2: right, y1: sy.at(limit.at), y2: sy.at(limit.at) }),
        svg("text", { class: "limit", x: right - 4, y: sy.at(limit.at) - 5, "text-anchor": "end" }, `${limit.name} ${told(limit.value, y.type)}`));
    const place = (one) => [sx.at(value(one.x, x)), one.y === null ? bottom - 8 : sy.at(value(one.y, y))];
    for (const series of shown) {
      const known = series.points.filter((one) => one.y !== null);
      for (const run of runs(series.points)) {
        const banded = run.filter((one) => one.yr);
        if (series.line && banded.length > 1) {
          const side = (end) => banded.map((one) => [sx.at(value(one.x, x)), sy.at(value(one.yr[end], y))]);
          root.append(svg("path", { class: "band", fill: PALETTE[series.index % 8], d: `${line([...side(0), ...side(1).reverse()])}Z` }));
        } else for (const one of banded) {
          const [at] = place(one);
          root.append(svg("line", { class: "error", x1: at, x2: at, y1: sy.at(value(one.yr[0], y)), y2: sy.at(value(one.yr[1], y)) }));
        }
        if (series.line && run.length > 1) root.append(svg("path", { class: "line", stroke: PALETTE[series.index % 8], d: line(run.map(place)) }));
      }
      for (const one of known.filter((each) => each.xr))
        root.append(svg("line", { class: "error", x1: sx.at(value(one.xr[0], x)), x2: sx.at(value(one.xr[1], x)), y1: place(one)[1], y2: place(one)[1] }));
    }
    const front = points.filter((one) => one.front).sort((a, b) => a.x - b.x);
    if (front.length > 1) root.append(svg("path", { class: "front", d: line(front.map(place)) }));
    const drawnPoints = shown.flatMap((series) => series.points.map((one) => ({ one, series }))).sort((a, b) => a.one.x - b.one.x);
    const marks = drawnPoints.map(({ one, series }) => {
      const [cx, cy] = place(one);
      const mark = svg("g", { class: "point", transform: `translate(${cx.toFixed(1)},${cy.toFixed(1)})` },
        svg("circle", { r: 12, class: "halo" }), marker(series.index, one.y === null ? "out of memory" : one.mark, PALETTE[series.index % 8]));
      speaks(mark, [[series.name, one.name || ""], ...details(one.rows || [])]);
      return mark;
    });
    const group = svg("g", { class: "points" }, ...marks);
    root.append(group);
    roving(group, marks);
    box.replaceChildren(el("p", { class: "yname" }, titled(y.name, y.unit)), root);
  }
  let last = 0;
  const toggled = (name, on) => { if (on) hidden.delete(name); else hidden.add(name); draw(last); };
  drawn(box, (width) => { last = width; draw(width); });
  const used = new Set(inside.map((one) => (one.y === null ? "out of memory" : one.mark)));
  const says = [used.has("may not fit") ? "hollow: may not fit (with a probability below 0.9)" : "", used.has("out of memory") ? "cross: does not fit, or no legal strategy" : "",
    inside.filter((one) => one.front).length > 1 ? "dashed line: Pareto front" : "", view.diagonal ? "grey: within 10 % of measured" : "",
    inside.some((one) => one.yr || one.xr) ? "bands and grey lines: intervals" : ""].filter(Boolean).join("; ");
  return [legend(names, (index) => marker(index, "", PALETTE[index % 8]), toggled), box, says ? el("p", { class: "says" }, `${says}.`) : null];
}
