"use strict";
// The page of a blind review. Its items come from #data; every text enters the document through textContent alone.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const pairs = data.mode === "pairs";
const CHOICES = [["left", "甲更好"], ["both_good", "一样好"], ["both_bad", "一样差"], ["right", "乙更好"]];
const LEVELS = [[1, "差"], [2, "一般"], [3, "好"]];
const place = "kun_ray.review." + data.review;
const others = new Map();  // name → state of who was here before, for a browser that saves nothing
let state = { reviewer: "", votes: {}, at: 0 };
let shown = performance.now(), criterion = 0, saved = true, moving;

function element(name, text, attributes) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  return made;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch (error) { saved = false; }
  return null;
}

function load() {
  const last = read(place);
  state = (last && read(`${place}.${last.reviewer}`)) || state;
}

function save() {
  try {
    localStorage.setItem(`${place}.${state.reviewer}`, JSON.stringify(state));
    localStorage.setItem(place, JSON.stringify({ reviewer: state.reviewer }));
    saved = true;
  } catch (error) { saved = false; }
  if (!saved) notice("浏览器不允许本页保存，关闭页面前请先导出。");
}

const item = () => data.items[state.at];
const vote = () => state.votes[item().id] || {};
const isDone = (one) => {
  const given = state.votes[one.id] || {};
  return pairs ? Boolean(given.choice) : data.criteria.every((c) => given[c.id]);
};
const numDone = () => data.items.filter(isDone).length;

function change(values) {
  const seconds = Math.round((vote().seconds || 0) + (performance.now() - shown) / 1000);
  shown = performance.now();
  state.votes[item().id] = { ...vote(), ...values, seconds };
  save();
}

// Each reviewer has votes of his own. What was said under no name belongs to the first name that is typed.
function enter(name) {
  const before = state;
  if (name === before.reviewer) return;
  const found = read(`${place}.${name}`) || others.get(name);
  state = found || { reviewer: name, votes: {}, at: 0 };
  others.set(before.reviewer, before);
  if (before.reviewer) {
    notice(`“${before.reviewer}”的评判另外保存着，填回这个姓名就能接着评。`);
  } else if (Object.keys(before.votes).length) {
    for (const [id, given] of Object.entries(before.votes)) state.votes[id] = { ...state.votes[id], ...given };
    state.at = before.at;
    others.delete("");
  }
  save();
  if (saved && !before.reviewer) localStorage.removeItem(`${place}.`);
  if (found || before.reviewer) go(state.at);  // else all looks as before, and a click that ended the typing meets its button
}

function rate(number) {
  if (!state.reviewer) {
    notice("请先在页面左上角填写姓名或代号，然后再评判。");  // the field is not focused, or the next votes would be typed as a name
    window.scrollTo(0, 0);
    return;
  }
  if (pairs) {
    if (number > CHOICES.length) return;
    change({ choice: CHOICES[number - 1][0] });
  } else {
    if (number > LEVELS.length) return;
    change({ [data.criteria[criterion].id]: LEVELS[number - 1][0] });
    if (criterion < data.criteria.length - 1) { criterion += 1; return show(); }
  }
  show();
  clearTimeout(moving);
  if (isDone(item())) moving = setTimeout(() => (numDone() === data.items.length ? finish() : go(state.at + 1)), 150);
}

function finish() {
  notice("全部评完了，请按“导出”，把文件交给组织者。");
  show();
}

function go(to) {
  if (to < 0 || to >= data.items.length) return;
  clearTimeout(moving);  // who turns a page in the pause after a vote has moved on already
  state.at = to;
  criterion = 0;
  shown = performance.now();
  save();
  show();
  window.scrollTo(0, 0);
}

function goOpen() {
  const n = data.items.length;
  for (let step = 1; step <= n; step++) {
    const to = (state.at + step) % n;
    if (!isDone(data.items[to])) return go(to);
  }
  finish();
}

function card(title, text) {
  const made = element("section");
  made.append(element("h2", title), element("div", text, { class: "text", lang: "zh-CN" }));
  return made;
}

function button(key, label, pressed, onClick) {
  const made = element("button", undefined, { "aria-pressed": String(pressed) });
  made.append(element("kbd", key), label);
  made.addEventListener("click", onClick);
  return made;
}

