"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);

// ---- elements: text is only ever set as text

function fill(node, children) {
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) node.append(child);
  return node;
}
function h(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  return fill(node, children);
}
function s(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  return fill(node, children);
}

// names may be broken where they have an underscore
const breakable = text => text.split(/(?<=_)/).flatMap((part, index) => index ? [h("wbr"), part] : [part]);

// ---- words and numbers

const WORDS = {
  image_auroc: "image AUROC", image_ap: "image AP", image_f1_max: "image F1 max", pixel_auroc: "pixel AUROC", pixel_ap: "pixel AP", aupro: "AUPRO",
  image_recall: "defects found", image_false_alarm_rate: "false alarms",
  fit_seconds: "fit s", test_seconds: "test s", image_seconds: "ms per image", peak_memory_mb: "memory MB",
  image_roc: "ROC of images", pixel_roc: "ROC of pixels", pixel_pro: "PRO", image_pr: "precision-recall of images", pixel_pr: "precision-recall of pixels",
};
const words = name => WORDS[name] || name.replaceAll("_", " ");
const listed = new Intl.Collator("en", { numeric: true });
const count = (n, one) => `${n} ${one}${n === 1 ? "" : /(ss|x|ch|sh)$/.test(one) ? "es" : "s"}`;
const base = path => path === null || path === undefined ? "" : String(path).split("/").pop();
const category = value => value === null || value === undefined ? "whole set" : String(value);
const unit = value => value === null || value === undefined ? "image" : String(value);
const pixels = setting => (setting.image_size === null ? "–" : `${setting.image_size}${setting.crop ? ` → ${setting.crop}` : ""}`)
  + (setting.tiling ? `, tiles of ${setting.tiling}` : "");
const network = setting => setting.backbone === null ? "–" : `${setting.backbone}${setting.weights ? ` (${base(setting.weights)})` : ""}`;
const drawn = of => of.epoch_size === null ? "" : ` of ${of.epoch_size}`;
const epochs = setting => setting.epochs === null ? "–" : String(setting.epochs) + drawn(setting);

function cost(name, value) {
  if (value === null) return "–";
  if (name === "image_seconds") value *= 1000;
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}
const figure = value => value === null || value === undefined ? "–" : value.toFixed(3);
function value(setting, name) { return setting.values[name][0]; }
function shown(setting, name) {
  const [mean, deviation] = setting.values[name];
  if (data.costs.includes(name)) return cost(name, mean);
  return figure(mean) + (deviation === null ? "" : ` ± ${deviation.toFixed(3)}`);
}

// names for settings that are shown together: the method, and what tells it from its namesakes
const PARTS = [
  of => of.variant, of => of.epochs === null ? null : count(of.epochs, "epoch") + drawn(of), of => of.backbone, of => base(of.weights) || null,
  of => of.image_size === null ? null : `${of.image_size} px`, of => of.crop === null ? null : `crop ${of.crop}`,
  of => of.tiling === null ? null : `tiles of ${of.tiling}`, of => of.resize, of => of.roi === null ? null : "roi",
];
function names(settings) {
  const found = new Map();
  const methods = new Map();
  for (const of of settings) methods.set(of.method, [...(methods.get(of.method) || []), of]);
  for (const [method, alike] of methods) {
    const telling = PARTS.filter(part => new Set(alike.map(part)).size > 1);
    for (const of of alike) found.set(of, [method ?? "?", ...telling.map(part => part(of)).filter(text => text !== null)].join(" · "));
  }
  return found;
}

// ---- filters

const state = { text: "", dataset: "", category: "", protocol: "", unit: "", metric: data.figures[0], group: null, curve: null, list: "disputed", time: "image_seconds" };
const FILTERS = ["dataset", "category", "protocol", "unit"];
const tell = { dataset: of => String(of.dataset ?? "–"), category: of => category(of.category), protocol: of => String(of.protocol ?? "–"), unit: of => unit(of.unit) };
const haystack = of => [of.method, of.variant, of.backbone, base(of.weights), of.dataset, category(of.category), of.protocol, `${of.image_size} px`]
  .filter(part => part !== null && part !== undefined).join(" ").toLowerCase();
for (const setting of [...data.settings, ...data.means]) {
  setting.hay = haystack(setting) + " " + (setting.runs || []).map(run => data.runs[run].name.toLowerCase()).join(" ");
}
data.means.forEach((mean, index) => { mean.id = `m${index}`; });
const byId = new Map([...data.settings, ...data.means].map(setting => [String(setting.id), setting]));

function passes(of, hay) {
  return FILTERS.every(name => !state[name] || tell[name](of) === state[name]) && state.text.split(/\s+/).every(word => hay.includes(word));
}
const visible = setting => setting.parts ? !state.category && passes({ ...setting, category: null }, setting.hay) : passes(setting, setting.hay);

// groups of settings that may be ranked together: means over categories first, then each category
const groups = [];
for (const note of data.notes) {
  if (!note.full_pass) continue;
  const settings = data.means.filter(of => of.dataset === note.dataset && of.unit === note.unit && of.protocol === note.protocol);
  groups.push({ ...note, key: `m${groups.length}`, mean: true, all: settings });
}
for (const group of data.groups) groups.push({ ...group, key: `g${group.id}`, mean: false, all: group.settings.map(id => byId.get(String(id))) });
groups.sort((a, b) => listed.compare(tell.dataset(a), tell.dataset(b)) || b.mean - a.mean || listed.compare(category(a.category), category(b.category)) ||
  listed.compare(tell.protocol(a), tell.protocol(b)) || listed.compare(tell.unit(a), tell.unit(b)));
const many = new Set(data.groups.map(tell.unit)).size > 1;
for (const group of groups) {
  const middle = group.mean ? `mean of ${group.categories} categories` : category(group.category);
  group.title = [tell.dataset(group), middle, ...(many || tell.unit(group) !== "image" ? [`${tell.unit(group)}s`] : []), `protocol ${tell.protocol(group)}`].join(" · ");
}

// ---- small parts of the page

