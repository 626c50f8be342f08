// Puts every view under its heading, and its name into the contents.
const KINDS = { table, plot, bars, timeline };
const page = JSON.parse(document.getElementById("data").textContent);
page.views.forEach((view, index) => {
  const id = `view-${index + 1}`;
  document.getElementById("contents").append(el("li", {}, el("a", { href: `#${id}` }, view.title)));
  document.getElementById("views").append(el("section", { id, class: view.kind, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title` }, view.title), view.note ? el("p", {}, view.note) : "",
    ...KINDS[view.kind](view, index).filter(Boolean)));
});
