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