function select(label, options, chosen, change) {
  const box = h("select", { "aria-label": label, onchange: event => change(event.target.value) });
  for (const [key, text] of options) box.append(h("option", { value: key, selected: key === chosen }, text));
  box.value = chosen;
  return h("label", {}, h("span", {}, label), box);
}
function radios(name, label, options, chosen, change) {
  return h("fieldset", { class: "inline", "aria-label": label }, options.map(([key, text]) =>
    h("label", {}, h("input", { type: "radio", name, value: key, checked: key === chosen, onchange: () => change(key) }), h("span", {}, text))));
}
function heading(text, label, numeric, sort) {
  return h("th", { scope: "col", class: numeric ? "number" : null, "aria-sort": "none" }, h("button", { type: "button", "aria-label": label, onclick: sort }, text));
}
function mark(headings, chosen, direction) {
  headings.forEach((cell, index) => cell.setAttribute("aria-sort", index !== chosen ? "none" : direction > 0 ? "ascending" : "descending"));
}
// missing values come last in either direction
function compare(a, b, direction) {
  const gone = value => value === null || value === undefined || value === "–";
  if (gone(a) || gone(b)) return gone(a) - gone(b);
  return direction * (typeof a === "number" && typeof b === "number" ? a - b : listed.compare(String(a), String(b)));
}

// ---- head of the page

const finished = data.runs.filter(run => run.record.status === "finished").length;
$("about").textContent = `${count(finished, "finished run")} of ${count(data.runs.length, "run")} below ${data.folder}, ` +
  `${count(data.settings.length, "setting")}, made ${data.made.replace("T", " ").replace("+00:00", " UTC")}.`;
const warnings = [];
if (finished < data.runs.length) {
  const states = {};
  for (const run of data.runs) if (run.record.status !== "finished") states[run.record.status] = (states[run.record.status] || 0) + 1;
  const listing = Object.entries(states).map(([status, n]) => `${n} ${status === "running" ? "running or killed" : status}`).join(", ");
  warnings.push(h("p", {}, `${count(data.runs.length - finished, "run")} did not finish (${listing}) and are not part of any figure: `, h("a", { href: "#runs" }, "see the runs"), "."));
}
const counted = new Set(data.settings.flatMap(setting => setting.runs));
const replaced = data.runs.filter((run, index) => run.record.status === "finished" && !counted.has(index)).length;
if (replaced) warnings.push(h("p", {}, `${count(replaced, "run")} of a setting and seed that was run again: the later run counts.`));
if (data.left_out.images) {
  warnings.push(h("p", {}, `${data.left_out.images} of ${count(data.left_out.of, "image")} of the galleries are not on this page, to keep its size within max_mb.`));
}
if (data.left_out.unread) warnings.push(h("p", {}, `${count(data.left_out.unread, "picture")} of the runs could not be read.`));
fill($("warnings"), warnings).hidden = !warnings.length;

function choices(name) {
  const found = new Set([...data.settings, ...data.runs.map(run => run.record).filter(record => record.method)].map(tell[name]));
  return [...found].sort(listed.compare);
}
const boxes = {};
for (const name of FILTERS) {
  const options = choices(name);
  if (options.length < 2) continue;
  const label = select(name, [["", `all (${options.length})`], ...options.map(option => [option, option])], "", chosen => { state[name] = chosen; apply(); });
  boxes[name] = label.querySelector("select");
  $("selects").append(label);
}
const clear = h("button", { type: "button", id: "clear", onclick: () => {
  for (const name of FILTERS) { state[name] = ""; if (boxes[name]) boxes[name].value = ""; }
  state.text = $("text").value = "";
  apply();
} }, "Clear");
$("selects").append(clear);
$("filters").hidden = !Object.keys(boxes).length;
$("filters").open = matchMedia("(min-width: 761px)").matches;
matchMedia("(min-width: 761px)").addEventListener("change", event => { $("filters").open = event.matches; });
$("text").addEventListener("input", event => { state.text = event.target.value.trim().toLowerCase(); apply(); });

// ---- leaderboard

// heading, what to sort by, what to show, figure or cost
const ALL_COLUMNS = [
  ["Method", of => `${of.method} ${of.variant || ""}`, null, null],
  ...[...data.decisions, ...data.figures, ...data.costs].map(name => [words(name), of => value(of, name), of => shown(of, name), name]),
  ["Seeds", of => of.seeds.length, of => of.seeds.join(", "), null], ["Protocol", tell.protocol, tell.protocol, null], ["Variant", of => of.variant, of => of.variant ?? "–", null],
  ["Epochs", of => of.epochs, epochs, null], ["Pixels", of => of.image_size, pixels, null], ["Backbone", network, network, null],
];
// columns with the same text in every row are printed once, above the table
const same = column => column[3] === null && column[2] !== null && column[0] !== "Seeds" && new Set([...data.settings, ...data.means].map(column[2])).size === 1;
const COLUMNS = ALL_COLUMNS.filter(column => !data.settings.length || !same(column));
const NUMERIC = index => COLUMNS[index][3] !== null || ["Epochs", "Pixels"].includes(COLUMNS[index][0]);
const order = { column: COLUMNS.findIndex(column => column[3] === data.figures[0]), direction: -1 };
const sections = [];

