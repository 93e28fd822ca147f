// Text of the data becomes text nodes only: no string is ever parsed as HTML.
const data = JSON.parse(byId("data").textContent), isText = data.kind === "tokens";
const percent = p => p === null || p === undefined ? "–" : p >= 0.9995 ? "100%" : (100 * p).toFixed(p < 0.0995 ? 2 : 1) + "%";
function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}
const className = number => number < 0 ? "" : (data.names[number] ?? "class " + number);

// Rows of the overview, one object per sample.
const toRows = found => { Object.assign(data.names, found.names); return found.sample.map((sample, n) => ({sample, ...Object.fromEntries(
  ["key", "guess", "target", "rows", "confidence", "doubt", "agrees", "same"].map(name => [name, found[name][n]]))})); };
let rows = toRows(data), page = 0, shown = [], request = 0;
const seen = new Map(Object.entries(data.details).map(([sample, one]) => [Number(sample), one]));
const some = name => rows.some(row => row[name] !== null);

const last = value => value === null ? -Infinity : value;
const SORTS = {
  "entropy, highest first": (a, b) => last(b.doubt) - last(a.doubt),
  "entropy, lowest first": (a, b) => last(a.doubt) - last(b.doubt),
  "agreement between views, least first": (a, b) => last(a.same) - last(b.same),
  "agreement with the ground truth, least first": (a, b) => last(a.agrees) - last(b.agrees),
  "place in the cache": (a, b) => a.sample - b.sample,
};
const FILTERS = {
  "all": () => true,
  "teacher differs from the ground truth": row => row.agrees !== null && row.agrees < 1,
  "teacher agrees with the ground truth": row => row.agrees === 1,
  "views differ": row => row.same !== null && row.same < 1,
};

function matching() {
  const key = byId("key").value.toLowerCase(), wanted = byId("class").value.trim().toLowerCase(), filter = FILTERS[byId("show").value];
  const names = new Map(Object.entries(data.names).map(([number, name]) => [Number(number), name.toLowerCase()]));
  const exact = new Set(names.values()).has(wanted);
  const fits = number => { const name = names.get(number) ?? ""; return exact ? name === wanted : name.includes(wanted); };
  return rows.filter(row => row.key.toLowerCase().includes(key) && filter(row) && (!wanted || fits(row.guess) || fits(row.target)))
    .sort((a, b) => SORTS[byId("sort").value](a, b) || a.sample - b.sample);
}

