// The console's keys and small comforts. Every page works without this file.
"use strict";
(() => {
  const one = (query) => document.querySelector(query);
  const root = document.documentElement;

  function toggleTheme() {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    document.cookie = `formulary-theme=${root.dataset.theme}; path=/console; max-age=31536000; samesite=strict`;
  }

  function move(step) {
    const rows = [...document.querySelectorAll("[data-row]")].map((row) => (row.tagName === "LI" ? row.querySelector("a") : row));
    if (!rows.length) return;
    const here = rows.indexOf(document.activeElement);
    const next = rows[here < 0 ? (step > 0 ? 0 : rows.length - 1) : (here + step + rows.length) % rows.length];
    next.focus();
    next.scrollIntoView({ block: "nearest" });
  }

  let started = 0;
  const goes = { f: "/console", q: "/console/queue" };
  const keys = {
    "?": () => one("#keys").showModal(),
    t: toggleTheme,
    j: () => move(1),
    k: () => move(-1),
    "/": () => one("#find")?.focus(),
    g: () => { started = Date.now(); },
  };

  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, textarea") && event.target.type !== "checkbox";
    if (typing || event.ctrlKey || event.metaKey || event.altKey || one("dialog[open]")) return;
    const goal = Date.now() - started < 1500 ? goes[event.key] : "";
    const button = one(`[data-key="${CSS.escape(event.key)}"]`);
    if (goal) location.assign(goal);
    else if (button) button.focus();
    else if (keys[event.key]) keys[event.key]();
    else return;
    event.preventDefault();
  });

  one("#theme").addEventListener("click", toggleTheme);
  one("#help").addEventListener("click", keys["?"]);
  document.addEventListener("submit", (event) => {
    const button = event.submitter;
    if (!button?.dataset.working) return;
    if (button.getAttribute("aria-disabled")) return event.preventDefault();
    button.setAttribute("aria-disabled", "true");
    button.textContent = button.dataset.working;
  });
})();
