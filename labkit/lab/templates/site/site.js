"use strict";
(function () {
  const root = document.body.dataset.root || "";
  const html = document.documentElement;
  const $ = (id) => document.getElementById(id);

  // ------------------------------------------------------------------ light and dark
  // Figures carry the colours of a white page; on a dark one their neutral tones change places.
  const tones = window.labkitTones || {};
  const dark = () => html.dataset.theme === "dark";
  function toned(text) {
    if (!dark()) return text;
    return text
      .replace(/#[0-9a-f]{6}\b/gi, (found) => tones[found.toLowerCase()] || found)
      .replace(/"white"/g, '"#11161d"')
      .replace(/rgba\(255,\s*255,\s*255,/g, "rgba(17,22,29,")
      .replace(/rgba\(0,\s*114,\s*178,/g, "rgba(86,180,233,");
  }
  $("theme").addEventListener("click", function () {
    html.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("labkit-theme", html.dataset.theme); } catch (error) { /* kept for this page only */ }
    document.dispatchEvent(new Event("labkit-theme"));
  });

  // ------------------------------------------------------------------ figures, drawn when they come into view
  const kept = new WeakMap();
  function draw(figure) {
    if (!window.Plotly) return;
    const script = figure.querySelector("script");
    if (script) { kept.set(figure, script.textContent); script.remove(); }
    if (!kept.has(figure)) return;
    const spec = JSON.parse(toned(kept.get(figure)));
    let place = figure.firstElementChild;
    if (!place) { place = document.createElement("div"); figure.append(place); }
    const narrow = figure.clientWidth < 560;
    const layout = Object.assign({}, spec.layout, { autosize: true });
    delete layout.width;
    if (dark()) Object.assign(layout, { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" });
    if (narrow) fit(spec, layout, figure.clientWidth);
    const config = Object.assign({ responsive: true, displaylogo: false }, spec.config, { plotlyServerURL: "" });
    if (narrow) config.displayModeBar = false;
    Plotly.purge(place);
    return Plotly.newPlot(place, spec.data || [], layout, config).then(function () {
      if (spec.frames && spec.frames.length) Plotly.addFrames(place, spec.frames);
      figure.dataset.drawn = html.dataset.theme;
    });
  }
  // On a phone a title is broken into lines instead of being cut, and names at the ends of curves become a legend.
  function fit(spec, layout, width) {
    const title = typeof layout.title === "string" ? { text: layout.title } : Object.assign({}, layout.title);
    const margin = Object.assign({ t: 84, b: 64 }, layout.margin, { l: 48, r: 12 });
    if (title.text) {
      const room = Math.max(18, Math.floor((width - 24) / 8.4));
      const before = title.text.split(/<br\s*\/?>/).length;
      const parts = title.text.split(/<br\s*\/?>/);
      const bold = /^<b>([^<>]*)<\/b>$/.exec(parts[0]);
      const words = bold ? bold[1] : parts[0];
      if (!/[<>]/.test(words)) parts[0] = wrapped(words, room).split("<br>").map((line) => bold ? "<b>" + line + "</b>" : line).join("<br>");
      title.text = parts.join("<br>");
      title.font = Object.assign({}, title.font, { size: 15 });
      Object.assign(title, { x: 0.02, xref: "container" });
      margin.t += 20 * (title.text.split("<br>").length - before);
      layout.title = title;
    }
    const named = (note) => note.name === "end";
    const ends = (layout.annotations || []).some(named);
    const lines = spec.data.filter((trace) => trace.name && trace.showlegend !== false);
    if (ends) {
      layout.annotations = layout.annotations.filter((note) => !named(note));
      (spec.frames || []).forEach((frame) => {
        if (frame.layout && frame.layout.annotations) frame.layout.annotations = frame.layout.annotations.filter((note) => !named(note));
      });
      lines.forEach((trace) => { trace.showlegend = true; });
    }
    if (ends || (lines.length > 1 && layout.showlegend !== false)) {
      const longest = Math.max(...lines.map((trace) => trace.name.replace(/<[^>]*>/g, "").length));
      const rows = Math.ceil(lines.length / Math.max(1, Math.floor(width / (longest * 6.7 + 52))));
      const head = 22 + 20 * (title.text || "").split("<br>").length;
      const noted = (layout.annotations || []).length > 0;
      const old = margin.t;
      margin.t = head + 20 * rows + (noted ? 30 : 12);
      layout.height = (layout.height || 420) + Math.max(0, margin.t - old);
      layout.showlegend = true;
      layout.legend = Object.assign({}, layout.legend, { orientation: "h", x: 0.02, xanchor: "left", xref: "container", y: 1 - head / layout.height, yanchor: "top", yref: "container", font: { size: 12 } });
    }
    layout.margin = margin;
  }
  function wrapped(text, room) {
    const lines = [""];
    for (const word of text.split(" ")) {
      const last = lines[lines.length - 1];
      if (last && (last + " " + word).length > room) lines.push(word);
      else lines[lines.length - 1] = last ? last + " " + word : word;
    }
    return lines.join("<br>");
  }
  function begin() {
    const figures = document.querySelectorAll("figure.plot");
    if (!("IntersectionObserver" in window)) { figures.forEach(draw); return; }
    const watcher = new IntersectionObserver(function (entries) {
      for (const entry of entries) {
        if (entry.isIntersecting) { watcher.unobserve(entry.target); draw(entry.target); }
      }
    }, { rootMargin: "600px" });
    figures.forEach((figure) => watcher.observe(figure));
    window.addEventListener("beforeprint", () => figures.forEach((figure) => { if (!figure.dataset.drawn) draw(figure); }));
    document.addEventListener("labkit-theme", () => figures.forEach((figure) => { if (figure.dataset.drawn) draw(figure); }));
    sweep();
  }
  document.addEventListener("DOMContentLoaded", begin);

  // ------------------------------------------------------------------ where on the page one is
  const contents = [...document.querySelectorAll(".toc a[href^='#']")];
  if (contents.length && "IntersectionObserver" in window) {
    const goals = contents.map((link) => $(decodeURIComponent(link.hash.slice(1)))).filter(Boolean);
    const mark = function () {
      let at = goals.findLastIndex((goal) => goal.getBoundingClientRect().top < 140);
      if (innerHeight + scrollY >= document.body.scrollHeight - 4) at = goals.length - 1;
      contents.forEach((link, i) => { if (i === at) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current"); });
    };
    new IntersectionObserver(mark, { rootMargin: "-140px 0px -60% 0px", threshold: [0, 1] });
    let waiting = false;
    addEventListener("scroll", function () {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; mark(); });
    }, { passive: true });
    mark();
  }

  // ------------------------------------------------------------------ filter of the gallery
  const form = $("filter");
  if (form) {
    const cards = [...document.querySelectorAll("#cards > li")];
    const chips = [...form.querySelectorAll(".chip")];
    const words = $("filter-words");
    const pressed = (kind) => chips.filter((chip) => kind in chip.dataset && chip.getAttribute("aria-pressed") === "true").map((chip) => chip.dataset[kind]);
    const apply = function (keep) {
      const families = pressed("family");
      const verdicts = pressed("verdict");
      const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const card of cards) {
        const own = card.dataset.verdicts.split(" ");
        const fits = (!families.length || families.includes(card.dataset.family))
          && verdicts.every((verdict) => own.includes(verdict))
          && wanted.every((word) => card.dataset.words.includes(word));
        card.hidden = !fits;
        shown += fits ? 1 : 0;
      }
      const filtered = families.length || verdicts.length || wanted.length;
      $("filter-note").textContent = !filtered ? "" : shown ? shown + " of " + cards.length + " shown" : "No paper fits. Take a filter away.";
      if (keep === false) return;
      const state = new URLSearchParams();
      if (families.length) state.set("family", families.join(","));
      if (verdicts.length) state.set("verdict", verdicts.join(","));
      if (wanted.length) state.set("words", words.value);
      history.replaceState(null, "", filtered ? "#" + state : location.pathname);
    };
    const restore = function () {
      const state = new URLSearchParams(location.hash.slice(1));
      words.value = state.get("words") || "";
      for (const chip of chips) {
        const kind = "family" in chip.dataset ? "family" : "verdict";
        chip.setAttribute("aria-pressed", String((state.get(kind) || "").split(",").includes(chip.dataset[kind])));
      }
      apply(false);
    };
    chips.forEach((chip) => chip.addEventListener("click", function () {
      chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
      apply();
    }));
    words.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    addEventListener("hashchange", restore);
    restore();
  }

  // ------------------------------------------------------------------ search
  const dialog = $("search");
  const input = $("search-words");
  const list = $("search-found");
  let at = 0;
  function open() {
    if (dialog.open) return;
    if (!window.labkitSearch) {
      const script = document.createElement("script");
      script.src = root + "assets/search.js";
      script.onload = look;
      document.head.append(script);
    }
    dialog.showModal();
    input.select();
    look();
  }
  function look() {
    const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    list.textContent = "";
    at = 0;
    if (!window.labkitSearch || !wanted.length) { $("search-note").textContent = ""; return; }
    const found = [];
    for (const item of window.labkitSearch) {
      const title = item.title.toLowerCase();
      const text = item.text.toLowerCase();
      let score = item.kind === "paper" ? 3 : item.kind === "section" ? 0 : 1;
      for (const word of wanted) {
        const here = title.includes(word) ? 5 : item.in.includes(word) ? 4 : text.includes(word) ? 1 : -1000;
        score += here + (here > 0 && new RegExp("(^|\\W)" + word.replace(/[^\w]/g, "\\$&")).test(here === 5 ? title : text) ? 1 : 0);
      }
      if (score > 0) found.push([score, item]);
    }
    found.sort((a, b) => b[0] - a[0]);
    $("search-note").textContent = found.length ? found.length + (found.length === 1 ? " place" : " places") : "Nothing found. Try fewer or shorter words.";
    found.slice(0, 40).forEach(function (pair, i) {
      const item = pair[1];
      const line = document.createElement("li");
      line.id = "found-" + i;
      line.setAttribute("role", "option");
      const link = document.createElement("a");
      link.href = root + item.to;
      link.tabIndex = -1;
      const name = document.createElement("b");
      marked(name, item.title, wanted);
      const where = document.createElement("small");
      where.textContent = item.in + " · " + item.kind;
      const text = document.createElement("small");
      marked(text, snippet(item.text, wanted), wanted);
      link.append(name, where, text);
      line.append(link);
      line.addEventListener("click", () => dialog.close());
      list.append(line);
    });
    choose(0);
  }
  function snippet(text, wanted) {
    const lower = text.toLowerCase();
    const place = Math.min(...wanted.map((word) => { const i = lower.indexOf(word); return i < 0 ? Infinity : i; }));
    const start = Number.isFinite(place) ? Math.max(0, place - 50) : 0;
    return (start ? "…" : "") + text.slice(start, start + 170) + (text.length > start + 170 ? "…" : "");
  }
  function marked(element, text, wanted) {
    const pattern = new RegExp("(" + wanted.map((word) => word.replace(/[^\w]/g, "\\$&")).join("|") + ")", "gi");
    text.split(pattern).forEach(function (part, i) {
      if (i % 2) { const mark = document.createElement("mark"); mark.textContent = part; element.append(mark); }
      else element.append(part);
    });
  }
  function choose(to) {
    const lines = [...list.children];
    if (!lines.length) { input.removeAttribute("aria-activedescendant"); return; }
    at = (to + lines.length) % lines.length;
    lines.forEach((line, i) => line.setAttribute("aria-selected", String(i === at)));
    lines[at].scrollIntoView({ block: "nearest" });
    input.setAttribute("aria-activedescendant", lines[at].id);
  }
  $("search-open").addEventListener("click", open);
  input.addEventListener("input", look);
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", function (event) {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      choose(at + (event.key === "ArrowDown" ? 1 : -1));
    } else if (event.key === "Enter" && event.target === input) {
      event.preventDefault();
      const link = list.children[at] && list.children[at].querySelector("a");
      if (link) { dialog.close(); location.href = link.href; }
    }
  });
  addEventListener("keydown", function (event) {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) { event.preventDefault(); open(); }
  });

  // ------------------------------------------------------------------ sweeps
  function sweep() {
    const source = $("sweep-data");
    if (!source) return;
    const data = JSON.parse(source.textContent);
    const measure = $("measure");
    const apart = $("apart");
    const light = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b4a9c", "#4d4d4d"];
    const night = ["#56b4e9", "#f0935a", "#3cc79c", "#e0a0c4", "#f0b84a", "#9ad2f5", "#a99be0", "#b9c2cc"];
    const shapes = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star"];
    const faded = (colour, share) => "rgba(" + [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16)).join(",") + "," + share + ")";
    const sorted = (values) => values.every((value) => typeof value === "number") ? values.sort((a, b) => a - b) : values.sort();
    function paint() {
      const m = Number(measure.value);
      const what = data.measures[m];
      const notes = [];
      if (what.threshold !== null) notes.push("registered: " + (what.direction === ">=" ? "at least " : "at most ") + what.threshold);
      if (what.missing) notes.push(what.missing + " of " + data.runs + " runs have no value");
      $("pick-note").textContent = notes.join(" · ");
      document.querySelectorAll(".sweep-plot").forEach(function (figure) {
        const p = Number(figure.dataset.parameter);
        const label = data.parameters[p];
        const points = what.points.filter((point) => point[p] !== null);
        const values = sorted([...new Set(points.map((point) => point[p]))]);
        const numeric = values.every((value) => typeof value === "number");
        const by = apart.value === "" || Number(apart.value) === p ? null : Number(apart.value);
        const lines = by === null ? [null] : sorted([...new Set(points.map((point) => point[by]))]);
        const traces = [];
        lines.forEach(function (line, i) {
          const colour = (dark() ? night : light)[i % 8];
          const own = by === null ? points : points.filter((point) => point[by] === line);
          const name = by === null ? "mean" : data.parameters[by] + " " + line;
          const x = []; const mean = []; const low = []; const high = [];
          for (const value of values) {
            const got = own.filter((point) => point[p] === value).map((point) => point[point.length - 1]);
            if (!got.length) continue;
            x.push(numeric ? value : String(value));
            mean.push(got.reduce((a, b) => a + b, 0) / got.length);
            low.push(Math.min(...got));
            high.push(Math.max(...got));
          }
          const common = { legendgroup: name, hoverinfo: "skip", showlegend: false };
          if (x.length > 1) traces.push(Object.assign({ x: x.concat(x.slice().reverse()), y: high.concat(low.slice().reverse()), fill: "toself", fillcolor: faded(colour, 0.16), line: { width: 0 }, mode: "lines" }, common));
          traces.push(Object.assign({ x: own.map((point) => numeric ? point[p] : String(point[p])), y: own.map((point) => point[point.length - 1]), mode: "markers", marker: { color: faded(colour, 0.4), size: 5, symbol: shapes[i % 8] } }, common));
          traces.push({ x: x, y: mean, mode: "lines+markers", name: name, legendgroup: name, showlegend: by !== null, line: { color: colour, width: 2.5 }, marker: { color: colour, size: 8, symbol: shapes[i % 8] }, customdata: x.map((_, k) => [low[k], high[k]]), hovertemplate: label + " %{x}<br>" + "%{y:.4~g} (%{customdata[0]:.4~g} to %{customdata[1]:.4~g})<extra>" + name + "</extra>" });
        });
        const ink = dark() ? "#e6ebf1" : "#16202c"; const soft = dark() ? "#9aa8b8" : "#536172"; const rule = dark() ? "#2b3542" : "#dbe2e8";
        const axis = { automargin: true, gridcolor: rule, linecolor: rule, showline: true, zeroline: false, tickfont: { size: 13, color: soft }, ticks: "outside", tickcolor: rule };
        const positive = numeric && values.every((value) => value > 0) && values.length > 2;
        const wide = positive && values[values.length - 1] / values[0] >= 8;
        const layout = {
          height: 340, autosize: true, margin: { l: 56, r: 16, t: by === null ? 16 : 44, b: 52 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
          font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: ink },
          hoverlabel: { bgcolor: dark() ? "#19202a" : "#ffffff", bordercolor: rule, font: { color: ink, size: 13 }, align: "left" },
          xaxis: Object.assign({}, axis, { showgrid: false, title: { text: label, font: { size: 13, color: soft } }, type: wide ? "log" : numeric ? "linear" : "category" }, numeric && values.length <= 8 ? { tickvals: values, ticktext: values.map(String) } : {}),
          yaxis: Object.assign({}, axis, { nticks: 6 }),
          legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: ink } },
          shapes: [],
        };
        if (what.threshold !== null) {
          layout.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: what.threshold, y1: what.threshold, line: { color: ink, width: 1.5, dash: "dot" } });
        }
        Plotly.react(figure, traces, layout, { responsive: true, displaylogo: false, displayModeBar: false, plotlyServerURL: "" }).then(() => { figure.dataset.drawn = measure.value; });
      });
    }
    measure.addEventListener("change", paint);
    apart.addEventListener("change", paint);
    $("pick").addEventListener("submit", (event) => event.preventDefault());
    document.addEventListener("labkit-theme", paint);
    paint();
  }
})();