async function ask(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

async function fetchDetails(wanted) {
  const missing = wanted.filter(row => !seen.has(row.sample)).map(row => row.sample);
  if (missing.length) for (const one of await ask("details?samples=" + missing.join(","))) seen.set(one.sample, one);
}

async function draw() {
  const mine = ++request;
  shown = matching();
  const pages = Math.max(1, Math.ceil(shown.length / data.perPage));
  page = Math.min(page, pages - 1);
  const here = shown.slice(page * data.perPage, (page + 1) * data.perPage), first = page * data.perPage;
  for (const end of ["", "-below"]) { byId("previous" + end).disabled = page === 0; byId("next" + end).disabled = page >= pages - 1; }
  byId("everywhere").hidden = !(data.served && byId("key").value && rows.length < data.total);
  byId("everywhere").textContent = `Search the keys of all ${data.total.toLocaleString("en")} samples`;
  hide();
  try {
    await fetchDetails(here);
  } catch (error) {
    byId("status").textContent = error instanceof TypeError ? "The server has ended: start softcache browse again." : error.message;
    return;
  }
  if (mine !== request) return;  // another page was asked for meanwhile
  byId("status").textContent = shown.length ? `${(first + 1).toLocaleString("en")} to ${(first + here.length).toLocaleString("en")} of ${shown.length.toLocaleString("en")}` : "No sample fits.";
  byId("cards").replaceChildren(...here.map(card));
  shade();
  root.dataset.drawn = String(mine);
}

function badges(row) {
  const list = make("ul", undefined, "badges"), add = (text, kind) => list.append(make("li", text, kind));
  if (row.doubt !== null) add(`${isText || data.kind === "cells" ? "mean entropy" : "entropy"} ${row.doubt.toFixed(3)} nats`);
  if (isText) {
    add(`${row.rows.toLocaleString("en")} labels`);
    if (row.agrees !== null) add(`right on ${percent(row.agrees)} of the tokens`);
  } else {
    if (row.agrees !== null) add(row.agrees === 1 ? "agrees with the ground truth" : "differs from the ground truth", row.agrees === 1 ? "good" : "bad");
    if (row.same !== null) add(row.same === 1 ? "views agree" : row.same ? `${percent(row.same)} of the other views agree` : "no other view agrees", row.same === 1 ? "" : "bad");
  }
  return list;
}

function classTable(found, truth) {
  const table = make("table", undefined, "top");
  table.append(make("caption", `${found.view ? found.view + ": " : ""}entropy ${found.h.toFixed(3)} nats`));
  const add = (name, p, kind) => {
    const line = table.insertRow(), head = make("th", name, kind), meter = make("meter");
    head.scope = "row"; head.title = name; meter.value = p; meter.ariaLabel = name;
    line.append(head);
    line.insertCell().append(meter);
    line.insertCell().textContent = percent(p);
  };
  for (const [name, p] of found.top) add(name, p, name === truth ? "truth" : "");
  if (found.tail !== null && found.tail > 0) add("all others", found.tail, "");
  return table;
}

// The image of view 0 twice, with what the teacher gives and with the ground truth; what is drawn is hidden while pointed at.
const hue = number => `hsl(${Math.round(number * 137.508) % 360} 85% 58%)`;
function pictures(one, key) {
  const both = make("div", undefined, "drawn"), {mask, boxes, names} = one.drawn, used = new Set();
  const parts = [["teacher", mask, boxes], ["ground truth", one.drawn.true_mask, one.drawn.true_boxes]].filter(([, cells, found]) => cells || found);
  for (const [who, cells, found] of parts) {
    const figure = make("figure"), frame = make("div", undefined, "frame"), caption = make("figcaption", who);
    if (one.picture) {
      const image = make("img");
      image.src = one.picture; image.alt = `${key}, ${who}`;
      image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 64));
      frame.append(image);
    }
    if (cells) {
      const canvas = make("canvas"), brush = canvas.getContext("2d");
      canvas.width = one.drawn.width; canvas.height = one.drawn.height;
      canvas.className = one.picture ? "over" : "alone";
      cells.forEach((number, at) => { if (number < 0 || names[number] === "background") return;
        used.add(number); brush.fillStyle = hue(number); brush.fillRect(at % canvas.width, Math.floor(at / canvas.width), 1, 1); });
      frame.append(canvas);
    }
    for (const [left, top, right, bottom, name, score, number] of found ?? []) {
      const box = make("div", undefined, "box over"), label = make("span", who === "teacher" ? `${name} ${percent(score)}` : name);
      Object.assign(box.style, {left: 100 * left + "%", top: 100 * top + "%", width: 100 * (right - left) + "%", height: 100 * (bottom - top) + "%", borderColor: hue(number)});
      label.style.background = hue(number);
      if (top < 0.12) label.className = "inside";
      if (left > 0.6) label.style.left = "auto", label.style.right = "-2px";
      box.append(label); frame.append(box);
    }
    if (found) caption.textContent += `: ${found.length} box${found.length === 1 ? "" : "es"}`;
    figure.append(frame, caption);
    both.append(figure);
  }
  const legend = make("ul", undefined, "legend");
  for (const number of [...used].sort((a, b) => a - b).slice(0, 24)) {
    const line = make("li", names[number]), swatch = make("i");
    swatch.style.background = hue(number);
    line.prepend(swatch); legend.append(line);
  }
  if (used.size) both.append(legend);
  return both;
}

