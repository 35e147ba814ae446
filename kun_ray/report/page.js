// The sample browser. Every text goes into the page as textContent, never as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("filters");
  const list = document.getElementById("cards");
  const more = document.getElementById("more");
  const PAGE = 20;
  let shown = PAGE;
  let matches = [];

  const node = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined && text !== null) made.textContent = text;
    return made;
  };
  const whole = (n) => n.toLocaleString("en");
  const short = (x) => (x === null || x === undefined ? "–" : Number(x.toPrecision(4)).toString());

  const fill = (name, values) => {
    const counts = new Map();
    values.forEach((value) => value && counts.set(value, (counts.get(value) || 0) + 1));
    for (const [value, count] of [...counts].sort((a, b) => b[1] - a[1])) {
      const option = node("option", "", `${value} (${whole(count)})`);
      option.value = value;
      form.elements[name].append(option);
    }
  };
  const ids = new Set(data.cards.map((card) => card.id));
  const fates = data.cards.flatMap((card) => card.runs);
  fill("status", fates.map((fate) => fate.status));
  fill("step", fates.map((fate) => fate.step));
  fill("reason", fates.map((fate) => fate.reason));
  fill("source", data.cards.map((card) => card.source));

  for (const card of data.cards) {
    const parts = [card.id, card.source, card.title, card.text, card.file, JSON.stringify(card.meta), card.error];
    card.runs.forEach((fate) => parts.push(fate.reason, fate.instruction, fate.answer));
    card.haystack = parts.filter(Boolean).join("\n").toLowerCase();
  }

  const wanted = () => {
    const read = (name) => (form.elements[name] ? form.elements[name].value : "");
    return {
      query: read("query").trim().toLowerCase(), run: read("run"), fate: read("fate"), status: read("status"), step: read("step"),
      reason: read("reason"), source: read("source"), low: read("low"), high: read("high"), order: read("order"),
      plain: form.elements.plain.checked,
    };
  };
  const fits = (fate, want) =>
    (want.run === "" || fate.run === Number(want.run)) &&
    (!want.status || fate.status === want.status) &&
    (!want.step || fate.step === want.step) &&
    (!want.reason || fate.reason === want.reason) &&
    (want.low === "" || (fate.score !== null && fate.score >= Number(want.low))) &&
    (want.high === "" || (fate.score !== null && fate.score <= Number(want.high)));
  const differs = (card) => new Set(card.runs.map((fate) => `${fate.status} ${fate.reason}`)).size > 1;
  const orders = {
    "score-up": (card) => (card.fit.score === null ? Infinity : card.fit.score),
    "score-down": (card) => (card.fit.score === null ? Infinity : -card.fit.score),
    kept: (card) => (card.fit.kept === null ? Infinity : card.fit.kept),
  };

  // Of Parquet an offset counts rows, of anything else bytes; a file without a suffix may be either.
  const place = ({ file, offset }) =>
    file.endsWith(".parquet") ? `row ${offset}, counted from 0` : `${/\.\w+$/.test(file) ? "byte" : "offset"} ${offset}`;

  const body = (text, query, className) => {
    const made = node("p", `body ${className || ""}`);
    made.lang = "zh-Hans";
    let rest = 0;
    const lowered = query ? text.toLowerCase() : "";
    // Lower-casing may change a text's length; then places in it are not places in the text, and nothing is marked.
    for (let at = query && lowered.length === text.length ? lowered.indexOf(query) : -1; at >= 0; at = lowered.indexOf(query, rest)) {
      made.append(text.slice(rest, at), node("mark", "", text.slice(at, at + query.length)));
      rest = at + query.length;
    }
    made.append(text.slice(rest));
    return made;
  };
  const edited = (edits) => {
    const made = node("p", "body long");
    made.lang = "zh-Hans";
    made.tabIndex = 0;
    for (const [kind, text] of edits) made.append(kind === 0 ? text : node(kind > 0 ? "ins" : "del", "", text));
    return made;
  };

  const showFate = (card, fate, want) => {
    const made = node("div", "fate");
    const line = node("header");
    if (data.runs.length > 1) line.append(node("strong", "", data.runs[fate.run]));
    line.append(node("span", `badge ${fate.status}`, fate.reason ? `${fate.status}: ${fate.reason}` : fate.status));
    if (fate.step) line.append(node("span", "", `by ${fate.step}`));
    if (fate.perplexity !== null) line.append(node("span", "", `perplexity ${short(fate.perplexity)}`));
    made.append(line);
    if (data.explain[fate.reason]) made.append(node("p", "explain", data.explain[fate.reason]));
    if (fate.instruction !== null) made.append(node("h4", "", "instruction"), body(fate.instruction, want.query, "instruction"));
    if (fate.verdict !== null || fate.score !== null) {
      made.append(node("h4", "", "verdict"));
      const verdict = node("p", "body", `${fate.verdict === null ? "–" : fate.verdict}  P(good) ${short(fate.score)}`);
      verdict.lang = "zh-Hans";
      made.append(verdict);
    }
    if (fate.answer !== null) {
      const changed = fate.edits && fate.kept >= 0.1 && !want.plain && !want.query;
      const kept = fate.kept === null ? "" : `, ${Math.round(100 * fate.kept)} % of it word for word from the text`;
      made.append(node("h4", "", (changed ? "answer, as a change of the text" : "answer") + kept));
      made.append(changed ? edited(fate.edits) : body(fate.answer, want.query, "long"));
    }
    if (fate.steps.length) {
      const said = fate.steps.map(([step, prompt, output, finish]) => `${step} ${prompt} + ${output === null ? 0 : output} tokens${finish ? `, ${finish}` : ""}`);
      made.append(node("p", "dim", said.join(" · ")));
    }
    return made;
  };
  const show = (card, want) => {
    const made = node("article", data.runs.length > 1 ? "card" : "card one");
    const head = node("header");
    const left = node("div", "text");
    head.append(node("strong", "", card.source));
    if (card.tokens !== null) head.append(node("span", "", `${whole(card.tokens)} tokens`));
    if (card.file !== null) head.append(node("code", "", `${card.file} @ ${place(card)}`));
    head.append(node("code", "", card.id));
    made.append(head);
    if (card.title) left.append(body(card.title, want.query, "instruction"));
    const origin = { stage: "text", corpus: "text, as it stands in the corpus (personal data masked)" }[card.origin];
    left.append(node("h4", "", origin || "text"));
    if (card.text) {
      const text = body(card.text, want.query, "long");
      text.tabIndex = 0;
      left.append(text);
    } else left.append(node("p", "absent", "not in this stage, and the corpus file cannot be read from here"));
    if (card.error) left.append(node("p", "failed", card.error));
    const meta = Object.entries(card.meta).flatMap(([key, value]) => {
      const text = typeof value === "string" ? value : JSON.stringify(value);
      if (key !== "duplicate_of" || !ids.has(value)) return [" · ", `${key}: ${text}`];
      const link = node("a", "", text);
      link.href = `#query=${encodeURIComponent(value)}`;
      return [" · ", `${key}: `, link];
    });
    if (meta.length) {
      const line = node("p", "dim");
      line.append(...meta.slice(1));
      left.append(line);
    }
    made.append(left);
    const runs = node("div", "runs");
    card.runs.forEach((fate) => runs.append(showFate(card, fate, want)));
    made.append(runs);
    return made;
  };

  const render = () => {
    const want = wanted();
    list.replaceChildren(...matches.slice(0, shown).map((card) => show(card, want)));
    more.hidden = matches.length <= shown;
  };
  const fields = [...form.elements].filter((field) => field.name);
  const remember = () => {
    const set = new URLSearchParams();
    fields.forEach((field) => field.type !== "checkbox" && field.value && set.set(field.name, field.value));
    // Where the browser allows it for a local file, the address holds the filters: it can be kept and passed on.
    try { history.replaceState(null, "", set.size ? `#${set}` : location.pathname + location.search); } catch { /* not here */ }
  };
  const recall = () => {
    const set = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
    fields.forEach((field) => set.has(field.name) && (field.value = set.get(field.name)));
    return set.size > 0;
  };
  const update = () => {
    const want = wanted();
    shown = PAGE;
    matches = data.cards.filter((card) => {
      card.fit = card.runs.find((fate) => fits(fate, want));
      return card.fit && (!want.fate || differs(card)) && (!want.source || card.source === want.source) && card.haystack.includes(want.query);
    });
    if (orders[want.order]) {
      const key = orders[want.order];
      matches.sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0));
    }
    document.getElementById("count").textContent = `${whole(matches.length)} of ${whole(data.cards.length)} sampled documents`;
    render();
  };
  const changed = () => { update(); remember(); };
  form.addEventListener("input", changed);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(changed));
  more.addEventListener("click", () => { shown += PAGE; render(); });
  document.querySelectorAll("button[data-reason]").forEach((button) =>
    button.addEventListener("click", () => {
      form.reset();
      form.elements.reason.value = button.dataset.reason;
      form.elements.step.value = button.dataset.step;
      changed();
      document.getElementById("samples").scrollIntoView();
    }));
  addEventListener("hashchange", () => {
    if (!location.hash.includes("=")) return;
    form.reset();  // which shows the samples again, once what the address asks for is filled in
    recall();
    document.getElementById("samples").scrollIntoView();
  });
  const recalled = recall();
  update();
  if (recalled) document.getElementById("samples").scrollIntoView({ behavior: "instant" });
})();