function sortBoard(column) {
  const name = COLUMNS[column][3];
  order.direction = order.column === column ? -order.direction : [...data.figures, "image_recall"].includes(name) || COLUMNS[column][0] === "Seeds" ? -1 : 1;
  order.column = column;
  arrange();
}
function arrange() {
  const [, key] = COLUMNS[order.column];
  mark([...$("board").tHead.rows[0].cells], order.column, order.direction);
  for (const section of sections) {
    const before = section.rows;
    section.rows = before.toSorted((a, b) => compare(key(a.setting), key(b.setting), order.direction) || listed.compare(a.setting.method, b.setting.method));
    if (section.rows.some((row, index) => row !== before[index])) section.body.append(...section.rows.map(row => row.node));
  }
  number();
}
// fix the natural widths of the columns, so that the browser need not measure every cell again after each sort
function settle() {
  const table = $("board"), cells = [...table.tHead.rows[0].cells];
  table.style.tableLayout = table.style.width = "";
  for (const cell of cells) cell.style.width = "";
  const widths = cells.map(cell => cell.getBoundingClientRect().width);
  cells.forEach((cell, index) => { cell.style.width = `${widths[index]}px`; });
  table.style.width = `${widths.reduce((a, b) => a + b)}px`;
  table.style.tableLayout = "fixed";
}
function number() {
  for (const section of sections) {
    let rank = 0;
    for (const row of section.rows) if (!row.node.hidden) row.rank.textContent = `${++rank}`;
  }
}
// ties at the digits that are shown share the star
function bests(settings, name) {
  const known = settings.map(of => value(of, name)).filter(of => of !== null);
  if (new Set(known).size < 2) return null;
  const low = data.costs.includes(name);
  const best = (low ? Math.min : Math.max)(...known);
  return low ? cost(name, best) : figure(best);
}
function board() {
  const shared = ALL_COLUMNS.filter(column => !COLUMNS.includes(column)).map(column => [column[0].toLowerCase(), column[2](data.settings[0])]).filter(([, text]) => text !== "–");
  if (shared.length) $("shared").textContent = `The same in all: ${shared.map(([name, text]) => `${name} ${text}`).join(", ")}.`;
  $("board").append(
    h("caption", { hidden: true }, "Leaderboard"),
    h("thead", {}, h("tr", {}, COLUMNS.map(([text, , , name], index) => {
      const cell = heading(text.length > 8 ? text.replace(/ (?=\S+$)/, "\n") : text, `Sort by ${text}`, NUMERIC(index), () => sortBoard(index));
      if (index === 0) cell.classList.add("first");
      return cell;
    }))));
  for (const group of groups) {
    const best = Object.fromEntries([...data.figures, ...data.costs].map(name => [name, bests(group.all, name)]));
    const label = names(group.all);
    const rows = group.all.map(setting => boardRow(setting, best, label.get(setting)));
    const head = h("tr", { class: "group" }, h("th", { colspan: COLUMNS.length, scope: "rowgroup" }, h("span", {}, group.title, " ", h("small", {}, remarks(group)))));
    const body = h("tbody", {}, head, rows.map(row => row.node));
    sections.push({ group, rows, body, head });
    $("board").append(body);
  }
}
function boardRow(setting, best, label) {
  const rank = h("span", { class: "rank" });
  const [method, ...telling] = label.split(" · ");
  const first = h("th", { scope: "row", class: "first" }, rank, h("b", {}, breakable(method)), telling.length ? h("small", {}, breakable(telling.join(" · "))) : null);
  const cells = COLUMNS.slice(1).map(([, , text, name], index) => {
    const [mean, deviation] = text(setting).split(" ± ");
    const top = name !== null && best[name] === mean && mean !== "–";
    return h("td", { class: [NUMERIC(index + 1) ? "number" : "", top ? "best" : ""].join(" ").trim() || null },
      top ? h("span", { title: "best of this group", role: "img", "aria-label": "best" }, "★") : null, mean, deviation ? h("small", {}, ` ± ${deviation}`) : null);
  });
  return { setting, rank, node: h("tr", { "data-setting": setting.id }, first, cells) };
}
function remarks(group) {
  const described = [count(group.all.length, "setting")];
  if (group.mean && group.partial) described.push(`${count(group.partial, "other")} without every category not shown here`);
  if (group.test_sets > 1) described.push(`${group.test_sets} different sets of test images: their figures are not of the same images`);
  if (group.truths && group.truths.length > 1) described.push(`truth: ${group.truths.join("; ")}`);
  return described.join(" · ");
}

// ---- the groups that a section can show, and the one that it shows

function open(accepts) {
  return groups.filter(group => accepts(group) && group.all.some(visible));
}
function chosen(accepts) {
  const possible = open(accepts);
  return possible.find(group => group.key === state.group) || possible.reduce((a, b) => b.all.length > a?.all.length || !a ? b : a, null);
}
function groupSelect(accepts) {
  const current = chosen(accepts);
  return current === null ? null : select("data", open(accepts).map(group => [group.key, group.title]), current.key, key => {
    state.group = key;
    drawCost(); drawCurves(); drawGallery();
  });
}
const metricSelect = redraw => select("figure", data.figures.map(name => [name, words(name)]), state.metric, name => { state.metric = name; redraw(); });

// ---- matrix of methods and categories

const heatOrder = { column: -1, direction: -1 };
function drawMatrix() {
  const sets = new Map();
  for (const setting of data.settings.filter(visible)) {
    const key = `${tell.protocol(setting)} · ${tell.unit(setting)}s`;
    sets.set(key, [...(sets.get(key) || []), setting]);
  }
  if (!sets.has(state.set)) state.set = [...sets.keys()].sort((a, b) => sets.get(b).length - sets.get(a).length)[0];
  $("matrix-controls").replaceChildren(metricSelect(() => { drawMatrix(); drawCost(); }),
    ...(sets.size > 1 ? [select("protocol and unit", [...sets].map(([key, of]) => [key, `${key} (${of.length})`]), state.set, key => { state.set = key; drawMatrix(); })] : []));
  $("heat").replaceChildren();
  if (!sets.size) { $("matrix-note").textContent = "Nothing passes the filters."; return; }

  const settings = sets.get(state.set);
  const columns = [...new Map(settings.map(of => [`${tell.dataset(of)} ${category(of.category)}`, of])).entries()].sort((a, b) => listed.compare(a[0], b[0]));
  const single = new Set(columns.map(([, of]) => of.dataset)).size === 1;
  const lines = new Map();
  for (const of of settings) {
    const key = JSON.stringify(data.setting.filter(name => !["dataset", "category", "unit", "protocol"].includes(name)).map(name => of[name]));
    if (!lines.has(key)) lines.set(key, { setting: of, cells: new Map() });
    lines.get(key).cells.set(`${tell.dataset(of)} ${category(of.category)}`, value(of, state.metric));
  }
  const rows = [...lines.values()];
  const label = names(rows.map(row => row.setting));
  const known = row => columns.map(([key]) => row.cells.get(key) ?? null);
  for (const row of rows) row.values = known(row);
  const measured = rows.filter(row => row.values.some(of => of !== null));
  const common = columns.map((_, index) => index).filter(index => measured.every(row => row.values[index] !== null));
  const withMean = common.length > 1;
  for (const row of rows) row.mean = withMean && measured.includes(row) ? common.reduce((sum, index) => sum + row.values[index], 0) / common.length : null;
  const column = heatOrder.column < columns.length ? heatOrder.column : -1;
  const key = row => column === -2 ? label.get(row.setting) : column === -1 ? row.mean : row.values[column];
  rows.sort((a, b) => compare(key(a), key(b), heatOrder.direction) || listed.compare(label.get(a.setting), label.get(b.setting)));

  const all = measured.flatMap(row => row.values).filter(of => of !== null);
  const low = Math.min(...all), high = Math.max(...all);
  const sortHeat = index => () => {
    heatOrder.direction = heatOrder.column === index ? -heatOrder.direction : index === -2 ? 1 : -1;
    heatOrder.column = index;
    drawMatrix();
    $("heat").tHead.querySelectorAll("button")[index === -2 ? 0 : index === -1 ? columns.length + 1 : index + 1].focus();
  };
  const heads = [heading("Method", "Sort by method", false, sortHeat(-2)),
    ...columns.map(([, of], index) => heading(single ? category(of.category) : `${tell.dataset(of)} ${of.category === null ? "" : of.category}`, `Sort by ${tell.dataset(of)} ${category(of.category)}`, false, sortHeat(index))),
    ...(withMean ? [heading("mean", "Sort by mean", false, sortHeat(-1))] : [])];
  heads[0].classList.add("first");
  mark(heads, column === -2 ? 0 : column === -1 ? columns.length + 1 : column + 1, heatOrder.direction);
  $("heat").classList.toggle("many", columns.length > 5);
  $("heat").append(h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows.map(row => h("tr", {},
    h("th", { scope: "row", class: "first" }, breakable(label.get(row.setting))),
    row.values.map(of => {
      if (of === null) return h("td", { class: "none" }, "–");
      const level = high > low ? (of - low) / (high - low) : 0.5;
      const cell = h("td", { class: level > 0.64 ? "cell strong" : "cell" }, figure(of));
      cell.style.setProperty("--level", level.toFixed(3));
      return cell;
    }),
    withMean ? h("td", { class: "mean" }, figure(row.mean)) : null))));
  const note = $("matrix-note");
  note.replaceChildren(`${words(state.metric)}, mean over seeds. `);
  if (all.length) note.append(`${figure(low)} `, h("span", { class: "ramp" }), ` ${figure(high)}, the darker the higher. `);
  note.append("– where nothing was measured. ");
  const whole = common.length === columns.length ? `all ${columns.length} columns` : `the ${common.length} of ${columns.length} columns that every method shown has`;
  if (withMean) note.append(`The mean is over ${whole}.`);
  else if (columns.length > 1) note.append("No mean: fewer than two columns are measured for every method shown.");
}

