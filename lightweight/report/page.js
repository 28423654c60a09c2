"use strict";
// Filters, and opening what a link points at. Without this script the page shows everything, and its links still work.
const form = document.querySelector("form");
const records = [...document.querySelectorAll(".record")].map((record) => record.dataset);

function filter() {
  const wanted = Object.fromEntries(new FormData(form));
  const fits = (about) =>
    Object.entries(wanted).every(([key, value]) => !value || about[key] === undefined || about[key] === value);
  const shown = records.filter(fits);
  const cells = new Set(shown.map((about) => about.cell));
  for (const node of document.querySelectorAll("tr[data-cell], .record")) {
    node.classList.toggle("away", !cells.has(node.dataset.cell));
  }
  for (const node of document.querySelectorAll("tr[data-model]")) node.classList.toggle("away", !fits(node.dataset));
  for (const node of document.querySelectorAll(".mark")) node.classList.toggle("dim", !cells.has(node.dataset.cell));
  for (const node of document.querySelectorAll("figure")) {
    const of = node.dataset.cells ? node.dataset.cells.split(" ") : [];
    node.classList.toggle("away", of.length ? !of.some((cell) => cells.has(cell)) : !fits({ model: node.dataset.model }));
  }
  form.querySelector("output").textContent = `${shown.length} of ${records.length} trials`;
}

function reveal() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  if (form && (target.closest(".away") || target.querySelector(".away:only-child"))) form.reset();
  for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  target.scrollIntoView();
  if (target.hasAttribute("tabindex")) target.focus({ preventScroll: true });
}

if (form) {
  form.addEventListener("change", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
}
addEventListener("hashchange", reveal);
// the link of the place one is at already changes no hash
addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#"]');
  if (link && link.getAttribute("href") === location.hash) reveal();
});
reveal();
