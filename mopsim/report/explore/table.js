// A table that sorts by its heads and filters by the row under them. Where it has many columns a row is a line:
// longer texts are cut, and the row opens to show them whole.
const LINE = 40, FEW = 3; // characters of a text, columns
function compared(a, b) {
  if (a === null || a === undefined) return b === null || b === undefined ? 0 : 1; // unknown comes last, both ways
  if (b === null || b === undefined) return -1;
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}

// '> 10', '<= 2', '3..5', or text that a cell contains; null where it cannot be read.
function condition(text, column) {
  const asked = text.trim();
  if (!asked) return () => true;
  if (column.type === "text") return (value) => String(value ?? "").toLowerCase().includes(asked.toLowerCase());
  const range = asked.match(/^(-?[\d.,]+)\s*\.\.\s*(-?[\d.,]+)$/);
  const bound = asked.match(/^(>=|<=|>|<|=)?\s*(-?[\d.,]+)$/);
  const read = (digits) => Number(digits.replaceAll(",", "")) * column.unit.scale;
  const known = (test) => (value) => typeof value === "number" && test(value);
  if (range) { const [low, high] = [read(range[1]), read(range[2])]; return known((value) => value >= low && value <= high); }
  if (!bound || Number.isNaN(read(bound[2]))) return null;
  const than = read(bound[2]), near = Math.abs(than) * 5e-3;
  const tests = {
    ">": (value) => value > than, ">=": (value) => value >= than, "<": (value) => value < than,
    "<=": (value) => value <= than, "=": (value) => Math.abs(value - than) <= near,
  };
  return known(tests[bound[1] || "="]);
}

function table(view, index) {
  const rows = view.rows.map((row, place) => ({ cells: row, place, mark: (view.marks || [])[place] || "" }));
  const ofType = (type) => view.columns.flatMap((one, place) => (one.type === type ? view.rows.map((row) => row[place]) : []));
  const columns = view.columns.map((column, place) => ({
    ...column, place, // money has one unit in a table
    unit: unitOf(column.type, column.type === "dollars" ? ofType("dollars") : view.rows.map((row) => row[place])), test: () => true,
    values: [...new Set(view.rows.map((row) => row[place]).filter((value) => value !== null && value !== ""))],
  }));
  let sorted = null, down = false, search = "";
  const body = el("tbody"), count = el("p", { class: "count", role: "status" });
  const heads = columns.map((column) => el("th", { scope: "col", "aria-sort": "none", class: column.type },
    el("button", { type: "button", on: { click: () => sort(column) } }, titled(column.name, column.unit),
      el("span", { class: "arrow", "aria-hidden": "true" }))));

  function sort(column) {
    if (sorted === column && down) sorted = null;
    else if (sorted === column) down = true;
    else { sorted = column; down = false; }
    heads.forEach((head, place) => {
      const here = columns[place] === sorted;
      head.setAttribute("aria-sort", here ? (down ? "descending" : "ascending") : "none");
    });
    fill();
  }
  const folds = columns.length > FEW;
  const cuts = (value, column) => folds && column.type === "text" && String(value ?? "").length > LINE;
  function cell(row, column) {
    const value = row.cells[column.place];
    const text = column.type === "text" ? String(value ?? "") : inUnit(value, column.type, column.unit);
    const way = cuts(value, column) ? "cut" : folds || text.length <= LINE / 2 ? "brief" : text.length > LINE ? "long" : "";
    const opens = !column.place && columns.some((one) => cuts(row.cells[one.place], one));
    return el(column.place ? "td" : "th", { class: `${column.type} ${way}`, scope: column.place ? null : "row", title: way === "cut" ? text : null },
      opens ? el("button", { type: "button", class: "more", "aria-expanded": String(!!row.open), on: { click: (event) => turn(row, event.currentTarget) } }, text) : text);
  }
  // What of a row was cut, whole.
  function detail(row) {
    const texts = columns.filter((column) => cuts(row.cells[column.place], column));
    return el("tr", { class: "detail" }, el("td", { colspan: columns.length },
      el("dl", {}, ...texts.flatMap((column) => [el("dt", {}, column.name), el("dd", {}, row.cells[column.place])]))));
  }
  function turn(row, button) {
    row.open = !row.open;
    button.setAttribute("aria-expanded", row.open);
    const line = button.closest("tr");
    if (row.open) line.after(detail(row)); else line.nextSibling.remove();
  }
  function fill() {
    let shown = rows.filter((row) => columns.every((column) => column.test(row.cells[column.place])) &&
      (!search || row.cells.some((value) => String(value ?? "").toLowerCase().includes(search))));
    if (sorted) {
      const sign = down ? -1 : 1, at = sorted.place;
      const known = (row) => row.cells[at] !== null && row.cells[at] !== undefined;
      shown = shown.slice().sort((a, b) => (known(a) && known(b) ? sign : 1) * compared(a.cells[at], b.cells[at]) || a.place - b.place);
    }
    body.replaceChildren(...shown.flatMap((row) => [
      el("tr", { class: STATES[row.mark] ?? row.mark }, ...columns.map((column) => cell(row, column))), ...(row.open ? [detail(row)] : [])]));
    count.textContent = `${shown.length} of ${rows.length} rows`;
  }
  function filter(column) {
    const changed = (event) => {
      const test = condition(event.target.value, column);
      event.target.setAttribute("aria-invalid", test === null);
      column.test = test || (() => true);
      fill();
    };
    if (column.type === "text" && column.values.length > 1 && column.values.length <= 12 && column.values.every((value) => value.length <= 40)) {
      const options = ["", ...column.values.map(String).sort()].map((value) => el("option", { value }, value || "all"));
      const chosen = (event) => { const asked = event.target.value; column.test = (value) => !asked || String(value) === asked; fill(); };
      return el("select", { "aria-label": `Filter ${column.name}`, on: { change: chosen } }, ...options);
    }
    const hint = column.type === "text" ? "contains" : "> 1, 2..3";
    return el("input", { type: "text", "aria-label": `Filter ${column.name}: ${hint}`, placeholder: hint, on: { input: changed } });
  }
  const searched = (event) => { search = event.target.value.trim().toLowerCase(); fill(); };
  const find = el("label", { class: "search" }, "Search ", el("input", { type: "search", on: { input: searched } }));
  fill();
  const caption = el("caption", { class: "hidden" }, view.title);
  const grid = el("table", {}, caption, el("thead", {}, el("tr", {}, ...heads),
    el("tr", { class: "filters" }, ...columns.map((column) => el("td", {}, rows.length > 1 ? filter(column) : null)))), body);
  return [rows.length > 1 ? el("div", { class: "controls" }, find, count) : null,
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${view.title}, table` }, grid)];
}
