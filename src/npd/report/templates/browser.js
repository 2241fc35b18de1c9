// The browser of samples: a list to sort, filter and search, and one sample with its tokens.

const UNSEEN = /(?:[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff])+/g;

// Text with its unseen characters named, so that none of them acts on its neighbours; those that follow each other in one
// element, each with how often it is repeated. A fragment, because a call takes only so many arguments.
function shown(text) {
  const out = document.createDocumentFragment();
  let at = 0;
  for (const match of text.matchAll(UNSEEN)) {
    out.append(text.slice(at, match.index));
    const named = [];
    for (const [run] of match[0].matchAll(/([^])\1*/g)) {
      const code = run.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
      named.push(`U+${code}${run.length > 1 ? ` × ${run.length.toLocaleString("en")}` : ""}`);
    }
    out.append(element("span", { className: "u", textContent: named.join(" ") }));
    at = match.index + match[0].length;
  }
  out.append(text.slice(at));
  return out;
}

const fixed = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−"));
const generationName = (g) => (g < 0 ? "references" : `g${g}`);
const short = (text, most = 160) => [...text.slice(0, 2 * most)].slice(0, most).join("");

function browser(place, { samples, vocabulary, responses }) {
  const FULL = 3;  // nats at which a token's colour is full
  const columns = [
    ["Verdict", "7.6rem", (s) => s.verdict], ["Δ", "4.4rem", (s) => s.delta], ["Tokens", "4.8rem", (s) => s.n],
    ["Gen.", "4rem", (s) => s.g], ["Response", "auto", (s) => s.pieces.join("")],
  ];
  const whole = samples.map((s) => s.pieces.join("") + s.rest);
  const searched = samples.map((s, i) => `${s.id}\n${s.source}\n${s.prompt}\n${whole[i]}`.toLowerCase());
  let sort = { column: -1, down: false }, visible = samples.map((_, i) => i), selected = 0;

  // -- filters

  const choice = (name, values, say = (v) => v) => {
    const select = element("select", {}, element("option", { value: "", textContent: "all" }));
    values.forEach((value, i) => select.append(element("option", { value: String(i + 1) }, shown(short(say(value) || "(none)", 60)))));
    select.addEventListener("change", update);
    return [element("label", {}, name, select), (value) => !select.value || values[select.value - 1] === value];
  };
  const distinct = (pick) => [...new Set(samples.map(pick))].sort((a, b) => (a < b ? -1 : 1));
  const [verdictLabel, verdictFits] = choice("Verdict", distinct((s) => s.verdict));
  const [generationLabel, generationFits] = choice("Generation", distinct((s) => s.g), generationName);
  const [sourceLabel, sourceFits] = choice("Source", distinct((s) => s.source));
  const [finishLabel, finishFits] = choice("Ended by", distinct((s) => s.finish));
  const search = element("input", { type: "search", placeholder: "in prompts and responses" });
  search.addEventListener("input", update);
  const count = element("p", { className: "note", attributes: { role: "status" } });
  const filters = element("div", { className: "filters" }, verdictLabel, generationLabel, sourceLabel, finishLabel,
    element("label", { className: "grow" }, "Search", search));

  // -- the list

  const body = element("tbody");
  const heads = columns.map(([name, width], i) => {
    const button = element("button", { type: "button", textContent: name });
    button.addEventListener("click", () => {
      sort = { column: i, down: sort.column === i && !sort.down };
      update();
    });
    const head = element("th", { scope: "col" }, button);
    head.style.width = width;
    return head;
  });
  const list = element("div", { className: "list", tabIndex: 0, attributes: { role: "region", "aria-label": "List of samples; arrow keys choose one" } },
    element("table", { attributes: { "aria-label": "Samples" } }, element("thead", {}, element("tr", {}, ...heads)), body));
  const rows = samples.map((s, i) => {
    const row = element("tr", { attributes: { "data-sample": i } },
      element("td", {}, element("span", { className: "chip" }, s.verdict)),
      element("td", { textContent: fixed(s.delta) }), element("td", { textContent: String(s.n) }),
      element("td", { textContent: generationName(s.g) }),
      element("td", {}, element("bdi", {}, shown(short(whole[i]).replace(/\s+/g, " ")))));
    if (/^[a-z]+$/.test(s.verdict)) row.querySelector(".chip").classList.add(s.verdict);
    row.addEventListener("click", () => choose(i));
    return row;
  });
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || !visible.length) return;
    event.preventDefault();
    const at = visible.indexOf(selected);
    choose(visible[Math.min(visible.length - 1, Math.max(0, at + step))]);
    rows[selected].scrollIntoView({ block: "nearest" });
  });

  function update() {
    const wanted = search.value.toLowerCase();
    visible = samples.map((_, i) => i).filter((i) => {
      const s = samples[i];
      return verdictFits(s.verdict) && generationFits(s.g) && sourceFits(s.source) && finishFits(s.finish) && searched[i].includes(wanted);
    });
    if (sort.column >= 0) {
      const key = columns[sort.column][2];
      const order = (a, b) => (a === b ? 0 : a === null ? 1 : b === null ? -1 : (a < b ? -1 : 1) * (sort.down ? -1 : 1));
      visible.sort((i, j) => order(key(samples[i]), key(samples[j])) || i - j);
    }
    heads.forEach((head, i) => {
      head.setAttribute("aria-sort", i !== sort.column ? "none" : sort.down ? "descending" : "ascending");
      head.firstChild.textContent = columns[i][0] + (i !== sort.column ? "" : sort.down ? " ↓" : " ↑");
    });
    body.replaceChildren(...visible.map((i) => rows[i]));
    count.textContent = `${visible.length.toLocaleString("en")} of ${samples.length.toLocaleString("en")} samples shown, chosen from ` +
      `${responses.toLocaleString("en")} responses: alike many of every generation, source and verdict, as far as they go.`;
    if (visible.length && !visible.includes(selected)) choose(visible[0]);
  }

  // -- one sample

  const sample = element("div", { className: "sample", attributes: { role: "region", "aria-label": "The chosen sample" } });

  function choose(i) {
    selected = i;
    rows.forEach((row, at) => at === i ? row.setAttribute("aria-current", "true") : row.removeAttribute("aria-current"));
    const s = samples[i], told = element("p", { className: "told", attributes: { role: "status" } });
    const facts = [
      ["Sample", s.id], ["Source", s.source || "(none)"], ["Verdict", `${s.verdict}; Δ = ${fixed(s.delta)}`],
      ["IFD", `student ${fixed(s.ifd[0])}, teacher ${fixed(s.ifd[1])}`],
      ["Nats a token", `student ${fixed(s.nll[0])}, teacher ${fixed(s.nll[1])}`],
      ["Length", `${s.n.toLocaleString("en")} token${s.n === 1 ? "" : "s"}, ended by ${s.finish || "–"}` + (s.mass === undefined ? "" : `; the teacher's top-k hold ${fixed(s.mass, 4)}`)],
    ];
    const text = element("div", { className: "text", tabIndex: 0, attributes: { role: "group", "aria-label": "Response; arrow keys go through its tokens" } });
    s.pieces.forEach((piece, t) => {
      const token = element("span", { className: "t", attributes: { "data-token": t } }, shown(piece));
      const gap = gapOf(s, t);
      if (gap !== null) {
        const strength = Math.min(1, Math.abs(gap) / FULL) * 0.75;
        if (strength > 0.02) token.style.backgroundColor = `rgba(var(${gap > 0 ? "--more" : "--less"}), ${strength.toFixed(3)})`;
        if (s.bounded[t] === "1") token.classList.add("bounded");
      }
      text.append(token);
    });
    text.append(shown(s.rest));
    let now = -1;
    const point = (t) => {
      if (text.children[now]) text.children[now].classList.remove("now");
      now = t;
      text.children[t].classList.add("now");
      told.replaceChildren(...tokenTold(s, t));
    };
    text.addEventListener("mouseover", (event) => {
      const token = event.target.closest("[data-token]");
      if (token) point(Number(token.dataset.token));
    });
    text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !s.pieces.length) return;
      event.preventDefault();
      point(Math.min(s.pieces.length - 1, Math.max(0, now + step)));
    });
    const parts = [
      element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", {}, element("bdi", {}, shown(value)))])),
      element("h3", { textContent: "Prompt" }),
      element("div", { className: "text", tabIndex: 0, attributes: { role: "group", "aria-label": "Prompt" } }, shown(s.prompt)),
      element("h3", { textContent: "Response" }),
    ];
    if (s.student) {
      parts.push(element("div", { className: "scale" }, "teacher surer", element("i"), "student surer",
        element("span", {}, "gap = log p_S − log p_T of the token, full colour at ±3 nats; dotted: outside of the teacher's top-k, the gap is at least that")));
    }
    sample.replaceChildren(...parts, text, told);
  }

  function gapOf(s, t) {
    if (!s.student || s.student[t] === null || s.student[t] === undefined || s.teacher[t] === null) return null;
    return (s.student[t] - s.teacher[t]) / 100;
  }

  function tokenTold(s, t) {
    const out = [`Token ${t + 1}: “`, shown(s.pieces[t]), "”"];
    if (!s.teacher || s.teacher[t] === undefined) return out;
    const gap = gapOf(s, t), bounded = s.bounded[t] === "1";
    const probability = (hundredths) => (100 * Math.exp(hundredths / 100)).toPrecision(3) + "%";
    if (s.student[t] !== null) out.push(`; student ${probability(s.student[t])}`);
    out.push(`, teacher ${bounded ? "at most " : ""}${probability(s.teacher[t])}`);
    if (gap !== null) out.push(`, gap ${bounded ? "at least " : ""}${fixed(gap, 2)} nats`);
    out.push("; the teacher's first choice is “", shown(vocabulary[s.best[t]] || ""), `” with ${s.bestp[t]}%.`);
    return out;
  }

  place.append(filters, count, element("div", { className: "panes" }, list, sample));
  update();
  choose(visible[0]);
}
