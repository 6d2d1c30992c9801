// The samples: filters, search, pages; a sample's body is made when it is opened.
const PER_PAGE = 25;
const ENDS = { eos: "end of sequence", stop: "stop string", length: "length limit" };
const { runs, gates, tasks, samples } = JSON.parse($("data").textContent);
const several = runs.length > 1;
const plain = (text) => (Array.isArray(text) ? text[0] + " … " + text[2] : text || "");
const answerText = (answer) => {
  if (answer.output !== undefined || answer.text === undefined) return answer.output;
  const [from, to] = answer.span || [0, Infinity];
  if (!Array.isArray(answer.text)) return answer.text.slice(from, to);
  const [head, leftOut, tail] = answer.text;
  if (from > head.length) return tail.slice(Math.max(0, from - head.length - leftOut), Math.max(0, to - head.length - leftOut));
  return [head.slice(from), leftOut, tail.slice(0, Math.max(0, to - head.length - leftOut))];
};
for (const sample of samples) {
  const texts = [sample.key, plain(sample.prompt)];
  for (const answer of sample.answers) {
    if (!answer) continue;
    answer.first = Object.values(answer.scores || {})[0];
    answer.verdict = answer.first === undefined ? "not scored" : answer.first === 1 ? "right" : "wrong";
    texts.push(plain(answerText(answer)));
  }
  sample.right = sample.answers.filter((answer) => answer?.verdict === "right").length;
  sample.wrong = sample.answers.filter((answer) => answer?.verdict === "wrong").length;
  sample.most = Math.max(...sample.answers.map((answer) => sum(Object.values(answer?.forwards || {}))));
  sample.search = texts.join("\n").toLowerCase();
}

const SCORES = { wrong: [several ? "wrong in any run" : "wrong", (s) => s.wrong > 0], right: [several ? "right in any run" : "right", (s) => s.right > 0] };
if (several) {
  SCORES.flipped = ["flipped: right in one, wrong in another", (s) => s.right > 0 && s.wrong > 0];
  SCORES.allwrong = ["wrong in every run", (s) => s.wrong > 0 && s.right === 0];
  const is = (sample, place, verdict) => sample.answers[place]?.verdict === verdict;
  runs.slice(1).forEach(({ mark }, n) => {
    SCORES[`lost${mark}`] = [`lost: right in ${runs[0].mark}, wrong in ${mark}`, (s) => is(s, 0, "right") && is(s, n + 1, "wrong")];
    SCORES[`gained${mark}`] = [`gained: wrong in ${runs[0].mark}, right in ${mark}`, (s) => is(s, 0, "wrong") && is(s, n + 1, "right")];
  });
}
const GATES = Object.fromEntries(gates.map((gate, n) => [gate, (sample) => sample.answers.some((answer) => answer?.gates?.includes(n))]));
const FILTERS = ["task", "score", "gate", "q"];
const matches = (sample) => {
  const task = tasks[sample.task];
  return (
    (!state.key || sample.key === state.key) &&
    (!state.task || task.name === state.task || task.owner === state.task) &&
    (!state.score || SCORES[state.score][1](sample)) &&
    (!state.gate || GATES[state.gate](sample)) &&
    sample.search.includes(state.q.toLowerCase())
  );
};

