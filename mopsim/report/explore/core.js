// Elements, units, colours, marks, and the tip that every view uses.
const SVG = "http://www.w3.org/2000/svg";

function make(space, name, attributes, children) {
  const node = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") for (const [type, call] of Object.entries(value)) node.addEventListener(type, call);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((one) => one !== null && one !== undefined));
  return node;
}
const el = (name, attributes = {}, ...children) => make(null, name, attributes, children);
const svg = (name, attributes = {}, ...children) => make(SVG, name, attributes, children);

// Of series, Okabe and Ito's palette: told apart with every kind of colour vision.
const PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"];
// Of components, categories of memory, waits and transfers, the figures' colours (mopsim.report.palette).
const paint = (name) => COLOURS.named[name] ?? COLOURS.unknown;
const SEEN = 0.002; // share of a chart from which a part is seen, and has its place in the legend
// Whether white stands out more on a colour than black (WCAG 2.1: contrast by relative luminance).
function isDark(colour) {
  const [red, green, blue] = [1, 3, 5].map((place) => parseInt(colour.slice(place, place + 2), 16) / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue <= 0.179;
}
// What is drawn, by its space (mopsim.report.lanes).
const spoken = (name, space) => NAMES[space][name] ?? name.replaceAll("_", " ");

// A mark has a shape beside its colour.
const SHAPES = [
  "M-5,0A5,5 0 1 0 5,0A5,5 0 1 0 -5,0Z", "M-5,-5H5V5H-5Z", "M0,-6L6,5H-6Z", "M0,-7L6,0L0,7L-6,0Z",
  "M0,6L6,-5H-6Z", "M-6,-2H-2V-6H2V-2H6V2H2V6H-2V2H-6Z", "M0,-6L6,-1L4,6H-4L-6,-1Z", "M-6,-6L6,6M6,-6L-6,6",
];
const STATES = { fits: "", "may not fit": "at-risk", "out of memory": "over" };

// A column or an axis has one unit, the largest that its largest value reaches; of costs, that most reach.
const UNITS = {
  bytes: [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]],
  seconds: [["s", 1], ["ms", 1e-3], ["us", 1e-6]],
  dollars: [["million $", 1e6], ["thousand $", 1e3], ["$", 1]],
  joules: [["GWh", 3.6e12], ["MWh", 3.6e9], ["kWh", 3.6e6]],
  fraction: [["%", 0.01]],
  probability: [["", 1]],
  number: [["", 1]],
};
function unitOf(type, values) {
  const units = UNITS[type] || UNITS.number;
  const known = values.filter(Number.isFinite).map(Math.abs).sort((a, b) => a - b);
  const most = (type === "dollars" ? known[Math.floor(known.length / 2)] : known[known.length - 1]) ?? 0;
  const [name, scale] = units.find((one) => most >= one[1]) || units[units.length - 1];
  return { name, scale };
}
function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "";
  if (Math.abs(value) >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return value.toLocaleString("en", { maximumSignificantDigits: digits });
}
// A cell or a value in a unit; what rounds to 0 or 1 is not certain.
function inUnit(value, type, unit) {
  if (type === "probability" && typeof value === "number") return value > 0.99 ? ">0.99" : value < 0.01 ? "<0.01" : value.toFixed(2);
  return number(value === null ? null : value / unit.scale);
}
const titled = (name, unit) => (unit.name ? `${name}, ${unit.name}` : name);
// A value with the unit that suits it alone.
function told(value, type) {
  if (typeof value === "string") return value;
  const unit = unitOf(type, [value]);
  return [inUnit(value, type, unit), unit.name].filter(Boolean).join(unit.name === "%" ? "" : " ");
}
const details = (rows) => rows.filter((row) => row[1] !== null && row[1] !== "").map(([name, value, type]) => [name, told(value, type)]);

// One tip for the page, beside the pointer or the focus; Escape hides it.
const tip = {
  box: document.getElementById("tip"),
  show(rows, at, anchor = null) {
    this.anchor = anchor; // what it stays beside when the page scrolls
    this.box.replaceChildren(...rows.map(([name, value]) => el("div", {}, el("b", {}, `${name} `), String(value))));
    this.box.hidden = false;
    this.place(at);
  },
  place(at) {
    const { width, height } = this.box.getBoundingClientRect();
    const room = document.documentElement;
    const left = Math.max(4, Math.min(at.x + 14, room.clientWidth - width - 4));
    let top = at.y + 16;
    if (top + height > room.clientHeight - 4) top = Math.max(4, at.y - height - 12);
    this.box.style.left = `${left}px`;
    this.box.style.top = `${top}px`;
  },
  hide() { this.box.hidden = true; this.anchor = null; },
};
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hide(); });
document.addEventListener("scroll", () => (tip.anchor ? tip.place(middle(tip.anchor)) : tip.hide()), { passive: true, capture: true });

const middle = (node) => { const box = node.getBoundingClientRect(); return { x: box.x + box.width / 2, y: box.y + box.height / 2 }; };

// One stop of the Tab key for many marks: arrows move between them, Home and End to the ends.
function roving(group, marks, options = {}) {
  const keys = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  marks.forEach((mark, index) => mark.setAttribute("tabindex", index ? -1 : 0));
  group.addEventListener("keydown", (event) => {
    const from = marks.indexOf(document.activeElement);
    if (from < 0 || !(event.key in keys)) return;
    event.preventDefault();
    const to = Math.max(0, Math.min(marks.length - 1, from + keys[event.key]));
    marks[from].setAttribute("tabindex", -1);
    marks[to].setAttribute("tabindex", 0);
    marks[to].focus();
    if (options.moved) options.moved(to);
  });
}

// What a mark does: its tip under the pointer and under the focus.
function speaks(mark, rows) {
  mark.setAttribute("role", "img");
  mark.setAttribute("aria-label", rows.map((row) => row.join(" ")).join(", "));
  mark.addEventListener("pointermove", (event) => tip.show(rows, event));
  mark.addEventListener("pointerleave", () => tip.hide());
  mark.addEventListener("focus", () => tip.show(rows, middle(mark), mark));
  mark.addEventListener("blur", () => tip.hide());
}

// Draws again where the width changes, so that text keeps its size at every zoom.
function drawn(box, draw) {
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.floor(box.clientWidth);
    if (now && now !== width) { width = now; draw(now); }
  }).observe(box);
}

// The names of a view's colours; pressed ones are shown.
function legend(names, mark, toggled) {
  const items = names.map((name, index) => {
    const key = svg("svg", { width: 16, height: 16, viewBox: "-8 -8 16 16", "aria-hidden": "true" }, mark(index));
    if (!toggled) return el("li", {}, key, name);
    const press = (event) => {
      const on = event.currentTarget.getAttribute("aria-pressed") !== "true";
      event.currentTarget.setAttribute("aria-pressed", on);
      toggled(name, on);
    };
    return el("li", {}, el("button", { type: "button", "aria-pressed": "true", on: { click: press } }, key, name));
  });
  return el("ul", { class: "legend", "aria-label": toggled ? "Shown" : "Colours" }, ...items);
}