function show() {
  const now = item(), given = vote(), done = numDone();
  $("instruction").querySelector(".text").textContent = now.instruction;
  $("answers").replaceChildren(...now.answers.map((text, i) => card(pairs ? ["甲的回答", "乙的回答"][i] : "回答", text)));
  if (document.activeElement !== $("comment")) $("comment").value = given.comment || "";
  const row = (buttons, head) => {
    const made = element("div", undefined, { class: head ? "row criterion" : "row" });
    made.append(...(head ? [head] : []), ...buttons);
    return made;
  };
  if (pairs) {
    $("choices").replaceChildren(row(CHOICES.map(([name, label], i) => button(i + 1, label, given.choice === name, () => rate(i + 1)))));
  } else {
    $("choices").replaceChildren(...data.criteria.map((c, number) => {
      const head = element("div", c.name);
      head.append(element("small", c.question));
      const made = row(LEVELS.map(([level, label], i) => button(i + 1, label, given[c.id] === level, () => {
        criterion = number;
        rate(i + 1);
      })), head);
      made.classList.toggle("current", number === criterion);
      return made;
    }));
  }
  $("previous").disabled = state.at === 0;
  $("next").disabled = state.at === data.items.length - 1;
  $("position").textContent = `${state.at + 1} / ${data.items.length}`;
  $("count").textContent = `已评 ${done} / ${data.items.length}`;
  $("progress").firstElementChild.style.width = `${100 * done / data.items.length}%`;
  $("progress").setAttribute("aria-valuemax", data.items.length);
  $("progress").setAttribute("aria-valuenow", done);
}

function result() {
  return { kun_ray_review: 1, review: data.review, mode: data.mode, reviewer: state.reviewer, votes: state.votes };
}

function download() {
  enter($("reviewer").value.trim());
  const text = JSON.stringify(result(), null, 1) + "\n";
  const link = element("a", undefined, {
    href: URL.createObjectURL(new Blob([text], { type: "application/json" })),
    download: `review-${data.review.slice(0, 8)}-${state.reviewer.replace(/[\\/:*?"<>|\s]+/g, "_") || "anonymous"}.json`,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  const left = data.items.length - numDone();
  notice(left ? `已导出，还有 ${left} 条没有评完。` : "已导出，请把文件交给组织者。");
}

async function take(file) {
  try {
    const found = JSON.parse(await file.text());
    if (found.review !== data.review) throw new Error("这个文件属于另一次评审。");
    if (!state.reviewer) enter((found.reviewer || "").trim());
    state.votes = { ...found.votes, ...state.votes };
    $("reviewer").value = state.reviewer;
    save();
    notice("");
    show();
  } catch (error) { notice(`不能导入：${error.message}`); }
}

document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "s") { event.preventDefault(); return event.repeat ? undefined : download(); }
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const typing = ["INPUT", "TEXTAREA"].includes(event.target.tagName);
  if (typing) { if (event.key === "Escape" || (event.key === "Enter" && event.target.tagName === "INPUT")) event.target.blur(); return; }
  const actions = {
    ArrowLeft: () => go(state.at - 1), ArrowRight: () => go(state.at + 1), n: goOpen, e: download, c: () => $("comment").focus(),
    ArrowUp: pairs ? null : () => { criterion = Math.max(0, criterion - 1); show(); },
    ArrowDown: pairs ? null : () => { criterion = Math.min(data.criteria.length - 1, criterion + 1); show(); },
  };
  const action = /^[1-9]$/.test(event.key) ? () => rate(Number(event.key)) : actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (action) event.preventDefault();
  if (action && !event.repeat) action();  // a key that is held would go on to items that nobody has read
});
$("previous").addEventListener("click", () => go(state.at - 1));
$("next").addEventListener("click", () => go(state.at + 1));
$("open").addEventListener("click", goOpen);
$("export").addEventListener("click", download);
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => $("file").files.length && take($("file").files[0]));
$("comment").addEventListener("input", () => change({ comment: $("comment").value }));
$("reviewer").addEventListener("input", () => notice(""));
$("reviewer").addEventListener("change", () => enter($("reviewer").value.trim()));
document.body.classList.toggle("criteria", !pairs);
$("keys").textContent = (pairs ? "1–4 评判" : "1–3 评分，↑ ↓ 换一项") + " · ← → 翻页 · N 下一条未评 · C 备注 · E 导出 · Esc 离开输入框";
load();
$("reviewer").value = state.reviewer;
state.at = Math.min(state.at, data.items.length - 1);
show();
