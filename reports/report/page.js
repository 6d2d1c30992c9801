// The page's frame: what its address says, its tabs, its theme. The address is the only memory: #tab&name=value&…
const DEFAULTS = { tab: "", theme: "", task: "", score: "", gate: "", key: "", q: "", page: "1", open: "" };
const THEMES = ["", "light", "dark"];
const $ = (id) => document.getElementById(id);
const make = (tag, text, name) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
};
const count = (number) => number.toLocaleString("en");
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

let state = { ...DEFAULTS };
const read = () => {
  const words = location.hash.slice(1).split("&");
  const tab = words[0].includes("=") ? "" : words.shift();
  state = { ...DEFAULTS, ...Object.fromEntries(new URLSearchParams(words.join("&"))), tab };
  if (!THEMES.includes(state.theme)) state.theme = "";
};
const write = () => {
  const set = Object.entries(state).filter(([name, value]) => name in DEFAULTS && name !== "tab" && value !== DEFAULTS[name]);
  const words = new URLSearchParams(set).toString();
  history.replaceState(null, "", "#" + (state.tab === "summary" && !words ? "" : state.tab) + (words && "&" + words));
};

const tabs = [...$("tabs").children];
const panels = tabs.map((tab) => $(tab.hash.slice(1)));
const showTab = () => {
  let now = panels.findIndex((panel) => panel.id === state.tab);
  if (now < 0) now = tabs.findIndex((tab) => tab.id === (state.key || state.q || state.task ? "tab-samples" : "tab-summary"));
  state.tab = panels[now].id;
  tabs.forEach((tab, place) => {
    tab.setAttribute("aria-selected", String(place === now));
    tab.tabIndex = place === now ? 0 : -1;
    panels[place].hidden = place !== now;
  });
  const strip = $("tabs");
  strip.scrollLeft = Math.max(0, tabs[now].offsetLeft - strip.clientWidth / 3);
};
const goTo = (tab) => {
  state.tab = tab.hash.slice(1);
  showTab();
  write();
  if (scrollY > $("tabs").parentElement.offsetTop) scrollTo(0, $("tabs").parentElement.offsetTop);
};
$("tabs").setAttribute("role", "tablist");
$("tabs").setAttribute("aria-label", "Sections");
tabs.forEach((tab, place) => {
  tab.setAttribute("role", "tab");
  tab.setAttribute("aria-controls", panels[place].id);
  panels[place].setAttribute("role", "tabpanel");
  panels[place].tabIndex = 0;
  tab.addEventListener("click", (event) => {
    event.preventDefault();
    goTo(tab);
  });
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: -1, " ": place }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = tabs.at(to % tabs.length);
    goTo(next);
    next.focus({ preventScroll: true });
  });
});

const showTheme = () => {
  document.documentElement.dataset.theme = state.theme;
  $("theme").textContent = `Theme: ${state.theme || "auto"}`;
};
$("unscripted").remove();
$("theme").hidden = $("finder").hidden = false;
$("theme").addEventListener("click", () => {
  state.theme = THEMES[(THEMES.indexOf(state.theme) + 1) % THEMES.length];
  showTheme();
  write();
});
addEventListener("beforeprint", () => document.querySelectorAll("details.print").forEach((box) => { box.open = true; }));
