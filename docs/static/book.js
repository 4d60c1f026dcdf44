// What the theme leaves out for those who read with a keyboard or a screen reader.
document.addEventListener("DOMContentLoaded", () => {
  const sidebar = document.getElementById("pst-primary-sidebar");
  if (sidebar && !sidebar.getAttribute("role")) {
    sidebar.setAttribute("role", "navigation");
    sidebar.setAttribute("aria-label", "The book");
  }
  for (const summary of document.querySelectorAll("details > summary"))
    if (!summary.textContent.trim()) summary.setAttribute("aria-label", "Pages below");
  for (const box of document.querySelectorAll(".bd-article table, .bd-article .formula, .bd-article pre, .cell_output"))
    if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) box.setAttribute("tabindex", "0");
});
