"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/* ---- curves: plotly draws them when they come into sight, in the page's colours ---- */
function colours() {
  const axis = { color: css("--ink"), gridcolor: css("--line"), zerolinecolor: css("--line") };
  return { font: { color: css("--ink") }, xaxis: axis, yaxis: axis, hoverlabel: { bgcolor: css("--panel"), font: { color: css("--ink") } } };
}
function coloured(layout) {
  const own = colours();
  return { ...layout, font: own.font, hoverlabel: own.hoverlabel,
    xaxis: { ...layout.xaxis, ...own.xaxis }, yaxis: { ...layout.yaxis, ...own.yaxis, automargin: true } };
}
function draw(place) {
  const figure = data.figures[place.dataset.figure];
  Plotly.react(place, figure.data, coloured(figure.layout), { responsive: true, displayModeBar: false });
}
function showCurves() {
  const script = document.createElement("script");  // only now: it is large, and the rest of the page need not wait
  script.textContent = byId("plotly-js").textContent;
  document.head.append(script);
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "300px" });
  const places = document.querySelectorAll(".plot");
  places.forEach((place) => seen.observe(place));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    places.forEach((place) => { if (place.data) draw(place); });
    if (byId("token-view")) showTokens();
  });
  document.body.dataset.curves = "ready";
}

/* ---- answers: DataTables sorts, searches and turns the pages ---- */
async function showAnswers() {
  const sheet = document.createElement("style");
  sheet.textContent = atob(byId("tables-css").textContent);
  document.head.prepend(sheet);
  const bytes = Uint8Array.from(atob(byId("tables-js").textContent), (c) => c.charCodeAt(0));
  const url = URL.createObjectURL(new Blob([bytes], { type: "text/javascript" }));
  const { default: DataTable } = await import(url);
  for (const row of data.answers) for (const name of data.text_columns) row[name] = data.texts[row[name]];
  const escaped = DataTable.render.text();
  const several = new Set(data.answers.map((row) => row.run)).size > 1;
  const titles = { ...(several ? { run: "run" } : {}), step: "step", what: "now", prompt: "prompt", gold: "gold",
    before: "answer before", now: "answer now", score_before: "score before", score: "score now" };
  const columns = Object.entries(titles).map(([name, title]) => ({
    data: name, title, render: escaped, createdCell: (cell) => cell.setAttribute("data-label", title),
  }));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const mode = () => document.documentElement.classList.toggle("dark", dark.matches);
  mode(); dark.addEventListener("change", mode);
  new DataTable("#answer-table", { data: data.answers, columns, deferRender: true, pageLength: 10, order: [],
    autoWidth: false, lengthMenu: [10, 25, 100] });
  document.body.dataset.answers = "ready";
}
const answersShown = byId("answer-table") ? showAnswers() : Promise.resolve();
if (byId("plotly-js")) answersShown.finally(() => setTimeout(showCurves));

/* ---- tokens ---- */
const short = (value) =>
  typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(4))) : String(value);
const shownText = (text) => text === "" ? "∅" : text.replace(/\n/g, "⏎");
let chosen = 0;

