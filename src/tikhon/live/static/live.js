"use strict";
(() => {
  const source = new EventSource("/events");
  let busy = false, again = false;

  async function refresh() {
    if (busy) { again = true; return; }
    busy = true;
    try {
      const answer = await fetch("/", { credentials: "same-origin" });
      if (!answer.ok) throw new Error(String(answer.status));
      const newer = new DOMParser().parseFromString(await answer.text(), "text/html");
      document.dispatchEvent(new CustomEvent("tikhon:newer", { detail: newer }));
      document.documentElement.dataset.refreshed = String(Number(document.documentElement.dataset.refreshed || 0) + 1);
    } catch { /* the next change tries again; the source reconnects by itself */ }
    busy = false;
    if (again) { again = false; refresh(); }
  }

  source.addEventListener("changed", refresh);
})();
