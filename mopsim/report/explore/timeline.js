// A curve of steps as [x, change]: of the changes that share a pixel the highest, then what the last of them leaves.
function curveOf(places, totals, right) {
  const steps = [];
  let pixel = -1;
  const leave = (last) => { if (steps.length && steps[steps.length - 1][1] !== last) steps.push([Math.min(pixel + 1, right), last]); };
  places.forEach((x, change) => {
    const here = Math.floor(x);
    if (here !== pixel) { leave(change - 1); steps.push([x, change]); pixel = here; } else if (totals[change] > totals[steps[steps.length - 1][1]]) steps[steps.length - 1][1] = change;
  });
  leave(places.length - 1);
  return steps;
}

// A simulated step: streams over time above, device memory by category below; zooms and pans.
// spans: [stream, start, end, name, component, phase, microbatch, layer], indices into view.streams, .names and so on.
function timeline(view) {
  const box = el("div", { class: "chart timeline" }), said = el("p", { class: "selected", role: "status" }, "No op is chosen.");
  const end = view.end, least = end / 1e5;
  const lanes = view.streams.map((_, stream) => view.spans.filter((span) => span[0] === stream).sort((a, b) => a[1] - b[1]));
  const inks = view.components.map(paint);
  const categories = Object.keys(view.memory.categories);
  const totals = view.memory.times.map((_, index) => categories.reduce((sum, name) => sum + view.memory.categories[name][index], 0));
  const highest = Math.max(1, ...totals, view.limit || 0), unit = unitOf("bytes", [highest]);
  const names = Math.max(84, 10 + 7.2 * Math.max(...view.streams.map((name) => name.length))); // pixels left of the lanes
  let from = 0, to = end, lane = Math.max(0, view.streams.indexOf("compute")), chosen = -1, width = 0, dragged = null;

  const seconds = (value) => told(value, "seconds");
  const rowsOf = (span) => [["op", view.names[span[3]]], ["stream", view.streams[span[0]]], [view.streams[span[0]] === "compute" ? "component" : "kind", spoken(view.components[span[4]], "components")],
    ["phase", view.phases[span[5]]], ["layer", span[7] < 0 ? "" : String(span[7])], ["microbatch", span[6] < 0 ? "" : String(span[6])], ["start", seconds(span[1])],
    ["duration", seconds(span[2] - span[1])], ["memory", told(totals[sample(span[1])], "bytes")]].filter((row) => row[1] !== "");
  function sample(time) { // the last change of memory that is not after `time`
    let low = 0, high = view.memory.times.length - 1;
    while (low < high) { const mid = (low + high + 1) >> 1; if (view.memory.times[mid] <= time) low = mid; else high = mid - 1; }
    return low;
  }
  function window_(start, stop) {
    const length = Math.min(end, Math.max(least, stop - start));
    from = Math.max(0, Math.min(end - length, start));
    to = from + length;
    draw(width);
  }
  const zoom = (factor, at = (from + to) / 2) => window_(at - (at - from) * factor, at + (to - at) * factor);
  const pan = (share) => window_(from + share * (to - from), to + share * (to - from));
  function choose(stream, index) {
    if (!lanes[stream].length) return;
    lane = stream;
    chosen = Math.max(0, Math.min(lanes[stream].length - 1, index));
    const span = lanes[lane][chosen];
    if (span[1] < from || span[2] > to) { const half = Math.max(to - from, span[2] - span[1]) / 2, at = (span[1] + span[2]) / 2; window_(at - half, at + half); } else draw(width);
    said.textContent = rowsOf(span).map((row) => row.join(" ")).join(", ");
  }
  function join(rect, span, edge) { // ops that share pixels are one block: as pale as it is idle, and it says how many they are
    const first = rect.span, all = rect.all || { count: 1, busy: first[2] - first[1] };
    rect.all = { count: all.count + 1, busy: all.busy + span[2] - span[1], end: span[2] };
    rect.setAttribute("width", edge - rect.x.baseVal.value);
    rect.setAttribute("fill-opacity", Math.max(0.2, Math.min(1, rect.all.busy / (span[2] - first[1]))).toFixed(2));
  }
  const idle = (start, all) => Math.max(0, all.end - start - all.busy);
  const joinedOf = (span, all) => [["ops", `${all.count} side by side`], ["stream", view.streams[span[0]]], [view.streams[span[0]] === "compute" ? "component" : "kind", spoken(view.components[span[4]], "components")],
    ["start", seconds(span[1])], ["end", seconds(all.end)], ["idle between them", idle(span[1], all) > 1e-9 * end ? seconds(idle(span[1], all)) : "none"], ["", "zoom in to tell them apart"]];
  const near = (stream, time) => { const found = lanes[stream].findIndex((span) => span[2] >= time); return found < 0 ? lanes[stream].length - 1 : found; };
  const keys = {
    ArrowRight: () => choose(lane, chosen + 1), ArrowLeft: () => choose(lane, chosen < 0 ? 0 : chosen - 1),
    ArrowDown: () => other(1), ArrowUp: () => other(-1), "+": () => zoom(0.5, middleOf()), "=": () => zoom(0.5, middleOf()), "-": () => zoom(2, middleOf()),
    Home: () => window_(0, end), 0: () => window_(0, end), PageDown: () => pan(0.5), PageUp: () => pan(-0.5),
  };
  const middleOf = () => { const span = chosen >= 0 ? lanes[lane][chosen] : null; return span ? (span[1] + span[2]) / 2 : (from + to) / 2; };
  function other(step) {
    const next = Math.max(0, Math.min(lanes.length - 1, lane + step));
    choose(next, near(next, middleOf()));
  }

  function draw(now) {
    width = now;
    const left = width < 480 || width < 4 * names ? 0 : names, right = width - 8, rowHeight = left ? 30 : 46, lift = left ? 4 : 18, high = left ? 22 : 24;
    const top = 4, floor = top + lanes.length * rowHeight, memoryTop = floor + 34, memoryFloor = memoryTop + 130, height = memoryFloor + 42;
    const at = (time) => left + ((time - from) / (to - from)) * (right - left);
    const root = svg("svg", { width, height, "aria-hidden": "true" });
    lanes.forEach((spans, stream) => {
      const y = top + stream * rowHeight;
      root.append(svg("text", { class: "label", x: 0, y: left ? y + 20 : y + 13 }, view.streams[stream]));
      root.append(svg("rect", { class: "lane", x: left, y: y + lift, width: right - left, height: high }));
      let edge = -1, before = -1, last = null;
      spans.forEach((span, index) => {
        if (span[2] < from || span[1] > to) return;
        const x1 = Math.max(left, at(span[1])), x2 = Math.min(right, at(span[2])), long = Math.max(0.6, x2 - x1);
        if (last && before === span[4] && x1 + long - edge < 0.7) { edge = x1 + long; join(last, span, edge); return; }
        const rect = svg("rect", { class: "span", x: x1.toFixed(2), y: y + lift, width: long.toFixed(2), height: high, fill: inks[span[4]] });
        rect.span = span; rect.at = [stream, index];
        root.append(rect);
        if (long > 54) {
          const room = Math.floor((long - 8) / 6.6), name = `${view.names[span[3]]}${span[7] < 0 ? "" : `, layer ${span[7]}`}`;
          const dark = isDark(inks[span[4]]);
          root.append(svg("text", { class: dark ? "name light" : "name", x: x1 + 4, y: y + lift + 15 }, name.length > room ? `${name.slice(0, room - 1)}…` : name));
        }
        last = long < 3 ? rect : null; edge = x1 + long; before = span[4];
      });
      if (stream === lane && chosen >= 0) {
        const span = spans[chosen], x1 = Math.max(left, at(span[1])), x2 = Math.min(right, at(span[2]));
        root.append(svg("rect", { class: "chosen", x: x1 - 1, y: y + lift - 1, width: Math.max(3, x2 - x1) + 2, height: high + 2 }));
      }
    });
    memoryOf(root, at, left, right, memoryTop, memoryFloor);
    const shift = unitOf("seconds", [to]);
    for (const [value, name] of ticksOf({}, from / shift.scale, to / shift.scale, width / 110))
      root.append(svg("text", { class: "tick", x: Math.max(left + 12, Math.min(right - 12, at(value * shift.scale))), y: memoryFloor + 16, "text-anchor": "middle" }, name));
    root.append(svg("text", { class: "tick", x: (left + right) / 2, y: memoryFloor + 36, "text-anchor": "middle" }, `time in the step, ${shift.name}`));
    const timeAt = (event) => from + ((event.clientX - box.getBoundingClientRect().x - left) / (right - left)) * (to - from);
    root.addEventListener("pointermove", (event) => {
      const time = timeAt(event);
      if (dragged !== null) { // the range that is chosen
        const [x1, x2] = [at(dragged.time), event.clientX - box.getBoundingClientRect().x].sort((a, b) => a - b);
        dragged.range.setAttribute("x", Math.max(left, x1));
        dragged.range.setAttribute("width", Math.max(0, Math.min(right, x2) - Math.max(left, x1)));
        return;
      }
      if (event.target.all) tip.show(joinedOf(event.target.span, event.target.all), event);
      else if (event.target.span) tip.show(rowsOf(event.target.span), event);
      else if (event.offsetY > floor && time >= 0 && time <= end) tip.show([["time", seconds(time)], ["memory", told(totals[sample(time)], "bytes")],
        ...categories.map((name) => [spoken(name, "memory"), told(view.memory.categories[name][sample(time)], "bytes")]).filter((row) => !row[1].startsWith("0"))], event);
      else tip.hide();
    });
    root.addEventListener("pointerleave", () => tip.hide());
    root.addEventListener("pointerdown", (event) => { 
      const range = svg("rect", { class: "range", x: event.offsetX, y: top, width: 0, height: memoryFloor - top });
      dragged = { time: timeAt(event), x: event.clientX, at: event.target.at, range };
      root.append(range);
      root.setPointerCapture(event.pointerId);
      event.preventDefault();
      box.focus({ preventScroll: true });
      tip.hide();
    });
    root.addEventListener("pointerup", (event) => {
      if (dragged === null) return;
      const { time, x, at: hit } = dragged, stop = timeAt(event);
      dragged.range.remove();
      dragged = null;
      if (Math.abs(event.clientX - x) > 6) window_(Math.min(time, stop), Math.max(time, stop));
      else if (hit) choose(...hit);
    });
    root.addEventListener("dblclick", () => window_(0, end));
    box.replaceChildren(root);
  }
  function memoryOf(root, at, left, right, top, floor) {
    const y = (bytes) => floor - (bytes / highest) * (floor - top);
    root.append(svg("text", { class: "label", x: 0, y: top - 8 }, `device memory, ${unit.name}`));
    const first = sample(from), places = view.memory.times.slice(first).filter((time) => time <= to).map((time) => at(Math.max(from, time)));
    const samples = curveOf(places, totals.slice(first), right);
    const base = samples.map(() => 0);
    categories.forEach((name) => {
      const upper = [], lower = [];
      samples.forEach(([x1, change], step) => {
        const x2 = step + 1 < samples.length ? samples[step + 1][0] : right;
        const next = base[step] + view.memory.categories[name][first + change];
        lower.unshift([x2, y(base[step])], [x1, y(base[step])]);
        upper.push([x1, y(next)], [x2, y(next)]);
        base[step] = next;
      });
      if (upper.length) root.append(svg("path", { class: "area", fill: paint(name), d: `${line([...upper, ...lower])}Z` }));
    });
    for (const [value, text] of ticksOf({}, 0, highest / unit.scale, 3))
      root.append(svg("text", { class: "tick", x: left ? left - 6 : 2, y: y(value * unit.scale) + 4, "text-anchor": left ? "end" : "start" }, text));
    if (view.limit) root.append(svg("line", { class: "limit", x1: left, x2: right, y1: y(view.limit), y2: y(view.limit) }),
      svg("text", { class: "limit", x: right - 4, y: y(view.limit) + 14, "text-anchor": "end" }, `limit ${told(view.limit, "bytes")}`));
  }
  box.setAttribute("tabindex", 0);
  box.setAttribute("role", "application");
  box.setAttribute("aria-label", `${view.title}. Left and right: ops of a stream; up and down: streams; plus, minus: zoom; Home: whole step.`);
  box.addEventListener("keydown", (event) => { if (keys[event.key] && !event.ctrlKey && !event.metaKey) { event.preventDefault(); keys[event.key](); } });
  box.addEventListener("wheel", (event) => { if (event.ctrlKey) { event.preventDefault(); zoom(event.deltaY > 0 ? 1.25 : 0.8); } }, { passive: false });
  drawn(box, draw);
  const button = (text, press) => el("button", { type: "button", on: { click: press } }, text);
  const controls = el("div", { class: "controls", role: "group", "aria-label": `Zoom of ${view.title}` },
    button("Zoom in", () => zoom(0.5, middleOf())), button("Zoom out", () => zoom(2, middleOf())), button("Earlier", () => pan(-0.5)), button("Later", () => pan(0.5)), button("Whole step", () => window_(0, end)));
  const hint = el("p", { class: "says" }, "Drag over a range, or use the buttons or the keys + and -, to zoom. Click an op, or walk with the arrow keys, to read it.");
  const block = (fill) => svg("rect", { x: -7, y: -7, width: 14, height: 14, fill, stroke: "#222" });
  const seen = categories.filter((name) => view.memory.categories[name].some((bytes) => bytes > SEEN * highest));
  return [controls, hint, el("h3", {}, "Components, and kinds of what is moved"), legend(view.components.map((name) => spoken(name, "components")), (index) => block(inks[index])), box, said,
    el("h3", {}, "Memory"), legend(seen.map((name) => spoken(name, "memory")), (index) => block(paint(seen[index])))];
}
