// Draws the charts and colors the token strips. All data is in the page; nothing is fetched.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Charts

  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  const drawPlot = (key) => Plotly.newPlot(key, data.plots[key].data, data.plots[key].layout, config);
  const waits = (key) => document.getElementById(key).closest("[data-lazy][hidden]");
  Object.keys(data.plots).filter((key) => !waits(key)).forEach(drawPlot);
  for (const menu of all("select[data-plot]")) {
    menu.addEventListener("change", () => {
      const key = menu.dataset.plot;
      Plotly.restyle(key, { z: [data.plots[key].choices[Number(menu.value)]] }, [0]);
    });
  }
  for (const menu of all("select[data-panels]")) {
    menu.addEventListener("change", () => {
      all(`[data-panel-of="${menu.dataset.panels}"]`).forEach((panel, number) => {
        panel.hidden = number !== Number(menu.value);
        // A chart that was drawn while hidden has not the width of its place.
        if (!panel.hidden) all(".js-plotly-plot", panel).forEach((plot) => Plotly.Plots.resize(plot));
        if (!panel.hidden) all(".plot:not(.js-plotly-plot)", panel).forEach((plot) => drawPlot(plot.id));
      });
    });
  }

  // Token strips

  const NONE = 0xffff;
  const MOST_CHIPS = 16;
  const tokens = data.tokens;
  if (!tokens) return;

  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const unpack = ([width, experts, shares]) => {
    const raw = new DataView(bytes(experts).buffer);
    const numbers = Array.from({ length: raw.byteLength / 2 }, (_, n) => raw.getUint16(2 * n, true));
    return { width, numbers, shares: bytes(shares) };
  };
  const percent = (share) => {
    const value = 100 * share;
    return (value > 0 && value < 0.5 ? "<1" : value.toFixed(0)) + "\u202f%";
  };
  const rgb = (color) => [1, 3, 5].map((start) => parseInt(color.slice(start, start + 2), 16));

  const strips = all("[data-strip]").map((element, number) => ({
    element,
    spans: all("i", element),
    share: all("[data-share]")[number],
    sites: tokens.strips[number],
    now: null,
  }));
  const legend = document.getElementById("legend");
  const readout = document.getElementById("readout");
  const slider = document.getElementById("strip-site");
  const output = document.getElementById("strip-site-name");
  let site = tokens.start;
  let alone = null; // the expert whose tokens alone are shown
  let picked = null;

  const group = () => tokens.groups[tokens.sites[site].group];
  const nameOf = (expert) => (isNaN(group().experts[expert]) ? "" : "expert ") + group().experts[expert];

  function describe(strip, place) {
    const { width, numbers, shares } = strip.now;
    const parts = [];
    for (let slot = place * width; slot < (place + 1) * width; slot++) {
      if (numbers[slot] !== NONE) parts.push(`${nameOf(numbers[slot])} ${percent(shares[slot] / 255)}`);
    }
    return parts.length ? parts.join(", ") : "no expert";
  }

  function paint(strip, counts) {
    strip.now = unpack(strip.sites[site]);
    const { width, numbers, shares } = strip.now;
    const mine = new Map();
    strip.spans.forEach((span, place) => {
      const expert = numbers[place * width];
      if (expert === NONE) {
        span.removeAttribute("style");
      } else {
        const color = group().colors[expert];
        const alpha = (0.08 + 0.4 * (shares[place * width] / 255)).toFixed(3);
        span.style.setProperty("--c", color);
        span.style.setProperty("--tint", `rgba(${rgb(color).join(",")},${alpha})`);
        mine.set(expert, (mine.get(expert) || 0) + 1);
        counts.set(expert, (counts.get(expert) || 0) + 1);
      }
      span.classList.toggle("faint", alone !== null && expert !== alone);
      span.title = describe(strip, place);
    });
    const top = [...mine].sort((a, b) => b[1] - a[1]).slice(0, 2);
    strip.share.textContent = top
      .map(([expert, count]) => `${nameOf(expert)} ${percent(count / strip.spans.length)}`)
      .join(" · ");
  }

  function chip(expert, count, total) {
    const button = document.createElement("button");
    const dot = document.createElement("i");
    const part = document.createElement("b");
    button.type = "button";
    button.className = "chip";
    button.style.setProperty("--c", group().colors[expert]);
    button.setAttribute("aria-pressed", String(alone === expert));
    part.textContent = percent(count / total);
    button.append(dot, nameOf(expert), part);
    button.addEventListener("click", () => {
      alone = alone === expert ? null : expert;
      draw();
    });
    return button;
  }

  function draw() {
    const counts = new Map();
    strips.forEach((strip) => paint(strip, counts));
    const total = strips.reduce((sum, strip) => sum + strip.spans.length, 0);
    const few = group().experts.length <= MOST_CHIPS;
    const shown = few
      ? group().experts.map((_, expert) => [expert, counts.get(expert) || 0])
      : [...counts].sort((a, b) => b[1] - a[1]).slice(0, MOST_CHIPS);
    legend.replaceChildren(...shown.map(([expert, count]) => chip(expert, count, total)));
    const left = counts.size - shown.length;
    if (!few && left > 0) {
      const more = document.createElement("span");
      more.className = "more";
      more.textContent = `and ${left} more`;
      legend.append(more);
    }
    if (output) output.textContent = tokens.sites[site].name;
    if (slider) slider.setAttribute("aria-valuetext", `${tokens.noun} ${tokens.sites[site].name}`);
    if (picked) tell(picked.strip, picked.place);
  }

  function tell(strip, place) {
    const span = strip.spans[place];
    const word = document.createElement("strong");
    word.textContent = span.textContent.trim() || `token ${place}`;
    readout.replaceChildren(word, ` → ${describe(strip, place)}`);
    if (picked) picked.strip.spans[picked.place].classList.remove("picked");
    span.classList.add("picked");
    picked = { strip, place };
  }

  const STEPS = { ArrowLeft: -1, ArrowRight: 1 };
  for (const strip of strips) {
    strip.element.addEventListener("keydown", (event) => {
      const step = STEPS[event.key];
      if (!step) return;
      const from = picked && picked.strip === strip ? picked.place : -1;
      tell(strip, Math.min(strip.spans.length - 1, Math.max(0, from + step)));
      event.preventDefault();
    });
    strip.spans.forEach((span, place) => {
      span.addEventListener("pointerenter", () => tell(strip, place));
      span.addEventListener("click", () => tell(strip, place));
    });
  }
  if (slider) {
    slider.addEventListener("input", () => {
      site = Number(slider.value);
      alone = null;
      draw();
    });
  }
  draw();
})();
