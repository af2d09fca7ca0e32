"use strict";

// Tables: a heading's button sorts by its column in descending order, then in ascending order.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const column = head.cellIndex;
    const rising = head.getAttribute("aria-sort") === "descending" || (column === 0 && !head.hasAttribute("aria-sort"));
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const body = head.closest("table").tBodies[0];
    const rows = [...body.rows];
    rows.sort((one, other) => {
      const [left, right] = [one.cells[column], other.cells[column]];
      const [first, second] = [parseFloat(left.dataset.value), parseFloat(right.dataset.value)];
      if (isNaN(first) && isNaN(second)) {
        return left.textContent.localeCompare(right.textContent) * (rising ? 1 : -1);
      }
      // Missing values stay last in both orders.
      if (isNaN(first) || isNaN(second)) return isNaN(first) ? 1 : -1;
      return (first - second) * (rising ? 1 : -1);
    });
    body.append(...rows);
  });
}

// Tokens: one token per text is a tab stop, the arrow keys move between tokens, and the note of the current one is shown.
const note = document.getElementById("note");

function show(token) {
  note.textContent = token.dataset.note;
  note.hidden = false;
}

for (const text of document.querySelectorAll(".tokens")) {
  const tokens = [...text.querySelectorAll(".token")];
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  text.addEventListener("keydown", (event) => {
    const at = tokens.indexOf(event.target);
    const ends = { Home: 0, End: tokens.length - 1 };
    const next = event.key in ends ? ends[event.key] : at + steps[event.key];
    if (at < 0 || !(next in tokens)) return;
    event.preventDefault();
    tokens[at].tabIndex = -1;
    tokens[next].tabIndex = 0;
    tokens[next].focus();
  });
  text.addEventListener("focusin", (event) => show(event.target));
  text.addEventListener("focusout", () => { note.hidden = true; });
  text.addEventListener("mouseover", (event) => {
    const token = event.target.closest(".token");
    if (token) show(token);
  });
  text.addEventListener("mouseleave", () => { note.hidden = true; });
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") note.hidden = true;
});

const rejected = document.getElementById("show-rejected");
if (rejected) {
  rejected.addEventListener("change", () => document.body.classList.toggle("show-rejected", rejected.checked));
}
