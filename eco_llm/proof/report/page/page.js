"use strict";
// Values under the pointer. The page says everything without this: each chart has its table.
(() => {
  const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });
  const clear = (canvas) => canvas.querySelectorAll(".tip, .rule").forEach((e) => e.remove());
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] < x) low = mid; else high = mid; }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  const line = (tip, name, value) => {
    const row = document.createElement("div"), strong = document.createElement("b");
    row.textContent = name + " ";
    strong.textContent = number.format(value);
    row.append(strong);
    tip.append(row);
  };
  document.addEventListener("pointermove", (event) => {
    const canvas = event.target.closest ? event.target.closest(".canvas") : null;
    document.querySelectorAll(".canvas").forEach((c) => { if (c !== canvas) clear(c); });
    if (!canvas) return;
    const plot = canvas.closest(".plot");
    plot.points ||= JSON.parse(plot.querySelector("script").textContent);
    const p = plot.points, box = canvas.getBoundingClientRect();
    const part = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const x = p.from + part * (p.to - p.from);
    clear(canvas);
    const rule = document.createElement("div"), tip = document.createElement("div");
    rule.className = "rule"; tip.className = "tip";
    let at = null;
    for (const s of p.series) {
      const i = nearest(s.x, x);
      if (Math.abs(s.x[i] - x) > (p.to - p.from) / 15) continue;
      if (at === null) { at = s.x[i]; line(tip, p.x, at); }
      line(tip, s.name, s.y[i]);
    }
    if (at === null) return;
    const percent = 100 * (at - p.from) / (p.to - p.from);
    rule.style.left = percent + "%";
    tip.style[percent < 50 ? "left" : "right"] = `calc(${percent < 50 ? percent : 100 - percent}% + 8px)`;
    canvas.append(rule, tip);
  });
})();
