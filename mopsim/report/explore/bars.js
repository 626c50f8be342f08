// Stacked bars, one a strategy, with the limit where there is one; under them the same numbers as a table.
function bars(view) {
  const order = Object.keys(COLOURS.named), place = (name) => (order.indexOf(name) + 1 || order.length + 1);
  const named = view.rows.flatMap((row) => Object.entries(row.parts).filter((one) => one[1] > 0).map((one) => one[0]));
  const parts = [...new Set(named)].sort((one, other) => place(one) - place(other));
  const total = (row) => Object.values(row.parts).reduce((sum, one) => sum + one, 0);
  const limit = view.limit || null;
  const most = Math.max(...view.rows.map(total), limit || 0);
  const unit = unitOf(view.type, [most]);
  const box = el("div", { class: "chart" });

  function draw(width) {
    const right = width - 8, row = 50, top = limit ? 20 : 4, height = top + view.rows.length * row + 6;
    const at = (value) => (value / most) * right;
    const root = svg("svg", { width, height, role: "group", "aria-label": `${view.title}, ${view.rows.length} bars` });
    const marks = [];
    view.rows.forEach((one, index) => {
      const y = top + index * row;
      const note = `${number(total(one) / unit.scale)} ${unit.name}${one.note ? `, ${one.note}` : ""}`;
      root.append(svg("text", { x: 0, y: y + 14, class: "label" }, `${one.name}: ${note}`));
      let left = 0;
      for (const part of parts) {
        const value = one.parts[part] || 0, share = value / total(one);
        if (at(value) < 0.5) continue;
        const mark = svg("rect", { class: "part", x: at(left), y: y + 20, width: at(value), height: 22, fill: paint(part) });
        speaks(mark, [[one.name, ""], [spoken(part, view.space), `${number(value / unit.scale)} ${unit.name} (${number(100 * share, 2)} %)`]]);
        marks.push(mark);
        root.append(mark);
        left += value;
      }
    });
    if (limit) root.append(svg("line", { class: "limit", x1: at(limit), x2: at(limit), y1: 14, y2: height }),
      svg("text", { class: "limit", x: Math.min(at(limit), right) - 4, y: 12, "text-anchor": "end" }, `limit ${number(limit / unit.scale)} ${unit.name}`));
    roving(root, marks);
    box.replaceChildren(root);
  }
  drawn(box, draw);
  const columns = [{ name: "strategy", type: "text" }, ...parts.map((name) => ({ name: spoken(name, view.space), type: view.type }))];
  const rows = view.rows.map((row) => [row.name, ...parts.map((part) => row.parts[part] ?? null)]);
  const numbers = el("details", {}, el("summary", {}, "Numbers"), ...table({ title: `${view.title}, numbers`, columns, rows }).filter(Boolean));
  const seen = parts.filter((part) => view.rows.some((row) => (row.parts[part] || 0) > SEEN * most));
  return [box, legend(seen.map((name) => spoken(name, view.space)), (index) => svg("rect", { x: -7, y: -7, width: 14, height: 14, fill: paint(seen[index]), stroke: "#222" })), numbers];
}