// ---- axes

function ticks(low, high, wanted) {
  const step = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5].find(of => (high - low) / of <= wanted) || 0.5;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9; i++) found.push(+(i * step).toFixed(6));
  return found;
}
function frame(host, height, left, bottom, xs, ys, x, y, xTitle, yTitle) {
  const width = host.clientWidth;
  const top = 14, right = 14;
  const at = of => left + of * (width - left - right), up = of => height - bottom - of * (height - bottom - top);
  const node = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const [tick, text] of xs) node.append(s("line", { class: "grid", x1: at(x(tick)), x2: at(x(tick)), y1: up(0), y2: up(1) }), s("text", { class: "tick", x: at(x(tick)), y: up(0) + 16, "text-anchor": "middle" }, text));
  for (const tick of ys) node.append(s("line", { class: "grid", x1: at(0), x2: at(1), y1: up(y(tick)), y2: up(y(tick)) }), s("text", { class: "tick", x: left - 6, y: up(y(tick)) + 4, "text-anchor": "end" }, String(tick)));
  node.append(s("text", { x: at(0.5), y: height - 6, "text-anchor": "middle" }, xTitle),
    s("text", { x: 0, y: 0, "text-anchor": "middle", transform: `translate(12 ${up(0.5)}) rotate(-90)` }, yTitle));
  return { node, x: of => at(x(of)), y: of => up(y(of)), width, height, left, right: width - right, top, base: up(0) };
}

// ---- accuracy against time