function card(row) {
  const one = seen.get(row.sample), item = make("li", undefined, "card");
  if (isText) return textCard(item, row, one);
  const head = make("div", undefined, "head"), facts = make("div"), isDrawn = one.drawn && (one.drawn.mask || one.drawn.boxes || one.drawn.true_boxes);
  if (isDrawn) item.append(pictures(one, row.key));
  else if (one.picture) {
    const image = make("img");
    image.src = one.picture; image.alt = row.key; image.width = image.height = 96;
    image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 64));
    head.append(image);
  } else if (one.why) head.append(make("div", one.why, "none"));
  facts.append(make("h3", row.key));
  if (one.picture && one.why) facts.append(make("p", one.why, "missing"));
  const truth = one.truth || className(row.target);
  if (truth) facts.append(make("p", "ground truth: " + truth, "say"));
  if (row.guess >= 0) facts.append(make("p", `teacher: ${className(row.guess)} (${percent(row.confidence)})`, "say"));
  facts.append(badges(row));
  head.append(facts);
  item.append(head);
  const [first, ...others] = one.views[0]?.cells ?? one.views;
  if (first) item.append(classTable(first, truth));
  if (others.length) {
    const more = make("details"), cells = one.views[0].cells;
    more.append(make("summary", cells ? one.views[0].view : `${others.length} more view${others.length > 1 ? "s" : ""}`), ...others.map(view => classTable(view, truth)));
    item.append(more);
  }
  return item;
}

function textCard(item, row, one) {
  item.append(make("h3", row.key), badges(row));
  const text = make("p", undefined, "tokens");
  text.tabIndex = 0;
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `${row.key}: arrow keys go from token to token`);
  const put = piece => {
    const node = make("span", piece[0]);
    if (piece[1].length) { node.dataset.row = ""; node.rows = piece[1]; }
    text.append(node);
  };
  one.pieces.forEach(put);
  item.append(text);
  text.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity}[event.key];
    if (event.key === "Escape") hide();
    if (step === undefined) return;
    event.preventDefault();
    const tokens = [...text.querySelectorAll("[data-row]")], at = tokens.findIndex(node => node.classList.contains("active"));
    if (tokens.length) show(tokens[Math.max(0, Math.min(tokens.length - 1, at + step))]);
  });
  text.addEventListener("focus", () => { if (!text.querySelector(".active") && text.matches(":focus-visible")) { const first = text.querySelector("[data-row]"); if (first) show(first); } });
  text.addEventListener("blur", hide);
  for (const kind of ["mouseover", "click"]) text.addEventListener(kind, event => { if (event.target.dataset.row !== undefined) show(event.target); });
  text.addEventListener("mouseleave", () => { if (document.activeElement !== text) hide(); });
  const note = make("p", `${one.total.toLocaleString("en")} tokens`, "say");
  item.append(note);
  if (one.total > one.next) {
    note.textContent = `the first ${one.next.toLocaleString("en")} of ${one.total.toLocaleString("en")} tokens`;
    if (data.served) {
      const more = make("button", "More of this text");
      more.type = "button";
      more.addEventListener("click", async () => {
        const [further] = await ask(`details?samples=${row.sample}&first=${one.next}`);
        one.pieces.push(...further.pieces);
        one.next = further.next;
        const fresh = textCard(make("li", undefined, "card"), row, one);
        item.replaceWith(fresh);
        shade();
      });
      item.append(more);
    }
  }
  return item;
}