const block = (title, text, open = true) => {
  const box = make("details", undefined, "text");
  box.open = open;
  box.append(make("summary", Array.isArray(text) ? `${title}, without its middle` : title));
  const pre = make("pre");
  pre.tabIndex = 0;
  if (Array.isArray(text)) {
    const note = make("span", ` … ${count(text[1])} characters left out here … `, "note");
    pre.append(make("span", text[0]), note, make("span", text[2]));
  } else pre.textContent = text || "";
  if (!text) pre.append(make("span", "(empty)", "note"));
  box.append(pre);
  return box;
};
const choices = (sample, answer) => {
  const table = make("table", undefined, "choices");
  const values = answer.loglikelihoods; // what is not finite comes as its name
  const best = Math.max(...values.filter((value) => typeof value === "number"));
  table.setAttribute("aria-label", "Choices and their log-likelihoods");
  sample.choices.forEach((choice, place) => {
    const value = values[place];
    const row = table.insertRow();
    const name = make("th", choice.trim());
    name.scope = "row";
    const spread = answer.errors?.[place];
    const error = typeof spread === "number" ? ` ± ${spread.toFixed(3)}` : "";
    row.append(name, make("td", (typeof value === "number" ? value.toFixed(3) : value) + error));
    row.append(make("td", place === values.indexOf(best) ? "chosen" : ""));
  });
  return table;
};
const facts = (answer) => {
  const list = make("dl");
  const add = (name, value) => value && list.append(make("dt", name), make("dd", value));
  const kinds = Object.entries(answer.forwards || {});
  const total = sum(kinds.map(([, number]) => number));
  const mean = (values) => (sum(values) / values.length).toFixed(2);
  add("scores", Object.entries(answer.scores || {}).map(([name, value]) => `${name} = ${value}`).join("; "));
  add("prompt", `${answer.promptTokens ?? "?"} tokens` + (answer.cut ? `, ${answer.cut} cut from the left` : ""));
  if (answer.finish) add("answer", `${answer.tokens || 0} tokens, ended by ${ENDS[answer.finish] || answer.finish}`);
  add("thinking", answer.thinking);
  if (total) add("forwards", `${total} (${kinds.map(([kind, number]) => `${kind} ${number}`).join(", ")})` + (answer.tokens ? `, ${(answer.tokens / total).toFixed(2)} tokens per forward` : ""));
  if (answer.predicted?.length) {
    const accepted = answer.accepted?.length ? `, ${mean(answer.accepted)} accepted` : "";
    add("strides", `${answer.predicted.length} speculative steps; on average ${mean(answer.predicted)} predicted${accepted}`);
    add("accepted/predicted", answer.predicted.map((width, n) => `${answer.accepted?.[n] ?? "–"}/${width}`).join(" "));
  }
  return list;
};
const badge = (answer) => {
  const word = answer.verdict === "wrong" && answer.first !== 0 ? String(answer.first) : answer.verdict;
  const box = make("span", undefined, "badge " + answer.verdict.replace(" ", "-"));
  const sign = make("span", { right: "✓", wrong: "✗" }[answer.verdict] || "–", "sign");
  sign.ariaHidden = "true";
  box.append(sign, ` ${word}`);
  return box;
};
const answerOf = (sample, answer, place, viewers) => {
  const box = make("article", undefined, "answer");
  const name = several ? runs[place].mark : "";
  const head = make("h3");
  if (several) head.append(make("span", name, "mark"), ` ${runs[place].name} `);
  else head.append("Answer ");
  box.append(head);
  if (!answer) {
    box.append(make("p", "This run has no answer to it.", "soft"));
    return box;
  }
  head.append(badge(answer));
  if (answer.lost) box.append(make("p", `Failed: ${answer.lost}`, "warning"));
  if (answer.prompt) box.append(block("This run's own prompt", answer.prompt, false));
  if (answer.loglikelihoods) {
    const unit = answer.errors ? "nats, ± standard error" : "nats";
    box.append(make("p", `Choices and their log-likelihoods (${unit})`, "soft"), choices(sample, answer));
  } else if (answer.lengths !== undefined) {
    const replay = viewer(answer, name, sample.most);
    viewers.push(replay);
    box.append(replay.node);
    if (answer.output !== undefined) box.append(block("Answer", answer.output));
  } else {
    box.append(block("Output", answer.output));
    if (answer.raw) box.append(block("Output as written, thinking included", answer.raw, false));
    if (answer.finish) box.append(make("p", "Which forward wrote which token was not recorded in this run.", "soft"));
  }
  const extracted = Object.entries(answer.extracted || {});
  if (extracted.every(([, text]) => plain(text).length < 80 && !plain(text).includes("\n"))) {
    const list = make("dl");
    for (const [filter, text] of extracted)
      list.append(make("dt", filter === "none" ? "extracted" : `extracted, ${filter}`), make("dd", plain(text) || "nothing"));
    box.append(list);
  } else for (const [filter, text] of extracted) box.append(block(filter === "none" ? "Extracted" : `Extracted, ${filter}`, text, false));
  for (const result of answer.verdicts || []) box.append(make("p", "Its tests: " + result, "soft"));
  const more = make("details", undefined, "text");
  more.append(make("summary", "Scores, tokens and forwards"), facts(answer));
  box.append(more);
  return box;
};
const body = (sample) => {
  const box = make("div", undefined, "sample");
  const { shared } = tasks[sample.task];
  if (shared.length) box.append(block("Prompt, the beginning that all prompts of this task share", shared, false));
  box.append(block(shared.length ? "Prompt, its own part" : "Prompt", sample.prompt));
  box.append(block("Target", sample.target, plain(sample.target).length < 300));
  const viewers = [];
  const grid = make("div", undefined, "answers");
  grid.append(...sample.answers.map((answer, place) => answerOf(sample, answer, place, viewers)));
  if (viewers.length) box.append(legend());
  if (viewers.length > 1) box.append(race(viewers));
  box.append(grid);
  return box;
};
const entry = (sample) => {
  const item = make("li");
  const box = make("details");
  const head = make("summary");
  const target = plain(sample.target);
  head.append(make("span", sample.key, "key"));
  const badges = make("span", undefined, "badges");
  sample.answers.forEach((answer, place) => {
    if (!answer) return;
    if (several) badges.append(make("span", runs[place].mark, "mark"));
    badges.append(badge(answer));
  });
  head.append(badges);
  const first = sample.answers.find((answer) => answer);
  head.append(make("span", plain(answerText(first)).slice(0, 200).replace(/\s+/g, " ") || "(empty)", "preview"));
  if (target && target.length <= 24) head.append(make("span", "target " + target, "flag"));
  const [only] = sample.answers;
  if (!several && only.tokens) head.append(make("span", `${(only.tokens / sum(Object.values(only.forwards))).toFixed(1)} tokens/forward`, "rate"));
  const hit = new Set(sample.answers.flatMap((answer) => answer?.gates || []));
  for (const gate of hit) head.append(make("span", gates[gate], "flag"));
  box.append(head);
  box.addEventListener("toggle", () => box.open && box.children.length === 1 && box.append(body(sample)));
  box.open = state.open === "1" || state.key === sample.key;
  item.append(box);
  return item;
};

