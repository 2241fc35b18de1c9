"use strict";
// Nothing here writes markup: text goes to text nodes, so what a model wrote stays text.

const root = document.documentElement;
const node = (id) => document.getElementById(id);

function element(tag, { attributes = {}, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

async function unpacked(id) {
  const text = node(id).textContent;
  const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

// -- light and dark

const dark = matchMedia("(prefers-color-scheme: dark)");
const themes = { auto: ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };
let theme = "auto";

function remember(value) {
  try {
    if (value === undefined) return localStorage.getItem("npd-theme");
    localStorage.setItem("npd-theme", value);
  } catch { /* a file opened from disk may have no storage */ }
  return null;
}

function applyTheme(redraw) {
  root.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
  const [sign, said] = themes[theme];
  node("theme").textContent = sign;
  node("theme").setAttribute("aria-label", `Colours: ${said}. Press to change.`);
  if (redraw) drawAll();
}

// -- plots

let figures = {};

// "@name" and "@name/alpha" are colours of the theme.
function tint(colour) {
  const [name, alpha] = colour.slice(1).split("/");
  const hex = getComputedStyle(root).getPropertyValue(`--${name}`).trim() || "#888888";
  if (alpha === undefined) return hex;
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return `rgba(${r},${g},${b},${alpha})`;
}

// What stands under a key that names a colour is one; a label that begins with "@" is a label.
function coloured(value, key = "") {
  if (typeof value === "string") return key.endsWith("color") && value.startsWith("@") ? tint(value) : value;
  if (Array.isArray(value)) return value.length && typeof value[0] !== "object" ? value : value.map((inner) => coloured(inner));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, coloured(inner, name)]));
  }
  return value;
}

function draw(place) {
  const { traces, layout, height } = figures[place.dataset.figure];
  const axis = (given) => ({
    automargin: true, gridcolor: tint("@grid"), zerolinecolor: tint("@line"), linecolor: tint("@line"),
    exponentformat: "e", separatethousands: true, ...given, title: { standoff: 8, ...(given || {}).title },
  });
  const names = traces.filter((trace) => trace.showlegend !== false).map((trace) => trace.name || "");
  const several = names.length > 1;
  const width = names.reduce((sum, name) => sum + 45 + 7 * Math.min(name.length, 40), 0);
  const legend = several ? 20 * Math.ceil(width / Math.max(200, place.clientWidth - 60)) : 0;  // pixels it takes
  const tags = (layout.annotations || []).length ? 12 : 0;
  const themed = coloured({
    ...layout,
    height: height + Math.max(0, legend - 20),
    margin: { l: 48, r: 14, t: legend + tags + 12, b: 40 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: "@muted" },
    showlegend: several,
    legend: { orientation: "h", x: 0, yref: "container", y: 1, yanchor: "top", font: { size: 11 } },
    hoverlabel: { namelength: 40 },
    hovermode: "closest",
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
  });
  place.style.height = `${themed.height}px`;
  const options = { displayModeBar: false, responsive: true, showLink: false, plotlyServerURL: "" };
  return Plotly.react(place, coloured(traces), themed, options);
}

async function drawAll() {
  const places = [...document.querySelectorAll(".plot")];
  const seen = (place) => Math.abs(place.getBoundingClientRect().top - innerHeight / 2);
  places.sort((a, b) => seen(a) - seen(b));  // nearest first
  for (const place of places) {
    await draw(place);
    await new Promise((done) => setTimeout(done));
  }
  root.dataset.drawn = places.length;
}

// -- tables

// A table that its card has no room for becomes a list of rows; without this script its card scrolls.
function fitTables() {
  for (const box of document.querySelectorAll(".scroll")) {
    const table = box.firstElementChild;
    table.classList.remove("stacked");
    table.classList.toggle("stacked", table.offsetWidth > box.clientWidth);
  }
}

function keepTablesFit() {
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (entry.contentRect.width === width) return;
    width = entry.contentRect.width;
    fitTables();
  }).observe(node("main"));
  fitTables();
}

function copyButtons() {
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const text = button.parentElement.querySelector("pre");
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(text);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }
}

async function start() {
  theme = themes[remember()] ? remember() : "auto";
  applyTheme(false);
  node("theme").addEventListener("click", () => {
    const names = Object.keys(themes);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    remember(theme);
    applyTheme(true);
  });
  dark.addEventListener("change", () => theme === "auto" && applyTheme(true));
  copyButtons();
  keepTablesFit();
  const library = node("island-plotly").textContent ? unpacked("island-plotly") : null;  // inflated meanwhile
  const data = JSON.parse(await unpacked("island-data"));
  figures = data.figures;
  if (node("browser")) {
    try {
      browser(node("browser"), data);
    } catch (error) {  // the plots are worth having without it
      console.error(error);
      node("browser").replaceChildren(element("p", { className: "missing", textContent: `The samples can't be shown: ${error}` }));
    }
  }
  if (library) {
    const { nonce } = document.querySelector("script[nonce]");
    const script = element("script", { nonce, textContent: await library });
    document.head.append(script);
    await drawAll();
  }
  root.dataset.ready = "true";
}
