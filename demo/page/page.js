"use strict";
// Text from files and servers goes into `textContent`, never into markup.

const AT_ONCE = 4; // pictures on their way to the server
const ROUTES = {
  cheap: "cheap rung",
  full: "escalated to the full rung",
  degraded: "escalated, but the full rung failed: cheap rung’s answer",
};
const waiting = [];
const scored = []; // {card, score, threshold} of every answer with a score, for one common scale
let underway = 0;
let maxBytes = Infinity;

const byId = (id) => document.getElementById(id);
const number = (value) => String(Number(value.toPrecision(4)));

function show(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("this page’s own program does not answer; start python -m demo page again");
  }
  const found = await answer.json();
  if (found.error) throw new Error(found.error);
  return found;
}

function add(file) {
  const card = byId("card").content.firstElementChild.cloneNode(true);
  const image = card.querySelector("img");
  card.querySelector("h2").textContent = file.name || "a pasted picture";
  image.alt = file.name || "a pasted picture";
  image.onerror = () => {
    image.hidden = true;
    image.parentElement.classList.add("none");
  };
  image.onload = () => URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  byId("answers").prepend(card);
  waiting.push(() => answer(card, file));
  next();
}

function next() {
  while (underway < AT_ONCE && waiting.length) {
    underway += 1;
    waiting.shift()().finally(() => {
      underway -= 1;
      next();
    });
  }
}

async function picture(file, policy) {
  if (file.size > maxBytes) {
    throw new Error(`the picture has more than ${maxBytes.toLocaleString("en")} bytes; send a smaller file`);
  }
  let body;
  try {
    body = await file.arrayBuffer(); // read here, so that a folder or a lost file is told from a lost server
  } catch {
    throw new Error("the browser cannot read it; is it a folder?");
  }
  const headers = { "Content-Type": "application/octet-stream" };
  return ask(`ask/${policy}`, { method: "POST", headers, body });
}

async function answer(card, file) {
  const state = card.querySelector(".state");
  show(state, "asking …");
  try {
    const found = await picture(file, "auto");
    fill(card, found, file);
  } catch (error) {
    show(card.querySelector(".words > .error"), error.message);
  } finally {
    show(state, "");
  }
}

function fill(card, found, file) {
  const area = card.querySelector(".found");
  const route = area.querySelector(".route");
  route.textContent = ROUTES[found.route];
  route.classList.add(found.route);
  area.querySelector(".time").textContent = `in ${found.time_ms.toFixed(0)} ms`;
  outputs(area.querySelector(".outputs"), found);
  const said = area.querySelector(".said");
  said.textContent = sentence(found);
  area.querySelector(".scale").setAttribute("aria-label", said.textContent);
  const drawn = found.route === "full" && found.score !== null && found.score <= found.threshold;
  show(area.querySelector(".note"), found.threshold !== null && drawn
    ? "Below the threshold, and yet answered by the full rung: drawn for the audit, or the threshold has just changed."
    : "");
  if (found.score === null) {
    area.querySelectorAll(".track, .legend span").forEach((mark) => (mark.hidden = true));
  } else {
    scored.push({ card, score: found.score, threshold: found.threshold });
    place();
  }
  const button = area.querySelector(".ask");
  button.hidden = found.route === "full";
  button.onclick = () => compare(card, file, found, button);
  area.hidden = false;
}

function sentence({ score, threshold }) {
  if (score === null) return "not scored: this server sends every picture to the full rung";
  if (threshold === null) return `score ${number(score)}; the threshold is not known here`;
  const side = score > threshold ? "above" : "not above";
  return `score ${number(score)}, ${side} the threshold ${number(threshold)}`;
}

// All pictures on one scale, from the least to the largest number seen, with room at both ends.
function place() {
  const seen = scored.flatMap(({ score, threshold }) => (threshold === null ? [score] : [score, threshold]));
  const low = Math.min(0, ...seen);
  const span = (Math.max(...seen) - low || 1) * 1.1;
  const at = (value) => `${(100 * (value - low)) / span}%`;
  for (const { card, score, threshold } of scored) {
    const dot = card.querySelector(".track .score");
    dot.style.left = at(score);
    const known = threshold !== null;
    card.querySelector(".track").classList.toggle("unknown", !known);
    card.querySelector(".track .threshold").hidden = !known;
    if (!known) continue;
    dot.classList.toggle("above", score > threshold);
    card.querySelector(".track .threshold").style.left = at(threshold);
    card.querySelector(".track .low").style.width = at(threshold);
  }
}

function outputs(list, { kind, outputs: found, norm }) {
  const rows = found.map(({ name, value }) => {
    const row = document.createElement("li");
    const [title, end] = ["name", "value"].map((name) => {
      const cell = document.createElement("span");
      cell.className = name;
      return cell;
    });
    title.textContent = name;
    end.textContent = kind === "value" ? number(value) : `${(100 * value).toFixed(1)} %`;
    const bar = document.createElement("span");
    if (kind !== "value") {
      bar.className = "bar";
      bar.append(document.createElement("span"));
      bar.firstChild.style.width = `${100 * value}%`;
    }
    row.append(title, bar, end);
    return row;
  });
  list.replaceChildren(...rows);
  if (rows.length) return;
  const row = document.createElement("li");
  row.textContent = kind === "labels" ? "no label" : `an embedding of length ${number(norm)}; the model has no classes`;
  list.append(row);
}

async function compare(card, file, cheap, button) {
  const area = card.querySelector(".full");
  const failed = card.querySelector(".words > .error");
  button.disabled = true;
  try {
    const found = await picture(file, "high");
    area.querySelector(".time").textContent = `in ${found.time_ms.toFixed(0)} ms`;
    outputs(area.querySelector(".outputs"), found);
    const same = found.outputs[0]?.name === cheap.outputs[0]?.name;
    const told = cheap.kind === "classes" && found.kind === "classes";
    show(area.querySelector(".verdict"), told ? `It names ${same ? "the same class" : "another class"}.` : "");
    area.hidden = false;
    button.hidden = true;
    show(failed, "");
  } catch (error) {
    button.disabled = false;
    show(failed, error.message);
  }
}

function take(list) {
  const files = [...(list ?? [])];
  show(byId("notice"), files.length ? "" : "That holds no picture: save it to a file first, and drop that.");
  files.forEach(add);
}

const file = byId("file");
file.addEventListener("change", () => {
  if (file.files.length) take(file.files);
  file.value = ""; // so that the same picture can be chosen again
});
// Anywhere on the page: what misses the box would otherwise take the page's place.
addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  take(event.dataTransfer.files);
});
addEventListener("paste", (event) => take(event.clipboardData.files));

ask("server").then((found) => {
  maxBytes = found.max_bytes;
  const threshold = found.threshold === null ? "no threshold known" : `threshold ${number(found.threshold)}`;
  show(byId("server"), `${found.model} at ${found.url}, Triton ${found.version}; ${threshold}`);
}).catch((error) => show(byId("notice"), error.message));