const SHAPES = [
  r => `M${-r},0A${r},${r} 0 1 0 ${r},0A${r},${r} 0 1 0 ${-r},0Z`, r => `M${-r},${-r}H${r}V${r}H${-r}Z`, r => `M0,${-1.2 * r}L${1.15 * r},${r}H${-1.15 * r}Z`,
  r => `M0,${1.2 * r}L${1.15 * r},${-r}H${-1.15 * r}Z`, r => `M0,${-1.35 * r}L${1.35 * r},0L0,${1.35 * r}L${-1.35 * r},0Z`,
  r => `M${-r / 2.6},${-1.2 * r}H${r / 2.6}V${-r / 2.6}H${1.2 * r}V${r / 2.6}H${r / 2.6}V${1.2 * r}H${-r / 2.6}V${r / 2.6}H${-1.2 * r}V${-r / 2.6}H${-r / 2.6}Z`,
  r => [...Array(10)].map((_, i) => `${i ? "L" : "M"}${((i % 2 ? 0.55 : 1.4) * r * Math.sin(i * Math.PI / 5)).toFixed(2)},${(-(i % 2 ? 0.55 : 1.4) * r * Math.cos(i * Math.PI / 5)).toFixed(2)}`).join("") + "Z",
  r => [...Array(6)].map((_, i) => `${i ? "L" : "M"}${(1.2 * r * Math.sin(i * Math.PI / 3)).toFixed(2)},${(-1.2 * r * Math.cos(i * Math.PI / 3)).toFixed(2)}`).join("") + "Z",
  r => `M${-1.3 * r},${-r}L0,0L${-1.3 * r},${r}ZM${1.3 * r},${-r}L0,0L${1.3 * r},${r}Z`,
];
// a method keeps its shape and colour all over the page
const methods = [...new Set(data.settings.map(of => of.method))].sort(listed.compare);
const look = method => { const index = methods.indexOf(method); return { shape: SHAPES[index % 9], hollow: Math.floor(index / 9) % 2 === 1, colour: index % 6 }; };
function marker(method, x, y, r) {
  const { shape, hollow, colour } = look(method);
  return s("path", { class: `mark s${colour}${hollow ? " hollow" : ""}`, d: shape(r), transform: `translate(${x} ${y})` });
}
const TIMES = { image_seconds: "test ms per image", test_seconds: "test s", fit_seconds: "fit s", both: "fit + test s" };
function time(setting) {
  const of = name => value(setting, name);
  if (state.time === "both") return of("fit_seconds") === null || of("test_seconds") === null ? null : of("fit_seconds") + of("test_seconds");
  return of(state.time) === null ? null : of(state.time) * (state.time === "image_seconds" ? 1000 : 1);
}
function drawCost() {
  const group = chosen(() => true);
  $("cost-controls").replaceChildren(...[group && groupSelect(() => true), metricSelect(() => { drawMatrix(); drawCost(); }),
    select("time", Object.entries(TIMES), state.time, name => { state.time = name; drawCost(); })].filter(Boolean));
  $("cost-chart").replaceChildren(); $("cost-key").replaceChildren();
  const settings = group ? group.all.filter(visible) : [];
  const points = settings.map(setting => ({ setting, x: time(setting), y: value(setting, state.metric) })).filter(of => of.x > 0 && of.y !== null);
  if (!points.length) { $("cost-note").textContent = "No setting has both this figure and this time."; return; }

  const lx = points.map(of => Math.log10(of.x)), y = points.map(of => of.y);
  let [x0, x1] = [Math.min(...lx), Math.max(...lx)], [y0, y1] = [Math.min(...y), Math.max(...y)];
  [x0, x1] = x1 - x0 < 0.3 ? [x0 - 0.3, x1 + 0.3] : [x0 - 0.08 * (x1 - x0), x1 + 0.14 * (x1 - x0)];
  [y0, y1] = y1 - y0 < 0.01 ? [y0 - 0.01, Math.min(1.005, y1 + 0.01)] : [y0 - 0.08 * (y1 - y0), Math.min(y1 + 0.08 * (y1 - y0), Math.max(1.005, y1))];
  const room = (x1 - x0) / 6;
  const decades = [];
  for (let p = Math.floor(x0); p <= x1; p++) for (const m of room > 0.5 ? [1] : room > 0.25 ? [1, 3] : [1, 2, 5]) {
    const of = Math.log10(m) + p;
    if (of >= x0 && of <= x1) decades.push([10 ** of, String(+(m * 10 ** p).toPrecision(1))]);
  }
  const host = $("cost-chart");
  const chart = frame(host, Math.max(300, Math.min(520, 0.62 * host.clientWidth)), 52, 40, decades, ticks(y0, y1, 7),
    of => (Math.log10(of) - x0) / (x1 - x0), of => (of - y0) / (y1 - y0), `${TIMES[state.time]} (logarithmic) – left is faster`, `${words(state.metric)} – up is better`);
  const front = points.filter(p => !points.some(q => (q.x < p.x && q.y >= p.y) || (q.x <= p.x && q.y > p.y))).sort((a, b) => a.x - b.x);
  let path = "";
  front.forEach((p, index) => { path += index ? `H${chart.x(p.x)}V${chart.y(p.y)}` : `M${chart.x(p.x)},${chart.base}V${chart.y(p.y)}`; });
  chart.node.append(s("path", { class: "front", d: `${path}H${chart.right}` }));
  const label = names(points.map(of => of.setting));
  const taken = points.map(p => [chart.x(p.x) - 7, chart.y(p.y) - 7, chart.x(p.x) + 7, chart.y(p.y) + 7]);
  const marks = s("g"), texts = s("g");
  let unnamed = 0;
  for (const p of [...front, ...points.filter(of => !front.includes(of)).sort((a, b) => b.y - a.y)]) {
    const [px, py] = [chart.x(p.x), chart.y(p.y)];
    const text = (front.includes(p) ? "★ " : "") + label.get(p.setting);
    const node = marker(p.setting.method, px, py, 5.5);
    node.append(s("title", {}, `${label.get(p.setting)}: ${words(state.metric)} ${shown(p.setting, state.metric)}, ${TIMES[state.time]} ${+p.x.toPrecision(3)}`));
    marks.append(node);
    const wide = 6.6 * text.length, places = [[px + 10, py + 4], [px - 10 - wide, py + 4], [px - wide / 2, py - 11], [px - wide / 2, py + 20], [px + 8, py - 9], [px + 8, py + 17], [px - wide - 8, py - 9], [px - wide - 8, py + 17]];
    const free = places.find(([left, line]) => left > chart.left && left + wide < chart.right && line > chart.top + 6 && line < chart.base - 3 &&
      taken.every(([a, b, c, d]) => left > c || left + wide < a || line - 10 > d || line + 3 < b));
    if (!free) { unnamed++; continue; }
    taken.push([free[0], free[1] - 10, free[0] + wide, free[1] + 3]);
    texts.append(s("text", { class: "halo", x: free[0], y: free[1] }, text));
  }
  chart.node.append(marks, texts);
  chart.node.setAttribute("aria-label", `${words(state.metric)} against ${TIMES[state.time]} of ${points.length} settings, listed beside the chart`);
  host.append(chart.node);

  const machines = [...new Set(points.flatMap(of => of.setting.machines))];
  $("cost-key").append(h("div", { class: "row" }, h("span", {}, ""), h("em", {}, `${words(state.metric)} · ${TIMES[state.time]}`)), ...points.sort((a, b) => b.y - a.y).map(p => h("div", { class: "row" },
    s("svg", { width: 20, height: 20, "aria-hidden": "true" }, marker(p.setting.method, 10, 10, 5.5)),
    h("span", {}, (front.includes(p) ? "★ " : "") + label.get(p.setting)),
    machines.length > 1 ? h("em", {}, p.setting.machines.map(of => "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[machines.indexOf(of) % 26]).join("")) : null,
    h("em", {}, `${figure(p.y)} · ${+p.x.toPrecision(3)}`))));
  const missing = settings.length - points.length;
  $("cost-note").textContent = "★ and the dotted line: the front, where nothing is both faster and better. " +
    (machines.length > 1 ? `Times come from different machines and compare only within one: ${machines.map((of, index) => `${"ABCDEFGHIJKLMNOPQRSTUVWXYZ"[index % 26]} ${of}`).join("; ")}. ` : `Measured on ${machines[0]}. `) +
    (group.mean ? "Time is the average over the categories. " : "") + (unnamed ? `${count(unnamed, "point")} without room for a name: see the list. ` : "") +
    (missing ? `${count(missing, "setting")} without this figure or time not shown.` : "");
}

// ---- curves

const DASHES = ["", "7 4", "2 3", "10 3 2 3", "14 4", "5 2 1 2 1 2", "1 4", "9 3 9 3 2 3", "4 4"];
const KINDS = { image_roc: ["image_auroc", "false positive rate", "true positive rate", 1], pixel_roc: ["pixel_auroc", "false positive rate of pixels", "true positive rate of pixels", 1],
  pixel_pro: ["aupro", "false positive rate of pixels", "mean share of a region found", 0.3], image_pr: ["image_ap", "recall", "precision", 1], pixel_pr: ["pixel_ap", "recall of pixels", "precision of pixels", 1] };
const picked = new Map();
function drawCurves() {
  const drawn = setting => setting.runs ? setting.runs.filter(run => data.runs[run].curves[state.curve]) : [];
  const has = group => !group.mean && group.all.some(setting => setting.runs.some(run => Object.keys(data.runs[run].curves).length));
  const group = chosen(has);
  $("curves-controls").replaceChildren(); $("curves-chart").replaceChildren(); $("curves-key").replaceChildren(); $("curves-note").textContent = "";
  if (!group) { $("curves-note").textContent = "No run that passes the filters has curves or scores."; return; }
  const kinds = Object.keys(KINDS).filter(kind => group.all.some(setting => setting.runs.some(run => data.runs[run].curves[kind])));
  if (!kinds.includes(state.curve)) state.curve = kinds[0];
  const [name, xTitle, yTitle, reach] = KINDS[state.curve];
  const curved = state.curve.endsWith("pr") ? [reach] : [reach, 0.3, 0.1, 0.03].filter(of => of <= reach);
  if (!curved.includes(state.reach)) state.reach = curved[0];
  $("curves-controls").append(groupSelect(has), select("curve", kinds.map(kind => [kind, words(kind)]), state.curve, kind => { state.curve = kind; drawCurves(); }));
  const unique = [...new Set(curved)];
  if (unique.length > 1) $("curves-controls").append(select("up to", unique.map(of => [String(of), `rate ${of}`]), String(state.reach), of => { state.reach = +of; drawCurves(); }));

  const settings = group.all.filter(setting => visible(setting) && drawn(setting).length).sort((a, b) => compare(value(a, name), value(b, name), -1));
  const label = names(settings);
  const memory = group.key;
  if (!picked.has(memory)) picked.set(memory, new Set(settings.slice(0, 5)));
  const on = picked.get(memory);
  const lines = settings.filter(setting => on.has(setting));
  const host = $("curves-chart");
  const xMax = state.reach;
  const xs = ticks(0, xMax, host.clientWidth < 420 ? 4 : 6).map(of => [of, String(of)]);
  const chart = frame(host, Math.max(280, Math.min(560, 0.86 * host.clientWidth)), 50, 40, xs, ticks(0, 1, 6), of => of / xMax, of => of, xTitle, yTitle);
  chart.node.append(s("clipPath", { id: "inside" }, s("rect", { x: chart.left, y: chart.top - 2, width: chart.right - chart.left, height: chart.base - chart.top + 4 })));
  if (state.curve.endsWith("roc")) chart.node.append(s("line", { class: "front", x1: chart.x(0), y1: chart.y(0), x2: chart.right, y2: chart.y(xMax) }));
  const strokes = s("g", { "clip-path": "url(#inside)" }), letters = s("g");
  const styles = new Map();
  lines.forEach((setting, index) => {
    const style = { dash: DASHES[index % DASHES.length], colour: index % 6, letter: "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[index % 26] + (index >= 26 ? Math.floor(index / 26) : "") };
    styles.set(setting, style);
    drawn(setting).forEach((run, seed) => {
      const flat = data.runs[run].curves[state.curve];
      const points = [];
      for (let i = 0; i < flat.length; i += 2) points.push([flat[i] / 1000, flat[i + 1] / 1000]);
      strokes.append(s("path", { class: `curve s${style.colour}`, "stroke-dasharray": style.dash, "stroke-opacity": seed ? 0.55 : 1,
        d: points.map(([a, b], i) => `${i ? "L" : "M"}${chart.x(a).toFixed(1)},${chart.y(b).toFixed(1)}`).join("") }));
      if (seed) return;
      const spot = along(points, xMax, (index + 1) / (lines.length + 1), chart);
      letters.append(s("circle", { class: `letter s${style.colour}`, cx: spot[0], cy: spot[1], r: 8.5 }), s("text", { class: `letter s${style.colour}`, x: spot[0], y: spot[1] }, style.letter));
    });
  });
  chart.node.append(strokes, letters);
  chart.node.setAttribute("aria-label", `${words(state.curve)} of ${lines.length} settings, named beside the chart`);
  host.append(chart.node);

  $("curves-key").append(h("legend", { class: "note" }, `${words(name)}; choose what is drawn:`), ...settings.map(setting => {
    const style = styles.get(setting);
    const sample = s("svg", { width: 58, height: 20, "aria-hidden": "true" });
    if (style) sample.append(s("path", { class: `curve s${style.colour}`, "stroke-dasharray": style.dash, d: "M0,10H36" }), s("circle", { class: `letter s${style.colour}`, cx: 47, cy: 10, r: 8.5 }), s("text", { class: `letter s${style.colour}`, x: 47, y: 10 }, style.letter));
    const box = h("input", { type: "checkbox", checked: on.has(setting), "data-setting": setting.id, onchange: event => {
      if (event.target.checked) on.add(setting); else on.delete(setting);
      drawCurves();
      $("curves-key").querySelector(`input[data-setting="${setting.id}"]`).focus();
    } });
    return h("label", { class: "row" }, box, sample, h("span", {}, label.get(setting)), h("em", {}, shown(setting, name)));
  }));
  const without = group.all.filter(visible).length - settings.length;
  $("curves-note").textContent = "A line per seed, the letter on the first. Lines are simplified within the visible resolution; the figures are those of the complete curves. " +
    (without ? `${count(without, "setting")} without this curve${state.curve.startsWith("pixel") ? ": no maps, or a run that left no curves.json" : ""}.` : "");
}
// a point on the polyline: at a share of its length as it is seen, within the axis
function along(points, xMax, share, chart) {
  const seen = points.filter(([x]) => x <= xMax).map(([x, y]) => [chart.x(x), chart.y(y)]);
  const next = points.find(([x]) => x > xMax), last = points[seen.length - 1];
  if (next && last && last[0] < xMax) seen.push([chart.x(xMax), chart.y(last[1] + (next[1] - last[1]) * (xMax - last[0]) / (next[0] - last[0]))]);
  const steps = seen.slice(1).map((p, i) => Math.hypot(p[0] - seen[i][0], p[1] - seen[i][1]));
  let left = share * steps.reduce((a, b) => a + b, 0);
  for (let i = 0; i < steps.length; i++) {
    if (left <= steps[i] && steps[i] > 0) return [0, 1].map(axis => seen[i][axis] + (seen[i + 1][axis] - seen[i][axis]) * left / steps[i]);
    left -= steps[i];
  }
  return seen[seen.length - 1] || [chart.left, chart.base];
}

// ---- gallery

const LISTS = { disputed: "most disputed", worst: "worst", best: "best" };
const percent = share => `${(100 * share).toFixed(share > 0.995 && share < 1 || share < 0.005 && share > 0 ? 1 : 0)} %`;
const kindOf = image => image.label === 1 ? `${image.defect} (anomalous)` : "normal";
function drawGallery() {
  const galleryOf = group => data.galleries.find(of => of.group === group.id);
  const has = group => !group.mean && galleryOf(group).images.length > 0;
  const group = chosen(has);
  $("gallery-controls").replaceChildren(); $("cards").replaceChildren();
  if (!group) { $("gallery-note").textContent = "No run that passes the filters has pictures here."; return; }
  const gallery = galleryOf(group);
  const kind = [state.list, ...Object.keys(LISTS)].find(key => gallery.lists[key].length) || state.list;
  $("gallery-controls").append(groupSelect(has), radios("list", "Which images", Object.entries(LISTS).map(([key, text]) => [key, `${text} (${gallery.lists[key].length})`]), kind, key => {
    state.list = key; drawGallery(); document.querySelector(`input[name="list"][value="${key}"]`).focus();
  }));
  $("gallery-note").textContent = "The place of an anomalous image is the share of the normal test images with a lower score; of a normal image, the share of the anomalous ones with a higher; " +
    "averaged over the images it is the AUROC. " + { disputed: "Disputed: the largest standard deviation of the place over the settings.", worst: "Worst: the lowest mean place over the settings; ties go to the lower rank among all images.",
      best: "Best: the highest mean place over the settings; ties go to the higher rank among all images." }[kind] +
    ` Chosen among the ${count(gallery.drawn, "image")}, of ${gallery.tested} tested, that at least half of the ${count(gallery.drawing, "setting")} with pictures drew; all settings of the group count, filtered or not.`;
  const list = gallery.lists[kind].map(index => gallery.images[index]);
  $("cards").append(...list.map((image, index) => {
    const panel = image.panels.image;
    return h("li", {}, h("button", { type: "button", onclick: () => show(group, list, index) },
      panel ? h("img", { src: data.media[panel.input], alt: "", loading: "lazy" }) : null,
      h("b", {}, kindOf(image)), h("small", {}, `place ${percent(image.mean)} ± ${percent(image.spread)}`), h("small", {}, image.key)));
  }));
  if (!list.length) $("cards").append(h("li", {}, "No image: the settings agree on all, or there was no room on this page."));
}

const viewer = { list: [], index: 0, group: null, panel: "overlay" };
function show(group, list, index) {
  Object.assign(viewer, { group, list, index });
  drawViewer();
  if (!$("viewer").open) $("viewer").showModal();
  $("viewer").scrollTop = 0;
}
function drawViewer() {
  const image = viewer.list[viewer.index];
  $("viewer-title").textContent = image.key;
  $("viewer-about").textContent = `${kindOf(image)} · ${viewer.group.title} · mean place ${percent(image.mean)}, standard deviation ${percent(image.spread)} over ${count(Object.keys(image.cells).length, "setting")}` +
    " · colours span each run's own scale; lines: cyan around alarms, dashed around the truth";
  $("viewer-controls").replaceChildren(radios("panel", "What is shown of each method", [["overlay", "overlay"], ["map", "map alone"]], viewer.panel, key => {
    viewer.panel = key; drawViewer(); document.querySelector(`input[name="panel"][value="${key}"]`).focus();
  }));
  const settings = viewer.group.all.filter(setting => image.cells[setting.id]);
  const label = names(settings);
  settings.sort((a, b) => compare(image.cells[a.id].place, image.cells[b.id].place, -1) || listed.compare(label.get(a), label.get(b)));
  const drawn = settings.filter(setting => image.panels[setting.id]), without = settings.filter(setting => !image.panels[setting.id]);
  const shared = image.panels.image || {};
  const strips = drawn.some(setting => image.panels[setting.id].strip);
  $("panels").classList.toggle("strips", strips);
  $("panels").replaceChildren(
    ...["input", "truth"].filter(name => shared[name]).map(name => h("figure", {}, h("img", { src: data.media[shared[name]], alt: name === "input" ? "the image" : "the true defects" }), h("figcaption", {}, h("b", {}, name === "input" ? "input" : "ground truth")))),
    ...drawn.map(setting => {
      const panels = image.panels[setting.id], uri = data.media[panels.strip || panels[viewer.panel]];
      const picture = uri ? h("img", { src: uri, alt: `${viewer.panel} of ${label.get(setting)}` }) : h("div", { class: "absent" }, "no map");
      return h("figure", {}, uri && image.regions?.[setting.id] ? regions(picture, image.regions[setting.id]) : picture, described(setting, image, label));
    }),
    ...without.map(setting => h("figure", { class: "without" }, described(setting, image, label))));
  $("viewer-without").hidden = !without.length;
  $("viewer-without").textContent = `${count(without.length, "setting")} drew no picture of this image, and come${without.length === 1 ? "s" : ""} last.`;
  $("previous").disabled = viewer.index === 0;
  $("next").disabled = viewer.index === viewer.list.length - 1;
}
// how many regions of a map are above a threshold, chosen after looking, and how many of them a normal image may have
function regions(picture, { steps, drift }) {
  const boxes = s("svg", { viewBox: "0 0 1000 1000", preserveAspectRatio: "none", "aria-hidden": "true" });
  const said = h("output", { "aria-live": "polite" });
  const tell = at => {
    const [threshold, bound, found] = steps[at];
    boxes.replaceChildren(...found.map(([x, y, width, height]) => s("rect", { x, y, width, height })));
    said.textContent = `map above ${threshold}: ${count(found.length, "region")}, ` + (drift ? "nothing promised of them" : bound === null ? "no bound on the false ones" : `at most ${Math.min(bound, found.length)} false`);
  };
  const slider = h("input", { type: "range", min: 0, max: steps.length - 1, value: 0, "aria-label": "threshold of the map", oninput: event => tell(+event.target.value), onkeydown: event => event.stopPropagation() });
  tell(0);
  return [h("div", { class: "regions" }, picture, boxes), h("label", { class: "slider" }, h("span", {}, "high"), slider, h("span", {}, "low")), h("p", {}, said), drifted(drift)];
}
function described(setting, image, label) {
  const cell = image.cells[setting.id], right = cell.alarm === (image.label === 1);
  const decision = cell.alarm === null ? "" : right ? ` · ✓ ${cell.alarm ? "alarm" : "passed"}` : ` · ✗ ${cell.alarm ? "false alarm" : "missed"}`;
  return h("figcaption", {}, h("b", {}, label.get(setting)),
    `${image.label === 1 ? "above" : "below"} ${percent(cell.place)} of the ${image.label === 1 ? "normal" : "anomalous"} images`,
    h("small", {}, `score ${cell.score}${cell.threshold === null ? "" : `, threshold ${cell.threshold}`}${decision}${setting.seeds.length > 1 ? ` · seed ${cell.seed}` : ""}`));
}
function turn(step) {
  const index = viewer.index + step;
  if (index < 0 || index >= viewer.list.length) return;
  viewer.index = index;
  drawViewer();
}
$("close").addEventListener("click", () => $("viewer").close());
$("previous").addEventListener("click", () => turn(-1));
$("next").addEventListener("click", () => turn(1));
$("viewer").addEventListener("click", event => { if (event.target === $("viewer")) $("viewer").close(); });
$("viewer").addEventListener("keydown", event => {
  if (event.target.type === "radio" || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  event.preventDefault();
  turn(event.key === "ArrowLeft" ? -1 : 1);
});

// ---- records

const records = data.runs.map(run => {
  const record = run.record, good = record.status === "finished";
  const title = record.method ? `${record.method}${record.variant ? ` · ${record.variant}` : ""} · ${tell.dataset(record)} · ${category(record.category)} · seed ${record.seed ?? "?"} · ${tell.protocol(record)}` : run.name;
  const summary = h("summary", {}, good ? null : h("span", { class: "status" }, `${String(record.status).toUpperCase()}${record.status === "running" ? " or killed:" : ":"} `), title, " ", h("small", {}, `${record.started ? String(record.started).slice(0, 16).replace("T", " ") : ""} ${run.name}`));
  const node = h("details", { ontoggle: () => { if (node.open && !node.querySelector(".body")) node.append(body(run)); } }, summary);
  return { run, node, hay: `${haystack(record)} ${record.status} ${run.name}`.toLowerCase() };
});
const shelves = new Map();
for (const of of records) {
  const key = of.run.record.status === "finished" ? String(of.run.record.method ?? "?") : "";
  shelves.set(key, [...(shelves.get(key) || []), of]);
}
for (const [method, own] of [...shelves].sort((a, b) => listed.compare(a[0], b[0]))) {
  // unfinished runs are listed openly, all others under their method
  const node = method === "" ? h("div") : h("details", { class: "shelf" }, h("summary", {}, h("b", {}, method), ` – ${count(own.length, "finished run")}`));
  node.append(...own.map(of => of.node));
  shelves.set(method, { node, own });
  $("records").append(node);
}

function flat(value, path, into) {
  if (value !== null && typeof value === "object" && !Array.isArray(value)) for (const [name, part] of Object.entries(value)) flat(part, path ? `${path} ${name}` : name, into);
  else into.push([path, value === null || value === undefined ? "–" : typeof value === "number" && !Number.isInteger(value) ? String(+value.toPrecision(6)) : Array.isArray(value) ? JSON.stringify(value) : String(value)]);
  return into;
}
function body(run) {
  const { environment, ...record } = run.record, { defects, ...metrics } = run.metrics;
  const pairs = value => h("dl", {}, flat(value, "", []).map(([name, text]) => [h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, text)]));
  const parts = [h("div", {}, h("h4", {}, "Record"), pairs({ folder: run.name, ...record }))];
  if (Object.keys(metrics).length) parts.push(h("div", {}, h("h4", {}, "Figures"), pairs(metrics)));
  if (defects && typeof defects === "object" && Object.keys(defects).length) {
    const columns = ["images", ...data.figures];
    parts.push(h("div", {}, h("h4", {}, "By defect type"), h("div", { class: "box", tabindex: "0" }, h("table", {},
      h("thead", {}, h("tr", {}, ["defect", ...columns].map((name, index) => h("th", { scope: "col", class: index ? "number" : null }, words(name))))),
      h("tbody", {}, Object.entries(defects).map(([name, row]) => h("tr", {}, h("th", { scope: "row" }, name), columns.map(column => h("td", { class: "number" },
        row === null || typeof row?.[column] !== "number" ? "–" : column === "images" ? String(row[column]) : figure(row[column]))))))))));
  }
  if (run.certificate) parts.push(certificate(run.certificate, record.calibration));
  if (environment) parts.push(h("div", {}, h("h4", {}, "Machine and versions"), pairs(environment)));
  if (run.config.length) parts.push(h("div", {}, h("h4", {}, "Config"), h("pre", { tabindex: "0" }, run.config.map(line => data.lines[line]).join("\n"))));
  return h("div", { class: "body" }, parts);
}

// what any threshold says of the test images, chosen after looking
function certificate(of, calibration) {
  const last = of.steps.length - 1, own = of.steps.findLastIndex(([score]) => score > calibration.value);
  const said = h("output", { "aria-live": "polite" });
  const tell = at => {
    const [score, alarms, bound, real] = of.steps[at];
    said.textContent = `threshold ${score}: ${count(alarms, "alarm")} of ${count(of.images, "image")}, of these at most ${bound} normal` + (real === null ? "" : ` (in truth ${real})`);
  };
  const slider = h("input", { type: "range", min: 0, max: last, value: Math.max(own, 0), "aria-label": "threshold", oninput: event => tell(+event.target.value) });
  tell(Math.max(own, 0));
  return h("div", {}, h("h4", {}, "Alarms and false alarms at every threshold"), h("label", { class: "slider" }, h("span", {}, "high"), slider, h("span", {}, "low")), h("p", {}, said),
    h("p", { class: "note" }, `The bounds hold at all thresholds at once with ${percent(of.confidence)} confidence, if the normal test images are like the ${count(of.n, "calibration image")}: choose after looking. Nothing is promised for images in a row of one video, or after a change of camera, light or product.`),
    drifted(of.drift));
}
function drifted(since) {
  return since ? h("p", { class: "drift", role: "alert" }, `The monitor has found that production differs from the calibration images since ${since}: nothing is promised since then. Calibrate again.`) : null;
}

// ---- all together

function apply() {
  let n = 0;
  for (const section of sections) {
    let some = false;
    for (const row of section.rows) {
      const on = visible(row.setting);
      row.node.hidden = !on;
      some ||= on;
      if (on && !row.setting.parts) n++;
    }
    section.body.hidden = !some;
  }
  number();
  $("count").textContent = `${n} of ${count(data.settings.length, "setting")}`;
  const active = FILTERS.filter(name => state[name]).length;
  $("active").textContent = active ? `(${active})` : "";
  document.body.classList.toggle("unfiltered", !active && !state.text);
  clear.hidden = !active && !state.text;
  for (const { run, node, hay } of records) node.hidden = !passes(run.record, hay);
  for (const { node, own } of shelves.values()) node.hidden = own.every(of => of.node.hidden);
  drawMatrix(); drawCost(); drawCurves(); drawGallery();
}
board();
arrange();
settle();
apply();
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  settle();
  drawCost(); drawCurves();
});
})();
