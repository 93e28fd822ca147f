"use strict";
const root = document.documentElement, byId = id => document.getElementById(id);
const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
function onTheme(changed) {
  const show = () => { byId("theme").setAttribute("aria-pressed", String(dark())); changed(); };
  byId("theme").addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; show(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  byId("theme").setAttribute("aria-pressed", String(dark()));
}
