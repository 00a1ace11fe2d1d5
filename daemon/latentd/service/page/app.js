// The page at /: asks and teaches through the same HTTP API as everyone, and shows /v1/status every two seconds while it is seen.
// Names of classes and files come from people: they only ever become text nodes.
"use strict";

const POLL_MS = 2000;
const SOON_MS = 400; // while something that was taught waits for the learner
const MOST_CARDS = 48;
const ASKED_AGAIN = 12; // pictures that are asked again after a lesson, newest first
const $ = (id) => document.getElementById(id);

function make(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content);
  return element;
}

function bar(ratio) {
  const element = make("div", "bar");
  element.setAttribute("aria-hidden", "true");
  element.style.setProperty("--part", (100 * Math.min(1, Math.max(0, ratio || 0))).toFixed(1));
  return element;
}

// --- the API -------------------------------------------------------------------------------------------------------

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const ended = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
const sentence = (problem) => [problem.detail || problem.title, problem.hint].filter(Boolean).map(ended).join(" ");

/** The JSON answer; throws an Error whose message is the problem's detail and hint. A full queue (503, Retry-After) is waited for. */
async function call(method, path, body, headers = {}) {
  for (let tries = 0; ; tries++) {
    let response, answer;
    try {
      response = await fetch(path, { method, body, headers });
      answer = await response.json();
    } catch {
      throw new Error("latentd does not answer. Is it still running on this device?");
    }
    if (response.ok) return answer;
    const wait = Number(response.headers.get("Retry-After"));
    if (response.status !== 503 || !wait || tries === 5) throw Object.assign(new Error(sentence(answer)), { status: response.status });
    await pause(1000 * Math.min(wait, 10));
  }
}

function form(cards, name) {
  const data = new FormData();
  for (const card of cards) data.append("image", card.file, "image");
  if (name !== undefined) data.append("label", name);
  return data;
}

// --- pictures ------------------------------------------------------------------------------------------------------

let cards = []; // newest first
let limits = { max_images: 16, max_body_bytes: 64 << 20 };
const waiting = []; // cards to be asked, two at a time
let asking = 0;

function show(file) {
  const root = $("card").content.firstElementChild.cloneNode(true);
  const part = (selector) => root.querySelector(selector);
  const card = { file, root, url: URL.createObjectURL(file), sample: null, label: null, decision: null, pending: false };
  Object.assign(card, { answer: part(".answer"), bars: part(".bars"), said: part(".said"), input: part("input") });
  part("img").src = card.url;
  part("img").alt = `Picture ${file.name}`;
  card.input.setAttribute("aria-label", `What is on ${file.name}?`);
  part(".close").setAttribute("aria-label", `Take ${file.name} away`);
  part(".close").addEventListener("click", () => remove(card));
  part("form").addEventListener("submit", (event) => {
    event.preventDefault();
    teach([card], card.input.value);
  });
  cards.unshift(card);
  $("cards").prepend(root);
  ask(card);
}

function remove(card) {
  cards = cards.filter((other) => other !== card);
  URL.revokeObjectURL(card.url);
  card.root.remove();
  gather();
}

function add(files) {
  const most = [...files].slice(0, MOST_CARDS);
  for (const file of most) show(file);
  for (const card of cards.slice(MOST_CARDS)) remove(card);
  if (files.length > most.length) $("news").textContent = `Only the first ${MOST_CARDS} pictures were taken.`;
  gather();
}

const useful = (card) => !card.root.classList.contains("useless");
const nameless = (card) => !card.label && useful(card);

/** The form that names all untaught pictures at once. */
function gather() {
  const untaught = cards.filter(nameless);
  $("all").hidden = cards.length < 2;
  $("all-text").textContent = untaught.length ? `${pictures(untaught.length)} not named yet` : "All are named";
  for (const element of $("all").querySelectorAll("input, button:not([type])")) element.disabled = !untaught.length;
}

function ask(card) {
  card.root.classList.add("busy");
  if (!card.decision) card.answer.textContent = "Looking…";
  if (!waiting.includes(card)) waiting.push(card);
  next();
}

async function next() {
  if (asking === 2 || !waiting.length) return;
  asking++;
  const card = waiting.shift();
  try {
    await readable(card.file);
    const answer = await call("POST", "/v1/classify?top_k=4", form([card]));
    answered(card, answer.results[0]);
  } catch (error) {
    failed(card, error);
    if (!card.decision) card.answer.textContent = card.file.name;
    card.root.classList.toggle("useless", error.status > 400 && error.status < 500);
    gather();
  } finally {
    card.root.classList.remove("busy");
    asking--;
    next();
  }
}

/** A folder that was dropped, or a file that is gone, would look like a daemon that does not answer. */
async function readable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw Object.assign(new Error("This can't be read. Drop picture files, not folders."), { status: 422 });
  }
}