const show = () => {
  for (const name of FILTERS) {
    $(name).value = state[name];
    state[name] = $(name).value; // a choice that is none reads as no filter
  }
  const matching = samples.filter(matches);
  const pages = Math.max(1, Math.ceil(matching.length / PER_PAGE));
  const page = Math.min(pages, Math.max(1, parseInt(state.page, 10) || 1));
  state.page = String(page);
  const start = (page - 1) * PER_PAGE;
  const end = Math.min(matching.length, start + PER_PAGE);
  $("list").replaceChildren(...matching.slice(start, end).map(entry));
  $("list").start = start + 1;
  const only = state.key ? ` (only ${state.key}; clear the filters for the others)` : "";
  $("count").textContent = matching.length
    ? `${count(start + 1)}–${count(end)} of ${count(matching.length)} that match, of ${count(samples.length)} samples${only}`
    : `None of ${count(samples.length)} samples matches${only}.`;
  $("open").textContent = state.open === "1" ? "Close all on this page" : "Open all on this page";
  for (const button of document.querySelectorAll("[data-step]")) {
    const to = page + Number(button.dataset.step);
    button.disabled = to < 1 || to > pages;
  }
  for (const place of document.querySelectorAll(".place")) place.textContent = `page ${page} of ${pages}`;
  write();
};
const owners = new Map();
for (const task of tasks) owners.set(task.owner, [...(owners.get(task.owner) || []), task]);
for (const [owner, leaves] of owners) {
  const single = leaves.length === 1 && leaves[0].name === owner;
  $("task").append(new Option(single ? owner : `${owner} (all ${leaves.length} parts)`, owner));
  for (const leaf of single ? [] : leaves) $("task").append(new Option("\u2003" + leaf.name, leaf.name));
}
for (const [name, [words, fits]] of Object.entries(SCORES)) $("score").append(new Option(`${words} (${count(samples.filter(fits).length)})`, name));
for (const [name, fits] of Object.entries(GATES)) {
  const hits = samples.filter(fits).length;
  if (hits) $("gate").append(new Option(`${name} (${count(hits)})`, name));
}
let wait;
for (const name of FILTERS)
  $(name).addEventListener("input", () => {
    clearTimeout(wait);
    wait = setTimeout(() => { Object.assign(state, { [name]: $(name).value, page: "1", key: "" }); show(); }, name === "q" ? 150 : 0);
  });
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("reset").addEventListener("click", () => { state = { ...DEFAULTS, tab: state.tab, theme: state.theme }; show(); });
$("open").addEventListener("click", () => { state.open = state.open === "1" ? "" : "1"; show(); });
for (const button of document.querySelectorAll("[data-step]"))
  button.addEventListener("click", () => {
    state.page = String(Number(state.page) + Number(button.dataset.step));
    show();
    $("samples").scrollIntoView();
  });
const follow = () => {
  const { theme } = state;
  read();
  state.theme ||= theme; // a link on the page names none
  showTheme();
  showTab();
  show();
};
addEventListener("hashchange", follow);
follow();
