// Every text from the server is set by textContent: it can never become markup.
const $ = (id) => document.getElementById(id);
const BREAK = 30 * 60 * 1000;
let state = {}, waiting = null, ranking = [], side = null, shownAt = 0, busy = false, begun = Date.now(), count = 0;

function element(name, text, className = "") {
  return Object.assign(document.createElement(name), {textContent: text, className});
}

async function call(path, body) {
  for (;;) {
    busy ||= Boolean(body);
    try {
      const headers = {"Content-Type": "application/json", "X-CSRF-Token": state.csrf};
      const response = await fetch(path, body && {method: "POST", body: JSON.stringify(body), headers});
      const found = await response.json();
      $("problem").textContent = response.ok ? "" : found.error;
      if (body) busy = response.status === 507; // the disk is full
      if (response.status !== 507) return response.ok ? found : null;
    } catch {
      if (body) $("problem").textContent = "The server does not answer. Your answer is sent again until it is saved.";
    }
    if (!body) return null;
    await new Promise((resolve) => setTimeout(resolve, 1500)); // then the same again, with the same nonce
  }
}

// What can be done now, as [key, another key, label, choice].
const actions = () => waiting ? [["Enter", "", "Continue", "continue"]] : side ? state.item.strengths : state.actions;

function button([key, other, label, choice]) {
  const made = element("button", `${label} `, ["left", "right", "continue", "text"].includes(choice) ? "main" : "");
  const keys = [key, other].filter(Boolean).map((k) => k === " " ? "Space" : k[0].toUpperCase() + k.slice(1));
  made.append(element("kbd", keys.join(" / ")));
  made.disabled = choice === "undo" ? !state.latest && !ranking.length && !side : ranking.includes(choice);
  made.addEventListener("click", () => act(choice));
  return made;
}

function paint() {
  const item = state.item, at = state.progress;
  $("question").hidden = !item;
  $("title").textContent = state.title;
  const pace = count > 4 ? `, ${(60000 * count / (Date.now() - begun)).toFixed(1)} a minute` : "";
  $("progress").textContent = `${at.mine} by you${pace}; ${at.all} of ${at.wanted} in all`;
  [$("bar").max, $("bar").value] = [Math.max(1, at.wanted), at.all];
  $("calibration").hidden = !item?.calibration;
  $("answers").replaceChildren(...actions().map(button));
  $("answers").className = item?.kind ?? "";
  if (!item) return;
  $("prompt").replaceChildren(...item.messages.map(([role, content]) => {
    const message = element("div", "", "message");
    message.append(element("b", role), element("div", content, "text"));
    return message;
  }), ...(item.messages.length ? [] : [element("div", item.prompt, "text")]));
  $("texts").replaceChildren(...item.texts.map((text, i) => {
    const place = ranking.indexOf(i), chosen = place >= 0 || side === ["left", "right"][i];
    const pane = element("section", "", chosen ? "option picked" : "option"), body = element("div", text, "text");
    const name = item.kind === "pair" ? ["Left", "Right"][i] : `Text ${i + 1}`;
    [body.dir, pane.tabIndex, pane.ariaLabel] = ["auto", 0, name];
    pane.append(element("h2", name + (place >= 0 ? `: place ${place + 1}` : "")), body);
    return pane;
  }));
  $("write").hidden = item.kind !== "write";
}

function take(found) {
  state = {...state, ...found};
  [waiting, ranking, side, shownAt] = [null, [], null, performance.now()];
  $("draft").value = "";
  paint();
  $(state.item?.kind === "write" ? "draft" : "question").focus({preventScroll: true});
  $("status").textContent = found.said;
}

async function send(choice, more = {}) {
  const ms = performance.now() - shownAt;
  const found = await call("/api/answer", {nonce: state.item.nonce, choice, ms, ...more});
  if (!found) return;
  count += 1;
  if (Date.now() - begun > BREAK) {
    found.said += " You have labelled for half an hour: a short break helps.";
    [begun, count] = [Date.now(), 0];
  }
  if (!found.told) take(found);
  else [waiting, $("status").textContent] = [found, found.said];
  if (waiting) $("answers").replaceChildren(...actions().map(button));
  if (count % 5 === 0) figures();
}

async function act(choice) {
  const item = state.item;
  if (choice === "help") return $("help").open ? $("help").close() : $("help").showModal();
  if (busy) return;
  if (waiting) return choice === "continue" ? take({...waiting, said: ""}) : undefined;
  if (choice === "undo") {
    const begunHere = ranking.length || side;
    [ranking, side] = [[], null];
    if (begunHere || !state.latest) return paint();
    const found = await call("/api/undo", {event: state.latest});
    return found && take(found);
  }
  if (side) return send(side, choice === "skip" ? {} : {strength: choice});
  if (item.strengths.length && ["left", "right"].includes(choice)) {
    side = choice;
    $("status").textContent = "By how much? Space: I cannot say.";
    return paint();
  }
  if (choice === "text") return $("draft").value.trim() ? send("text", {text: $("draft").value}) : undefined;
  if (typeof choice !== "number") return send(choice);
  if (!ranking.includes(choice)) ranking.push(choice);
  const rest = item.texts.map((_, i) => i).filter((i) => !ranking.includes(i));
  return rest.length > 1 ? paint() : send("ranking", {ranking: [...ranking, ...rest]});
}

async function figures() {
  const found = await call("/api/stats");
  if (!found) return;
  $("owner").hidden = !found.labellers.length;
  $("figures").replaceChildren(...found.figures.flatMap(([name, text]) => [element("dt", name), element("dd", text)]));
  $("labellers").replaceChildren(...found.labellers.map((cells, i) => {
    const row = element("tr", "");
    row.append(...cells.map((cell) => element(i ? "td" : "th", cell)));
    return row;
  }));
}

document.addEventListener("keydown", (event) => {
  const {key, target} = event, controls = event.ctrlKey || event.metaKey, writing = target === $("draft");
  if (writing && controls && key === "Enter") act("text");
  if (writing || controls || event.altKey || event.repeat || ($("help").open && key !== "?")) return;
  if (target.closest("button, summary") && [" ", "Enter"].includes(key)) return; // there, they press the button
  const found = actions().find(([first, other]) => [first.toLowerCase(), other].includes(key.toLowerCase()));
  if (!found) return;
  event.preventDefault();
  act(found[3]);
});
$("close").addEventListener("click", () => $("help").close());
const first = await call("/api/state");
if (first) {
  $("name").textContent = first.name;
  $("guidelines").hidden = !first.guidelines;
  $("guideline-text").textContent = first.guidelines;
  $("guidelines").open = matchMedia("(min-width: 901px)").matches;
  take(first);
  figures();
}
