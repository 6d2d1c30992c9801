// The trace viewer: an answer's tokens, tinted by how many were written in the same forward, and replayed on demand.
const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const STEP = 150; // milliseconds a forward, for every run alike: what writes more a forward is done sooner
const still = matchMedia("(prefers-reduced-motion: reduce)");
const level = (width) => 1 + [2, 3, 5, 9].filter((least) => width >= least).length;
const LEVELS = ["1", "2", "3–4", "5–8", "9+"];
const sum = (values) => values.reduce((all, value) => all + value, 0);

const unpack = (text) => {
  const values = [];
  let value = 0;
  let shift = 0;
  for (const letter of text) {
    const digit = DIGITS.indexOf(letter);
    value += (digit & 31) * 2 ** shift;
    shift += 5;
    if (digit & 32) continue;
    values.push(value % 2 ? -(value - 1) / 2 : value / 2);
    value = shift = 0;
  }
  return values;
};

// The tokens of an answer that the page holds: text, place in the answer, forward, and whether they count as answer.
const tokensOf = (answer) => {
  const lengths = unpack(answer.lengths);
  const written = [];
  unpack(answer.written).forEach((step, place) => written.push(step + (written[place - 1] || 0)));
  const [head, leftOut, tail] = Array.isArray(answer.text) ? answer.text : [answer.text, 0, ""];
  const [gap, skipped] = answer.skip || [Infinity, 0];
  const [from, to] = answer.span || [0, Infinity];
  let at = 0;
  const tokens = lengths.map((length, n) => {
    const place = n < gap ? n : n + skipped;
    const start = n < gap ? at : at - head.length;
    const text = (n < gap ? head : tail).slice(start, start + length);
    const offset = n < gap ? at : at + leftOut;
    at += length;
    return { text, place, forward: written[place], counts: offset + length > from && offset < to };
  });
  return { tokens, written, leftOut, gap };
};

// What each forward wrote and dropped, from 1; kind and width where the run's counts leave no doubt.
const forwardsOf = (answer, written) => {
  const kinds = Object.entries(answer.forwards || {});
  const total = Math.max(sum(kinds.map(([, number]) => number)), ...written);
  const prefills = answer.forwards?.prefill || 0;
  const others = kinds.map(([kind]) => kind).filter((kind) => kind !== "prefill");
  const forwards = Array.from({ length: total }, (_, n) => ({
    kind: n < prefills ? "prefill" : others.length === 1 ? others[0] : "", wrote: 0, dropped: 0,
  }));
  for (const forward of written) forwards[forward - 1].wrote += 1;
  for (const [forward, , tokens] of answer.rejected || []) if (forwards[forward - 1]) forwards[forward - 1].dropped += tokens;
  if (others.length === 1 && answer.predicted?.length === total - prefills)
    answer.predicted.forEach((width, round) => { forwards[prefills + round].drafted = width; });
  return forwards;
};

const describe = ({ kind, wrote, drafted, dropped }, n, all) =>
  `forward ${n} of ${all}` + (kind && ` (${kind})`) + `: ${wrote ? `wrote ${plural(wrote, "token")}` : "wrote nothing"}` +
  (drafted ? `, stride ${drafted}` : "") + (dropped ? `, ${plural(dropped, "draft token")} rejected` : "");

const SVG = "http://www.w3.org/2000/svg";
const rect = (x, y, height, name) => {
  const shape = document.createElementNS(SVG, "rect");
  for (const [key, value] of Object.entries({ x, y, width: 0.8, height, class: name })) shape.setAttribute(key, value);
  return shape;
};

// The rhythm: a bar a forward, as high as what it wrote; above it, pale, what it dropped.
const rhythm = (forwards, choose, most) => {
  const top = Math.max(4, ...forwards.map(({ wrote, dropped }) => wrote + dropped));
  const strip = document.createElementNS(SVG, "svg");
  strip.setAttribute("viewBox", `0 0 ${forwards.length} ${top}`);
  strip.setAttribute("preserveAspectRatio", "none");
  strip.setAttribute("aria-hidden", "true");
  strip.setAttribute("class", "rhythm");
  strip.style.width = `${(100 * forwards.length) / most}%`; // beside others, a forward is as wide as theirs
  strip.style.maxWidth = `${forwards.length}rem`;
  const bars = forwards.map((forward, n) => {
    const bar = document.createElementNS(SVG, "g");
    const title = document.createElementNS(SVG, "title");
    title.textContent = describe(forward, n + 1, forwards.length);
    bar.append(title, rect(n, 0, top, "back"));
    if (forward.dropped) bar.append(rect(n, top - forward.wrote - forward.dropped, forward.dropped, "dropped"));
    const height = forward.wrote || top / 40;
    bar.append(rect(n, top - height, height, forward.wrote ? `w${level(forward.wrote)}` : "nothing"));
    bar.addEventListener("click", () => choose(n + 1));
    return bar;
  });
  strip.append(...bars);
  return { strip, bars };
};