let samples = [];  // of the rollout that is shown
function currentSample() { return samples[Number(byId("token-sample").value)]; }
function numbersOf(token) {
  const found = {};
  data.token_numbers.forEach((name, i) => { found[name] = token[i + 1]; });
  for (const update of token[data.token_numbers.length + 1]) {
    const own = Object.fromEntries(data.update_numbers.map((name, i) => [name, update[i]]));
    for (const name of data.update_numbers.slice(2)) found[`${name}, epoch ${own.epoch}`] = own[name];
    found.ratio = own.ratio;
  }
  return found;
}
function pairs(entries) {
  return entries.map(([name, value]) => {
    const pair = document.createElement("div"), term = document.createElement("dt"), told = document.createElement("dd");
    term.textContent = name.replaceAll("_", " ");
    told.textContent = short(value ?? "unknown");
    pair.append(term, told);
    return pair;
  });
}
function option(value, text) {
  const made = document.createElement("option");
  made.value = value; made.textContent = text;
  return made;
}
function fillSamples() {
  samples = JSON.parse(byId(`trail-${byId("token-trail").value}`).textContent);
  const facts = Object.fromEntries(data.sample_facts.map((name, i) => [name, i]));
  byId("token-sample").replaceChildren(...samples.map((sample, i) => {
    const fact = (name) => sample.facts[facts[name]];
    const gold = fact("gold") === null ? "" : ` (gold ${fact("gold")})`;
    return option(i, `${i}: ${fact("label") ?? "no label"}${gold}, score ${short(fact("score"))}`);
  }));
  showSample();
}
function showSample() {
  chosen = 0;
  const sample = currentSample();
  const shown = data.sample_facts.map((name, i) => [name, sample.facts[i]])
    .filter(([name, value]) => value !== null && !(name === "rule" && value === "none"));
  byId("token-facts").replaceChildren(...pairs(shown));
  showTokens();
}
function showTokens() {
  const by = document.querySelector('input[name="colour"]:checked').value;
  const tokens = currentSample().tokens, all = tokens.map(numbersOf);
  const middle = by === "ratio" ? 1 : 0;
  const far = Math.max(1e-9, ...all.map((own) => Math.abs((own[by] ?? middle) - middle)));
  byId("token-scale").textContent =
    `Blue: below ${middle}, orange: above. The strongest colour is ${short(far)} away from ${middle}.`;
  byId("token-view").replaceChildren(...tokens.map((token, i) => {
    const made = document.createElement("button"), value = all[i][by];
    made.type = "button";
    made.textContent = shownText(token[0]);
    made.tabIndex = i === chosen ? 0 : -1;
    made.setAttribute("aria-pressed", i === chosen);
    made.setAttribute("aria-label", `token ${i}, ${JSON.stringify(token[0])}, ${by.replaceAll("_", " ")} ${short(value ?? "unknown")}`);
    made.title = `${by.replaceAll("_", " ")} ${short(value ?? "unknown")}`;
    const strength = 0.6 * Math.min(1, Math.abs((value ?? middle) - middle) / far);
    made.style.backgroundColor = `rgba(${css((value ?? middle) < middle ? "--low" : "--high")}, ${strength})`;
    for (const event of ["focus", "pointerenter", "click"]) made.addEventListener(event, () => choose(i, event === "click"));
    return made;
  }));
  choose(chosen, false);
}
function choose(i, focus) {
  const buttons = byId("token-view").children;
  if (!buttons.length) return;
  for (const [at, value] of [[chosen, false], [i, true]]) {
    buttons[at].setAttribute("aria-pressed", value);
    buttons[at].tabIndex = value ? 0 : -1;
  }
  chosen = i;
  if (focus) buttons[i].focus();
  const token = currentSample().tokens[i];
  const shown = Object.entries({ token: `${i}: ${JSON.stringify(token[0])}`, ...numbersOf(token) });
  byId("token-numbers").replaceChildren(...pairs(shown.filter(([name]) => name !== "ratio")));
}
function turn(by) {
  const select = byId("token-sample"), count = select.options.length;
  select.value = (Number(select.value) + by + count) % count;
  showSample();
}
if (byId("token-view")) {
  const several = new Set(data.trails.map((trail) => trail.run)).size > 1;
  byId("token-trail").replaceChildren(...data.trails.map((trail, i) => option(i, `${several ? `${trail.run}, ` : ""}step ${trail.step}`)));
  byId("token-trail").addEventListener("change", fillSamples);
  byId("token-sample").addEventListener("change", showSample);
  byId("token-before").addEventListener("click", () => turn(-1));
  byId("token-after").addEventListener("click", () => turn(1));
  document.querySelectorAll('input[name="colour"]').forEach((input) => input.addEventListener("change", showTokens));
  byId("token-form").addEventListener("submit", (event) => event.preventDefault());
  byId("token-view").addEventListener("keydown", (event) => {
    const count = byId("token-view").children.length;
    const to = { ArrowRight: chosen + 1, ArrowLeft: chosen - 1, Home: 0, End: count - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(Math.min(count - 1, Math.max(0, to)), true);
  });
  fillSamples();
}
document.body.dataset.page = "ready";
