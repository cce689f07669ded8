"use strict";
(() => {
  const source = new EventSource("/events");
  let busy = false, again = false, written = Date.now();

  function age() {
    const seconds = Math.max(0, Math.round((Date.now() - written) / 1000));
    const [value, unit] = seconds < 120 ? [seconds, "s"] : seconds < 7200 ? [Math.round(seconds / 60), "min"] : [Math.round(seconds / 3600), "h"];
    document.querySelectorAll("[data-age]").forEach((place) => { place.textContent = `${value} ${unit}`; });
  }

  async function refresh() {
    if (busy) { again = true; return; }
    busy = true;
    try {
      const answer = await fetch("/", { credentials: "same-origin" });
      if (!answer.ok) throw new Error(String(answer.status));
      const newer = new DOMParser().parseFromString(await answer.text(), "text/html");
      document.dispatchEvent(new CustomEvent("tikhon:newer", { detail: newer }));
      document.documentElement.dataset.refreshed = String(Number(document.documentElement.dataset.refreshed || 0) + 1);
      age();
    } catch { /* the next change tries again; the source reconnects by itself */ }
    busy = false;
    if (again) { again = false; refresh(); }
  }

  source.addEventListener("changed", (event) => {
    written = Date.now() - 1000 * Number(event.data);
    refresh();
  });
  setInterval(age, 1000);
})();
