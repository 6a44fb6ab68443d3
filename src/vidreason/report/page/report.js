"use strict";
// Charts and the gallery. Everything else of the page works without a script.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const chosen = figures.map(() => 0);
  const drawn = new Set();

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    return { text: read("--text"), line: read("--line") };
  }

  function themed(layout, width) {
    const { text, line } = colours();
    const out = { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
    out.font = { color: text, family: "inherit", size: width < 500 ? 11 : 13 };
    out.margin = { l: 56, r: 16, t: layout.title || layout.showlegend ? 44 : 16, b: 48, ...layout.margin };
    for (const axis of ["xaxis", "yaxis"]) {
      const line_ = { gridcolor: line, linecolor: line, zerolinecolor: line, fixedrange: true };
      const title = { ...(layout[axis] || {}).title, font: { size: out.font.size } };
      out[axis] = { showgrid: true, zeroline: false, automargin: true, ...line_, ...layout[axis], title };
    }
    out.dragmode = false;
    out.autosize = true;
    return out;
  }

  function draw(number) {
    const place = document.getElementById(`chart${number}`);
    const found = figures[number][chosen[number]];
    while (place.children.length > found.length) {
      Plotly.purge(place.lastElementChild);
      place.lastElementChild.remove();
    }
    while (place.children.length < found.length) place.append(document.createElement("div"));
    found.forEach((figure, i) => {
      const box = place.children[i];
      const layout = themed(figure.layout, place.clientWidth);
      Plotly.react(box, figure.data, layout, { displayModeBar: false, responsive: true });
    });
    drawn.add(number);
  }

  const redraw = () => drawn.forEach(draw);
  // A chart is drawn when it comes near the window; all are before the page is printed.
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const number = Number(entry.target.id.slice("chart".length));
      if (entry.isIntersecting && !drawn.has(number)) draw(number);
    }
  }, { rootMargin: "600px" });
  figures.forEach((_, number) => near.observe(document.getElementById(`chart${number}`)));
  for (const select of document.querySelectorAll("select[data-chart]")) {
    select.addEventListener("change", () => {
      const number = Number(select.dataset.chart);
      chosen[number] = Number(select.value);
      draw(number);
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  matchMedia("print").addEventListener("change", () => figures.forEach((_, number) => draw(number)));

  const form = document.getElementById("controls");
  const list = document.getElementById("list");
  const clips = [...list.children];
  const texts = new Map(clips.map((clip) => [clip, clip.textContent.toLowerCase()]));
  const number = (clip, key) => Number(clip.dataset[key]);
  const orders = {
    order: (a, b) => number(a, "order") - number(b, "order"),
    sure: (a, b) => number(b, "sure") - number(a, "sure"),
    unsure: (a, b) => number(a, "sure") - number(b, "sure"),
    reward: (a, b) => number(b, "reward") - number(a, "reward"),
    name: (a, b) => a.dataset.name.localeCompare(b.dataset.name),
  };

  function show() {
    const given = new FormData(form);
    const text = given.get("text").toLowerCase();
    let count = 0;
    for (const clip of clips) {
      const fits = ["result", "split", "label"].every((key) => !given.get(key) || clip.dataset[key] === given.get(key));
      clip.hidden = !(fits && texts.get(clip).includes(text));
      count += clip.hidden ? 0 : 1;
    }
    list.append(...clips.sort(orders[given.get("sort")]));
    document.getElementById("count").textContent = `${count} of ${clips.length} clips`;
  }

  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
})();
