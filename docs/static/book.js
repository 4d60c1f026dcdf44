// What the theme leaves out for those who read with a keyboard or a screen reader.
document.addEventListener("DOMContentLoaded", () => {
  const sidebar = document.getElementById("pst-primary-sidebar");
  if (sidebar && !sidebar.getAttribute("role")) {
    sidebar.setAttribute("role", "navigation");
    sidebar.setAttribute("aria-label", "The book");
  }
  for (const summary of document.querySelectorAll("details > summary"))
    if (!summary.textContent.trim()) summary.setAttribute("aria-label", "Pages below");
  const boxes = ".bd-article :is(table, .formula, pre), .cell_output, .bd-article :is(p, li):has(> math)";
  for (const box of document.querySelectorAll(boxes)) {
    const cut = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
    if (cut && getComputedStyle(box).overflowX !== "visible") box.setAttribute("tabindex", "0");
  }
});
