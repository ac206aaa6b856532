// What is wider than a phone scrolls: the keyboard must be able to reach it, and the eye must see that it goes on.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".bd-article :is(pre, table)").forEach((box) => {
    const isTable = box.localName === "table";
    const mark = () => {
      const end = box.scrollLeft + box.clientWidth;
      box.tabIndex = isTable || box.scrollWidth > box.clientWidth ? 0 : -1;
      (isTable ? box : box.parentElement).classList.toggle("scrolls", end < box.scrollWidth - 1);
    };
    box.addEventListener("scroll", mark, { passive: true });
    addEventListener("resize", mark, { passive: true });
    addEventListener("load", mark);
    mark();
  });
});

// Formulas too, once they are set: MathJax is here without its menu, which would make every one of them a stop.
addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  document.querySelectorAll(".bd-article mjx-container[display]").forEach((formula) => {
    const mark = () => {
      if (formula.scrollWidth > formula.clientWidth) formula.tabIndex = 0;
      else formula.removeAttribute("tabindex");
    };
    addEventListener("resize", mark, { passive: true });
    mark();
  });
  document.querySelectorAll(".bd-article table").forEach((table) => {
    const mark = () => isText(table) && stack(table);
    addEventListener("resize", mark, { passive: true });
    mark();
  });
});

// A table of sentences that is wider than a phone becomes a list there: a row is a paragraph, its cells say their headings.
function isText(table) {
  const long = (row) => [...row.cells].filter((cell) => cell.textContent.length > 25).length;
  const isWide = table.scrollWidth > table.clientWidth + 1;
  return isWide && !table.closest(".cell_output") && [...table.rows].some((row) => long(row) > 1);
}

function stack(table) {
  const heads = [...table.rows[0].cells].map((cell) => cell.textContent.trim());
  for (const row of table.tBodies[0].rows) {
    [...row.cells].forEach((cell, i) => {
      cell.dataset.head = heads[i];
    });
  }
  table.classList.replace("scrolls", "stacks") || table.classList.add("stacks");
}
