// What is wider than a phone scrolls: the keyboard must be able to reach it, and the eye must see that it goes on.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".bd-article table").forEach((table) => {
    table.tabIndex = 0;
  });
  document.querySelectorAll(".bd-article pre").forEach((box) => {
    const mark = () => {
      const end = box.scrollLeft + box.clientWidth;
      box.tabIndex = box.scrollWidth > box.clientWidth ? 0 : -1;
      box.parentElement.classList.toggle("scrolls", end < box.scrollWidth - 1);
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
});