function answered(card, result) {
  if (result.problem) throw new Error(sentence(result.problem));
  const before = card.decision;
  card.decision = result.decision;
  const known = result.decision !== "unknown";
  card.answer.replaceChildren(known ? make("bdi", "", result.decision) : result.predictions.length ? "Not sure" : "Nothing is taught yet");
  if (before && before !== result.decision) card.answer.append(make("small", "", "before: ", make("bdi", "", before === "unknown" ? "not sure" : before)));
  card.bars.replaceChildren(...result.predictions.map((each) => make("li", "", choice(card, each))));
  card.input.placeholder = result.predictions.length ? "It is something else…" : "It is a…";
}

/** One predicted class as a button: a click says that this is what the picture shows. */
function choice(card, { label, probability }) {
  const share = `${(100 * probability).toFixed(0)} %`;
  const button = make("button", "", make("bdi", "label", label), bar(probability), make("span", "number", share));
  button.type = "button";
  button.title = `Teach that it is ${label}`;
  button.setAttribute("aria-label", `${label}, ${share}. Teach that ${card.file.name} is ${label}`);
  button.setAttribute("aria-pressed", String(label === card.label));
  button.addEventListener("click", () => teach([card], label));
  return button;
}

function failed(card, error) {
  card.said.textContent = error.message;
  card.said.className = "said bad";
}

// --- teaching ------------------------------------------------------------------------------------------------------

/** Teaches the cards under one name, in requests that fit; one picture that can't be used does not stop the others. */
async function teach(chosen, typed) {
  const name = typed.trim();
  if (!name) return;
  for (const card of chosen) lock(card, true);
  for (const group of groups(chosen)) {
    try {
      await lesson(group, name);
    } catch (error) {
      for (const card of group) failed(card, error);
    }
  }
  for (const card of chosen) lock(card, false);
  gather();
  for (const card of new Set([...chosen, ...cards.filter(useful).slice(0, ASKED_AGAIN)])) if (cards.includes(card)) ask(card);
  poll();
}

function* groups(chosen) {
  let group = [], bytes = 0;
  for (const card of chosen) {
    const size = card.file.size + 1024;
    if (group.length && (group.length === limits.max_images || bytes + size > limits.max_body_bytes)) {
      yield group;
      group = [];
      bytes = 0;
    }
    group.push(card);
    bytes += size;
  }
  if (group.length) yield group;
}

async function lesson(group, name) {
  if (group.length === 1 && group[0].sample && (await corrected(group[0], name))) return;
  const answer = await call("POST", "/v1/learn", form(group, name), { Prefer: "wait=5" });
  group.forEach((card, index) => learned(card, answer.results[index], name));
}

/** Corrects the label of a picture that was taught before. False where its latent is kept no more: then it is taught anew. */
async function corrected(card, name) {
  const path = `/v1/samples/${encodeURIComponent(card.sample)}/label`;
  try {
    const sample = await call("PUT", path, JSON.stringify({ label: name }), { "Content-Type": "application/json" });
    learned(card, { ...sample, state: "queued" }, name);
    return true;
  } catch (error) {
    if (error.status !== 409 && error.status !== 404) throw error;
    return false;
  }
}

function learned(card, result, name) {
  if (result.problem) return failed(card, new Error(sentence(result.problem)));
  const texts = {
    duplicate: "This picture is almost the same as one you taught before; it was skipped.",
    learned: `Learned as ${name}.`,
    rejected: "It was stored, but could not be learned.",
  };
  card.sample = result.duplicate_of || result.sample_id;
  card.label = result.label || name;
  card.pending = result.state === "queued";
  card.said.className = "said";
  card.said.textContent = texts[result.state] || `Stored as ${name}; it will be learned in a moment.`;
  card.input.value = "";
}

/** The learner has caught up with a picture that was only stored when its answer came. */
function caughtUp(card) {
  card.pending = false;
  card.said.textContent = `Learned as ${card.label}.`;
  ask(card);
}

function lock(card, locked) {
  card.root.classList.toggle("busy", locked);
  for (const element of card.root.querySelectorAll("input, button:not(.close)")) element.disabled = locked;
  if (locked) {
    card.said.className = "said";
    card.said.textContent = "Teaching…";
  }
}

// --- status --------------------------------------------------------------------------------------------------------

const percent = (ratio) => `${(100 * ratio).toFixed(0)} %`;
const count = (number) => Number(number).toLocaleString("en");
const pictures = (number) => `${count(number)} ${number === 1 ? "picture" : "pictures"}`;
const joules = (energy) => (energy < 0.1 ? `${(1000 * energy).toFixed(1)} mJ` : energy < 10000 ? `${energy.toFixed(2)} J` : `${(energy / 1000).toFixed(1)} kJ`);

function bytes(size) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  for (; size >= 1024 && unit < 3; unit++) size /= 1024;
  return `${unit ? size.toFixed(1) : size} ${units[unit]}`;
}

function facts(list, rows) {
  $(list).replaceChildren(...rows.flatMap(([name, value, more, part]) => {
    const cells = [make("dt", "", name), make("dd", "", value)];
    if (more) cells.push(make("dd", "more", more, ...(part === undefined ? [] : [bar(part)])));
    return cells;
  }));
}

function score(found) {
  if (found.value === null) return ["unknown"];
  return [percent(found.value), `${percent(found.low)} to ${percent(found.high)}, by ${pictures(found.count)}`];
}