// The text: tokens written together and standing together share a box; rejected draft tokens stand before what came instead.
const textOf = (answer, { tokens, leftOut, gap }, forwards, choose) => {
  const pre = make("pre", undefined, "tokens");
  const boxes = [];
  const drafts = new Map();
  for (const [forward, place, number, text] of answer.rejected || [])
    drafts.set(place, [...(drafts.get(place) || []), { forward, number, text }]);
  const reject = (place) => {
    for (const { forward, number, text } of drafts.get(place) || []) {
      const draft = make("del", text.replaceAll("\n", "↵"));
      draft.title = `forward ${forward}: ${plural(number, "draft token")} rejected`;
      pre.append(draft);
      boxes.push({ node: draft, forward });
    }
    drafts.delete(place);
  };
  let box;
  let odd = false;
  tokens.forEach((token, n) => {
    if (n === gap) pre.append(make("span", ` … ${count(leftOut)} characters left out here … `, "note"));
    const apart = drafts.has(token.place);
    reject(token.place);
    if (!box || n === gap || apart || box.forward !== token.forward || box.counts !== token.counts) {
      const { wrote } = forwards[token.forward - 1];
      odd = !odd;
      const node = make("span", undefined, `box w${level(wrote)}` + (odd ? " odd" : "") + (token.counts ? "" : " off"));
      node.title = describe(forwards[token.forward - 1], token.forward, forwards.length) + (token.counts ? "" : "; not part of the answer");
      const { forward } = token;
      node.addEventListener("click", () => choose(forward));
      box = { node, forward, counts: token.counts };
      boxes.push(box);
      pre.append(node);
    }
    box.node.append(make("span", token.text, token.text.includes("\n") ? "token line" : "token"));
  });
  for (const place of [...drafts.keys()].sort((a, b) => a - b)) reject(place);
  if (!tokens.length) pre.append(make("span", "(empty)", "note"));
  pre.tabIndex = 0;
  pre.setAttribute("role", "group");
  return { pre, boxes };
};

// A viewer: its element, how many forwards, and `go`, which shows the answer as it stood after a forward.
const viewer = (answer, name, most) => {
  const parts = tokensOf(answer);
  const forwards = forwardsOf(answer, parts.written);
  const all = forwards.length;
  const node = make("div", undefined, "trace");
  const slider = make("input");
  Object.assign(slider, { type: "range", min: 0, max: all, value: all });
  slider.setAttribute("aria-label", `Forward, answer ${name}`.trim());
  const now = make("p", undefined, "now");
  const choose = (forward) => { stop(); go(forward); slider.focus({ preventScroll: true }); };
  const { strip, bars } = rhythm(forwards, choose, Math.max(all, most));
  const { pre, boxes } = textOf(answer, parts, forwards, choose);
  pre.setAttribute("aria-label", `Answer ${name}, as written`.trim());
  const go = (forward) => {
    slider.value = forward;
    for (const box of boxes) {
      box.node.classList.toggle("later", box.forward > forward);
      box.node.classList.toggle("current", box.forward === forward);
    }
    bars.forEach((bar, n) => {
      bar.classList.toggle("later", n >= forward);
      bar.classList.toggle("current", n === forward - 1);
    });
    const words = forward ? describe(forwards[forward - 1], forward, all) : "nothing written yet";
    now.textContent = words;
    const fresh = parts.tokens.filter((token) => token.forward === forward).map((token) => token.text).join("");
    slider.setAttribute("aria-valuetext", words + (fresh && `: ${fresh.trim() || "blank"}`));
  };
  const play = make("button", "Play");
  play.type = "button";
  const { start, stop } = player(play, () => Number(slider.value), go, all, `answer ${name}`.trim());
  play.addEventListener("click", start);
  slider.addEventListener("input", () => { stop(); go(Number(slider.value)); });
  const controls = make("div", undefined, "controls");
  controls.append(play, slider);
  if (answer.rejected?.length) {
    const label = make("label", undefined, "check");
    const box = make("input");
    box.type = "checkbox";
    box.addEventListener("change", () => pre.classList.toggle("drafts", box.checked));
    label.append(box, ` ${plural(sum(answer.rejected.map(([, , tokens]) => tokens)), "rejected draft token")}`);
    controls.append(label);
  }
  const written = parts.written.length;
  now.textContent = `${plural(written, "token")} in ${plural(all, "forward")}: ${(written / all).toFixed(2)} a forward, at most ${Math.max(...forwards.map(({ wrote }) => wrote))}`;
  slider.setAttribute("aria-valuetext", now.textContent);
  node.append(strip, controls, now, pre);
  return { node, all, go, stop };
};

// A button that plays a replay forward by forward, or steps through it where motion is not wanted.
const player = (button, at, go, all, name) => {
  let timer;
  const label = () => {
    button.textContent = timer ? "Pause" : still.matches ? "Next forward" : "Play";
    button.setAttribute("aria-label", `${button.textContent} ${name}`.trim());
  };
  const stop = () => { clearInterval(timer); timer = undefined; label(); };
  const step = () => { if (at() >= all || !button.isConnected) stop(); else go(at() + 1); };
  const start = () => {
    if (timer) return stop();
    if (at() >= all) go(0);
    if (still.matches) return step();
    timer = setInterval(step, STEP);
    label();
  };
  label();
  return { start, stop };
};

const legend = () => {
  const line = make("p", "Tokens written in one forward: ", "legend soft");
  LEVELS.forEach((words, n) => line.append(make("span", words, `box w${n + 1}`), " "));
  return line;
};

// Replays side by side, one forward of each at a time.
const race = (viewers) => {
  const button = make("button");
  button.type = "button";
  let at = 0;
  const all = Math.max(...viewers.map((one) => one.all));
  const go = (forward) => { at = forward; for (const one of viewers) one.go(Math.min(forward, one.all)); };
  at = all;
  const { start } = player(button, () => at, go, all, "all answers together");
  const label = make("span", " all together, a forward each at a time", "soft");
  button.addEventListener("click", () => { for (const one of viewers) one.stop(); start(); });
  const line = make("p", undefined, "race");
  line.append(button, label);
  return line;
};
