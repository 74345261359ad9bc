"use strict";
// The browser of queries, and the read-out of figures. Everything shown is set as text, never as markup.
(() => {
  const PAGE = 50, NAMED = 4;
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const made = (name, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };
  const isolated = (text) => made("bdi", { textContent: text }); // whatever direction it has ends here
  const words = (name) => name.replace("_", " ");
  const percent = (share) => (100 * share).toFixed(1) + " %";

  // ------------------------------------------------------------------ which queries

  const controls = ["search", "method", "error", "order", "stepped"].map(at);
  const [search, method, error, order, stepped] = controls;
  let found = [], page = 0, open = -1;
  let lowered = null, itemTexts = null; // made at the first search

  const choices = (select, entries) => entries.forEach(([value, text]) => select.append(new Option(text, value)));
  choices(method, data.methods.map((name, m) => [m, name]));
  choices(error, [["", "any"], ...data.errors.map((name, e) => [e, words(name)])]);
  choices(order, [["given", "as given"], ["worst", `${data.metric}, lowest first`], ["best", `${data.metric}, highest first`]]);
  const withSteps = data.methods.findLastIndex((name) => data.steps[name]);
  method.value = withSteps < 0 ? data.methods.length - 1 : withSteps;
  stepped.closest("label").hidden = withSteps < 0;

  const hasSteps = (q) => Object.values(data.steps).some((of) => of[q]);

  function matches() {
    const wanted = search.value.trim().toLowerCase();
    const lists = data.lists[method.value];
    const fits = (q) => (error.value === "" || lists[q][3] === Number(error.value)) && (!stepped.checked || hasSteps(q));
    const all = data.queries.map((_, q) => q).filter(fits);
    if (!wanted) return all;
    lowered ??= data.queries.map((row) => (row[0] + "\n" + row[1]).toLowerCase());
    itemTexts ??= data.texts.map((text, i) => (data.ids[i] + "\n" + text).toLowerCase());
    const items = new Set(itemTexts.flatMap((text, i) => (text.includes(wanted) ? [i] : [])));
    return all.filter((q) => {
      if (lowered[q].includes(wanted)) return true;
      const [, , history, pool] = data.queries[q];
      return items.size > 0 && (pool.some((i) => items.has(i)) || history.some((i) => items.has(i)));
    });
  }

  function look() {
    found = matches();
    const lists = data.lists[method.value];
    if (order.value !== "given") {
      const sign = order.value === "worst" ? 1 : -1;
      found.sort((a, b) => sign * (lists[a][4] - lists[b][4]) || a - b);
    }
    page = 0;
    at("count").textContent = `${found.length.toLocaleString("en")} of ${data.queries.length.toLocaleString("en")} queries`;
    showList();
  }

  function showList() {
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    page = Math.min(Math.max(page, 0), last);
    const lists = data.lists[method.value];
    at("list").replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map((q) => {
      const [id, text, history] = data.queries[q];
      const kind = data.errors[lists[q][3]];
      const said = text || history.slice(-3).map((i) => data.texts[i]).join(" · ");
      const button = made("button", { type: "button", onclick: () => show(q) },
        made("span", { className: "id" }, isolated(id)),
        made("span", { className: `kind ${kind}`, textContent: `${words(kind)} · ${(lists[q][4] / 10).toFixed(0)}` }),
        made("span", { className: "what" }, isolated(said)));
      button.dataset.query = q;
      button.setAttribute("aria-current", q === open);
      return made("li", {}, button);
    }));
    at("list").scrollTop = 0;
    at("page").textContent = `page ${page + 1} of ${last + 1}`;
    at("previous").disabled = page === 0;
    at("next").disabled = page === last;
  }

  const turn = (by) => () => { page += by; showList(); };
  at("previous").onclick = turn(-1);
  at("next").onclick = turn(1);
  at("find").onsubmit = (event) => event.preventDefault();
  controls.forEach((control) => control.addEventListener("input", look));
  method.addEventListener("input", () => { if (open >= 0) show(open, false); });
  at("list").onkeydown = (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const buttons = [...at("list").querySelectorAll("button")];
    buttons[buttons.indexOf(document.activeElement) + by]?.focus();
  };

  // ------------------------------------------------------------------ one query

  function show(q, focus = true) {
    open = q;
    const [id, text, history, pool, gains, missed, earlier] = data.queries[q];
    const gain = new Map(gains);
    const shown = at("query");
    shown.replaceChildren(made("h3", {}, "Query ", isolated(id)));
    if (text) shown.append(made("p", {}, isolated(text)));
    if (history.length) shown.append(past(history, earlier));
    shown.append(made("h4", { textContent: "What each method did" }), verdicts(q, pool, gain, missed));
    shown.append(poolTable(q, pool, gain));
    if (data.cut) shown.append(made("p", { className: "past", textContent: `Texts are cut after ${data.cut} characters.` }));
    const steppable = data.methods.filter((name) => data.steps[name]?.[q]);
    if (steppable.length) shown.append(stepper(q, steppable, pool, gain));
    for (const button of at("list").querySelectorAll("button")) button.setAttribute("aria-current", Number(button.dataset.query) === q);
    if (!focus) return;
    remember(id);
    shown.focus({ preventScroll: matchMedia("(min-width: 48rem)").matches });
  }

  const remember = (id) => {
    try { history.replaceState(null, "", "#query=" + encodeURIComponent(id)); } catch { /* a page inside another */ }
  };

  function past(items, earlier) {
    const list = made("p", { className: "past" }, earlier ? `History, after ${earlier} earlier items: ` : "History: ");
    items.forEach((i, n) => list.append(n ? " · " : "", isolated(data.texts[i])));
    return list;
  }

  function verdicts(q, pool, gain, missed) {
    const list = made("ul", { className: "verdicts" });
    data.methods.forEach((name, m) => {
      const [slate, ranking, outcome, kind, score] = data.lists[m][q];
      const line = made("li", {}, made("b", { textContent: name }), `: ${(score / 10).toFixed(1)} `,
        made("span", { className: `kind ${data.errors[kind]}`, textContent: words(data.errors[kind]) }));
      if (data.outcomes[outcome] !== "ok") line.append(` (${data.outcomes[outcome]})`);
      if (data.errors[kind] !== "ok") {
        const absent = [...gain.keys()].filter((c) => !slate.includes(c));
        const dropped = [...gain.keys()].filter((c) => slate.includes(c) && !ranking.includes(c));
        if (absent.length) line.append(". Never in the slate: ", ...named(absent, pool));
        if (dropped.length) line.append(". In the slate, not ranked: ", ...named(dropped, pool));
        const low = [...gain.keys()].filter((c) => ranking.includes(c) && ranking.indexOf(c) >= gain.size);
        if (low.length) line.append(". Ranked below others: ", ...named(low, pool));
      }
      list.append(line);
    });
    if (missed.length) list.append(made("li", {}, "The pool lacks: ", isolated(missed.map(([item]) => item).join(", "))));
    return list;
  }

  function named(candidates, pool) {
    const most = candidates.slice(0, NAMED).flatMap((c, n) => [n ? ", " : "", isolated(data.texts[pool[c]])]);
    return candidates.length > NAMED ? [...most, ` and ${candidates.length - NAMED} more`] : most;
  }

  function poolTable(q, pool, gain) {
    const cell = (name, text, properties = {}) => made(name, { textContent: text, ...properties });
    const first = Number(method.value); // the chosen one, which may be all that a narrow window shows
    const methods = [first, ...data.methods.keys()].filter((m, i) => i === 0 || m !== first);
    const head = made("tr", {}, cell("th", "candidate", { scope: "col" }), cell("th", "gain", { scope: "col" }),
      ...methods.map((m) => cell("th", data.methods[m], { scope: "col", title: data.methods[m] })));
    const order = pool.map((_, c) => c).sort((a, b) => (gain.get(b) ?? 0) - (gain.get(a) ?? 0) || a - b);
    const listed = (c) => gain.has(c) || methods.some((m) => data.lists[m][q][0].includes(c) || data.lists[m][q][1].includes(c));
    const row = (c) => made("tr", { className: gain.has(c) ? "relevant" : "" },
      made("th", { scope: "row" }, isolated(data.texts[pool[c]]), made("span", {}, isolated(data.ids[pool[c]]))),
      cell("td", gain.get(c) ?? "0"),
      ...methods.map((m) => {
        const [slate, ranking] = data.lists[m][q];
        const place = ranking.indexOf(c);
        if (place >= 0) return cell("td", place + 1, { className: "at" });
        return slate.includes(c) ? cell("td", "slate", { className: "in" }) : cell("td", "");
      }));
    const others = order.filter((c) => !listed(c));
    const rest = made("tbody", { hidden: true });
    const more = made("button", { type: "button", textContent: `Show ${others.length} others, in no list` });
    more.setAttribute("aria-expanded", false);
    more.onclick = () => {
      if (!rest.childElementCount) rest.append(...others.map(row));
      rest.hidden = !rest.hidden;
      more.setAttribute("aria-expanded", !rest.hidden);
      more.textContent = `${rest.hidden ? "Show" : "Hide"} ${others.length} others, in no list`;
    };
    const table = made("table", { className: "pool" },
      made("caption", {}, cell("span", `The pool of ${pool.length}, relevant first: the place in each ranking, or "slate" where it went no further`)),
      made("thead", {}, head), made("tbody", {}, ...order.filter(listed).map(row)), rest);
    const region = made("div", { className: "scroll", tabIndex: 0 }, table);
    region.setAttribute("role", "region");
    region.setAttribute("aria-label", "Pool and rankings");
    return made("div", {}, region, ...(others.length ? [more] : []));
  }

  // ------------------------------------------------------------------ one transcript

  function stepper(q, names, pool, gain) {
    const chosen = new Option();
    const select = made("select", {}, ...names.map((name) => new Option(name, name)));
    select.value = names.includes(data.methods[method.value]) ? data.methods[method.value] : names.at(-1);
    const said = made("div", { className: "said" }), bars = made("div"), status = made("p", { className: "past" });
    status.setAttribute("role", "status");
    let step = 0;
    const label = ([, , named_]) => named_.length === 0 ? "end or separator" : named_.length === 1 ? data.texts[pool[named_[0]]] : `one of ${named_.length}`;

    function draw(focus) {
      const steps = data.steps[select.value][q];
      step = Math.min(Math.max(step, 0), steps.length - 1);
      let phase = "";
      said.replaceChildren(...steps.flatMap((one, i) => {
        const button = made("button", { type: "button", onclick: () => { step = i; draw(true); } }, isolated(label(one)));
        if (i === step) button.setAttribute("aria-current", "step");
        const begins = one[0] !== phase ? [made("span", { className: "phase", textContent: (phase = one[0]) + ":" })] : [];
        return [...begins, button];
      }));
      if (focus) said.querySelectorAll("button")[step].focus();
      const [kind, place, named_, probability, open_, others, literal] = steps[step];
      status.textContent = `Step ${step + 1} of ${steps.length}: ${kind}, place ${place + 1}; what was written had probability ${percent(probability)}`;
      const rows = open_.map(([c, p]) => [data.texts[pool[c]], p, gain.has(c), named_.includes(c)]);
      if (others > 0) rows.push(["other candidates", others, false, false]);
      if (literal > 0) rows.push(["end or separator", literal, false, named_.length === 0]);
      const list = made("dl", { className: "bars" });
      for (const [text, p, relevant, taken] of rows) {
        const bar = made("span", { className: relevant ? "bar relevant" : "bar" });
        bar.style.width = 100 * p + "%";
        list.append(made("dt", { className: taken ? "taken" : "", title: text }, isolated((taken ? "▸ " : "") + text + (relevant ? " ✓" : ""))),
          made("dd", {}, bar), made("dd", { className: "number", textContent: percent(p) }));
      }
      bars.replaceChildren(list);
      back.disabled = step === 0;
      on.disabled = step === steps.length - 1;
    }

    const back = made("button", { type: "button", textContent: "Step back", onclick: () => { step--; draw(); } });
    const on = made("button", { type: "button", textContent: "Step on", onclick: () => { step++; draw(); } });
    select.onchange = () => { step = 0; draw(); };
    said.onkeydown = (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by) { event.preventDefault(); step += by; draw(true); }
    };
    draw();
    return made("section", {},
      made("h4", { textContent: "Step by step" }),
      made("div", { className: "stepper" }, made("label", {}, "Method ", select), back, on), said, status, bars,
      made("p", { className: "past", textContent: "▸ what was written, ✓ relevant. Steps with a single allowed choice are left out." }));
  }

  // ------------------------------------------------------------------ figures

  function readOut(figure) {
    const svg = figure.querySelector("svg[data-x]");
    const [xLow, xHigh] = svg.dataset.x.split(" ").map(Number), [yLow, yHigh] = svg.dataset.y.split(" ").map(Number);
    const lines = [...svg.querySelectorAll("polyline")].map((line) => [line.dataset.label, line.getAttribute("points").split(" ").map((p) => p.split(",").map(Number))]);
    const [LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT] = [44, 8, 8, 24, 340, 180]; // as charts.py
    const tip = made("div", { className: "tip", hidden: true });
    const cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cross.setAttribute("class", "cross");
    figure.append(tip);
    svg.onpointermove = (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * WIDTH;
      const nearest = (points) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      const [x0] = nearest(lines.flatMap(([, points]) => points));
      const values = lines.flatMap(([label, points]) => points.filter((p) => Math.abs(p[0] - x0) < 0.06).map(([, y]) => {
        const value = yLow + (HEIGHT - BOTTOM - y) / (HEIGHT - TOP - BOTTOM) * (yHigh - yLow);
        return `${label} ${value.toPrecision(3)}`;
      }));
      const step = Math.round(xLow + (x0 - LEFT) / (WIDTH - LEFT - RIGHT) * (xHigh - xLow));
      for (const [name, value] of [["x1", x0], ["x2", x0], ["y1", TOP], ["y2", HEIGHT - BOTTOM]]) cross.setAttribute(name, value);
      svg.append(cross);
      tip.textContent = [`step ${step}`, ...values].join("\n");
      tip.hidden = false;
      tip.style.left = x0 < WIDTH / 2 ? x0 / WIDTH * 100 + 3 + "%" : "auto";
      tip.style.right = x0 < WIDTH / 2 ? "auto" : 103 - x0 / WIDTH * 100 + "%";
    };
    svg.onpointerleave = () => { tip.hidden = true; cross.remove(); };
  }
  document.querySelectorAll(".plot").forEach(readOut);

  // ------------------------------------------------------------------ start

  look();
  const asked = location.hash ? data.queries.findIndex((row) => location.hash === "#query=" + encodeURIComponent(row[0])) : -1;
  if (asked >= 0) { show(asked); at("queries").scrollIntoView(); }
  else if (found.length) show(found.find(hasSteps) ?? found[0], false);
  document.documentElement.dataset.ready = Math.round(performance.now());
})();
