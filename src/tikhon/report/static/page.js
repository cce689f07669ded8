"use strict";
(() => {
  const root = document.documentElement;
  let charts = JSON.parse(document.getElementById("charts").textContent);
  const language = () => root.dataset.language;
  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim() || name;
  const coloured = /color$/i;

  // A figure as plotly wants it: texts in the language shown, palette names as colours.
  function resolve(value, key = "") {
    if (Array.isArray(value)) {
      if (key === "colorscale") return value.map(([at, name]) => [at, colour(name)]);
      return value.map((entry) => resolve(entry, key));
    }
    if (value && typeof value === "object") {
      if ("en" in value && "zh" in value) return value[language()];
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolve(v, k)]));
    }
    return typeof value === "string" && coloured.test(key) ? colour(value) : value;
  }

  function axis(own, side, heading) {
    const base = {
      gridcolor: colour("grid"), zeroline: false, linecolor: colour("rule"), automargin: true,
      tickfont: { color: colour("muted"), size: 12 }, ticks: "",
    };
    if (own.type === "log" && !own.tickvals) Object.assign(base, { dtick: 1, exponentformat: "power" });
    const named = (own.title && own.title.text) || "";
    const text = named === heading ? "" : named; // the chart's own heading says it already
    const title = { text, standoff: side === "x" ? 8 : 6, font: { color: colour("muted"), size: 12 } };
    return { ...base, ...own, title };
  }

  // A viewBox lets print shrink a chart to the sheet, whatever the window it was drawn in.
  function scalable(place) {
    place.querySelectorAll("svg.main-svg").forEach((svg) => {
      const [width, height] = [svg.getAttribute("width"), svg.getAttribute("height")];
      if (width && height) svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    });
  }

  function draw(place) {
    const { data, layout, title } = resolve(charts[place.dataset.chart]);
    const narrow = place.clientWidth < 420;
    const axes = {};
    for (const [key, value] of Object.entries(layout)) {
      if (/^[xy]axis\d*$/.test(key)) axes[key] = axis(value, key[0], title);
    }
    const legend = layout.showlegend !== false && data.length > 1;
    // Names in one column take up to half of the height: what they need is added to it.
    const named = legend ? data.filter((trace) => trace.showlegend !== false).length : 0;
    place.style.minHeight = narrow && named > 4 ? `${48 * named}px` : "";
    const whole = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "x unified",
      font: { family: getComputedStyle(document.body).fontFamily, color: colour("ink"), size: 13 },
      margin: { t: legend ? 34 : 12, r: 14, b: 4, l: 4 },
      hoverlabel: { bgcolor: colour("paper"), bordercolor: colour("rule"), font: { color: colour("ink") } },
      legend: {
        orientation: "h", x: 0, y: 1.03, yanchor: "bottom", traceorder: "normal",
        font: { size: 12, color: colour("muted") },
      },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      ...layout, ...axes, showlegend: legend,
    };
    if (narrow && whole.yaxis2) whole.yaxis2.title = { text: "" };
    const drawing = Plotly.react(place, data, whole, { responsive: true, displayModeBar: false });
    scalable(place);
    return drawing.then(() => { scalable(place); place.dataset.drawn = language(); });
  }

  // The numbers behind a chart as a table: one row an x, one column a series.
  function tabulate(details) {
    const { data: traces, layout } = resolve(charts[details.dataset.numbers]);
    const data = traces.filter((trace) => trace.hoverinfo !== "skip");
    const place = details.querySelector(".scroll");
    const table = document.createElement("table");
    const unescape = (text) => String(text).replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
    const add = (row, tag, text) => { row.appendChild(document.createElement(tag)).textContent = unescape(text); };
    const shown = (v) => (typeof v === "number" ? String(Number(v.toPrecision(6))) : v ?? "–");
    const head = table.createTHead().insertRow();
    add(head, "th", (layout.xaxis.title && layout.xaxis.title.text) || "x");
    const rows = new Map();
    data.forEach((trace, column) => {
      add(head, "th", trace.name || "");
      (trace.x || []).forEach((x, i) => {
        if (!rows.has(x)) rows.set(x, []);
        rows.get(x)[column] = trace.z ? trace.z.map((r) => shown(r[i])).join(" ") : trace.y[i];
      });
    });
    const body = table.createTBody();
    for (const [x, values] of rows) {
      const row = body.insertRow();
      add(row, "th", shown(x));
      data.forEach((_, column) => add(row, "td", shown(values[column])));
    }
    head.querySelectorAll("th").forEach((cell) => { cell.scope = "col"; });
    body.querySelectorAll("th").forEach((cell) => { cell.scope = "row"; });
    place.replaceChildren(table);
  }

  function drawAll() {
    const places = [...document.querySelectorAll(".chart")];
    return Promise.all(places.map(draw)).then(() => { root.dataset.charts = String(places.length); });
  }

  function show(name) {
    root.dataset.language = name;
    root.lang = { en: "en", zh: "zh-CN" }[name];
    const kicker = document.querySelector(".kicker");
    document.title = kicker.getAttribute(`data-title-${name}`);
    document.querySelectorAll(`[data-label-${name}]`).forEach((element) => {
      element.setAttribute("aria-label", element.getAttribute(`data-label-${name}`));
    });
    document.querySelectorAll("[data-switch]").forEach((button) => {
      button.setAttribute("aria-pressed", String(button.dataset.switch === name));
    });
    document.querySelectorAll("details.numbers[open]").forEach(tabulate);
    return drawAll();
  }

  function listen() {
    document.querySelectorAll("details.numbers").forEach((details) => {
      details.addEventListener("toggle", () => { if (details.open) tabulate(details); });
    });
  }

  // A newer version of this page (`tikhon live`): charts that are still there move smoothly.
  document.addEventListener("tikhon:newer", ({ detail: newer }) => {
    const fresh = JSON.parse(newer.getElementById("charts").textContent);
    const same = (page) => [...page.querySelectorAll("main h2, main h3")].map((e) => e.textContent).join("\n");
    const alike = same(newer) === same(document);
    charts = fresh;
    if (alike) {
      for (const selector of [".hero", ".scroll[role]"]) {
        const [old, now] = [document, newer].map((page) => [...page.querySelectorAll(`main ${selector}`)]);
        old.forEach((element, i) => element.replaceWith(document.importNode(now[i], true)));
      }
    } else {
      document.querySelectorAll(".chart").forEach((place) => Plotly.purge(place));
      document.querySelector("main").replaceWith(document.importNode(newer.querySelector("main"), true));
      document.querySelector(".bar nav").replaceWith(document.importNode(newer.querySelector(".bar nav"), true));
      listen();
    }
    show(language());
  });

  document.querySelectorAll("[data-switch]").forEach((button) => {
    button.addEventListener("click", () => show(button.dataset.switch));
  });
  listen();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", drawAll);
  const wanted = (navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en";
  if ("follows" in root.dataset && wanted !== language()) show(wanted); else drawAll();
})();