function shade() {
  if (!isText) return;
  const by = byId("shade").value;
  for (const node of document.querySelectorAll("[data-row]")) {
    // Of tokens that together are one letter, the least sure one is shown.
    const depth = Math.max(...node.rows.map(row => by === "h" ? Math.min(1, row.h / Math.min(data.maxEntropy, 6)) : 1 - (row.p ?? 1)));
    node.style.background = `rgba(var(--shade), ${(0.75 * depth).toFixed(3)})`;
  }
  const scale = byId("scale");
  scale.hidden = false;
  scale.replaceChildren(by === "h" ? "entropy of the teacher: 0 " : "probability that the teacher gives the token: 100% ", make("span", "", "scale"),
    by === "h" ? ` ${Math.min(data.maxEntropy, 6).toFixed(1)} nats and more` : " 0%", ". Point at a token, or go there by arrow keys, for what the teacher would have written.");
}

let active = null;
function show(node) {
  hide();
  active = node;
  node.classList.add("active");
  const box = byId("alternatives");
  box.replaceChildren(...node.rows.flatMap(row => [
    make("p", `token ${row.at.toLocaleString("en")} “${node.textContent}”` + (row.p === undefined ? "" : `: the teacher gives it ${percent(row.p)}`)),
    classTable(row, null)]));
  box.hidden = false;
  const place = node.getClientRects()[0] ?? node.getBoundingClientRect(), width = box.offsetWidth;
  const above = place.bottom + box.offsetHeight + 8 > innerHeight && place.top > box.offsetHeight + 8;
  box.style.left = Math.max(8, Math.min(place.left, innerWidth - width - 8)) + scrollX + "px";
  box.style.top = (above ? place.top - box.offsetHeight - 6 : place.bottom + 6) + scrollY + "px";
}
function hide() {
  if (active) active.classList.remove("active");
  active = null;
  byId("alternatives").hidden = true;
}

for (const [name, value] of data.facts) byId("facts").append(make("dt", name), make("dd", value));
for (const note of data.notes) byId("notes").append(make("p", note, "say"));
for (const note of data.missing) byId("notes").append(make("p", note, "missing"));
const sorts = Object.keys(SORTS).filter(name => !(name.includes("views") && !some("same")) && !(name.includes("truth") && !some("agrees")));
const filters = Object.keys(FILTERS).filter(name => !(name.includes("views") && !some("same")) && !(name.includes("truth") && (isText || !some("agrees"))));
for (const name of sorts) byId("sort").add(new Option(name, name));
for (const name of filters) byId("show").add(new Option(name, name));
byId("show").parentElement.hidden = filters.length < 2;
byId("shade-label").hidden = !isText;
byId("class-label").hidden = isText;
byId("cards").classList.toggle("tokens-kind", isText);
byId("cards").classList.toggle("cells-kind", data.kind === "cells");
for (const name of [...new Set(Object.values(data.names))].sort().slice(0, 2000)) byId("classes").append(new Option(name, name));
if (isText && !Object.values(data.details).concat(data.served ? [{pieces: [["", [{p: 1}]]]}] : []).some(one => one.pieces.some(piece => piece[1].some(row => row.p !== undefined)))) byId("shade-label").hidden = true;

byId("controls").addEventListener("submit", event => event.preventDefault());
for (const id of ["key", "class", "show", "sort"]) byId(id).addEventListener("input", () => { page = 0; draw(); });
byId("shade").addEventListener("input", () => { hide(); shade(); });
const go = step => { page += step; draw().then(() => byId("cards").scrollIntoView({block: "nearest"})); };
for (const end of ["", "-below"]) { byId("previous" + end).addEventListener("click", () => go(-1)); byId("next" + end).addEventListener("click", () => go(1)); }
byId("everywhere").addEventListener("click", async () => {
  const known = new Set(rows.map(row => row.sample));
  let found;
  try { found = await ask("find?key=" + encodeURIComponent(byId("key").value)); } catch (error) { byId("status").textContent = error.message; return; }
  rows = rows.concat(toRows(found).filter(row => !known.has(row.sample)));
  page = 0;
  await draw();
  if (found.sample.length >= found.most) byId("status").textContent += `; the first ${found.most} in the cache, search for more of the key`;
});
onTheme(() => {});
draw();
