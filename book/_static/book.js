// A table that is wider than a phone scrolls; so the keyboard must be able to reach it.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".bd-article table").forEach((table) => {
    table.tabIndex = 0;
  });
});
