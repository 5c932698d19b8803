"use strict";

// The look: as the system has it, or light or dark by the switch, which is remembered where that is allowed.
(() => {
  const looks = { "": "automatic", light: "light", dark: "dark" };
  const order = Object.keys(looks);
  const button = document.getElementById("look");
  const root = document.documentElement;
  const show = (look) => {
    if (look) root.dataset.look = look;
    else delete root.dataset.look;
    button.textContent = `Colours: ${looks[look]}`;
  };
  let look = "";
  try {
    look = localStorage.getItem("sparseprune-look") || "";
  } catch { /* a page from a file may have no storage */ }
  show(look in looks ? look : "");
  button.hidden = false;
  button.addEventListener("click", () => {
    const next = order[(order.indexOf(root.dataset.look || "") + 1) % order.length];
    show(next);
    try {
      localStorage.setItem("sparseprune-look", next);
    } catch { /* then the next page begins anew */ }
  });
})();

// Tables: each can be sorted; a long one can be searched as well, and its rows chosen by what they have in common.
const SHORT = 8;

function element(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const valueOf = (text) => {
  const number = Number(text.replace(/,/g, ""));
  return text.trim() !== "" && Number.isFinite(number) ? number : null;
};

function compare(one, other) {
  const [a, b] = [valueOf(one), valueOf(other)];
  if (a !== null && b !== null) return a - b;
  if (a !== null || b !== null) return a === null ? -1 : 1;
  return one.localeCompare(other, "en", { numeric: true });
}

function equip(table) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, texts: [...row.cells].map((cell) => cell.textContent) }));
  heads.forEach((head, column) => {
    const numeric = rows.some(({ texts }) => valueOf(texts[column]) !== null);
    for (const { row } of rows) {
      const cell = row.cells[column];
      cell.dataset.title = heads[column].textContent;
      cell.classList.toggle("word", !numeric);
    }
    head.classList.toggle("word", !numeric);
    if ("aside" in head.dataset) for (const cell of [head, ...rows.map(({ row }) => row.cells[column])]) cell.hidden = true;
  });
  heads.forEach((head, column) => {
    const button = element("button", { type: "button", textContent: head.textContent });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const sorted = [...rows].sort((a, b) => sign * compare(a.texts[column], b.texts[column]));
      body.append(...sorted.map(({ row }) => row));
    });
  });
  if (rows.length > SHORT) choose(table, heads, rows);
}

function choose(table, heads, rows) {
  const search = element("input", { type: "search", placeholder: "Search ( / )" });
  search.setAttribute("aria-label", "Search the table");
  const output = element("output");
  const selects = new Map();
  const controls = element("div", { className: "controls" }, [search]);
  const scroll = element("div", { className: "scroll", tabIndex: 0 });
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", table.caption ? table.caption.textContent : "Table");
  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { row, texts } of rows) {
      const line = texts.join(" ").toLowerCase();
      const fits = [...selects].every(([column, select]) => !select.value || texts[column] === select.value);
      row.hidden = !(fits && words.every((word) => line.includes(word)));
      shown += row.hidden ? 0 : 1;
    }
    output.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
  };
  heads.forEach((head, column) => {
    if (!("choice" in head.dataset)) return;
    const values = [...new Set(rows.map(({ texts }) => texts[column]))].sort(compare);
    if (values.length < 2) return;
    const options = [element("option", { value: "", textContent: `every ${head.textContent}` })];
    options.push(...values.map((value) => element("option", { value, textContent: value })));
    const select = element("select", {}, options);
    select.setAttribute("aria-label", `Only rows of this ${head.textContent}`);
    select.addEventListener("change", apply);
    selects.set(column, select);
    controls.append(select);
  });
  controls.append(output);
  search.addEventListener("input", apply);
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    search.value = "";
    apply();
  });
  table.before(controls, scroll);
  scroll.append(table);
  table.find = (text) => {
    for (const select of selects.values()) select.value = "";
    search.value = text;
    apply();
    search.scrollIntoView({ block: "center" });
  };
  apply();
}

document.querySelectorAll("table").forEach(equip);
document.addEventListener("keydown", (event) => {
  const typing = event.target instanceof Element && event.target.closest("input, select, textarea");
  const search = document.querySelector("main > section input[type=search]");
  if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || !search) return;
  event.preventDefault();
  search.focus();
});

// Marks of drawings: what a place stands for beside the pointer, or by arrow keys; a click finds it in the table.
const tip = document.getElementById("tip");

function tell(mark) {
  tip.textContent = mark.getAttribute("aria-label");
  tip.hidden = false;
  const box = mark.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(4, box.left + box.width / 2 - width / 2), innerWidth - width - 4);
  const above = box.top - height - 6;
  tip.style.transform = `translate(${left}px, ${above > 4 ? above : box.bottom + 6}px)`;
}

const untell = () => { tip.hidden = true; };

function nearest(marks, from, key) {
  const middle = (mark) => {
    const box = mark.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  };
  const [x, y] = middle(from);
  const [dx, dy] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[key];
  let best = null;
  let least = Infinity;
  for (const mark of marks) {
    const [u, v] = middle(mark);
    const along = (u - x) * dx + (v - y) * dy;
    const aside = Math.abs((u - x) * dy) + Math.abs((v - y) * dx);
    if (along > 0.5 && along + 3 * aside < least) [best, least] = [mark, along + 3 * aside];
  }
  return best;
}

function find(mark) {
  const table = document.querySelector("main > section table");
  if (mark.dataset.name && table && table.find) table.find(mark.dataset.name.replace(/\*/g, " "));
}

for (const group of document.querySelectorAll(".marks")) {
  const marks = [...group.children];
  marks[0].setAttribute("tabindex", "0");
  for (const mark of marks) {
    mark.addEventListener("pointerenter", () => tell(mark));
    mark.addEventListener("pointerleave", untell);
    mark.addEventListener("focus", () => tell(mark));
    mark.addEventListener("blur", untell);
    mark.addEventListener("click", () => find(mark));
  }
  group.addEventListener("keydown", (event) => {
    if (event.key === "Enter") find(event.target);
    if (event.key === "Escape") untell();
    if (!event.key.startsWith("Arrow")) return;
    event.preventDefault();
    const next = nearest(marks, event.target, event.key);
    if (!next) return;
    event.target.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  });
}
document.addEventListener("scroll", untell, true);
