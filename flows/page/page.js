"use strict";
// Draws the curves (Chart.js) and the token view from the JSON of the page. Texts enter the page as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const RUNS = 8, STAGES = 10, STEP = 10;
  const DASHES = [[], [6, 3], [2, 2], [8, 3, 2, 3]];
  const COLOUR_OF = { "all right": "--g0", mixed: "--g1", "different rewards": "--g1", "all wrong": "--g2", "no signal": "--g3", "not judged": "--g4" };
  const POINTS = ["circle", "rect", "triangle", "rectRot", "star", "crossRot"];

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
    return made;
  }

  // ---- curves

  const errorBars = {
    id: "errorBars",
    afterDatasetsDraw(chart) {
      const { ctx, chartArea, scales } = chart;
      ctx.save();
      ctx.beginPath();
      ctx.rect(chartArea.left, chartArea.top, chartArea.width, chartArea.height);
      ctx.clip();
      chart.data.datasets.forEach((dataset, index) => {
        if (!chart.isDatasetVisible(index)) return;
        ctx.strokeStyle = dataset.borderColor;
        ctx.lineWidth = 1.5;
        dataset.data.forEach(({ y, error }, place) => {
          const point = chart.getDatasetMeta(index).data[place];
          if (!error || !point) return;
          const low = scales.y.getPixelForValue(y - error), high = scales.y.getPixelForValue(y + error);
          ctx.beginPath();
          ctx.moveTo(point.x, low);
          ctx.lineTo(point.x, high);
          for (const end of [low, high]) {
            ctx.moveTo(point.x - 4, end);
            ctx.lineTo(point.x + 4, end);
          }
          ctx.stroke();
        });
      });
      ctx.restore();
    },
  };

  const number = (value) => (value === null ? "" : Number(value.toPrecision(4)).toString());
  const percent = (value) => `${(100 * value).toFixed(1)}%`;

  function canvasIn(place, title, about, label) {
    const canvas = element("canvas", { role: "img", "aria-label": label });
    const caption = element("figcaption", {}, title, about ? element("small", { title: about }, about) : "");
    document.getElementById(place).append(element("figure", {}, caption, element("div", { class: "plot" }, canvas)));
    return canvas;
  }

  const charts = [];
  function draw(canvas, type, datasets, options) {
    const make = () => {
      const text = style("--faint"), line = style("--line");
      const axis = (title, more) => ({
        title: { display: title !== "", text: title, color: text }, grid: { color: line }, border: { color: line }, ...more, ticks: { color: text, ...more.ticks },
      });
      const coloured = datasets.map((dataset) => {
        const colour = style(dataset.colour);
        return { ...dataset, borderColor: colour, backgroundColor: colour };
      });
      return new Chart(canvas, {
        type,
        data: { labels: options.labels, datasets: coloured },
        options: {
          animation: false,
          responsive: true,
          maintainAspectRatio: false,
          interaction: { mode: type === "bar" ? "nearest" : "x", intersect: type === "bar" },
          scales: { x: axis(options.x, options.xAxis), y: axis(options.y, options.yAxis) },
          plugins: {
            legend: { display: options.legend, position: "bottom", labels: { color: style("--text"), usePointStyle: true, boxHeight: 7, pointStyleWidth: 12 } },
            tooltip: { callbacks: options.callbacks },
          },
        },
        plugins: options.errors ? [errorBars] : [],
      });
    };
    charts.push({ make, chart: make() });
  }
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    charts.forEach((each) => {
      each.chart.destroy();
      each.chart = each.make();
    }),
  );

  // Limits of the axes, so that points at the edge and their bars are seen whole.
  const around = (values) => ({ min: Math.min(...values) - 0.15, max: Math.max(...values) + 0.15 });
  function reach(points, percent) {
    const ends = points.flatMap(({ y, error }) => [y - (error || 0), y + (error || 0)]);
    const [low, high] = [Math.min(...ends), Math.max(...ends)];
    return { suggestedMin: percent ? Math.max(low, 0) : low, suggestedMax: percent ? Math.min(high, 1) : high };
  }

  function curves(place, chart, x, dots) {
    const form = chart.percent ? percent : number;
    const names = chart.lines || data.names;
    const runs = names.filter((name) => (chart.runs[name] || []).length);
    const datasets = runs.map((name) => {
      const own = names.indexOf(name);
      return {
        label: name,
        colour: `--c${own % RUNS}`,
        borderDash: DASHES[own % DASHES.length],
        pointStyle: POINTS[own % POINTS.length],
        pointRadius: dots || chart.runs[name].length < 3 ? 4 : 0,
        pointHitRadius: 6,
        borderWidth: chart.runs[name].length > 100 ? 1.25 : 2,
        data: chart.runs[name].map(([at, y, error]) => ({ x: at, y, error })),
      };
    });
    const points = datasets.flatMap((dataset) => dataset.data);
    const last = runs.map((name) => `${name} ends at ${form(chart.runs[name].at(-1)[1])}`).join(", ");
    draw(canvasIn(place, chart.title, chart.about, `${chart.title} by ${x}: ${last}`), "line", datasets, {
      x, y: "", legend: names.length > 1 || Boolean(chart.lines), errors: dots,
      xAxis: chart.log
        ? { type: "logarithmic", ticks: { callback: (value) => value }, afterBuildTicks: (axis) => (axis.ticks = [...new Set(points.map((point) => point.x))].sort((a, b) => a - b).map((value) => ({ value }))) }
        : { type: "linear", ticks: { precision: 0, includeBounds: false }, ...(dots ? around(points.map((point) => point.x)) : {}) },
      yAxis: { ticks: { callback: (value) => form(value) }, ...(dots ? reach(points, chart.percent) : {}) },
      callbacks: {
        title: (items) => (items.length ? `${x} ${items[0].parsed.x}` : ""),
        label: ({ dataset, raw }) => `${dataset.label}: ${form(raw.y)}${raw.error ? ` ± ${form(raw.error)}` : ""}`,
      },
    });
  }

  function bars(place, run, rounds, parts, y, label, form) {
    const labels = Object.keys(parts);
    const datasets = labels.map((label, number) => ({
      label, colour: COLOUR_OF[label] || `--s${number % STAGES}`, data: parts[label], stack: "all", borderWidth: 0, pointStyle: "rect",
    }));
    draw(canvasIn(place, run, "", label), "bar", datasets, {
      x: "round", y, labels: rounds, legend: true, errors: false,
      xAxis: { stacked: true },
      yAxis: { stacked: true },
      callbacks: {
        title: (items) => (items.length ? `round ${items[0].label}` : ""),
        label: ({ dataset, raw }) => `${dataset.label}: ${form(raw)}`,
      },
    });
  }

  const sum = (values) => values.reduce((a, b) => a + b, 0);
  function stages({ run, rounds, stages: seconds }) {
    const total = sum(Object.values(seconds).map(sum));
    bars("charts-stages", run, rounds, seconds, "seconds", `Seconds by stage and round of ${run}: ${total.toFixed(1)} in all`, (value) => `${value.toFixed(1)} s`);
  }
  function groupBars({ run, rounds, bars: counts }) {
    const last = Object.entries(counts).map(([kind, values]) => `${kind} ${values.at(-1)}`).join(", ");
    bars("charts-groups", run, rounds, counts, "groups", `Groups by round of ${run}; in the last: ${last}`, number);
  }

  data.charts.rounds.forEach((chart) => curves("charts-rounds", chart, "round", true));
  data.charts.steps.filter((chart) => chart.first).forEach((chart) => curves("charts-steps", chart, "step", false));
  data.charts.stages.forEach(stages);
  data.charts.rewards.forEach((chart) => curves("charts-rewards", chart, "round", true));
  data.charts.groups.forEach(groupBars);
  data.charts.diagnostics.forEach((chart) => curves("charts-diagnostics", chart, chart.x || "round", true));
  const more = document.getElementById("more-steps");
  if (more) {
    more.addEventListener("toggle", () => {
      if (!document.querySelector("#charts-more figure"))
        data.charts.steps.filter((chart) => !chart.first).forEach((chart) => curves("charts-more", chart, "step", false));
    });
  }
  // ---- tokens

  const filters = document.getElementById("filters");
  if (!filters) return;
  const list = document.getElementById("list"), detail = document.getElementById("detail");
  const button = document.getElementById("more"), found = document.getElementById("found");
  const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "(no text)";
  const share = (p) => (p === undefined ? "" : p >= 0.0995 ? percent(p) : p >= 1e-7 ? `${Number((100 * p).toPrecision(2)).toFixed(Math.max(1, 1 - Math.floor(Math.log10(100 * p))))}%` : `${p.toExponential(1)}`);
  const nats = (value) => (value === null || value === undefined ? "" : value.toFixed(2));

  const COLOURS = {
    gap: ["gap: log p(student) − log p(teacher)", (c, i) => (c.gap ? c.gap[i] : null)],
    divergence: ["reverse KL over the student's stored list", (c, i) => (c.divergence ? c.divergence[i] : null)],
    surprise: ["−log p(teacher)", (c, i) => (c.teacher && c.teacher[i] !== null ? -c.teacher[i] : null)],
  };

  function level(value) {
    if (value === null) return "";
    if (value < -data.gaps[0]) return "below";
    const passed = data.gaps.filter((gap) => value >= gap).length;
    return passed ? `gap${passed}` : "";
  }

  const reasonsOf = (completion, place) => data.reasons[completion.reasons[place]].split(", ").filter(Boolean);

  function why(completion, place) {
    const left = data.left_out[completion.run] || [];
    const lines = reasonsOf(completion, place).map((reason) =>
      element("li", {}, `${reason}: ${data.why[reason] || "a reason of a plugin"}; ${left.includes(reason) ? "left out of the loss" : "still in the loss"}`),
    );
    return element("ul", {}, ...lines);
  }

  function topTable(title, entries, names) {
    const rows = entries.map(([word, ...shares]) =>
      element("tr", {}, element("td", {}, element("code", {}, visible(data.words[word]))), ...shares.map((p) => element("td", {}, share(p)))),
    );
    const heads = ["token", ...names.slice(0, Math.max(1, (entries[0] || []).length - 1))];
    const head = element("thead", {}, element("tr", {}, ...heads.map((name) => element("th", { scope: "col" }, name))));
    return element("div", {}, element("h4", {}, title), element("table", {}, head, element("tbody", {}, ...rows)));
  }

  function explain(completion, place) {
    const p = (column) => (column && column[place] !== null ? share(Math.exp(column[place])) : "not scored");
    const facts = [
      ["token", visible(data.words[completion.name[place]])],
      ["position", `${place} of ${completion.length}`],
      ["student", p(completion.student)],
      ["teacher", p(completion.teacher)],
      ["gap", completion.gap ? `${nats(completion.gap[place])} nats` : ""],
      ["reverse KL (list)", completion.divergence ? `${nats(completion.divergence[place])} nats` : ""],
      ["list mass", completion.mass ? share(completion.mass[place] ?? undefined) : ""],
      ["mask reasons", completion.reasons[place] ? "" : "none"],
    ].filter(([, text]) => text);
    const parts = [element("dl", {}, ...facts.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]))];
    if (completion.reasons[place]) parts.push(element("h4", {}, "Mask reasons"), why(completion, place));
    const teacher = completion.teacher_top && completion.teacher_top[place];
    const student = completion.student_top && completion.student_top[place];
    const tables = element("div", { class: "tops" });
    if (teacher) tables.append(topTable("The teacher's likeliest", teacher, ["teacher"]));
    if (student) tables.append(topTable("The student's likeliest", student, ["student", "teacher"]));
    parts.push(tables);
    if (!teacher && !student) parts.push(element("p", { class: "small" }, "The run stored no lists of likeliest tokens."));
    detail.replaceChildren(...parts);
  }

  let chosen = null;
  function choose(span) {
    if (!span || !span.own) return;
    if (chosen) {
      chosen.classList.remove("chosen");
      if (chosen.previousSibling) chosen.tabIndex = -1; // the first of a completion is where Tab leads
    }
    chosen = span;
    span.classList.add("chosen");
    span.tabIndex = 0;
    explain(span.own.completion, span.own.place);
  }

  function shown(completion, filter) {
    const hits = new Set();
    completion.name.forEach((word, place) => {
      const text = filter.token === "" || data.words[word].includes(filter.token) || data.words[completion.text[place]].includes(filter.token);
      const reason = filter.reason === "" || (filter.reason === "none" ? !reasonsOf(completion, place).length : reasonsOf(completion, place).includes(filter.reason));
      if (text && reason) hits.add(place);
    });
    const tokens = element("div", { class: "tokens", role: "group", "aria-label": `Tokens of ${completion.id}` });
    const value = COLOURS[filter.colour][1];
    completion.text.forEach((word, place) => {
      const classes = [level(value(completion, place)), completion.reasons[place] ? "masked" : ""];
      if ((filter.token !== "" || filter.reason !== "") && hits.has(place)) classes.push("hit");
      const text = data.words[word];
      const span = element("span", { class: classes.filter(Boolean).join(" ") }, text === "" ? "∅" : text === "\n" ? "⏎\n" : text);
      span.own = { completion, place };
      tokens.append(span);
    });
    if (tokens.firstChild) tokens.firstChild.tabIndex = 0;
    const gaps = (completion.gap || []).filter((gap) => gap !== null);
    const facts = [
      `${completion.run}, round ${completion.round}, ${completion.id}`,
      `${completion.length} token${completion.length === 1 ? "" : "s"}${completion.length > completion.text.length ? ` (the first ${completion.text.length} are shown)` : ""}`,
      { stop: "ended by itself", length: "cut off" }[completion.end] || completion.end,
      gaps.length ? `mean gap ${nats(gaps.reduce((a, b) => a + b, 0) / gaps.length)}` : "",
      completion.by === "student" ? "" : `written by ${completion.by}`,
    ];
    const header = element("header", {}, facts.filter(Boolean).join(" · "));
    return element("article", { class: "completion" }, header, element("p", { class: "prompt" }, data.prompts[completion.prompt]), tokens, judgement(completion.judged));
  }

  function judgement(judged) {
    if (!judged) return "";
    const verdict = judged.right === null ? "" : element("span", { class: judged.right ? "right" : "wrong" }, judged.right ? "right" : "wrong");
    const reward = judged.reward === null ? `no reward${judged.failed ? `: ${judged.failed}` : ""}` : `reward ${number(judged.reward)}`;
    return element("p", { class: "judged" }, verdict, verdict ? ", " : "", reward, judged.feedback ? element("span", { class: "feedback" }, judged.feedback) : "");
  }

  function judgedAs(judged, { verdict = "", least = "", most = "" }) {
    if (verdict === "" && least === "" && most === "") return true;
    if (!judged) return false;
    const { reward, right } = judged;
    if (verdict === "none") return reward === null;
    if (verdict !== "" && right !== (verdict === "right")) return false;
    return (least === "" || (reward !== null && reward >= Number(least))) && (most === "" || (reward !== null && reward <= Number(most)));
  }

  const groups = [...new Set(data.completions.map((c) => `${c.run}, round ${c.round}`))];
  const options = (name, entries) => filters.elements[name].append(...entries.map(([value, text]) => element("option", { value }, text)));
  options("group", [["", "all"], ...groups.flatMap((g) => [[`${g}|`, g], [`${g}|1`, `${g}: largest mean gap`]])]);
  options("colour", Object.entries(COLOURS).filter(([, [, of]]) => data.completions.some((c) => c.text.some((_, i) => of(c, i) !== null))).map(([name, [text]]) => [name, text]));
  options("reason", [["", "any"], ["none", "none"], ...Object.keys(data.why).concat([...new Set(data.reasons.flatMap((r) => r.split(", ")))].filter((r) => r && !data.why[r])).map((r) => [r, r])]);
  if (filters.elements.verdict) {
    const known = data.completions.some((c) => c.judged && c.judged.right !== null);
    options("verdict", [["", "any"], ...(known ? [["right", "right"], ["wrong", "wrong"]] : []), ["none", "no reward"]]);
  }
  if (!filters.elements.colour.options.length) options("colour", [["gap", "nothing: not scored"]]);
  const [low, middle, high] = data.gaps;
  const key = (name, text) => element("span", { class: `key ${name}` }, text);
  document.getElementById("legend").append(
    key("gap1", `from ${low}`), key("gap2", `from ${middle}`), key("gap3", `from ${high}`), key("below", `below −${low}`), "nats; ", key("masked", "struck out"), "has a mask reason",
  );

  let matching = [], visibleCount = 0, filter = {};
  function extend() {
    const next = matching.slice(visibleCount, visibleCount + STEP);
    list.append(...next.map((completion) => shown(completion, filter)));
    visibleCount += next.length;
    button.hidden = visibleCount >= matching.length;
    button.textContent = `Show ${Math.min(STEP, matching.length - visibleCount)} more`;
    const total = data.completions.length;
    found.textContent = matching.length === total ? `${total} completions` : `${matching.length} of ${total} completions match`;
  }

  function refresh() {
    filter = Object.fromEntries(new FormData(filters).entries());
    const [group, worst] = filter.group.split("|");
    const prompt = filter.prompt.toLowerCase();
    matching = data.completions.filter(
      (c) =>
        (group === "" || (`${c.run}, round ${c.round}` === group && (!worst || c.worst))) &&
        judgedAs(c.judged, filter) &&
        (prompt === "" || data.prompts[c.prompt].toLowerCase().includes(prompt) || c.id.toLowerCase().includes(prompt)) &&
        c.name.some((word, place) => {
          const reasons = reasonsOf(c, place);
          return (
            (filter.token === "" || data.words[word].includes(filter.token) || data.words[c.text[place]].includes(filter.token)) &&
            (filter.reason === "" || (filter.reason === "none" ? !reasons.length : reasons.includes(filter.reason)))
          );
        }),
    );
    list.replaceChildren();
    visibleCount = 0;
    chosen = null;
    extend();
  }

  let pointer = "";
  list.addEventListener("pointerover", (event) => {
    const at = `${event.screenX},${event.screenY}`;
    if (at !== pointer) choose(event.target.closest(".tokens span")); // not where the page moved below a pointer at rest
    pointer = at;
  });
  list.addEventListener("click", (event) => choose(event.target.closest(".tokens span")));
  list.addEventListener("focusin", (event) => choose(event.target.closest(".tokens span")));
  list.addEventListener("keydown", (event) => {
    const at = event.target.closest(".tokens span");
    const siblings = at && { ArrowRight: at.nextSibling, ArrowLeft: at.previousSibling, Home: at.parentNode.firstChild, End: at.parentNode.lastChild };
    if (siblings && event.key in siblings) {
      event.preventDefault();
      const next = siblings[event.key];
      if (next) {
        if (!next.hasAttribute("tabindex")) next.tabIndex = -1; // can be focused, and is no stop of the Tab key
        next.focus();
      }
    }
  });
  filters.addEventListener("input", refresh);
  filters.addEventListener("submit", (event) => event.preventDefault());
  button.addEventListener("click", extend);
  refresh();
})();
