"use strict";
// Rows open and close; columns sort; what is pointed at, focused or tapped tells its figures. Without this script the
// page shows everything, in the order it was made.
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
