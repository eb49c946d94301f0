"use strict";
// Rows open and close, columns sort; rows are filtered, columns hidden, what is shown is downloaded; what is pointed at,
// focused or tapped tells its figures. Without this script the page shows everything, in the order it was made.
for (const table of document.querySelectorAll("table.data")) {
  for (const open of table.querySelectorAll(".open")) {
    const detail = open.closest("tbody").querySelector(".detail");
    const show = (shown) => { detail.hidden = !shown; open.setAttribute("aria-expanded", shown); };
    show(false);
    open.addEventListener("click", () => show(detail.hidden));
  }
  const headings = [...table.querySelectorAll(".sort")].map((button) => button.closest("th"));
  headings.forEach((heading, index) => heading.firstChild.addEventListener("click", () => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    headings.forEach((each) => each.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const bodies = [...table.tBodies], runs = [...new Set(bodies.map((body) => body.dataset.run))];
    const place = (body) => 2 * runs.indexOf(body.dataset.run) + !body.classList.contains("run");  // a run stays whole
    const key = (body) => body.rows[0].cells[index].dataset.sort;
    const compare = (a, b) => {
      if (place(a) !== place(b)) return place(a) - place(b);
      const [x, y] = [key(a), key(b)];
      const numbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
      if (x === "" || y === "") return (x === "") - (y === "");  // what has no figure comes last, both ways
      return (numbers ? x - y : x.localeCompare(y)) * (down ? -1 : 1);
    };
    table.append(...bodies.sort(compare));
  }));
  const tools = table.closest(".shown").querySelector(".tools");
  if (tools) use(tools, table, headings);
}

function use(tools, table, headings) {
  const isRun = (body) => body.classList.contains("run"), bodies = () => [...table.tBodies].filter((body) => !isRun(body));
  const status = tools.querySelector("[role=status]"), filter = tools.querySelector("[type=search]");
  tools.hidden = false;
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(",").map((word) => word.trim()).filter(Boolean);
    for (const body of bodies()) {
      const name = `${body.dataset.run ?? ""} ${body.dataset.row}`.toLowerCase();
      body.hidden = words.length > 0 && !words.some((word) => name.includes(word));
    }
    const found = bodies().filter((body) => !body.hidden), runs = found.map((body) => body.dataset.run);
    [...table.tBodies].filter(isRun).forEach((body) => { body.hidden = !runs.includes(body.dataset.run); });
    status.textContent = words.length ? `${found.length} of ${bodies().length} rows` : "";
  });

  const above = table.querySelectorAll(".groups th");
  tools.querySelectorAll("fieldset").forEach((group, place) => {
    const all = group.querySelector("legend input"), boxes = [...group.querySelectorAll("[value]")];
    const show = () => {
      for (const box of boxes) {
        for (const cells of [headings, ...bodies().map((body) => body.rows[0].cells)]) cells[box.value].hidden = !box.checked;
      }
      const shown = boxes.filter((box) => box.checked).length, heading = above[place];
      if (all) [all.checked, all.indeterminate] = [shown > 0, shown > 0 && shown < boxes.length];
      if (!heading) return;
      heading.colSpan = shown + (place === 0) || 1;  // the names are always shown
      heading.hidden = place > 0 && shown === 0;
    };
    boxes.forEach((box) => box.addEventListener("change", show));
    all?.addEventListener("change", () => { boxes.forEach((box) => { box.checked = all.checked; }); show(); });
  });

  for (const button of tools.querySelectorAll("[data-as]")) {
    button.addEventListener("click", () => {
      const kind = button.dataset.as, rows = figures(headings, bodies());
      const text = kind === "csv" ? csv(rows) : JSON.stringify(rows, null, 1) + "\n";
      const link = document.createElement("a");
      link.download = `table.${kind}`;
      link.href = `data:text/${kind};charset=utf-8,${encodeURIComponent(text)}`;
      link.click();
    });
  }
}

// The figures of the rows and columns that are shown, at full precision: an object for each row.
function figures(headings, bodies) {
  const shown = headings.map((heading, index) => [index, JSON.parse(heading.dataset.names)]);
  return bodies.filter((body) => !body.hidden).map((body) => {
    const row = body.dataset.run === undefined ? {} : { run: body.dataset.run };
    for (const [index, names] of shown.filter(([index]) => !headings[index].hidden)) {
      const values = JSON.parse(body.rows[0].cells[index].dataset.figures);
      names.forEach((name, place) => { row[name] = values[place]; });
    }
    return row;
  });
}

function csv(rows) {
  const ranges = new Set(rows.flatMap((row) => Object.keys(row).filter((name) => Array.isArray(row[name]))));
  const split = ([name, value]) =>
    ranges.has(name) ? [[`${name}_low`, value?.[0]], [`${name}_high`, value?.[1]]] : [[name, value]];
  const cells = rows.map((row) => Object.entries(row).flatMap(split));
  const quoted = (value) => `"${String(value ?? "").replaceAll('"', '""')}"`;
  const plain = (value) => typeof value === "number" ? String(value) : value === null || value === undefined ? "" : quoted(value);
  const lines = [(cells[0] ?? []).map(([name]) => name), ...cells.map((row) => row.map(([, value]) => value))];
  return lines.map((line) => line.map(plain).join(",") + "\r\n").join("");
}

const tip = document.getElementById("tip");
const rows = (name) => [...document.querySelectorAll("tbody[data-row]")].filter((body) => body.dataset.row === name);
const hide = () => {
  tip.hidden = true;
  document.querySelectorAll(".pointed").forEach((each) => each.classList.remove("pointed"));
};
const tell = (mark) => {
  hide();
  tip.textContent = mark.dataset.tip;
  tip.hidden = false;
  const at = mark.getBoundingClientRect();
  const left = Math.min(at.left + at.width / 2 + 8, innerWidth - tip.offsetWidth - 8);
  const above = at.top - tip.offsetHeight - 4;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${above > 4 ? above : at.bottom + 4}px`;
  rows(mark.dataset.row).forEach((body) => body.classList.add("pointed"));
};
for (const mark of document.querySelectorAll(".mark")) {
  for (const event of ["pointerenter", "focus", "click"]) mark.addEventListener(event, () => tell(mark));
  for (const event of ["pointerleave", "blur"]) mark.addEventListener(event, hide);
}
addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
addEventListener("scroll", hide, { passive: true });