function energy(found) {
  if (found.meter.reason !== null) return ["unavailable", found.meter.reason];
  const each = found.activities.classify.per_item_j;
  const power = found.meter.power_w;
  const parts = [power !== null && `${power.toFixed(1)} W now`, each !== null && `${joules(each)} a picture`, found.quality, found.source];
  return [found.energy_j === null ? "unknown" : joules(found.energy_j), parts.filter(Boolean).join(", ")];
}

function learner(found) {
  const lag = found.lag_samples ? `${count(found.lag_samples)} waiting, ${found.lag_s.toFixed(0)} s behind` : null;
  return [found.state, [found.reason, lag].filter(Boolean).join("; ") || "nothing waits"];
}

function doing(status) {
  const { engine, memory } = status;
  const used = memory.slots ? memory.used / memory.slots : 0;
  const hot = Object.entries(status.temperatures_c).filter(([, value]) => value !== null);
  facts("doing", [
    ["Engine", engine.name, `${engine.backbone.name}, ${engine.image_size} px`],
    ["Learner", ...learner(status.learner)],
    ["Energy", ...energy(status.energy)],
    ["Replay memory", `${count(memory.used)} of ${count(memory.slots)}`, `${bytes(memory.used_bytes)} of ${bytes(memory.budget_bytes)}, ${memory.codec}${memory.tokens ? `; tokens of ${count(memory.tokens.used)}` : ""}`, used],
    ["Temperature", hot.length ? `${Math.max(...hot.map(([, value]) => value)).toFixed(0)} °C` : "unavailable", hot.map(([name, value]) => `${name} ${value.toFixed(0)}`).join(", ")],
    ["Version", count(status.version), `latentd ${status.latentd}`],
  ]);
  $("attempts").replaceChildren(...engine.attempts.map((tried) => make("li", "", make("b", "", `${tried.engine}: ${tried.state}`), tried.reason)));
}

function known(found) {
  $("names").replaceChildren(...found.map((each) => Object.assign(make("option"), { value: each.name })));
  $("classes").replaceChildren(...found.map((each) => {
    const right = each.holdout_accuracy;
    const seen = right && right.value !== null;
    const label = make("bdi", "label", each.name);
    label.title = each.name;
    return make("li", "", label, make("span", "number", `${count(each.samples)}${seen ? `, ${percent(right.value)} of ${count(right.count)} right` : ""}`), bar(seen ? right.value : 0));
  }));
}

/** A row for the classes whose new pictures look less like them than the old ones; none while there is no such class. */
function drifting(classes) {
  const names = classes.filter((each) => each.drift && each.drift.drifting).map((each) => each.name);
  return names.length ? [["Pictures that look different now", count(names.length), names.join(", ")]] : [];
}

/** The line at the top; written only when it changes, because screen readers read it out. */
function pulse(text, mood) {
  if ($("pulse").textContent !== text) $("pulse").textContent = text;
  $("pulse").className = `pulse ${mood}`;
}

let seen = ""; // what the list of classes was last fetched for
let timer = 0;

async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  const pending = cards.filter((card) => card.pending); // before asking: the answer must be newer than what was taught
  try {
    const status = await call("GET", "/v1/status");
    const { readiness, accuracy, learner: study } = status;
    if (study.watermark_seq >= status.journal.head_seq) pending.forEach(caughtUp);
    pulse(readiness.ready ? "Ready" : `Not ready: ${readiness.reason}`, readiness.ready ? "good" : "");
    $("knows").textContent = status.classes ? `${count(status.classes)} ${status.classes === 1 ? "class" : "classes"} from ${pictures(status.samples)}` : "Nothing yet. Drop a picture and name it.";
    facts("accuracy", [
      ["On pictures kept apart", ...score(accuracy.holdout)],
      ["On new ones, before learning", ...score(accuracy.prequential_recent)],
      ...drifting(accuracy.per_class),
    ]);
    doing(status);
    const now = [status.classes, status.samples, status.version].join();
    if (now !== seen) {
      known((await call("GET", "/v1/classes")).classes);
      seen = now;
    }
  } catch (error) {
    pulse(error.message, "bad");
  }
  clearTimeout(timer);
  timer = setTimeout(poll, cards.some((card) => card.pending) ? SOON_MS : POLL_MS);
}

// --- hands ---------------------------------------------------------------------------------------------------------

for (const id of ["choose", "camera"]) {
  $(id).addEventListener("change", (event) => {
    add(event.target.files);
    event.target.value = "";
  });
}
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
addEventListener("dragleave", (event) => event.relatedTarget || $("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  add(event.dataTransfer.files);
});
addEventListener("paste", (event) => event.clipboardData.files.length && add(event.clipboardData.files));
$("all").addEventListener("submit", (event) => {
  event.preventDefault();
  teach(cards.filter(nameless), $("all-name").value);
  $("all-name").value = "";
});
$("clear").addEventListener("click", () => [...cards].forEach(remove));
document.addEventListener("visibilitychange", poll);

call("GET", "/v1/info").then((info) => { limits = info.limits; }).catch(() => {});
poll();
